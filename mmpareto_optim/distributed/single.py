"""One process: the methods of the other ways, with nothing to agree on."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from mmpareto_optim.autograd import by_autograd
from mmpareto_optim.rows import Given, Row
from mmpareto_optim.types import Constants, Gradient


class SingleProcess:
    """A process that trains a model of its own; :class:`Processes` says what the methods are."""

    rounding = 0.0
    shares: tuple[float, ...] | None = None

    def failing_together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def check(self, stretches_tensors: bool, at_features: bool) -> None:
        if stretches_tensors and at_features:
            raise ValueError(
                'rescale="tensor" stretches the gradients of parameter tensors one by one, '
                'and features are integrated before there are any: use rescale="encoder"'
            )

    def losses_of_all(self, names: Iterable[str], constants: Constants) -> list[str]:
        return list(names)

    def differentiate(
        self,
        outputs: Sequence[Tensor],
        params: Sequence[Tensor],
        others: Sequence[Tensor],
        retain_graph: bool,
    ) -> Gradient:
        return by_autograd(outputs, params, others, retain_graph=retain_graph)

    def given_by_all(self, name: str, given: Given) -> Given:
        return given

    def average(self, row: Row) -> None:
        pass

    def wait(self) -> None:
        pass

    def local(self, param: Tensor) -> Tensor:
        return param

    def spread(self, param: Tensor, local: Tensor) -> Tensor:
        return local

    def largest(self, sizes: Tensor) -> Tensor:
        return sizes

    def grams(self, grams: Sequence[Tensor]) -> list[Tensor]:
        return list(grams)

    def largest_at_features(self, sizes: Tensor) -> Tensor:
        return sizes

    def grams_at_features(self, grams: Sequence[Tensor]) -> list[Tensor]:
        return list(grams)

    def all_of(self, flags: Sequence[bool]) -> list[bool]:
        return list(flags)

    def same(self, value: Tensor) -> Tensor:
        return value

    def mean(self, value: Tensor) -> Tensor:
        return value
