"""The min-norm point of the convex hull of some gradients, from their Gram matrix."""

import torch
from torch import Tensor


@torch.no_grad()
def min_norm_weights(gram: Tensor) -> Tensor:
    """Simplex weights of the shortest vector in the convex hull of the gradients.

    Solves ``min ||sum_i alpha_i g_i||`` subject to ``alpha_i >= 0`` and
    ``sum_i alpha_i = 1``. The minimiser ``p`` satisfies ``p . g_i >= ||p||^2``
    for every ``i``, so ``-p`` is a descent direction common to all objectives, and
    ``p = 0`` exactly at a Pareto-stationary point (Désidéri 2012; Sener & Koltun
    2018, Section 3.2). Two gradients have a closed form; more are solved by an
    active-set method that ends at the exact minimiser. No step waits for the device.

    Args:
        gram: Gram matrices ``G_ij = g_i . g_j``, shape ``(..., m, m)``, any real
            floating dtype, any device. Batched over the leading dimensions.

    Returns:
        Weights of shape ``(..., m)`` on the Gram matrix's device and in its dtype.
        Where the minimiser is not unique (equal gradients, linearly dependent ones),
        one of the minimisers. NaN where the Gram matrix is not finite.

    Raises:
        ValueError: ``gram`` is not a stack of square matrices with ``m >= 1``.
        TypeError: ``gram`` is not a real floating-point tensor.
    """
    check_gram(gram)
    objectives = gram.shape[-1]
    if objectives == 1:
        return torch.ones_like(gram[..., 0])
    scaled = gram.to(solver_dtype(gram))
    lengths = scaled.diagonal(dim1=-2, dim2=-1)
    # The minimiser does not depend on the unit of length; dividing by the largest
    # squared length keeps sums and products below far from overflow.
    unit = lengths.amax(-1, keepdim=True)
    scaled = scaled / torch.where(unit == 0, 1, unit).unsqueeze(-1)
    weights = _of_two(scaled) if objectives == 2 else _of_many(scaled)
    finite = torch.isfinite(gram).flatten(-2).all(-1, keepdim=True)
    return torch.where(finite, weights, torch.nan).to(gram.dtype)


def check_gram(gram: Tensor) -> None:
    """Raise unless ``gram`` can be a stack of Gram matrices ``(..., m, m)``."""
    if not isinstance(gram, Tensor) or not gram.is_floating_point():
        found = gram.dtype if isinstance(gram, Tensor) else type(gram).__name__
        raise TypeError(f"gram must be a real floating-point tensor, got {found}")
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
        raise ValueError(f"gram must have shape (..., m, m) with m >= 1, got {tuple(gram.shape)}")


def solver_dtype(tensor: Tensor) -> torch.dtype:
    """float64, in which products of float32 numbers cannot overflow, where it exists."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _of_two(gram: Tensor) -> Tensor:
    """Closed form: the projection of the origin on a segment, clipped to its ends."""
    first, cross, second = gram[..., 0, 0], gram[..., 0, 1], gram[..., 1, 1]
    # Each weight has its own numerator: 1 - alpha would lose a tiny alpha.
    numerators = torch.stack([second - cross, first - cross], dim=-1)
    squared_distance = numerators.sum(-1, keepdim=True)
    weights = (numerators / squared_distance).clamp(0, 1)
    return torch.where(squared_distance > 0, weights, 0.5)


def _of_many(gram: Tensor) -> Tensor:
    """Active-set method of Wolfe (1976) on unit vectors, masked so that batches run together.

    With ``beta_i = alpha_i ||g_i||`` the problem is ``min beta' C beta`` subject to
    ``b . beta = 1``, ``beta >= 0``, where C holds the cosines and ``b_i`` is
    ``1 / ||g_i||``: its conditioning depends on the angles alone, not on the lengths.
    """
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    zero = lengths == 0
    inverse = torch.where(zero, 1, 1 / lengths)
    cosines = gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    bound = inverse / inverse.amax(-1, keepdim=True)

    shortest = _one_hot(bound.argmax(-1), bound)
    beta, support = shortest / bound, shortest > 0
    objectives = gram.shape[-1]
    rounding = 8 * objectives * torch.finfo(gram.dtype).eps
    # Every trip visits another face of the simplex or drops a vertex. On the CPU the
    # loop ends when all matrices are solved; elsewhere to ask would be to wait for the
    # device, and the trips left over change nothing.
    for _ in range(min(2**objectives, 10 * objectives)):
        target = _minimiser_on_face(cosines, bound, support)
        feasible = ((target >= 0) | ~support).all(-1, keepdim=True)
        blocking = support & (target < 0)
        room = torch.where(blocking, beta / (beta - target), 1.0)
        step = room.amin(-1, keepdim=True)
        dropped = blocking & (room <= step)
        beta = torch.where(feasible, target, beta + step * (target - beta))
        beta = torch.where(dropped, 0, beta).clamp(min=0)

        slopes = (cosines @ beta.unsqueeze(-1)).squeeze(-1)
        slack = slopes - (beta * slopes).sum(-1, keepdim=True) * bound
        entering = _one_hot(slack.argmin(-1), slack) > 0
        gains = slack.amin(-1, keepdim=True) < -rounding * beta.sum(-1, keepdim=True)
        support = torch.where(feasible, support | (entering & gains), support & ~dropped)
        if gram.device.type == "cpu" and not bool((gains | ~feasible).any()):
            break

    weights = beta * bound
    weights = weights / weights.sum(-1, keepdim=True)
    # A zero gradient is itself the min-norm point.
    any_zero = zero.any(-1, keepdim=True)
    return torch.where(any_zero, zero / zero.sum(-1, keepdim=True).clamp(min=1), weights)


def _minimiser_on_face(cosines: Tensor, bound: Tensor, support: Tensor) -> Tensor:
    """Minimise ``beta' C beta`` with ``b . beta = 1`` over the affine hull of a face.

    Solves the bordered system ``[[C, -b], [b', 0]] [beta, mu] = [0, 1]`` restricted to
    the support; it is regular wherever the face's gradients are affinely independent.
    """
    on_face = support.unsqueeze(-1) & support.unsqueeze(-2)
    identity = torch.eye(support.shape[-1], dtype=cosines.dtype, device=cosines.device)
    border = torch.where(support, bound, 0)
    top = torch.cat([torch.where(on_face, cosines, identity), -border.unsqueeze(-1)], dim=-1)
    corner = torch.zeros_like(border[..., :1])
    bottom = torch.cat([border, corner], dim=-1).unsqueeze(-2)
    right = torch.cat([torch.zeros_like(border), corner + 1], dim=-1)
    bordered = torch.cat([top, bottom], dim=-2)
    solution: Tensor = torch.linalg.solve_ex(bordered, right)[0]
    return solution[..., :-1]


def _one_hot(index: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).scatter(-1, index.unsqueeze(-1), 1)
