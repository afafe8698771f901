"""Integration with the memory of two gradients: each loss is differentiated more than once.

Inner products need every pair of losses, so either all gradients are kept or they are computed
again. First the Gram matrix is found for some parameters at a time, so few that all losses'
gradients at them fit; for a tensor too large for that, with some losses' held and the others'
passing by. Then each loss is differentiated once more, and its gradient is added with its
coefficients, which are known by now.

One backward of the weighted losses instead would save passes, and change gradients wherever a
backward is not linear (a hook that clips, say).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpareto_optim.blocks import Block, Reach, blocks_of
from mmpareto_optim.flat.block import FlatBlock
from mmpareto_optim.gradients.exact import gradients_of
from mmpareto_optim.gradients.losses import Losses
from mmpareto_optim.ground import Describe, Gradient, Gradients, gradient_dtype
from mmpareto_optim.integration import Integrated
from mmpareto_optim.method import Method
from mmpareto_optim.modalities import Modalities
from mmpareto_optim.parallel.alone import Alone
from mmpareto_optim.stats import BlockStats
from mmpareto_optim.window import Window

GRADIENTS = 2
"""How many gradients of all parameters may be alive."""


def check_twice(
    method: Method, processes: Alone, at_features: bool, earlier: Window | None
) -> None:
    """Raise where ``memory="low"`` does not go with what else was asked for."""
    mend = 'use memory="normal"'
    if earlier is not None and earlier.goes_on():
        raise RuntimeError(
            'with memory="low" no gradient of a single loss is kept, so that a second backward '
            f"has nothing to add to: call zero_grad() or step() before, or {mend}"
        )
    if at_features:
        raise ValueError(
            f'features= and memory="low" do not go together, and features= alone keeps just one '
            f"gradient of what is behind them: {mend}"
        )
    if method.by_tensor:
        raise ValueError(f'rescale="tensor" is not integrated with memory="low": {mend}')
    if type(processes) is not Alone:
        raise ValueError(
            f'memory="low" is for one process, and gradients are averaged or sharded here: {mend}'
        )


@dataclass
class Found:
    """The integrated gradients by position, and what was seen."""

    gradients: dict[int, Tensor]
    blocks: Sequence[Block]
    stats: dict[str, BlockStats]


class Twice:
    """One backward by two looks at each loss.

    Args:
        losses: scalars with a graph.
        params: leaf tensors that require a gradient.
        describe: a parameter's name for error messages.
        others: leaves behind the losses that are not among the parameters.
    """

    def __init__(
        self,
        losses: Losses,
        params: Sequence[Tensor],
        describe: Describe,
        others: Sequence[Tensor],
    ) -> None:
        self._losses = losses
        self._names = list(losses)
        self._params = params
        self._describe = describe
        self._others = others

    def integrated(
        self,
        reach: Reach,
        modalities: Modalities | None,
        method: Method,
        processes: Alone,
        *,
        retain_graph: bool,
    ) -> Found:
        """The gradients that :class:`Integrated` gives, to rounding.

        Raises:
            RuntimeError: a function's backward calls ``backward``; as :func:`gradients_of`.
        """
        grams, reached = self._looked_at(reach, processes)
        blocks = blocks_of(reached, self._params, modalities, self._names)
        nothing: Gradient = [None] * len(self._params)
        rows = {name: list(nothing) for name in self._names}

        def grams_of(_: Sequence[FlatBlock]) -> list[Tensor]:
            return [self._gram_of(block, grams) for block in blocks if block.integrated]

        known = Integrated(
            blocks,
            self._params,
            Gradients(rows, nothing),
            method,
            processes,
            grams_of,
            keep=True,
        )
        gradients = self._combined(known.coefficients, retain_graph)
        return Found(gradients, blocks, known.stats())

    @torch.no_grad()
    def _looked_at(
        self, reach: Reach, processes: Alone
    ) -> tuple[dict[int, Tensor], tuple[tuple[str, ...], ...]]:
        """For each position the Gram matrix of all losses, and which of them reach it."""
        grams: dict[int, Tensor] = {}
        reaching: list[list[str]] = [[] for _ in self._params]
        for positions, held in chunks_of(self._params, len(self._names)):
            members = [self._params[position] for position in positions]
            seen: set[str] = set()
            for numbers, rows in self._groups(members, held):
                for number, row in zip(numbers, rows, strict=True):
                    name = self._names[number]
                    if name in seen:
                        continue
                    seen.add(name)
                    found = reach.of({name: row}, members, processes.largest)
                    for position, by in zip(positions, found, strict=True):
                        reaching[position].extend(by)
                for index, position in enumerate(positions):
                    self._multiply(grams, position, numbers, [row[index] for row in rows])
                del rows, row  # before the next are found
        in_order = (tuple(n for n in self._names if n in names) for names in reaching)
        return grams, tuple(in_order)

    def _groups(
        self, members: Sequence[Tensor], held: int
    ) -> Iterator[tuple[list[int], list[Gradient]]]:
        """Losses by number with their gradients at some parameters, so that all pairs meet."""
        every = range(len(self._names))
        for start in every[::held]:
            numbers = list(every[start : start + held])
            rows = [self._differentiated(number, members) for number in numbers]
            yield numbers, rows
            for number in every[start + held :]:
                yield [*numbers, number], [*rows, self._differentiated(number, members)]
            del rows

    def _differentiated(self, number: int, members: Sequence[Tensor]) -> Gradient:
        name = self._names[number]
        loss = {name: self._losses[name]}
        return gradients_of(loss, members, self._describe, self._by_autograd, retain_graph=True)[
            name
        ]

    def _by_autograd(
        self,
        outputs: Sequence[Tensor],
        params: Sequence[Tensor],
        *,
        others: Sequence[Tensor],
        retain_graph: bool,
    ) -> Gradient:
        found = torch.autograd.grad(
            outputs, [*params, *others], retain_graph=retain_graph, allow_unused=True
        )
        if any(param.is_leaf and param.grad is not None for param in self._params):
            raise RuntimeError(
                "a function whose backward calls backward (a reversible layer) is behind the "
                'losses, of which no part can be asked for: use memory="normal"'
            )
        return list(found[: len(params)])

    def _multiply(
        self,
        grams: dict[int, Tensor],
        position: int,
        numbers: Sequence[int],
        gradients: Sequence[Tensor | None],
    ) -> None:
        if all(gradient is None for gradient in gradients):
            return
        param = self._params[position]
        products = FlatBlock([param], [[g] for g in gradients], keep=True).gram(quick=False)
        if position not in grams:
            size = len(self._names)
            grams[position] = products.new_zeros(size, size)
        for row, number in enumerate(numbers):
            for column, other in enumerate(numbers):
                grams[position][number, other] = products[row, column]

    def _gram_of(self, block: Block, grams: Mapping[int, Tensor]) -> Tensor:
        chosen = [self._names.index(name) for name in block.objectives]
        first, *others = (grams[position] for position in block.positions)
        total = first.clone()
        for other in others:
            total += other.to(total.device, non_blocking=True)
        return total[chosen][:, chosen]

    def _combined(
        self, coefficients: Mapping[tuple[str, int], Tensor], retain_graph: bool
    ) -> dict[int, Tensor]:
        totals: dict[int, Tensor] = {}
        for name in reversed(self._names):
            row = gradients_of(
                {name: self._losses[name]},
                self._params,
                self._describe,
                self._by_autograd,
                others=self._others,
                retain_graph=retain_graph or name != self._names[0],
            )[name]
            with torch.no_grad():
                for position in range(len(row)):
                    gradient, row[position] = row[position], None
                    if gradient is not None:
                        self._add(totals, position, gradient, coefficients.get((name, position)))
        return {p: total.to(gradient_dtype(self._params[p])) for p, total in totals.items()}

    def _add(
        self, totals: dict[int, Tensor], position: int, gradient: Tensor, factor: Tensor | None
    ) -> None:
        param = self._params[position]
        exact = torch.promote_types(gradient_dtype(param), torch.float32)
        gradient = gradient.to(exact)
        if factor is not None:
            gradient = gradient * factor.to(param.device, exact, non_blocking=True)
        if position not in totals:
            totals[position] = torch.zeros_like(param, dtype=exact, requires_grad=False)
        totals[position] += gradient


def chunks_of(params: Sequence[Tensor], losses: int) -> Iterator[tuple[list[int], int]]:
    """Positions of parameters, and of how many losses the gradients at them are to be held."""
    room = GRADIENTS * sum(param.numel() for param in params)
    chunk: list[int] = []
    size = 0
    for position, param in enumerate(params):
        if chunk and losses * (size + param.numel()) > room:
            yield chunk, _held(size, losses, room)
            chunk, size = [], 0
        chunk.append(position)
        size += param.numel()
    if chunk:
        yield chunk, _held(size, losses, room)


def _held(size: int, losses: int, room: int) -> int:
    """All, or as many as leave room for one that passes by."""
    return losses if losses * size <= room else max(1, room // size - 1)
