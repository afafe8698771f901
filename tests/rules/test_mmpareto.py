"""The rules as functions of a Gram matrix: the laws that the paper claims for them."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmpareto_optim import (
    min_norm_weights,
    mmpareto_coefficients,
    pareto_coefficients,
    uniform_coefficients,
)

GAMMA = 1.5


@st.composite
def gradients(draw: st.DrawFn, least: int = 2, most: int = 6) -> Tensor:
    """Gaussian directions, sometimes in less dimensions than objectives, of mixed lengths."""
    objectives = draw(st.integers(least, most))
    dimension = draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = torch.randn(objectives, dimension, generator=generator, dtype=torch.float64)
    exponents = torch.tensor(draw(st.lists(st.integers(-3, 3), min_size=6, max_size=6)))
    return rows * 10.0 ** exponents[:objectives, None]


def lengths(rows: Tensor) -> Tensor:
    return rows.square().sum(-1).sqrt()


@given(gradients())
def test_common_descent_direction(rows: Tensor) -> None:
    h = mmpareto_coefficients(rows @ rows.T, GAMMA) @ rows
    assert (rows @ h >= -1e-14 * lengths(rows) * lengths(h)).all()


@given(gradients())
def test_at_least_as_long_as_the_sum(rows: Tensor) -> None:
    coefficients = mmpareto_coefficients(rows @ rows.T, GAMMA)
    h, plain = coefficients @ rows, rows.sum(0)
    stationary = (coefficients == 0).all()
    assert stationary or lengths(h) >= GAMMA * lengths(plain) * (1 - 1e-9)


@given(gradients())
def test_the_sum_where_nothing_conflicts(rows: Tensor) -> None:
    agreeing = rows.abs()
    coefficients = mmpareto_coefficients(agreeing @ agreeing.T, GAMMA)
    torch.testing.assert_close(coefficients, torch.full_like(coefficients, GAMMA))


@given(gradients())
def test_in_conflict_the_min_norm_direction(rows: Tensor) -> None:
    gram = rows @ rows.T
    coefficients = mmpareto_coefficients(gram, GAMMA)
    if not (gram < 0).any() or (coefficients == 0).all():
        return
    alpha = min_norm_weights(gram)
    torch.testing.assert_close(coefficients / coefficients.sum(), alpha)
    # Never shrunk below m times the min-norm point.
    assert coefficients.sum() >= GAMMA * len(rows) * (1 - 1e-9)


@given(gradients(), st.floats(1e-6, 1e6))
def test_scaling_all_losses_scales_the_result(rows: Tensor, factor: float) -> None:
    gram = rows @ rows.T
    torch.testing.assert_close(mmpareto_coefficients(gram * factor**2), mmpareto_coefficients(gram))


@given(gradients(least=3), st.randoms())
def test_the_order_of_the_losses_does_not_matter(rows: Tensor, random: object) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    gram = rows @ rows.T
    h = mmpareto_coefficients(gram) @ rows
    permuted = mmpareto_coefficients(gram[order][:, order]) @ rows[order]
    torch.testing.assert_close(h, permuted, atol=1e-6 * float(lengths(rows).max()), rtol=1e-6)


@given(gradients())
def test_a_loss_without_gradient_changes_nothing(rows: Tensor) -> None:
    padded = torch.cat([rows, torch.zeros_like(rows[:1])])
    coefficients = mmpareto_coefficients(padded @ padded.T)
    torch.testing.assert_close(coefficients[:-1], mmpareto_coefficients(rows @ rows.T))


def test_formula_of_the_paper_for_two() -> None:
    g_m, g_u = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 2.0])
    alpha = torch.tensor([0.75, 0.25])
    h = 2 * alpha[0] * g_m + 2 * alpha[1] * g_u
    h = 1.5 * h * max(1.0, float((g_m + g_u).norm() / h.norm()))
    rows = torch.stack([g_m, g_u])
    torch.testing.assert_close(mmpareto_coefficients(rows @ rows.T) @ rows, h)


def test_jumps_where_the_gradients_become_orthogonal() -> None:
    """The method is not continuous at cos = 0 unless both gradients are equally long."""
    before = mmpareto_coefficients(torch.tensor([[1.0, 1e-6], [1e-6, 9.0]]))
    after = mmpareto_coefficients(torch.tensor([[1.0, -1e-6], [-1e-6, 9.0]]))
    torch.testing.assert_close(before, torch.tensor([1.5, 1.5]))
    assert after[0] > 5 * after[1]


@pytest.mark.parametrize("ratio", [1.0, 3.0, 1e3])
def test_opposite_gradients_give_zero(ratio: float) -> None:
    gram = torch.tensor([[1.0, -ratio], [-ratio, ratio**2]])
    assert mmpareto_coefficients(gram).tolist() == [0.0, 0.0]


@given(st.floats(0, 1), st.floats(0.1, 10))
def test_nearly_opposite_float32_gradients_never_ascend(angle: float, ratio: float) -> None:
    """Combined in float32, at every angle down to zero, however much of it is rounding."""
    angle = angle**8
    rows = torch.tensor(
        [[1.0, 0.0], [-ratio * math.cos(angle), ratio * math.sin(angle)]], dtype=torch.float32
    )
    exact = rows.double()
    coefficients = mmpareto_coefficients(exact @ exact.T, eps=torch.finfo(torch.float32).eps)
    h = coefficients.float() @ rows
    if (exact @ exact.T < 0).any():
        assert (exact @ h.double() >= 0).all()
    assert h.isfinite().all()


def test_gradients_of_extreme_lengths_stay_finite() -> None:
    rows = torch.tensor([[1e-30, 0.0], [-1e30, 1e30]], dtype=torch.float64)
    for rule in (mmpareto_coefficients, pareto_coefficients):
        h = rule(rows @ rows.T) @ rows
        assert h.isfinite().all()
        assert (rows @ h >= -1e-14 * lengths(rows) * lengths(h)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("rule", [mmpareto_coefficients, pareto_coefficients])
def test_a_loss_that_is_not_finite_does_not_vanish(rule: object, bad: float) -> None:
    gram = torch.tensor([[bad, -1.0], [-1.0, 1.0]])
    rows = torch.tensor([[bad, 0.0], [-1.0, 1.0]])
    assert not (rule(gram) @ rows).isfinite().all()  # type: ignore[operator]


@given(gradients())
def test_pareto_is_the_min_norm_point_times_the_number_of_losses(rows: Tensor) -> None:
    gram = rows @ rows.T
    torch.testing.assert_close(pareto_coefficients(gram), len(rows) * min_norm_weights(gram))


def test_uniform_is_the_sum() -> None:
    assert uniform_coefficients(torch.randn(4, 3, 3)).equal(torch.ones(4, 3))


@pytest.mark.parametrize("rule", [mmpareto_coefficients, pareto_coefficients, uniform_coefficients])
@pytest.mark.parametrize("objectives", [2, 3])
def test_batched_on_device_in_the_dtype_given(rule: object, objectives: int) -> None:
    gram = torch.empty(4, 5, objectives, objectives, device="meta", dtype=torch.float32)
    result = rule(gram)  # type: ignore[operator]
    assert (result.shape, result.dtype, result.device.type) == (
        (4, 5, objectives),
        torch.float32,
        "meta",
    )


@pytest.mark.parametrize("gamma", [0, -1.5, math.inf, math.nan, "1.5"])
def test_gamma_must_be_positive(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must be a positive, finite number"):
        mmpareto_coefficients(torch.eye(2), gamma)


@pytest.mark.parametrize("line", [[0, 3, 0, -2, 0], [0, 2, -1, 0, 2, 0, 0]])
def test_opposite_gradients_beside_absent_ones_give_zero(line: list[int]) -> None:
    """In one dimension, what is opposed has no common direction, however many rows are zero."""
    rows = torch.tensor(line, dtype=torch.float64).unsqueeze(1)
    assert (mmpareto_coefficients(rows @ rows.T) == 0).all()


@pytest.mark.parametrize("rule", [mmpareto_coefficients, pareto_coefficients])
def test_whatever_the_default_device(rule: Callable[[Tensor], Tensor]) -> None:
    gram = torch.eye(3, dtype=torch.float64)
    with torch.device("meta"):
        assert rule(gram).device == gram.device
        assert rule(gram[:2, :2]).device == gram.device
