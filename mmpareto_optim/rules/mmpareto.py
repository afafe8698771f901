"""MMPareto: the direction of the min-norm point, the length of the sum."""

import math
from typing import Any

import torch
from torch import Tensor

from mmpareto_optim.rules.gram import (
    check_gamma,
    check_gram,
    of_present,
    rounding_of,
    squares_of,
)
from mmpareto_optim.rules.solver import weights_of_present

LONGEST_STRETCH = 2.0**120
"""Coefficients stay finite in float32, where the gradients' lengths differ by more than that."""


def mmpareto_coefficients(
    gram: Tensor, gamma: float = 1.5, *, eps: float | None = None, written: float = 0.0
) -> Tensor:
    """Coefficients of MMPareto (Wei & Hu 2024, arXiv 2405.17730, Algorithm 1).

    Without conflict (no negative inner product) the sum of the gradients. In conflict
    the min-norm direction, which is common to all objectives, stretched to at least the
    length of that sum. Both times ``gamma``.

    Three things that the paper leaves open:

    * A zero gradient has no direction to respect: the result is as if its loss were absent. A
      gradient that is alone is taken as it is, without ``gamma``.
    * Close to a Pareto-stationary point the min-norm point is the small difference of
      large vectors, and the stretch would blow its rounding error up to full size. The
      weights are therefore found for cosines smaller by ``m * eps + written``, which keeps
      ``h . g_i >= 0`` true of the rounded ``h``, in conflict. Where no direction satisfies that
      (two gradients within ``2 sqrt(m * eps + written)`` radians of opposite: 0.001 in float32,
      0.13 written in bfloat16), none can be told from noise and the coefficients are zero, as for
      exactly opposite gradients.
    * Without conflict the result is the plain sum, whatever becomes of it in rounding. The product
      with a gradient that is ``1 / written`` times shorter than the others (256 times in bfloat16,
      2**24 times in float32) can come out negative.

    The stretch ends at ``2**120``, so that the coefficients are finite in float32 too.

    Args:
        gram: Gram matrices ``G_ij = g_i . g_j``, shape ``(..., m, m)``, symmetric up to rounding.
        gamma: factor on the result, positive; the authors' code uses 1.5.
        eps: machine epsilon of the arithmetic that will combine the gradients; that of
            ``gram.dtype`` if None.
        written: unit roundoff (half the machine epsilon) of the dtype to which the combination is
            rounded once more, 0 where it is not.

    Returns:
        Coefficients ``c`` of ``h = sum_i c_i g_i``, shape ``(..., m)``, on the Gram
        matrix's device and in its dtype: 1 where at most one gradient is not zero, NaN where the
        Gram matrix is not finite. A zero gradient's own coefficient is the mean of the others'.

    Raises:
        ValueError: ``gamma`` is not positive and finite, or ``gram`` is not a stack of
            square matrices.
        TypeError: ``gram`` is not a real floating-point tensor.
    """
    check_gram(gram)
    check_gamma(gamma)
    eps = torch.finfo(gram.dtype).eps if eps is None else eps

    def rule(products: Tensor, present: Tensor) -> Tensor:
        count = present.to(products.dtype).sum(-1, keepdim=True)
        error = count * eps + written
        common = _common(products, present, error, rounding_of(gram))
        return torch.where((products < 0).flatten(-2).any(-1, keepdim=True), common, 1.0)

    return of_present(rule, gram, gamma)


def unstretched_coefficients(gram: Tensor, gamma: float) -> Tensor:
    """Coefficients before a stretch that is made tensor by tensor (``rescale="tensor"``).

    The authors' code keeps uniform weights where cos > 0 and takes the min-norm weights
    otherwise, orthogonal gradients included; :func:`mmpareto_coefficients` follows the
    paper and keeps the sum for orthogonal gradients.
    """

    def rule(products: Tensor, present: Tensor) -> Tensor:
        opposed = (products <= 0) & present.unsqueeze(-1) & present.unsqueeze(-2)
        weights = weights_of_present(products, present, rounding_of(gram))
        common = weights * present.sum(-1, keepdim=True)
        return torch.where(opposed.flatten(-2).any(-1, keepdim=True), common, 1.0)

    return of_present(rule, gram, gamma)


def _common(products: Tensor, present: Tensor, error: Tensor, rounding: float) -> Tensor:
    """Coefficients of the common direction, over gamma; ``error`` has shape ``(..., 1)``."""
    if products.shape[-1] > 2:
        return _common_of_many(products, present, error, rounding)
    first, cross, _, second = products.flatten(-2).unbind(-1)
    tiny = torch.finfo(products.dtype).tiny
    return torch.stack(
        coefficients_of_two(first, cross, second, error.squeeze(-1), tiny, torch), dim=-1
    )


def coefficients_of_two(
    first: Any, cross: Any, second: Any, error: Any, tiny: float, numbers: Any
) -> tuple[Any, Any]:
    """Coefficients for two gradients in conflict over gamma, in closed form.

    Args:
        first: square of the one gradient, a number for each Gram matrix.
        cross: their inner products.
        second: squares of the other.
        error: by how much smaller than it is each cosine is taken.
        tiny: the smallest normal number of their type.
        numbers: ``torch``, or what has its functions for single numbers.
    """
    bound = numbers.sqrt(first) * numbers.sqrt(second)
    # The projection of the origin on the segment between the two, each cosine less the error.
    # It falls between the ends, and has no positive product with them just where the two are
    # closer to opposite than the error.
    opposed = error * bound - cross
    share = opposed + (1 - error) * second
    other_share = opposed + (1 - error) * first
    total = share + other_share
    alpha, beta = share / total, other_share / total
    lost = cross + (1 - 2 * error) * bound < 0

    square = alpha * (alpha * first + beta * cross) + beta * (alpha * cross + beta * second)
    sum_square = numbers.clip(first + second + 2 * cross, 0, math.inf)
    ratio = numbers.sqrt(sum_square / numbers.clip(square, tiny, math.inf))
    scale = numbers.where(lost, 0.0, numbers.clip(ratio, 2, LONGEST_STRETCH))
    return scale * alpha, scale * beta


def _common_of_many(products: Tensor, present: Tensor, error: Tensor, rounding: float) -> Tensor:
    """Coefficients of the min-norm direction, at least as long as the sum of the gradients."""
    lengths = squares_of(products).clamp(min=0).sqrt()
    bound = lengths.unsqueeze(-1) * lengths.unsqueeze(-2)
    # Every cosine less the rounding error of h . g_i: what holds for these holds for h as
    # it will be computed. The weights are found with room for the solver's own rounding.
    pessimistic = products - error.unsqueeze(-1) * bound
    room = 3 * lengths.shape[-1] * rounding
    alpha = weights_of_present(pessimistic - room * bound, present, rounding)
    # Sums of numbers far larger than they are, where lengths differ much: rounded themselves.
    tolerance = torch.finfo(products.dtype).eps * lengths * (alpha * lengths).sum(-1, keepdim=True)
    scale = present.sum(-1, keepdim=True)
    against = (pessimistic @ alpha.unsqueeze(-1)).squeeze(-1) < -scale / 2 * tolerance
    lost = against.any(-1, keepdim=True)

    square = (alpha.unsqueeze(-2) @ products @ alpha.unsqueeze(-1)).squeeze(-1)
    length = scale * square.clamp(min=0).sqrt()
    sum_length = products.sum((-2, -1)).clamp(min=0).sqrt().unsqueeze(-1)
    stretch = (sum_length / length).clamp(1, LONGEST_STRETCH).nan_to_num(nan=1.0)
    return torch.where(lost, 0.0, scale * alpha * stretch)
