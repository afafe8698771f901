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

Array = NDArray[Any]


class Formulas(NamedTuple):
    """A rule for gradients of which none is zero, without gamma.

    ``of_two``: the coefficient of one of two, from its length over the other's, the inverse of
    that, their cosine, the square of their sum over the product of their lengths, and what computes
    with these, ``torch`` or ``FLOATS``. ``of_many``: those of more, from cosines and lengths.
    """

    of_two: Callable[[Any, Any, Any, Any, Any], Any]
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


def of_stack(gram: Tensor, formulas: Formulas, gamma: float = 1.0) -> Tensor:
    """As :func:`evaluate` for one stack, if it is one of square, real matrices; in its dtype."""
    check_gram(gram)
    return evaluate([gram], [formulas], gamma)[0].to(gram.dtype)


def evaluate(grams: Sequence[Tensor], formulas: Sequence[Formulas], gamma: float) -> list[Tensor]:
    """``gamma`` times the coefficients ``(..., m)`` of Gram matrices ``(..., m, m)``, in float64.

    A matrix in the host's memory takes microseconds. Elsewhere pairs take a few operations for all
    of a formula, and nothing waits; more are copied to the host and back, all of a device at once.
    """
    found: dict[int, Tensor] = {}
    together: dict[tuple[object, ...], list[int]] = {}
    for index, (gram, formula) in enumerate(zip(grams, formulas, strict=True)):
        size = gram.shape[-1]
        if gram.is_cpu and gram.ndim == 2 and type(gram) is Tensor:
            # Making an array would take as long as a pair's closed form.
            matrix = gram if size == 2 else gram.detach().double().numpy()
            found[index] = torch.from_numpy(np.array(of_one(matrix, formula, gamma)))
        elif size == 1:
            found[index] = torch.ones_like(gram[..., 0], dtype=solver_dtype(gram))
        else:
            kind = (gram.shape, formula) if size == 2 else ()
            together.setdefault((gram.device, *kind), []).append(index)
    for key, members in together.items():
        chosen = [grams[i].detach().to(solver_dtype(grams[i])) for i in members]
        if len(key) > 1:
            solved = list(of_pairs(torch.stack(chosen), formulas[members[0]], gamma))
        else:
            solved = on_host(chosen, [formulas[i] for i in members], gamma)
        found.update(zip(members, solved, strict=True))
    return [found[index] for index in range(len(grams))]


def of_pairs(gram: Tensor, formulas: Formulas, gamma: float) -> Tensor:
    """Coefficients ``(..., 2)`` by operations on the Gram matrices' device, without waiting."""
    squares = gram.diagonal(dim1=-2, dim2=-1)
    # Over the product of the lengths, so that nothing overflows or vanishes.
    product = squares.sqrt().prod(-1, keepdim=True)
    scaled = gram / product.unsqueeze(-1)
    ratios, cosine = scaled.diagonal(dim1=-2, dim2=-1), scaled[..., :1, 1]
    # First a gradient's product with the sum: where the sum is short, these are exact.
    square = scaled.sum(-1).sum(-1, keepdim=True)
    found = gamma * formulas.of_two(ratios, ratios.flip(-1), cosine, square, torch)
    found = torch.add(found, square, alpha=0)  # NaN where the Gram matrix is not finite
    return found.masked_fill((squares <= 0).any(-1, keepdim=True), 1.0)


def of_pair(gram: list[list[float]], formulas: Formulas, gamma: float) -> tuple[float, float]:
    """As :func:`of_pairs` for one matrix in Python's own numbers, which takes microseconds."""
    (one, upper), (lower, other) = gram
    if one <= 0 or other <= 0:
        return 1.0, 1.0
    product = math.sqrt(one) * math.sqrt(other)
    ratio, inverse, cosine = one / product, other / product, upper / product
    square = (ratio + cosine) + (lower / product + inverse)
    if not math.isfinite(square):
        return math.nan, math.nan
    return (
        gamma * formulas.of_two(ratio, inverse, cosine, square, FLOATS),
        gamma * formulas.of_two(inverse, ratio, cosine, square, FLOATS),
    )


def on_host(grams: Sequence[Tensor], formulas: Sequence[Formulas], gamma: float) -> list[Tensor]:
    """Coefficients of stacks of Gram matrices on one device, by a copy to the host and one back."""
    entries = torch.cat([gram.flatten() for gram in grams])
    # For meta tensors, which have no values, ones go the way that values would.
    known = torch.ones_like(entries, device="cpu") if entries.is_meta else entries.cpu()
    parts = known.double().split([gram.numel() for gram in grams])
    solved = [np.empty(0)]
    for gram, formula, part in zip(grams, formulas, parts, strict=True):
        solved += [of_one(one.numpy(), formula, gamma) for one in part.view(-1, *gram.shape[-2:])]
    found = torch.from_numpy(np.concatenate(solved)).to(grams[0].dtype)
    parts = found.to(grams[0].device, non_blocking=True).split([g[..., 0].numel() for g in grams])
    return [part.view(gram.shape[:-1]) for part, gram in zip(parts, grams, strict=True)]


def of_one(gram: Any, formulas: Formulas, gamma: float) -> Any:
    """Coefficients of one Gram matrix ``(m, m)`` of float64 numbers; of a pair as a tensor as well.

    A zero gradient is absent; the mean of the others' coefficients keeps ``BlockStats.scale``.
    """
    size = len(gram)
    if size == 2:
        return of_pair(gram.tolist(), formulas, gamma)
    squares = gram.diagonal()
    nonzero = ~(squares <= 0)  # NaN is not zero
    count = sum(nonzero.tolist())
    if count < 2:
        return np.ones(size)
    if not np.isfinite(gram).all():
        return np.full(size, np.nan)
    if count < size:
        found = np.array(of_one(gram[nonzero][:, nonzero], formulas, gamma))
        result = np.full(size, found.mean())
        result[nonzero] = found
        return result
    with np.errstate(all="ignore"):
        lengths = np.sqrt(squares)
        half = gram / 2
        # One division after the other: the product of two lengths could overflow or vanish.
        cosines = ((half + half.T) / lengths / lengths[:, None]).clip(-1, 1)
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
    """The factor ``(...)`` that a named rule applies: 1 where at most one gradient is not zero."""
    nonzero = ~(gram.diagonal(dim1=-2, dim2=-1) <= 0)  # NaN is not zero
    return torch.ones_like(gram[..., 0, 0]).masked_fill(nonzero.sum(-1) > 1, gamma)
