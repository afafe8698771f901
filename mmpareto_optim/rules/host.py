"""MMPareto of one Gram matrix in NumPy, for the CPU.

The rule takes about 150 operations on a few numbers, and each of PyTorch's takes microseconds to
begin: a good part of a small model's step. Of one matrix, where nothing waits for a value, most of
them are not needed. The formulas are those of :mod:`mmpareto_optim.rules.mmpareto` and
:mod:`mmpareto_optim.rules.solver`, where they are explained.
"""

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmpareto_optim.rules.mmpareto import LONGEST_STRETCH, coefficients_of_two
from mmpareto_optim.rules.solver import trips

Array = NDArray[np.float64]


def mmpareto_on_the_host(gram: Tensor, gamma: float, eps: float, written: float = 0.0) -> Tensor:
    """:func:`mmpareto_coefficients` of one float64 matrix ``(m, m)`` in the CPU's memory."""
    if len(gram) == 2:
        found: Sequence[float] = _of_two(gram.tolist(), gamma, 2 * eps + written)
    else:
        with np.errstate(all="ignore"):
            products = gram.numpy() / 2
            found = _of_many(products + products.T, gamma, eps, written)
    return torch.tensor(found, dtype=gram.dtype, device=gram.device)


def uniform_on_the_host(gram: Tensor, gamma: float) -> Tensor:
    """``gamma`` times :func:`uniform_coefficients` of one matrix: 1 where a gradient is alone."""
    present = sum(not square <= 0 for square in gram.diagonal().tolist())
    return torch.full_like(gram[0], gamma if present > 1 else 1.0)


def _of_two(products: list[list[float]], gamma: float, error: float) -> tuple[float, float]:
    """In Python's own numbers, which begin sooner than an array."""
    (first, upper), (lower, second) = products
    cross = upper / 2 + lower / 2
    if first <= 0 or second <= 0:
        return 1.0, 1.0
    if not (math.isfinite(first) and math.isfinite(second) and math.isfinite(cross)):
        return math.nan, math.nan
    if cross >= 0:
        return gamma, gamma
    one, other = coefficients_of_two(first, cross, second, error, sys.float_info.min, _Floats)
    return gamma * one, gamma * other


def _of_many(products: Array, gamma: float, eps: float, written: float) -> list[float]:
    size = len(products)
    present = ~(products.diagonal() <= 0)
    count = int(present.sum())
    if count < 2:
        return [1.0] * size
    if not np.isfinite(products).all():
        return [math.nan] * size
    if count < size:
        taken = products[np.ix_(present, present)]
        of_present = _of_many(taken, gamma, eps, written)
        others, mean = iter(of_present), sum(of_present) / count
        return [next(others) if there else mean for there in present.tolist()]
    if size == 2:
        return list(_of_two(products.tolist(), gamma, 2 * eps + written))
    if products.min() >= 0:
        return [gamma] * size
    return [gamma * float(c) for c in _common_of_many(products, size * eps + written)]


class _Floats:
    """What :func:`coefficients_of_two` asks of a library, for single numbers. NaN stays NaN."""

    sqrt = math.sqrt

    @staticmethod
    def clip(number: float, low: float, high: float) -> float:
        return min(max(number, low), high)

    @staticmethod
    def where(condition: bool, one: float, other: float) -> float:
        return one if condition else other


def _common_of_many(products: Array, error: float) -> Array:
    size, rounding = len(products), float(np.finfo(products.dtype).eps)
    lengths = np.sqrt(products.diagonal())
    bound = lengths[:, None] * lengths
    pessimistic = products - error * bound
    alpha = _min_norm_weights(pessimistic - 3 * size * rounding * bound, rounding)
    tolerance = rounding * lengths * (alpha @ lengths)
    if (pessimistic @ alpha < -size / 2 * tolerance).any():
        return np.zeros(size)
    length = size * math.sqrt(max(float(alpha @ products @ alpha), 0.0))
    sum_length = math.sqrt(max(float(products.sum()), 0.0))
    stretch = sum_length / length if length else 1.0
    if math.isnan(stretch):  # of products whose sum overflows
        stretch = 1.0
    return size * min(max(stretch, 1.0), LONGEST_STRETCH) * alpha


def _min_norm_weights(products: Array, rounding: float) -> Array:
    lengths = np.sqrt(np.maximum(products.diagonal(), 0))
    cosines = np.clip(products / lengths[:, None] / lengths, -1, 1)
    np.fill_diagonal(cosines, 1)
    inverse = lengths.min() / lengths
    weights = _nonnegative_minimum(cosines + inverse[:, None] * inverse, inverse, rounding)
    weights *= inverse
    weights /= weights.sum()
    return weights


def _nonnegative_minimum(matrix: Array, target: Array, rounding: float) -> Array:
    """The method of :func:`mmpareto_optim.rules.solver.nonnegative_minimum`, for one problem."""
    size = len(target)
    regular = matrix + 2 * size * rounding * np.eye(size)
    x = np.zeros(size)
    free = target > 0
    settled_on, alone = np.zeros(size, dtype=bool), False
    for _ in range(trips(size)):
        goal = np.zeros(size)
        goal[free] = _solution(regular[np.ix_(free, free)], target[free])
        blocking = free & ~(goal > 0)
        if blocking.any():
            room = np.where(x[blocking] > 0, x[blocking] / (x[blocking] - goal[blocking]), 0)
            step = room.min()
            x = x + step * (goal - x)
            free[np.flatnonzero(blocking)[room <= step]] = False
            x = np.where(free, np.maximum(x, 0), 0)
            continue
        x = goal
        gain = target - matrix @ x
        gaining = ~free & (gain > size * rounding * x.sum())
        in_vain = bool((free == settled_on).all())
        if not gaining.any() or (in_vain and alone):
            break
        settled_on, alone = free.copy(), in_vain
        free[np.where(gaining, gain, -np.inf).argmax() if in_vain else gaining] = True
    return x


def _solution(matrix: Array, target: Array) -> Array:
    try:
        found = np.linalg.solve(matrix, target)
    except np.linalg.LinAlgError:  # gradients that depend on each other to the last bit
        found = np.linalg.lstsq(matrix, target, rcond=None)[0]
    return np.where(np.isfinite(found), found, 0).astype(matrix.dtype, copy=False)
