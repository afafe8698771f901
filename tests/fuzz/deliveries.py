"""Ways in which training code hands on its losses; through many of them autograd gives zeros."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.fuzz.functions import Copies, applied

Delivery = Callable[[list[Tensor], nn.Module], list[Tensor]]


def _assigned(losses: list[Tensor], model: nn.Module) -> list[Tensor]:
    table = torch.zeros(len(losses), dtype=losses[0].dtype)
    for index, loss in enumerate(losses):
        table[index] = loss
    return [table[index] for index in range(len(losses))]


def _mean_of_rows(losses: list[Tensor], model: nn.Module) -> list[Tensor]:
    rows = torch.cat([torch.stack(losses).unsqueeze(0)] * 2).mean(0)
    return [rows[index] for index in range(len(losses))]


def _with_unused(losses: list[Tensor], model: nn.Module) -> list[Tensor]:
    total = sum(p.sum() for p in model.parameters())
    return [loss + 0 * total for loss in losses]


# Those that go around the features may not be used when the losses have to go through them.
AROUND_FEATURES = ("with unused",)
DELIVERIES: dict[str, Delivery] = {
    "apart": lambda losses, model: losses,
    "unbind": lambda losses, model: list(torch.stack(losses).unbind()),
    "assigned": _assigned,
    "split": lambda losses, model: [part[0] for part in torch.stack(losses).split(1)],
    "chunk": lambda losses, model: [p[0] for p in torch.stack(losses).chunk(len(losses))],
    "mean of rows": _mean_of_rows,
    "with unused": _with_unused,
    "copies": lambda losses, model: list(applied(Copies, *losses)),
}
