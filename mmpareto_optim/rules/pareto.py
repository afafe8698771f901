"""Conventional Pareto (MGDA): the min-norm point itself."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpareto_optim.rules.evaluation import Array, Formulas, evaluate
from mmpareto_optim.rules.solver import nonnegative_minimum


@torch.no_grad()
def min_norm_weights(gram: Tensor) -> Tensor:
    """Simplex weights of the shortest vector in the convex hull of the gradients.

    Solves ``min ||sum_i alpha_i g_i||`` subject to ``alpha_i >= 0`` and ``sum_i alpha_i = 1``. The
    minimiser ``p`` satisfies ``p . g_i >= ||p||^2`` for every ``i``, so ``-p`` is a descent
    direction common to all objectives, and ``p = 0`` exactly at a Pareto-stationary point
    (Désidéri 2012; Sener & Koltun 2018, Section 3.2).

    Two gradients have a closed form, evaluated on their device without waiting for it. The matrices
    of more are copied to the host together and solved there in float64.

    The minimiser is exact for the matrix that is given: ``p . g_i >= ||p||^2`` holds up to about
    ``8 m 2**-52`` of ``||g_i|| sum_j alpha_j ||g_j||``, however many gradients depend on each
    other. What is lost before is lost: inner products have rounded the cosines, by 1e-16 in
    float64 and 1e-7 in float32, which near-opposite gradients turn into the root of that of their
    length. A matrix that rounding has left with a negative eigenvalue is that of no gradients; the
    result is then that for a diagonal made larger by about the size of it. The squares of gradients
    longer than 1e154 or shorter than 1e-162 are no longer numbers of float64.

    Args:
        gram: Gram matrices ``G_ij = g_i . g_j``, shape ``(..., m, m)``, any real
            floating dtype, any device, symmetric up to rounding. Batched over the leading
            dimensions.

    Returns:
        Weights of shape ``(..., m)`` on the Gram matrix's device and in its dtype.
        Where the minimiser is not unique (equal gradients, linearly dependent ones),
        one of the minimisers; several zero gradients share the weight. NaN where the Gram
        matrix is not finite.

    Raises:
        ValueError: ``gram`` is not a stack of square matrices with ``m >= 1``.
        TypeError: ``gram`` is not a real floating-point tensor.
    """
    weights = pareto_coefficients(gram) / gram.shape[-1]
    # A zero gradient is itself the min-norm point.
    zero = (gram.diagonal(dim1=-2, dim2=-1) <= 0).to(gram.dtype)
    count = zero.sum(-1, keepdim=True)
    weights = torch.where(count > 0, zero / count, weights)
    return weights.masked_fill(~gram.isfinite().flatten(-2).all(-1, keepdim=True), torch.nan)


def pareto_coefficients(gram: Tensor) -> Tensor:
    """Coefficients of *conventional Pareto* (MGDA): the min-norm weights times their number.

    The min-norm point of the gradients that are not zero, times their number, so that equal weights
    are the plain sum (Désidéri 2012; Wei & Hu 2024, Section 3.3). Exact as
    :func:`min_norm_weights` is.

    Args:
        gram: Gram matrices ``G_ij = g_i . g_j``, shape ``(..., m, m)``.

    Returns:
        Coefficients of shape ``(..., m)`` on the Gram matrix's device and in its dtype: 1 where at
        most one gradient is not zero, NaN where the Gram matrix is not finite. A zero gradient's
        own coefficient is the mean of the others'.

    Raises:
        ValueError, TypeError: as for :func:`min_norm_weights`.
    """
    return evaluate(PARETO, gram)


def weight_of_two(ratio: Any, inverse: Any, cosine: Any, numbers: Any) -> Any:
    """Twice the min-norm weight: the projection of the origin on a segment, up to its ends."""
    # Each weight has its own numerator: 1 - alpha would lose a tiny alpha.
    weight = numbers.clamp(inverse - cosine, min=0.0)
    total = weight + numbers.clamp(ratio - cosine, min=0.0)
    return numbers.masked_fill(numbers.div(2 * weight, total), total == 0, 1.0)


def weights_of_many(cosines: Array, lengths: Array, margin: float = 0.0) -> Array:
    """The min-norm weights times their number; each cosine is taken smaller by ``margin``.

    With ``x_i`` proportional to ``alpha_i ||g_i||``, with the cosines C and with ``b_i``
    proportional to ``1 / ||g_i||``, the weights are those of the minimiser of
    ``x' C x + (b . x - 1)^2``, up to their sum: along a ray of fixed weights only the length of
    ``x`` is left to choose, and the best value grows with the norm of the point. The conditioning
    depends on the angles alone, not on the lengths.
    """
    inverse = lengths.min() / lengths
    matrix = cosines - margin + np.outer(inverse, inverse)
    weights = nonnegative_minimum(matrix, inverse) * inverse
    return np.asarray(weights / weights.sum() * len(weights))


PARETO = Formulas(weight_of_two, weights_of_many)
