"""Rules of other papers: projections on the dual cone, along which no loss grows, and ConFIG."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpareto_optim.rules.evaluation import Array, Formulas, check_gram, of_stack
from mmpareto_optim.rules.solver import EPS, nonnegative_minimum


def uniform_coefficients(gram: Tensor) -> Tensor:
    """Coefficients of the plain sum ``sum_i g_i`` (the *uniform baseline*): ones.

    Shapes and errors raised are those of :func:`mmpareto_coefficients`.
    """
    check_gram(gram)
    return torch.ones_like(gram[..., 0])


def dualproj_coefficients(gram: Tensor) -> Tensor:
    """Coefficients of the sum of the gradients, projected on the dual cone.

    ``h = g + sum_i v_i g_i`` with ``v = argmin_{v >= 0} ||h||``: the nearest to ``g = sum_i g_i``
    with ``h . g_i >= 0`` for every ``i`` (Lopez-Paz & Ranzato 2017, arXiv 1706.08840, Equation 11,
    which projects the newest gradient). The sum itself, to the last bit of the coefficients,
    wherever it raises no loss, and never longer. ``DualProj`` of TorchJD projects the mean.

    ``h . g_i >= 0`` holds to about ``8 m`` times the machine epsilon of the lengths of what is
    combined, and so does ``h = 0`` at a Pareto-stationary point. No coefficient is below 1. Shapes,
    zero and non-finite gradients and errors raised are those of :func:`mmpareto_coefficients`.
    """
    return of_stack(gram, DUALPROJ)


def upgrad_coefficients(gram: Tensor) -> Tensor:
    """Coefficients of UPGrad: each gradient is projected on the dual cone, then they are added.

    With the projection ``pi(g) = argmin ||h - g||`` subject to ``h . g_i >= 0`` for every ``i``,
    ``h = sum_k pi(g_k)`` (Quinton & Rey 2024, arXiv 2406.16232, Equation 7, and TorchJD take the
    mean): the plain sum where nothing conflicts, to the last bit of the coefficients. Precision,
    shapes, coefficients and errors raised are those of :func:`dualproj_coefficients`.
    """
    return of_stack(gram, UPGRAD)


def _dualproj_of_many(cosines: Array, lengths: Array) -> Array:
    units = lengths / lengths.max()
    against = -cosines @ units
    if against.max() <= len(units) * EPS * units.sum():
        return np.ones(len(units))
    return np.asarray(1 + nonnegative_minimum(cosines, against) / units)


def _upgrad_of_many(cosines: Array, lengths: Array) -> Array:
    # A gradient that opposes none is its own projection: the solver returns zeros at once.
    added = np.array([nonnegative_minimum(cosines, -row) for row in cosines])
    return np.asarray(1 + (lengths[:, None] / lengths * added).sum(0))


# Of two, the sum opposes at most one, the shorter: what is left is orthogonal to it.
DUALPROJ = Formulas(lambda r, _, c, __, numbers: numbers.clamp(-c / r, min=1.0), _dualproj_of_many)
UPGRAD = Formulas(lambda r, _, c, __, numbers: 1 + numbers.clamp(-c / r, min=0.0), _upgrad_of_many)


def config_coefficients(gram: Tensor) -> Tensor:
    """Coefficients of ConFIG (Liu, Chu & Thuerey 2025, arXiv 2408.11104, Equation 2).

    ``v = pinv(U) 1, h = (sum_i g_i . v) v / ||v||^2``, with the unit gradients as the rows of U.
    Linearly independent gradients all have the same, positive cosine with ``h``, whose length is
    the sum of their projections on it. Of dependent ones ``v`` is the shortest vector of those
    whose products with the unit gradients are nearest to 1: cosines may differ in size and sign.
    Where unit gradients cancel, as exactly opposite ones do, the result is zero.

    Eigenvalues of ``U U'`` below ``16 m eps`` count as zero, for ``gram``'s machine epsilon: of
    three or more gradients, two less than about ``6 sqrt(m eps)`` radians apart (2e-7 in float64,
    0.004 in float32) count as one. Shapes, zero and non-finite gradients and errors raised are
    those of :func:`mmpareto_coefficients`.
    """
    check_gram(gram)
    return of_stack(gram, config_formulas(torch.finfo(gram.dtype).eps))


def config_formulas(rounding: float) -> Formulas:
    """The rule for cosines with errors of ``rounding``."""
    rounding = max(rounding, EPS)

    def of_two(ratio: Any, inverse: Any, cosine: Any, square: Any, numbers: Any) -> Any:
        # Along the sum of the unit gradients, half as often as both are long together.
        return numbers.masked_fill((1 + inverse) / 2, cosine <= 4 * rounding - 1, 0.0)

    def of_many(cosines: Array, lengths: Array) -> Array:
        size = len(lengths)
        values, vectors = np.linalg.eigh(cosines)
        large = values > 16 * size * rounding
        weights = vectors[:, large] @ (vectors[:, large].sum(0) / values[large])
        along = cosines @ weights
        if along @ along <= size**2 * rounding:  # unit gradients cancel: v is rounding error
            return np.zeros(size)
        units = lengths / lengths.max()
        return np.asarray(units @ along / (weights @ along) * weights / units)

    return Formulas(of_two, of_many)
