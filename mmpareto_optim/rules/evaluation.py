"""How a rule is evaluated: two gradients in closed form where they are, more on the host."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


class Formulas(NamedTuple):
    """A rule for gradients of which none is zero, without gamma.

    Attributes:
        of_two: the coefficient of one of two gradients: a function of its length over the other's,
            of the inverse of that, of their cosine, and of what computes with these elementwise:
            ``torch``, or ``FLOATS`` for Python's own numbers.
        of_many: the coefficients ``(m,)`` of more gradients: a function of their cosines
            ``(m, m)``, with a diagonal of 1, and of their lengths ``(m,)``.
    """

    of_two: Callable[[Any, Any, Any, Any], Any]
    of_many: Callable[[Array, Array], Array]


FLOATS = SimpleNamespace(
    sqrt=lambda x: math.sqrt(x) if x >= 0 else math.nan,
    div=lambda x, y: x / y if y else math.inf,
    clamp=lambda x, min=-math.inf, max=math.inf: min if x < min else max if x > max else x,
    masked_fill=lambda x, mask, value: value if mask else x,
    add=lambda x, y, alpha: x + alpha * y,
    addcmul=lambda x, y, z, value: x + value * y * z,
)
"""The functions of ``torch`` that formulas for two gradients use, for Python's own numbers."""


@torch.no_grad()
def evaluate(formulas: Formulas, gram: Tensor, gamma: float = 1.0) -> Tensor:
    """Coefficients ``(..., m)`` of Gram matrices ``(..., m, m)``, on their device, in their dtype.

    Raises:
        ValueError, TypeError: ``gram`` is not a stack of square, real matrices.
    """
    check_gram(gram)
    if gram.shape[-1] == 1:
        return torch.ones_like(gram[..., 0])
    if gram.shape[-1] == 2 and (gram.ndim > 2 or gram.device.type != "cpu"):
        return of_pairs(gram.to(solver_dtype(gram)), formulas, gamma).to(gram.dtype)
    if gram.is_meta:
        return torch.empty_like(gram[..., 0])
    matrices = gram.cpu().double().numpy()
    found = np.empty(matrices.shape[:-1])
    for index in np.ndindex(found.shape[:-1]):
        found[index] = of_one(matrices[index], formulas, gamma)
    return torch.from_numpy(found).to(gram.dtype).to(gram.device, non_blocking=True)


def of_pairs(gram: Tensor, formulas: Formulas, gamma: float) -> Tensor:
    """Coefficients ``(..., 2)`` by operations on the Gram matrices' device; nothing waits for it.

    Divided by the product of the two lengths, a Gram matrix holds their ratio, its inverse and
    their cosine: nothing overflows or vanishes.
    """
    squares = gram.diagonal(dim1=-2, dim2=-1)
    product = squares.sqrt().prod(-1, keepdim=True)
    scaled = gram / product.unsqueeze(-1)
    ratios = scaled.diagonal(dim1=-2, dim2=-1)
    cosine = torch.lerp(scaled[..., :1, 1], scaled[..., 1:, 0], 0.5)
    found = gamma * formulas.of_two(ratios, ratios.flip(-1), cosine, torch)
    # NaN where the Gram matrix is not finite.
    found = torch.add(found, scaled.sum((-2, -1)).unsqueeze(-1), alpha=0)
    return found.masked_fill((squares <= 0).any(-1, keepdim=True), 1.0)


def of_pair(
    gram: Sequence[Sequence[float]], formulas: Formulas, gamma: float
) -> tuple[float, float]:
    """As :func:`of_pairs` for one matrix in Python's own numbers, which takes microseconds."""
    (square, upper), (lower, other_square) = gram
    if square <= 0 or other_square <= 0:
        return 1.0, 1.0
    product = math.sqrt(square) * math.sqrt(other_square)
    ratio, inverse = square / product, other_square / product
    cosine = (upper / 2 + lower / 2) / product
    if not math.isfinite(ratio + inverse + cosine):
        return math.nan, math.nan
    return (
        gamma * formulas.of_two(ratio, inverse, cosine, FLOATS),
        gamma * formulas.of_two(inverse, ratio, cosine, FLOATS),
    )


def of_one(gram: Array, formulas: Formulas, gamma: float) -> Sequence[float] | Array:
    """Coefficients of one Gram matrix ``(m, m)`` in the host's memory.

    A zero gradient counts as absent. It takes the mean of the others' coefficients, which changes
    neither the combination nor the mean of the coefficients, which ``BlockStats.scale`` is.
    """
    size = len(gram)
    if size == 2:
        return of_pair(gram.tolist(), formulas, gamma)
    nonzero = ~(gram.diagonal() <= 0)
    count = int(nonzero.sum())
    if count < 2:
        return np.ones(size)
    if not np.isfinite(gram).all():
        return np.full(size, np.nan)
    if count < size:
        found = np.asarray(of_one(gram[np.ix_(nonzero, nonzero)], formulas, gamma))
        result = np.full(size, found.mean())
        result[nonzero] = found
        return result
    with np.errstate(all="ignore"):
        lengths = np.sqrt(gram.diagonal())
        # One division after the other: the product of two lengths could overflow or vanish.
        cosines = np.clip((gram / 2 + gram.T / 2) / lengths / lengths[:, None], -1, 1)
        np.fill_diagonal(cosines, 1)
        return gamma * formulas.of_many(cosines, lengths)


def check_gram(gram: Tensor) -> None:
    """Raise unless ``gram`` can be a stack of Gram matrices ``(..., m, m)``."""
    if not isinstance(gram, Tensor) or not gram.is_floating_point():
        found = gram.dtype if isinstance(gram, Tensor) else type(gram).__name__
        raise TypeError(f"gram must be a real floating-point tensor, got {found}")
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
        raise ValueError(f"gram must have shape (..., m, m) with m >= 1, got {tuple(gram.shape)}")


def check_gamma(gamma: float) -> None:
    """Raise unless ``gamma`` is a positive, finite number."""
    if not (isinstance(gamma, Real) and 0 < gamma < math.inf):
        raise ValueError(f"gamma must be a positive, finite number, got {gamma!r}")


def solver_dtype(tensor: Tensor) -> torch.dtype:
    """float64, in which products of float32 numbers cannot overflow, where it exists."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def applied_gamma(gram: Tensor, gamma: float) -> Tensor:
    """The factor that a named rule applies: 1 where at most one gradient is not zero.

    Args:
        gram: Gram matrices, shape ``(..., m, m)``.
        gamma: the factor on the result of two or more gradients.

    Returns:
        Shape ``(...)``, on the Gram matrix's device and in its dtype.
    """
    nonzero = ~(gram.diagonal(dim1=-2, dim2=-1) <= 0)  # NaN is not zero
    return torch.ones_like(gram[..., 0, 0]).masked_fill(nonzero.sum(-1) > 1, gamma)
