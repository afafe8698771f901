"""Several processes, each with its share of the batch: one plan for all, gradients averaged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from operator import or_
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmpareto_optim.gradients import Gradient

BUCKET = 2**23
"""Elements that are averaged by one collective."""

Constants = tuple[tuple[str, Any], ...]
"""By name, what must be alike on all ranks."""


class DisagreementError(RuntimeError):
    """Raised on every rank, of what the ranks have told each other."""


class Plan(NamedTuple):
    """What a rank is about to do."""

    constants: Constants = ()
    reach: tuple[tuple[str, tuple[bool, ...]], ...] = ()
    problem: str | None = None


class Processes:
    """The ranks of a process group that train one model together.

    All of its methods are collective. A rank that waits for another which never comes is the
    worst that can happen, so the ranks compare what they are about to do before they do it:
    by a few bytes on the host, which the device neither waits for nor is asked about.

    Args:
        group: a process group that this process belongs to.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self._host = _group_on_the_host(group)

    def unite(
        self, rows: Mapping[str, Gradient], likes: Sequence[Tensor], constants: Constants
    ) -> dict[str, Gradient]:
        """Zeros for the gradients that this rank lacks and another has; losses in one order.

        Args:
            rows: for each loss its gradient, one tensor or None for each of ``likes``.
            likes: tensors of the gradients' shapes, dtypes and devices.
            constants: what must not differ between ranks.

        Raises:
            DisagreementError: on all ranks, if it does or if one of them has failed.
        """
        reach = tuple((n, tuple(g is not None for g in row)) for n, row in rows.items())
        plans = self._compared(Plan(constants, reach))
        reached: dict[str, tuple[bool, ...]] = {}
        for plan in plans:
            for name, row in plan.reach:
                reached[name] = tuple(map(or_, reached.get(name, row), row))
        nothing: Gradient = [None] * len(likes)
        return {
            name: [
                torch.zeros_like(like) if found is None and wanted else found
                for found, wanted, like in zip(rows.get(name, nothing), mask, likes, strict=True)
            ]
            for name, mask in reached.items()
        }

    def check_alike(self, constants: Constants) -> None:
        """As :meth:`unite`, where what follows is collective by itself."""
        self._compared(Plan(constants))

    def tell(self, error: Exception) -> None:
        """Let the other ranks know, where they wait in :meth:`unite`, of an error on this one."""
        self._exchanged(Plan(problem=f"{type(error).__name__}: {error}"))

    def average(self, rows: Mapping[str, Gradient], positions: Sequence[int]) -> None:
        """Replace the gradients at some positions by their means over the ranks.

        Args:
            rows: what :meth:`unite` returns; all losses of a bucket go in one collective.
            positions: which of each row's tensors.
        """
        waiting = []
        for bucket in _buckets(rows, positions):
            pieces = [row[position] for row, position in bucket]
            flat = torch.cat([piece.reshape(-1) for piece in pieces if piece is not None])
            for row, position in bucket:
                row[position] = None  # its memory is free while the next bucket is filled
            shapes = [piece.shape for piece in pieces if piece is not None]
            del pieces
            # Divided before and not after, where the sum of half-precision numbers overflows.
            flat /= self.size
            work = dist.all_reduce(flat, group=self.group, async_op=True)
            waiting.append((work, bucket, flat, shapes))
        for work, bucket, flat, shapes in waiting:
            work.wait()
            means = flat.split([shape.numel() for shape in shapes])
            for (row, position), mean, shape in zip(bucket, means, shapes, strict=True):
                row[position] = mean.view(shape)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the ranks."""
        value = value / self.size
        dist.all_reduce(value, group=self.group)
        return value

    def grams_of_means(self, grams: Sequence[Tensor]) -> list[Tensor]:
        """Gram matrices for the whole batch, of gradients that each rank has for its examples.

        The whole batch's loss is the mean over the ranks, so that its gradient at an example
        is one over their number times that of the rank which has the example.
        """
        return [gram / self.size**2 for gram in summed(grams, [self.group])]

    def same(self, value: Tensor) -> Tensor:
        """The first rank's value."""
        value = value.clone(memory_format=torch.contiguous_format)
        dist.broadcast(value, src=dist.get_global_rank(self.group, 0), group=self.group)
        return value

    def _compared(self, plan: Plan) -> list[Plan]:
        plans = self._exchanged(plan)
        _check_alike(plans, [dist.get_global_rank(self.group, i) for i in range(len(plans))])
        return plans

    def _exchanged(self, plan: Plan) -> list[Plan]:
        """The plans of all ranks; just the own one where all are alike."""
        digest = _digest(plan)
        extremes = torch.tensor([digest, -digest])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self._host)
        largest, negated_smallest = extremes.tolist()
        if largest == -negated_smallest:
            return [plan]
        plans: list[Any] = [None] * self.size
        dist.all_gather_object(plans, plan, group=self._host)
        return plans


@contextmanager
def failing_together(processes: Processes | None) -> Iterator[None]:
    """An error on this rank becomes one on all of them."""
    try:
        yield
    except DisagreementError:
        raise
    except Exception as error:
        if processes is not None:
            processes.tell(error)
        raise


def is_initialized() -> bool:
    """Whether this process may be one of several."""
    return dist.is_available() and dist.is_initialized()


def group_of(group: Any) -> Any:
    """A process group, for None the default one."""
    return dist.group.WORLD if group is None else group


def check_member(group: Any) -> None:
    """Raise unless ``group`` is a process group that this process belongs to."""
    if not is_initialized() or not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"process_group must be a torch.distributed.ProcessGroup that rank "
            f"{dist.get_rank() if is_initialized() else 0} belongs to, got {group!r}: pass the "
            "result of dist.new_group() on the ranks that are in it, or of mesh.get_group()"
        )


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
    rows: Mapping[str, Gradient], positions: Sequence[int]
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


def _check_alike(plans: Sequence[Plan], ranks: Sequence[int]) -> None:
    for rank, plan in zip(ranks, plans, strict=True):
        if plan.problem is not None:
            raise DisagreementError(
                f"backward() failed on rank {rank}, and no rank has changed anything: mend it "
                f"there. {plan.problem}"
            )
    for rank, plan in zip(ranks, plans, strict=True):
        for (name, value), (_, other) in zip(plans[0].constants, plan.constants, strict=True):
            if value != other:
                raise DisagreementError(
                    f"ranks {ranks[0]} and {rank} differ in their {name}: {_short(value)} and "
                    f"{_short(other)}. Build the model and its optimizer alike on every rank, and "
                    "call backward() or step() with the same arguments; or pass "
                    "average_gradients=False where each process trains a model of its own"
                )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:100]} ... {text[-90:]}"


@lru_cache(maxsize=16)
def _digest(plan: Plan) -> int:
    # Python's own hash of text differs from process to process.
    return int.from_bytes(hashlib.sha256(repr(plan).encode()).digest()[:7], "big")


def _group_on_the_host(group: Any) -> Any:
    if "cpu:" in dist.get_backend_config(group):
        return group
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
