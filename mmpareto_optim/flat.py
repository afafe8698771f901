"""Gradients as flat rows: flatten, Gram matrix, combine, unflatten, a bucket at a time."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mmpareto_optim.gradients import Gradient
from mmpareto_optim.solver import solver_dtype


def bucket_size(device: torch.device) -> int:
    """Elements of a bucket: what a core's cache holds, or, elsewhere, worth a kernel launch."""
    return 2**18 if device.type == "cpu" else 2**22


class FlatBlock:
    """The gradients of one block, a row for each objective, flattened a bucket at a time.

    Args:
        params: all parameters.
        positions: which of them make the block.
        rows: for each objective its gradient, one tensor or None for each of ``params``.
        keep: whether ``rows`` are needed afterwards; otherwise they are emptied bucket by
            bucket as they are combined, so that their memory serves the result.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        positions: Sequence[int],
        rows: Sequence[Gradient],
        *,
        keep: bool,
    ) -> None:
        self._rows = rows
        self._keep = keep
        self._buckets = buckets_of(params, positions)
        self._flat: list[Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest dtype in which gradients are combined, at least float32."""
        return min((bucket.dtype for bucket in self._buckets), key=lambda d: d.itemsize)

    def gram(self) -> Tensor:
        """Inner products of the rows, shape ``(rows, rows)``, on the first bucket's device.

        Their real parts where gradients are complex. Accumulated in float64, which holds
        products of float32 numbers exactly, and which no setting of the float32 matmul
        precision (TF32, bfloat16) touches.
        """
        gram: Tensor | None = None
        for bucket in self._buckets:
            part = _gram(self._flatten(bucket))
            gram = part if gram is None else gram + part.to(gram.device, non_blocking=True)
        assert gram is not None
        return gram

    def sum(self) -> dict[int, Tensor]:
        """The sum of the rows: by position one new tensor, in the parameter's shape."""
        total: dict[int, Tensor] = {}
        for bucket in self._buckets:
            row = bucket.flatten(self._rows[0], copy=True)
            for other in self._rows[1:]:
                row += bucket.flatten(other)
            total |= bucket.unflatten(row)
            self._release(bucket)
        return total

    def combine(self, coefficients: Tensor) -> dict[int, Tensor]:
        """``sum_i c_i row_i``, as :meth:`sum`; ``coefficients`` has shape ``(rows,)``."""
        combined: dict[int, Tensor] = {}
        for bucket in self._buckets:
            combined |= bucket.unflatten(_combine(self._flatten(bucket), coefficients))
            self._release(bucket)
        return combined

    def combine_and_stretch(
        self, coefficients: Tensor, gamma: float
    ) -> tuple[dict[int, Tensor], Tensor]:
        """:meth:`combine`, each tensor stretched to at least gamma times the norm of the sum.

        Returns:
            The tensors by position, and the factors that they were multiplied by.
        """
        combined: dict[int, Tensor] = {}
        factors = []
        for bucket in self._buckets:
            rows = self._flatten(bucket)
            result = _combine(rows, coefficients)
            plain_sum = _combine(rows, torch.ones_like(coefficients))
            stretch = gamma * bucket.norms(plain_sum) / bucket.norms(result)
            stretch = torch.where(stretch.isfinite() & (stretch > 1), stretch, 1.0)
            combined |= bucket.unflatten(result * bucket.spread(stretch))
            factors.append(stretch.to(coefficients.device, non_blocking=True))
            self._release(bucket)
        return combined, torch.cat(factors)

    def _flatten(self, bucket: "Bucket") -> list[Tensor]:
        if self._flat is not None:
            return self._flat
        flat = [bucket.flatten(row) for row in self._rows]
        if len(self._buckets) == 1:
            # Flattened once for both the Gram matrix and the combination.
            self._flat = flat
        return flat

    def _release(self, bucket: "Bucket") -> None:
        if self._keep:
            return
        for row in self._rows:
            for position in bucket.positions:
                row[position] = None


def _gram(rows: Sequence[Tensor]) -> Tensor:
    chunk = bucket_size(rows[0].device)
    exact = solver_dtype(rows[0])
    parts = [
        _inner_products([piece.to(exact) for piece in pieces])
        for pieces in zip(*(torch.split(row, chunk) for row in rows), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _inner_products(rows: list[Tensor]) -> Tensor:
    if len(rows) == 2:  # three dot products take two thirds of the time of a matmul this flat
        first, second = rows
        cross = torch.dot(first, second)
        entries = [torch.dot(first, first), cross, cross, torch.dot(second, second)]
        return torch.stack(entries).view(2, 2)
    matrix = torch.stack(rows)
    return matrix @ matrix.T


def _combine(rows: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    first, *others = rows
    factors = coefficients.to(first.device, first.dtype, non_blocking=True).unbind()
    # Elementwise and not a matmul, which may run in TF32.
    total = first * factors[0]
    for row, factor in zip(others, factors[1:], strict=True):
        total.addcmul_(row, factor)
    return total


class Bucket:
    """Parameters of one device and dtype whose gradients are handled as one flat vector.

    Rows are in at least float32, whatever the dtype of the parameters. Complex numbers
    count as pairs of real ones.

    Args:
        positions: where the parameters stand in the list of all parameters.
        params: the parameters.
    """

    def __init__(self, positions: list[int], params: list[Tensor]) -> None:
        self.positions = positions
        self.device = params[0].device
        self._dtype = params[0].dtype.to_real()
        self.dtype = torch.promote_types(self._dtype, torch.float32)
        self._complex = params[0].is_complex()
        self._sizes = [_real_numbers(param) for param in params]
        self._orders = [_memory_order(param) for param in params]
        self._shapes = [param.shape for param in params]

    def flatten(self, gradient: Sequence[Tensor | None], *, copy: bool = False) -> Tensor:
        """The gradients of the bucket's parameters as one row; zeros for None.

        Without ``copy`` the row may be a view of the gradient: it is to be read, not written.
        """
        pieces = [
            self._flat_piece(gradient[position], order, size)
            for position, order, size in zip(self.positions, self._orders, self._sizes, strict=True)
        ]
        row = torch.cat(pieces) if copy or len(pieces) > 1 else pieces[0]
        return row.to(self.dtype)

    def unflatten(self, row: Tensor) -> dict[int, Tensor]:
        """By position the views of a row in the parameters' shapes, dtype and memory formats."""
        pieces: Iterable[Tensor] = torch.split(row.to(self._dtype), self._sizes)
        if self._complex:
            pieces = [torch.view_as_complex(piece.view(-1, 2)) for piece in pieces]
        views = [
            piece.view(shape) if order is None else _in_memory_order(piece, shape, order)
            for piece, shape, order in zip(pieces, self._shapes, self._orders, strict=True)
        ]
        return dict(zip(self.positions, views, strict=True))

    def norms(self, row: Tensor) -> Tensor:
        """Norm of each parameter's part of a row, shape ``(parameters,)``."""
        return torch.stack(torch._foreach_norm(torch.split(row, self._sizes)))

    def spread(self, factors: Tensor) -> Tensor:
        """One factor for each parameter, repeated for each number of a row."""
        # repeat_interleave would want the sizes on the device: a copy that waits for it.
        pairs = zip(factors.unbind(), self._sizes, strict=True)
        return torch.cat([factor.expand(size) for factor, size in pairs])

    def _flat_piece(self, gradient: Tensor | None, order: list[int] | None, size: int) -> Tensor:
        if gradient is None:
            return torch.zeros(size, dtype=self._dtype, device=self.device)
        if order is not None:
            gradient = gradient.permute(order)
        if self._complex:
            gradient = torch.view_as_real(gradient.resolve_conj())
        return gradient.reshape(-1)


def buckets_of(params: Sequence[Tensor], positions: Iterable[int]) -> list[Bucket]:
    """Divide parameters into buckets of one device and dtype and of limited size."""
    open_buckets: dict[tuple[torch.device, torch.dtype], tuple[list[int], int]] = {}
    closed: list[list[int]] = []
    for position in positions:
        param = params[position]
        kind = (param.device, param.dtype)
        members, size = open_buckets.get(kind, ([], 0))
        if members and size + param.numel() > bucket_size(param.device):
            closed.append(members)
            members, size = [], 0
        members.append(position)
        open_buckets[kind] = (members, size + param.numel())
    closed += [members for members, _ in open_buckets.values()]
    return [Bucket(members, [params[position] for position in members]) for members in closed]


def _real_numbers(param: Tensor) -> int:
    return param.numel() * (2 if param.is_complex() else 1)


def _memory_order(param: Tensor) -> list[int] | None:
    """Dimensions of a dense parameter from the slowest to the fastest; None if contiguous."""
    if param.is_contiguous():
        return None
    strides = torch.empty_like(param, device="meta").stride()
    return sorted(range(param.ndim), key=lambda dimension: -strides[dimension])


def _in_memory_order(piece: Tensor, shape: Sequence[int], order: list[int]) -> Tensor:
    back = [order.index(dimension) for dimension in range(len(order))]
    return piece.view([shape[dimension] for dimension in order]).permute(back)
