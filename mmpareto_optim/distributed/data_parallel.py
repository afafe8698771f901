"""Several processes, each with its share of the batch: rows averaged over them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmpareto_optim.distributed.handshake import DisagreementError, Handshake, Plan
from mmpareto_optim.distributed.single import Processes
from mmpareto_optim.rows import Given, Layout, Row, Span, spans_of
from mmpareto_optim.types import Constants

if TYPE_CHECKING:  # not in every build
    from torch.distributed import ProcessGroup


class _Average(NamedTuple):
    """A part of a row that is being averaged; sent is the part, or a copy in another dtype."""

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
        self._reduce_dtype = reduce_dtype
        if reduce_dtype is not None:
            self.rounding = torch.finfo(reduce_dtype).eps / 2
        self._handshake = Handshake(group)
        self.ranks = frozenset(self._handshake.ranks)
        self._others_compare_next = True
        self._underway: list[_Average] = []

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """The others learn of an error where they compare plans next.

        Where they wait in a collective that this rank never enters, it is out of step for good.
        """
        self._others_compare_next = True
        try:
            yield
        except BaseException as error:
            self._abandon()
            if isinstance(error, DisagreementError) or not isinstance(error, Exception):
                raise
            problem = f"{type(error).__name__}: {error}"
            if self._others_compare_next:
                self._handshake.exchange(Plan(problem=problem))
                raise
            self._handshake.failure = (
                f"rank {dist.get_rank()} failed while gradients were averaged, and is out of step "
                f"with the others: end all processes, and go on from a checkpoint. {problem}"
            )
            raise DisagreementError(self._handshake.failure) from error

    def _compare(self, plan: Plan) -> list[Plan]:
        self._others_compare_next = True
        return self._handshake.compare(plan)

    def losses_of_all(self, names: Iterable[str], constants: Constants) -> list[str]:
        """Those of the first rank, then what others have besides."""
        plans = self._compare(Plan(constants(), tuple(names)))
        return list(dict.fromkeys(name for plan in plans for name in plan.losses))

    def given_by_all(self, name: str, given: Given, *, averages: bool = True) -> Given:
        """A loss or a parameter that a rank does not reach counts as zero there."""
        plans = self._compare(Plan((("loss", name),), given=given))
        self._others_compare_next = not averages
        return tuple(map(any, zip(*(plan.given for plan in plans), strict=True)))

    def average(self, row: Row, positions: tuple[int, ...] | None = None) -> None:
        for span in _spans_to_average(row.layout, positions):
            part, dtype = row.part(span.places[0]), span.forms[0].dtype
            # Divided before and not after, where the sum of half-precision numbers overflows.
            part /= len(self.ranks)
            sent = part.to(part.dtype if dtype.is_complex else self._reduce_dtype or dtype)
            work = dist.all_reduce(sent, group=self.group, async_op=True)
            self._underway.append(_Average(work, part, sent))
        self._others_compare_next = True

    def wait(self) -> None:
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
        """At features, of which each rank has those of its examples, over all ranks."""
        return largest_over([self.group], sizes) if at_features else sizes

    def grams(self, grams: Sequence[Tensor], at_features: bool) -> list[Tensor]:
        """Gram matrices for the whole batch.

        Its loss is the mean over the ranks, so that its gradient at an example
        is one over their number times that of the rank which has the example.
        """
        if not at_features:
            return list(grams)
        return [gram / len(self.ranks) ** 2 for gram in sums_over([self.group], grams)]

    def agree_to_write(self) -> None:
        self._compare(Plan((("collective", "result"),)))

    def same(self, value: Tensor) -> Tensor:
        """The first rank's value, where a user's function has not failed on any of them."""
        self._compare(Plan((("collective", "coefficients"),)))
        value = value.clone(memory_format=torch.contiguous_format)
        dist.broadcast(value, src=dist.get_global_rank(self.group, 0), group=self.group)
        return value

    def mean(self, value: Tensor) -> Tensor:
        value = value / len(self.ranks)
        dist.all_reduce(value, group=self.group)
        return value


@lru_cache(maxsize=256)
def _spans_to_average(layout: Layout, positions: tuple[int, ...] | None) -> list[Span]:
    """The fewest spans of the gradients of some parameters, or of all."""
    there = layout.places if positions is None else layout.places.keys() & positions
    return spans_of([layout], sorted(there, key=layout.places.__getitem__))


def largest_over(groups: Sequence["ProcessGroup"], sizes: Tensor) -> Tensor:
    """The largest sizes over some process groups; infinite for NaN, which a maximum could lose."""
    sizes = sizes.nan_to_num(nan=torch.inf, posinf=torch.inf)
    for group in groups:
        dist.all_reduce(sizes, op=dist.ReduceOp.MAX, group=group)
    return sizes


def sums_over(groups: Sequence["ProcessGroup"], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Small tensors summed over one process group after the other, together."""
    if not tensors:
        return []
    first = tensors[0]
    flat = torch.cat([tensor.to(first.device, non_blocking=True).flatten() for tensor in tensors])
    for group in groups:
        dist.all_reduce(flat, group=group)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view(like.shape) for piece, like in zip(pieces, tensors, strict=True)]
