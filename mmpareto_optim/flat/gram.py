"""Inner products of long rows."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mmpareto_optim.flat.buckets import Bucket, bucket_size
from mmpareto_optim.rules.gram import solver_dtype

QUICK_CHUNK = 2**17
"""Elements that are added up in float32: fewer calls the more, and the larger the error."""


def gram_of(rows: Sequence[Tensor]) -> Tensor:
    """Inner products of some rows on one device, in float64."""
    chunk, exact = bucket_size(rows[0].device), solver_dtype(rows[0])
    if rows[0].numel() <= chunk:
        return _inner_products([row.to(exact) for row in rows])
    parts = [
        _inner_products([piece.to(exact) for piece in pieces])
        for pieces in zip(*(row.split(chunk) for row in rows), strict=True)
    ]
    return torch.stack(parts).sum(0)


def may_be_quick(buckets: Sequence[Bucket], rows: int) -> bool:
    """Whether :func:`quick_gram` is worth a try."""
    # Elsewhere than on the CPU to look at a product would be to wait for the device.
    return (
        rows == 2
        and all(b.device.type == "cpu" and b.dtype == torch.float32 for b in buckets)
        and sum(bucket.size for bucket in buckets) > QUICK_CHUNK
    )


def quick_gram(pairs: Iterable[Sequence[Tensor]]) -> Tensor | None:
    """The Gram matrix of two rows by float32 products; None if that leaves a doubt.

    Args:
        pairs: the two rows, a bucket at a time.
    """
    first = cross = second = 0.0
    for rows in pairs:
        for one, other in zip(*(row.split(QUICK_CHUNK) for row in rows), strict=True):
            first += float(torch.dot(one, one))
            cross += float(torch.dot(one, other))
            second += float(torch.dot(other, other))
    if not _is_beyond_doubt(first, cross, second):
        return None
    return torch.tensor([[first, cross], [cross, second]], dtype=torch.float64, device="cpu")


def _is_beyond_doubt(first: float, cross: float, second: float) -> bool:
    """Whether float32 products of two rows lead where float64 ones would.

    Their error, over the product of the rows' norms, stays below ``2**-24 * QUICK_CHUNK /
    lanes``: 5e-4 for 16 numbers added side by side, the fewest of a vectorised loop, and
    usually a thousandth of that. In doubt are the sign of a tiny cosine; what overflows or
    underflows; and, in conflict, the common direction where it is narrow. Along it each row
    has the product ``|h|**2``, at least ``(1 - cos**2) / 4`` of the shorter row's square. The
    error of the longer row's is at most 3 x 5e-4 of the product of their norms: less than
    half of that, as long as the norms are within a ratio of 15 and the cosine above -0.9.
    """
    shorter, longer = sorted((first, second))
    if not (shorter > 1e-20 and longer < 1e30):
        return False
    cosine = cross / math.sqrt(first * second)
    return cosine > 1e-3 or (-0.9 < cosine < -1e-3 and shorter > longer / 15**2)


def _inner_products(rows: list[Tensor]) -> Tensor:
    if len(rows) == 2:  # three dot products take two thirds of the time of a matmul this flat
        first, second = rows
        cross = torch.dot(first, second)
        entries = [torch.dot(first, first), cross, cross, torch.dot(second, second)]
        return torch.stack(entries).view(2, 2)
    matrix = torch.stack(rows)
    return matrix @ matrix.T
