"""The optimizer wrapper: losses in, integrated gradients in ``.grad``, a step of the base."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mmpareto_optim.around import class_around
from mmpareto_optim.base_optimizer import (
    check_step,
    forwarded_hook,
    forwarded_property,
    integrating,
    needs_closure,
    raise_if_second_order,
)
from mmpareto_optim.integrator import GradientIntegrator
from mmpareto_optim.messages import (
    Blocks,
    warn_of_hooks_in_backward,
    warn_of_line_search,
    warn_of_nothing_to_integrate,
)
from mmpareto_optim.optimizer_list import as_one
from mmpareto_optim.options import Rescale, RuleChoice, no_attribute, set_attribute
from mmpareto_optim.rows import uncompiled
from mmpareto_optim.stats import BlockStats
from mmpareto_optim.total import total_of
from mmpareto_optim.types import Losses

if TYPE_CHECKING:  # not in every build
    from torch.distributed import ProcessGroup


class MMParetoOptimizer(Optimizer):
    """Wraps an optimizer so that it steps along a gradient common to several losses.

    Parameters that several losses reach form *blocks*, one for each set of losses. Each
    block's gradients are integrated by MMPareto (Wei & Hu, ICML 2024, arXiv 2405.17730); all
    others are the plain gradient of the sum of the losses. The base then takes its own step::

        opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=2e-3, momentum=0.9))
        opt.zero_grad()
        opt.step(losses={"mm": loss, "audio": audio_loss, "visual": visual_loss})

    ``optimizer`` is the base; of several bases, one optimizer that steps them all and has them as
    ``optimizers``. ``param_groups``, ``state``, ``defaults`` and ``state_dict()`` are the base's
    own, and attributes that this class lacks (a third-party optimizer's ``train()``, say) are
    looked up on the base. To set a name that neither has raises ``AttributeError``.

    Args:
        optimizer: the base, any ``torch.optim.Optimizer``; or a list or a dict of several that
            share a graph, such as Muon for the matrices and AdamW for the rest.
        param_groups_by_modality: blocks chosen by hand instead of found: a mapping from a
            modality's name to modules, parameters, ``(name, parameter)`` pairs or prefixes of the
            base's parameter names. Each is integrated over its losses; what is left out is added.
        integration: the rule: ``"mmpareto"``; ``"pareto"``, the plain min-norm point (MGDA);
            ``"uniform"``, the sum; ``"config"``, equal cosines (ConFIG); ``"upgrad"``, each
            gradient projected on the dual cone; ``"dualproj"``, the sum projected on it, which is
            the sum wherever it raises no loss; or a function from a Gram matrix ``(m, m)``, in
            float64, to the coefficients ``(m,)`` of the gradients. One that has a ``reset()``
            keeps a state, and each block gets a copy of its own.
        gamma: factor on the integrated gradients of any named rule, positive; None for 1.5 with
            ``"mmpareto"``, as in the authors' code, and 1 with the others. A gradient that is
            alone is taken as it is.
        rescale: how ``"mmpareto"`` restores the length of a conflicting block's gradient:
            ``"encoder"``, the block as a whole, as in the paper; or ``"tensor"``, each parameter
            tensor by its own ratio, as in the authors' code, which need not lower all losses.
        check: whether the first backward takes one pass more, for the gradient of the plain sum,
            and warns where those of the single losses do not add up to it, as some functions and
            hooks cannot run once a loss; also of a loss that is the sum of the others, or that a
            ``GradScaler`` alone scaled, and of losses that never meet. Hooks and ``retain_grad()``
            see that pass, too. Sharded parameters are not checked.
        process_group: the processes that train one model, each on its share of the batch; None
            for all of ``torch.distributed``, once it is initialised. Each loss's gradient is
            averaged over them before it is integrated, with ``DistributedDataParallel`` or
            without. Every rank must make the same calls; a loss or a parameter that some do not
            reach counts as zero there. DTensors (FSDP2, tensor parallelism) are integrated as a
            whole, and not averaged over the processes of their own device mesh.
        average_gradients: False where each process trains a model of its own.
        reduce_dtype: in what dtype real gradients are averaged: their own if None, or
            ``torch.bfloat16``, which halves what goes over the network and rounds each gradient to
            8 bits before and after the sum, ``float16``, ``float32`` or ``float64``.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or is wrapped already;
            ``param_groups_by_modality`` is not such a mapping.
        ValueError: an unknown rule, ``rescale`` or ``reduce_dtype``; ``gamma`` not positive; a
            parameter in two modalities, or one that the base does not hold; a ``process_group``
            that this process is not in; that or ``reduce_dtype`` without ``average_gradients``.
    """

    __setattr__ = set_attribute

    def __init__(
        self,
        optimizer: Optimizer | Iterable[Optimizer] | Mapping[str, Optimizer],
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
        # Optimizer.__init__ would make param_groups and state of our own: they are the base's.
        self.optimizer: Optimizer = as_one(optimizer, not_a=MMParetoOptimizer)
        self._steps = 0
        self._integrator = GradientIntegrator(
            self.optimizer.param_groups,
            param_groups_by_modality,
            integration=integration,
            gamma=gamma,
            rescale=rescale,
            check=check,
            process_group=process_group,
            average_gradients=average_gradients,
            reduce_dtype=reduce_dtype,
        )
        self._needs_closure = needs_closure(type(self.optimizer).step)
        if self._needs_closure and not (integration == "uniform" and gamma in (None, 1)):
            warn_of_line_search(type(self.optimizer).__name__)

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        losses: Losses | None = None,
        features: Mapping[str, Tensor] | None = None,
        param_groups_by_modality: Mapping[str, Any] | None = None,
    ) -> Any:
        """Integrate the losses' gradients, as :meth:`backward` does, and step the base.

        Args:
            closure: re-evaluates the model: clears the gradients and returns the mapping
                of losses, which is integrated before the base goes on. A closure that
                returns anything else has done its own ``backward``, as in plain PyTorch.
            losses: scalars by name, each with a graph; the joint loss first.
            features: outputs of the encoders by modality, see :meth:`backward`; only with losses.
            param_groups_by_modality: overrides that of the constructor.

        Returns:
            What the base's step returns; with a closure the sum of its losses.

        Raises:
            TypeError: arguments that do not go together, or no closure for a base that needs one.
            RuntimeError: a base that differentiates gradients once more; see :meth:`backward`.
        """
        return uncompiled(self._stepped)(closure, losses, features, param_groups_by_modality)

    def _stepped(
        self,
        closure: Callable[[], Any] | None,
        losses: Losses | None,
        features: Mapping[str, Tensor] | None,
        by_hand: Mapping[str, Any] | None,
    ) -> Any:
        if losses is None or closure is not None or self._needs_closure:
            check_step(self.optimizer, closure, losses, features, by_hand)
        self._steps += 1
        if self._steps == 10:
            most = max(self._integrator.most_losses, 0 if losses is None else len(losses))
            warn_of_nothing_to_integrate(most)
        if losses is not None:
            self._current().integrate(losses, features, by_hand, keep=False)
        try:
            if closure is None:
                result = self.optimizer.step()
            else:
                backward = partial(self.backward, param_groups_by_modality=by_hand)
                mean, groups = self._integrator.mean, self.optimizer.param_groups
                result = self.optimizer.step(integrating(closure, backward, mean, groups))
        except RuntimeError as error:
            if self._integrator.has_integrated:
                raise_if_second_order(self.optimizer, error)
            raise
        self._integrator.end_window()
        return result

    def backward(
        self,
        losses: Losses,
        *,
        features: Mapping[str, Tensor] | None = None,
        param_groups_by_modality: Mapping[str, Any] | None = None,
        retain_graph: bool = False,
    ) -> None:
        """Leave the integrated gradients of the losses in ``.grad``, as ``backward`` does.

        It makes one backward pass for each loss. If it is called again before ``zero_grad()`` or
        ``step()``, the gradients of each loss accumulate and their sums are integrated, so that
        micro-batches give what one large batch gives. If something else changes ``.grad`` in
        between (clipping, another ``backward``), the next gradients are added to what is there.

        Unlike ``Tensor.backward``, this reaches only the parameters that the base holds, runs
        tensor hooks once for each loss and no post-accumulate-grad hooks, and refuses
        ``torch.utils.checkpoint`` with ``use_reentrant=True``: use ``use_reentrant=False``.
        For DTensors, ``Tensor.backward`` itself runs once for each loss. With several processes,
        all ranks have to call it.

        With ``features`` the losses are differentiated down to the encoders' outputs only and
        integrated there (Sener & Koltun 2018, Section 3.3); one backward pass takes the result
        through the encoders. The direction is then common to all losses as seen from the features,
        which is no guarantee in the space of the parameters. ``stats`` has an entry for each
        feature. Each call integrates its own batch, and micro-batches add up what each gave.

        Args:
            losses: scalars by name, each with a graph; the joint loss first.
            features: outputs of the encoders by modality, the very tensors that the losses are
                computed from; None for exact gradients. Parameters that are not behind a
                feature are treated as without ``features``.
            param_groups_by_modality: overrides that of the constructor.
            retain_graph: whether the graph is needed again, by another ``backward``.

        Raises:
            TypeError: ``losses`` is not a mapping from names to tensors; a sparse gradient.
            ValueError: no loss; one that is not a scalar or has no graph; a wrong feature; an
                option that sharded parameters do not support; a rule's coefficients not ``(m,)``.
            RuntimeError: a loss whose graph was freed by an earlier backward, or goes through
                a reentrant checkpoint; an error on another rank, or arguments unlike its.

        After an exception parameters, ``.grad`` and the base optimizer are as before the call.
        """
        integrate = uncompiled(self._current().integrate)
        integrate(losses, features, param_groups_by_modality, retain_graph, keep=True)

    total = total_of
    around = classmethod(class_around)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the base does, and what has accumulated."""
        self._integrator.end_window()
        self.optimizer.zero_grad(set_to_none)

    integration = forwarded_property("_integrator", "integration", "The rule. Can be set.")
    gamma = forwarded_property("_integrator", "gamma", "Factor on named rules. Can be set.")
    rescale = forwarded_property("_integrator", "rescale", "As in the constructor. Can be set.")

    @property
    def stats(self) -> dict[str, BlockStats]:
        """What the last integration saw of each block of two losses or more, by its name."""
        return self._integrator.stats

    @property
    def blocks(self) -> Blocks:
        """The blocks of the last backward, heads included; print ``blocks.named(model)``."""
        return self._integrator.blocks

    # A checkpoint of the plain optimizer and of this one are the same.
    state_dict = forwarded_property("optimizer", "state_dict")
    load_state_dict = forwarded_property("optimizer", "load_state_dict")
    add_param_group = forwarded_property("optimizer", "add_param_group")
    param_groups = forwarded_property("optimizer", "param_groups")
    state = forwarded_property("optimizer", "state")
    defaults = forwarded_property("optimizer", "defaults")

    # Hooks run around the base's step, when .grad is there, and are handed this optimizer.
    register_step_pre_hook = forwarded_hook("register_step_pre_hook")
    register_step_post_hook = forwarded_hook("register_step_post_hook")
    register_state_dict_pre_hook = forwarded_hook("register_state_dict_pre_hook")
    register_state_dict_post_hook = forwarded_hook("register_state_dict_post_hook")
    register_load_state_dict_pre_hook = forwarded_hook("register_load_state_dict_pre_hook")
    register_load_state_dict_post_hook = forwarded_hook("register_load_state_dict_post_hook")

    def __repr__(self) -> str:
        base = "    ".join(repr(self.optimizer).splitlines(keepends=True))
        return f"{type(self).__name__} (\n    {self._integrator.settings}\n    {base}\n)"

    def __getattr__(self, name: str) -> Any:
        # Private names stay the base's own: GradScaler, say, asks for one that is a promise
        # about the object it is handed.
        is_private = name.startswith("_") or name == "optimizer"
        if is_private or not hasattr(self.optimizer, name):
            raise no_attribute(self, name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        names = ("optimizer", "_integrator", "_steps", "_needs_closure")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _current(self) -> GradientIntegrator:
        # An optimizer of Lightning's inherits these methods, and holds the one that is meant.
        if isinstance(self.optimizer, MMParetoOptimizer):
            return self.optimizer._current()
        # The base's list may be another by now, as after load_state_dict().
        self._integrator.param_groups = self.optimizer.param_groups
        if not self._integrator.has_integrated:
            warn_of_hooks_in_backward(self.optimizer.param_groups)
        return self._integrator
