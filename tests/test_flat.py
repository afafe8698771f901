"""Gradients of every dtype, layout and length, through the public API."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmpareto_optim import MMParetoOptimizer, mmpareto_coefficients
from mmpareto_optim.flat.block import FlatBlock
from mmpareto_optim.flat.combine import _combine_by_numbers, _combine_by_tensors
from mmpareto_optim.flat.gram import (
    QUICK_CHUNK,
    _cosines,
    _is_beyond_doubt,
    doubtful_pairs,
    leads_the_same_way,
)
from mmpareto_optim.flat.strips import error_of_float32
from mmpareto_optim.rules import Rounding, coefficients_of_blocks
from tests.models import LateFusion, audio_visual_batch, vectors_as_losses


def wrapped(*params: Tensor, **options: float) -> MMParetoOptimizer:
    return MMParetoOptimizer(torch.optim.SGD(params, lr=0.1), **options)  # type: ignore[arg-type]


def linear_losses(params: list[nn.Parameter], rows: list[list[Tensor]]) -> dict[str, Tensor]:
    """Losses whose gradients are given, one tensor for each parameter."""
    return {
        f"loss{i}": torch.stack(
            [(p * g.conj()).sum().real.double() for p, g in zip(params, row, strict=True)]
        ).sum()
        for i, row in enumerate(rows)
    }


def oracle(rows: list[list[Tensor]]) -> list[Tensor]:
    precise = {g.dtype for row in rows for g in row} <= {torch.float64}
    eps = torch.finfo(torch.float64 if precise else torch.float32).eps
    wide = [[g.to(torch.complex128) if g.is_complex() else g.double() for g in r] for r in rows]
    flat = [
        torch.cat([torch.view_as_real(g).flatten() if g.is_complex() else g.flatten() for g in r])
        for r in wide
    ]
    matrix = torch.stack(flat)
    half = {g.dtype for row in rows for g in row} & {torch.float16, torch.bfloat16}
    written = max((torch.finfo(dtype).eps / 2 for dtype in half), default=0.0)
    coefficients = mmpareto_coefficients(matrix @ matrix.T, eps=eps, written=written)
    return [
        sum(c * g for c, g in zip(coefficients, gradients, strict=True))
        for gradients in zip(*wide, strict=True)
    ]


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
    ],
    "several buckets": [((200, 1000), torch.float32)] * 3 + [((300_000,), torch.float32)],
    "empty among others": [((0, 3), torch.float32), ((3,), torch.float32)],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("conflict", [False, True])
def test_dtypes(case: str, conflict: bool) -> None:
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in CASES[case]]
    first = [torch.randn_like(p) for p in params]
    sign = -0.5 if conflict else 0.5
    second = [sign * g + torch.randn_like(g) * 0.1 for g in first]
    opt = wrapped(*params)
    opt.backward(linear_losses(params, [first, second]))
    (stats,) = opt.stats.values()
    assert bool(stats.conflict) is conflict
    for param, expected in zip(params, oracle([first, second]), strict=True):
        assert param.grad is not None
        assert param.grad.dtype == param.dtype
        torch.testing.assert_close(param.grad, expected.to(param.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_that_overflow_half_precision(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.zeros(1000, dtype=dtype))
    rows = torch.full((2, 1000), 1000.0, dtype=dtype)
    rows[1, :600] = -1000
    opt = wrapped(param)
    opt.backward(vectors_as_losses(param, rows))
    (stats,) = opt.stats.values()
    torch.testing.assert_close(float(stats.norms[0]), 1000 * 1000**0.5)
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
    param = nn.Parameter(torch.zeros(300_001))
    rows = torch.randn(3, 300_001).sign() * (1 + 2**-11)  # signs alone in TF32 and bfloat16
    opt = wrapped(param)
    opt.backward(vectors_as_losses(param, rows))
    (stats,) = opt.stats.values()
    exact = rows.double() @ rows.double().T
    torch.testing.assert_close(stats.gram, exact, rtol=0, atol=300_001 * error_of_float32())


@given(
    st.integers(3, 25),
    st.integers(2**17, 2**17 + 2**12),
    st.floats(-0.99, 0.99),
    st.floats(-12, 12),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_gram_matrix_of_many_long_rows(
    number: int, size: int, common: float, exponent: float, seed: int
) -> None:
    """Within the error of float32 products, with the signs of exact ones."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(number, size, generator=generator) * (1 - abs(common))
    rows[:2] += common * torch.randn(size, generator=generator)
    rows[1] *= 1 if common > 0 else -1
    rows *= 10 ** (exponent * torch.rand(number, 1, generator=generator))
    exact = rows.double() @ rows.double().T
    gram = FlatBlock([torch.zeros(size)], [[row] for row in rows]).gram()
    lengths = exact.diagonal().sqrt()
    apart = (gram - exact).abs() / lengths / lengths.unsqueeze(-1)
    assert float(apart.max()) <= error_of_float32()
    assert ((gram < 0) == (exact < 0)).all()
    parts = FlatBlock([torch.zeros(size)], [[row] for row in rows]).gram(quick=False)
    torch.testing.assert_close(
        parts / lengths / lengths.unsqueeze(-1), _cosines(exact), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("number", [3, 20])
def test_many_long_rows_that_float32_leaves_in_doubt_are_multiplied_exactly(number: int) -> None:
    size = 2**17 + 100
    rows = torch.randn(number, size)
    rows[1] = -rows[0] + 1e-4 * rows[1]  # nearly opposite
    exact = rows.double() @ rows.double().T
    gram = FlatBlock([torch.zeros(size)], [[row] for row in rows]).gram()
    torch.testing.assert_close(gram, exact, rtol=1e-12, atol=1e-9)


def test_channels_last_parameters_get_channels_last_gradients() -> None:
    param = nn.Parameter(torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last))
    rows = [[torch.randn(4, 3, 5, 5)], [-torch.randn(4, 3, 5, 5)]]
    opt = wrapped(param)
    opt.backward(linear_losses([param], rows))
    assert param.grad is not None
    assert param.grad.stride() == param.stride()
    torch.testing.assert_close(param.grad, oracle(rows)[0].float())


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
        torch.testing.assert_close(other, values, rtol=0, atol=0)


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
        opt = wrapped(param, rescale=rescale)  # type: ignore[arg-type]
        opt.backward(vectors_as_losses(param, torch.stack(rows)))
        if rescale == "tensor" and not expected.any() and rows[0].any() and rows[1].norm() > 5:
            # The authors' stretch has no guard: what rounding leaves is blown up.
            assert param.grad is not None
            assert param.grad.isfinite().all()
            continue
        torch.testing.assert_close(param.grad, expected)


class Launches(TorchDispatchMode):
    """Counts the operations that are more than a view: on a GPU each is a kernel or several."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aliases = [value.alias_info for value in func._schema.returns]
        launches = not any(alias and not alias.is_write for alias in aliases)
        self.count += launches and "empty" not in func.name()
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("integration", ["mmpareto", "uniform"])
def test_launches_do_not_grow_with_the_number_of_parameters(integration: Any) -> None:
    counts = []
    for number in (3, 60):
        for _ in range(2):  # the first step plans the layout
            with torch.device("meta"):
                params = [nn.Parameter(torch.zeros(7, 5)) for _ in range(number)]
                rows: Any = [[torch.zeros(7, 5) for _ in params] for _ in range(2)]
            with torch.no_grad(), Launches() as launches:  # type: ignore[no-untyped-call]
                block = FlatBlock(params, rows)
                block.combine(
                    *coefficients_of_blocks(
                        integration, [block.gram()], 1.5, [Rounding(2**-23)]
                    ))
        counts.append(launches.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("seed", range(10))
def test_long_float32_gradients_whose_sums_err_in_one_direction(seed: int) -> None:
    """Constant gradients: float32 products round the same way every time."""
    generator = torch.Generator().manual_seed(seed)
    opposite = torch.ones(2**17)
    opposite[1::2] = -1
    for _ in range(40):
        cosine, ratio, value = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        cosine, ratio, value = -0.9 - 0.09 * cosine, 10 ** (-2.5 - ratio / 2), 0.1 + value
        first = torch.full((2**17,), value)
        second = ratio * value * (cosine + (1 - cosine**2) ** 0.5 * opposite)
        param = nn.Parameter(torch.zeros(2**17))
        wrapped(param).backward(linear_losses([param], [[first], [second]]))
        assert param.grad is not None
        h = param.grad.double()
        assert h @ first.double() >= 0
        assert h @ second.double() >= 0
        (expected,) = oracle([[first], [second]])
        torch.testing.assert_close(h, expected, rtol=1e-2, atol=1e-2 * float(expected.norm()) / 362)


@pytest.mark.filterwarnings("ignore:block .* the gradient of loss")
@given(
    cosine=st.floats(-1, 1),
    ratio=st.floats(-4, 0),
    exponent=st.floats(-30, 30),
)
def test_long_and_short_gradients_follow_the_same_law(
    cosine: float, ratio: float, exponent: float
) -> None:
    """Repeating a gradient 2**17 times scales its Gram matrix, whichever way it is computed."""
    short = torch.tensor([[1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]]) * 10**exponent
    short[1] *= 10**ratio
    found = []
    for copies in (1, 2**17):
        param = nn.Parameter(torch.zeros(2 * copies))
        opt = wrapped(param)
        opt.backward(linear_losses([param], [[row.repeat(copies)] for row in short]))
        assert param.grad is not None
        found.append(param.grad[:2] / 10**exponent)
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-3)


def test_what_is_a_part_of_a_gram_matrix_is_exact() -> None:
    """Other ranks' parts may cancel it, and then no error is small."""
    rows: Any = [[torch.full((2**17,), value)] for value in (0.1, 0.7)]
    matrix = torch.cat([row[0].double().unsqueeze(0) for row in rows])
    gram = FlatBlock([torch.zeros(2**17)], rows).gram(quick=False)
    torch.testing.assert_close(gram, matrix @ matrix.T, rtol=1e-12, atol=0)


@given(cosine=st.floats(-1, 1), decades=st.floats(-4, 0), signs=st.tuples(*[st.booleans()] * 3))
@settings(max_examples=1000)
def test_float32_products_are_trusted_only_where_their_largest_error_misleads_nobody(
    cosine: float, decades: float, signs: tuple[bool, ...]
) -> None:
    """With 16 numbers added side by side, whatever this machine has."""
    cosine = cosine**3  # many small ones
    error = 2**-24 * QUICK_CHUNK / 16
    first, second = 1.0, 10 ** (2 * decades)
    bound = math.sqrt(first * second)
    off = [error if sign else -error for sign in signs]
    seen = (first * (1 + off[0]), bound * (cosine + off[1]), second * (1 + off[2]))
    if not _is_beyond_doubt(*seen):
        return
    assert (seen[1] < 0) == (cosine < 0)
    true, computed = (
        torch.tensor([[a, b], [b, c]], dtype=torch.float64)
        for a, b, c in ((first, cosine * bound, second), seen)
    )
    coefficients = mmpareto_coefficients(computed, eps=torch.finfo(torch.float32).eps)
    assert (true @ coefficients >= 0).all()
    # The lengths of h and of the sum are each off by at most error / (1 - |cos|).
    length, plain = (c @ true @ c for c in (coefficients, torch.ones_like(coefficients)))
    assert length.sqrt() >= 1.5 * plain.sqrt() * (1 - 0.0105)


@given(st.integers(3, 12), st.floats(0, 1), st.floats(-3, 0), st.integers(0, 999), st.booleans())
@settings(max_examples=500)
def test_float32_products_of_many_are_trusted_only_where_their_largest_error_misleads_nobody(
    number: int, common: float, decades: float, seed: int, opposed: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(number, 40, generator=generator, dtype=torch.float64) * (1 - common)
    rows += (common + 1e-9) * torch.randn(40, generator=generator, dtype=torch.float64)
    rows[0] *= -1 if opposed else 1
    rows *= 10 ** (decades * torch.rand(number, 1, generator=generator, dtype=torch.float64))
    true = rows @ rows.T
    lengths = true.diagonal().sqrt()
    off = torch.randint(0, 2, true.shape, generator=generator).triu() * 2 - 1
    off = off.triu() + off.triu(1).T
    seen = true + error_of_float32() * off * lengths * lengths.unsqueeze(-1)
    if doubtful_pairs(seen) or not leads_the_same_way(seen):
        return
    assert ((seen < 0) == (true < 0)).all()
    coefficients = mmpareto_coefficients(seen, eps=torch.finfo(torch.float32).eps)
    assert (true @ coefficients >= 0).all()
    length, plain = (c @ true @ c for c in (coefficients, torch.ones_like(coefficients)))
    assert length.sqrt() >= 1.5 * plain.sqrt() * (1 - 0.041)


@given(
    st.integers(1, 4),
    st.integers(0, 99),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_rows_are_combined_by_numbers_as_by_tensors(
    number: int, seed: int, in_place: bool, dtype: torch.dtype
) -> None:
    """By tensors elsewhere than on the CPU: where no test here looks at the values."""
    generator = torch.Generator().manual_seed(seed)
    rows = list(torch.randn(number, 37, generator=generator, dtype=dtype))
    coefficients = torch.randn(number, generator=generator, dtype=torch.float64)
    expected = sum(c * row.double() for c, row in zip(coefficients, rows, strict=True))
    copies = [row.clone() for row in rows]
    by_tensors = _combine_by_tensors(rows, coefficients, rows[0] if in_place else None)
    by_numbers = _combine_by_numbers(copies, coefficients.tolist(), copies[0] if in_place else None)
    torch.testing.assert_close(by_tensors, by_numbers)
    torch.testing.assert_close(by_numbers.double(), expected, rtol=1e-5, atol=1e-5)
    assert (by_tensors is rows[0], by_numbers is copies[0]) == (in_place, in_place)
