"""Which losses reach which parameters, and blocks: found by that, or chosen by hand."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from mmpareto_optim.options import MOST_NAMES
from mmpareto_optim.param_groups import Modalities
from mmpareto_optim.rows import Layout, Row, is_capturing
from mmpareto_optim.rules.evaluation import solver_dtype

Reached = tuple[tuple[str, ...], ...]
"""For each parameter the names of the losses that reach it, in the order of the losses."""

OUTNUMBERED = 100
"""How many times as large a block must be for a smaller one to join it."""


@dataclass(frozen=True, eq=False)
class Block:
    """Parameters whose gradients are treated as one vector.

    Attributes:
        name: the modality, or the objectives joined by ``+`` for a block found by reach.
        objectives: names of the losses that reach the block.
        positions: of its parameters in the list of all.
        summed: whether it is what a choice by hand left out, which is not integrated.
        joined: names of the small blocks that are part of it.
    """

    name: str
    objectives: tuple[str, ...]
    positions: tuple[int, ...]
    summed: bool = False
    joined: tuple[str, ...] = ()

    @property
    def integrated(self) -> bool:
        """Whether a rule decides the coefficients; otherwise gradients are added."""
        return len(self.objectives) > 1 and not self.summed


def blocks_of(
    reached: Reached,
    params: Sequence[Tensor],
    modalities: Modalities | None,
    rows: Mapping[str, Row],
) -> tuple[Block, ...]:
    """The blocks: those chosen by hand, or else found.

    Raises:
        ValueError: ``+`` in the names of losses gives two of the blocks one name.
    """
    if modalities is None:
        return _by_reach(reached, tuple(param.numel() for param in params))
    given = map(any, zip(*(row.layout.given for row in rows.values()), strict=True))
    modality_of = {param: name for name, members in modalities.items() for param in members}
    chosen = tuple(
        modality_of.get(p) if there else None for p, there in zip(params, given, strict=True)
    )
    return _by_modality(reached, chosen, tuple(modalities), tuple(rows))


@lru_cache(maxsize=64)
def _by_reach(reached: Reached, sizes: tuple[int, ...]) -> tuple[Block, ...]:
    """One block for each set of losses, of the parameters that just these losses reach."""
    blocks = [
        Block("+".join(map(str, names)), names, positions)
        for names, positions in _by_objectives(reached, range(len(reached)))
    ]
    objectives: dict[str, tuple[str, ...]] = {}
    for block in blocks:
        other = objectives.setdefault(block.name, block.objectives)
        if block.integrated and other != block.objectives:
            raise ValueError(
                f"losses {other} reach one block of parameters and losses {block.objectives} "
                f"another, and both blocks would be called {block.name!r}: rename a loss"
            )
    return tuple(_with_small_ones_joined(blocks, sizes))


def _with_small_ones_joined(blocks: Sequence[Block], sizes: Sequence[int]) -> list[Block]:
    """Small blocks as a part of larger ones whose losses include theirs.

    A block of one number has no direction common to two losses in half of the steps, and would
    stand still. The losses that do not reach a small block count as zero there.
    """
    numbers = {block: sum(sizes[i] for i in block.positions) for block in blocks}

    def host(small: Block) -> Block:
        large = [b for b in blocks if _takes_in(b, small, numbers[b], numbers[small])]
        return host(min(large, key=lambda b: numbers[b])) if large else small

    members: dict[Block, list[Block]] = {block: [] for block in blocks}
    for block in blocks:
        members[host(block)].append(block)
    return [
        replace(
            block,
            positions=tuple(sorted(i for part in parts for i in part.positions)),
            joined=tuple(part.name for part in parts if part is not block),
        )
        for block, parts in members.items()
        if parts
    ]


def _takes_in(large: Block, small: Block, numbers: int, fewer: int) -> bool:
    if not small.integrated or not set(small.objectives) < set(large.objectives):
        return False
    too_few = fewer < len(small.objectives) and numbers >= len(large.objectives)
    return too_few or numbers >= OUTNUMBERED * fewer


@lru_cache(maxsize=64)
def _by_modality(
    reached: Reached,
    chosen: tuple[str | None, ...],
    modalities: tuple[str, ...],
    losses: tuple[str, ...],
) -> tuple[Block, ...]:
    """One block for each modality, over the losses that reach any part of it.

    What the modalities leave out is not integrated: its gradients are added.
    """
    blocks = []
    for modality in modalities:
        positions = tuple(i for i, name in enumerate(chosen) if name == modality)
        reaching = {name for position in positions for name in reached[position]}
        objectives = tuple(name for name in losses if name in reaching)
        if objectives:
            blocks.append(Block(modality, objectives, positions))
    integrated = {position for block in blocks for position in block.positions}
    rest = [position for position in range(len(chosen)) if position not in integrated]
    blocks += [
        Block("+".join(map(str, names)), names, positions, summed=True)
        for names, positions in _by_objectives(reached, rest)
    ]
    return tuple(blocks)


def _by_objectives(
    reached: Reached, positions: Iterable[int]
) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    groups: dict[tuple[str, ...], list[int]] = {}
    for position in positions:
        groups.setdefault(reached[position], []).append(position)
    groups.pop((), None)
    return ((names, tuple(members)) for names, members in groups.items())


Pair = tuple[str, object]
"""A loss's name, and a parameter or the name of a feature."""

LargestOfAll = Callable[[Tensor], Tensor]
"""From sizes of gradients on this process to those on all."""


class _Look(NamedTuple):
    """Sizes of gradients that are on their way to the host, and what tells that they arrived."""

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
    layouts: Sequence[tuple[str, Layout]]
    reached: Reached

    def holds_for(self, keys: Sequence[object], layouts: Sequence[tuple[str, Layout]]) -> bool:
        return (
            layouts == self.layouts
            and len(keys) == len(self.keys)
            and all(map(is_, keys, self.keys))
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
        self,
        rows: Mapping[str, Row],
        keys: Sequence[object],
        largest_of_all: LargestOfAll,
        held: Callable[[], Iterable[object]] | None = None,
    ) -> Reached:
        """For each position the losses that reach it.

        Keys, parameters or names of features, tell positions apart; those no longer held are
        forgotten, so that nothing keeps them alive.
        """
        layouts = [(name, row.layout) for name, row in rows.items()]
        if self._settled is not None and self._settled.holds_for(keys, layouts):
            return self._settled.reached
        if self._look is not None and not is_capturing():
            self._remember(self._look.read())
            self._look = None
        if held is not None:
            known = set(held())
            self._reached = {pair for pair in self._reached if pair[1] in known}
            self._zero = {pair for pair in self._zero if pair[1] in known}
        pairs = {
            (name, keys[position]): row.part(place)
            for name, row in rows.items()
            for position, place in row.layout.places.items()
            if not _is_empty(keys[position])
        }
        unseen = {p: g for p, g in pairs.items() if p not in self._reached and p not in self._zero}
        if unseen and len({name for name, _ in self._reached} | rows.keys()) > MOST_NAMES:
            self._reached = {pair for pair in self._reached if pair[0] in rows}
            self._zero = {pair for pair in self._zero if pair[0] in rows}
        reached_now = self._first_look(unseen, largest_of_all)
        zero = {pair: g for pair, g in pairs.items() if pair in self._zero and pair not in unseen}
        if zero and not is_capturing():
            self._look = _look_at(zero, largest_of_all)
        reached_now |= self._reached & pairs.keys()
        reached = tuple(tuple(name for name in rows if (name, key) in reached_now) for key in keys)
        if pairs.keys() <= self._reached:
            self._settled = _Settled(tuple(keys), layouts, reached)
        return reached

    def _first_look(self, unseen: Mapping[Pair, Tensor], largest_of_all: LargestOfAll) -> set[Pair]:
        """Those of the pairs that are reached in this step."""
        if not unseen:
            return set()
        if is_capturing():
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


def _is_empty(key: object) -> bool:
    """Whether there is nothing to look at, on any process."""
    return isinstance(key, Tensor) and key.numel() == 0


def _look_at(gradients: Mapping[Pair, Tensor], largest_of_all: LargestOfAll) -> _Look:
    sizes = largest_of_all(_largest_of(list(gradients.values())))
    pairs = tuple(gradients)
    if sizes.is_meta:  # there are no values
        return _Look(pairs, torch.ones(len(pairs), device="cpu"), None)
    if sizes.device.type == "cpu":
        return _Look(pairs, sizes, None)
    host = sizes.to("cpu", non_blocking=True)
    arrived = torch.Event(sizes.device)
    arrived.record()
    return _Look(pairs, host, arrived)


def _largest_of(tensors: Sequence[Tensor]) -> Tensor:
    """The largest absolute value of each tensor, shape ``(tensors,)``; NaN for NaN."""
    device, exact = tensors[0].device, solver_dtype(tensors[0])
    norms = [
        torch.linalg.vector_norm(t if t.numel() else t.new_zeros(1), math.inf) for t in tensors
    ]
    return torch.stack([norm.to(device, exact) for norm in norms])
