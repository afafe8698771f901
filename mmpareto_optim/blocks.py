"""Which losses meet at which parameters, and what reach has been seen."""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmpareto_optim.ground import Gradient, same_objects
from mmpareto_optim.modalities import Modalities
from mmpareto_optim.rules.gram import solver_dtype

Reached = tuple[tuple[str, ...], ...]
"""For each parameter the names of the losses that reach it, in the order of the losses."""


@dataclass(frozen=True)
class Block:
    """Parameters whose gradients are treated as one vector.

    Attributes:
        name: the modality, or the objectives joined by ``+`` for a block found by reach.
        objectives: names of the losses that reach the block.
        positions: where its parameters stand in the list of all parameters.
        by_hand: whether somebody chose it.
        left_out: whether it is what a choice by hand left out, which is not integrated.
    """

    name: str
    objectives: tuple[str, ...]
    positions: tuple[int, ...]
    by_hand: bool = False
    left_out: bool = False

    @property
    def integrated(self) -> bool:
        """Whether a rule decides the coefficients; otherwise gradients are added."""
        return len(self.objectives) > 1 and not self.left_out


class _Settled(NamedTuple):
    """What is found again and again once every gradient has moved.

    Attributes:
        given: for each loss, whether there is a gradient at each position.
        keys: for each position what tells it from others.
        reached: for each position the losses that reach it.
    """

    given: list[tuple[str, list[bool]]]
    keys: tuple[Hashable, ...]
    reached: Reached

    def holds_for(self, given: list[tuple[str, list[bool]]], keys: Sequence[Hashable]) -> bool:
        return given == self.given and same_objects(keys, self.keys)


class Reach:
    """What each loss has moved: a loss reaches what it has given a gradient other than zero.

    That a gradient is not None says little: autograd gives zeros for all that goes through
    one tensor (``torch.stack(losses)``, ``chunk``, a compiled region). A pair of a loss and
    a parameter whose gradient has not yet been other than zero is looked at, on the CPU in each
    step; elsewhere, where a look waits for the device, the 1st, 2nd, 4th, 8th ... time.
    """

    def __init__(self) -> None:
        self._moved: dict[str, set[Hashable]] = {}
        self._times: dict[tuple[str, Hashable], int] = {}
        self._settled: _Settled | None = None

    def of(
        self,
        rows: Mapping[str, Gradient],
        keys: Sequence[Hashable],
        largest: Callable[[Sequence[Tensor]], Sequence[float]],
    ) -> Reached:
        """For each parameter the losses that reach it.

        Args:
            rows: for each loss its gradient. What a look finds to be zero becomes None there, but
                for a last one where all are.
            keys: for each position what tells it from others: the parameter, say.
            largest: the largest absolute value of each of some tensors.
        """
        given = [(name, [gradient is not None for gradient in row]) for name, row in rows.items()]
        if self._settled is not None and self._settled.holds_for(given, keys):
            return self._settled.reached
        for name in rows:
            self._moved.setdefault(name, set())
        waiting = [
            (name, position)
            for name, row in rows.items()
            for position, gradient in enumerate(row)
            if gradient is not None and keys[position] not in self._moved[name]
        ]
        now = self._looked_at(waiting, rows, keys, largest) if waiting else set()
        reached: list[tuple[str, ...]] = []
        moved = [(name, row, self._moved[name]) for name, row in rows.items()]
        for position, key in enumerate(keys):
            reached.append(
                tuple(
                    name
                    for name, row, known in moved
                    if row[position] is not None and (key in known or (name, position) in now)
                )
            )
        self._settled = None if waiting else _Settled(given, tuple(keys), tuple(reached))
        return tuple(reached)

    def _looked_at(
        self,
        waiting: Sequence[tuple[str, int]],
        rows: Mapping[str, Gradient],
        keys: Sequence[Hashable],
        largest: Callable[[Sequence[Tensor]], Sequence[float]],
    ) -> set[tuple[str, int]]:
        """The pairs whose gradient is not finite: they count in this step alone."""
        pairs = [(name, keys[position]) for name, position in waiting]
        for pair in pairs:
            self._times[pair] = self._times.get(pair, 0) + 1
        gradients = [gradient for n, i in waiting if (gradient := rows[n][i]) is not None]
        if not _is_time_to_look(gradients, [self._times[pair] for pair in pairs]):
            return set()
        now = set()
        for (name, position), size in zip(waiting, largest(gradients), strict=True):
            if 0 < size < math.inf:
                self._moved[name].add(keys[position])
                del self._times[name, keys[position]]
            elif size == 0:
                if any(row[position] is not None for n, row in rows.items() if n != name):
                    rows[name][position] = None
            else:
                now.add((name, position))
        return now


def _is_time_to_look(gradients: Sequence[Tensor], times: Sequence[int]) -> bool:
    if _costs_nothing_to_look(gradients[0]):
        return True
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    return any(number & (number - 1) == 0 for number in times)


def _costs_nothing_to_look(gradient: Tensor) -> bool:
    """Whether nothing waits for a value: elsewhere than on the CPU that is the device."""
    return gradient.device.type == "cpu"


def largest_of(tensors: Sequence[Tensor]) -> Tensor:
    """The largest absolute value of each of some tensors, shape ``(tensors,)``; NaN for NaN."""
    device, exact = tensors[0].device, solver_dtype(tensors[0])
    nothing = torch.zeros((), dtype=exact, device=device)
    found = [
        torch.linalg.vector_norm(tensor.detach(), math.inf) if tensor.numel() else nothing
        for tensor in tensors
    ]
    return torch.stack([size.to(device, exact) for size in found])


def numbers_of(sizes: Tensor) -> list[float]:
    """Some sizes, on the host; 1 where there are no values to look at (the meta device)."""
    return [1.0] * len(sizes) if sizes.device.type == "meta" else sizes.tolist()


def blocks_of(
    reached: Reached, params: Sequence[Tensor], modalities: Modalities | None, losses: Iterable[str]
) -> tuple[Block, ...]:
    """The blocks: by hand if there are modalities, and by reach."""
    if modalities is None:
        return _by_reach(reached)
    return _by_modality(reached, params, modalities, losses)


@lru_cache(maxsize=64)
def _by_reach(reached: Reached) -> tuple[Block, ...]:
    """One block for each set of losses, of the parameters that just these losses reach.

    Raises:
        ValueError: ``+`` in the names of losses gives two of the blocks one name.
    """
    blocks = [
        Block("+".join(map(str, names)), names, positions)
        for names, positions in _by_objectives(reached, range(len(reached)))
    ]
    integrated: dict[str, tuple[str, ...]] = {}
    for block in blocks:
        other = integrated.setdefault(block.name, block.objectives)
        if block.integrated and other != block.objectives:
            raise ValueError(
                f"losses {other} reach one block of parameters and losses {block.objectives} "
                f"another, and both blocks would be called {block.name!r}: rename a loss"
            )
    return tuple(blocks)


def _by_modality(
    reached: Reached, params: Sequence[Tensor], modalities: Modalities, losses: Iterable[str]
) -> tuple[Block, ...]:
    """One block for each modality, over the losses that reach any part of it.

    What the modalities leave out is not integrated: its gradients are added.
    """
    blocks = []
    for modality, members in modalities.items():
        positions = tuple(i for i, param in enumerate(params) if param in members)
        reaching = {name for position in positions for name in reached[position]}
        objectives = tuple(name for name in losses if name in reaching)
        if objectives:
            positions = tuple(i for i in positions if reached[i])
            blocks.append(Block(modality, objectives, positions, by_hand=True))
    claimed = {position for block in blocks for position in block.positions}
    rest = [position for position in range(len(params)) if position not in claimed]
    blocks += [
        Block("+".join(map(str, names)), names, positions, left_out=True)
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
