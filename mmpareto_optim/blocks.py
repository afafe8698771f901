"""Blocks: groups of parameters, told apart by which losses reach them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

Modalities = dict[str, dict[Tensor, str]]
"""For each modality its parameters, each with a name for error messages."""

Reach = tuple[tuple[str, ...], ...]
"""For each parameter the names of the losses that reach it, in the order of the losses."""


@dataclass(frozen=True)
class Block:
    """Parameters whose gradients are treated as one vector.

    Attributes:
        name: the modality, or the objectives joined by ``+`` for a block found by reach.
        objectives: names of the losses that reach the block.
        positions: where its parameters stand in the list of all parameters.
        integrated: whether a rule decides the coefficients; otherwise gradients are added.
    """

    name: str
    objectives: tuple[str, ...]
    positions: tuple[int, ...]
    integrated: bool


@lru_cache(maxsize=64)
def blocks_by_reach(reach: Reach) -> tuple[Block, ...]:
    """One block for each set of losses, of the parameters that just these losses reach.

    Raises:
        ValueError: ``+`` in the names of losses gives two of the blocks one name.
    """
    blocks: list[Block] = []
    integrated: dict[str, tuple[str, ...]] = {}
    for name, objectives, positions in _by_objectives(reach, range(len(reach))):
        blocks.append(Block(name, objectives, positions, integrated=len(objectives) > 1))
        if blocks[-1].integrated and integrated.setdefault(name, objectives) != objectives:
            raise ValueError(
                f"losses {integrated[name]} reach one block of parameters and losses "
                f"{objectives} another, and both blocks would be called {name!r}: rename a loss"
            )
    return tuple(blocks)


def blocks_by_modality(
    reach: Reach, params: Sequence[Tensor], modalities: Modalities, losses: Iterable[str]
) -> tuple[Block, ...]:
    """One block for each modality, over the losses that reach any part of it.

    What the modalities leave out is not integrated: its gradients are added.
    """
    blocks = []
    for modality, members in modalities.items():
        positions = tuple(i for i, param in enumerate(params) if param in members and reach[i])
        reaching = {name for position in positions for name in reach[position]}
        objectives = tuple(name for name in losses if name in reaching)
        if positions:
            blocks.append(Block(modality, objectives, positions, integrated=len(objectives) > 1))
    claimed = {position for block in blocks for position in block.positions}
    rest = [position for position in range(len(params)) if position not in claimed]
    blocks += [
        Block(name, objectives, positions, integrated=False)
        for name, objectives, positions in _by_objectives(reach, rest)
    ]
    return tuple(blocks)


def _by_objectives(
    reach: Reach, positions: Iterable[int]
) -> list[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    groups: dict[tuple[str, ...], list[int]] = {}
    for position in positions:
        groups.setdefault(reach[position], []).append(position)
    groups.pop((), None)  # what no loss reaches stays as it is
    return [("+".join(map(str, names)), names, tuple(members)) for names, members in groups.items()]


def parameters_by_modality(groups: Any) -> Modalities:
    """Resolve ``param_groups_by_modality`` to named parameters.

    Args:
        groups: a mapping from a modality's name to a module, to parameters, or to
            ``(name, parameter)`` pairs. Generators are read once, here.

    Raises:
        TypeError: not a mapping, or an entry of another kind; names the modality.
        ValueError: no entry, an empty one, or a parameter in two modalities; names them.
    """
    if not isinstance(groups, Mapping):
        raise TypeError(
            "param_groups_by_modality must be a mapping from a modality's name to a module "
            f"or its parameters, got {type(groups).__name__}"
        )
    if not groups:
        raise ValueError(
            "param_groups_by_modality is empty: name at least one modality, or leave it out "
            "to have the blocks found from which losses reach which parameters"
        )
    if len({str(name) for name in groups}) < len(groups):
        raise ValueError(f"two modalities have the same name as text: {list(groups)}; rename one")
    modalities = {str(name): _named_parameters(str(name), entry) for name, entry in groups.items()}
    owner: dict[Tensor, str] = {}
    for modality, params in modalities.items():
        for param, name in params.items():
            if param in owner:
                raise ValueError(
                    f"parameter {name} of modality {modality!r} is in modality "
                    f"{owner[param]!r} too: leave it in one of them, or in neither to have "
                    "its gradients added"
                )
            owner[param] = modality
    return modalities


def check_held(modalities: Modalities, held: Iterable[Tensor]) -> None:
    """Raise ValueError if a trainable parameter of a modality is not in the optimizer."""
    known = set(held)
    for modality, params in modalities.items():
        for param, name in params.items():
            if param.requires_grad and param not in known:
                raise ValueError(
                    f"parameter {name} of modality {modality!r} is not held by the base "
                    "optimizer: add it with add_param_group(), freeze it with "
                    "requires_grad_(False), or leave it out of param_groups_by_modality"
                )


def _named_parameters(modality: str, entry: Any) -> dict[Tensor, str]:
    if isinstance(entry, nn.Module):
        items: list[Any] = list(entry.named_parameters())
    elif isinstance(entry, Iterable) and not isinstance(entry, str | bytes | Tensor):
        items = list(entry)
    else:
        items = [entry]
    params: dict[Tensor, str] = {}
    for index, item in enumerate(items):
        name, param = item if _is_pair(item) else (str(index), item)
        if not isinstance(param, Tensor):
            raise TypeError(
                f"modality {modality!r} must be a module, parameters or (name, parameter) "
                f"pairs, got {type(param).__name__}"
            )
        params[param] = f"{name!r} of shape {tuple(param.shape)}"
    if not params:
        raise ValueError(f"modality {modality!r} has no parameters: give some, or leave it out")
    return params


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
