"""Quadratic problems in non-negative numbers: the one solver behind all rules."""

from collections.abc import Iterator

import numpy as np

from mmpareto_optim.rules.evaluation import Array

EPS = 2.0**-52
BLOCK_ITERATIONS = 6
MAX_ATTEMPTS = 40


def max_iterations(size: int) -> int:
    """How often Lemke's method may go on: twice what the hardest known gradients take."""
    return 10 * size


def nonnegative_minimum(matrix: Array, target: Array) -> Array:
    """The ``x >= 0`` with ``A x >= q`` and ``x' (A x - q) = 0``.

    For a positive semidefinite ``A`` that is the minimiser of ``x' A x / 2 - q' x`` subject to
    ``x >= 0``, one of them where there are several. For another matrix that is positive on
    ``x >= 0`` it is a point where the conditions for a minimum hold.

    Exact for the matrix as it is given, up to rounding: the conditions hold to
    ``8 m eps (sum(x) + max(q))``, with ``eps = 2**-52``. Where rounding leads astray, as it does
    among gradients that depend on each other, the diagonal is made larger by ``4 m eps``, which the
    same bound allows for. Where that is not enough, or the matrix is not positive on ``x >= 0``
    because its entries are rounded, it is made larger by what makes it positive, then by 4 times
    as much, and so on, and the conditions hold to twice what was added.

    Args:
        matrix: A, symmetric, with a diagonal of order 1, shape ``(m, m)``.
        target: q, shape ``(m,)``.

    Returns:
        x, shape ``(m,)``; NaN if the matrix or the target is not finite.
    """
    if target.max() <= 0:
        return np.zeros(len(target))
    for x, tolerance in _attempts(matrix, target):
        if x is not None and _is_optimal(matrix, target, x, tolerance):
            return x
    return np.full(len(target), np.nan)


def _attempts(matrix: Array, target: Array) -> Iterator[tuple[Array | None, float]]:
    """What may be a solution, and how exact it has to be for the matrix as it is given."""
    identity, small = np.eye(len(target)), 4 * len(target) * EPS
    yield _block_pivoting(matrix, target), 2 * small
    lowest = 0.0
    for _ in range(MAX_ATTEMPTS):  # more than enough: at last, nothing but the diagonal counts
        regular = matrix + small * identity
        yield _block_pivoting(regular, target), 2 * small
        yield _lemke(regular, target), 2 * small
        lowest = lowest or float(np.linalg.eigvalsh(matrix)[0])
        small = max(4 * small, -lowest)


def _is_optimal(matrix: Array, target: Array, x: Array, tolerance: float) -> bool:
    residual = matrix @ x - target
    violation = max(-residual.min(), np.abs(residual[x > 0]).max(initial=0))
    return bool(violation <= tolerance * (x.sum() + target.max()))


def _block_pivoting(matrix: Array, target: Array) -> Array | None:
    """All indices that violate a condition change at once, which mostly ends after a few times.

    Kostreva (1978); Portugal, Júdice & Vicente (1994). It may also go round in circles.
    """
    free = target > 0
    for _ in range(BLOCK_ITERATIONS):
        x = np.zeros(len(target))
        indices = np.flatnonzero(free)
        try:
            x[indices] = np.linalg.solve(matrix[np.ix_(indices, indices)], target[indices])
        except np.linalg.LinAlgError:
            return None
        violated = np.where(free, x < 0, matrix @ x < target)
        if not violated.any():
            return x
        free ^= violated
    return None


def _lemke(matrix: Array, target: Array) -> Array | None:
    """Lemke's method (1965; Cottle, Pang & Stone 1992, Algorithm 4.4.5), with a solve a step.

    Follows ``x(z) >= 0``, with ``w(z) = A x - q + z d >= 0`` and no ``i`` where both are positive,
    from a ``z`` so large that ``x = 0`` down to ``z = 0``. On the way one index after the other
    becomes free (``w_i`` is zero and ``x_i`` may be positive) or ceases to be. No set of free
    indices comes twice, as long as no two of them change at the same ``z``, for which the entries
    of ``d`` have no common measure. So the path ends: at ``z = 0`` or, if ``A`` is not
    positive on ``x >= 0``, nowhere.

    Returns:
        ``x(0)``, shape ``(m,)``; None if the path does not come to ``z = 0``.
    """
    size = len(target)
    slope = 1 + np.modf(np.arange(size) * 0.6180339887498949)[0]
    free = np.zeros(size, dtype=bool)
    changed = int((target / slope).argmax())
    z = target[changed] / slope[changed]
    free[changed] = True
    right = np.stack([-target, slope], axis=1)
    for _ in range(max_iterations(size)):
        indices = np.flatnonzero(free)
        # Both x on the free indices and w on the others, as value + z rate.
        try:
            solved = np.linalg.solve(matrix[np.ix_(indices, indices)], -right[indices])
        except np.linalg.LinAlgError:
            return None
        found = right + matrix[:, indices] @ solved
        found[indices] = solved
        value, rate = found.T
        # What has just changed is zero, and has to grow.
        direction = -1.0 if rate[changed] < 0 else 1.0
        falling = direction * rate < 0
        falling[changed] = False
        steps = np.full(size, np.inf)
        steps[falling] = np.maximum(value + z * rate, 0)[falling] / np.abs(rate[falling])
        blocking = int(steps.argmin())
        if direction < 0 and z <= steps[blocking]:
            return np.where(free, np.maximum(value, 0), 0)
        if steps[blocking] == np.inf:
            return None
        z += direction * steps[blocking]
        free[blocking] = not free[blocking]
        changed = blocking
    return None
