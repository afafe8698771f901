"""One backward: losses in, integrated gradients in ``.grad``."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmpareto_optim.at_features import integrated_at
from mmpareto_optim.blocks import Block, Reach, blocks_of
from mmpareto_optim.flat.memory import secured
from mmpareto_optim.gradients.exact import gradient_of_sum, gradients_of, grads_set_aside
from mmpareto_optim.gradients.features import AtFeatures, Features, check_features
from mmpareto_optim.gradients.losses import Losses, check_losses
from mmpareto_optim.ground import Gradient, Gradients
from mmpareto_optim.groups import as_groups
from mmpareto_optim.integration import Integrated
from mmpareto_optim.measuring import Measuring, Turn
from mmpareto_optim.method import Integration, Method, check_settings, constants_of
from mmpareto_optim.modalities import Modalities, check_held, parameters_by_modality
from mmpareto_optim.parallel.alone import Alone, Underway
from mmpareto_optim.parallel.choice import Choice, check_averaging
from mmpareto_optim.parts import parts_so_far, rows_of_parts
from mmpareto_optim.report import AtFeatures as Seen
from mmpareto_optim.report import (
    Blocks,
    block_table,
    describe,
    settings_of,
    warn_of_small_gradient,
    warn_of_unheld,
)
from mmpareto_optim.rules import Rule
from mmpareto_optim.stats import BlockStats
from mmpareto_optim.twice import Twice, check_twice
from mmpareto_optim.window import Window

if TYPE_CHECKING:  # not in every build
    from torch.distributed import ProcessGroup


class _Call(NamedTuple):
    """One backward.

    Attributes:
        params: what is differentiated by.
        processes: how several processes integrate as one.
        common: what these have in common, by the names of error messages.
        modalities: blocks by hand, or None.
        turn: how it is measured.
        keep: whether more may be added.
        underway: what averages each gradient while the next loss is differentiated, or None.
    """

    params: Sequence[Tensor]
    processes: Alone
    common: Any
    modalities: Modalities | None
    turn: Turn
    keep: bool
    underway: Underway | None


class GradientIntegrator:
    """Fills ``.grad`` with gradients common to several losses, as ``Tensor.backward`` fills it.

    For who steps by himself: several optimizers on one graph, a trainer that owns the step.
    :class:`MMParetoOptimizer` is an optimizer around it, and says what the arguments are::

        integrator = GradientIntegrator(model.parameters())
        integrator.zero_grad()
        integrator.backward({"mm": loss, "audio": audio_loss, "visual": visual_loss})
        muon.step()
        adamw.step()

    Args:
        params: as ``torch.optim`` takes them: tensors, ``(name, tensor)`` pairs, or dicts with
            either as ``"params"``.
        param_groups_by_modality: as for :class:`MMParetoOptimizer`, and so all that follows.
        integration: as said.
        gamma: as said.
        rescale: as said.
        process_group: as said.
        average_gradients: as said.
        reduce_dtype: as said.
        measure_every: as said.
        measure_noise: as said.
        memory: as said.

    Attributes:
        param_groups: the parameters, in dicts as ``torch.optim`` has them.
        most_losses: how many losses there have been at most in a backward.
        integration: as given, and so are ``gamma`` and ``rescale``; may be changed.
        stats: for each block of two or more objectives a :class:`BlockStats` of the last
            integration, by the block's name: the modality, or the names of the losses that
            reach it joined by ``+``. Empty where ``measure_every`` left the last one out.

    Raises:
        TypeError: ``params`` or ``param_groups_by_modality`` hold what is no parameter.
        ValueError: unknown ``integration``, ``rescale`` or ``memory``; ``gamma`` not positive; a
            parameter in two modalities, or one that ``params`` does not hold; a
            ``process_group`` that this process is not in; that or a ``reduce_dtype`` with
            ``average_gradients=False``; a ``reduce_dtype`` that is not a floating-point one.
    """

    stats: dict[str, BlockStats]

    def __init__(
        self,
        params: Iterable[Any],
        param_groups_by_modality: Mapping[str, Any] | None = None,
        *,
        integration: Integration = "mmpareto",
        gamma: float | None = None,
        rescale: Literal["encoder", "tensor"] = "encoder",
        process_group: "ProcessGroup | None" = None,
        average_gradients: bool = True,
        reduce_dtype: torch.dtype | None = None,
        measure_every: int = 1,
        measure_noise: bool = False,
        memory: Literal["normal", "low"] = "normal",
    ) -> None:
        self.integration = integration
        self.gamma = gamma
        self.rescale = rescale
        self._copies: dict[str, Rule] = {}
        check_settings(self._method(), memory, measure_every, measure_noise)
        check_averaging(process_group, average_gradients, reduce_dtype)
        self.param_groups = as_groups(params)
        self._measuring = Measuring(measure_every, measure_noise, integration, gamma)
        self._memory = memory
        self._choice = Choice(process_group, average_gradients, reduce_dtype)
        self._modalities: Modalities | None = None
        if param_groups_by_modality is not None:
            self._modalities = parameters_by_modality(param_groups_by_modality)
            check_held(self._modalities, self._held())
        self.forget()

    def forget(self) -> None:
        """Forget the last steps: what has accumulated and what the losses have reached."""
        self.stats = {}
        self.most_losses = 0
        self._warned = False
        self._reach = Reach()
        self._window: Window | None = None
        self._measuring.forget()
        self._seen: tuple[Sequence[Tensor], Sequence[Block], Seen] = ((), (), Seen())

    def end_window(self) -> None:
        """What comes next starts anew, and is added to what is in ``.grad``."""
        self._window = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and what has accumulated."""
        self.end_window()
        for param in self._held():
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad = torch.zeros_like(param.grad)

    def backward(
        self,
        losses: Losses,
        *,
        features: Features | None = None,
        param_groups_by_modality: Mapping[str, Any] | None = None,
        retain_graph: bool = False,
    ) -> None:
        """As :meth:`MMParetoOptimizer.backward`."""
        self.integrate(losses, features, param_groups_by_modality, retain_graph, keep=True)

    def integrate(
        self,
        losses: Losses,
        features: Features | None = None,
        param_groups_by_modality: Mapping[str, Any] | None = None,
        retain_graph: bool = False,
        *,
        keep: bool,
    ) -> None:
        """:meth:`backward`; without ``keep`` for a step that follows, after which nothing adds up.

        Where ``torch.compile`` traces the step around it, the graph is broken here.
        """
        run = self._integrate if self._memory == "normal" else self._integrate_twice
        if torch.compiler.is_compiling():
            run = torch.compiler.disable(run)
        run(losses, features, param_groups_by_modality, retain_graph, keep)

    def _integrate(
        self,
        losses: Losses,
        features: Features | None,
        by_hand: Mapping[str, Any] | None,
        retain_graph: bool,
        keep: bool,
    ) -> None:
        params = self._trainable()
        processes = self._choice.of(params)
        with processes.failing_together():
            check_losses(losses)
            turn = self._measuring.turn(self._window, self.integration, self.gamma)
            modalities = self._checked_modalities(by_hand)
            processes.check_method(self._method().by_tensor, features is not None)
            if features is not None:
                check_features(features)
            common = (
                *constants_of(params, self._method(), modalities, features),
                ("measure_every or measure_noise", turn[1:]),
                ("reduce_dtype", self._choice.reduce_dtype),
            )
            through = features if turn.measured else None
            underway = processes.agree(losses, params, common) if through is None else None
            if turn.noise or not turn.measured:  # needed as they are, or one for all
                underway = None
            call = _Call(params, processes, common, modalities, turn, keep, underway)
            with grads_set_aside(params) as foreign:
                if through is None:
                    found, seen = self._differentiated(losses, call, retain_graph), Seen()
                else:
                    found, seen = self._through_features(losses, through, call, retain_graph)
        with torch.no_grad():
            if turn.measured:
                self._meet(call, found, foreign, seen)
            else:
                self._add(call, found, foreign)
        self._measuring.done(turn)
        self._done(losses)

    def _meet(self, call: "_Call", found: Gradients, foreign: Gradient, seen: Seen) -> None:
        """Integrate what has accumulated of each loss where losses meet, and write it."""
        params, processes, common, modalities, turn, keep, underway = call
        if keep:
            for gradient in (*found.rows.values(), found.plain):
                secured(gradient)
        rows = rows_of_parts(found) if turn.noise and processes.parts > 1 else {}
        if underway is None:
            found = processes.averaged(found, params, common)
        else:
            found = underway.finished()
        if turn.noise and processes.parts == 1:
            rows = rows_of_parts(found)
        window = Window(params, found, foreign)
        # Until the new one is complete there is none: whatever raises below (a rule of
        # the user's, say) leaves .grad as it is and ends the accumulation.
        earlier, self._window = self._window, None
        if earlier is not None:
            window.extend(earlier, processes.on_all)
        reached = self._reach.of(window.found.rows, params, processes.largest)
        blocks = blocks_of(reached, params, modalities, window.found.rows)
        grams = processes.grams
        integrated = Integrated(
            blocks, params, window.found, self._method(), processes, grams, keep=keep
        )
        if turn.noise:
            before = window.carried_on(earlier)
            window.parts = parts_so_far(rows, params, integrated.grams, before, processes)
            rows.clear()
        window.write(integrated.gradients(), integrated.gradients if keep else None)
        self.stats = seen.stats | integrated.stats(window.parts)
        self._seen = (params, blocks, seen)
        self._window = window if keep else None

    def _add(self, call: "_Call", found: Gradients, foreign: Gradient) -> None:
        """Write the sum; what is not measured adds up in ``.grad`` itself, as in plain PyTorch."""
        params, processes = call.params, call.processes
        window = Window(params, processes.averaged(found, params, call.common), foreign)
        self._window = None
        grams = processes.grams
        added = Integrated((), params, window.found, self._method(), processes, grams, keep=False)
        window.write(added.gradients(), None)
        self.stats = {}
        self._window = window if call.keep else None

    def _integrate_twice(
        self,
        losses: Losses,
        features: Features | None,
        by_hand: Mapping[str, Any] | None,
        retain_graph: bool,
        keep: bool,
    ) -> None:
        params = self._trainable()
        processes = self._choice.of(params)
        check_losses(losses)
        modalities = self._checked_modalities(by_hand)
        check_twice(self._method(), processes, features is not None, self._window)
        with grads_set_aside(params) as foreign:
            others = self._leaves_beside(losses, params, processes)
            twice = Twice(losses, params, self._describe, others)
            found = twice.integrated(
                self._reach, modalities, self._method(), processes, retain_graph=retain_graph
            )
        window = Window(params, Gradients({}, []), foreign)
        with torch.no_grad():
            window.write(found.gradients, dict if keep else None)
        self.stats = found.stats
        self._seen = (params, found.blocks, Seen())
        self._window = window if keep else None
        self._done(losses)

    def _done(self, losses: Losses) -> None:
        self.most_losses = max(self.most_losses, len(losses))
        if not self._warned and not callable(self.integration):
            self._warned = warn_of_small_gradient(self.stats)

    def __getstate__(self) -> dict[str, Any]:
        if self._choice.process_group is not None:
            raise TypeError(
                "a process group cannot be copied or pickled, nor can what holds one: save the "
                "optimizer's state_dict(), and build it anew"
            )
        settings = ("integration", "gamma", "rescale", "_memory", "_measuring")
        kept = ("param_groups", *settings, "_copies", "_modalities")
        state = {name: self.__dict__[name] for name in kept}
        return {**state, "_choice": (self._choice.average_gradients, self._choice.reduce_dtype)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._choice = Choice(None, *state.pop("_choice"))
        self.__dict__.update(state)
        self.forget()

    @property
    def has_integrated(self) -> bool:
        """Whether there has been a backward."""
        return self.most_losses > 0

    @property
    def blocks(self) -> Blocks:
        """What the last backward found to be one block; printing it is a table.

        For each block its objectives and parameters, heads included; empty before the first
        backward.
        """
        return block_table(*self._seen, self.param_groups)

    @property
    def settings(self) -> str:
        """What was chosen, for a printed optimizer."""
        return settings_of(self._method(), self._modalities)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a loss over the processes that integrate as one."""
        return self._choice.of(self._trainable()).mean(value)

    def _differentiated(self, losses: Losses, call: "_Call", retain_graph: bool) -> Gradients:
        """Each loss's gradient on this process; where that is not measured, that of the sum."""
        params, processes, underway = call.params, call.processes, call.underway
        differentiate = gradients_of if call.turn.measured else gradient_of_sum
        if underway is not None:
            differentiate = partial(gradients_of, arrived=underway.begin)
        rows = differentiate(
            losses,
            params,
            self._describe,
            processes.differentiate,
            others=self._leaves_beside(losses, params, processes),
            retain_graph=retain_graph,
        )
        return Gradients(rows, [None] * len(params))

    def _through_features(
        self, losses: Losses, features: Features, call: "_Call", retain_graph: bool
    ) -> tuple[Gradients, Seen]:
        """Gradients that were integrated at the features, and what was seen there."""
        through = AtFeatures(losses, features, call.params, self._describe)
        seen = Seen(behind=through.behind)
        if not self.has_integrated:
            warn_of_unheld(through.others, lambda leaf: list(losses))
        integrate = partial(
            integrated_at, self._reach, self._method(), call.processes, call.common, seen
        )
        return through.gradients(integrate, retain_graph=retain_graph), seen

    def _leaves_beside(
        self, losses: Losses, params: Sequence[Tensor], processes: Alone
    ) -> Sequence[Tensor]:
        others = processes.leaves_not_among(params, losses)
        if not self.has_integrated:
            warn_of_unheld(others, partial(self._reaching, losses, params, processes))
        return others

    def _reaching(
        self, losses: Losses, params: Sequence[Tensor], processes: Alone, leaf: Tensor
    ) -> list[str]:
        """Names of the losses that a leaf, which is not among the parameters, is behind."""
        behind = {n: processes.leaves_not_among(params, {n: losses[n]}) for n in losses}
        return [name for name, leaves in behind.items() if any(leaf is other for other in leaves)]

    def _checked_modalities(self, by_hand: Mapping[str, Any] | None) -> Modalities | None:
        modalities = self._modalities if by_hand is None else parameters_by_modality(by_hand)
        if modalities is not None:
            check_held(modalities, self._held())
        return modalities

    def _method(self) -> Method:
        return Method(self.integration, self.gamma, self.rescale, self._copies)

    def _held(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _trainable(self) -> list[Tensor]:
        # A parameter that is listed twice counts once.
        return [param for param in dict.fromkeys(self._held()) if param.requires_grad]

    def _describe(self, wanted: Tensor) -> str:
        return describe(wanted, self.param_groups)
