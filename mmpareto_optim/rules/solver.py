"""Two quadratic problems in non-negative numbers: the min-norm point, and cones.

Both are ``min x' A x / 2 - q' x`` subject to ``x >= 0``, for which :func:`nonnegative_minimum` is
the one solver.
"""

import torch
from torch import Tensor

from mmpareto_optim.rules.gram import (
    check_gram,
    is_present,
    rounding_of,
    squares_of,
    symmetric,
)


@torch.no_grad()
def min_norm_weights(gram: Tensor) -> Tensor:
    """Simplex weights of the shortest vector in the convex hull of the gradients.

    Solves ``min ||sum_i alpha_i g_i||`` subject to ``alpha_i >= 0`` and
    ``sum_i alpha_i = 1``. The minimiser ``p`` satisfies ``p . g_i >= ||p||^2``
    for every ``i``, so ``-p`` is a descent direction common to all objectives, and
    ``p = 0`` exactly at a Pareto-stationary point (Désidéri 2012; Sener & Koltun
    2018, Section 3.2). Two gradients have a closed form; more are solved by an
    active-set method that ends at the exact minimiser. No step waits for the device.

    The minimiser is exact for the matrix that is given. One in float32 has rounded the cosines by
    about 1e-7 already, which near-opposite gradients turn into 3e-4 of their length: the root.

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
    check_gram(gram)
    products = symmetric(gram)
    present = is_present(products)
    weights = weights_of_present(products, present, rounding_of(gram))
    # A zero gradient is itself the min-norm point.
    zeros = (~present).to(products.dtype)
    count = zeros.sum(-1, keepdim=True)
    weights = torch.where(count > 0, zeros / count, weights)
    finite = products.isfinite().flatten(-2).all(-1, keepdim=True)
    return torch.where(finite, weights, torch.nan).to(gram.dtype)


def weights_of_present(products: Tensor, present: Tensor, rounding: float) -> Tensor:
    """Min-norm weights of the gradients that are present; of less than two, anything.

    Args:
        products: symmetric Gram matrices in the solver's dtype, shape ``(..., m, m)``.
        present: which gradients to take, shape ``(..., m)``.
        rounding: relative error of the products.
    """
    if products.shape[-1] == 2:
        return _of_two(products)
    return _of_many(products, present, rounding)


def unit_products(products: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines between the gradients present, and their lengths.

    Returns:
        Cosines ``(..., m, m)``, 1 on the diagonal and 0 beside what is absent, and lengths
        ``(..., m)``, 1 for what is absent.
    """
    lengths = torch.where(present, squares_of(products).clamp(min=0), 1).sqrt()
    # One division after the other: the product of two lengths could overflow or vanish.
    cosines = (products / lengths.unsqueeze(-1) / lengths.unsqueeze(-2)).clamp(-1, 1)
    both = present.unsqueeze(-1) & present.unsqueeze(-2)
    identity = torch.eye(products.shape[-1], dtype=torch.bool, device=products.device)
    return torch.where(identity, 1, torch.where(both, cosines, 0)), lengths


def _of_two(products: Tensor) -> Tensor:
    """Closed form: the projection of the origin on a segment, clipped to its ends."""
    unit = squares_of(products).amax(-1, keepdim=True)
    scaled = products / torch.where(unit > 0, unit, 1).unsqueeze(-1)
    first, cross, second = scaled[..., 0, 0], scaled[..., 0, 1], scaled[..., 1, 1]
    # Each weight has its own numerator: 1 - alpha would lose a tiny alpha.
    numerators = torch.stack([second - cross, first - cross], dim=-1)
    squared_distance = numerators.sum(-1, keepdim=True)
    weights = (numerators / squared_distance).clamp(0, 1)
    return torch.where(squared_distance > 0, weights, 0.5)


def _of_many(products: Tensor, present: Tensor, rounding: float) -> Tensor:
    """The min-norm point as a problem without the equation ``sum_i alpha_i = 1``.

    With ``x_i`` proportional to ``alpha_i ||g_i||``, with the cosines C and with ``b_i``
    proportional to ``1 / ||g_i||``, the weights are those of the minimiser of
    ``x' C x + (b . x - 1)^2``, up to their sum: along a ray of fixed weights only the length of
    ``x`` is left to choose, and the best value grows with the norm of the point. The conditioning
    depends on the angles alone, not on the lengths.
    """
    cosines, lengths = unit_products(products, present)
    shortest = torch.where(present, lengths, torch.inf).amin(-1, keepdim=True)
    inverse = torch.where(present, shortest / lengths, 0)
    matrix = cosines + inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    weights = nonnegative_minimum(matrix, inverse, rounding) * inverse
    return weights / weights.sum(-1, keepdim=True)


def nonnegative_minimum(matrix: Tensor, target: Tensor, rounding: float) -> Tensor:
    """``argmin x' A x / 2 - q' x`` subject to ``x >= 0``: an active-set method for batches.

    After Lawson & Hanson (1974, Chapter 23), but all variables that lower the value enter
    together, and one at a time only after that was in vain. Each trip solves one system on the
    variables that are free and goes towards its solution as far as nothing turns negative. From a
    minimum on the free variables to the next the value falls, so none returns.

    Args:
        matrix: A, symmetric, positive semidefinite up to ``rounding``, with a diagonal of order 1,
            shape ``(..., m, m)``.
        target: q, shape ``(..., m)``; 0 for a variable that is to stay 0.
        rounding: relative error of the entries of ``matrix``.

    Returns:
        The minimiser, shape ``(..., m)``; one of them where there are several.
    """
    size = target.shape[-1]
    # Makes systems of linearly dependent gradients regular; a change within the rounding.
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    regular = matrix + 2 * size * rounding * identity
    x = torch.zeros_like(target)
    free = target > 0
    settled_on, alone = torch.zeros_like(free), torch.zeros_like(free[..., :1])
    # On the CPU the loop ends when all problems are solved; elsewhere to ask would be to wait for
    # the device, and the trips left over change nothing.
    for _ in range(trips(size)):
        goal = _minimiser_on(regular, target, free)
        blocking = free & ~(goal > 0)
        room = torch.where(blocking & (x > 0), x / (x - goal), torch.where(blocking, 0.0, 1.0))
        step = room.amin(-1, keepdim=True)
        dropped = blocking & (room <= step)
        settled = ~blocking.any(-1, keepdim=True)
        x = torch.where(settled, goal, x + step * (goal - x))
        x = torch.where(free & ~dropped, x, 0).clamp(min=0)

        gain = target - (matrix @ x.unsqueeze(-1)).squeeze(-1)
        noise = size * rounding * x.sum(-1, keepdim=True)
        gaining = ~free & (gain > noise)
        in_vain = settled & (free == settled_on).all(-1, keepdim=True)
        entering = torch.where(in_vain, gaining & _is_largest(gain, gaining), gaining)
        entering = entering & settled & ~(in_vain & alone)
        settled_on = torch.where(settled, free, settled_on)
        alone = torch.where(settled, in_vain, alone)
        free = torch.where(settled, free | entering, free & ~dropped)
        if matrix.device.type == "cpu" and bool((settled & ~entering.any(-1, keepdim=True)).all()):
            break
    return x


def trips(size: int) -> int:
    """How many systems are solved at most.

    About twice what the hardest of 500 000 random problems needed, degenerate ones among them.
    """
    return 2 * size + 4


def _minimiser_on(matrix: Tensor, target: Tensor, free: Tensor) -> Tensor:
    """Solve ``A x = q`` for the free variables, 0 for all others."""
    both = free.unsqueeze(-1) & free.unsqueeze(-2)
    identity = torch.eye(target.shape[-1], dtype=matrix.dtype, device=matrix.device)
    found: Tensor = torch.linalg.solve_ex(
        torch.where(both, matrix, identity), torch.where(free, target, 0)
    )[0]
    return found.nan_to_num(0.0, 0.0, 0.0)


def _is_largest(values: Tensor, among: Tensor) -> Tensor:
    """Mark the largest value among some, shape ``(..., m)``."""
    place = torch.where(among, values, -torch.inf).argmax(-1, keepdim=True)
    return torch.zeros_like(among).scatter(-1, place, True)
