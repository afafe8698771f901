"""Rules that project on the dual cone: the directions along which no objective gets worse."""

from typing import Any

import numpy as np
from torch import Tensor

from mmpareto_optim.rules.evaluation import Array, Formulas, of_stack
from mmpareto_optim.rules.solver import EPS, nonnegative_minimum


def dualproj_coefficients(gram: Tensor) -> Tensor:
    """Coefficients of the sum of the gradients, projected on the dual cone.

    The ``h`` nearest to ``g = sum_i g_i`` with ``h . g_i >= 0`` for every ``i`` (Lopez-Paz &
    Ranzato 2017, arXiv 1706.08840, Equation 11, which projects the newest gradient instead)::

        h = g + sum_i v_i g_i,    v = argmin ||g + sum_i v_i g_i||  subject to  v >= 0

    The sum itself, to the last bit of the coefficients, wherever that harms nobody, and never
    longer. ``DualProj`` of TorchJD projects the mean: it is ``m`` times shorter.

    ``h . g_i >= 0`` holds up to the rounding of the inner products, about ``8 m`` times the machine
    epsilon of the lengths of what is combined; at a Pareto-stationary point ``h`` is zero up to the
    same. Shapes, zero and non-finite gradients and errors raised are those of
    :func:`mmpareto_coefficients`; no coefficient is below 1.
    """
    return of_stack(gram, DUALPROJ)


def upgrad_coefficients(gram: Tensor) -> Tensor:
    """Coefficients of UPGrad: each gradient is projected on the dual cone, then they are added.

    With the projection ``pi(g) = argmin ||h - g||`` subject to ``h . g_i >= 0`` for every ``i``,
    ``h = sum_k pi(g_k)`` (Quinton & Rey 2024, arXiv 2406.16232, Equation 7), the plain sum where
    nothing conflicts, to the last bit of the coefficients. The paper, and ``UPGrad`` of TorchJD,
    take the mean: it is ``m`` times shorter. Precision, shapes, coefficients and errors raised are
    those of :func:`dualproj_coefficients`.
    """
    return of_stack(gram, UPGRAD)


def _dualproj_of_two(ratio: Any, inverse: Any, cosine: Any, square: Any, numbers: Any) -> Any:
    # At most one gradient, the shorter, is opposed by the sum: what is left is orthogonal to it.
    return numbers.clamp(-cosine / ratio, min=1.0)


def _dualproj_of_many(cosines: Array, lengths: Array) -> Array:
    units = lengths / lengths.max()
    against = -cosines @ units
    if against.max() <= len(units) * EPS * units.sum():
        return np.ones(len(units))
    return np.asarray(1 + nonnegative_minimum(cosines, against) / units)


def _upgrad_of_two(ratio: Any, inverse: Any, cosine: Any, square: Any, numbers: Any) -> Any:
    return 1 + numbers.clamp(-cosine / ratio, min=0.0)


def _upgrad_of_many(cosines: Array, lengths: Array) -> Array:
    # A gradient that opposes none is its own projection: the solver returns zeros at once.
    added = [
        nonnegative_minimum(cosines, -row) * (length / lengths)
        for row, length in zip(cosines, lengths, strict=True)
    ]
    return np.asarray(1 + np.sum(added, axis=0))


DUALPROJ = Formulas(_dualproj_of_two, _dualproj_of_many)
UPGRAD = Formulas(_upgrad_of_two, _upgrad_of_many)
