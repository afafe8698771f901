"""Which steps are measured: loss by loss, and part by part."""

from typing import Any, NamedTuple

from mmpareto_optim.window import Window


class Turn(NamedTuple):
    """How one backward is measured.

    Attributes:
        number: of its window, counted from 0.
        measured: whether loss by loss.
        noise: whether part by part.
    """

    number: int
    measured: bool
    noise: bool


class Measuring:
    """Says which backwards are measured: those of the first window of every so many.

    Args:
        every: how many.
        noise: whether the parts that gradients are sums of are measured.
        integration: how gradients are integrated.
        gamma: as chosen, or None.

    Raises:
        ValueError: ``every`` is not positive, or more than 1 beside something else than the sum.
    """

    def __init__(self, every: int, noise: bool, integration: Any, gamma: float | None) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"measure_every must be a positive whole number, got {every!r}")
        self._every = every
        self._noise = noise
        self._windows = 0
        self._check(integration, gamma)

    def forget(self) -> None:
        """Begin with a window that is measured."""
        self._windows = 0

    def turn(self, window: Window | None, integration: Any, gamma: float | None) -> Turn:
        """Of a backward after ``window``, which it may go on with."""
        self._check(integration, gamma)
        goes_on = window is not None and window.goes_on()
        number = self._windows - 1 if goes_on else self._windows
        measured = number % self._every == 0
        return Turn(number, measured, self._noise and measured)

    def done(self, turn: Turn) -> None:
        """Count a backward that came to its end."""
        self._windows = turn.number + 1

    def _check(self, integration: Any, gamma: float | None) -> None:
        if self._every > 1 and (integration != "uniform" or gamma not in (None, 1)):
            raise ValueError(
                f"measure_every={self._every} leaves out the gradients of single losses in most "
                'steps, so it goes with the plain sum, integration="uniform" without gamma, got '
                f"integration={getattr(integration, '__name__', integration)!r}, gamma={gamma!r}: "
                "use measure_every=1"
            )
