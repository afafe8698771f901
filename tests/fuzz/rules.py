"""The integration rules of the fuzzer's reference, in numpy and by brute force."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]

# How far the Gram matrix of a float computation may be from the exact one, in units of its eps:
# float32 gradients may be multiplied in float32, 256 numbers at a time.
ROUNDING = 128.0
# Relative errors that still count as rounding.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 2.0**-5}


@dataclass(frozen=True)
class Settings:
    """The rule, its factor (None: its default) and whether tensors are stretched one by one."""

    rule: str | Callable[[Tensor], Tensor]
    gamma: float | None = None
    tensorwise: bool = False

    @property
    def factor(self) -> float:
        """The factor as a number."""
        return self.gamma if self.gamma is not None else 1.5 if self.rule == "mmpareto" else 1.0


def min_norm(gram: Array) -> Array:
    """Weights (m,) of the point of least norm in the convex hull: the best over all its faces.

    On each face the conditions of Lagrange are solved for gradients scaled to unit length.
    """
    size = np.sqrt(np.diag(gram))
    cosines, inverse = gram / np.outer(size, size), size.min() / size
    best: Array = np.eye(len(gram))[size.argmin()]
    least = float(gram.diagonal().min())
    for count in range(2, len(gram) + 1):
        for face in combinations(range(len(gram)), count):
            at = list(face)
            system = np.zeros((count + 1, count + 1))
            system[:count, :count] = cosines[np.ix_(at, at)]
            system[:count, count] = system[count, :count] = inverse[at]
            solved = np.linalg.lstsq(system, np.eye(count + 1)[count], rcond=None)[0]
            weights = np.zeros(len(gram))
            weights[at] = solved[:count] * inverse[at]
            if weights.min() < 0 or weights.sum() <= 0:
                continue
            weights /= weights.sum()
            if weights @ gram @ weights < least:
                best, least = weights, float(weights @ gram @ weights)
    return best


def coefficients(gram: Array, settings: Settings) -> Array:
    """Coefficients (m,) for gradients none of which is zero, tensorwise stretching left aside."""
    m, gamma = len(gram), settings.factor
    if callable(settings.rule):
        return np.asarray(settings.rule(torch.from_numpy(gram)).numpy(), dtype=np.float64)
    if settings.rule == "uniform":
        return np.full(m, gamma)
    if settings.rule == "pareto":
        return gamma * m * min_norm(gram)
    if not _conflict(gram, settings.tensorwise):
        return np.full(m, gamma)
    direction = m * min_norm(gram)
    if settings.tensorwise:
        return gamma * direction
    length, total = _norm(direction, gram), _norm(np.ones(m), gram)
    return gamma * direction * (max(length, total) / length if length > 0 else 0.0)


def combine(
    rows: Sequence[Sequence[Array]],
    sizes: Sequence[Sequence[float]],
    shapes: Sequence[Array],
    settings: Settings,
    dtypes: Sequence[torch.dtype],
) -> list[tuple[Array, float, str]]:
    """One block: for each of its tensors the combined gradient, its scale, and why to doubt it.

    Args:
        rows: For each loss its gradient on each tensor of the block.
        sizes: Norms of what was summed up to each of these gradients.
        shapes: A zero for each tensor.
        settings: The rule.
        dtypes: The dtype of each tensor.
    """
    flat = np.array([np.concatenate([part.ravel() for part in row]) for row in rows])
    if not rows or (len(rows) > 1 and not callable(settings.rule)):
        keep = [i for i, row in enumerate(flat) if row.any()]
    else:
        keep = list(range(len(rows)))
    rows, sizes = [rows[i] for i in keep], [sizes[i] for i in keep]
    scales = [max((row[t] for row in sizes), default=0.0) for t in range(len(shapes))]
    if not keep:
        return [(zero, 0.0, "") for zero in shapes]
    if len(keep) == 1:
        return [(part, scale, "") for part, scale in zip(rows[0], scales, strict=True)]
    flat = flat[keep]
    if not np.isfinite(flat).all():
        sums = [np.asarray(sum(row[t] for row in rows)) for t in range(len(shapes))]
        return [(total, 0.0, "not finite") for total in sums]
    return _combine_finite(rows, sizes, flat, settings, dtypes)


def _combine_finite(
    rows: Sequence[Sequence[Array]],
    sizes: Sequence[Sequence[float]],
    flat: Array,
    settings: Settings,
    dtypes: Sequence[torch.dtype],
) -> list[tuple[Array, float, str]]:
    gram = flat @ flat.T
    gram = (gram + gram.T) / 2
    weights = coefficients(gram, settings)
    values = _weighted(rows, weights, gram, settings)
    others = [
        _weighted(rows, coefficients(near, settings), near, settings)
        for near in _neighbours(flat, gram, dtypes)
    ]
    doubt = _vanishing(gram, settings, dtypes)
    near = _kept_clear(gram, dtypes)
    clear = _weighted(rows, coefficients(near, settings), near, settings)
    combined = []
    for t, value in enumerate(values):
        terms = [abs(weights[i]) * sizes[i][t] for i in range(len(rows))]
        scale = max(*terms, float(np.linalg.norm(value)))
        if len(set(weights.tolist())) > 1:
            # In conflict the direction keeps clear of the rounding of the coarsest dtype written.
            scale *= max(TOLERANCE[d] for d in dtypes) / TOLERANCE[dtypes[t]]
            room = float(np.linalg.norm(clear[t] - value))
            scale = max(scale, 2 * room / TOLERANCE[dtypes[t]])
        moved = max(float(np.linalg.norm(other[t] - value)) for other in others)
        edge = "" if moved <= TOLERANCE[dtypes[t]] * scale / 4 else "at a jump of the rule"
        combined.append((value, scale, doubt or edge))
    return combined


def _kept_clear(gram: Array, dtypes: Sequence[torch.dtype]) -> Array:
    """The Gram matrix with each cosine less what rounding may make of it.

    The library's direction has its products with the gradients to spare, so that they do not turn
    negative there.
    """
    rounding = 2.0**-8 if torch.bfloat16 in dtypes else ROUNDING * _epsilon(dtypes)
    size = np.sqrt(np.diag(gram))
    return gram - rounding * np.outer(size, size)


def _weighted(
    rows: Sequence[Sequence[Array]], weights: Array, gram: Array, settings: Settings
) -> list[Array]:
    found = []
    stretch = settings.tensorwise and settings.rule == "mmpareto" and _conflict(gram, True)
    for t in range(len(rows[0])):
        value = np.asarray(sum(c * row[t] for c, row in zip(weights, rows, strict=True)))
        if stretch:
            least = settings.factor * float(np.linalg.norm(sum(row[t] for row in rows)))
            length = float(np.linalg.norm(value))
            value = np.asarray(value * (max(length, least) / length if length > 0 else 0.0))
        found.append(value)
    return found


def _conflict(gram: Array, with_zero: bool) -> bool:
    products = gram[~np.eye(len(gram), dtype=bool)]
    return bool((products <= 0).any() if with_zero else (products < 0).any())


def _neighbours(flat: Array, gram: Array, dtypes: Sequence[torch.dtype]) -> list[Array]:
    """Gram matrices as near to this one as rounding may bring them.

    Products of gradients that never meet in one entry stay zero: they are zero in any arithmetic.
    """
    draw = np.random.default_rng(0)
    size = np.sqrt(np.diag(gram))
    meet = (np.abs(flat) > 0).astype(float)
    bound = ROUNDING * _epsilon(dtypes) * np.outer(size, size) * (meet @ meet.T > 0)
    found = []
    for _ in range(4):
        signs = np.triu(draw.choice([-1.0, 1.0], gram.shape))
        found.append(gram + bound * (signs + signs.T - np.diag(np.diag(signs))))
    return found


def _vanishing(gram: Array, settings: Settings, dtypes: Sequence[torch.dtype]) -> str:
    """Near opposite gradients, and gradients so small that their products underflow."""
    size = np.sqrt(np.diag(gram))
    if _epsilon(dtypes) > 1e-10 and (size[size > 0] < 1e-15).any():
        return "underflow"
    if settings.rule not in ("mmpareto", "pareto"):
        return ""
    weights = min_norm(gram)
    rough = torch.bfloat16 in dtypes
    limit = 3.0 * np.sqrt(len(gram) * (2.0**-8 if rough else _epsilon(dtypes)))
    near = _norm(weights, gram) <= limit * size[weights > 0].min()
    return "nearly opposite" if near and (gram < 0).any() else ""


def _epsilon(dtypes: Sequence[torch.dtype]) -> float:
    exact = all(dtype == torch.float64 for dtype in dtypes)
    return float(torch.finfo(torch.float64 if exact else torch.float32).eps)


def _norm(weights: Array, gram: Array) -> float:
    return math.sqrt(max(float(weights @ gram @ weights), 0.0))
