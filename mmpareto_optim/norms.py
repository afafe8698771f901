"""Sizes of some tensors, in few operations."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmpareto_optim.rules.evaluation import solver_dtype


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norms, shape ``(tensors,)``, in float64.

    Squares of float32 numbers overflow and vanish in float32. On the CPU, where float64 takes
    several times as long, it is used only if the norms in float32 are not all of a common size.
    """
    exact = solver_dtype(tensors[0])
    if tensors[0].device.type == "cpu":
        norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])
        if bool(((norms > 1e-15) & (norms < 1e15)).all()):
            return norms.to(exact)
    return torch.stack([torch.linalg.vector_norm(tensor, dtype=exact) for tensor in tensors])


def largest_of(tensors: Sequence[Tensor]) -> Tensor:
    """The largest absolute value of each tensor, shape ``(tensors,)``; NaN for NaN."""
    device, exact = tensors[0].device, solver_dtype(tensors[0])
    nothing = torch.zeros((), dtype=exact, device=device)
    found = [
        torch.linalg.vector_norm(tensor, math.inf) if tensor.numel() else nothing
        for tensor in tensors
    ]
    return torch.stack([size.to(device, exact) for size in found])
