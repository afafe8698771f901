"""Parameters spread over processes: DTensors of FSDP2 (``fully_shard``) and tensor parallelism."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmpareto_optim.distributed import summed
from mmpareto_optim.flat import FlatBlock
from mmpareto_optim.gradients import Gradient


class Sharding:
    """How a model's parameters are spread over processes.

    Inner products are added up over the largest mesh. There each number is held by as many
    ranks as the mesh has for each shard, and counts for that part on each of them; a parameter
    that is no DTensor is held by all.

    Args:
        params: the parameters, DTensors among them.
        group: the process group that gradients are averaged over, or None.

    Raises:
        ValueError: meshes of which none contains the others, or a process group that overlaps
            with a mesh in part.
    """

    def __init__(self, params: Sequence[Tensor], group: Any) -> None:
        self.params = params
        self.group = group
        meshes = {param.device_mesh: _ranks_of(param.device_mesh) for param in _dtensors(params)}
        self._mesh, everyone = max(meshes.items(), key=lambda item: len(item[1]))
        if not all(ranks <= everyone for ranks in meshes.values()):
            raise ValueError(
                f"parameters lie on device meshes of ranks {[sorted(r) for r in meshes.values()]}, "
                "of which none contains the others: give each mesh an optimizer of its own"
            )
        self.averaged = _positions_to_average(params, meshes, group)
        self._share = {
            param: _shards(param) / len(everyone) if is_dtensor(param) else 1 / len(everyone)
            for param in params
        }

    def check_reached(self, rows: Mapping[str, Gradient]) -> None:
        """Raise if no loss reaches any DTensor, as where FSDP2 is told not to reduce."""
        for gradient in rows.values():
            pairs = zip(gradient, self.params, strict=True)
            if any(found is not None and is_dtensor(param) for found, param in pairs):
                return
        raise RuntimeError(
            "no loss reaches a sharded parameter. Each loss's gradient is reduced by itself, in "
            "every backward(): leave FSDP2's set_requires_gradient_sync(True) as it is, in "
            "accumulation too; and build the optimizer after fully_shard(), before the first "
            "forward pass"
        )

    def flat(
        self, params: Sequence[Tensor], rows: Sequence[Gradient], *, keep: bool = False
    ) -> ShardedBlock:
        """As :class:`FlatBlock`, of the local parts."""
        return ShardedBlock(params, rows, [self._share[param] for param in params], keep=keep)

    def total(self, grams: Sequence[Tensor]) -> list[Tensor]:
        """Gram matrices of whole gradients from those of their local parts."""
        return summed(grams, self._mesh.get_all_groups())


class ShardedBlock:
    """A :class:`FlatBlock` for each degree of replication, told as one.

    Args:
        params: the parameters of the block.
        rows: the local parts of the gradients; emptied.
        shares: for each parameter the part that an inner product of its local gradients counts.
        keep: as in :class:`FlatBlock`.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        rows: Sequence[Gradient],
        shares: Sequence[float],
        *,
        keep: bool,
    ) -> None:
        self._params = params
        self._parts: list[tuple[float, list[int], FlatBlock]] = []
        for share in dict.fromkeys(shares):
            positions = [index for index, other in enumerate(shares) if other == share]
            members = [local_part(params[position]) for position in positions]
            taken = [[row[position] for position in positions] for row in rows]
            self._parts.append((share, positions, FlatBlock(members, taken, keep=keep)))
        for row in rows:
            row[:] = [None] * len(row)

    @property
    def dtype(self) -> torch.dtype:
        """As of :class:`FlatBlock`."""
        return min((flat.dtype for _, _, flat in self._parts), key=lambda d: d.itemsize)

    def gram(self, *, quick: bool = True) -> Tensor:
        """This rank's part of the inner products of the rows, shape ``(rows, rows)``."""
        parts = [share * flat.gram(quick=quick) for share, _, flat in self._parts]
        return torch.stack([part.to(parts[0].device, non_blocking=True) for part in parts]).sum(0)

    def sum(self) -> list[Tensor]:
        """The sum of the rows: one new tensor for each parameter, sharded as it is."""
        return self._whole([flat.sum() for _, _, flat in self._parts])

    def combine(self, coefficients: Tensor) -> list[Tensor]:
        """``sum_i c_i row_i``, as :meth:`sum`; ``coefficients`` has shape ``(rows,)``."""
        return self._whole([flat.combine(coefficients) for _, _, flat in self._parts])

    def combine_and_stretch(
        self, coefficients: Tensor, gamma: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Refused before it comes to this: it would need the norms of whole tensors."""
        raise NotImplementedError

    def _whole(self, found: Sequence[list[Tensor]]) -> list[Tensor]:
        results: dict[int, Tensor] = {}
        for (_, positions, _), tensors in zip(self._parts, found, strict=True):
            results.update(zip(positions, tensors, strict=True))
        return [_spread_as(param, results[i]) for i, param in enumerate(self._params)]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    # Only where torch.distributed is initialised: the import takes half a second.
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    with torch.no_grad():
        return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def gradients_by_backward(
    loss: Tensor, params: Sequence[Tensor], *, retain_graph: bool
) -> list[Tensor | None]:
    """As ``torch.autograd.grad``, by ``loss.backward()``: the local parts of the gradients.

    FSDP2's graph ends at parameters of its own, which live while they are unsharded; the
    gradient of the DTensor that the optimizer holds is only ever found in its ``.grad``.
    """
    before = [param.grad for param in params]
    try:
        for param in params:
            param.grad = None
        loss.backward(retain_graph=retain_graph)
        return [_local_gradient(param) for param in params]
    finally:
        for param, gradient in zip(params, before, strict=True):
            param.grad = gradient


def _local_gradient(param: Tensor) -> Tensor | None:
    if param.grad is None or not is_dtensor(param.grad):
        return param.grad
    gradient: Any = param.grad
    placements = param.placements  # type: ignore[attr-defined]
    if gradient.placements != placements:  # a sum that is still to be made, say
        gradient = gradient.redistribute(placements=placements)
    return local_part(gradient)


def _spread_as(param: Tensor, local: Tensor) -> Tensor:
    if not is_dtensor(param):
        return local
    from torch.distributed.tensor import DTensor

    spread = partial(DTensor.from_local, run_check=False, shape=param.shape, stride=param.stride())
    return spread(local, param.device_mesh, param.placements)  # type: ignore[attr-defined]


def _dtensors(params: Sequence[Any]) -> list[Any]:
    return [param for param in params if is_dtensor(param)]


def _shards(param: Any) -> int:
    sizes = zip(param.device_mesh.shape, param.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())


def _ranks_of(mesh: Any) -> set[int]:
    return set(mesh.mesh.flatten().tolist())


def _positions_to_average(
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
