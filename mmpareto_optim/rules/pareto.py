"""Conventional Pareto (MGDA): the min-norm point itself."""

from torch import Tensor

from mmpareto_optim.rules.gram import of_present, rounding_of
from mmpareto_optim.rules.solver import weights_of_present


def pareto_coefficients(gram: Tensor) -> Tensor:
    """Coefficients of *conventional Pareto* (MGDA): the min-norm weights times their number.

    The min-norm point of the gradients that are not zero, times their number, so that equal weights
    are the plain sum (Désidéri 2012; Wei & Hu 2024, Section 3.3).

    Args:
        gram: Gram matrices ``G_ij = g_i . g_j``, shape ``(..., m, m)``.

    Returns:
        Coefficients of shape ``(..., m)`` on the Gram matrix's device and in its dtype: 1 where at
        most one gradient is not zero, NaN where the Gram matrix is not finite. A zero gradient's
        own coefficient is the mean of the others'.

    Raises:
        ValueError, TypeError: as for :func:`min_norm_weights`.
    """

    def rule(products: Tensor, present: Tensor) -> Tensor:
        weights = weights_of_present(products, present, rounding_of(gram))
        return weights * present.sum(-1, keepdim=True)

    return of_present(rule, gram, 1.0)
