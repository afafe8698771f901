"""Per-loss gradients since the last ``zero_grad``, and the ``.grad`` that was made of them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mmpareto_optim.blocks import Block
from mmpareto_optim.flat import FlatGradients
from mmpareto_optim.gradients import Gradients


class Accumulation:
    """What one block has accumulated.

    A ``.grad`` that did not come from here (another ``backward()``'s, or ours after
    somebody clipped, unscaled or zeroed it) is *foreign*: it is never integrated but, as in
    plain PyTorch, what comes next is added to it.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self._separate = block.integrated or len(block.objectives) == 1
        self.rows = FlatGradients(block.params, len(block.objectives) if self._separate else 1)
        self.foreign: dict[Tensor, Tensor] = {}
        self._written: list[tuple[Tensor, Tensor, int]] = []

    def is_current(self) -> bool:
        """Whether each ``.grad`` still is what was written from here, and untouched."""
        return bool(self._written) and all(
            param.grad is grad and grad._version == version
            for param, grad, version in self._written
        )

    def per_loss(self) -> Gradients:
        """The accumulated gradients loss by loss; empty where only their sum is kept."""
        if not self._separate:
            return {}
        return {name: self.rows.gradient(row) for row, name in enumerate(self.block.objectives)}

    def start(self, gradients: Gradients, foreign: dict[Tensor, Tensor]) -> None:
        """Hold ``gradients`` and nothing else."""
        self.foreign = foreign
        for row, name in enumerate(self.block.objectives):
            if self._separate or row == 0:
                self.rows.copy(row, gradients.get(name, {}))
            else:
                self.rows.add(0, gradients.get(name, {}))

    def add(self, gradients: Gradients) -> None:
        """Add ``gradients`` to what is held."""
        for row, name in enumerate(self.block.objectives):
            self.rows.add(row if self._separate else 0, gradients.get(name, {}))

    def sum(self) -> FlatGradients:
        """The plain sum, for a block that is not integrated."""
        return self.rows.combine(torch.ones(1)) if self.foreign else self.rows

    def write(self, total: FlatGradients) -> None:
        """Make ``total``, and what is foreign, the ``.grad`` of the parameters."""
        total.add(0, self.foreign)
        grads = total.as_grads()
        for param, grad in grads.items():
            param.grad = grad
        self._written = [(param, grad, grad._version) for param, grad in grads.items()]

    def close(self) -> None:
        """Accumulate no further."""
        self.foreign = {}
        self._written = []


class History:
    """The accumulations that an earlier ``backward`` left behind."""

    def __init__(self, accumulations: Sequence[Accumulation]) -> None:
        self._by_key = {accumulation.block.key: accumulation for accumulation in accumulations}
        self._current = [
            accumulation for accumulation in accumulations if accumulation.is_current()
        ]
        self.gradients = _merged(accumulation.per_loss() for accumulation in self._current)

    def resume(self, block: Block, gradients: Gradients) -> Accumulation:
        """The block's accumulation with ``gradients`` added: gone on with, or a new one."""
        found = self._by_key.get(block.key)
        if found in self._current:
            found.add(gradients)
            return found
        if found is None or not block.integrated:
            # A plain block's row is its .grad, which somebody may still hold.
            found = Accumulation(block)
        found.start(gradients, self._foreign(block))
        found.add(self.gradients)
        return found

    def _foreign(self, block: Block) -> dict[Tensor, Tensor]:
        ours = {param for losses in self.gradients.values() for param in losses}
        foreign = {
            param: param.grad
            for param in block.params
            if param.grad is not None and param not in ours
        }
        for accumulation in self._current:
            foreign |= {
                param: grad for param, grad in accumulation.foreign.items() if param in ours
            }
        return foreign


def _merged(parts: Iterable[Gradients]) -> Gradients:
    merged: Gradients = {}
    for part in parts:
        for name, gradient in part.items():
            merged.setdefault(name, {}).update(gradient)
    return merged
