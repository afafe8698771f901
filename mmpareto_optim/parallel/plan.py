"""What the ranks are about to do, compared before they do it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

Constants = tuple[tuple[str, Any], ...]
"""By name, what must be alike on all ranks."""


class DisagreementError(RuntimeError):
    """Raised on every rank, of what the ranks have told each other."""


class Plan(NamedTuple):
    """What a rank is about to do."""

    constants: Constants = ()
    reach: tuple[tuple[Any, tuple[bool, ...]], ...] = ()
    problem: str | None = None


class Plans:
    """Compares the plans of a group's ranks.

    A rank that waits for another which never comes is the worst that can happen. Plans are
    compared by a few bytes on the host, which the device neither waits for nor is asked about.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._host = group_on_the_host(group)
        self._failure: str | None = None

    def compared(self, plan: Plan) -> list[Plan]:
        """The plans of all ranks; just the own one where all are alike.

        Raises:
            DisagreementError: on all ranks, if constants differ or if one of them has failed.
        """
        plans = self.exchanged(plan)
        _check_alike(plans, [dist.get_global_rank(self._group, i) for i in range(len(plans))])
        return plans

    @contextmanager
    def out_of_step(self) -> Iterator[None]:
        """What fails in here has been agreed on: the others go on, and this rank must not.

        Raises:
            DisagreementError: on this rank, now and whenever plans are to be compared again.
        """
        try:
            yield
        except Exception as error:
            self._failure = (
                f"rank {dist.get_rank()} failed while gradients were averaged, and is out of step "
                f"with the others: end all processes, and go on from a checkpoint. "
                f"{type(error).__name__}: {error}"
            )
            raise DisagreementError(self._failure) from error

    def exchanged(self, plan: Plan) -> list[Plan]:
        """As :meth:`compared`, of which nothing is checked."""
        if self._failure is not None:
            raise DisagreementError(self._failure)
        digest = _digest(plan)
        extremes = torch.tensor([digest, -digest], dtype=torch.int64, device="cpu")
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self._host)
        largest, negated_smallest = extremes.tolist()
        if largest == -negated_smallest:
            return [plan]
        plans: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(plans, plan, group=self._host)
        return plans


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


@lru_cache(maxsize=128)
def _digest(plan: Plan) -> int:
    # Python's own hash of text differs from process to process.
    return int.from_bytes(hashlib.sha256(repr(plan).encode()).digest()[:7], "big")


def group_on_the_host(group: Any) -> Any:
    """A group of the same ranks that exchanges tensors of the CPU."""
    if "cpu:" in dist.get_backend_config(group):
        return group
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
