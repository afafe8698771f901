"""Quadratic problems in non-negative numbers: the one solver behind all rules."""

import numpy as np

from mmpareto_optim.rules.evaluation import Array

EPS = 2.0**-52


def nonnegative_minimum(matrix: Array, target: Array) -> Array:
    """The ``x >= 0`` with ``A x >= q`` and ``x' (A x - q) = 0``, shape ``(m,)``.

    For a symmetric A with a diagonal of order 1 and a target q. A minimiser of
    ``x' A x / 2 - q' x`` on ``x >= 0`` where A is positive semidefinite; where it is positive on
    ``x >= 0``, a point where the conditions for one hold. NaN if A or q is not finite.

    The conditions hold for the matrix as it is given to ``8 m eps (sum(x) + max(q))``, with ``eps =
    2**-52``. Where rounding leads astray, as it does among gradients that depend on each other, the
    diagonal is made larger by ``4 m eps``, which the bound allows for. Where that is not enough, by
    what makes A positive, then by 4 times as much and so on: they hold to twice what was added.
    """
    if max(target.tolist()) <= 0:
        return np.zeros(len(target))
    small, lowest, regular = 4 * len(target) * EPS, 0.0, matrix
    for attempt in range(40):  # more than enough: at last, nothing but the diagonal counts
        for method in (_block_pivoting, _lemke):
            x = method(regular, target)
            if _is_optimal(matrix, target, x, 2 * small):
                return x
        if attempt:
            lowest = lowest or float(np.linalg.eigvalsh(matrix)[0])
            small = max(4 * small, -lowest)
        regular = matrix + small * np.eye(len(target))
    return np.full(len(target), np.nan)


def _is_optimal(matrix: Array, target: Array, x: Array, tolerance: float) -> bool:
    values = x.tolist()  # for so few numbers, each reduction in NumPy takes longer than all of this
    allowed = tolerance * (sum(values) + max(target.tolist()))
    residuals = zip((matrix @ x - target).tolist(), values, strict=True)
    return all(v >= 0 and (abs(r) if v > 0 else -r) <= allowed for r, v in residuals)


def _solve(matrix: Array, right: Array, free: Array) -> Array:
    """Zero but on the free indices, where the equations hold; NaN if they are singular."""
    try:
        if all(free.tolist()):
            return np.linalg.solve(matrix, right)
        x = np.zeros_like(right)
        x[free] = np.linalg.solve(matrix[free][:, free], right[free])
        return x
    except np.linalg.LinAlgError:
        return np.full_like(right, np.nan)


def _block_pivoting(matrix: Array, target: Array) -> Array:
    """All that violates a condition changes at once (Kostreva 1978), which mostly ends soon."""
    free = target > 0
    for _ in range(6):  # it may also go round in circles
        x = _solve(matrix, target, free)
        violated = np.where(free, x, matrix @ x - target) < 0
        if not any(violated.tolist()):
            break
        free ^= violated
    return x


def _lemke(matrix: Array, target: Array) -> Array:
    """Lemke's method (1965; Cottle, Pang & Stone 1992, Algorithm 4.4.5), with a solve a step.

    Follows ``x(z) >= 0``, with ``w(z) = A x - q + z d >= 0`` and no ``i`` where both are positive,
    from a ``z`` so large that ``x = 0`` down to ``z = 0``, one index after the other becoming free
    (``w_i = 0``) or not. No set comes twice as long as no two change at one ``z``, for which the
    entries of ``d`` have no common measure: the path ends, at what solves if A is positive.
    """
    size, free = len(target), np.zeros(len(target), dtype=bool)
    slope = 1 + np.modf(np.arange(size) * 0.6180339887498949)[0]
    changed = int((target / slope).argmax())
    z = target[changed] / slope[changed]
    right = np.stack([-target, slope], axis=1)
    for _ in range(10 * size):  # twice what the hardest known gradients take
        free[changed] = not free[changed]
        solved = _solve(matrix, -right, free)
        # Both x on the free indices and w on the others, as value + z rate.
        value, rate = np.where(free[:, None], solved, right + matrix @ solved).T
        # What has just changed is zero, and has to grow.
        direction = -1.0 if rate[changed] < 0 else 1.0
        falling = direction * rate < 0
        falling[changed] = False
        steps = np.full(size, np.inf)
        steps[falling] = np.maximum(value + z * rate, 0)[falling] / np.abs(rate[falling])
        changed = int(steps.argmin())
        if steps[changed] == np.inf or (direction < 0 and z <= steps[changed]):
            break
        z += direction * steps[changed]
    return np.where(free, np.maximum(value, 0), 0)
