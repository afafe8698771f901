"""What a Gram matrix has to be, and what follows from it whatever the rule."""

import math
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
