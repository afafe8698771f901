"""What becomes of parameters midway: frozen, thawed, replaced by others, of another size too."""

from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tests.fuzz.encoders import Points

if TYPE_CHECKING:
    from tests.fuzz.sides import Side

CHANGES = ("frozen", "thawed", "replaced", "resized")
# Before the forward pass, between it and the backward, between that and the step.
MOMENTS = ("before", "in flight", "after")


def change(side: "Side", kind: str, seed: int) -> list[int]:
    """Does a change, the same on each side; gives the places of the parameters that are new."""
    chance = Random(seed)
    if kind == "frozen":
        _freeze(side, chance)
    elif kind == "thawed":
        for parameter in side.frozen:
            parameter.requires_grad_(True)
        side.frozen.clear()
    else:
        return _replace(side, chance, of_points=kind == "resized")
    return []


def _freeze(side: "Side", chance: Random) -> None:
    """Some of an encoder; all of it where no loss and no feature is left without a graph."""
    k = chance.choice([*side.model.plan.kinds])
    trained = [p for p in side.model.encoders[k].parameters() if p.requires_grad]
    needed = f"penalty {k}" in side.model.plan.terms or k in side.case.features
    most = len(trained) - needed
    if most > 0:
        count = most if chance.random() < 0.4 else chance.randint(1, most)
        for parameter in chance.sample(trained, count):
            parameter.requires_grad_(False)
            side.frozen.append(parameter)


def _replace(side: "Side", chance: Random, of_points: bool) -> list[int]:
    points = [m.points for m in side.model.modules() if isinstance(m, Points)]
    growing = [i for i, p in enumerate(side.parameters) if any(p is each for each in points)]
    count = min(chance.choice([1, 1, 3]), len(side.parameters))
    places = growing if of_points else chance.sample(range(len(side.parameters)), count)
    for place in places:
        old = side.parameters[place]
        new = nn.Parameter(_values(old, chance, of_points), requires_grad=old.requires_grad)
        _put(side, place, old, new)
    return places


def _values(old: Tensor, chance: Random, of_points: bool) -> Tensor:
    """Values near those that were; of points some are dropped, or some come twice."""
    draw = torch.Generator().manual_seed(chance.randrange(1 << 30))
    values = old.detach().clone()
    if of_points:
        rows = range(len(values))
        fewer = len(rows) > 2 and chance.random() < 0.5
        more = [*rows, *chance.choices(rows, k=2)]
        values = values[chance.sample(rows, len(rows) - 1) if fewer else more]
    return values + 0.1 * torch.randn(values.shape, generator=draw).to(values.dtype)


def _put(side: "Side", place: int, old: Tensor, new: nn.Parameter) -> None:
    """In the module, in all groups that hold the old one, and in its state where it fits."""
    for module in side.model.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if parameter is old:
                setattr(module, name, new)
    for groups in side.groups:
        for group in groups:
            group["params"] = [new if each is old else each for each in group["params"]]
    state = side.base.state.pop(old, None)
    if state is not None and new.shape == old.shape:
        side.base.state[new] = state
    side.parameters[place] = new
    side.frozen = [new if each is old else each for each in side.frozen]
