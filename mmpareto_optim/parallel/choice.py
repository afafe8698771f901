"""Which of the ways several processes act as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmpareto_optim.ground import same_objects
from mmpareto_optim.parallel.alone import Alone

REDUCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_averaging(group: Any, average_gradients: bool, reduce_dtype: torch.dtype | None) -> None:
    """Raise unless ``group`` is None, or a process group of this process to average over."""
    if reduce_dtype is not None:
        if reduce_dtype not in REDUCE_DTYPES:
            raise ValueError(
                f"reduce_dtype must be one of {', '.join(map(str, REDUCE_DTYPES))}, or None for "
                f"that of each gradient, got {reduce_dtype!r}"
            )
        if not average_gradients:
            raise ValueError(
                f"reduce_dtype={reduce_dtype} is how gradients are averaged over processes, and "
                "average_gradients is False: leave one of them out"
            )
    if group is None:
        return
    if not average_gradients:
        raise ValueError(
            "process_group names the processes to average over, and average_gradients is "
            "False: leave one of them out"
        )
    dist = torch.distributed
    ready = dist.is_available() and dist.is_initialized()
    if not ready or not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"process_group must be a torch.distributed.ProcessGroup that rank "
            f"{dist.get_rank() if ready else 0} belongs to, got {group!r}: pass the "
            "result of dist.new_group() on the ranks that are in it, or of mesh.get_group()"
        )


class Choice:
    """Finds the processes that integrate as one, and keeps what it found while nothing changes.

    Args:
        process_group: the processes to average over; None for all.
        average_gradients: False where each process trains a model of its own.
        reduce_dtype: in what dtype gradients are averaged, or None for their own.
    """

    def __init__(
        self, process_group: Any, average_gradients: bool, reduce_dtype: torch.dtype | None
    ) -> None:
        self.process_group = process_group
        self.average_gradients = average_gradients
        self.reduce_dtype = reduce_dtype
        self._alone = Alone()
        self._averaged: Any = None
        self._sharded: tuple[Sequence[Tensor], Alone, Alone] | None = None

    def of(self, params: Sequence[Tensor]) -> Alone:
        """The processes for some parameters.

        Raises:
            ValueError: parameters of FSDP1 or of DeepSpeed's ZeRO 3; device meshes that do not
                fit each other or the process group.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self._alone
        beside = self._averaging()
        if any(hasattr(param, "_fsdp_flattened") for param in params):
            raise ValueError(
                "the parameters belong to FullyShardedDataParallel (FSDP1), which reduces no "
                "gradient of a single loss: shard the model with "
                "torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        if any(hasattr(param, "ds_status") for param in params):
            raise ValueError(
                "the parameters are partitioned by DeepSpeed's ZeRO 3, which leaves them empty "
                "between its own passes: use ZeRO 1 or 2 as the recipe for DeepSpeed has it, or "
                "shard the model with torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        # Only where several processes are: the import takes half a second.
        from mmpareto_optim.parallel.dtensors import is_dtensor
        from mmpareto_optim.parallel.sharded import Sharded

        if not any(map(is_dtensor, params)):
            return beside
        known = self._sharded
        if known is None or known[1] is not beside or not same_objects(known[0], params):
            self._sharded = known = (params, beside, Sharded(params, beside))
        return known[2]

    def _averaging(self) -> Alone:
        from mmpareto_optim.parallel.averaged import Averaged

        if not self.average_gradients:
            return self._alone
        group = self.process_group or torch.distributed.group.WORLD
        if self._averaged is None or self._averaged.group is not group:
            self._averaged = Averaged(group, self.reduce_dtype)
        return self._averaged if self._averaged.size > 1 else self._alone
