"""Rules that project on the dual cone: the directions along which no objective gets worse."""

from typing import Any

import numpy as np
from torch import Tensor

from mmpareto_optim.rules.evaluation import Array, Formulas, evaluate
from mmpareto_optim.rules.solver import EPS, nonnegative_minimum


def dualproj_coefficients(gram: Tensor) -> Tensor:
    """Coefficients of the sum of the gradients, projected on the dual cone.

    The ``h`` nearest to ``g = sum_i g_i`` with ``h . g_i >= 0`` for every ``i`` (Lopez-Paz &
    Ranzato 2017, arXiv 1706.08840, Equation 11, which projects the newest gradient instead)::

        h = g + sum_i v_i g_i,    v = argmin ||g + sum_i v_i g_i||  subject to  v >= 0

    The sum itself, to the last bit of the coefficients, wherever that harms nobody. Longer than the
    sum it never is. ``DualProj`` of TorchJD projects the mean: it is ``m`` times shorter.

    ``h . g_i >= 0`` holds up to the rounding of the inner products, about ``8 m`` times the machine
    epsilon of the lengths of what is combined. At a Pareto-stationary point ``h`` is zero up to
    the same.

    Args:
        gram: Gram matrices ``G_ij = g_i . g_j``, shape ``(..., m, m)``, symmetric up to rounding.

    Returns:
        Coefficients of shape ``(..., m)`` on the Gram matrix's device and in its dtype, none below
        1: exactly 1 where at most one gradient is not zero, NaN where the Gram matrix is not
        finite. A zero gradient's own coefficient is the mean of the others'.

    Raises:
        ValueError, TypeError: as for :func:`min_norm_weights`.
    """
    return evaluate(DUALPROJ, gram)


def upgrad_coefficients(gram: Tensor) -> Tensor:
    """Coefficients of UPGrad: each gradient is projected on the dual cone, then they are added.

    With the projection ``pi(g) = argmin ||h - g||`` subject to ``h . g_i >= 0`` for every ``i``,
    ``h = sum_k pi(g_k)`` (Quinton & Rey 2024, arXiv 2406.16232, Equation 7). The paper, and
    ``UPGrad`` of TorchJD, take the mean of the projections: it is ``m`` times shorter. The sum
    makes ``h`` the plain sum where nothing conflicts, to the last bit of the coefficients.

    ``h . g_i >= 0`` holds up to the rounding of the inner products, about ``8 m`` times the machine
    epsilon of the lengths of what is combined. At a Pareto-stationary point ``h`` is zero up to
    the same.

    Args:
        gram: Gram matrices ``G_ij = g_i . g_j``, shape ``(..., m, m)``, symmetric up to rounding.

    Returns:
        Coefficients of shape ``(..., m)`` on the Gram matrix's device and in its dtype, none below
        1: exactly 1 where at most one gradient is not zero, NaN where the Gram matrix is not
        finite. A zero gradient's own coefficient is the mean of the others'.

    Raises:
        ValueError, TypeError: as for :func:`min_norm_weights`.
    """
    return evaluate(UPGRAD, gram)


def _dualproj_of_two(ratio: Any, inverse: Any, cosine: Any, numbers: Any) -> Any:
    # At most one gradient, the shorter, is opposed by the sum: what is left is orthogonal to it.
    return numbers.clamp(-cosine / ratio, min=1.0)


def _dualproj_of_many(cosines: Array, lengths: Array) -> Array:
    units = lengths / lengths.max()
    against = -cosines @ units
    if against.max() <= len(units) * EPS * units.sum():
        return np.ones(len(units))
    return np.asarray(1 + nonnegative_minimum(cosines, against) / units)


def _upgrad_of_two(ratio: Any, inverse: Any, cosine: Any, numbers: Any) -> Any:
    return 1 + numbers.clamp(-cosine / ratio, min=0.0)


def _upgrad_of_many(cosines: Array, lengths: Array) -> Array:
    added = [
        nonnegative_minimum(cosines, -row) * (length / lengths) if row.min() < 0 else 0.0 * row
        for row, length in zip(cosines, lengths, strict=True)
    ]
    return np.asarray(1 + np.sum(added, axis=0))


DUALPROJ = Formulas(_dualproj_of_two, _dualproj_of_many)
UPGRAD = Formulas(_upgrad_of_two, _upgrad_of_many)
