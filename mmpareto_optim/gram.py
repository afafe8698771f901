"""Inner products of the gradients of a block."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpareto_optim.rules.evaluation import solver_dtype

PIECE = 2**8
"""Products of float32 numbers that are added up in float32."""

ROUNDING = PIECE * 2.0**-24
"""Bound of the error of such sums, over the product of the norms, whatever the order of the
additions: one rounding for each (Higham 2002, Section 3.1). Measured: 1e-8."""

LONG = 2**15
"""Numbers of a row from which float32 pieces are faster than float64."""

CHUNK = 2**17
"""Numbers of a row that are multiplied at a time on the CPU: with others, in a core's cache."""

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
        gram = sum_of([_in_pieces(rows) for rows in spans])
        squares = gram.diagonal().tolist()
        if all(1e-20 < square < 1e30 or _is_zero(spans, i) for i, square in enumerate(squares)):
            return gram, ROUNDING
    return sum_of([_exact(rows) for rows in spans]), 0.0


def _is_zero(spans: Sequence[Sequence[Tensor]], row: int) -> bool:
    return not any(bool(rows[row].any()) for rows in spans)


def _may_be_quick(spans: Sequence[Sequence[Tensor]]) -> bool:
    return (
        sum(rows[0].numel() for rows in spans) >= LONG
        and all(rows[0].device.type == "cpu" and rows[0].dtype == torch.float32 for rows in spans)
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
    whole = size - size % PIECE
    length = CHUNK if number == 2 else CHUNK // 4
    for pieces in zip(*(row[:whole].split(length) for row in rows), strict=True):
        total += _products_of_two(*pieces) if number == 2 else _products_of_many(pieces)
    return total + _exact([row[whole:] for row in rows]) if whole < size else total


def _products_of_two(one: Tensor, other: Tensor) -> Tensor:
    """As :func:`_products_of_many`, without a copy of the rows."""
    one, other = one.view(-1, PIECE), other.view(-1, PIECE)
    cross = torch.linalg.vecdot(one, other)
    squares = torch.linalg.vecdot(one, one), torch.linalg.vecdot(other, other)
    products = torch.stack([squares[0], cross, cross, squares[1]])
    return products.sum(1, dtype=torch.float64).view(2, 2)


def _products_of_many(rows: Sequence[Tensor]) -> Tensor:
    pieces = torch.stack(list(rows)).view(len(rows), -1, PIECE).transpose(0, 1)
    return torch.bmm(pieces, pieces.mT).sum(0, dtype=torch.float64)


def _exact(rows: Sequence[Tensor]) -> Tensor:
    exact = solver_dtype(rows[0])
    length = CHUNK // 4 if rows[0].device.type == "cpu" else DEVICE_CHUNK // len(rows)
    if rows[0].numel() <= length:
        return _products(torch.stack(list(rows)).to(exact))
    return sum_of(
        [
            _products(torch.stack(pieces).to(exact))
            for pieces in zip(*(row.split(length) for row in rows), strict=True)
        ]
    )


def _products(matrix: Tensor) -> Tensor:
    return matrix @ matrix.mT


def sum_of(matrices: Sequence[Tensor]) -> Tensor:
    """The sum of some matrices, on the device of the first."""
    total = matrices[0]
    for other in matrices[1:]:
        total = total + other.to(total.device, non_blocking=True)
    return total
