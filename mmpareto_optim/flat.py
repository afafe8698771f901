"""Gradients as flat rows: flatten, Gram matrix, combine, unflatten, a bucket at a time."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mmpareto_optim.gradients import Gradient
from mmpareto_optim.ownership import alias_of, is_owned
from mmpareto_optim.rules import solver_dtype


def bucket_size(device: torch.device) -> int:
    """Elements of a bucket: what a core's cache holds, or, elsewhere, worth a kernel launch."""
    return 2**18 if device.type == "cpu" else 2**22


def long_tensor(device: torch.device) -> int:
    """Elements from which a tensor has a bucket to itself, and is not copied into one.

    On the CPU an operation more costs less than the copy.
    """
    return 2**15 if device.type == "cpu" else bucket_size(device)


QUICK_CHUNK = 2**17
"""Elements that are added up in float32: fewer calls the more, and the larger the error."""


class FlatBlock:
    """The gradients of one block, a row for each objective, flattened a bucket at a time.

    Args:
        params: the parameters of the block.
        rows: for each objective its gradient, one tensor or None for each parameter. Emptied
            bucket by bucket as they are combined, so that their memory serves the result: what
            nobody else holds is written, or is the result.
        keep: whether somebody else holds on to what is in ``rows``.
    """

    def __init__(
        self, params: Sequence[Tensor], rows: Sequence[Gradient], *, keep: bool = False
    ) -> None:
        self._params = params
        self._rows = rows
        self._keep = keep
        self._buckets = _buckets_of(
            tuple(_Kind(p.shape, p.stride(), p.dtype, p.device) for p in params)
        )
        # Flattened once for the Gram matrix and the combination, unless that takes memory.
        self._stays_flat = not keep or len(self._buckets) == 1
        self._flat: dict[Bucket, list[Tensor]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest dtype in which gradients are combined, at least float32."""
        return min((bucket.dtype for bucket in self._buckets), key=lambda d: d.itemsize)

    def gram(self, *, quick: bool = True) -> Tensor:
        """Inner products of the rows, shape ``(rows, rows)``, on the first bucket's device.

        Their real parts where gradients are complex. Accumulated in float64, which holds
        products of float32 numbers exactly, and which no setting of the float32 matmul
        precision (TF32, bfloat16) touches. Two long float32 rows on the CPU are multiplied
        in float32, in half the time, and once more if that leaves a doubt; not so without
        ``quick``, for rows that are a part of others, of which there is no telling.

        Args:
            quick: as said.
        """
        if quick and self._may_be_quick():
            found = self._quick_gram()
            if found is not None:
                return found
        gram: Tensor | None = None
        for bucket in self._buckets:
            part = _gram(self._flatten(bucket))
            gram = part if gram is None else gram + part.to(gram.device, non_blocking=True)
        assert gram is not None
        return gram

    def _may_be_quick(self) -> bool:
        # Elsewhere than on the CPU to look at a product would be to wait for the device.
        return (
            len(self._rows) == 2
            and all(b.device.type == "cpu" and b.dtype == torch.float32 for b in self._buckets)
            and sum(bucket.size for bucket in self._buckets) > QUICK_CHUNK
        )

    def _quick_gram(self) -> Tensor | None:
        """The Gram matrix of two rows by float32 products; None if that leaves a doubt."""
        first = cross = second = 0.0
        for bucket in self._buckets:
            pieces = (row.split(QUICK_CHUNK) for row in self._flatten(bucket))
            for one, other in zip(*pieces, strict=True):
                first += float(torch.dot(one, one))
                cross += float(torch.dot(one, other))
                second += float(torch.dot(other, other))
        if not _is_beyond_doubt(first, cross, second):
            return None
        return torch.tensor([[first, cross], [cross, second]], dtype=torch.float64)

    def sum(self) -> list[Tensor]:
        """The sum of the rows: for each parameter a tensor of its own, in its shape."""
        if len(self._rows) == 1 and not self._keep:
            return self._handed_on()
        return self._in_order(self._sum(bucket) for bucket in self._buckets)

    def combine(self, coefficients: Tensor) -> list[Tensor]:
        """``sum_i c_i row_i``, as :meth:`sum`; ``coefficients`` has shape ``(rows,)``."""
        return self._in_order(
            combine_rows(rows, coefficients, into=_writable(rows[0]))
            for rows in map(self._flatten, self._buckets)
        )

    def combine_and_stretch(
        self, coefficients: Tensor, gamma: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """:meth:`combine`, each tensor stretched to at least gamma times the norm of the sum.

        Returns:
            The tensors, and the factors that they were multiplied by.
        """
        factors = []

        def stretched() -> Iterator[Tensor]:
            for bucket in self._buckets:
                rows = self._flatten(bucket)
                result = combine_rows(rows, coefficients)
                plain_sum = combine_rows(rows, torch.ones_like(coefficients))
                stretch = gamma.to(bucket.device) * bucket.norms(plain_sum) / bucket.norms(result)
                stretch = stretch.to(result.dtype)
                stretch = torch.where(stretch.isfinite() & (stretch > 1), stretch, 1.0)
                factors.append(stretch.to(coefficients.device, non_blocking=True))
                yield result * bucket.spread(stretch)

        return self._in_order(stretched()), torch.cat(factors)

    def _flatten(self, bucket: "Bucket") -> list[Tensor]:
        if bucket in self._flat:
            return self._flat[bucket]
        flat = [bucket.flatten(row) for row in self._rows]
        if self._stays_flat:
            self._flat[bucket] = flat
            self._release(bucket)
        return flat

    def _release(self, bucket: "Bucket") -> None:
        for row in self._rows:
            for position in bucket.positions:
                row[position] = None

    def _handed_on(self) -> list[Tensor]:
        """The only row itself; copies of what somebody else holds, or in another layout."""
        (row,) = self._rows
        found, shared = {}, []
        for position, param in enumerate(self._params):
            gradient = row[position]
            row[position] = alias = None if gradient is None else alias_of(gradient)
            del gradient
            if alias is not None and _is_like(alias, param) and is_owned(alias):
                found[position] = alias
            else:
                shared.append(position)
        if shared:
            rest = [self._params[position] for position in shared]
            copies = FlatBlock(rest, [[row[position] for position in shared]], keep=True).sum()
            found.update(zip(shared, copies, strict=True))
        return [found[position] for position in range(len(found))]

    def _sum(self, bucket: "Bucket") -> Tensor:
        first, *others = self._flatten(bucket)
        total = _writable(first)
        total = first.clone() if total is None else total
        for row in others:
            total += row
        return total

    def _in_order(self, results: Iterator[Tensor]) -> list[Tensor]:
        """Unflatten a result for each bucket, and let go of what it was made of."""
        found: dict[int, Tensor] = {}
        for bucket, result in zip(self._buckets, results, strict=True):
            found.update(zip(bucket.positions, bucket.unflatten(result), strict=True))
            self._flat.pop(bucket, None)
            self._release(bucket)
        return [found[position] for position in range(len(found))]


def _gram(rows: Sequence[Tensor]) -> Tensor:
    chunk, exact = bucket_size(rows[0].device), solver_dtype(rows[0])
    if rows[0].numel() <= chunk:
        return _inner_products([row.to(exact) for row in rows])
    parts = [
        _inner_products([piece.to(exact) for piece in pieces])
        for pieces in zip(*(row.split(chunk) for row in rows), strict=True)
    ]
    return torch.stack(parts).sum(0)


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


def _writable(row: Tensor) -> Tensor | None:
    return row if is_owned(row) else None


def _is_like(gradient: Tensor, param: Tensor) -> bool:
    return gradient.stride() == param.stride() and gradient.dtype == param.dtype


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


class _Kind(NamedTuple):
    """All that flattening needs to know of a parameter."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Bucket:
    """Parameters of one device and dtype whose gradients are handled as one flat vector.

    Rows are in at least float32, whatever the dtype of the parameters. Complex numbers
    count as pairs of real ones.

    Args:
        positions: where the parameters stand in their block.
        kinds: what they are.
    """

    def __init__(self, positions: Sequence[int], kinds: Sequence[_Kind]) -> None:
        self.positions = positions
        self.device = kinds[0].device
        self._dtype = kinds[0].dtype.to_real()
        self.dtype = torch.promote_types(self._dtype, torch.float32)
        self._complex = kinds[0].dtype.is_complex
        likes = [
            torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, device="meta")
            for kind in kinds
        ]
        self._orders = [_memory_order(like) for like in likes]
        # The shapes of what a row is made of: real tensors, contiguous in memory.
        self._pieces = [
            self._arranged(like, order) for like, order in zip(likes, self._orders, strict=True)
        ]
        self._holds_empty = any(piece.numel() == 0 for piece in self._pieces)
        self.size = sum(piece.numel() for piece in self._pieces)

    def flatten(self, gradient: Gradient) -> Tensor:
        """The gradients of the bucket's parameters as one row; zeros for None.

        In the gradient's own memory, where that is a row.
        """
        pieces = [
            self._piece(gradient[position], index) for index, position in enumerate(self.positions)
        ]
        if len(pieces) == 1:
            return _cast(alias_of(pieces[0].reshape(-1)), self.dtype)
        return _cast(_flatten_dense_tensors(pieces), self.dtype)

    def unflatten(self, row: Tensor) -> list[Tensor]:
        """Views of a row in the parameters' shapes, dtype and memory formats."""
        pieces = _unflatten_dense_tensors(_cast(row, self._dtype), self._pieces)
        if self._holds_empty:  # PyTorch 2.8 gives them the shape (0,)
            shapes = [piece.shape for piece in self._pieces]
            pieces = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        return list(map(self._restored, pieces, self._orders))

    def norms(self, row: Tensor) -> Tensor:
        """Norm of each parameter's part of a row, shape ``(parameters,)``.

        In float64, as squares of float32 numbers overflow and vanish in float32. On the CPU, where
        that takes several times as long, only if the norms in float32 are not all of a common size.
        """
        pieces, exact = _unflatten_dense_tensors(row, self._pieces), solver_dtype(row)
        if self.device.type == "cpu":
            norms = torch.stack(torch._foreach_norm(pieces))
            if bool(((norms > 1e-15) & (norms < 1e15)).all()):
                return norms.to(exact)
        return torch.stack(torch._foreach_norm(pieces, dtype=exact))

    def spread(self, factors: Tensor) -> Tensor:
        """One factor for each parameter, repeated for each number of a row."""
        # repeat_interleave would want the sizes on the device: a copy that waits for it.
        pairs = zip(factors.unbind(), self._pieces, strict=True)
        return torch.cat([factor.expand(piece.numel()) for factor, piece in pairs])

    def _piece(self, gradient: Tensor | None, index: int) -> Tensor:
        if gradient is None:
            shape = self._pieces[index].shape
            return torch.zeros(shape, dtype=self._dtype, device=self.device)
        return self._arranged(gradient, self._orders[index])

    def _arranged(self, tensor: Tensor, order: list[int] | None) -> Tensor:
        if order is not None:
            tensor = tensor.permute(order)
        return torch.view_as_real(tensor.resolve_conj()) if self._complex else tensor

    def _restored(self, piece: Tensor, order: list[int] | None) -> Tensor:
        if self._complex:
            piece = torch.view_as_complex(piece)
        if order is not None:
            piece = piece.permute([order.index(dimension) for dimension in range(len(order))])
        return piece


@lru_cache(maxsize=1024)
def _buckets_of(kinds: tuple[_Kind, ...]) -> list[Bucket]:
    """Divide a block's parameters into buckets of one device and dtype and of limited size."""
    open_buckets: dict[tuple[torch.device, torch.dtype], tuple[list[int], int]] = {}
    closed: list[list[int]] = []
    for position, kind in enumerate(kinds):
        key, elements = (kind.device, kind.dtype), kind.shape.numel()
        if elements >= long_tensor(kind.device):
            closed.append([position])
            continue
        members, size = open_buckets.get(key, ([], 0))
        if members and size + elements > bucket_size(kind.device):
            closed.append(members)
            members, size = [], 0
        members.append(position)
        open_buckets[key] = (members, size + elements)
    closed += [members for members, _ in open_buckets.values()]
    return [Bucket(members, [kinds[position] for position in members]) for members in closed]


def _cast(row: Tensor, dtype: torch.dtype) -> Tensor:
    return row if row.dtype == dtype else row.to(dtype)


def _memory_order(like: Tensor) -> list[int] | None:
    """Dimensions of a dense parameter from the slowest to the fastest; None if contiguous."""
    if like.is_contiguous():
        return None
    strides = torch.empty_like(like).stride()
    return sorted(range(like.ndim), key=lambda dimension: -strides[dimension])
