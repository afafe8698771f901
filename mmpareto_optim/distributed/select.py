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

UNSUPPORTED = {
    "_fsdp_flattened": "the parameters belong to FullyShardedDataParallel (FSDP1), which reduces "
    "no gradient of a single loss: shard",
    "ds_status": "the parameters are partitioned by DeepSpeed's ZeRO 3, which leaves them empty "
    "between its own passes: use ZeRO 1 or 2 as the recipe for DeepSpeed has it, or shard",
}
"""By an attribute that some library gives its parameters, what cannot be done with them."""


class ProcessSelection:
    """Finds the processes that integrate as one, and keeps what it found while nothing changes.

    Arguments and errors are those of :class:`MMParetoOptimizer`.
    """

    def __init__(
        self,
        process_group: "ProcessGroup | None",
        average_gradients: bool,
        reduce_dtype: torch.dtype | None,
    ) -> None:
        if reduce_dtype not in (None, *REDUCE_DTYPES):
            raise ValueError(
                f"reduce_dtype must be one of {', '.join(map(str, REDUCE_DTYPES))}, or None for "
                f"that of each gradient, got {reduce_dtype!r}"
            )
        for name, given in (("process_group", process_group), ("reduce_dtype", reduce_dtype)):
            if given is not None and not average_gradients:
                raise ValueError(
                    f"{name}={given} is how gradients are averaged over processes, and "
                    "average_gradients is False: leave one of them out"
                )
        dist = torch.distributed
        ready = dist.is_available() and dist.is_initialized()
        if process_group is not None and not (
            ready and isinstance(process_group, dist.ProcessGroup)
        ):
            raise ValueError(
                "process_group must be a torch.distributed.ProcessGroup that rank "
                f"{dist.get_rank() if ready else 0} belongs to, got {process_group!r}: pass the "
                "result of dist.new_group() on the ranks that are in it, or of mesh.get_group()"
            )
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
        for attribute, problem in UNSUPPORTED.items():
            if any(hasattr(param, attribute) for param in params):
                raise ValueError(
                    f"{problem} the model with torch.distributed.fsdp.fully_shard (FSDP2)"
                )
        # Only where several processes are: the import takes half a second.
        from torch.distributed.tensor import DTensor

        from mmpareto_optim.distributed.sharded import Sharded

        averaging = self._averaging()
        if not any(isinstance(param, DTensor) for param in params):
            return averaging
        if self._sharded is None or not self._sharded.is_of(params, averaging):
            self._sharded = Sharded(params, averaging)
        return self._sharded

    def _averaging(self) -> Processes:
        from mmpareto_optim.distributed.data_parallel import DataParallel

        if not self.average_gradients:
            return self._single
        group: Any = self.process_group or torch.distributed.group.WORLD
        if self._data_parallel is None or self._data_parallel.group is not group:
            self._data_parallel = DataParallel(group, self.reduce_dtype)
        return self._data_parallel if len(self._data_parallel.ranks) > 1 else self._single

    def __reduce__(self) -> tuple[Any, ...]:
        if self.process_group is not None:
            raise TypeError(
                "a process group cannot be copied or pickled, nor can what holds one: save the "
                "optimizer's state_dict(), and build it anew"
            )
        return ProcessSelection, (None, self.average_gradients, self.reduce_dtype)
