"""Rules that project on the dual cone: the directions along which no objective gets worse."""

import torch
from torch import Tensor

from mmpareto_optim.rules.gram import of_present, rounding_of
from mmpareto_optim.rules.solver import nonnegative_minimum, unit_products


def dualproj_coefficients(gram: Tensor) -> Tensor:
    """Coefficients of the sum of the gradients, projected on the dual cone.

    The ``h`` nearest to ``g = sum_i g_i`` with ``h . g_i >= 0`` for every ``i`` (Lopez-Paz &
    Ranzato 2017, arXiv 1706.08840, Equation 11, which projects the newest gradient instead)::

        h = g + sum_i v_i g_i,    v = argmin ||g + sum_i v_i g_i||  subject to  v >= 0

    The sum itself, to the last bit of the coefficients, wherever that harms nobody. Longer than the
    sum it never is. ``DualProj`` of TorchJD projects the mean: it is ``m`` times shorter.

    ``h . g_i >= 0`` holds up to the rounding of the inner products, about ``m`` times the machine
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

    def rule(products: Tensor, present: Tensor) -> Tensor:
        cosines, lengths = unit_products(products, present)
        weights = torch.where(present, lengths, 0)
        unit = weights.amax(-1, keepdim=True)
        added = _multipliers(cosines, weights / unit, rounding_of(gram))
        return 1 + added * (unit / lengths)

    return of_present(rule, gram, 1.0)


def upgrad_coefficients(gram: Tensor) -> Tensor:
    """Coefficients of UPGrad: each gradient is projected on the dual cone, then they are added.

    With the projection ``pi(g) = argmin ||h - g||`` subject to ``h . g_i >= 0`` for every ``i``,
    ``h = sum_k pi(g_k)`` (Quinton & Rey 2024, arXiv 2406.16232, Equation 7). The paper, and
    ``UPGrad`` of TorchJD, take the mean of the projections: it is ``m`` times shorter. The sum
    makes ``h`` the plain sum where nothing conflicts, to the last bit of the coefficients.

    ``h . g_i >= 0`` holds up to the rounding of the inner products, about ``m`` times the machine
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

    def rule(products: Tensor, present: Tensor) -> Tensor:
        cosines, lengths = unit_products(products, present)
        # A problem for each gradient, all of length 1: a projection scales with what it projects.
        each = torch.eye(products.shape[-1], dtype=products.dtype, device=products.device)
        each = each.expand_as(products)
        added = _multipliers(cosines.unsqueeze(-3), each, rounding_of(gram))
        shares = added * (lengths.unsqueeze(-1) / lengths.unsqueeze(-2))
        return 1 + torch.where(present.unsqueeze(-1), shares, 0).sum(-2)

    return of_present(rule, gram, 1.0)


def _multipliers(cosines: Tensor, weights: Tensor, rounding: float) -> Tensor:
    """What is to be added to the weights of unit vectors for a projection on their dual cone.

    The dual problem of the projection: ``argmin ||sum_j (a_j + y_j) u_j||`` subject to ``y >= 0``.

    Args:
        cosines: inner products of the unit vectors ``u_j``, shape ``(..., m, m)``.
        weights: the ``a`` of the vector ``sum_j a_j u_j`` to project, shape ``(..., m)``.
        rounding: relative error of the cosines.

    Returns:
        The multipliers ``y``, shape ``(..., m)``.
    """
    against = -(cosines @ weights.unsqueeze(-1)).squeeze(-1)
    return nonnegative_minimum(cosines, against, rounding)
