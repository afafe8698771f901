"""Nearly dependent, dependent, equal and opposite gradients, up to forty of them."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from mmpareto_optim import (
    dualproj_coefficients,
    min_norm_weights,
    mmpareto_coefficients,
    pareto_coefficients,
    upgrad_coefficients,
)
from mmpareto_optim.rules.solver import nonnegative_minimum
from tests.integrator.test_laws import exact_min_norm_point
from tests.rules.gradients import EPS, FAMILIES, Array, cases, gram_of, products, rows_of

Case = tuple[str, int, int]
nnls = pytest.importorskip("scipy.optimize", reason="no independent solver").nnls


def norms(gram: Array) -> Array:
    return np.asarray(np.sqrt(gram.diagonal()))


def nearest(rows: Array) -> Array:
    """The min-norm point's weights, by an independent solver of the gradients themselves.

    Least squares keep the digits that a Gram matrix has lost.
    """
    scale = np.linalg.norm(rows, axis=1)
    inverse = scale.min() / scale
    system = np.vstack([(rows / scale[:, None]).T, inverse])
    try:
        found = nnls(system, np.append(np.zeros(rows.shape[1]), 1.0))[0] * inverse
    except RuntimeError:  # it gives up on some
        reject()
    return np.asarray(found / found.sum())


def assert_min_norm(gram: Array, weights: Array) -> None:
    """One product ``p . g_i`` for all of positive weight, no smaller one; in exact arithmetic."""
    along = products(gram, weights)
    allowed = 50 * len(gram) * EPS * norms(gram) * (weights @ norms(gram))
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert (along - allowed)[weights > 0].max() <= (along + allowed).min()


@given(cases())
def test_optimal_for_the_matrix_that_is_given(case: Case) -> None:
    gram = gram_of(rows_of(*case))
    assert_min_norm(gram, min_norm_weights(torch.from_numpy(gram)).numpy())


@given(cases())
def test_as_short_as_an_independent_solver_finds_it(case: Case) -> None:
    rows = rows_of(*case)
    found = min_norm_weights(torch.from_numpy(gram_of(rows))).numpy()
    expected = nearest(rows)
    size = max(found @ norms(gram_of(rows)), expected @ norms(gram_of(rows)))
    # The square is off by the rounding of the Gram matrix.
    allowed = 150 * len(rows) * EPS * size**2
    assert np.sum((found @ rows) ** 2) <= np.sum((expected @ rows) ** 2) + allowed


whole = st.integers(3, 5).flatmap(
    lambda m: st.integers(1, 4).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(-9, 9), min_size=n, max_size=n).filter(any), min_size=m, max_size=m
        )
    )
)


@given(whole)
def test_exact_for_whole_numbers_in_float32(rows: list[list[int]]) -> None:
    """Their Gram matrix is exact in float32, and so is the point, up to the rounding of weights."""
    matrix = torch.tensor(rows, dtype=torch.float32)
    weights = min_norm_weights(matrix @ matrix.T).double()
    gram = [[Fraction(sum(a * b for a, b in zip(x, y, strict=True))) for y in rows] for x in rows]
    expected = torch.tensor([float(x) for x in exact_min_norm_point(gram, rows)]).double()
    difference = weights @ matrix.double() - expected
    assert difference.abs().max() <= 2**-23 * (weights @ matrix.double().norm(dim=1)) + 1e-6


@pytest.mark.parametrize("m", [3, 5, 10, 20, 40])
@given(st.integers(0, 2**32))
@settings(max_examples=15)
def test_float32_matrices_that_are_not_quite_positive(m: int, seed: int) -> None:
    """Of dependent gradients, rounded: the conditions hold to the size of that rounding."""
    rows = rows_of("decays", m, seed).astype(np.float32)
    gram = torch.from_numpy(rows @ rows.T)
    weights = min_norm_weights(gram).double().numpy()
    given_ = ((gram + gram.T) / 2).double().numpy()
    along = products(given_, weights)
    allowed = 64 * m * 2**-23 * norms(given_) * (weights @ norms(given_))
    assert (along - weights @ along >= -allowed).all()


@given(cases(), st.sampled_from([torch.float32, torch.float64]))
def test_mmpareto_never_ascends_in_conflict(case: Case, dtype: torch.dtype) -> None:
    """Of ``h`` as it is combined in the gradients' dtype, in exact arithmetic."""
    matrix = torch.from_numpy(rows_of(*case)).to(dtype)
    rows = matrix.double().numpy()
    gram = gram_of(rows)
    assume((gram < 0).any())
    # Inner products of float64 rows are rounded as well.
    rounding = rows.shape[1] * EPS if dtype == torch.float64 else 0.0
    coefficients = mmpareto_coefficients(
        torch.from_numpy(gram), eps=torch.finfo(dtype).eps, written=rounding
    )
    h = sum(c * row for c, row in zip(coefficients.tolist(), matrix, strict=True))
    assert isinstance(h, torch.Tensor)
    assert h.isfinite().all()
    assert (products(rows, h.double().numpy()) >= 0).all()


@given(cases(), st.sampled_from([2.0**-52, 2.0**-23, 2.0**-9]))
def test_mmpareto_is_not_zero_where_a_direction_keeps_the_margin(case: Case, eps: float) -> None:
    rows = rows_of(*case)
    gram = gram_of(rows)
    cosines = gram / norms(gram) / norms(gram)[:, None]
    units = rows / norms(gram)[:, None]
    margin = len(rows) * eps
    weights = nearest(units)
    has_margin = products(units, weights @ units).min() >= margin + 64 * len(rows) * EPS
    coefficients = mmpareto_coefficients(torch.from_numpy(gram), eps=eps).numpy()
    if has_margin:
        assert (coefficients > 0).any()
    if (coefficients > 0).any() and (gram < 0).any():
        shares = coefficients * norms(gram)
        assert (products(cosines, shares) >= (margin - 4 * len(rows) * EPS) * shares.sum()).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("m", [3, 10, 40])
def test_mmpareto_is_as_long_as_the_sum(family: str, m: int) -> None:
    for seed in range(10):
        rows = rows_of(family, m, seed)
        coefficients = mmpareto_coefficients(torch.from_numpy(gram_of(rows)), 1.0).numpy()
        if (coefficients > 0).any():
            h, plain = coefficients @ rows, rows.sum(0)
            # The Gram matrix has rounded the square of either.
            allowed = 20 * m * EPS * (coefficients @ np.linalg.norm(rows, axis=1)) ** 2
            assert h @ h >= plain @ plain * (1 - 1e-12) - allowed


def test_a_gradient_that_leads_where_opposite_ones_drown_in_rounding() -> None:
    """The point nearest to the origin is made of the first two; the third alone has the margin."""
    angle = 1e-4
    rows = torch.tensor(
        [[np.cos(angle), np.sin(angle)], [-np.cos(angle), np.sin(angle)], [0.0, 1.0]],
        dtype=torch.float64,
    )
    assert (mmpareto_coefficients(rows[:2] @ rows[:2].T, eps=2**-23) == 0).all()
    h = mmpareto_coefficients(rows @ rows.T, 1.0, eps=2**-23) @ rows
    torch.testing.assert_close(h, rows.sum(0))


@given(cases(most=12))
def test_projections_harm_nobody_and_are_the_nearest(case: Case) -> None:
    """The sum, and gradients that the result is orthogonal to, with positive weights."""
    rows = rows_of(*case)
    gram, lengths = gram_of(rows), np.linalg.norm(rows, axis=1)
    coefficients = dualproj_coefficients(torch.from_numpy(gram)).numpy()
    allowed = 100 * len(rows) * EPS * lengths * (coefficients @ lengths)
    along = products(gram, coefficients)
    assert (coefficients >= 1).all()
    assert (along >= -allowed).all()
    assert (along[coefficients > 1] <= allowed[coefficients > 1]).all()
    each = upgrad_coefficients(torch.from_numpy(gram)).numpy()
    assert (each >= 1).all()
    assert (products(gram, each) >= -100 * len(rows) * EPS * lengths * (each @ lengths)).all()


def test_gradients_that_took_196_systems() -> None:
    """Rows like those of the Hilbert matrix, of which the old solver gave up on some."""
    for m in range(3, 41):
        for signs in (np.ones(m), (-1.0) ** np.arange(m), np.sign(np.sin(np.arange(m) + 1.0))):
            rows = signs[:, None] / (np.arange(m)[:, None] + np.arange(m) + 1)
            for shifted in (rows, rows - rows.mean(0), rows - rows.mean(1, keepdims=True)):
                gram = gram_of(shifted)
                assert_min_norm(gram, min_norm_weights(torch.from_numpy(gram)).numpy())


@pytest.mark.parametrize("decades", [-150, -75, 0, 75, 150])
def test_nothing_overflows_or_vanishes(decades: int) -> None:
    rows = torch.tensor([[1.0, 0.2, 0.0], [-2.0, 1.0, 0.0], [-0.3, 0.1, 1.0]], dtype=torch.float64)
    for size in (2, 3):
        plain, scaled = (r @ r.T for r in (rows[:size], rows[:size] * 10.0**decades))
        for rule in (
            mmpareto_coefficients,
            pareto_coefficients,
            upgrad_coefficients,
            dualproj_coefficients,
        ):
            torch.testing.assert_close(rule(scaled), rule(plain), rtol=1e-10, atol=0)


@pytest.mark.parametrize("size", [2, 3])
def test_lengths_as_far_apart_as_float64_goes(size: int) -> None:
    lengths = torch.tensor([1e-150, 1e150, 1e100], dtype=torch.float64)[:size]
    cosines = torch.tensor([[1, -0.5, 0.1], [-0.5, 1, 0.2], [0.1, 0.2, 1]], dtype=torch.float64)
    gram = cosines[:size, :size] * lengths * lengths[:, None]
    for rule in (mmpareto_coefficients, pareto_coefficients, upgrad_coefficients):
        found = rule(gram)
        assert found.isfinite().all()
        shares = found * lengths
        assert (cosines[:size, :size] @ shares >= -1e-14 * shares.sum()).all()


def test_the_solver_ends_for_a_matrix_of_no_gradients() -> None:
    """Indefinite ones and random ones: there may be no solution, but there is an end."""
    draw = np.random.default_rng(0)
    for _ in range(50):
        matrix = draw.standard_normal((6, 6))
        assert (nonnegative_minimum(matrix + matrix.T, draw.standard_normal(6)) >= 0).all()


def test_the_best_of_all_faces_of_a_cone() -> None:
    """For small problems, every set of free variables is tried."""
    draw = np.random.default_rng(1)
    for _ in range(100):
        rows = draw.integers(-2, 3, (4, 3)).astype(float)
        matrix, target = rows @ rows.T + np.eye(4), draw.standard_normal(4)
        found = nonnegative_minimum(matrix, target)
        best = 0.0
        for size in range(1, 5):
            for face in map(list, combinations(range(4), size)):
                x = np.zeros(4)
                x[face] = np.linalg.solve(matrix[np.ix_(face, face)], target[face])
                if (x >= 0).all():
                    best = min(best, float(x @ matrix @ x / 2 - target @ x))
        assert found @ matrix @ found / 2 - target @ found == pytest.approx(best, abs=1e-12)
