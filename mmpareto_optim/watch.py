"""What shows itself over several steps, and is warned of once."""

from collections.abc import Mapping, Sequence
from math import sqrt

from torch import Tensor, nn

from mmpareto_optim.check import check_first_losses, warn_of_one_scaled
from mmpareto_optim.graph import leaves_beside
from mmpareto_optim.messages import first_of, warn
from mmpareto_optim.options import MOST_NAMES
from mmpareto_optim.rows import Layout, Row
from mmpareto_optim.stats import BlockStats
from mmpareto_optim.types import Losses

LARGE_COEFFICIENT = 1e4
"""A coefficient that is warned of, if the gradient is less than ``SMALL_NORM`` of the longest."""

SMALL_NORM = 1e-3

ZERO = 1e-7
"""A result whose square is below this share of its parts' is zero but for their rounding."""

STEPS_WATCHED = 100
"""First steps of a block, after which one that mostly stood still is warned of."""


class Watch:
    """What is seen over many steps, and warned of once."""

    def __init__(self, check: bool) -> None:
        self.layouts: dict[str, Layout] = {}  # of losses' last rows
        self._looks_left = 10
        self._check = check
        self._is_to_check = check  # what was never given several losses
        self._steps = 0  # with several losses
        self._met = False
        self._unheld = 0
        self._warned_of_small = False
        self._stood_still: dict[str, tuple[int, int]] = {}  # of a block: steps, and those at zero

    def note_given(self, losses: Losses) -> None:
        """The losses before they are differentiated."""
        if self._is_to_check:
            warn_of_one_scaled(losses)

    def note(
        self,
        losses: Losses,
        stats: Mapping[str, BlockStats],
        factors: Mapping[str, Sequence[float]],
    ) -> None:
        """What an integration found, and by what factors gradients were multiplied at most."""
        if self._is_to_check and len(losses) > 1:
            check_first_losses(losses, stats)
            self._is_to_check = False
        self._note_losses(losses, stats)
        self._note_factors(factors, stats)

    def note_rows(self, rows: Mapping[str, Row], params: Sequence[Tensor], losses: Losses) -> None:
        """Warn of parameters nobody holds once more, where losses lost some that they reached.

        A model may have been built anew, or its parameters replaced.
        """
        if all(self.layouts.get(name) is row.layout for name, row in rows.items()):
            return
        is_lost = any(_has_lost(row.layout, self.layouts.get(name)) for name, row in rows.items())
        if len(self.layouts) > MOST_NAMES:
            self.layouts = {}
        self.layouts.update((name, row.layout) for name, row in rows.items())
        if is_lost and self._looks_left:
            self._looks_left -= 1
            self.note_unheld(leaves_beside(params, losses))

    def _note_losses(self, losses: Losses, stats: Mapping[str, BlockStats]) -> None:
        """Warn once of losses that reach no parameter together, in none of ten steps."""
        self._met |= bool(stats) or not self._check
        self._steps += len(losses) > 1
        if self._steps == 10 and not self._met and len(losses) > 1:
            self._met = True
            warn(
                f"the losses {list(losses)} never meet: in ten steps no parameter that is held "
                "here got a gradient other than zero from two of them, so that nothing was "
                "integrated. Look for a .detach() between the encoders and their losses, or for "
                "encoders that are frozen"
            )

    def note_unheld(self, leaves: Mapping[Tensor, str]) -> None:
        """Warn of more parameters that losses reach and nobody holds: leaves, each with a loss."""
        unheld = [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]
        if len(unheld) <= self._unheld:
            return
        self._unheld = len(unheld)
        unheld.sort(key=lambda param: (-param.numel(), tuple(param.shape)))
        shapes = first_of([tuple(param.shape) for param in unheld], shown=3)
        warn(
            "the losses reach trainable parameters that no optimizer here holds, of shape "
            f"{shapes} (the first by loss {leaves[unheld[0]]!r}): they get no gradient. "
            "That is right where another optimizer trains them by losses of its own, as a GAN's "
            "discriminator behind its generator: requires_grad_(False) says so meanwhile, and "
            "saves their passes. If they are to be trained here, give all of them, as in "
            "MMParetoOptimizer([muon, adamw]), and build the optimizer after the model"
        )

    def _note_factors(
        self, factors: Mapping[str, Sequence[float]], stats: Mapping[str, BlockStats]
    ) -> None:
        """Warn once of a very small gradient, and of each block that mostly stands still.

        In its first steps: later a small gradient is that of a task which is nearly solved.
        """
        if len(self._stood_still) > MOST_NAMES:
            self._stood_still = {}
        for name, numbers in factors.items():
            steps, zeros = self._stood_still.get(name, (0, 0))
            if steps == STEPS_WATCHED:
                continue
            steps, zeros = steps + 1, zeros + stands_still(stats[name].gram.tolist(), numbers)
            self._stood_still[name] = steps, zeros
            if max(numbers) > LARGE_COEFFICIENT and not self._warned_of_small:
                self._warned_of_small = warn_of_small_gradient(name, stats[name])
            if steps == STEPS_WATCHED and 2 * zeros > steps:
                warn_of_standing_block(name, zeros, steps)


def _has_lost(now: Layout, before: Layout | None) -> bool:
    if before is None or len(now.given) != len(before.given):
        return False
    return any(b and not n for n, b in zip(now.given, before.given, strict=True))


def stands_still(gram: Sequence[Sequence[float]], factors: Sequence[float]) -> bool:
    """Whether gradients other than zero gave a result of zero, by factors of zero or not."""
    places = range(len(factors))
    square = sum(factors[i] * factors[j] * gram[i][j] for i in places for j in places)
    parts = sum(abs(factors[i]) * sqrt(gram[i][i]) for i in places) ** 2
    return square <= ZERO * parts and any(gram[i][i] for i in places)


def warn_of_standing_block(name: str, zeros: int, steps: int) -> None:
    """A warning of a block whose result was zero in most steps."""
    warn(
        f"block {name!r} has stood still in {zeros} of {steps} steps: no direction is common to "
        "its losses' gradients there, as in a block of few numbers or near a Pareto-stationary "
        "point. No rule that raises no loss moves it: join it to others by "
        'param_groups_by_modality, or use integration="uniform"'
    )


def warn_of_small_gradient(block: str, stats: BlockStats) -> bool:
    """A warning of a loss that a rule multiplies by a large number; whether there is one.

    Nearly opposite gradients of like lengths are multiplied as much, and not meant.
    """
    norms, place = stats.norms, int(stats.coefficients.argmax())
    if norms[place] > SMALL_NORM * norms.max():
        return False
    stretch = 1.0 if stats.stretch is None else float(stats.stretch.max())
    warn(
        f"block {block!r}: the gradient of loss {stats.objectives[place]!r} is so small that it is "
        f"multiplied by {float(stats.coefficients[place]) * stretch:.1e}, as a common direction "
        "has to lower that loss too. A term that is no task of its own (a penalty, a bonus) is "
        "better added to the loss that it belongs to, and a task that is to have less say gets a "
        "larger weight"
    )
    return True
