"""Parameters in buckets of one device and dtype, whose gradients are flat vectors."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from mmpareto_optim.flat.memory import alias_of
from mmpareto_optim.ground import Gradient, gradient_dtype
from mmpareto_optim.rules.gram import solver_dtype


def bucket_size(device: torch.device) -> int:
    """Elements of a bucket: what a core's cache holds, or, elsewhere, worth a kernel launch."""
    return 2**18 if device.type == "cpu" else 2**22


def long_tensor(device: torch.device) -> int:
    """Elements from which a tensor has a bucket to itself, and is not copied into one.

    On the CPU an operation more costs less than the copy.
    """
    return 2**15 if device.type == "cpu" else bucket_size(device)


ALIGNMENT = 64
"""Bytes; torch's own memory begins at a multiple of it."""


class Kind(NamedTuple):
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

    def __init__(self, positions: Sequence[int], kinds: Sequence[Kind]) -> None:
        self.positions = positions
        self.device = kinds[0].device
        self.written = kinds[0].dtype.to_real()
        self.dtype = torch.promote_types(self.written, torch.float32)
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
        self._sizes = [piece.numel() for piece in self._pieces]
        self.size = sum(self._sizes)

    @property
    def written_error(self) -> float:
        """Relative error of rounding a row to what is written; 0 where that is its own dtype."""
        return 0.0 if self.written == self.dtype else torch.finfo(self.written).eps / 2

    def flatten(self, gradient: Gradient) -> Tensor:
        """The gradients of the bucket's parameters as one row; zeros for None.

        In the gradient's own memory, where that is a row.
        """
        pieces = [
            self._piece(gradient[position], index) for index, position in enumerate(self.positions)
        ]
        if len(pieces) == 1:
            row = alias_of(pieces[0].reshape(-1))
            # How a dot product rounds depends on where it begins: as torch would place it.
            torchs = row.is_contiguous() and row.data_ptr() % ALIGNMENT == 0
            return _cast(row if torchs else row.clone().contiguous(), self.dtype)
        return _cast(_flatten_dense_tensors(pieces), self.dtype)

    def unflatten(self, row: Tensor) -> list[Tensor]:
        """A tensor for each parameter in its shape, dtype and memory format.

        Each has memory of its own, so that whoever keeps one keeps no more; the row's where it is
        the only one. None is a view, which would refuse ``detach_()``.
        """
        row = _cast(row, self.written)
        pieces = [row]
        if len(self._pieces) > 1:
            pieces = [row.new_empty(size) for size in self._sizes]
            torch.split_with_sizes_copy(row, self._sizes, out=pieces)
        return [
            self._restored(piece.view(like.shape), order).data
            for piece, like, order in zip(pieces, self._pieces, self._orders, strict=True)
        ]

    def norms(self, row: Tensor) -> Tensor:
        """Norm of each parameter's part of a row, shape ``(parameters,)``.

        In float64, as squares of float32 numbers overflow and vanish in float32. On the CPU, where
        that takes several times as long, only if the norms in float32 are not all of a common size.
        """
        pieces, exact = row.split(self._sizes), solver_dtype(row)
        if self.device.type == "cpu":
            norms = torch.stack(torch._foreach_norm(pieces))
            if bool(((norms > 1e-15) & (norms < 1e15)).all()):
                return norms.to(exact)
        return torch.stack(torch._foreach_norm(pieces, dtype=exact))

    def spread(self, factors: Tensor) -> Tensor:
        """One factor for each parameter, repeated for each number of a row."""
        # repeat_interleave would want the sizes on the device: a copy that waits for it.
        pairs = zip(factors.unbind(), self._sizes, strict=True)
        return torch.cat([factor.expand(size) for factor, size in pairs])

    def _piece(self, gradient: Tensor | None, index: int) -> Tensor:
        if gradient is None:
            shape = self._pieces[index].shape
            return torch.zeros(shape, dtype=self.written, device=self.device)
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


def buckets_of(params: Sequence[Tensor]) -> list[Bucket]:
    """A block's parameters, divided into buckets of limited size."""
    return _buckets_of(
        tuple(Kind(p.shape, p.stride(), gradient_dtype(p), p.device) for p in params)
    )


@lru_cache(maxsize=1024)
def _buckets_of(kinds: tuple[Kind, ...]) -> list[Bucket]:
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
