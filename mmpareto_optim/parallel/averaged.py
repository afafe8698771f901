"""Several processes, each with its share of the batch: gradients averaged over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import or_
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmpareto_optim.blocks import largest_of, numbers_of
from mmpareto_optim.ground import Gradient, Gradients, gradient_dtype
from mmpareto_optim.parallel.alone import Alone
from mmpareto_optim.parallel.plan import Constants, DisagreementError, Plan, Plans

BUCKET = 2**23
"""Elements that are averaged by one collective."""

WORTH_OVERLAPPING = 2**20
"""Elements of a gradient that is averaged while the next loss is differentiated.

Of fewer, those of all losses are averaged at once: that saves a comparison of plans for each.
"""


class Averaged(Alone):
    """The ranks of a process group that train one model together; all methods are collective.

    Args:
        group: a process group that this process belongs to.
        reduce_dtype: in what dtype real gradients are averaged, or None for their own.
    """

    def __init__(self, group: Any, reduce_dtype: torch.dtype | None) -> None:
        self.group = group
        self._reduce_dtype = reduce_dtype
        if reduce_dtype is not None:
            self.rounded = torch.finfo(reduce_dtype).eps / 2
        self.parts = self.size = dist.get_world_size(group)
        self._plans = Plans(group)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """An error on this rank becomes one on all of them, where they wait for its plan."""
        try:
            yield
        except DisagreementError:
            raise
        except Exception as error:
            self._plans.exchanged(Plan(problem=f"{type(error).__name__}: {error}"))
            raise

    def compare(self, constants: Constants) -> None:
        """Raise DisagreementError, on all ranks, if constants differ or one of them failed."""
        self._plans.compared(Plan(constants))

    def agree(
        self,
        losses: Iterable[str],
        params: Sequence[Tensor],
        constants: Constants,
        *,
        one_by_one: bool,
    ) -> OneByOne | None:
        """As :meth:`Alone.agree`; None for small models, and where ranks differ in their losses."""
        if not one_by_one or sum(param.numel() for param in params) < WORTH_OVERLAPPING:
            return None
        announced = tuple((name, ()) for name in losses)
        if len(self._plans.compared(Plan(constants, announced))) > 1:
            return None
        return OneByOne(self, params, [name for name, _ in announced])

    def averaged(
        self, found: Gradients, params: Sequence[Tensor], constants: Constants
    ) -> Gradients:
        """Means over the ranks; a loss or a parameter that a rank does not reach counts as zero."""
        return self.averaged_at(found, params, constants, range(len(params)))

    def averaged_at(
        self,
        found: Gradients,
        likes: Sequence[Tensor],
        constants: Constants,
        positions: Sequence[int],
    ) -> Gradients:
        """As :meth:`averaged`, at some positions; tensors like the gradients in place of params."""
        rows: dict[Any, Gradient] = {(name,): row for name, row in found.rows.items()}
        rows[()] = found.plain  # no loss has this name
        united = self.united(rows, likes, constants)
        for row in rows.values():
            row[:] = [None] * len(row)  # their memory is free while buckets are filled
        finish(self.begin(united, positions))
        plain = united.pop(())
        return Gradients({name: row for (name,), row in united.items()}, plain)

    def largest_at_features(self, tensors: Sequence[Tensor]) -> list[float]:
        """Over all ranks; infinite for NaN, which a maximum could lose."""
        sizes = largest_of(tensors).nan_to_num(nan=torch.inf, posinf=torch.inf)
        dist.all_reduce(sizes, op=dist.ReduceOp.MAX, group=self.group)
        return numbers_of(sizes)

    def grams_at_features(self, flats: Sequence[Any]) -> list[Tensor]:
        """Gram matrices for the whole batch.

        The whole batch's loss is the mean over the ranks, so that its gradient at an example
        is one over their number times that of the rank which has the example. Parts of a sum are
        not multiplied in float32: others may cancel them.
        """
        grams = summed([flat.gram(quick=False) for flat in flats], [self.group])
        return [gram / self.size**2 for gram in grams]

    def grams_of_parts(self, flats: Sequence[Any]) -> list[Tensor]:
        """Of this rank's own gradients, each over the number of ranks, summed over the ranks."""
        return self.grams_at_features(flats)

    def same(self, value: Tensor) -> Tensor:
        """The first rank's value."""
        value = value.clone(memory_format=torch.contiguous_format)
        dist.broadcast(value, src=dist.get_global_rank(self.group, 0), group=self.group)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the ranks."""
        value = value / self.size
        dist.all_reduce(value, group=self.group)
        return value

    def united(
        self, rows: Mapping[Any, Gradient], likes: Sequence[Tensor], constants: Constants
    ) -> dict[Any, Gradient]:
        """Zeros for the gradients that this rank lacks and another has; losses in one order."""
        reach = tuple((n, tuple(g is not None for g in row)) for n, row in rows.items())
        reached: dict[Any, tuple[bool, ...]] = {}
        for plan in self._plans.compared(Plan(constants, reach)):
            for name, row in plan.reach:
                reached[name] = tuple(map(or_, reached.get(name, row), row))
        nothing: Gradient = [None] * len(likes)
        return {
            name: [
                torch.zeros_like(like, dtype=gradient_dtype(like))
                if found is None and wanted
                else found
                for found, wanted, like in zip(rows.get(name, nothing), mask, likes, strict=True)
            ]
            for name, mask in reached.items()
        }

    def begin(self, rows: Mapping[Any, Gradient], positions: Sequence[int]) -> list[_Bucket]:
        """Begin to average the gradients at some positions, which are None until it is finished.

        All losses of a bucket go in one collective.
        """
        begun = []
        for places in _buckets(rows, positions):
            with self._plans.out_of_step():
                begun.append(self._begun(places))
        return begun

    def _begun(self, places: list[tuple[Gradient, int]]) -> _Bucket:
        pieces = [row[position] for row, position in places]
        flat = torch.cat([piece.reshape(-1) for piece in pieces if piece is not None])
        for row, position in places:
            row[position] = None  # its memory is free while the next bucket is filled
        shapes = [piece.shape for piece in pieces if piece is not None]
        del pieces
        dtype, sent_as = flat.dtype, self._reduce_dtype
        if sent_as is None or dtype.is_complex:
            sent_as = dtype
        # Divided before and not after, where the sum of half-precision numbers overflows; and in
        # the wider of both dtypes.
        flat = flat.to(torch.promote_types(dtype, sent_as))
        flat /= self.size
        sent = flat.to(sent_as)
        work = dist.all_reduce(sent, group=self.group, async_op=True)
        return _Bucket(work, sent, dtype, places, shapes)


class OneByOne:
    """An :class:`Underway`.

    Args:
        ranks: those that average, which have the same losses in the same order.
        params: the parameters.
        losses: names of the losses.
    """

    def __init__(self, ranks: Averaged, params: Sequence[Tensor], losses: Sequence[str]) -> None:
        self._ranks = ranks
        self._params = params
        self._rows: dict[str, Gradient] = {name: [] for name in losses}
        self._begun: list[_Bucket] = []

    def begin(self, name: str, gradient: Gradient) -> None:
        """Begin to average a loss's gradient, which is emptied."""
        rows = self._ranks.united({name: gradient}, self._params, ())
        gradient[:] = [None] * len(gradient)
        self._rows |= rows
        self._begun += self._ranks.begin(rows, range(len(self._params)))

    def finished(self) -> Gradients:
        """Means over the ranks, as of :meth:`Averaged.averaged`."""
        finish(self._begun)
        return Gradients(self._rows, [None] * len(self._params))

    def abandoned(self) -> None:
        """Let nothing be written, on a device, to memory that is about to be somebody else's."""
        while self._begun:
            bucket = self._begun.pop(0)
            if bucket.sent.device.type != "cpu":  # there it is the work that holds the memory
                bucket.work.wait()


class _Bucket(NamedTuple):
    """Gradients that are being averaged.

    Attributes:
        work: what is waited for.
        sent: all of them.
        dtype: theirs.
        places: rows and positions that they go back to.
        shapes: theirs.
    """

    work: Any
    sent: Tensor
    dtype: torch.dtype
    places: list[tuple[Gradient, int]]
    shapes: list[torch.Size]


def finish(begun: list[_Bucket]) -> None:
    """Wait until gradients are averaged, and put them where they were; empties the list."""
    while begun:
        work, sent, dtype, places, shapes = begun.pop(0)
        work.wait()
        means = sent.to(dtype).split([shape.numel() for shape in shapes])
        del sent
        for (row, position), mean, shape in zip(places, means, shapes, strict=True):
            row[position] = mean.view(shape)


def summed(tensors: Sequence[Tensor], groups: Sequence[Any]) -> list[Tensor]:
    """Small tensors summed over one process group after the other, together."""
    if not tensors:
        return []
    first = tensors[0]
    flat = torch.cat([tensor.to(first.device, non_blocking=True).flatten() for tensor in tensors])
    for group in groups:
        dist.all_reduce(flat, group=group)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view(like.shape) for piece, like in zip(pieces, tensors, strict=True)]


def _buckets(
    rows: Mapping[Any, Gradient], positions: Sequence[int]
) -> list[list[tuple[Gradient, int]]]:
    """The gradients that there are, by device and dtype, in lists of limited size."""
    open_buckets: dict[Any, tuple[list[tuple[Gradient, int]], int]] = {}
    closed = []
    for row in rows.values():
        for position in positions:
            gradient = row[position]
            if gradient is None:
                continue
            kind = (gradient.device, gradient.dtype)
            members, size = open_buckets.get(kind, ([], 0))
            if members and size + gradient.numel() > BUCKET:
                closed.append(members)
                members, size = [], 0
            members.append((row, position))
            open_buckets[kind] = (members, size + gradient.numel())
    return closed + [members for members, _ in open_buckets.values()]
