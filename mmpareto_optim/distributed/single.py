"""What the processes that integrate as one do; the plain case of one, and how others are found."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mmpareto_optim.autograd import by_autograd
from mmpareto_optim.rows import Given, Row
from mmpareto_optim.types import Constants, Gradient

if TYPE_CHECKING:  # not in every build
    from torch.distributed import ProcessGroup

    from mmpareto_optim.distributed.data_parallel import DataParallel
    from mmpareto_optim.distributed.sharded import Sharded


class Processes(Protocol):
    """One process, several that average, or shards. What is here is right for one process.

    Attributes:
        ranks: those that gradients are averaged over.
        rounding: unit roundoff of the dtype that averages are made in, 0 if it is the gradients'.
        shares: for each parameter what part of an inner product counts here; None for all of it.
        writes_rows: whether rows are averaged, in place.
    """

    ranks: frozenset[int] = frozenset()
    rounding: float = 0.0
    shares: tuple[float, ...] | None = None
    writes_rows: bool = False

    def failing_together(self) -> AbstractContextManager[None]:
        """An error in here becomes one on all processes, and ends the averages underway."""
        return nullcontext()

    def check(self, stretches_tensors: bool, at_features: bool) -> None:
        """Raise ValueError if gradients cannot be integrated so."""
        if stretches_tensors and at_features:
            raise ValueError(
                'rescale="tensor" stretches the gradients of parameter tensors one by one, '
                'and features are integrated before there are any: use rescale="encoder"'
            )

    def losses_of_all(self, names: Iterable[str], constants: Constants) -> list[str]:
        """The losses of all processes, in the order in which all differentiate them.

        Raises:
            DisagreementError: something that must be alike on all of them is not.
        """
        return list(names)

    def differentiate(
        self,
        outputs: Sequence[Tensor],
        params: Sequence[Tensor],
        others: Sequence[Tensor],
        retain_graph: bool,
    ) -> Gradient:
        """The gradient of some outputs at the parts of the parameters that are held here."""
        return by_autograd(outputs, params, others, retain_graph=retain_graph)

    def given_by_all(self, name: str, given: Given, *, averages: bool = True) -> Given:
        """For each parameter whether a loss gives it a gradient on any process, before averages."""
        return given

    def average(self, row: Row, positions: tuple[int, ...] | None = None) -> None:
        """Begin to average a row in place, or the gradients of some parameters in it."""
        return

    def wait(self) -> None:
        """Until all rows are averaged."""
        return

    def local(self, param: Tensor) -> Tensor:
        """What this process holds of a parameter."""
        return param

    def spread(self, param: Tensor, local: Tensor) -> Tensor:
        """What ``.grad`` of a parameter is made of the part that this process holds."""
        return local

    def largest(self, sizes: Tensor, at_features: bool) -> Tensor:
        """The largest of some sizes over the processes that have a part of a gradient."""
        return sizes

    def grams(self, grams: Sequence[Tensor], at_features: bool) -> list[Tensor]:
        """Gram matrices of whole gradients, from those of the parts that are held here."""
        return list(grams)

    def all_of(self, flags: Sequence[bool]) -> list[bool]:
        """Whether something holds on all processes that share a parameter."""
        return list(flags)

    def agree_to_write(self) -> None:
        """All have what they are about to write; an error of one is one of all."""
        return

    def same(self, value: Tensor) -> Tensor:
        """What one process found, for all: a function of the user's may be random."""
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes that average."""
        return value


class SingleProcess(Processes):
    """A process that trains a model of its own."""


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
