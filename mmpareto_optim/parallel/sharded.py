"""Parameters spread over processes: FSDP2 (``fully_shard``) and tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmpareto_optim.blocks import largest_of, numbers_of
from mmpareto_optim.flat.block import FlatBlock
from mmpareto_optim.gradients.losses import Losses
from mmpareto_optim.ground import Gradient, Gradients
from mmpareto_optim.parallel.alone import Alone
from mmpareto_optim.parallel.averaged import Averaged, summed
from mmpareto_optim.parallel.dtensors import (
    dtensors,
    is_dtensor,
    local_part,
    positions_to_average,
    ranks_of,
    shards_of,
    spread_as,
    whole,
)


class Sharded(Alone):
    """Processes that hold parts of a model, and may average over others besides.

    Inner products are added up over the largest mesh. There each number is held by as many
    ranks as the mesh has for each shard, and counts for that part on each of them; a parameter
    that is no DTensor is held by all.

    Args:
        params: the parameters, DTensors among them.
        beside: the processes to average over, or this one alone.

    Raises:
        ValueError: meshes of which none contains the others, or a process group that overlaps
            with a mesh in part.
    """

    def __init__(self, params: Sequence[Tensor], beside: Alone) -> None:
        self._beside = beside
        meshes = {param.device_mesh: ranks_of(param.device_mesh) for param in dtensors(params)}
        self._mesh, everyone = max(meshes.items(), key=lambda item: len(item[1]))
        if not all(ranks <= everyone for ranks in meshes.values()):
            raise ValueError(
                f"parameters lie on device meshes of ranks {[sorted(r) for r in meshes.values()]}, "
                "of which none contains the others: give each mesh an optimizer of its own"
            )
        group = beside.group if isinstance(beside, Averaged) else None
        self._averaged = positions_to_average(params, meshes, group)
        self._share = {
            param: shards_of(param) / len(everyone) if is_dtensor(param) else 1 / len(everyone)
            for param in params
        }
        self.failing_together = beside.failing_together  # type: ignore[method-assign]
        self.same = beside.same  # type: ignore[method-assign]

    def agree(
        self,
        losses: Iterable[str],
        params: Sequence[Tensor],
        constants: Any,
        *,
        one_by_one: bool,
    ) -> None:
        """As :meth:`Averaged.compare`: a backward of shards is collective by itself."""
        if isinstance(self._beside, Averaged):
            self._beside.compare((*constants, ("losses", tuple(losses))))

    def check_method(self, by_tensor: bool, at_features: bool) -> None:
        """Raise ValueError where shards would have to be whole."""
        if at_features:
            raise ValueError(
                "features cannot be integrated where parameters are sharded (DTensors): leave "
                "features out for the exact gradients"
            )
        if by_tensor:
            raise ValueError(
                'rescale="tensor" needs the norm of each parameter tensor, and these are sharded '
                '(DTensors): use rescale="encoder"'
            )

    @staticmethod
    def leaves_not_among(params: Sequence[Tensor], losses: Losses) -> list[Tensor]:
        """None to speak of: all are passed through, and FSDP2's own are among them."""
        return []

    @staticmethod
    def differentiate(
        outputs: Sequence[Tensor],
        params: Sequence[Tensor],
        *,
        others: Sequence[Tensor] = (),
        retain_graph: bool,
    ) -> Gradient:
        """By ``backward()``: the local parts of the gradients.

        FSDP2's graph ends at parameters of its own, which live while they are unsharded; the
        gradient of the DTensor that the optimizer holds is only ever found in its ``.grad``.
        """
        torch.autograd.backward(outputs, retain_graph=retain_graph)
        found = [_local_gradient(param) for param in params]
        for param in params:
            param.grad = None
        return found

    def averaged(self, found: Gradients, params: Sequence[Tensor], constants: Any) -> Gradients:
        """Means over the processes that have no part in a mesh, which has made its own.

        Raises:
            RuntimeError: no loss reaches any DTensor, as where FSDP2 is told not to reduce.
        """
        self._check_reached(found, params)
        if not isinstance(self._beside, Averaged):
            return found
        likes = [local_part(param) for param in params]
        return self._beside.averaged_at(found, likes, constants, self._averaged)

    def largest(self, tensors: Sequence[Tensor]) -> list[float]:
        """Over all parts; infinite for NaN, which a maximum could lose."""
        sizes = largest_of(tensors).nan_to_num(nan=torch.inf, posinf=torch.inf)
        for group in self._mesh.get_all_groups():
            dist.all_reduce(sizes, op=dist.ReduceOp.MAX, group=group)
        return numbers_of(sizes)

    def on_all(self, facts: Sequence[bool | Tensor]) -> Sequence[bool | Tensor]:
        """What holds for all parts of a parameter."""
        device = self._mesh.device_type
        held = torch.stack([torch.as_tensor(fact, device=device) for fact in facts]).int()
        for group in self._mesh.get_all_groups():
            dist.all_reduce(held, op=dist.ReduceOp.MIN, group=group)
        return held.bool().tolist() if device == "cpu" else held.bool().unbind()

    def flat(
        self, params: Sequence[Tensor], rows: Sequence[Gradient], *, keep: bool = False
    ) -> ShardedBlock:
        """The local parts of a block's gradients."""
        shares = [self._share[param] for param in params]
        return ShardedBlock(params, rows, shares, keep=keep, rounded=self._beside.rounded)

    def grams(self, flats: Sequence[Any]) -> list[Tensor]:
        """Gram matrices of whole gradients, from those of their local parts."""
        return summed([flat.gram() for flat in flats], self._mesh.get_all_groups())

    def own_part(self, param: Tensor) -> Tensor:
        """What this rank holds of a parameter."""
        return local_part(param)

    def whole(self, param: Tensor, part: Tensor) -> Tensor:
        """A tensor that is spread over the processes as a parameter is."""
        return spread_as(param, part)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes that average."""
        return self._beside.mean(whole(value))

    def _check_reached(self, found: Gradients, params: Sequence[Tensor]) -> None:
        for gradient in found.rows.values():
            pairs = zip(gradient, params, strict=True)
            if any(part is not None and is_dtensor(param) for part, param in pairs):
                return
        raise RuntimeError(
            "no loss reaches a sharded parameter. Each loss's gradient is reduced by itself, in "
            "every backward(): leave FSDP2's set_requires_gradient_sync(True) as it is, in "
            "accumulation too; and build the optimizer after fully_shard(), before the first "
            "forward pass"
        )


class ShardedBlock:
    """A :class:`FlatBlock` for each degree of replication, told as one.

    Args:
        params: the parameters of the block.
        rows: the local parts of the gradients; emptied.
        shares: for each parameter the part that an inner product of its local gradients counts.
        keep: as in :class:`FlatBlock`.
        rounded: as in :class:`FlatBlock`.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        rows: Sequence[Gradient],
        shares: Sequence[float],
        *,
        keep: bool,
        rounded: float,
    ) -> None:
        self._params = params
        self._parts: list[tuple[float, list[int], FlatBlock]] = []
        for share in dict.fromkeys(shares):
            positions = [index for index, other in enumerate(shares) if other == share]
            members = [local_part(params[position]) for position in positions]
            taken = [[row[position] for position in positions] for row in rows]
            self._parts.append(
                (share, positions, FlatBlock(members, taken, keep=keep, rounded=rounded))
            )
        for row in rows:
            row[:] = [None] * len(row)

    @property
    def dtype(self) -> torch.dtype:
        """As of :class:`FlatBlock`."""
        return min((flat.dtype for _, _, flat in self._parts), key=lambda d: d.itemsize)

    @property
    def errors(self) -> tuple[float, float]:
        """As of :class:`FlatBlock`."""
        eps, written = zip(*(flat.errors for _, _, flat in self._parts), strict=True)
        return max(eps), max(written)

    def gram(self) -> Tensor:
        """This rank's part of the inner products of the rows, shape ``(rows, rows)``."""
        parts = [share * flat.gram(quick=False) for share, _, flat in self._parts]
        return torch.stack([part.to(parts[0].device, non_blocking=True) for part in parts]).sum(0)

    def combine(self, coefficients: Tensor) -> list[Tensor]:
        """``sum_i c_i row_i``, the local part for each parameter."""
        results: dict[int, Tensor] = {}
        for _, positions, flat in self._parts:
            results.update(zip(positions, flat.combine(coefficients), strict=True))
        return [results[i] for i in range(len(self._params))]


def _local_gradient(param: Tensor) -> Tensor | None:
    if param.grad is None or not is_dtensor(param.grad):
        return param.grad
    gradient: Any = param.grad
    placements = param.placements  # type: ignore[attr-defined]
    if gradient.placements != placements:  # a sum that is still to be made, say
        gradient = gradient.redistribute(placements=placements)
    return local_part(gradient)
