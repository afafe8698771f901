"""Gradients that are hard on a solver, and exact arithmetic to judge what it finds."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

Array = npt.NDArray[np.float64]
EPS = 2.0**-52


def _cauchy(draw: np.random.Generator, m: int, n: int) -> Array:
    x, y = draw.uniform(0.1, 10, m), draw.uniform(0.1, 10, n)
    return np.asarray(1 / (x[:, None] * 10 ** draw.uniform(-1, 1) + y))


def _decays(draw: np.random.Generator, m: int, n: int) -> Array:
    return np.asarray(np.exp(-np.outer(draw.uniform(0.05, 5, m), draw.uniform(0, 5, n))))


def _hilbert(draw: np.random.Generator, m: int, n: int) -> Array:
    return np.asarray(1 / (np.arange(m)[:, None] + np.arange(n) + 1.0))


def _integers(draw: np.random.Generator, m: int, n: int) -> Array:
    return draw.integers(-2, 3, (m, 1 + n % 7)).astype(float)


def _gaussian(draw: np.random.Generator, m: int, n: int) -> Array:
    return np.asarray(draw.standard_normal((m, n)) * 10.0 ** draw.integers(-3, 4, (m, 1)))


FAMILIES: dict[str, Callable[[np.random.Generator, int, int], Array]] = {
    "cauchy": _cauchy,
    "decays": _decays,
    "hilbert": _hilbert,
    "integers": _integers,
    "gaussian": _gaussian,
}


def rows_of(family: str, m: int, seed: int) -> Array:
    """Rows of a family, none of them zero; smooth ones less a part of their means, of any sign."""
    draw = np.random.default_rng(seed)
    rows = FAMILIES[family](draw, m, int(draw.integers(max(m // 2, 2), 3 * m + 2)))
    if family in ("cauchy", "decays", "hilbert"):
        if draw.integers(2):
            rows = rows - draw.choice([1.0, draw.uniform(0.3, 1)]) * rows.mean(0)
        if draw.integers(3) == 0:
            rows = rows - rows.mean(1, keepdims=True)
        rows = rows * np.where(draw.random((m, 1)) < draw.choice([0.0, 0.1, 0.5]), -1, 1)
    if draw.integers(4) == 0:  # a duplicate, and an opposite
        rows[-1] = draw.choice([1, -1]) * rows[0]
    rows[~rows.any(1)] = 1.0
    return np.asarray(rows)


def cases(most: int = 40) -> st.SearchStrategy[tuple[str, int, int]]:
    """Arguments of :func:`rows_of`."""
    sizes = st.integers(3, 8) | st.sampled_from([12, 20, 30, 40])
    return st.tuples(
        st.sampled_from(sorted(FAMILIES)),
        sizes.filter(lambda m: m <= most),
        st.integers(0, 2**32),
    )


def gram_of(rows: Array) -> Array:
    gram = rows @ rows.T
    return np.asarray((gram + gram.T) / 2)


def products(matrix: Array, vector: Array) -> Array:
    """``matrix @ vector`` as rational arithmetic has it, rounded once."""
    exact = [Fraction(x) for x in vector.tolist()]
    return np.array(
        [
            float(sum(Fraction(a) * x for a, x in zip(row, exact, strict=True)))
            for row in matrix.tolist()
        ]
    )
