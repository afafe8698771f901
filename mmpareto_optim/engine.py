"""One backward after the other: losses in, integrated gradients in ``.grad``."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmpareto_optim.at_features import integrated_at
from mmpareto_optim.blocks import Block, Reach, blocks_of
from mmpareto_optim.flat.memory import secured
from mmpareto_optim.gradients.exact import gradient_of_sum, gradients_of, grads_set_aside
from mmpareto_optim.gradients.features import AtFeatures, Features
from mmpareto_optim.gradients.losses import Losses
from mmpareto_optim.ground import Describe, Gradient, Gradients
from mmpareto_optim.integration import Integrated
from mmpareto_optim.measuring import Turn
from mmpareto_optim.method import Method
from mmpareto_optim.modalities import Modalities
from mmpareto_optim.parallel.alone import Alone, Underway
from mmpareto_optim.parts import parts_so_far, rows_of_parts
from mmpareto_optim.report import AtFeatures as Seen
from mmpareto_optim.report import warn_of_unheld
from mmpareto_optim.stats import BlockStats
from mmpareto_optim.twice import Twice
from mmpareto_optim.window import Window


class Call(NamedTuple):
    """One backward, of which everything is checked.

    Attributes:
        losses: by name.
        features: where they are integrated, or None.
        params: what is differentiated by.
        processes: how several processes integrate as one.
        common: what these have in common, by the names of error messages.
        method: how blocks are integrated.
        modalities: blocks by hand, or None.
        turn: how it is measured.
        retain_graph: whether the graph is needed again.
        keep: whether more may be added.
        describe: a parameter's name for error messages.
    """

    losses: Losses
    features: Features | None
    params: Sequence[Tensor]
    processes: Alone
    common: Any
    method: Method
    modalities: Modalities | None
    turn: Turn
    retain_graph: bool
    keep: bool
    describe: Describe


class Differentiated(NamedTuple):
    """What autograd found.

    Attributes:
        found: this process's gradients.
        underway: what averages these already, or None.
        seen: what was integrated at features.
        foreign: for each parameter the ``.grad`` that there was, or None.
    """

    found: Gradients
    underway: Underway | None
    seen: Seen
    foreign: Gradient


class Engine:
    """Integrates, and remembers from one backward to the next.

    Attributes:
        stats: of the last integration, by block.
        seen: parameters and blocks of the last backward, and what was seen at features.
        window: what has accumulated, if more may be added.
        has_integrated: whether there has been a backward.
    """

    def __init__(self) -> None:
        self.stats: dict[str, BlockStats] = {}
        self.seen: tuple[Sequence[Tensor], Sequence[Block], Seen] = ((), (), Seen())
        self.window: Window | None = None
        self.has_integrated = False
        self._reach = Reach()

    def differentiate(self, call: Call) -> Differentiated:
        """Find each loss's gradient; nothing is changed."""
        through = call.features if call.turn.measured else None
        with grads_set_aside(call.params) as foreign:
            if through is not None:
                found, seen = self._through(through, call)
                return Differentiated(found, None, seen, foreign)
            one_by_one = call.turn.measured and not call.turn.noise
            underway = call.processes.agree(
                call.losses, call.params, call.common, one_by_one=one_by_one
            )
            try:
                return Differentiated(self._exact(call, underway), underway, Seen(), foreign)
            except BaseException:
                if underway is not None:
                    underway.abandoned()
                raise

    @torch.no_grad()
    def integrate(self, call: Call, differentiated: Differentiated) -> None:
        """Write what has accumulated to ``.grad``, integrated if this backward is measured."""
        write = self._meet if call.turn.measured else self._add
        write(call, differentiated)

    def integrate_twice(self, call: Call) -> None:
        """As :meth:`differentiate` and :meth:`integrate`, with no more than two gradients alive."""
        with grads_set_aside(call.params) as foreign:
            twice = Twice(call.losses, call.params, call.describe, self._leaves_beside(call))
            found = twice.integrated(
                self._reach,
                call.modalities,
                call.method,
                call.processes,
                retain_graph=call.retain_graph,
            )
        window = Window(call.params, Gradients({}, []), foreign)
        with torch.no_grad():
            window.write(found.gradients, dict if call.keep else None)
        self._done(call, window, found.stats)
        self.seen = (call.params, found.blocks, Seen())

    def _meet(self, call: Call, differentiated: Differentiated) -> None:
        """Integrate what has accumulated of each loss where losses meet, and write it."""
        params, processes = call.params, call.processes
        found, underway, seen, foreign = differentiated
        if call.keep:
            for gradient in (*found.rows.values(), found.plain):
                secured(gradient)
        rows = rows_of_parts(found) if call.turn.noise and processes.parts > 1 else {}
        found = underway.finished() if underway else processes.averaged(found, params, call.common)
        if call.turn.noise and processes.parts == 1:
            rows = rows_of_parts(found)
        window = Window(params, found, foreign)
        # Until the new one is complete there is none: whatever raises below (a rule of
        # the user's, say) leaves .grad as it is and ends the accumulation.
        earlier, self.window = self.window, None
        if earlier is not None:
            window.extend(earlier, processes.on_all)
        reached = self._reach.of(window.found.rows, params, processes.largest)
        blocks = blocks_of(reached, params, call.modalities, window.found.rows)
        integrated = _integrated(blocks, window, call, keep=call.keep)
        if call.turn.noise:
            before = window.carried_on(earlier)
            window.parts = parts_so_far(rows, params, integrated.grams, before, processes)
            rows.clear()
        window.write(integrated.gradients(), integrated.gradients if call.keep else None)
        self._done(call, window, seen.stats | integrated.stats(window.parts))
        self.seen = (params, blocks, seen)

    def _add(self, call: Call, differentiated: Differentiated) -> None:
        """Write the sum; what is not measured adds up in ``.grad`` itself, as in plain PyTorch."""
        found = call.processes.averaged(differentiated.found, call.params, call.common)
        window = Window(call.params, found, differentiated.foreign)
        self.window = None
        window.write(_integrated((), window, call, keep=False).gradients(), None)
        self._done(call, window, {})

    def _done(self, call: Call, window: Window, stats: dict[str, BlockStats]) -> None:
        self.window = window if call.keep else None
        self.stats = stats
        self.has_integrated = True

    def _exact(self, call: Call, underway: Underway | None) -> Gradients:
        """Each loss's gradient; where that is not measured, that of the sum."""
        differentiate: Any = gradients_of if call.turn.measured else gradient_of_sum
        if underway is not None:
            differentiate = partial(gradients_of, arrived=underway.begin)
        rows = differentiate(
            call.losses,
            call.params,
            call.describe,
            call.processes.differentiate,
            others=self._leaves_beside(call),
            retain_graph=call.retain_graph,
        )
        return Gradients(rows, [None] * len(call.params))

    def _through(self, features: Features, call: Call) -> tuple[Gradients, Seen]:
        """Gradients that were integrated at the features, and what was seen there."""
        through = AtFeatures(call.losses, features, call.params, call.describe)
        seen = Seen(behind=through.behind)
        if not self.has_integrated:
            warn_of_unheld(through.others, lambda leaf: list(call.losses))
        integrate = partial(
            integrated_at, self._reach, call.method, call.processes, call.common, seen
        )
        return through.gradients(integrate, retain_graph=call.retain_graph), seen

    def _leaves_beside(self, call: Call) -> Sequence[Tensor]:
        others = call.processes.leaves_not_among(call.params, call.losses)
        if not self.has_integrated:
            warn_of_unheld(others, partial(_reaching, call))
        return others


def _integrated(blocks: Sequence[Block], window: Window, call: Call, *, keep: bool) -> Integrated:
    grams = call.processes.grams
    return Integrated(
        blocks, call.params, window.found, call.method, call.processes, grams, keep=keep
    )


def _reaching(call: Call, leaf: Tensor) -> list[str]:
    """Names of the losses that a leaf, which is not among the parameters, is behind."""
    losses, leaves_of = call.losses, call.processes.leaves_not_among
    behind = {name: leaves_of(call.params, {name: losses[name]}) for name in losses}
    return [name for name, leaves in behind.items() if any(leaf is other for other in leaves)]
