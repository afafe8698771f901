"""Float32 products of long rows on the CPU, a strip at a time that stays in a core's cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

STRIP = 2**18
"""Elements of all rows together that are multiplied at a time."""
SUMMED = 2**9
"""Products that one matmul adds up."""
TILE = 10
"""Rows of a matmul. From 16 on, MKL takes twice as long for each product of rows this long."""


def error_of_float32() -> float:
    """Bound of the error of a float32 product, over the product of the rows' norms.

    Whatever the order of the additions: one rounding for each (Higham 2002, Section 3.1).
    The sums of a strip are added up in float32, too, at most these for three rows.
    """
    return (SUMMED + STRIP // SUMMED // 3 + 2) * 2.0**-24


def products_by_strips(rows: Sequence[Tensor]) -> Tensor:
    """Inner products of some rows, multiplied in float32 and added up in float64.

    Each row is read once, from wherever it lies.

    Returns:
        Shape ``(rows, rows)``, in float64.
    """
    number, size = len(rows), rows[0].numel()
    length = SUMMED * min(STRIP // (SUMMED * number) + 1, size // SUMMED + 1)
    strip = torch.empty(number, length, dtype=torch.float32, device="cpu")
    parts = strip.view(number, -1, SUMMED).transpose(0, 1).split(TILE, dim=1)
    pairs = [(i, j) for i in range(len(parts)) for j in range(i, len(parts))]
    tiles = [(parts[i], parts[j].mT) for i, j in pairs]
    sums = [
        torch.zeros(a.shape[1], b.shape[2], dtype=torch.float64, device="cpu") for a, b in tiles
    ]
    for pieces in zip(*(row.split(length) for row in rows), strict=True):
        filled = pieces[0].numel()
        torch.stack(pieces, out=strip[:, :filled])
        if filled < length:
            strip[:, filled:].zero_()
        for total, (a, b) in zip(sums, tiles, strict=True):
            total += torch.bmm(a, b).sum(0)
    return _both_triangles(dict(zip(pairs, sums, strict=True)), len(parts))


def _both_triangles(tiles: dict[tuple[int, int], Tensor], size: int) -> Tensor:
    """A symmetric matrix of the tiles on and above the diagonal, by row and column."""
    return torch.cat(
        [
            torch.cat([tiles[i, j] if i <= j else tiles[j, i].T for j in range(size)], dim=1)
            for i in range(size)
        ]
    )
