"""``rescale="tensor"``: each parameter tensor is stretched by itself, as in the authors' code."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpareto_optim.rows import ONE, combine
from mmpareto_optim.rules.evaluation import solver_dtype


def combine_and_stretch(
    rows: Sequence[Tensor],
    coefficients: Sequence[float | Tensor],
    gamma: Tensor,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """``sum_i c_i row_i``, each tensor stretched to at least gamma times the norm of the sum.

    Args:
        rows: flat gradients of some parameters, one for each loss.
        coefficients: one for each row.
        gamma: factor on the norm of the plain sum, a scalar.
        sizes: how many numbers of a row belong to each parameter.

    Returns:
        The result, and the factor of each parameter, shape ``(parameters,)``.
    """
    result = combine(rows, coefficients)
    plain_sum = combine(rows, [ONE] * len(rows))
    stretch = gamma.to(result.device) * _norms(plain_sum, sizes) / _norms(result, sizes)
    stretch = stretch.to(result.dtype)  # in which it may be too large
    stretch = torch.where(stretch.isfinite() & (stretch > 1), stretch, 1.0)
    # repeat_interleave would want the sizes on the device: a copy that waits for it.
    pairs = zip(stretch.unbind(), sizes, strict=True)
    return result * torch.cat([factor.expand(size) for factor, size in pairs]), stretch


def _norms(row: Tensor, sizes: Sequence[int]) -> Tensor:
    """Norm of each parameter's part, in float64.

    Squares of float32 numbers overflow and vanish in float32. On the CPU, where float64 takes
    several times as long, it is used only if the norms in float32 are not all of a common size.
    """
    tensors, exact = row.split(list(sizes)), solver_dtype(row)
    if row.device.type == "cpu":
        norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])
        if bool(((norms > 1e-15) & (norms < 1e15)).all()):
            return norms.to(exact)
    return torch.stack([torch.linalg.vector_norm(tensor, dtype=exact) for tensor in tensors])
