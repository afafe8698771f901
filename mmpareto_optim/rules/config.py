"""ConFIG: the direction with equal cosines to all gradients."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpareto_optim.rules.evaluation import Array, Formulas, check_gram, of_stack
from mmpareto_optim.rules.solver import EPS


def config_coefficients(gram: Tensor) -> Tensor:
    """Coefficients of ConFIG (Liu, Chu & Thuerey 2025, arXiv 2408.11104, Equation 2).

    With the unit gradients ``u_i`` as the rows of ``U``, and ``1`` for the vector of ones::

        v = pinv(U) 1,    h = (sum_i g_i . v) v / ||v||^2

    Linearly independent gradients all have the same, positive cosine with ``h``, and ``||h||`` is
    the sum of their projections on it. Of dependent ones ``v`` is the shortest vector of those
    whose products with the unit gradients are nearest to 1, and the cosines may differ in size and
    sign. Where unit gradients cancel, as exactly opposite ones do, the result is zero.

    Eigenvalues of the cosines ``U U'`` below ``16 m eps`` count as zero, for ``eps`` the machine
    epsilon of ``gram.dtype``: of three or more gradients, two that are less than about
    ``6 sqrt(m eps)`` radians apart (2e-7 in float64, 0.004 in float32) count as one. Shapes, zero
    and non-finite gradients and errors raised are those of :func:`mmpareto_coefficients`.
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
