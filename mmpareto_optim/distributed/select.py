"""Which of the ways several processes act as one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmpareto_optim.distributed.single import Processes, SingleProcess

if TYPE_CHECKING:  # not in every build
    from torch.distributed import ProcessGroup

    from mmpareto_optim.distributed.data_parallel import DataParallel
    from mmpareto_optim.distributed.sharded import Sharded

REDUCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class ProcessSelection:
    """Finds the processes that integrate as one, and keeps what it found while nothing changes.

    Args:
        process_group: the processes to average over; None for all.
        average_gradients: False where each process trains a model of its own.
        reduce_dtype: in what dtype gradients are averaged, or None for their own.

    Raises:
        ValueError: an unknown ``reduce_dtype``; a group that this process is not in; one of both
            with ``average_gradients=False``.
    """

    def __init__(
        self,
        process_group: "ProcessGroup | None",
        average_gradients: bool,
        reduce_dtype: torch.dtype | None,
    ) -> None:
        _check_reduce_dtype(reduce_dtype, average_gradients)
        if process_group is not None:
            _check_group(process_group, average_gradients)
        self.process_group = process_group
        self.average_gradients = average_gradients
        self.reduce_dtype = reduce_dtype
        self._single = SingleProcess()
        self._data_parallel: DataParallel | None = None
        self._sharded: Sharded | None = None

    def of(self, params: Sequence[Tensor]) -> Processes:
        """The processes for some parameters.

        Raises:
            ValueError: parameters of FSDP1 or of DeepSpeed's ZeRO 3; device meshes that do not
                fit each other or the process group.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self._single
        averaging = self._averaging()
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
        from mmpareto_optim.distributed.dtensors import is_dtensor
        from mmpareto_optim.distributed.sharded import Sharded

        if not any(map(is_dtensor, params)):
            return averaging if averaging is not None else self._single
        if self._sharded is None or not self._sharded.is_of(params, averaging):
            self._sharded = Sharded(params, averaging)
        return self._sharded

    def _averaging(self) -> "DataParallel | None":
        from mmpareto_optim.distributed.data_parallel import DataParallel

        if not self.average_gradients:
            return None
        group: Any = self.process_group or torch.distributed.group.WORLD
        if self._data_parallel is None or self._data_parallel.group is not group:
            self._data_parallel = DataParallel(group, self.reduce_dtype)
        return self._data_parallel if self._data_parallel.size > 1 else None

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                "a process group cannot be copied or pickled, nor can what holds one: save the "
                "optimizer's state_dict(), and build it anew"
            )
        return {"average_gradients": self.average_gradients, "reduce_dtype": self.reduce_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(None, **state)  # type: ignore[misc]


def _check_reduce_dtype(reduce_dtype: torch.dtype | None, average_gradients: bool) -> None:
    if reduce_dtype is None:
        return
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


def _check_group(group: Any, average_gradients: bool) -> None:
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
