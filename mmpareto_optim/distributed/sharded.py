"""Parameters spread over processes: FSDP2 (``fully_shard``) and tensor parallelism."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmpareto_optim.distributed.data_parallel import DataParallel, summed
from mmpareto_optim.distributed.dtensors import (
    dtensors,
    is_dtensor,
    local_part,
    positions_to_average,
    ranks_of,
    shards_of,
    spread_as,
    whole,
)
from mmpareto_optim.distributed.single import Processes
from mmpareto_optim.rows import Given, Row
from mmpareto_optim.types import Constants, Gradient


class Sharded(Processes):
    """Processes that hold parts of a model, and may average over others besides.

    Inner products are added up over the largest mesh. There each number is held by as many
    ranks as the mesh has for each shard, and counts for that part on each of them; a parameter
    that is no DTensor is held by all.

    Args:
        params: the parameters, DTensors among them.
        averaging: the processes to average over, or None.

    Raises:
        ValueError: meshes of which none contains the others, or a process group that overlaps
            with a mesh in part.
    """

    def __init__(self, params: Sequence[Tensor], averaging: DataParallel | None) -> None:
        self._params = params
        self._averaging = averaging
        meshes = {param.device_mesh: ranks_of(param.device_mesh) for param in dtensors(params)}
        self._mesh, everyone = max(meshes.items(), key=lambda item: len(item[1]))
        if not all(ranks <= everyone for ranks in meshes.values()):
            raise ValueError(
                f"parameters lie on device meshes of ranks {[sorted(r) for r in meshes.values()]}, "
                "of which none contains the others: give each mesh an optimizer of its own"
            )
        group = None if averaging is None else averaging.group
        self._positions_to_average = positions_to_average(params, meshes, group)
        self.shares = tuple(
            shards_of(param) / len(everyone) if is_dtensor(param) else 1 / len(everyone)
            for param in params
        )
        self.rounding = 0.0 if averaging is None else averaging.rounding
        self.writes_rows = averaging is not None
        self._any_reached = False

    def is_of(self, params: Sequence[Tensor], averaging: DataParallel | None) -> bool:
        """Whether this is for some parameters and processes."""
        return (
            averaging is self._averaging
            and len(params) == len(self._params)
            and all(one is other for one, other in zip(params, self._params, strict=True))
        )

    def failing_together(self) -> AbstractContextManager[None]:
        if self._averaging is None:
            return super().failing_together()
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
        """The own ones: a backward of shards is collective by itself, so all have the same."""
        names = list(names)
        self._any_reached = False
        if self._averaging is not None:
            self._averaging.check_alike((*constants, ("losses", tuple(names))))
        return names

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
        found = [_local_gradient(param) for param in params]
        for param in params:
            param.grad = None
        return found

    def given_by_all(self, name: str, given: Given) -> Given:
        pairs = zip(given, self._params, strict=True)
        self._any_reached |= any(there and is_dtensor(param) for there, param in pairs)
        return given if self._averaging is None else self._averaging.given_by_all(name, given)

    def average(self, row: Row) -> None:
        """Over the processes that have no part in a mesh, which has averaged by itself."""
        if self._averaging is not None:
            self._averaging.average_at(row, self._positions_to_average)

    def wait(self) -> None:
        """Until all rows are averaged.

        Raises:
            RuntimeError: no loss reaches any DTensor, as where FSDP2 is told not to reduce.
        """
        if not self._any_reached:
            raise RuntimeError(
                "no loss reaches a sharded parameter. Each loss's gradient is reduced by itself, "
                "in every backward(): leave FSDP2's set_requires_gradient_sync(True) as it is, in "
                "accumulation too; and build the optimizer after fully_shard(), before the first "
                "forward pass"
            )
        if self._averaging is not None:
            self._averaging.wait()

    def local(self, param: Tensor) -> Tensor:
        return local_part(param)

    def spread(self, param: Tensor, local: Tensor) -> Tensor:
        return spread_as(param, local)

    def largest(self, sizes: Tensor, at_features: bool) -> Tensor:
        """Over all parts; infinite for NaN, which a maximum could lose."""
        sizes = sizes.nan_to_num(nan=torch.inf, posinf=torch.inf)
        for group in self._mesh.get_all_groups():
            dist.all_reduce(sizes, op=dist.ReduceOp.MAX, group=group)
        return sizes

    def grams(self, grams: Sequence[Tensor], at_features: bool) -> list[Tensor]:
        """Gram matrices of whole gradients, from those of their local parts."""
        return summed(grams, self._mesh.get_all_groups())

    def all_of(self, flags: Sequence[bool]) -> list[bool]:
        """What holds for all parts of a parameter."""
        held = torch.tensor(flags, dtype=torch.int32, device=self._mesh.device_type)
        for group in self._mesh.get_all_groups():
            dist.all_reduce(held, op=dist.ReduceOp.MIN, group=group)
        return held.bool().tolist()

    def same(self, value: Tensor) -> Tensor:
        return value if self._averaging is None else self._averaging.same(value)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes that average."""
        value = whole(value)
        return value if self._averaging is None else self._averaging.mean(value)


def _local_gradient(param: Tensor) -> Tensor | None:
    if param.grad is None or not is_dtensor(param.grad):
        return param.grad
    gradient: Any = param.grad
    placements = param.placements  # type: ignore[attr-defined]
    if gradient.placements != placements:  # a sum that is still to be made, say
        gradient = gradient.redistribute(placements=placements)
    return local_part(gradient)
