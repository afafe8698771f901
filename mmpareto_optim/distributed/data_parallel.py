"""Several processes, each with its share of the batch: rows averaged over them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmpareto_optim.distributed.handshake import DisagreementError, Handshake, Plan
from mmpareto_optim.distributed.single import Processes
from mmpareto_optim.rows import Given, Row, spans_of
from mmpareto_optim.types import Constants

if TYPE_CHECKING:  # not in every build
    from torch.distributed import ProcessGroup


class _Average(NamedTuple):
    """A part of a row that is being averaged.

    Attributes:
        work: what is waited for.
        part: where the mean goes.
        sent: what is averaged: the part itself, or a copy in another dtype.
    """

    work: dist.Work
    part: Tensor
    sent: Tensor


class DataParallel(Processes):
    """The ranks of a process group that train one model together; all methods are collective.

    A row is averaged while the next loss is differentiated.

    Args:
        group: a process group that this process belongs to.
        reduce_dtype: in what dtype real gradients are averaged, or None for their own.
    """

    writes_rows = True

    def __init__(self, group: "ProcessGroup", reduce_dtype: torch.dtype | None) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self._reduce_dtype = reduce_dtype
        if reduce_dtype is not None:
            self.rounding = torch.finfo(reduce_dtype).eps / 2
        self._handshake = Handshake(group)
        self._underway: list[_Average] = []

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """An error on this rank becomes one on all of them, where they wait for its plan."""
        try:
            yield
        except BaseException as error:
            self._abandon()
            if isinstance(error, Exception) and not isinstance(error, DisagreementError):
                self._handshake.exchange(Plan(problem=f"{type(error).__name__}: {error}"))
            raise

    def losses_of_all(self, names: Iterable[str], constants: Constants) -> list[str]:
        """Those of the first rank, then what others have besides."""
        plans = self._handshake.compare(Plan(constants, tuple(names)))
        return list(dict.fromkeys(name for plan in plans for name in plan.losses))

    def check_alike(self, constants: Constants) -> None:
        """Raise DisagreementError, on all ranks, if constants differ or one of them failed."""
        self._handshake.compare(Plan(constants))

    def given_by_all(self, name: str, given: Given) -> Given:
        """A loss or a parameter that a rank does not reach counts as zero there."""
        plans = self._handshake.compare(Plan((("loss", name),), given=given))
        return tuple(map(any, zip(*(plan.given for plan in plans), strict=True)))

    def average(self, row: Row) -> None:
        """Begin to average a row in place."""
        for segment, positions in zip(row.segments, row.layout.segments, strict=True):
            self._begin(segment, row.layout.forms[positions[0]].dtype)

    def average_at(self, row: Row, positions: Sequence[int]) -> None:
        """As :meth:`average`, of some parameters' gradients."""
        there = [position for position in positions if row.layout.given[position]]
        for span in spans_of([row.layout], there):
            dtype = row.layout.forms[span.positions[0]].dtype
            self._begin(row.part(span.places[0]), dtype)

    def _begin(self, part: Tensor, dtype: torch.dtype) -> None:
        with self._handshake.agreed():
            to = dtype.to_real() if self._reduce_dtype is None else self._reduce_dtype
            if dtype.is_complex:
                to = part.dtype
            # Divided before and not after, where the sum of half-precision numbers overflows.
            part /= self.size
            sent = part.to(to)
            work = dist.all_reduce(sent, group=self.group, async_op=True)
            self._underway.append(_Average(work, part, sent))

    def wait(self) -> None:
        """Until all rows are averaged."""
        while self._underway:
            work, part, sent = self._underway.pop(0)
            work.wait()
            if sent is not part:
                part.copy_(sent)

    def _abandon(self) -> None:
        """Let nothing be written, on a device, to memory that is about to be somebody else's."""
        while self._underway:
            average = self._underway.pop(0)
            if average.sent.device.type != "cpu":  # there it is the work that holds the memory
                average.work.wait()

    def largest(self, sizes: Tensor, at_features: bool) -> Tensor:
        """At features over all ranks; infinite for NaN, which a maximum could lose."""
        if at_features:
            sizes = sizes.nan_to_num(nan=torch.inf, posinf=torch.inf)
            dist.all_reduce(sizes, op=dist.ReduceOp.MAX, group=self.group)
        return sizes

    def grams(self, grams: Sequence[Tensor], at_features: bool) -> list[Tensor]:
        """Gram matrices for the whole batch.

        Its loss is the mean over the ranks, so that its gradient at an example
        is one over their number times that of the rank which has the example.
        """
        if not at_features:
            return list(grams)
        return [gram / self.size**2 for gram in summed(grams, [self.group])]

    def same(self, value: Tensor) -> Tensor:
        """The first rank's value."""
        value = value.clone(memory_format=torch.contiguous_format)
        dist.broadcast(value, src=dist.get_global_rank(self.group, 0), group=self.group)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the ranks."""
        value = value / self.size
        dist.all_reduce(value, group=self.group)
        return value


def summed(tensors: Sequence[Tensor], groups: Sequence["ProcessGroup"]) -> list[Tensor]:
    """Small tensors summed over one process group after the other, together."""
    if not tensors:
        return []
    first = tensors[0]
    flat = torch.cat([tensor.to(first.device, non_blocking=True).flatten() for tensor in tensors])
    for group in groups:
        dist.all_reduce(flat, group=group)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view(like.shape) for piece, like in zip(pieces, tensors, strict=True)]
