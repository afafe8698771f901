"""Settings, what holds from one backward to the next, and the whole backward on one screen."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import UninitializedParameter

from mmpareto_optim.accumulation import GradAccumulator, autocast_around, grads_set_aside, switched
from mmpareto_optim.autograd import Backward, Differentiation, Rows
from mmpareto_optim.blocks import Reach, blocks_of
from mmpareto_optim.distributed.single import Processes, ProcessSelection
from mmpareto_optim.features import rows_through
from mmpareto_optim.integration import Integration
from mmpareto_optim.messages import Blocks, Seen, block_table, warn
from mmpareto_optim.options import (
    MOST_NAMES,
    Options,
    Rescale,
    RuleChoice,
    check_features,
    check_losses,
    set_attribute,
)
from mmpareto_optim.param_groups import (
    Modalities,
    as_groups,
    check_held,
    describe,
    parameters_by_modality,
    positions_by_modality,
)
from mmpareto_optim.rows import uncompiled
from mmpareto_optim.rules.named import Rule
from mmpareto_optim.stats import BlockStats, StatsByBlock
from mmpareto_optim.total import total_of
from mmpareto_optim.types import Features, Losses
from mmpareto_optim.watch import Watch

if TYPE_CHECKING:  # not in every build
    from torch.distributed import ProcessGroup


def _option(name: str, doc: str) -> Any:
    """A setting that is validated when it is set."""

    def read(self: "GradientIntegrator") -> Any:
        return getattr(self._options, name)

    def write(self: "GradientIntegrator", value: Any) -> None:
        self._options = replace(self._options, **{name: value})
        self._rules = {}
        for window in self._windows:
            window.rules_before = {}

    return property(read, write, doc=doc)


class GradientIntegrator:
    """Fills ``.grad`` with gradients common to several losses, as ``Tensor.backward`` fills it.

    For loops that step by themselves. :class:`MMParetoOptimizer` is an optimizer around it::

        integrator = GradientIntegrator(model.parameters())
        integrator.zero_grad()
        integrator.backward({"mm": loss, "audio": audio_loss, "visual": visual_loss})
        muon.step()
        adamw.step()

    Args:
        params: as ``torch.optim`` takes them: tensors, ``(name, tensor)`` pairs, or dicts with
            either as ``"params"``.
        param_groups_by_modality: blocks chosen by hand. This argument and the following ones
            (``integration``, ``gamma``, ``rescale``, ``check``, ``process_group``,
            ``average_gradients`` and ``reduce_dtype``) mean what they mean for
            :class:`MMParetoOptimizer`, and raise the same errors.

    Attributes:
        param_groups: the parameters, in dicts as ``torch.optim`` has them.
        most_losses: how many losses there have been at most in a backward.
        has_integrated: whether there has been a backward.
        stats: by name of a block of two or more losses, as ``"mm+audio"`` or that of a modality,
            a :class:`BlockStats` of the last integration.
    """

    integration = _option("integration", "The rule, a name or a function. Can be set.")
    gamma = _option("gamma", "Factor on named rules; None for the rule's default. Can be set.")
    rescale = _option("rescale", '``"encoder"`` or ``"tensor"``. Can be set.')

    def __init__(
        self,
        params: Iterable[Any],
        param_groups_by_modality: Mapping[str, Any] | None = None,
        *,
        integration: RuleChoice = "mmpareto",
        gamma: float | None = None,
        rescale: Rescale = "encoder",
        check: bool = True,
        process_group: "ProcessGroup | None" = None,
        average_gradients: bool = True,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        self._options = Options(integration, gamma, rescale)
        self._selection = ProcessSelection(process_group, average_gradients, reduce_dtype)
        self.param_groups = as_groups(params)
        self._modalities: Modalities | None = None
        if param_groups_by_modality is not None:
            self._modalities = parameters_by_modality(param_groups_by_modality, self.param_groups)
        self._check = check
        self._rules: dict[tuple[bool, str], Rule] = {}
        self.forget()

    __setattr__ = set_attribute
    total = total_of

    def forget(self) -> None:
        """Forget the last steps: what has accumulated and what the losses have reached."""
        self.most_losses = 0
        self.stats: dict[str, BlockStats] = StatsByBlock()
        self.has_integrated = False
        self._seen = Seen()
        self._watch = Watch(self._check)
        self._differentiation = Differentiation(self._check, self._watch)
        self._reach, self._reach_at_features = Reach(), Reach()
        self._order: dict[str, int] = {}
        self._windows: tuple[GradAccumulator, ...] = ()

    def backward(
        self,
        losses: Losses,
        *,
        features: Features | None = None,
        param_groups_by_modality: Mapping[str, Any] | None = None,
        retain_graph: bool = False,
    ) -> None:
        """Fill ``.grad``; arguments and errors are those of :meth:`MMParetoOptimizer.backward`."""
        options = features, param_groups_by_modality, retain_graph
        uncompiled(self.integrate)(losses, *options, keep=True)

    def integrate(
        self,
        losses: Losses,
        features: Features | None,
        by_hand: Mapping[str, Any] | None,
        retain_graph: bool = False,
        *,
        keep: bool,
    ) -> None:
        """:meth:`backward`; without ``keep`` nothing is added to later, as a step follows."""
        params = self._trainable()
        processes = self._selection.of(params)
        with processes.failing_together():
            losses, modalities = self._checked(losses, features, by_hand, processes)
            earlier = next((window for window in self._windows if window.goes_on()), None)
            self._windows = () if earlier is None else (earlier,)  # of a failed write none stays
            constants = partial(self._constants, params, modalities, features)
            keeps = keep or earlier is not None
            autocast = autocast_around(params)
            name_of = partial(describe, groups=self.param_groups)
            backward = Backward(
                losses, params, processes, constants, retain_graph, keeps, name_of, autocast
            )
            rules_before = self._rules if earlier is None else earlier.rules_before
            rules = deepcopy(rules_before) if rules_before else {}
            seen, stats = Seen(params), dict[str, BlockStats]()
            with grads_set_aside(params) as before, switched(autocast, on=False):
                if features is None:
                    rows, plain = self._differentiation.rows(backward), None
                else:
                    at = Integration(self._options, processes, rules, at_features=True)
                    rows, plain, stats = rows_through(
                        self._differentiation, backward, features, self._reach_at_features, at, seen
                    )
            with torch.no_grad(), switched(autocast, on=False):
                window = GradAccumulator(params, rows, plain, before, rules_before)
                if earlier is not None:
                    window.extend(earlier, processes)
                rows, plain = self._in_order(window.rows), window.plain
                integration = Integration(self._options, processes, rules)
                reached = self._reach.of(rows, params, integration.largest, self._held)
                seen.blocks = blocks_of(reached, params, modalities, rows)
                everything = [*rows.values()] if plain is None else [*rows.values(), plain]
                found = integration.integrate(seen.blocks, list(rows), everything, release=not keep)
                stats = found.stats_beside(stats)
                self._watch.note(losses, stats, found.factors)
                gradients = {i: processes.spread(params[i], g) for i, g in found.gradients.items()}
                # Whichever of the two wrote .grad goes on, wherever an interrupt comes.
                self._windows = (window, *self._windows)
                window.write(gradients, processes, keep=keep)
        vars(self).update(  # all or none, wherever an interrupt comes
            stats=stats,
            has_integrated=True,
            most_losses=max(self.most_losses, len(losses)),
            _seen=seen,
            _rules=rules,
            _windows=(window,) if keep else (),
        )

    def check_given(
        self, losses: Any, features: Any, by_hand: Mapping[str, Any] | None
    ) -> tuple[Losses, Modalities | None]:
        """Raise, on all processes, for wrong arguments; the losses and the blocks by hand."""
        processes = self._selection.of(self._trainable())
        with processes.failing_together():
            return self._checked(losses, features, by_hand, processes)

    def _current(self) -> "GradientIntegrator":
        return self

    def _checked(
        self,
        losses: Any,
        features: Any,
        by_hand: Mapping[str, Any] | None,
        processes: Processes,
    ) -> tuple[Losses, Modalities | None]:
        """Raise for arguments that are wrong; the losses and the blocks by hand."""
        losses = check_losses(losses)
        self._watch.note_given(losses)
        processes.check(self._options.stretches_tensors, features is not None)
        if features is not None:
            check_features(features)
        if by_hand is not None:
            return losses, parameters_by_modality(by_hand, self.param_groups)
        if self._modalities is not None:
            check_held(self._modalities, self._held())
        return losses, self._modalities

    def _in_order(self, rows: Rows) -> Rows:
        """The rows in the order in which their losses first came, which names the blocks."""
        if not rows.keys() <= self._order.keys():
            known = self._order if len(self._order) < MOST_NAMES else {}
            self._order = {name: i for i, name in enumerate(dict.fromkeys([*known, *rows]))}
        return dict(sorted(rows.items(), key=lambda item: self._order[item[0]]))

    def _constants(
        self, params: Sequence[Tensor], modalities: Modalities | None, features: Features | None
    ) -> tuple[tuple[str, object], ...]:
        """What ranks that train one model have in common, by the names of error messages."""
        rule = (self._options.rule_name, self._options.factor, self._options.rescale)
        return (
            ("trainable parameters", tuple((param.shape, param.dtype) for param in params)),
            ("integration, gamma or rescale", rule),
            ("param_groups_by_modality", positions_by_modality(modalities or {}, params)),
            ("features", None if features is None else tuple(features)),
            ("reduce_dtype and check", (self._selection.reduce_dtype, self._check)),
        )

    def __getstate__(self) -> dict[str, Any]:
        if any(window.goes_on() for window in self._windows):
            warn(
                "a copy of an optimizer in the middle of an accumulation starts anew: it adds to "
                "its .grad, and does not integrate anew what led there"
            )
        kept = ("param_groups", "_options", "_selection", "_check", "_rules", "_modalities")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    @property
    def blocks(self) -> Blocks:
        """The blocks of the last backward, heads included; printing them shows a table."""
        return block_table(self._seen, self.param_groups)

    @property
    def settings(self) -> str:
        """What was chosen, for a printed optimizer."""
        blocks = "found by reach" if self._modalities is None else ", ".join(self._modalities)
        return f"{self._options}\n    blocks: {blocks}"

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a loss over the processes that integrate as one."""
        return self._selection.of(self._trainable()).mean(value)

    def end_window(self) -> None:
        """What comes next starts anew, and is added to what is in ``.grad``."""
        self._windows = ()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and what has accumulated."""
        self.end_window()
        for param in self._held():
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.detach_().zero_()

    def _held(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _trainable(self) -> list[Tensor]:
        # A parameter that is listed twice counts once, one of a lazy module once it is there.
        held = dict.fromkeys(self._held())
        return [p for p in held if p.requires_grad and type(p) is not UninitializedParameter]
