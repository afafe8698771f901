"""Parameters spread over processes: FSDP2 (``fully_shard``) and tensor parallelism."""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmpareto_optim.distributed.data_parallel import largest_over, sums_over
from mmpareto_optim.distributed.single import Processes
from mmpareto_optim.rows import Given, Row
from mmpareto_optim.types import Constants, Gradient


class Sharded(Processes):
    """Processes that hold parts of a model, and may average over others besides.

    Inner products are added up over the largest mesh. There each number is held by as many
    ranks as the mesh has for each shard, and counts for that part on each of them; a parameter
    that is no DTensor is held by all.
    """

    def __init__(self, params: Sequence[Tensor], averaging: Processes) -> None:
        self._params = params
        self._averaging = averaging
        self.rounding, self.writes_rows = averaging.rounding, averaging.writes_rows
        meshes = [param.device_mesh for param in params if isinstance(param, DTensor)]
        # In the order of the parameters, which is the same on all ranks.
        ranks = {mesh: frozenset(mesh.mesh.flatten().tolist()) for mesh in dict.fromkeys(meshes)}
        self._mesh, everyone = max(ranks.items(), key=lambda item: len(item[1]))
        averaged = averaging.ranks
        for some in ranks.values():
            if not some <= everyone:
                raise ValueError(
                    f"parameters lie on device meshes of ranks {sorted(everyone)} and "
                    f"{sorted(some)}, of which none contains the others: give each mesh an "
                    "optimizer of its own"
                )
            if len(averaged & some) > 1 and not averaged <= some:
                raise ValueError(
                    f"gradients are to be averaged over ranks {sorted(averaged)}, and some "
                    f"parameters are sharded over {sorted(some)} of them: pass the data-parallel "
                    "processes alone, as in process_group=mesh['dp'].get_group()"
                )
        # Not over a mesh, which has averaged by itself.
        self._positions_to_average = tuple(
            position
            for position, param in enumerate(params)
            if not isinstance(param, DTensor) or not averaged <= ranks[param.device_mesh]
        )
        self.shares = tuple(_shards_of(param) / len(everyone) for param in params)
        self._any_reached = False

    def is_of(self, params: Sequence[Tensor], averaging: Processes) -> bool:
        """Whether this is for some parameters and processes."""
        return averaging is self._averaging and list(map(id, params)) == list(map(id, self._params))

    def failing_together(self) -> AbstractContextManager[None]:
        return self._averaging.failing_together()

    def check(self, stretches_tensors: bool, at_features: bool) -> None:
        """Raise ValueError where shards would have to be whole."""
        if at_features:
            raise ValueError(
                "features cannot be integrated where parameters are sharded (DTensors): leave "
                "features out for the exact gradients"
            )
        if stretches_tensors:
            raise ValueError(
                'rescale="tensor" needs the norm of each parameter tensor, and these are sharded '
                '(DTensors): use rescale="encoder"'
            )

    def losses_of_all(self, names: Iterable[str], constants: Constants) -> list[str]:
        """Those that all have: a backward of shards is collective by itself."""
        names = tuple(names)
        self._any_reached = False
        return self._averaging.losses_of_all(names, lambda: (*constants(), ("losses", names)))

    def differentiate(
        self,
        outputs: Sequence[Tensor],
        params: Sequence[Tensor],
        others: Sequence[Tensor],
        retain_graph: bool,
    ) -> Gradient:
        """By ``backward()``: the local parts of the gradients.

        FSDP2's graph ends at parameters of its own, which live while they are unsharded; the
        gradient of the DTensor that the optimizer holds is only ever found in its ``.grad``.
        """
        torch.autograd.backward(outputs, retain_graph=retain_graph)
        found: Gradient = []
        for param in params:
            gradient, param.grad = param.grad, None
            placements = getattr(param, "placements", None)
            if isinstance(gradient, DTensor) and gradient.placements != placements:
                gradient = gradient.redistribute(placements=placements)  # a sum to be made, say
            found.append(None if gradient is None else self.local(gradient))
        return found

    def given_by_all(self, name: str, given: Given, *, averages: bool = True) -> Given:
        pairs = zip(given, self._params, strict=True)
        self._any_reached |= any(there and isinstance(param, DTensor) for there, param in pairs)
        return self._averaging.given_by_all(name, given)

    def average(self, row: Row, positions: tuple[int, ...] | None = None) -> None:
        self._averaging.average(row, self._positions_to_average)

    def wait(self) -> None:
        """Raise RuntimeError if no loss reaches a DTensor, as where FSDP2 does not reduce."""
        if not self._any_reached:
            raise RuntimeError(
                "no loss reaches a sharded parameter. Each loss's gradient is reduced by itself, "
                "in every backward(): leave FSDP2's set_requires_gradient_sync(True) as it is, in "
                "accumulation too; and build the optimizer after fully_shard(), before the first "
                "forward pass"
            )
        self._averaging.wait()

    def local(self, param: Tensor) -> Tensor:
        with torch.no_grad():
            return param.to_local() if isinstance(param, DTensor) else param

    def spread(self, param: Tensor, local: Tensor) -> Tensor:
        if not isinstance(param, DTensor):
            return local
        mesh, placements, shape, stride = (
            param.device_mesh,
            param.placements,
            param.shape,
            param.stride(),
        )
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=shape, stride=stride
        )

    def largest(self, sizes: Tensor, at_features: bool) -> Tensor:
        return largest_over(self._mesh.get_all_groups(), sizes)

    def grams(self, grams: Sequence[Tensor], at_features: bool) -> list[Tensor]:
        return sums_over(self._mesh.get_all_groups(), grams)

    def all_of(self, flags: Sequence[bool]) -> list[bool]:
        held = torch.tensor(flags, dtype=torch.int32, device=self._mesh.device_type)
        for group in self._mesh.get_all_groups():
            dist.all_reduce(held, op=dist.ReduceOp.MIN, group=group)
        return held.bool().tolist()

    def agree_to_write(self) -> None:
        self._averaging.agree_to_write()

    def same(self, value: Tensor) -> Tensor:
        return self._averaging.same(value)

    def mean(self, value: Tensor) -> Tensor:
        return self._averaging.mean(value.full_tensor() if isinstance(value, DTensor) else value)


def _shards_of(param: Tensor) -> int:
    """In how many parts a parameter is cut."""
    if not isinstance(param, DTensor):
        return 1
    sizes = zip(param.device_mesh.shape, param.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())
