"""What the processes that integrate as one do, whatever their number; and the plain case of one."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

from mmpareto_optim.autograd import by_autograd
from mmpareto_optim.rows import Given, Row
from mmpareto_optim.types import Constants, Gradient


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
