"""What the ranks are about to do, compared before they do it."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from mmpareto_optim.rows import Given
from mmpareto_optim.types import Constants

if TYPE_CHECKING:  # not in every build
    from torch.distributed import ProcessGroup


class DisagreementError(RuntimeError):
    """Raised on every rank, of what the ranks have told each other."""


class Plan(NamedTuple):
    """What a rank is about to do.

    Attributes:
        constants: by name, what must be alike on all ranks.
        losses: their names, in the order in which they are differentiated.
        given: for each parameter whether the next loss gives it a gradient.
        problem: why it does nothing, or None.
    """

    constants: Constants = ()
    losses: tuple[str, ...] = ()
    given: Given = ()
    problem: str | None = None


class Handshake:
    """Compares the plans of a group's ranks.

    A rank that waits for another which never comes is the worst that can happen. Plans are
    compared by a few bytes on the host, which the device neither waits for nor is asked about.
    """

    def __init__(self, group: "ProcessGroup") -> None:
        self._group = group
        self._host = _group_on_the_host(group)
        self._failure: str | None = None

    def compare(self, plan: Plan) -> list[Plan]:
        """The plans of all ranks; just the own one where all are alike.

        Raises:
            DisagreementError: on all ranks, if constants differ or if one of them has failed.
        """
        plans = self.exchange(plan)
        _check_alike(plans, [dist.get_global_rank(self._group, i) for i in range(len(plans))])
        return plans

    def exchange(self, plan: Plan) -> list[Plan]:
        """As :meth:`compare`, of which nothing is checked."""
        if self._failure is not None:
            raise DisagreementError(self._failure)
        digest = _digest(plan)
        extremes = torch.tensor([digest, -digest], dtype=torch.int64, device="cpu")
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self._host)
        largest, negated_smallest = extremes.tolist()
        if largest == -negated_smallest:
            return [plan]
        plans: list[Plan | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(plans, plan, group=self._host)
        return [each for each in plans if each is not None]

    @contextmanager
    def agreed(self) -> Iterator[None]:
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


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:100]} ... {text[-90:]}"


@lru_cache(maxsize=128)
def _digest(plan: Plan) -> int:
    # Python's own hash of text differs from process to process.
    return int.from_bytes(hashlib.sha256(repr(plan).encode()).digest()[:7], "big")


def _group_on_the_host(group: "ProcessGroup") -> "ProcessGroup":
    """A group of the same ranks that exchanges tensors of the CPU."""
    if "cpu:" in dist.get_backend_config(group):
        return group
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)  # type: ignore[no-any-return]
