"""Parts of a graph that do not bear a pass for each loss: what runs once, and what overwrites."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.functions import applied

REGIONS = ("leaving hook", "overwriting")


class Overwriting(torch.autograd.Function):
    """A sine whose backward writes into what it saved, as fused kernels do: no counter sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, visits: list[int]) -> Tensor:
        ctx.slope, ctx.visits = x.detach().cos(), visits
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.visits[0] += 1
        ctx.slope.data.mul_(grad)
        return ctx.slope, None


class Regions:
    """The regions of one kind in a network, all at one place, and how often each was passed.

    A region that several passes go through cannot be right in all of them: that is told from the
    visits of the reference, which passes once a loss.
    """

    def __init__(self, kind: str, place: str) -> None:
        self.kind, self.place = kind, place
        self._visits: list[list[int]] = []
        self._lasting: list[tuple[list[int], Any]] = []

    def hook_parameters(self, k: str, encoder: nn.Module) -> None:
        """Hooks on parameters, which run once in all of the training."""
        if self.place == f"parameter {k}":
            for parameter in encoder.parameters():
                if parameter.requires_grad:
                    visits = [0]
                    self._lasting.append((visits, _hooked(parameter, visits)))

    def through(self, place: str, x: Tensor) -> Tensor:
        """A tensor behind the region, if there is one at this place."""
        if place != self.place or not x.requires_grad:
            return x
        visits = [0]
        self._visits.append(visits)
        if self.kind == "overwriting":
            return torch.as_tensor(applied(Overwriting, x, visits))
        own = x.view_as(x)  # what others take from x does not pass
        _hooked(own, visits)
        return own

    def begin(self) -> None:
        """A forward begins: hooks on parameters that have run count no more."""
        self._visits.clear()
        for visits, counting in self._lasting:
            if visits[0]:
                counting.remove()
                visits[0] = 0

    @property
    def visits(self) -> int:
        """How often one of the regions was passed since the forward began."""
        return max((v[0] for v in (*self._visits, *(v for v, _ in self._lasting))), default=0)


def _hooked(x: Tensor, visits: list[int]) -> Any:
    """Registers a hook that leaves after its first call; gives the handle of what counts calls."""

    def leaving(grad: Tensor) -> Tensor:
        handle.remove()
        return grad * 3

    handle = x.register_hook(leaving)
    return x.register_hook(_counting(visits))


def _counting(visits: list[int]) -> Callable[[Tensor], None]:
    def count(grad: Tensor) -> None:
        visits[0] += 1

    return count
