"""What has accumulated since the last ``zero_grad``: per-loss gradients, and ``.grad``."""

from collections.abc import Mapping, Sequence
from itertools import compress

import torch
from torch import Tensor

from mmpareto_optim.gradients import Gradient


class Window:
    """Gradients of each loss since the last ``zero_grad``.

    A ``.grad`` that was not written from here (another ``backward()``'s, or ours after
    somebody clipped, unscaled or zeroed it) is *foreign*: it is never integrated but, as in
    plain PyTorch, what comes next is added to it.

    Attributes:
        params: the parameters.
        rows: for each loss its gradient, one tensor or None for each parameter.
        foreign: for each parameter the ``.grad`` to add to, or None.
    """

    def __init__(
        self, params: Sequence[Tensor], rows: dict[str, Gradient], foreign: Gradient
    ) -> None:
        self.params = params
        self.rows = rows
        self.foreign = foreign
        self._written: list[tuple[Tensor, int] | None] = [None] * len(params)

    def extend(self, earlier: "Window") -> None:
        """Add what an earlier window holds, as far as its ``.grad`` is untouched."""
        places = {param: index for index, param in enumerate(earlier.params)}
        kept = [(new, places[param]) for new, param in enumerate(self.params) if param in places]
        kept = [(new, old) for new, old in kept if earlier._is_untouched(old)]
        for new, old in kept:
            self.foreign[new] = earlier.foreign[old]
        for name, gradient in earlier.rows.items():
            row = self.rows.setdefault(name, [None] * len(self.params))
            for new, old in kept:
                row[new] = _added(gradient[old], row[new])
                gradient[old] = None  # its memory is free for the next sum

    def reach(self) -> tuple[tuple[str, ...], ...]:
        """For each parameter the names of the losses that reach it."""
        columns = zip(*([g is not None for g in row] for row in self.rows.values()), strict=True)
        # Few sets of losses for many parameters.
        sets: dict[tuple[bool, ...], tuple[str, ...]] = {}
        reach = []
        for column in columns:
            if column not in sets:
                sets[column] = tuple(compress(self.rows, column))
            reach.append(sets[column])
        return tuple(reach)

    def write(self, gradients: Mapping[int, Tensor]) -> None:
        """Make each gradient, and what is foreign, the ``.grad`` of the parameter at its position.

        All sums are there before the first is written: where memory runs out, none is.
        """
        totals = {}
        for position, gradient in gradients.items():
            foreign = self.foreign[position]
            totals[position] = gradient if foreign is None else gradient + foreign
        for position, total in totals.items():
            self.params[position].grad = total
            self._written[position] = (total, total._version)

    def _is_untouched(self, position: int) -> bool:
        written = self._written[position]
        if written is None:
            return False
        gradient, version = written
        return self.params[position].grad is gradient and gradient._version == version


def _added(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return old if new is None else new
    return torch.add(old.to(torch.promote_types(old.dtype, torch.float32)), new)
