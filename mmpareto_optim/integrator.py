"""Settings, and what holds from one backward to the next."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mmpareto_optim.engine import Call, Engine
from mmpareto_optim.gradients.features import Features, check_features
from mmpareto_optim.gradients.losses import Losses, check_losses
from mmpareto_optim.groups import as_groups
from mmpareto_optim.measuring import Measuring
from mmpareto_optim.method import Integration, Method, check_settings, constants_of
from mmpareto_optim.modalities import Modalities, check_held, parameters_by_modality
from mmpareto_optim.parallel.choice import Choice, check_averaging
from mmpareto_optim.report import Blocks, block_table, describe, settings_of, warn_of_small_gradient
from mmpareto_optim.rules import Rule
from mmpareto_optim.stats import BlockStats
from mmpareto_optim.twice import check_twice

if TYPE_CHECKING:  # not in every build
    from torch.distributed import ProcessGroup


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
            ``average_gradients=False``; an unknown ``reduce_dtype``.
    """

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
        self.most_losses = 0
        self._warned = False
        self._engine = Engine()
        self._measuring.forget()

    def end_window(self) -> None:
        """What comes next starts anew, and is added to what is in ``.grad``."""
        self._engine.window = None

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
        run = self._integrate
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
            method = self._method()
            turn = self._measuring.turn(self._engine.window, self.integration, self.gamma)
            modalities = self._checked_modalities(by_hand)
            if self._memory == "low":
                check_twice(method, processes, features is not None, self._engine.window)
            processes.check_method(method.by_tensor, features is not None)
            if features is not None:
                check_features(features)
            common = (
                *constants_of(params, method, modalities, features),
                ("measure_every or measure_noise", turn[1:]),
                ("reduce_dtype", self._choice.reduce_dtype),
            )
            call = Call(
                losses=losses,
                features=features,
                params=params,
                processes=processes,
                common=common,
                method=method,
                modalities=modalities,
                turn=turn,
                retain_graph=retain_graph,
                keep=keep,
                describe=self._describe,
            )
            found = None if self._memory == "low" else self._engine.differentiate(call)
        if found is None:
            self._engine.integrate_twice(call)
        else:
            self._engine.integrate(call, found)
        self._measuring.done(turn)
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
    def stats(self) -> dict[str, BlockStats]:
        """As said of the class."""
        return self._engine.stats

    @property
    def has_integrated(self) -> bool:
        """Whether there has been a backward."""
        return self._engine.has_integrated

    @property
    def blocks(self) -> Blocks:
        """What the last backward found to be one block; printing it is a table.

        For each block its objectives and parameters, heads included; empty before the first
        backward.
        """
        return block_table(*self._engine.seen, self.param_groups)

    @property
    def settings(self) -> str:
        """What was chosen, for a printed optimizer."""
        return settings_of(self._method(), self._modalities)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a loss over the processes that integrate as one."""
        return self._choice.of(self._trainable()).mean(value)

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
