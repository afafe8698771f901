"""What the processes that integrate as one have in common, whatever their number."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from mmpareto_optim.rows import Given, Row
from mmpareto_optim.types import Constants, Gradient


class Processes(Protocol):
    """One process, several that average, or shards."""

    @property
    def rounding(self) -> float:
        """Unit roundoff of the dtype that averages are made in, 0 if it is the gradients' own."""

    def failing_together(self) -> AbstractContextManager[None]:
        """An error in here becomes one on all processes, and ends the averages underway."""

    def check(self, stretches_tensors: bool, at_features: bool) -> None:
        """Raise ValueError if gradients cannot be integrated so."""

    def losses_of_all(self, names: Iterable[str], constants: Constants) -> list[str]:
        """The losses of all processes, in the order in which all differentiate them.

        Raises:
            DisagreementError: something that must be alike on all of them is not.
        """

    def differentiate(
        self,
        outputs: Sequence[Tensor],
        params: Sequence[Tensor],
        others: Sequence[Tensor],
        retain_graph: bool,
    ) -> Gradient:
        """The gradient of some outputs at the parts of the parameters that are held here."""

    def given_by_all(self, name: str, given: Given) -> Given:
        """For each parameter whether a loss gives it a gradient on any of the processes."""

    def average(self, row: Row) -> None:
        """Begin to average a row in place."""

    def wait(self) -> None:
        """Until all rows are averaged."""

    def local(self, param: Tensor) -> Tensor:
        """What this process holds of a parameter."""

    def spread(self, param: Tensor, local: Tensor) -> Tensor:
        """What ``.grad`` of a parameter is made of the part that this process holds."""

    @property
    def shares(self) -> tuple[float, ...] | None:
        """For each parameter what part of an inner product counts here; None for all of it."""

    def largest(self, sizes: Tensor) -> Tensor:
        """The largest of some sizes over the processes that share a gradient."""

    def grams(self, grams: Sequence[Tensor]) -> list[Tensor]:
        """Gram matrices of whole gradients, from those of the parts that are held here."""

    def largest_at_features(self, sizes: Tensor) -> Tensor:
        """As :meth:`largest`, of gradients that each process has for its examples."""

    def grams_at_features(self, grams: Sequence[Tensor]) -> list[Tensor]:
        """As :meth:`grams`, of gradients that each process has for its examples."""

    def all_of(self, flags: Sequence[bool]) -> list[bool]:
        """Whether something holds on all processes that share a parameter."""

    def same(self, value: Tensor) -> Tensor:
        """What one process found, for all: a function of the user's may be random."""

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes that average."""
