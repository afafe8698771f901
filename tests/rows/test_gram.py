"""Gradients of every dtype, layout, length and number, as a user has them."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmpareto_optim import MMParetoOptimizer, mmpareto_coefficients
from tests.models import (
    FLOAT32_PRODUCTS,
    LateFusion,
    assert_gram,
    audio_visual_batch,
    vectors_as_losses,
)


def wrapped(*params: Tensor, **options: Any) -> MMParetoOptimizer:
    return MMParetoOptimizer(torch.optim.SGD(params, lr=0.1), **options)


def linear_losses(params: list[nn.Parameter], rows: list[list[Tensor]]) -> dict[str, Tensor]:
    """Losses whose gradients are given, one tensor for each parameter."""
    return {
        f"loss{i}": torch.stack(
            [(p * g.conj()).sum().real.double() for p, g in zip(params, row, strict=True)]
        ).sum()
        for i, row in enumerate(rows)
    }


def wide(gradient: Tensor) -> Tensor:
    return gradient.to(torch.complex128) if gradient.is_complex() else gradient.double()


def flat(row: list[Tensor]) -> Tensor:
    """All numbers of a row, in the widest dtype among them."""
    parts = [torch.view_as_real(g).flatten() if g.is_complex() else g.flatten() for g in row]
    return torch.cat(parts)


def assert_combined(
    params: list[nn.Parameter], rows: list[list[Tensor]], coefficients: Tensor
) -> None:
    """That ``.grad`` is the sum with these coefficients, but for the rounding of its terms."""
    for i, param in enumerate(params):
        terms = [c * wide(row[i]) for c, row in zip(coefficients, rows, strict=True)]
        size = torch.stack([term.abs() for term in terms]).sum(0)
        steps = torch.promote_types(param.dtype, torch.float32)
        rounding = (len(rows) + 2) * torch.finfo(steps).eps + torch.finfo(param.dtype).eps
        assert param.grad is not None
        assert param.grad.dtype == param.dtype
        apart = (wide(param.grad) - torch.stack(terms).sum(0)).abs()
        assert (apart <= rounding * size).all()


CASES: dict[str, list[tuple[tuple[int, ...], torch.dtype]]] = {
    "float32": [((3, 4), torch.float32), ((5,), torch.float32)],
    "float64": [((3, 4), torch.float64), ((), torch.float64)],
    "bfloat16": [((30, 4), torch.bfloat16), ((5,), torch.bfloat16)],
    "float16": [((30, 4), torch.float16), ((5,), torch.float16)],
    "complex64": [((3, 4), torch.complex64), ((5,), torch.complex64)],
    "mixed": [
        ((3, 4), torch.float32),
        ((3,), torch.float64),
        ((2, 2), torch.complex64),
        ((7,), torch.bfloat16),
        ((4,), torch.float32),
    ],
    "long and short": [((200, 1000), torch.float32), ((3,), torch.float32)] * 2,
    "empty among others": [((0, 3), torch.float32), ((3,), torch.float32)],
}


@pytest.mark.parametrize("losses", [2, 5])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("conflict", [False, True])
def test_dtypes(case: str, conflict: bool, losses: int) -> None:
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in CASES[case]]
    first = [torch.randn_like(p) for p in params]
    sign = -0.5 if conflict else 0.5
    rows = [first] + [
        [(sign if i == 1 else 0.5) * g + torch.randn_like(g) * 0.3 for g in first]
        for i in range(1, losses)
    ]
    opt = wrapped(*params)
    opt.backward(linear_losses(params, rows))
    (stats,) = opt.stats.values()
    assert bool(stats.conflict) is conflict
    assert stats.gram.dtype == torch.float64
    assert_combined(params, rows, stats.coefficients)
    numbers = torch.stack([flat(row) for row in rows])
    exact = all(g.dtype == torch.float64 for g in first)
    assert_gram(stats.gram, numbers if exact else numbers.float())
    if any(g.dtype in (torch.float16, torch.bfloat16) for g in first):
        return  # the direction keeps clear of the rounding of the result, by more than a little
    matrix = numbers.double()
    expected = mmpareto_coefficients(matrix @ matrix.T)
    torch.testing.assert_close(
        stats.coefficients, expected, rtol=0, atol=0.02 * float(expected.max())
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_that_overflow_half_precision(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.zeros(1000, dtype=dtype))
    rows = torch.full((2, 1000), 1000.0, dtype=dtype)
    rows[1, :600] = -1000
    opt = wrapped(param)
    opt.backward(vectors_as_losses(param, rows))
    (stats,) = opt.stats.values()
    assert_gram(stats.gram, rows)
    assert stats.conflict
    assert param.grad is not None
    assert param.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:block .* the gradient of loss")
@given(st.integers(-30, 30), st.integers(-6, 6))
def test_lengths_whose_squares_overflow_or_vanish_in_float32(exponent: int, ratio: int) -> None:
    ratio = max(-38, min(37, exponent + ratio)) - exponent
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    rows *= torch.tensor([[10.0**exponent], [10.0 ** (exponent + ratio)]])
    param = nn.Parameter(torch.zeros(2))
    opt = wrapped(param)
    opt.backward(vectors_as_losses(param, rows))
    assert param.grad is not None
    assert param.grad.isfinite().all()
    assert param.grad.any()
    exact = rows.double() @ param.grad.double()
    lengths = rows.double().norm(dim=1) * param.grad.double().norm()
    assert (exact >= -1e-7 * lengths).all()


@pytest.fixture(params=["highest", "medium"])
def matmul_precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("matmul_precision")
def test_the_global_matmul_precision_does_not_matter() -> None:
    """Fewer bits would make these numbers signs alone, and each length 5e-4 shorter."""
    param = nn.Parameter(torch.zeros(300_001))
    rows = torch.randn(3, 300_001).sign() * (1 + 2**-11)
    opt = wrapped(param)
    opt.backward(vectors_as_losses(param, rows))
    (stats,) = opt.stats.values()
    assert_gram(stats.gram, rows)
    length = math.sqrt(300_001) * (1 + 2**-11)
    torch.testing.assert_close(
        stats.norms, torch.full((3,), length).double(), rtol=FLOAT32_PRODUCTS, atol=0
    )


@given(
    st.integers(2, 20),
    st.sampled_from([1, 255, 256, 257, 1000, 2**14, 2**17 + 3]),
    st.floats(-0.99, 0.99),
    st.floats(-12, 12),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 99),
)
@settings(max_examples=40)
@pytest.mark.filterwarnings("ignore:block .* the gradient of loss")
def test_gram_matrix_of_rows_of_any_length_and_number(
    number: int, size: int, common: float, exponent: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(number, size, generator=generator) * (1 - abs(common))
    rows[:2] += common * torch.randn(size, generator=generator)
    rows[1] *= 1 if common > 0 else -1
    rows *= 10 ** (exponent * torch.rand(number, 1, generator=generator))
    rows = rows.to(dtype)
    param = nn.Parameter(torch.zeros(size, dtype=dtype))
    opt = wrapped(param, integration="uniform", gamma=1.0)
    opt.backward(vectors_as_losses(param, rows))
    (stats,) = opt.stats.values()
    assert_gram(stats.gram, rows)
    assert_combined([param], [[row] for row in rows], torch.ones(number, dtype=torch.float64))


def test_a_sum_that_cancels_is_exact_to_its_bound() -> None:
    """Against math.fsum, which does not round: products in float32 are exact in float64."""
    first = torch.randn(10_000)
    rows = torch.stack([first, first.flip(0) - first])
    param = nn.Parameter(torch.zeros(10_000))
    opt = wrapped(param)
    opt.backward(vectors_as_losses(param, rows))
    (stats,) = opt.stats.values()
    numbers = rows.double().tolist()
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            exact = math.fsum(x * y for x, y in zip(a, b, strict=True))
            lengths = math.hypot(*a) * math.hypot(*b)
            assert abs(float(stats.gram[i, j]) - exact) <= FLOAT32_PRODUCTS * lengths


@pytest.mark.parametrize("number", [3, 20])
def test_nearly_opposite_long_rows_among_many(number: int) -> None:
    """The result opposes none of them, though float32 does not tell the two from opposite."""
    size = 2**17 + 100
    rows = torch.randn(number, size)
    rows[1] = -rows[0] + 1e-4 * rows[1]
    param = nn.Parameter(torch.zeros(size))
    opt = wrapped(param)
    opt.backward(vectors_as_losses(param, rows))
    (stats,) = opt.stats.values()
    assert_gram(stats.gram, rows)
    assert_never_ascends(param, rows)


def assert_never_ascends(param: nn.Parameter, rows: Tensor) -> None:
    """But for the rounding of the result to the parameter's dtype."""
    assert param.grad is not None
    h = param.grad.double()
    rounding = 4 * torch.finfo(param.dtype).eps
    assert (rows.double() @ h >= -rounding * rows.double().norm(dim=1) * h.norm()).all()


@pytest.mark.parametrize("seed", range(4))
def test_long_float32_gradients_whose_sums_err_in_one_direction(seed: int) -> None:
    """Constant gradients: float32 products round the same way every time."""
    generator = torch.Generator().manual_seed(seed)
    opposite = torch.ones(2**17)
    opposite[1::2] = -1
    for _ in range(20):
        cosine, ratio, value = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        cosine, ratio, value = -0.9 - 0.09 * cosine, 10 ** (-2.5 - ratio / 2), 0.1 + value
        first = torch.full((2**17,), value)
        second = ratio * value * (cosine + (1 - cosine**2) ** 0.5 * opposite)
        param = nn.Parameter(torch.zeros(2**17))
        wrapped(param).backward(linear_losses([param], [[first], [second]]))
        assert_never_ascends(param, torch.stack([first, second]))
        assert param.grad is not None
        wanted = 1.5 * (first.double() + second.double()).norm()
        assert param.grad.double().norm() >= wanted * (1 - 0.05)


@pytest.mark.filterwarnings("ignore:block .* the gradient of loss")
@given(cosine=st.floats(-1, 1), ratio=st.floats(-4, 0), exponent=st.floats(-30, 30))
@settings(max_examples=30)
def test_long_and_short_gradients_follow_the_same_law(
    cosine: float, ratio: float, exponent: float
) -> None:
    """Repeating a gradient 2**14 times scales its Gram matrix, whichever way it is computed."""
    short = torch.tensor([[1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]]) * 10**exponent
    short[1] *= 10**ratio
    found = []
    for copies in (1, 2**14):
        param = nn.Parameter(torch.zeros(2 * copies))
        opt = wrapped(param)
        rows = short.repeat(1, copies)
        opt.backward(vectors_as_losses(param, rows))
        assert_never_ascends(param, rows)
        (stats,) = opt.stats.values()
        found.append(stats.gram / copies / stats.gram[0, 0] * copies)
    lengths = torch.outer(*[found[0].diagonal().sqrt()] * 2)
    assert ((found[0] - found[1]).abs() <= 4 * FLOAT32_PRODUCTS * lengths).all()


@pytest.mark.parametrize("losses", [1, 2])
def test_channels_last_parameters_get_channels_last_gradients(losses: int) -> None:
    param = nn.Parameter(torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last))
    other = nn.Parameter(torch.zeros(3))
    first = [torch.randn(4, 3, 5, 5), torch.randn(3)]
    rows = [first, [-0.5 * g + torch.randn_like(g) for g in first]][:losses]
    opt = wrapped(other, param)
    opt.backward(linear_losses([param, other], rows))
    assert param.grad is not None
    assert param.grad.stride() == param.stride()
    coefficients = torch.ones(1)
    if losses == 2:
        (stats,) = opt.stats.values()
        coefficients = stats.coefficients
    assert_combined([param, other], rows, coefficients)


@pytest.mark.parametrize("shape", [(4, 1, 3, 3), (4, 3, 1, 1), (1, 3, 3, 3)])
def test_channels_last_parameters_with_dimensions_of_size_1(shape: tuple[int, ...]) -> None:
    """Convolutions of gray images, and of single pixels: contiguous both ways."""
    param = nn.Parameter(torch.zeros(shape).to(memory_format=torch.channels_last))
    first = torch.randn(shape)
    rows = [[first], [-0.5 * first + torch.randn(shape)]]
    opt = wrapped(param)
    opt.backward(linear_losses([param], rows))
    (stats,) = opt.stats.values()
    assert_combined([param], rows, stats.coefficients)


def test_each_gradient_has_memory_of_its_own() -> None:
    model = LateFusion()
    opt = wrapped(*model.parameters())
    opt.backward(model.losses(audio_visual_batch()))
    for param in model.parameters():
        assert param.grad is not None
        assert param.grad.untyped_storage().nbytes() == param.nbytes
        param.grad.detach_()
    first, *others = [param.grad for param in model.parameters() if param.grad is not None]
    before = [(other._version, other.clone()) for other in others]
    first.zero_()
    for other, (version, values) in zip(others, before, strict=True):
        assert other._version == version
        assert other.equal(values)


@pytest.mark.parametrize("rescale", ["encoder", "tensor"])
def test_equal_zero_and_opposite_gradients(rescale: str) -> None:
    row = torch.tensor([1.0, -2.0, 3.0])
    zero = torch.zeros(3)
    for rows, expected in (
        ([row, row], 3 * row),
        ([row, zero], row),
        ([zero, zero], zero),
        ([row, -row], zero),
        ([row, -3 * row], zero),
    ):
        param = nn.Parameter(torch.zeros(3))
        opt = wrapped(param, rescale=rescale)
        opt.backward(vectors_as_losses(param, torch.stack(rows)))
        if rescale == "tensor" and not expected.any() and rows[0].any() and rows[1].norm() > 5:
            # The authors' stretch has no guard: what rounding leaves is blown up.
            assert param.grad is not None
            assert param.grad.isfinite().all()
            continue
        torch.testing.assert_close(param.grad, expected)
