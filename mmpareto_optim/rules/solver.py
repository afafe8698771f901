"""Quadratic problems in non-negative numbers: the one solver behind all rules."""

from collections.abc import Iterator

import numpy as np

from mmpareto_optim.rules.evaluation import Array

EPS = 2.0**-52
BLOCK_ITERATIONS = 6
LEMKE_ITERATIONS = 10  # times m: twice what the hardest known gradients take
MAX_ATTEMPTS = 40  # more than enough: at last, nothing but the diagonal counts


def nonnegative_minimum(matrix: Array, target: Array) -> Array:
    """The ``x >= 0`` with ``A x >= q`` and ``x' (A x - q) = 0``, shape ``(m,)``.

    For a matrix A that is symmetric, ``(m, m)``, with a diagonal of order 1, and a target q. Where
    A is positive semidefinite, a minimiser of ``x' A x / 2 - q' x`` subject to ``x >= 0``; where it
    is positive on ``x >= 0``, a point where the conditions for one hold. NaN if A or q is not
    finite.

    Exact for the matrix as it is given, up to rounding: the conditions hold to
    ``8 m eps (sum(x) + max(q))``, with ``eps = 2**-52``. Where rounding leads astray, as it does
    among gradients that depend on each other, the diagonal is made larger by ``4 m eps``, which the
    same bound allows for. Where that is not enough, it is made larger by what makes A positive,
    then by 4 times as much, and so on, and the conditions hold to twice what was added.
    """
    if max(target.tolist()) <= 0:
        return np.zeros(len(target))
    for x, tolerance in _attempts(matrix, target):
        if x is not None and _is_optimal(matrix, target, x, tolerance):
            return x
    return np.full(len(target), np.nan)


def _attempts(matrix: Array, target: Array) -> Iterator[tuple[Array | None, float]]:
    """What may be a solution, and how exact it has to be for the matrix as it is given."""
    small = 4 * len(target) * EPS
    yield _block_pivoting(matrix, target), 2 * small
    lowest = 0.0
    for _ in range(MAX_ATTEMPTS):
        regular = matrix + small * np.eye(len(target))
        yield _block_pivoting(regular, target), 2 * small
        yield _lemke(regular, target), 2 * small
        lowest = lowest or float(np.linalg.eigvalsh(matrix)[0])
        small = max(4 * small, -lowest)


def _is_optimal(matrix: Array, target: Array, x: Array, tolerance: float) -> bool:
    # Numbers of Python: for so few, each reduction in NumPy takes longer than all of this.
    values = x.tolist()
    allowed = tolerance * (sum(values) + max(target.tolist()))
    residuals = zip((matrix @ x - target).tolist(), values, strict=True)
    return all((abs(r) if value > 0 else -r) <= allowed for r, value in residuals)


def _solve(matrix: Array, right: Array, free: Array) -> Array | None:
    """Zero but on the free indices, where the equations hold; None if they are singular."""
    try:
        if all(free.tolist()):
            return np.linalg.solve(matrix, right)
        x = np.zeros_like(right)
        x[free] = np.linalg.solve(matrix[free][:, free], right[free])
        return x
    except np.linalg.LinAlgError:
        return None


def _block_pivoting(matrix: Array, target: Array) -> Array | None:
    """All indices that violate a condition change at once, which mostly ends soon, or in circles.

    Kostreva (1978); Portugal, Júdice & Vicente (1994).
    """
    free = target > 0
    for _ in range(BLOCK_ITERATIONS):
        x = _solve(matrix, target, free)
        if x is None:
            return None
        violated = np.where(free, x, matrix @ x - target) < 0
        if not any(violated.tolist()):
            return x
        free ^= violated
    return None


def _lemke(matrix: Array, target: Array) -> Array | None:
    """Lemke's method (1965; Cottle, Pang & Stone 1992, Algorithm 4.4.5), with a solve a step.

    Follows ``x(z) >= 0``, with ``w(z) = A x - q + z d >= 0`` and no ``i`` where both are positive,
    from a ``z`` so large that ``x = 0`` down to ``z = 0``, one index after the other becoming free
    (``w_i = 0``) or ceasing to be. No set comes twice, as long as no two indices change at the same
    ``z``, for which the entries of ``d`` have no common measure: the path ends at ``z = 0`` or, if
    ``A`` is not positive on ``x >= 0``, nowhere (None).
    """
    size = len(target)
    slope = 1 + np.modf(np.arange(size) * 0.6180339887498949)[0]
    free = np.zeros(size, dtype=bool)
    changed = int((target / slope).argmax())
    z = target[changed] / slope[changed]
    free[changed] = True
    right = np.stack([-target, slope], axis=1)
    for _ in range(LEMKE_ITERATIONS * size):
        solved = _solve(matrix, -right, free)
        if solved is None:
            return None
        # Both x on the free indices and w on the others, as value + z rate.
        value, rate = np.where(free[:, None], solved, right + matrix @ solved).T
        # What has just changed is zero, and has to grow.
        direction = -1.0 if rate[changed] < 0 else 1.0
        falling = direction * rate < 0
        falling[changed] = False
        steps = np.full(size, np.inf)
        steps[falling] = np.maximum(value + z * rate, 0)[falling] / np.abs(rate[falling])
        changed = int(steps.argmin())
        if direction < 0 and z <= steps[changed]:
            return np.where(free, np.maximum(value, 0), 0)
        if steps[changed] == np.inf:
            return None
        z += direction * steps[changed]
        free[changed] = not free[changed]
    return None
