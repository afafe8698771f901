"""Laws of the method, whatever the gradients, through the optimizer as a user has it.

Linear losses have the gradients that a test gives them, and ``.grad`` is the result ``h``. All
that is allowed for is the rounding of ``h``: each of its entries is the sum of m products, off by
``(m + 2) eps`` of their lengths, and is rounded once more to the parameter's dtype.
"""

from fractions import Fraction
from itertools import combinations, product
from operator import mul

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from mmpareto_optim import MMParetoOptimizer, min_norm_weights, mmpareto_coefficients
from tests.models import vectors_as_losses

# Laws hold for gradients of any lengths, those that users are warned of too.
pytestmark = pytest.mark.filterwarnings("ignore:block .* the gradient of loss")

GAMMA = 1.5
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@st.composite
def gradients(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    decades: int = 30,
    most: int = 6,
) -> Tensor:
    """Rows of any lengths, among them equal, zero, opposite and nearly parallel ones."""
    dtype = draw(st.sampled_from(dtypes))
    m, n = draw(st.integers(2, most)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows = torch.randn(m, n, generator=generator, dtype=torch.float64)
    for i in range(1, m):
        kind = draw(st.sampled_from(["random"] * 4 + ["equal", "zero", "opposite", "parallel"]))
        near = rows[0] + 1e-4 * rows[i]
        rows[i] = {"equal": rows[0], "zero": 0 * rows[i], "opposite": -rows[0]}.get(
            kind, near if kind == "parallel" else rows[i]
        )
    around, apart = draw(st.integers(-decades, decades)), draw(st.integers(0, decades))
    exponents = torch.tensor(
        [draw(st.integers(around - apart, around + apart)) for _ in range(m)]
    ).clamp(-decades, decades)
    return (rows * 10.0 ** exponents.double().unsqueeze(1)).to(dtype)


def integrated(rows: Tensor, **options: object) -> tuple[Tensor, MMParetoOptimizer]:
    """What ``.grad`` is for losses with these gradients, in float64."""
    param = nn.Parameter(torch.zeros_like(rows[0]))
    opt = MMParetoOptimizer(torch.optim.SGD([param], lr=1.0), **options)  # type: ignore[arg-type]
    opt.backward(vectors_as_losses(param, rows))
    assert param.grad is not None
    return param.grad.double(), opt


def slack(rows: Tensor, opt: MMParetoOptimizer) -> Tensor:
    """By how much rounding may change each entry of ``h``, shape ``(n,)``."""
    terms = (coefficients(rows, opt).unsqueeze(1) * rows.double()).abs().sum(0)
    combined = max(torch.finfo(torch.promote_types(rows.dtype, torch.float32)).eps, 2**-52)
    return ((len(rows) + 2) * combined + torch.finfo(rows.dtype).eps) * terms + 1e-300


def coefficients(rows: Tensor, opt: MMParetoOptimizer) -> Tensor:
    """Of each row; 1 of those whose loss is absent from the block, or alone in it."""
    found = torch.ones(len(rows), dtype=torch.float64)
    for stats in opt.stats.values():
        for name, coefficient in zip(stats.objectives, stats.coefficients, strict=True):
            found[int(name.removeprefix("loss"))] = coefficient
    return found


def in_conflict(opt: MMParetoOptimizer) -> bool:
    return any(bool(stats.conflict) for stats in opt.stats.values())


@given(gradients((torch.bfloat16,), decades=3, most=5))
def test_what_is_written_in_half_precision_never_ascends(rows: Tensor) -> None:
    """In conflict, to the last bit: the direction keeps clear of the rounding of the result."""
    h, opt = integrated(rows)
    if in_conflict(opt):
        assert (rows.double() @ h >= 0).all()


@given(gradients())
def test_never_ascends(rows: Tensor) -> None:
    h, opt = integrated(rows)
    wide = rows.double()
    assert h.isfinite().all()
    if in_conflict(opt):
        assert (wide @ h >= -(wide.abs() @ slack(rows, opt))).all()
    else:
        assert ((h - factor(rows) * wide.sum(0)).abs() <= slack(rows, opt)).all()


def factor(rows: Tensor) -> float:
    """Gamma, but a gradient that is alone is taken as it is."""
    return GAMMA if int(rows.any(1).sum()) > 1 else 1.0


@given(gradients(decades=15))
def test_as_long_as_the_sum_unless_stationary(rows: Tensor) -> None:
    h, opt = integrated(rows)
    if opt.stats and all(stats.scale == 0 for stats in opt.stats.values()):
        # Refused: then no direction is common to all but for the Gram matrix's rounding. Lengths
        # do not matter to that.
        wide = rows.double()[rows.double().norm(dim=1) > 0]
        unit = wide / wide.norm(dim=1, keepdim=True)
        nearest = min_norm_weights(unit @ unit.T) @ unit
        eps = torch.finfo(torch.promote_types(rows.dtype, torch.float32)).eps
        written = torch.finfo(rows.dtype).eps / 2 if rows.dtype == torch.bfloat16 else 0
        assert nearest.norm() <= 4 * (len(rows) * eps + written) ** 0.5
        assert not h.any()
    else:
        wanted = factor(rows) * rows.double().sum(0).norm()
        assert h.norm() >= wanted - slack(rows, opt).norm() - 1e-6 * wanted


def test_three_gradients_of_very_different_lengths_are_not_refused() -> None:
    rows = torch.tensor(
        [
            [3.9230e-03, -2.2356e-03, -3.1950e-03],
            [-1.2050e14, 1.0445e14, -6.3323e13],
            [5.7311e-01, 5.4095e-01, -3.9191e-01],
        ],
        dtype=torch.float64,
    )
    h, _ = integrated(rows)
    assert h.any()


@given(gradients((torch.float64,), decades=5), st.integers(0, 2**32))
def test_orthogonal_maps_carry_over(rows: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = rows.shape[1]
    rotation = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    assume(not _at_an_edge(rows))
    h, _ = integrated(rows)
    mapped, _ = integrated(rows @ rotation)
    torch.testing.assert_close(mapped, h @ rotation, rtol=1e-4, atol=1e-4 * float(h.norm() + 1e-9))


@given(gradients((torch.float64,), decades=5), st.randoms())
def test_the_order_of_the_losses_does_not_matter(rows: Tensor, random: object) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assume(not _at_an_edge(rows))
    h, _ = integrated(rows)
    permuted, _ = integrated(rows[order])
    torch.testing.assert_close(permuted, h, rtol=1e-4, atol=1e-4 * float(h.norm() + 1e-9))


@given(gradients((torch.float64,), decades=5), st.floats(1e-12, 1e12))
def test_scaling_all_losses_scales_the_step(rows: Tensor, factor: float) -> None:
    assume(not _at_an_edge(rows))
    h, _ = integrated(rows)
    scaled, _ = integrated(rows * factor)
    torch.testing.assert_close(
        scaled, h * factor, rtol=1e-4, atol=1e-4 * float(h.norm() + 1e-9) * factor
    )


def _at_an_edge(rows: Tensor) -> bool:
    """Where the method jumps: orthogonal gradients, or a sum of no length or no common direction.

    There the last bit of an inner product decides.
    """
    wide = rows.double()[rows.double().norm(dim=1) > 0]
    if len(wide) < 2:
        return False
    unit = wide / wide.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T)[~torch.eye(len(wide), dtype=torch.bool)]
    if (cosines.abs() < 1e-9).any():
        return True
    alpha = min_norm_weights(wide @ wide.T)
    least = (alpha @ wide).norm() / (alpha * wide.norm(dim=1)).sum()
    return bool(cosines.min() < 0 and least < 1e-4)


@given(st.floats(-0.99, 0.99), st.floats(-2, 2), st.floats(-1, 1))
def test_continuous_but_where_gradients_become_orthogonal(
    cosine: float, decades: float, direction: float
) -> None:
    assume(abs(cosine) > 1e-3)

    def step(cosine: float, decades: float) -> Tensor:
        other = torch.tensor([cosine, (1 - cosine**2) ** 0.5], dtype=torch.float64)
        rows = torch.stack([torch.tensor([1.0, 0.0], dtype=torch.float64), other * 10**decades])
        return mmpareto_coefficients(rows @ rows.T) @ rows

    nearby = step(cosine + 1e-9 * direction, decades + 1e-9 * direction)
    here = step(cosine, decades)
    torch.testing.assert_close(nearby, here, rtol=0, atol=1e-5 * float(here.norm()))


@pytest.mark.parametrize("ratio", [1.0, 10.0])
def test_jumps_where_gradients_become_orthogonal(ratio: float) -> None:
    """Just in conflict the direction is the min-norm point's, just not it is the sum's."""
    found = []
    for cosine in (1e-6, -1e-6):
        other = torch.tensor([cosine, (1 - cosine**2) ** 0.5], dtype=torch.float64)
        rows = torch.stack([torch.tensor([1.0, 0.0], dtype=torch.float64), other * ratio])
        found.append(integrated(rows)[0])
    plain, common = (h / h.norm() for h in found)
    sine = ratio / (1 + ratio**2) ** 0.5
    expected = torch.tensor([(1 - sine**2) ** 0.5, sine], dtype=torch.float64)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)
    # Orthogonal sides a, b: the point nearest to the origin is that of the triangle's height.
    torch.testing.assert_close(common, expected.flip(0), rtol=0, atol=1e-5)
    # Of equal lengths the directions meet, and the lengths do: 1.5 times the sum's.
    assert torch.allclose(found[0], found[1], atol=1e-5) is (ratio == 1.0)


@pytest.mark.parametrize("objectives", [10, 50])
@pytest.mark.parametrize("rank", [1, 2, 5, 30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_objectives_of_low_rank(objectives: int, rank: int, dtype: torch.dtype) -> None:
    wide = torch.randn(objectives, rank, dtype=torch.float64)
    wide[:, 0] = wide[:, 0].abs() + 0.1  # a common direction exists
    rows = (wide * torch.logspace(-2, 2, objectives, dtype=torch.float64).unsqueeze(1)).to(dtype)
    h, opt = integrated(rows)
    (stats,) = opt.stats.values()
    assert stats.scale > 0
    products = rows.double() @ h
    assert (products >= -(rows.double().abs() @ slack(rows, opt))).all()
    assert h.norm() >= GAMMA * rows.double().sum(0).norm() * (1 - 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("rescale", ["encoder", "tensor"])
def test_finite_gradients_give_finite_steps(dtype: torch.dtype, third: bool, rescale: str) -> None:
    """Lengths from 1e-30 to 1e30 side by side."""
    decades = (-30, 0, 30) if third else (-30, -15, 0, 15, 30)
    for lengths in product(decades, decades, decades if third else (0,)):
        for cosine in (-1, -0.999999, -0.5, -1e-9, 0, 1e-9, 0.5, 1):
            sine = (1 - cosine**2) ** 0.5
            rows = torch.tensor(
                [[1, 0, 0], [cosine, sine, 0], [-0.1, 0.2, 0.3]], dtype=torch.float64
            )[: 2 + third]
            scales = 10.0 ** torch.tensor(lengths[: 2 + third], dtype=torch.float64)
            rows = (rows * scales.unsqueeze(1)).to(dtype)
            h, _ = integrated(rows, rescale=rescale)
            assert h.isfinite().all(), (lengths, cosine)
            if rescale == "encoder" and (rows.double() @ rows.double().T < 0).any():
                unit = rows.double() / rows.double().norm(dim=1, keepdim=True)
                assert (unit @ h >= -2 * torch.finfo(dtype).eps * h.norm() * 3).all()


@pytest.mark.parametrize("exponent", [-30, -25, -20, 0, 20, 30, 37])
def test_each_tensor_is_stretched_whatever_the_unit(exponent: int) -> None:
    """The same gradients in another unit: their squares overflow or vanish in float32."""
    rows = torch.tensor([[1.0, 0.0], [-2.5, 4.0]])
    expected, _ = integrated(rows, rescale="tensor")
    (plain,) = (GAMMA * rows.double().sum(0)).norm().unsqueeze(0)
    torch.testing.assert_close(expected.norm(), plain, rtol=1e-6, atol=0)
    found, _ = integrated(rows * 10.0**exponent, rescale="tensor")
    torch.testing.assert_close(found / 10.0**exponent, expected, rtol=1e-6, atol=0)


integers = st.integers(2, 5).flatmap(
    lambda m: st.integers(1, 4).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(-9, 9), min_size=n, max_size=n), min_size=m, max_size=m
        )
    )
)


@given(integers)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_step_of_integer_gradients_is_the_exact_one(
    dtype: torch.dtype, rows: list[list[int]]
) -> None:
    """Against rational arithmetic, which knows no rounding, on every face of the simplex."""
    assume(all(any(row) for row in rows))  # of zero gradients there are other tests
    gram = [[Fraction(sum(map(mul, a, b))) for b in rows] for a in rows]
    plain = [sum(column) for column in zip(*rows, strict=True)]
    wanted = [GAMMA * x for x in plain]
    if min(map(min, gram)) < 0:
        point = exact_min_norm_point(gram, rows)
        square = float(sum(x * x for x in point))
        stretch = max(len(rows), (sum(x * x for x in plain) / square) ** 0.5 if square else 0)
        wanted = [GAMMA * stretch * float(x) for x in point]
    h, opt = integrated(torch.tensor(rows, dtype=dtype))
    # The weights are found for cosines smaller by m eps, which turns the direction by the root
    # of what that is of the min-norm point's share; these integers leave one of at least 1e-3.
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    room = 1e4 * eps * torch.tensor(wanted, dtype=torch.float64).norm() + slack(
        torch.tensor(rows, dtype=dtype), opt
    )
    assert ((h - torch.tensor(wanted, dtype=torch.float64)).abs() <= room).all()


def exact_min_norm_point(gram: list[list[Fraction]], rows: list[list[int]]) -> list[Fraction]:
    """The one point of the convex hull that satisfies the optimality conditions."""
    for size in range(1, len(rows) + 1):
        for face in combinations(range(len(rows)), size):
            weights = solved([[gram[i][j] for j in face] for i in face])
            if weights is None or min(weights) < 0:
                continue
            point = [
                sum((w * rows[i][k] for w, i in zip(weights, face, strict=True)), Fraction(0))
                for k in range(len(rows[0]))
            ]
            square = sum(x * x for x in point)
            if all(sum(map(mul, point, row)) >= square for row in rows):
                return point
    raise AssertionError("every convex hull has a point nearest to the origin")


def solved(gram: list[list[Fraction]]) -> list[Fraction] | None:
    """Weights of sum 1 with equal products ``G w``; None where they are not unique."""
    m = len(gram)
    system = [[*row, Fraction(-1), Fraction(0)] for row in gram]
    system.append([*[Fraction(1)] * m, Fraction(0), Fraction(1)])
    for i in range(m + 1):
        pivot = next((k for k in range(i, m + 1) if system[k][i]), None)
        if pivot is None:
            return None
        system[i], system[pivot] = system[pivot], system[i]
        system[i] = [x / system[i][i] for x in system[i]]
        for k in range(m + 1):
            if k != i:
                system[k] = [
                    x - system[k][i] * y for x, y in zip(system[k], system[i], strict=True)
                ]
    return [row[-1] for row in system[:m]]
