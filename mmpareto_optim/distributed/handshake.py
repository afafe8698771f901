"""What the ranks are about to do, compared before they do it."""

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from mmpareto_optim.rows import Given

if TYPE_CHECKING:  # not in every build
    from torch.distributed import ProcessGroup


class DisagreementError(RuntimeError):
    """Raised of what the ranks have told each other, or no longer can."""


class Plan(NamedTuple):
    """What a rank is about to do."""

    constants: tuple[tuple[str, object], ...] = ()  # by name, what must be alike on all ranks
    losses: tuple[str, ...] = ()  # their names, in the order in which they are differentiated
    given: Given = ()  # for each parameter whether the next loss gives it a gradient
    problem: str | None = None  # why this rank does nothing


class Handshake:
    """Compares the plans of a group's ranks.

    A rank that waits for another which never comes is the worst that can happen. Plans are
    compared by a few bytes on the host, which the device neither waits for nor is asked about.

    Attributes:
        failure: why this rank can agree on nothing any more, or None.
    """

    def __init__(self, group: "ProcessGroup") -> None:
        self.ranks: list[int] = dist.get_process_group_ranks(group)
        self.failure: str | None = None
        self._host = group
        if "cpu:" not in dist.get_backend_config(group):
            self._host = dist.new_group(self.ranks, backend="gloo", use_local_synchronization=True)

    def compare(self, plan: Plan) -> list[Plan]:
        """The plans of all ranks; just the own one where all are alike.

        Raises:
            DisagreementError: on all ranks, if constants differ or if one of them has failed.
        """
        plans = self.exchange(plan)
        if len(plans) == 1:
            return plans
        for rank, other in zip(self.ranks, plans, strict=True):
            if other.problem is not None:
                raise DisagreementError(
                    f"backward() failed on rank {rank}, and no rank has changed anything: mend it "
                    f"there. {other.problem}"
                )
        first = dict(plans[0].constants)
        for rank, other in zip(self.ranks, plans, strict=True):
            found = dict(other.constants)
            for name in first | found:  # other names, where one of them is elsewhere altogether
                one, another = first.get(name), found.get(name)
                if one != another:
                    raise DisagreementError(
                        f"ranks {self.ranks[0]} and {rank} differ in their {name}: {_short(one)} "
                        f"and {_short(another)}. Build the model and its optimizer alike on every "
                        "rank, and call backward() or step() with the same arguments; or pass "
                        "average_gradients=False where each process trains a model of its own"
                    )
        return plans

    def exchange(self, plan: Plan) -> list[Plan]:
        """As :meth:`compare`, of which nothing is checked."""
        if self.failure is not None:
            raise DisagreementError(self.failure)
        digest = _digest(plan)
        extremes = torch.tensor([digest, -digest], dtype=torch.int64, device="cpu")
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self._host)
        largest, negated_smallest = extremes.tolist()
        if largest == -negated_smallest:
            return [plan]
        plans = [plan] * len(self.ranks)
        dist.all_gather_object(plans, plan, group=self._host)
        return plans


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:100]} ... {text[-90:]}"


@lru_cache(maxsize=128)
def _digest(plan: Plan) -> int:
    # Python's own hash of text differs from process to process.
    return int.from_bytes(hashlib.sha256(repr(plan).encode()).digest()[:7], "big")
