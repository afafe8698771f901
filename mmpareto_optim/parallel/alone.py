"""One process: the methods of the other ways, with nothing to agree on."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor

from mmpareto_optim.blocks import largest_of, numbers_of
from mmpareto_optim.flat.block import FlatBlock
from mmpareto_optim.gradients.exact import Differentiate, by_autograd, leaves_not_among
from mmpareto_optim.ground import Gradient, Gradients


class Underway(Protocol):
    """Averages of one loss's gradient after the other, each made while the next one is found."""

    def begin(self, name: str, gradient: Gradient) -> None:
        """Begin to average a loss's gradient, which is emptied."""

    def finished(self) -> Gradients:
        """Those of all losses, averaged."""

    def abandoned(self) -> None:
        """What was begun is not needed, as another loss could not be differentiated."""


class Alone:
    """A process that trains a model of its own."""

    differentiate: Differentiate = staticmethod(by_autograd)
    """How a loss's gradient at the parameters is found on this process."""

    parts = 1
    """Of how many parts, one a process, the gradients of one backward are the mean."""

    rounded = 0.0
    """Unit roundoff of the dtype that averages are made in, if it is not the gradients' own."""

    leaves_not_among = staticmethod(leaves_not_among)
    """The leaves behind some losses that are not among the parameters."""

    def failing_together(self) -> AbstractContextManager[None]:
        """An error in here becomes one on all processes."""
        return nullcontext()

    def agree(
        self,
        losses: Iterable[str],
        params: Sequence[Tensor],
        constants: Any,
        *,
        one_by_one: bool,
    ) -> Underway | None:
        """Before losses are differentiated.

        Args:
            losses: their names.
            params: the parameters.
            constants: by name, what must be alike on all processes.
            one_by_one: whether each loss's gradient is found, and not needed as it is.

        Returns:
            What averages their gradients one by one in place of :meth:`averaged`, or None.

        Raises:
            DisagreementError: not all processes are about to do the same, where they have to.
        """
        return None

    def check_method(self, by_tensor: bool, at_features: bool) -> None:
        """Raise if gradients cannot be stretched by tensor, or integrated at features."""
        if by_tensor and at_features:
            raise ValueError(
                'rescale="tensor" stretches the gradients of parameter tensors one by one, '
                'and features are integrated before there are any: use rescale="encoder"'
            )

    def averaged(self, found: Gradients, params: Sequence[Tensor], constants: Any) -> Gradients:
        """The gradients of the whole batch.

        Args:
            found: those of this process's share.
            params: the parameters.
            constants: by name, what must be alike on all processes.
        """
        return found

    def united(
        self, rows: dict[str, Gradient], likes: Sequence[Tensor], constants: Any
    ) -> dict[str, Gradient]:
        """Gradients at features, of this process's examples, for each loss of any process."""
        return rows

    def largest(self, tensors: Sequence[Tensor]) -> list[float]:
        """The largest absolute value of each of some gradients, on the host."""
        return numbers_of(largest_of(tensors))

    def largest_at_features(self, tensors: Sequence[Tensor]) -> list[float]:
        """As :meth:`largest`, of gradients that each process has for its examples."""
        return self.largest(tensors)

    def on_all(self, facts: Sequence[bool | Tensor]) -> Sequence[bool | Tensor]:
        """Whether something holds on all processes that share a parameter."""
        return facts

    def flat(
        self, params: Sequence[Tensor], rows: Sequence[Gradient], *, keep: bool = False
    ) -> Any:
        """The rows of a block: a :class:`FlatBlock`, or what has its methods."""
        return FlatBlock(params, rows, keep=keep, rounded=self.rounded)

    def grams(self, flats: Sequence[Any]) -> list[Tensor]:
        """Gram matrices of blocks of parameters."""
        return [flat.gram() for flat in flats]

    def grams_at_features(self, flats: Sequence[Any]) -> list[Tensor]:
        """Gram matrices of gradients at features, which each process has for its examples."""
        return [flat.gram() for flat in flats]

    def grams_of_parts(self, flats: Sequence[Any]) -> list[Tensor]:
        """The sum over the parts of their Gram matrices, each as it is in the mean."""
        return self.grams(flats)

    def own_part(self, param: Tensor) -> Tensor:
        """What this process holds of a parameter."""
        return param

    def whole(self, param: Tensor, part: Tensor) -> Tensor:
        """What ``.grad`` of a parameter is made of the part that this process holds."""
        return part

    def same(self, value: Tensor) -> Tensor:
        """What one process found, for all: a function of the user's may be random."""
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        return value
