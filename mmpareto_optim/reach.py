"""What each loss has reached so far, told by gradients other than zero."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmpareto_optim.blocks import Reached
from mmpareto_optim.norms import largest_of
from mmpareto_optim.rows import Layout, Row

Pair = tuple[str, object]
"""A loss's name, and a parameter or the name of a feature."""

LargestOfAll = Callable[[Tensor], Tensor]
"""From the largest absolute values on this process to those on all that share a gradient."""


class _Look(NamedTuple):
    """Sizes of gradients that are on their way to the host.

    Attributes:
        pairs: whose they are.
        sizes: on the host, once ``arrived``.
        arrived: what is waited for, on a device.
    """

    pairs: Sequence[Pair]
    sizes: Tensor
    arrived: torch.Event | None

    def read(self) -> dict[Pair, float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip(self.pairs, self.sizes.tolist(), strict=True))


class _Settled(NamedTuple):
    """What is found again as long as the same losses give the same parameters a gradient."""

    keys: Sequence[object]
    layouts: Mapping[str, Layout]
    reached: Reached

    def holds_for(self, keys: Sequence[object], layouts: Mapping[str, Layout]) -> bool:
        return (
            list(layouts.items()) == list(self.layouts.items())
            and len(keys) == len(self.keys)
            and all(one is other for one, other in zip(keys, self.keys, strict=True))
        )


class Reach:
    """A loss reaches what it has given a gradient other than zero.

    That a gradient is not None says little: autograd gives zeros for all that goes through
    one tensor (``torch.stack(losses)``, ``chunk``, a compiled region). A pair of a loss and a
    parameter that is seen for the first time is looked at there and then. One whose gradient has
    been zero so far is looked at in each step, and what is seen counts from the next step on: so
    no step waits for the device, and all devices train alike.
    """

    def __init__(self) -> None:
        self._reached: set[Pair] = set()
        self._zero: set[Pair] = set()
        self._look: _Look | None = None
        self._settled: _Settled | None = None

    def of(
        self, rows: Mapping[str, Row], keys: Sequence[object], largest_of_all: LargestOfAll
    ) -> Reached:
        """For each parameter the losses that reach it.

        Args:
            rows: by name of the loss.
            keys: for each position what tells it from others: the parameter, say.
            largest_of_all: from sizes on this process to those on all.
        """
        layouts = {name: row.layout for name, row in rows.items()}
        if self._settled is not None and self._settled.holds_for(keys, layouts):
            return self._settled.reached
        if self._look is not None:
            self._remember(self._look.read())
            self._look = None
        pairs = {
            (name, keys[position]): row.part(place)
            for name, row in rows.items()
            for position, place in row.layout.places.items()
        }
        unseen = {p: g for p, g in pairs.items() if p not in self._reached and p not in self._zero}
        reached_now = self._first_look(unseen, largest_of_all)
        zero = {pair: g for pair, g in pairs.items() if pair in self._zero and pair not in unseen}
        if zero and not _is_capturing():
            self._look = _look_at(zero, largest_of_all)
        reached_now |= self._reached & pairs.keys()
        reached = tuple(tuple(name for name in rows if (name, key) in reached_now) for key in keys)
        if pairs.keys() <= self._reached:
            self._settled = _Settled(tuple(keys), layouts, reached)
        return reached

    def keep_only(self, keys: Sequence[object]) -> None:
        """Forget what is not among some parameters, and would be kept alive."""
        known = set(keys)
        self._reached = {pair for pair in self._reached if pair[1] in known}
        self._zero = {pair for pair in self._zero if pair[1] in known}
        self._settled = self._look = None

    def _first_look(
        self, unseen: Mapping[Pair, Tensor], largest_of_all: LargestOfAll
    ) -> set[Pair]:
        """Those of the pairs that are reached in this step."""
        if not unseen:
            return set()
        if _is_capturing():
            return set(unseen)
        sizes = _look_at(unseen, largest_of_all).read()
        self._zero |= {pair for pair, size in sizes.items() if size == 0}
        self._remember(sizes)
        # What is not finite says nothing of the next step: zero times infinity is not zero.
        return {pair for pair, size in sizes.items() if size != 0}

    def _remember(self, sizes: Mapping[Pair, float]) -> None:
        moved = {pair for pair, size in sizes.items() if 0 < size < math.inf}
        self._reached |= moved
        self._zero -= moved


def _look_at(gradients: Mapping[Pair, Tensor], largest_of_all: LargestOfAll) -> _Look:
    sizes = largest_of_all(largest_of(list(gradients.values())))
    pairs = tuple(gradients)
    if sizes.is_meta:  # there are no values
        return _Look(pairs, torch.ones(len(pairs), device="cpu"), None)
    if sizes.device.type == "cpu":
        return _Look(pairs, sizes, None)
    host = sizes.to("cpu", non_blocking=True)
    arrived = torch.Event(sizes.device)
    arrived.record()
    return _Look(pairs, host, arrived)


def _is_capturing() -> bool:
    """Whether a CUDA graph is being captured, in which nothing may be waited for."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
