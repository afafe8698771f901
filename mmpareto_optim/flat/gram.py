"""Inner products of long rows."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mmpareto_optim.flat.buckets import Bucket, bucket_size
from mmpareto_optim.flat.strips import error_of_float32, products_by_strips
from mmpareto_optim.rules.gram import solver_dtype

QUICK_CHUNK = 2**17
"""Elements that are added up in float32: fewer calls the more, and the larger the error."""

Flats = Callable[[], Iterable[Sequence[Tensor]]]
"""The rows of a block, a bucket at a time."""


def gram_of(rows: Sequence[Tensor]) -> Tensor:
    """Inner products of some rows on one device, in float64."""
    exact = solver_dtype(rows[0])
    chunk = _chunk(rows[0].device, len(rows))
    if rows[0].numel() <= chunk:
        return _inner_products(rows, exact)
    parts = [
        _inner_products(pieces, exact)
        for pieces in zip(*(row.split(chunk) for row in rows), strict=True)
    ]
    return torch.stack(parts).sum(0)


def _chunk(device: torch.device, rows: int) -> int:
    """Elements of a row that are multiplied at a time: on the CPU, in a core's cache."""
    if device.type == "cpu":
        return max(2**16 // rows, 2**12)
    return 2 * bucket_size(device) // max(rows, 2)


def may_be_quick(buckets: Sequence[Bucket], rows: int) -> bool:
    """Whether :func:`quick_gram` is worth a try."""
    # Elsewhere than on the CPU to look at a product would be to wait for the device.
    return (
        rows > 1
        and all(b.device.type == "cpu" and b.dtype == torch.float32 for b in buckets)
        and sum(bucket.size for bucket in buckets) > QUICK_CHUNK
    )


def quick_gram(flats: Flats, rows: int) -> Tensor | None:
    """The Gram matrix of two rows or more by float32 products; None if that leaves a doubt."""
    return _of_two(flats()) if rows == 2 else _of_many(flats, rows)


def _of_many(flats: Flats, number: int) -> Tensor | None:
    """As :func:`quick_gram`; single pairs that leave a doubt are multiplied once more."""
    if not _multiplies_in_float32(number):
        return None
    gram = sum_of(products_by_strips(rows) for rows in flats())
    pairs = doubtful_pairs(gram)
    if pairs is None or len(pairs) > len(gram) // 2:
        return None
    for i, j in pairs:
        two = sum_of(gram_of([rows[i], rows[j]]) for rows in flats())
        gram[i, j] = gram[j, i] = two[0, 1]
    return gram if leads_the_same_way(gram) else None


def sum_of(matrices: Iterable[Tensor]) -> Tensor:
    """The sum of some matrices."""
    first, *others = matrices
    for other in others:
        first = first + other
    return first


def _multiplies_in_float32(rows: int) -> bool:
    """Whether nobody allowed matmuls of fewer bits: tried out, as there are many settings."""
    one = 1 + 2**-11  # 1 in TF32 and bfloat16
    row = torch.full((2**13,), one, dtype=torch.float32, device="cpu")
    return bool((products_by_strips([row] * rows) > len(row) * one).all())


def doubtful_pairs(gram: Tensor) -> list[tuple[int, int]] | None:
    """Which float32 products have a sign that is not certain; None if something is out of range."""
    squares = gram.diagonal()
    if not bool(((squares > 1e-20) & (squares < 1e30)).all()):
        return None
    doubtful = _cosines(gram).abs() < 2 * error_of_float32()
    return [(i, j) for i, j in doubtful.triu(1).nonzero().tolist()]


def leads_the_same_way(gram: Tensor) -> bool:
    """Whether float32 products of many rows lead where float64 ones would.

    With lengths ``l_i``, cosines C and the products' error ``e l_i l_j``, a combination
    ``sum_i c_i g_i`` of non-negative coefficients has a squared length of at least ``b S**2 / m``,
    where ``S = sum_i c_i l_i`` and ``b`` is the smallest eigenvalue of C, or 1 where all cosines
    are positive. The min-norm point has at least this product with each gradient, of which the
    error is at most ``e l_i S``: less than half of it, if ``b >= 2 m e`` times the ratio of
    the lengths. Here that is 4, and ``b >= 25 m e`` leaves 2 % of each length.
    """
    lengths, cosines = gram.diagonal().sqrt(), _cosines(gram)
    error = len(gram) * error_of_float32()
    least = max(25.0, 4 * float(lengths.max() / lengths.min())) * error
    if bool((cosines > 0).all()):
        return least <= 1
    return float(torch.linalg.eigvalsh(cosines)[0]) >= least


def _cosines(gram: Tensor) -> Tensor:
    lengths = gram.diagonal().sqrt()
    return gram / lengths / lengths.unsqueeze(-1)


def _of_two(pairs: Iterable[Sequence[Tensor]]) -> Tensor | None:
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


def _inner_products(rows: Sequence[Tensor], exact: torch.dtype) -> Tensor:
    if len(rows) == 2:  # three dot products take two thirds of the time of a matmul this flat
        first, second = (row.to(exact) for row in rows)
        cross = torch.dot(first, second)
        entries = [torch.dot(first, first), cross, cross, torch.dot(second, second)]
        return torch.stack(entries).view(2, 2)
    matrix = torch.stack(list(rows)).to(exact)
    return matrix @ matrix.T
