"""ConFIG, UPGrad and the dual projection: their laws, a slow oracle each, and TorchJD's."""

from itertools import chain, combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mmpareto_optim import (
    MMParetoOptimizer,
    config_coefficients,
    dualproj_coefficients,
    upgrad_coefficients,
)
from tests.models import LateFusion, audio_visual_batch

RULES = {
    "config": config_coefficients,
    "upgrad": upgrad_coefficients,
    "dualproj": dualproj_coefficients,
}


@st.composite
def gradients(draw: st.DrawFn, most: int = 5, independent: bool = False) -> Tensor:
    """Gaussian directions of mixed lengths, in less dimensions than objectives or more."""
    m = draw(st.integers(2, most))
    dimension = draw(st.integers(m + 2 if independent else 1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = torch.randn(m, dimension, generator=generator, dtype=torch.float64)
    exponents = draw(st.lists(st.integers(-2, 2), min_size=m, max_size=m))
    return rows * 10.0 ** torch.tensor(exponents, dtype=torch.float64).unsqueeze(1)


def combined(rule: str, rows: Tensor) -> Tensor:
    return RULES[rule](rows @ rows.T) @ rows


def projected(rows: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """The nearest point of the dual cone: every set of active constraints is tried."""
    best, nearest = None, np.inf
    everyone = range(len(rows))
    for active in chain.from_iterable(combinations(everyone, k) for k in range(len(rows) + 1)):
        normals = rows[list(active)]
        point = vector - np.linalg.pinv(normals) @ (normals @ vector) if active else vector
        room = 1e-9 * np.linalg.norm(rows, axis=1) * np.linalg.norm(vector)
        distance = float(np.linalg.norm(point - vector))
        if (rows @ point >= -room).all() and distance < nearest:
            best, nearest = point, distance
    assert best is not None
    return best


@given(gradients())
def test_dualproj_is_the_projection_of_the_sum(rows: Tensor) -> None:
    found = combined("dualproj", rows).numpy()
    plain = rows.sum(0).numpy()
    scale = float(rows.norm(dim=1).sum())
    np.testing.assert_allclose(found, projected(rows.numpy(), plain), atol=1e-6 * scale)


@given(gradients())
def test_upgrad_is_the_sum_of_the_projections(rows: Tensor) -> None:
    found = combined("upgrad", rows).numpy()
    each = sum(projected(rows.numpy(), row) for row in rows.numpy())
    np.testing.assert_allclose(found, each, atol=1e-6 * float(rows.norm(dim=1).sum()))


@given(gradients(independent=True))
def test_config_by_the_pseudo_inverse(rows: Tensor) -> None:
    unit = (rows / rows.norm(dim=1, keepdim=True)).numpy()
    direction = np.linalg.pinv(unit) @ np.ones(len(rows))
    direction /= np.linalg.norm(direction)
    expected = (rows.numpy() @ direction).sum() * direction
    found = combined("config", rows).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(rows.norm(dim=1).sum()))


@given(gradients(independent=True))
def test_config_has_equal_cosines_and_the_length_of_the_projections(rows: Tensor) -> None:
    h = combined("config", rows)
    cosines = (rows @ h) / rows.norm(dim=1) / h.norm()
    torch.testing.assert_close(cosines, cosines.mean().expand_as(cosines), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(h.norm(), (rows @ h).sum() / h.norm(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("rule", ["upgrad", "dualproj"])
@given(gradients())
def test_no_objective_gets_worse(rule: str, rows: Tensor) -> None:
    h = combined(rule, rows)
    assert (rows @ h >= -1e-12 * rows.norm(dim=1) * rows.norm(dim=1).sum()).all()


@given(gradients())
def test_the_sum_wherever_it_harms_nobody(rows: Tensor) -> None:
    gram = rows @ rows.T
    if (gram.sum(1) >= 0).all():
        assert (dualproj_coefficients(gram) == 1).all()
    if (gram >= 0).all():
        assert (upgrad_coefficients(gram) == 1).all()
    assert combined("dualproj", rows).norm() <= rows.sum(0).norm() * (1 + 1e-9)


CANCELLING = torch.tensor([[-0.6106], [-0.7261], [0.4991], [0.7933]], dtype=torch.float64)


def test_config_is_zero_where_unit_gradients_cancel() -> None:
    assert (combined("config", CANCELLING) == 0).all()


@pytest.mark.parametrize("rule", RULES)
@given(gradients(), st.integers(-20, 20))
@example(CANCELLING, 1)
def test_scaling_all_losses_scales_the_step(rule: str, rows: Tensor, exponent: int) -> None:
    scale = 10.0**exponent
    h = combined(rule, rows)
    torch.testing.assert_close(
        combined(rule, rows * scale) / scale, h, rtol=1e-4, atol=1e-6 * float(rows.norm())
    )


@pytest.mark.parametrize("rule", RULES)
@given(gradients(independent=True), st.randoms(use_true_random=False))
def test_the_order_of_the_losses_does_not_matter(rule: str, rows: Tensor, random: Any) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)
    found = combined(rule, rows[order])
    torch.testing.assert_close(
        found, combined(rule, rows), rtol=1e-6, atol=1e-7 * float(rows.norm())
    )


@pytest.mark.parametrize("rule", RULES)
@given(gradients(), st.integers(0, 5))
def test_a_zero_gradient_is_an_absent_loss(rule: str, rows: Tensor, place: int) -> None:
    place = min(place, len(rows))
    padded = torch.cat([rows[:place], torch.zeros_like(rows[:1]), rows[place:]])
    found = combined(rule, padded)
    torch.testing.assert_close(
        found, combined(rule, rows), rtol=1e-6, atol=1e-7 * float(rows.norm())
    )
    alone = torch.zeros_like(rows)
    alone[-1] = rows[-1]
    assert (RULES[rule](alone @ alone.T) == 1).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("m", [2, 3, 6])
def test_batches_equal_single_matrices(rule: str, m: int) -> None:
    rows = torch.randn(4, 3, m, 7, dtype=torch.float64)
    grams = rows @ rows.mT
    batch = RULES[rule](grams)
    assert batch.shape == (4, 3, m)
    for i in range(4):
        for j in range(3):
            torch.testing.assert_close(batch[i, j], RULES[rule](grams[i, j]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("m", [2, 5])
def test_nothing_is_read_back_to_the_host(rule: str, m: int) -> None:
    assert RULES[rule](torch.empty(3, m, m, device="meta")).shape == (3, m)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_does_not_vanish(rule: str, bad: float) -> None:
    gram = torch.eye(3, dtype=torch.float64)
    gram[0, 0] = bad
    assert RULES[rule](gram).isnan().all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_gradients_give_finite_steps(rule: str, dtype: torch.dtype) -> None:
    row = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
    for rows in ([row, row], [row, -row], [row, row, -2 * row], [row, 0 * row, row], [0 * row] * 2):
        matrix = torch.stack(rows)
        assert RULES[rule](matrix @ matrix.T).isfinite().all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("m", [2, 4, 8])
def test_as_torchjd(rule: str, m: int) -> None:
    """It adds 1e-4 to the diagonal of a normalised Gram matrix, and takes means, not sums."""
    pytest.importorskip("torchjd")
    pytest.importorskip("quadprog")
    from torchjd import aggregation

    name, factor = {"config": ("ConFIG", 1), "upgrad": ("UPGrad", m), "dualproj": ("DualProj", m)}[
        rule
    ]
    rows = torch.randn(m, 20, dtype=torch.float64)
    theirs = factor * getattr(aggregation, name)()(rows)
    torch.testing.assert_close(
        combined(rule, rows), theirs, rtol=1e-3, atol=1e-3 * float(rows.norm())
    )


@pytest.mark.parametrize("rule", RULES)
def test_by_name_in_an_optimizer(rule: str) -> None:
    model, batch = LateFusion(), audio_visual_batch()
    for gamma in (None, 2.0):
        opt = MMParetoOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), integration=rule, gamma=gamma
        )
        opt.zero_grad()
        opt.backward(model.losses(batch))
        for stats in opt.stats.values():
            expected = (gamma or 1.0) * RULES[rule](stats.gram)
            torch.testing.assert_close(stats.coefficients, expected)
