"""One case of the fuzzer: a network, an optimizer and what happens to them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.fuzz.models import Plan
from tests.fuzz.rules import Settings


@dataclass
class Micro:
    """A micro-batch: its data, what becomes of its losses, and the edit of ``.grad`` before it.

    ``edited`` is the share of the parameters that the edit touches; ``spoilt`` says that the
    losses are not finite and that every ``.grad`` is set to None afterwards. ``changes`` are of
    the parameters, by the moment; ``renamed`` are losses, by the name that they have otherwise.
    """

    data: int
    fates: dict[str, str]
    edit: str | None
    edited: float
    spoilt: bool
    changes: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    shuffled: bool = False


@dataclass
class Case:
    """All that is drawn from a seed.

    ``autocast`` is the dtype of a region around the backward, ``labelled`` says what is of a
    subclass of Tensor: the inputs or the losses.
    """

    seed: int
    plan: Plan
    rule: str
    gamma: float | None
    tensorwise: bool
    features: list[str]
    modalities: list[str]
    at_each_call: bool
    base: str
    without_optimizer: bool
    held: float
    twice: bool
    zero_grad: str
    steps: list[list[Micro]]
    check: bool = False
    autocast: torch.dtype | None = None
    labelled: str = ""

    @property
    def settings(self) -> Settings:
        """The rule as the reference takes it."""
        rule = CALLABLES.get(self.rule, self.rule)
        return Settings(rule, None if callable(rule) else self.gamma, self.tensorwise)


def by_size(gram: Tensor) -> Tensor:
    """A rule that nobody has, the same for every order of the losses."""
    own = gram.diagonal()
    whole = own.sum()
    share = own / torch.where(whole > 0, whole, torch.ones_like(whole))
    return len(gram) / (1 + share)


def by_likeness(gram: Tensor) -> Tensor:
    """Weights the losses by how well they agree with the sum, zero rows included."""
    agreement = gram.sum(1)
    size = agreement.abs().sum()
    return 1 + agreement / torch.where(size > 0, size, torch.ones_like(size))


CALLABLES: dict[str, Callable[[Tensor], Tensor]] = {"by_size": by_size, "by_likeness": by_likeness}
