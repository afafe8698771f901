"""Rules: pure functions from a Gram matrix of gradients to the coefficients of their sum."""

import math
import sys
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mmpareto_optim.solver import check_gram, min_norm_weights, solver_dtype

Rule = Callable[[Tensor], Tensor]
"""A Gram matrix ``(m, m)`` in, coefficients ``(m,)`` out."""

LONGEST_STRETCH = 2.0**120
"""Coefficients stay finite in float32, where the gradients' lengths differ by more than that."""


def uniform_coefficients(gram: Tensor) -> Tensor:
    """Coefficients of the plain sum of the gradients (the *uniform baseline*): ones.

    Args:
        gram: Gram matrices, shape ``(..., m, m)``.

    Returns:
        Ones of shape ``(..., m)`` on the Gram matrix's device and in its dtype.

    Raises:
        ValueError, TypeError: as for :func:`min_norm_weights`.
    """
    check_gram(gram)
    return torch.ones_like(gram[..., 0])


def pareto_coefficients(gram: Tensor) -> Tensor:
    """Coefficients of *conventional Pareto* (MGDA): ``m`` times the min-norm weights.

    The factor ``m`` makes equal weights the plain sum (Wei & Hu 2024, Section 3.3).

    Args:
        gram: Gram matrices, shape ``(..., m, m)``.

    Returns:
        Coefficients of shape ``(..., m)`` on the Gram matrix's device and in its dtype.

    Raises:
        ValueError, TypeError: as for :func:`min_norm_weights`.
    """
    return min_norm_weights(gram) * gram.shape[-1]


@torch.no_grad()
def mmpareto_coefficients(gram: Tensor, gamma: float = 1.5, *, eps: float | None = None) -> Tensor:
    """Coefficients of MMPareto (Wei & Hu 2024, arXiv 2405.17730, Algorithm 1).

    Without conflict (no negative inner product) the sum of the gradients. In conflict
    the min-norm direction, which is common to all objectives, stretched to at least the
    length of that sum. Both times ``gamma``.

    Two cases that the paper leaves open:

    * A zero gradient has no direction to respect: the result is as if its loss were absent.
    * Close to a Pareto-stationary point the min-norm point is the small difference of
      large vectors, and the stretch would blow its rounding error up to full size. The
      weights are therefore found for cosines smaller by ``m * eps``, which keeps
      ``h . g_i >= 0`` true after rounding to ``eps``. Where no direction satisfies that (two
      gradients within ``2 sqrt(m * eps)`` radians of opposite: 0.001 in float32), none can
      be told from noise and the coefficients are zero, as for exactly opposite gradients.

    The stretch ends at ``2**120``, so that the coefficients are finite in float32 too.

    Args:
        gram: Gram matrices ``G_ij = g_i . g_j``, shape ``(..., m, m)``.
        gamma: factor on the result, positive; the authors' code uses 1.5.
        eps: relative rounding error of the arithmetic that will combine the gradients;
            the machine epsilon of ``gram.dtype`` if None.

    Returns:
        Coefficients ``c`` of ``h = sum_i c_i g_i``, shape ``(..., m)``, on the Gram
        matrix's device and in its dtype. Where the Gram matrix is not finite, neither is
        the combination of its gradients.

    Raises:
        ValueError: ``gamma`` is not positive and finite, or ``gram`` is not a stack of
            square matrices.
        TypeError: ``gram`` is not a real floating-point tensor.
    """
    check_gram(gram)
    check_gamma(gamma)
    eps = torch.finfo(gram.dtype).eps if eps is None else eps
    products = gram.to(solver_dtype(gram))
    if gram.shape[-1] == 2:
        first, cross, _, second = products.flatten(-2).unbind(-1)
        tiny = torch.finfo(products.dtype).tiny
        common = torch.stack(_of_two(first, cross, second, eps, tiny, torch), dim=-1)
    else:
        common = _common_of_many(products, eps)
    conflict = (products < 0).flatten(-2).any(-1, keepdim=True)
    return (gamma * torch.where(conflict, common, 1.0)).to(gram.dtype)


def mmpareto_on_the_host(gram: Tensor, gamma: float, eps: float) -> Tensor:
    """:func:`mmpareto_coefficients` of a float64 pair ``(2, 2)``, in Python's own numbers.

    A rule is a score of operations on a few numbers, of which a small model's step would be a
    good part: one of PyTorch's takes a microsecond or more to begin.
    """
    (first, cross), (_, second) = gram.tolist()
    one, other = 1.0, 1.0
    if cross < 0:
        one, other = _of_two(first, cross, second, eps, sys.float_info.min, _Floats)
    return torch.tensor([gamma * one, gamma * other], dtype=gram.dtype)


class _Floats:
    """What :func:`_of_two` asks of a library, for single numbers. NaN stays NaN."""

    sqrt = math.sqrt

    @staticmethod
    def clip(number: float, low: float, high: float) -> float:
        return min(max(number, low), high)

    @staticmethod
    def where(condition: bool, one: float, other: float) -> float:
        return one if condition else other


def _of_two(
    first: Any, cross: Any, second: Any, eps: float, tiny: float, numbers: Any
) -> tuple[Any, Any]:
    """Coefficients for two gradients in conflict over gamma, in closed form.

    Args:
        first: square of the one gradient, a number for each Gram matrix.
        cross: their inner products.
        second: squares of the other.
        eps: as in :func:`mmpareto_coefficients`.
        tiny: the smallest normal number of their type.
        numbers: ``torch``, or :class:`_Floats` for single numbers.
    """
    error = 2 * eps
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


def _common_of_many(products: Tensor, eps: float) -> Tensor:
    """Coefficients of the min-norm direction, at least as long as the sum of the gradients."""
    lengths = products.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    # Every cosine less the rounding error of h . g_i: what holds for these holds for h as
    # it will be computed.
    error = lengths.shape[-1] * eps * lengths.unsqueeze(-1) * lengths.unsqueeze(-2)
    pessimistic = products - error
    alpha = _weights_of_nonzero(pessimistic)
    # Sums of numbers far larger than they are, where lengths differ much: rounded themselves.
    rounding = torch.finfo(products.dtype).eps * lengths * (alpha * lengths).sum(-1, keepdim=True)
    against = (pessimistic @ alpha.unsqueeze(-1)).squeeze(-1) < -lengths.shape[-1] / 2 * rounding
    lost = against.any(-1, keepdim=True)

    scale = (lengths > 0).sum(-1, keepdim=True)
    square = (alpha.unsqueeze(-2) @ products @ alpha.unsqueeze(-1)).squeeze(-1)
    length = scale * square.clamp(min=0).sqrt()
    sum_length = products.sum((-2, -1)).clamp(min=0).sqrt().unsqueeze(-1)
    stretch = (sum_length / length).clamp(1, LONGEST_STRETCH).nan_to_num(nan=1.0)
    return torch.where(lost, 0.0, scale * alpha * stretch)


def unstretched_coefficients(gram: Tensor, gamma: float) -> Tensor:
    """Coefficients before a stretch that is made tensor by tensor (``rescale="tensor"``).

    The authors' code keeps uniform weights where cos > 0 and takes the min-norm weights
    otherwise, orthogonal gradients included; :func:`mmpareto_coefficients` follows the
    paper and keeps the sum for orthogonal gradients.
    """
    nonzero = gram.diagonal(dim1=-2, dim2=-1) > 0
    opposed = (gram <= 0) & nonzero.unsqueeze(-1) & nonzero.unsqueeze(-2)
    common = _weights_of_nonzero(gram) * nonzero.sum(-1, keepdim=True)
    return gamma * torch.where(opposed.flatten(-2).any(-1, keepdim=True), common, 1.0)


def check_gamma(gamma: float) -> None:
    """Raise unless ``gamma`` is a positive, finite number."""
    if not (isinstance(gamma, Real) and 0 < gamma < math.inf):
        raise ValueError(f"gamma must be a positive, finite number, got {gamma!r}")


def _weights_of_nonzero(gram: Tensor) -> Tensor:
    """Min-norm weights of the gradients that are not zero; NaN where all are."""
    squares = gram.diagonal(dim1=-2, dim2=-1)
    zero = squares == 0
    # A vector orthogonal to all others takes weight, but leaves the others' proportions.
    stand_in = torch.where(zero, squares.amax(-1, keepdim=True), 0)
    alpha = torch.where(zero, 0, min_norm_weights(gram + torch.diag_embed(stand_in)))
    return alpha / alpha.sum(-1, keepdim=True)
