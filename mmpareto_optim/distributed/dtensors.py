"""How a model's parameters are spread over processes: DTensors and their device meshes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    with torch.no_grad():
        return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def spread_as(param: Tensor, local: Tensor) -> Tensor:
    """A tensor whose part on this rank is given, spread as a parameter is."""
    if not is_dtensor(param):
        return local
    spread = partial(DTensor.from_local, run_check=False, shape=param.shape, stride=param.stride())
    return spread(local, param.device_mesh, param.placements)  # type: ignore[attr-defined]


def dtensors(params: Sequence[Any]) -> list[Any]:
    """Those that are spread over processes."""
    return [param for param in params if is_dtensor(param)]


def shards_of(param: Any) -> int:
    """In how many parts a parameter is cut."""
    sizes = zip(param.device_mesh.shape, param.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())


def ranks_of(mesh: Any) -> set[int]:
    """The ranks of a device mesh."""
    return set(mesh.mesh.flatten().tolist())


def positions_to_average(
    params: Sequence[Any], meshes: dict[Any, set[int]], group: Any
) -> list[int]:
    """Where gradients are still to be averaged: not over a mesh, which has done so itself."""
    if group is None:
        return []
    averaged = set(torch.distributed.get_process_group_ranks(group))
    for ranks in meshes.values():
        if len(averaged & ranks) > 1 and not averaged <= ranks:
            raise ValueError(
                f"gradients are to be averaged over ranks {sorted(averaged)}, and some parameters "
                f"are sharded over {sorted(ranks)} of them: pass the data-parallel processes "
                "alone, as in process_group=mesh['dp'].get_group()"
            )
    return [
        position
        for position, param in enumerate(params)
        if not is_dtensor(param) or not averaged <= meshes[param.device_mesh]
    ]
