"""What every rule does with a Gram matrix before and after its own mathematics."""

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor


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


def rounding_of(gram: Tensor) -> float:
    """Relative rounding error of a Gram matrix's entries, at least that of the solver."""
    return max(torch.finfo(gram.dtype).eps, torch.finfo(solver_dtype(gram)).eps)


def symmetric(gram: Tensor) -> Tensor:
    """The symmetric part, in the solver's dtype: a matmul rounds both triangles on its own."""
    halves = gram.to(solver_dtype(gram)) / 2
    return halves + halves.mT


def squares_of(gram: Tensor) -> Tensor:
    """Squared lengths of the gradients, shape ``(..., m)``."""
    return gram.diagonal(dim1=-2, dim2=-1)


def is_present(gram: Tensor) -> Tensor:
    """Which gradients are not zero, shape ``(..., m)``; NaN is not zero."""
    return ~(squares_of(gram) <= 0)


def applied_gamma(gram: Tensor, gamma: float) -> Tensor:
    """The factor that a named rule applies: 1 where at most one gradient is not zero.

    Args:
        gram: Gram matrices, shape ``(..., m, m)``.
        gamma: the factor on the result of two or more gradients.

    Returns:
        Shape ``(...)``, on the Gram matrix's device and in its dtype.
    """
    several = is_present(gram).sum(-1) > 1
    return torch.ones_like(gram[..., 0, 0]).masked_fill(several, gamma)


@torch.no_grad()
def of_present(rule: Callable[[Tensor, Tensor], Tensor], gram: Tensor, gamma: float) -> Tensor:
    """Coefficients by ``rule`` of the gradients that are not zero, as if the others were not there.

    A zero gradient takes the mean of the other gradients' coefficients: it changes neither the
    combination nor the mean of the coefficients, which :class:`BlockStats` reads.

    Args:
        rule: from symmetric Gram matrices ``(..., m, m)`` in the solver's dtype, with zeros in
            the rows and columns of zero gradients, and from which gradients are present
            ``(..., m)``, to coefficients ``(..., m)``. Those of zero gradients are ignored.
        gram: Gram matrices as they come, shape ``(..., m, m)``.
        gamma: factor on the result.

    Returns:
        Coefficients ``(..., m)`` on the Gram matrix's device and in its dtype: 1 where at most one
        gradient is not zero, NaN where the Gram matrix is not finite.

    Raises:
        ValueError, TypeError: ``gram`` is not a stack of square, real matrices.
    """
    check_gram(gram)
    products = symmetric(gram)
    present = is_present(products)
    both = present.unsqueeze(-1) & present.unsqueeze(-2)
    found = torch.where(present, rule(torch.where(both, products, 0), present), 0)
    count = present.to(products.dtype).sum(-1, keepdim=True)
    coefficients = gamma * torch.where(present, found, found.sum(-1, keepdim=True) / count)
    finite = products.isfinite().flatten(-2).all(-1, keepdim=True)
    coefficients = torch.where(finite, coefficients, torch.nan)
    return torch.where(count > 1, coefficients, 1).to(gram.dtype)
