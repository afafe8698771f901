"""Inner products of the gradients of a block."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpareto_optim.rules import solver_dtype

PIECE = 2**8
"""Products of float32 numbers that are added up in float32."""

ROUNDING = PIECE * 2.0**-24
"""Bound of the error of such sums, over the product of the norms, whatever the order of the
additions: one rounding for each (Higham 2002, Section 3.1). Measured: 1e-8."""

LONG = 2**15
"""Numbers of a row from which float32 pieces are faster than float64."""

CHUNK = 2**18
"""Numbers of all rows that are multiplied at a time on the CPU: what a core's cache holds."""

DEVICE_CHUNK = 2**24


def gram_matrix(spans: Sequence[Sequence[Tensor]]) -> tuple[Tensor, float]:
    """Inner products of some rows.

    In float64, which holds products of float32 numbers exactly, and which no setting of the
    float32 matmul precision touches. Long float32 rows on the CPU are multiplied in float32 pieces
    whose results are added up in float64, in a third of the time.

    Args:
        spans: pieces of the rows: for each span a tensor ``(n,)`` of each row.

    Returns:
        The matrix, shape ``(rows, rows)``, on the device of the first span, and a bound of the
        error of its entries over the product of the norms, beyond that of float64.
    """
    if _may_be_quick(spans):
        gram = _sum([_in_pieces(rows) for rows in spans])
        squares = gram.diagonal()
        if bool(((squares > 1e-20) & (squares < 1e30)).all()):
            return gram, ROUNDING
    return _sum([_exact(rows) for rows in spans]), 0.0


def _may_be_quick(spans: Sequence[Sequence[Tensor]]) -> bool:
    return (
        all(rows[0].device.type == "cpu" and rows[0].dtype == torch.float32 for rows in spans)
        and sum(rows[0].numel() for rows in spans) >= LONG
        and _multiplies_in_float32(len(spans[0]))
    )


def _multiplies_in_float32(rows: int) -> bool:
    """Whether nobody allowed matmuls of fewer bits: tried out, as there are many settings."""
    one = 1 + 2**-11  # 1 in TF32 and bfloat16
    row = torch.full((2**12,), one, dtype=torch.float32, device="cpu")
    return bool((_in_pieces([row] * rows) > len(row) * one).all())


def _in_pieces(rows: Sequence[Tensor]) -> Tensor:
    number, size = len(rows), rows[0].numel()
    total = torch.zeros(number, number, dtype=torch.float64, device="cpu")
    length = max(CHUNK // number // PIECE, 1) * PIECE
    whole = size - size % PIECE
    for start in range(0, whole, length):
        chunk = torch.stack([row[start : min(start + length, whole)] for row in rows])
        pieces = chunk.view(number, -1, PIECE).transpose(0, 1)
        total += torch.bmm(pieces, pieces.mT).sum(0, dtype=torch.float64)
    return total + _exact([row[whole:] for row in rows]) if whole < size else total


def _exact(rows: Sequence[Tensor]) -> Tensor:
    exact = solver_dtype(rows[0])
    length = max((CHUNK if rows[0].device.type == "cpu" else DEVICE_CHUNK) // len(rows), 1)
    if rows[0].numel() <= length:
        return _products(torch.stack(list(rows)).to(exact))
    return _sum(
        [
            _products(torch.stack(pieces).to(exact))
            for pieces in zip(*(row.split(length) for row in rows), strict=True)
        ]
    )


def _products(matrix: Tensor) -> Tensor:
    return matrix @ matrix.mT


def _sum(matrices: Sequence[Tensor]) -> Tensor:
    total = matrices[0]
    for other in matrices[1:]:
        total = total + other.to(total.device, non_blocking=True)
    return total
