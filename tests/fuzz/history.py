"""What the reference remembers of one optimizer from one backward to the next."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from tests.fuzz.rules import Array

Pair = tuple[str, int]


@dataclass
class Outcome:
    """The expected ``.grad`` of one parameter (None: left as it was), float64.

    ``scale`` is the norm of the largest term that went into it; errors are relative to it.
    ``doubt`` says why the value cannot be compared, or is empty.
    """

    value: Array | None
    scale: float = 0.0
    doubt: str = ""


@dataclass
class History:
    """What earlier backward passes of the same optimizer left behind."""

    reached: set[Pair] = field(default_factory=set)
    asleep: set[Pair] = field(default_factory=set)
    awoken: set[Pair] = field(default_factory=set)
    sums: dict[Pair, Array] = field(default_factory=dict)
    sizes: dict[Pair, float] = field(default_factory=dict)
    start: dict[int, Array | None] = field(default_factory=dict)
    written: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def end_window(self) -> None:
        """Forgets the sums of a window, as ``step()`` and ``zero_grad()`` do."""
        for part in (self.sums, self.sizes, self.start, self.written):
            part.clear()

    def forget(self, index: int) -> None:
        """Another parameter stands here from now on, of which nothing is known."""
        for seen in (self.reached, self.asleep, self.awoken):
            seen -= {pair for pair in seen if pair[1] == index}
        self.start_again(index, None)
        self.written.pop(index, None)

    def start_again(self, index: int, start: Array | None) -> None:
        """What comes next for a parameter is added to what somebody else left in ``.grad``."""
        for pair in [pair for pair in self.sums if pair[1] == index]:
            del self.sums[pair], self.sizes[pair]
        self.start[index] = start

    def wake(self) -> None:
        """What came alive in the last backward counts from now on."""
        self.reached |= self.awoken
        self.awoken.clear()

    def look(self, pair: Pair, moved: bool) -> None:
        """Whether a loss gave a parameter more than zeros this time."""
        if not moved and pair not in self.reached:
            self.asleep.add(pair)
        elif moved and pair in self.asleep and pair not in self.reached:
            self.awoken.add(pair)
        elif moved:
            self.reached.add(pair)

    def reaching(self, index: int) -> frozenset[str]:
        """The losses that reach a parameter now; what is not finite does so in this step only."""
        return frozenset(
            name
            for (name, at), total in self.sums.items()
            if at == index and ((name, at) in self.reached or not np.isfinite(total).all())
        )
