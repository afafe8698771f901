"""Settings, what holds from one backward to the next, and the whole backward on one screen."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmpareto_optim.accumulation import GradAccumulator
from mmpareto_optim.autograd import Backward, Differentiation, grads_set_aside
from mmpareto_optim.blocks import Reach, blocks_of
from mmpareto_optim.distributed.select import ProcessSelection
from mmpareto_optim.distributed.single import Processes
from mmpareto_optim.features import rows_through
from mmpareto_optim.integration import Integration
from mmpareto_optim.messages import (
    LARGE_COEFFICIENT,
    Blocks,
    Seen,
    block_table,
    warn_of_small_gradient,
    warn_of_standing_block,
)
from mmpareto_optim.options import Options, Rescale, RuleChoice, check_features, check_losses
from mmpareto_optim.param_groups import (
    Modalities,
    as_groups,
    check_held,
    describe,
    parameters_by_modality,
)
from mmpareto_optim.rules.named import Rule
from mmpareto_optim.stats import BlockStats
from mmpareto_optim.types import Features, Losses

if TYPE_CHECKING:  # not in every build
    from torch.distributed import ProcessGroup

STEPS_WATCHED = 100
"""Steps of a block after which one that mostly stood still is warned of."""


def _option(name: str, doc: str) -> Any:
    """A setting that is validated when it is set."""

    def read(self: "GradientIntegrator") -> Any:
        return getattr(self._options, name)

    def write(self: "GradientIntegrator", value: Any) -> None:
        self._options = replace(self._options, **{name: value})
        self._copies.clear()

    return property(read, write, doc=doc)


class GradientIntegrator:
    """Fills ``.grad`` with gradients common to several losses, as ``Tensor.backward`` fills it.

    For training loops that step by themselves: several optimizers on one graph, a trainer that
    owns the step. :class:`MMParetoOptimizer` is an optimizer around it::

        integrator = GradientIntegrator(model.parameters())
        integrator.zero_grad()
        integrator.backward({"mm": loss, "audio": audio_loss, "visual": visual_loss})
        muon.step()
        adamw.step()

    Args:
        params: as ``torch.optim`` takes them: tensors, ``(name, tensor)`` pairs, or dicts with
            either as ``"params"``.
        param_groups_by_modality: as for :class:`MMParetoOptimizer`, and so are all that follow:
            ``integration``, ``gamma``, ``rescale``, ``process_group``, ``average_gradients`` and
            ``reduce_dtype``, with the same errors.

    Attributes:
        param_groups: the parameters, in dicts as ``torch.optim`` has them.
        most_losses: how many losses there have been at most in a backward.
        has_integrated: whether there has been a backward.
        stats: for each block of two or more objectives a :class:`BlockStats` of the last
            integration, by the block's name: the modality, or the names of the losses that
            reach it joined by ``+``.
    """

    integration = _option("integration", "The rule.")
    gamma = _option("gamma", "Factor on the integrated gradients; None for the rule's default.")
    rescale = _option("rescale", '``"encoder"`` or ``"tensor"``.')

    def __init__(
        self,
        params: Iterable[Any],
        param_groups_by_modality: Mapping[str, Any] | None = None,
        *,
        integration: RuleChoice = "mmpareto",
        gamma: float | None = None,
        rescale: Rescale = "encoder",
        process_group: "ProcessGroup | None" = None,
        average_gradients: bool = True,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        self._options = Options(integration, gamma, rescale)
        self._selection = ProcessSelection(process_group, average_gradients, reduce_dtype)
        self.param_groups = as_groups(params)
        self._modalities: Modalities | None = None
        if param_groups_by_modality is not None:
            self._modalities = parameters_by_modality(param_groups_by_modality, self._held())
        self._copies: dict[tuple[bool, str], Rule] = {}
        self.forget()

    def forget(self) -> None:
        """Forget the last steps: what has accumulated and what the losses have reached."""
        self.most_losses = 0
        self.stats: dict[str, BlockStats] = {}
        self.has_integrated = False
        self._seen = Seen()
        self._differentiation = Differentiation()
        self._reach, self._reach_at_features = Reach(), Reach()
        self._accumulated: GradAccumulator | None = None
        self._warned = False
        self._stood_still: dict[str, list[bool]] = {}

    def backward(
        self,
        losses: Losses,
        *,
        features: Features | None = None,
        param_groups_by_modality: Mapping[str, Any] | None = None,
        retain_graph: bool = False,
    ) -> None:
        """As :meth:`MMParetoOptimizer.backward`."""
        run = self.integrate
        if torch.compiler.is_compiling():  # the graph is broken around the integration
            run = torch.compiler.disable(run)
        run(losses, features, param_groups_by_modality, retain_graph, keep=True)

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
            modalities = self._checked(losses, features, by_hand, processes)
            if self._accumulated is not None and not self._accumulated.goes_on():
                self._accumulated = None  # somebody else's zero_grad() has ended it
            accumulates = keep or self._accumulated is not None
            constants = partial(self._constants, params, modalities, features)
            backward = Backward(
                losses, params, processes, constants, retain_graph, accumulates, self._describe
            )
            seen, stats = Seen(params), dict[str, BlockStats]()
            with grads_set_aside(params) as before:
                if features is None:
                    rows, plain = self._differentiation.rows(backward), None
                else:
                    at = Integration(self._options, processes, self._copies, at_features=True)
                    rows, plain, stats = rows_through(
                        self._differentiation, backward, features, self._reach_at_features, at, seen
                    )
            with torch.no_grad():
                accumulated = GradAccumulator(params, rows, plain, before)
                if self._accumulated is not None:
                    accumulated.extend(self._accumulated, processes)
                rows, plain = accumulated.rows, accumulated.plain
                integration = Integration(self._options, processes, self._copies)
                reached = self._reach.of(rows, params, integration.largest, self._held)
                seen.blocks = blocks_of(reached, params, modalities, rows)
                everything = [*rows.values()] if plain is None else [*rows.values(), plain]
                found = integration.integrate(seen.blocks, list(rows), everything, release=not keep)
                gradients = {i: processes.spread(params[i], g) for i, g in found.gradients.items()}
                accumulated.write(gradients, processes, keep=keep)
        self._accumulated = accumulated if keep else None
        of_features = {f"{n} (feature)" if n in found.stats else n: s for n, s in stats.items()}
        self.stats, self._seen = of_features | found.stats, seen
        self.has_integrated = True
        self.most_losses = max(self.most_losses, len(losses))
        if not callable(self._options.integration):
            self._watch(found.factors)

    def _checked(
        self,
        losses: Any,
        features: Any,
        by_hand: Mapping[str, Any] | None,
        processes: Processes,
    ) -> Modalities | None:
        """Raise for arguments that are wrong; the blocks by hand."""
        check_losses(losses)
        processes.check(self._options.stretches_tensors, features is not None)
        if features is not None:
            check_features(features)
        if by_hand is not None:
            return parameters_by_modality(by_hand, self._held())
        if self._modalities is not None:
            check_held(self._modalities, self._held())
        return self._modalities

    def _constants(
        self, params: Sequence[Tensor], modalities: Modalities | None, features: Features | None
    ) -> tuple[tuple[str, object], ...]:
        """What ranks that train one model have in common, by the names of error messages."""
        rule = (self._options.rule_name, self._options.factor, self._options.rescale)
        by_hand = tuple(
            (name, tuple(i for i, param in enumerate(params) if param in members))
            for name, members in (modalities or {}).items()
        )
        return (
            ("trainable parameters", tuple((param.shape, param.dtype) for param in params)),
            ("integration, gamma or rescale", rule),
            ("param_groups_by_modality", by_hand),
            ("features", None if features is None else tuple(features)),
            ("reduce_dtype", self._selection.reduce_dtype),
        )

    def _watch(self, factors: Mapping[str, Sequence[float]]) -> None:
        """Warn once of a very small gradient, and of each block that mostly stands still."""
        for name, numbers in factors.items():
            if max(numbers) > LARGE_COEFFICIENT and not self._warned:
                self._warned = warn_of_small_gradient(name, self.stats[name])
            known = self._stood_still.setdefault(name, [])
            if len(known) < STEPS_WATCHED:
                known.append(not any(numbers))
                if len(known) == STEPS_WATCHED and 2 * sum(known) > STEPS_WATCHED:
                    warn_of_standing_block(name, sum(known), STEPS_WATCHED)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("param_groups", "_options", "_selection", "_copies", "_modalities")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    @property
    def blocks(self) -> Blocks:
        """What the last backward found to be one block; printing it is a table.

        For each block its objectives and parameters, heads included; empty before the first
        backward.
        """
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
        self._accumulated = None

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
        # A parameter that is listed twice counts once.
        return [param for param in dict.fromkeys(self._held()) if param.requires_grad]

    def _describe(self, wanted: Tensor) -> str:
        return describe(wanted, self.param_groups)
