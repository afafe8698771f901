"""Sums of rows with coefficients."""

from collections.abc import Sequence

import torch
from torch import Tensor


def combine_rows(
    rows: Sequence[Tensor], coefficients: Tensor, *, into: Tensor | None = None
) -> Tensor:
    """``sum_i c_i row_i``: a new tensor, or ``into``.

    Elementwise and not by a matmul, which may run in TF32.
    """
    if rows[0].device.type == coefficients.device.type == "cpu":
        return _combine_by_numbers(rows, coefficients.tolist(), into)
    return _combine_by_tensors(rows, coefficients, into)


def _combine_by_numbers(
    rows: Sequence[Tensor], coefficients: Sequence[float], into: Tensor | None
) -> Tensor:
    """Only where nothing waits for the numbers; an operation begins sooner with them."""
    total = torch.mul(rows[0], coefficients[0], out=into)
    for row, coefficient in zip(rows[1:], coefficients[1:], strict=True):
        total.add_(row, alpha=coefficient)
    return total


def _combine_by_tensors(
    rows: Sequence[Tensor], coefficients: Tensor, into: Tensor | None
) -> Tensor:
    factors = coefficients.to(rows[0].device, rows[0].dtype, non_blocking=True).unbind()
    total = torch.mul(rows[0], factors[0], out=into)
    for row, factor in zip(rows[1:], factors[1:], strict=True):
        total.addcmul_(row, factor)
    return total
