"""The optimizer wrapper: losses in, integrated gradients in ``.grad``, a step of the base."""

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mmpareto_optim.blocks import (
    Block,
    Modalities,
    Reach,
    blocks_by_modality,
    blocks_by_reach,
    check_held,
    parameters_by_modality,
)
from mmpareto_optim.distributed import (
    Constants,
    Processes,
    check_member,
    failing_together,
    group_of,
    is_initialized,
)
from mmpareto_optim.features import ENCODERS, check_features, gradients_by_features
from mmpareto_optim.flat import FlatBlock
from mmpareto_optim.gradients import Gradient, check_losses, gradients_of
from mmpareto_optim.graph import check_not_blurred
from mmpareto_optim.integration import Integration, Method, Ranks, integrate
from mmpareto_optim.rules import check_gamma
from mmpareto_optim.sharded import Sharding, gradients_by_backward, is_dtensor, local_part, whole
from mmpareto_optim.stats import BlockStats
from mmpareto_optim.window import Window

if TYPE_CHECKING:  # not in every build
    from torch.distributed import ProcessGroup

Losses = Mapping[str, Tensor]


class MMParetoOptimizer(Optimizer):
    """Wraps an optimizer so that it steps along a gradient common to several losses.

    Parameters that several losses reach form *blocks*, one for each set of losses. Each
    block's gradients are integrated by MMPareto (Wei & Hu, ICML 2024, arXiv 2405.17730);
    all others are the plain gradient of the sum of the losses. The base optimizer then
    takes its own step::

        opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=2e-3, momentum=0.9))
        opt.zero_grad()
        opt.step(losses={"mm": loss, "audio": audio_loss, "visual": visual_loss})

    ``param_groups``, ``state``, ``defaults`` and ``state_dict()`` are the base's own.
    Attributes that this class lacks (a third-party optimizer's ``train()``, say) are looked
    up on the base.

    Args:
        optimizer: the base, any ``torch.optim.Optimizer``.
        param_groups_by_modality: blocks chosen by hand instead of found: a mapping from a
            modality's name to a module, parameters or ``(name, parameter)`` pairs. Each is
            one block, integrated over the losses that reach it; the gradients of what it
            leaves out are added.
        integration: ``"mmpareto"``; ``"pareto"``, the plain min-norm point (MGDA);
            ``"uniform"``, the sum; or a function from a Gram matrix ``(m, m)`` to the
            coefficients ``(m,)`` of the gradients.
        gamma: factor on the integrated gradients of ``"mmpareto"``, positive.
        rescale: how ``"mmpareto"`` restores the length of a conflicting block's gradient:
            ``"encoder"``, the block as a whole, as in the paper, which keeps it a descent
            direction common to all losses; or ``"tensor"``, each parameter tensor by its
            own ratio, as in the authors' code, which does not.
        process_group: the processes that train one model, each on its share of the batch; None
            for all of ``torch.distributed``, once it is initialised. Each loss's gradient is
            averaged over them before it is integrated, as one process would with the whole
            batch, with ``DistributedDataParallel`` or without. Every rank must make the same
            calls; a loss or a parameter that some of them do not reach counts as zero there.
            Parameters of FSDP2 (``fully_shard``) and other DTensors are integrated as a whole,
            and not averaged over the processes of their own device mesh.
        average_gradients: False where each process trains a model of its own.

    Attributes:
        optimizer: the base optimizer.
        stats: for each block of two or more objectives a :class:`BlockStats` of the last
            integration, by the block's name: the modality, or the names of the losses that
            reach it joined by ``+``.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or is wrapped already;
            ``param_groups_by_modality`` is not a mapping or has an entry of another kind.
        ValueError: unknown ``integration`` or ``rescale``; ``gamma`` not positive; a
            parameter in two modalities, or one that the base does not hold; a
            ``process_group`` that this process is not in, or with ``average_gradients=False``.
    """

    stats: dict[str, BlockStats]
    _window: Window | None
    _checked_reach: Reach
    _processes: Processes | None
    _sharding: Sharding | None

    def __init__(
        self,
        optimizer: Optimizer,
        param_groups_by_modality: Mapping[str, Any] | None = None,
        *,
        integration: Integration = "mmpareto",
        gamma: float = 1.5,
        rescale: Literal["encoder", "tensor"] = "encoder",
        process_group: "ProcessGroup | None" = None,
        average_gradients: bool = True,
    ) -> None:
        # Optimizer.__init__ would make param_groups and state of our own: they are the base's.
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}: "
                "build the base first, as in MMParetoOptimizer(torch.optim.SGD(...))"
            )
        if isinstance(optimizer, MMParetoOptimizer):
            raise TypeError(
                "optimizer is an MMParetoOptimizer already: wrap the base once, or give its "
                "attribute .optimizer"
            )
        if not callable(integration) and integration not in ("mmpareto", "pareto", "uniform"):
            raise ValueError(
                'integration must be "mmpareto", "pareto", "uniform" or a function from a Gram '
                f"matrix to coefficients, got {integration!r}"
            )
        if rescale not in ("encoder", "tensor"):
            raise ValueError(f'rescale must be "encoder" or "tensor", got {rescale!r}')
        check_gamma(gamma)
        if process_group is not None:
            if not average_gradients:
                raise ValueError(
                    "process_group names the processes to average over, and average_gradients is "
                    "False: leave one of them out"
                )
            check_member(process_group)
        self.optimizer = optimizer
        self.integration = integration
        self.gamma = gamma
        self.rescale = rescale
        self.process_group = process_group
        self.average_gradients = average_gradients
        self._modalities: Modalities | None = None
        self._forget()
        if param_groups_by_modality is not None:
            self._modalities = parameters_by_modality(param_groups_by_modality)
            check_held(self._modalities, self._held())

    @overload
    def step(
        self,
        closure: None = None,
        *,
        losses: Losses | None = None,
        features: Mapping[str, Tensor] | None = None,
        param_groups_by_modality: Mapping[str, Any] | None = None,
    ) -> None: ...

    @overload
    def step(
        self,
        closure: Callable[[], Any],
        *,
        losses: None = None,
        features: None = None,
        param_groups_by_modality: Mapping[str, Any] | None = None,
    ) -> Any: ...

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        losses: Losses | None = None,
        features: Mapping[str, Tensor] | None = None,
        param_groups_by_modality: Mapping[str, Any] | None = None,
    ) -> Any:
        """Integrate the losses' gradients, if losses are given, and step the base.

        With ``losses`` it is :meth:`backward` and the base's step, with the same gradients bit
        for bit, and saves what only a later ``backward`` would need.

        Args:
            closure: re-evaluates the model: clears the gradients and returns the mapping
                of losses, which is integrated before the base goes on. A closure that
                returns anything else has done its own ``backward``, as in plain PyTorch.
            losses: as for :meth:`backward`.
            features: as for :meth:`backward`, with ``losses``.
            param_groups_by_modality: as for :meth:`backward`.

        Returns:
            What the base's step returns; with a closure the sum of its losses, otherwise
            None.

        Raises:
            TypeError: both ``losses`` and ``closure``, ``features`` without ``losses``, or a
                base that cannot step without a closure, given none; and whatever
                :meth:`backward` raises.
        """
        if closure is not None and not callable(closure):
            raise TypeError(
                f"closure must be callable, got {type(closure).__name__}: pass losses by name, as "
                "in step(losses=...)"
            )
        if losses is not None and closure is not None:
            raise TypeError(
                "step() takes losses or a closure that returns them, not both; where a framework "
                "brings a closure of its own (Lightning does), call backward(losses), then step()"
            )
        if features is not None and losses is None:
            raise TypeError(
                "step() takes features only with losses: a closure computes its own, and calls "
                "backward(losses, features=...) itself"
            )
        if param_groups_by_modality is not None and losses is None and closure is None:
            raise TypeError("step() takes param_groups_by_modality only with losses or a closure")
        if closure is None and _needs_closure(type(self.optimizer).step):
            raise TypeError(
                f"{type(self.optimizer).__name__} evaluates the losses more than once in a step: "
                "call step(closure) with a closure that returns the mapping of losses"
            )
        if losses is not None:
            self._backward(losses, features, param_groups_by_modality, keep=False)
        if closure is None:
            result = self.optimizer.step()
        else:
            result = self.optimizer.step(self._integrating(closure, param_groups_by_modality))
        self._window = None
        return result

    def backward(
        self,
        losses: Losses,
        *,
        features: Mapping[str, Tensor] | None = None,
        param_groups_by_modality: Mapping[str, Any] | None = None,
    ) -> None:
        """Leave the integrated gradients of the losses in ``.grad``, as ``backward`` does.

        One backward pass a loss; the graph of the first is freed. Called again before
        ``zero_grad()`` or ``step()``, the gradients of each loss accumulate and their
        sums are integrated: micro-batches give what one large batch gives, as long as nothing
        else changes ``.grad`` in between. What does (clipping, another ``backward``) is added
        to and not integrated again.

        Unlike ``Tensor.backward``, this reaches only the parameters that the base holds, runs
        tensor hooks once a loss and no post-accumulate-grad hooks, and refuses
        ``torch.utils.checkpoint`` with ``use_reentrant=True``: use ``use_reentrant=False``.
        Where parameters are DTensors (FSDP2, tensor parallelism) it is ``Tensor.backward`` that
        runs, once a loss, with all that comes of it.

        With several processes it is collective: see ``process_group`` of the constructor.

        With ``features`` the losses are differentiated down to the encoders' outputs only and
        integrated there (Sener & Koltun 2018, Section 3.3); one backward pass takes the result
        through the encoders, as in plain training. The direction is then common to all losses
        as seen from the features: to first order, moving them along it lowers every loss. In
        the space of the encoders' parameters that is no guarantee. ``stats`` has an entry for
        each feature, of gradients of its shape. Each call integrates its own batch, and
        micro-batches add up what each of them gave.

        Args:
            losses: scalars by name, each with a graph; the joint loss first.
            features: outputs of the encoders by modality, the very tensors that the losses are
                computed from; None for exact gradients. Parameters that are not behind a
                feature are treated as without.
            param_groups_by_modality: overrides that of the constructor.

        Raises:
            TypeError: ``losses`` is not a mapping from names to tensors; a sparse gradient.
            ValueError: no loss; one that is not a scalar or has no graph; as in the
                constructor for ``param_groups_by_modality``; an ``integration`` function
                that returns another shape. Features that have no graph, that no loss reaches
                or that a loss goes around; several losses through one region that
                ``torch.compile`` compiled; features with ``rescale="tensor"``, or in only a
                part of the calls that accumulate.
                Sharded parameters with features, with ``rescale="tensor"``, of FSDP1, or on
                device meshes that do not fit each other or the process group.
            RuntimeError: a loss whose graph was freed by an earlier backward, or goes through
                a reentrant checkpoint; an error on another rank, or arguments unlike its;
                no loss reaches a sharded parameter.

        After an exception parameters, ``.grad`` and the base optimizer are as before the call.
        """
        owner = self.optimizer
        if isinstance(owner, MMParetoOptimizer):
            # Lightning hands out an object that inherits these methods and holds the optimizer.
            owner.backward(
                losses, features=features, param_groups_by_modality=param_groups_by_modality
            )
        else:
            self._backward(losses, features, param_groups_by_modality, keep=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the base does, and what has accumulated."""
        self._window = None
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; its parameters join the blocks of the losses that reach them."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base's state: a checkpoint of the plain optimizer and of this one are the same."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the base's state."""
        self.optimizer.load_state_dict(state_dict)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's own list."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base's own state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's own defaults."""
        return self.optimizer.defaults

    # Hooks run around the base's step, when .grad is there, and are handed this optimizer.

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """As in ``torch.optim``; called with the integrated gradients in ``.grad``."""
        return self.optimizer.register_step_pre_hook(self._handed_self(hook))

    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """As in ``torch.optim``."""
        return self.optimizer.register_step_post_hook(self._handed_self(hook))

    def register_state_dict_pre_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """As in ``torch.optim``."""
        return self.optimizer.register_state_dict_pre_hook(self._handed_self(hook), prepend)

    def register_state_dict_post_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """As in ``torch.optim``."""
        return self.optimizer.register_state_dict_post_hook(self._handed_self(hook), prepend)

    def register_load_state_dict_pre_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """As in ``torch.optim``."""
        return self.optimizer.register_load_state_dict_pre_hook(self._handed_self(hook), prepend)

    def register_load_state_dict_post_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """As in ``torch.optim``."""
        return self.optimizer.register_load_state_dict_post_hook(self._handed_self(hook), prepend)

    def __repr__(self) -> str:
        blocks = "found by reach" if self._modalities is None else ", ".join(self._modalities)
        integration = getattr(self.integration, "__name__", self.integration)
        settings = f"integration={integration!r}"
        if self.integration == "mmpareto":
            settings += f", gamma={self.gamma}, rescale={self.rescale!r}"
        base = "    ".join(repr(self.optimizer).splitlines(keepends=True))
        return f"{type(self).__name__} (\n    {settings}\n    blocks: {blocks}\n    {base}\n)"

    def __getattr__(self, name: str) -> Any:
        # Private names stay the base's own: GradScaler, say, asks for one that is a promise
        # about the object it is handed.
        if name.startswith("_") or name == "optimizer":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                "a process group cannot be copied or pickled, nor can this optimizer, which holds "
                "one: save its state_dict(), and build it anew"
            )
        own = ("integration", "gamma", "rescale", "process_group", "average_gradients")
        return {name: self.__dict__[name] for name in ("optimizer", "_modalities", *own)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        """What follows from the settings and the last steps."""
        self.stats = {}
        self._window = None
        self._checked_reach = ()
        self._processes = None
        self._sharding = None

    def _backward(
        self,
        losses: Losses,
        features: Mapping[str, Tensor] | None,
        param_groups_by_modality: Mapping[str, Any] | None,
        *,
        keep: bool,
    ) -> None:
        processes = self._several()
        with failing_together(processes):
            check_losses(losses)
            held = self._held()
            modalities = self._modalities
            if param_groups_by_modality is not None:
                modalities = parameters_by_modality(param_groups_by_modality)
            if modalities is not None:
                check_held(modalities, held)
            self._check_features(features)
            params = [param for param in held if param.requires_grad]
            sharding = self._shards_of(params, features)
            method = Method(self.integration, self.gamma, self.rescale)
            constants: Constants = ()
            if processes is not None:
                constants = _constants(params, method, modalities, features)
            # Before autograd runs: it fills .grad itself where a parameter retains its gradient.
            foreign = [param.grad for param in params]
            rows, seen = self._gradients(
                losses, features, params, method, processes, constants, sharding
            )
        with torch.no_grad():
            if processes is not None:
                rows = _averaged(rows, params, processes, constants, sharding)
            window = Window(params, rows, foreign)
            # Until the new one is complete there is none: whatever raises below (a rule of
            # the user's, say) leaves .grad as it is and ends the accumulation.
            earlier, self._window = self._window, None
            if earlier is not None:
                window.extend(earlier)
            blocks = self._blocks(window, modalities, losses)
            gradients, stats = integrate(
                blocks,
                params,
                window.rows,
                method,
                keep=keep,
                flatten=FlatBlock if sharding is None else sharding.flat,
                ranks=_ranks(processes, sharding),
            )
            window.write(gradients)
            self.stats = seen | stats
            self._window = window if keep else None

    def _gradients(
        self,
        losses: Losses,
        features: Mapping[str, Tensor] | None,
        params: Sequence[Tensor],
        method: Method,
        processes: Processes | None,
        constants: Constants,
        sharding: Sharding | None,
    ) -> tuple[dict[str, Gradient], dict[str, BlockStats]]:
        """Each loss's gradient on this rank, and what was integrated at features, if any."""
        if features is not None:
            return gradients_by_features(
                losses, features, params, method, self._describe, processes, constants
            )
        if sharding is None:
            return gradients_of(losses, params, self._describe), {}
        if processes is not None:
            processes.check_alike((*constants, ("losses", tuple(losses))))
        rows = gradients_of(losses, params, self._describe, gradients_by_backward)
        sharding.check_reached(rows)
        return rows, {}

    def _check_features(self, features: Mapping[str, Tensor] | None) -> None:
        if features is not None:
            check_features(features)
            if self.integration == "mmpareto" and self.rescale == "tensor":
                raise ValueError(
                    'rescale="tensor" stretches the gradients of parameter tensors one by one, '
                    'and features are integrated before there are any: use rescale="encoder"'
                )
        if self._window is not None:
            before = ENCODERS in self._window.rows
            if before != (features is not None):
                raise ValueError(
                    f"backward() {'with' if before else 'without'} features has accumulated "
                    f"gradients that one {'without' if before else 'with'} cannot add to: call "
                    "zero_grad() in between, or give features in every call"
                )

    def _several(self) -> Processes | None:
        """The processes to average over; None if there is just this one."""
        if not self.average_gradients or not is_initialized():
            return None
        group = group_of(self.process_group)
        if self._processes is None or self._processes.group is not group:
            self._processes = Processes(group)
        return self._processes if self._processes.size > 1 else None

    def _shards_of(
        self, params: Sequence[Tensor], features: Mapping[str, Tensor] | None
    ) -> Sharding | None:
        """How DTensors among the parameters are spread; None if there are none."""
        if not is_initialized():
            return None
        if any(hasattr(param, "_fsdp_flattened") for param in params):
            raise ValueError(
                "the parameters belong to FullyShardedDataParallel (FSDP1), which reduces no "
                "gradient of a single loss: shard the model with "
                "torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        if not any(map(is_dtensor, params)):
            return None
        if features is not None:
            raise ValueError(
                "features cannot be integrated where parameters are sharded (DTensors): leave "
                "features out for the exact gradients"
            )
        if self.integration == "mmpareto" and self.rescale == "tensor":
            raise ValueError(
                'rescale="tensor" needs the norm of each parameter tensor, and these are sharded '
                '(DTensors): use rescale="encoder"'
            )
        group = group_of(self.process_group) if self.average_gradients else None
        known = self._sharding
        if known is None or known.group is not group or not _same(known.params, params):
            self._sharding = Sharding(params, group)
        return self._sharding

    def _blocks(
        self, window: Window, modalities: Modalities | None, losses: Losses
    ) -> tuple[Block, ...]:
        reach = window.reach()
        if reach != self._checked_reach:
            # A walk over the graph costs as much as a small backward; the same reach again
            # makes the same blocks. Where these are given and a zero gradient counts as none,
            # nothing depends on it.
            harmless = modalities is not None and self.integration in ("mmpareto", "uniform")
            if ENCODERS not in window.rows and not harmless:
                check_not_blurred(losses)
            self._checked_reach = reach
        if modalities is None:
            return blocks_by_reach(reach)
        return blocks_by_modality(reach, window.params, modalities, window.rows)

    def _integrating(
        self, closure: Callable[[], Any], param_groups_by_modality: Mapping[str, Any] | None
    ) -> Callable[[], Any]:
        def evaluate() -> Any:
            losses = closure()
            if not isinstance(losses, Mapping):
                return losses
            self.backward(losses, param_groups_by_modality=param_groups_by_modality)
            total = sum(loss.detach() for loss in losses.values())
            processes = self._several()
            # What a line search decides by must be the same on all ranks.
            return total if processes is None else processes.mean(whole(total))

        return evaluate

    def _held(self) -> list[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def _describe(self, wanted: Tensor) -> str:
        number, index, group = next(
            (number, index, group)
            for number, group in enumerate(self.optimizer.param_groups)
            for index, param in enumerate(group["params"])
            if param is wanted
        )
        if "param_names" in group:
            return f"parameter {group['param_names'][index]!r}"
        return f"param_groups[{number}]['params'][{index}] of shape {tuple(wanted.shape)}"

    def _handed_self(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda _, *args: hook(self, *args)


def _constants(
    params: Sequence[Tensor],
    method: Method,
    modalities: Modalities | None,
    features: Mapping[str, Tensor] | None,
) -> Constants:
    """What ranks that train one model have in common, by the names of error messages."""
    rule: Any = method.integration
    if callable(rule):
        rule = getattr(rule, "__name__", type(rule).__name__)
    chosen = {} if modalities is None else modalities
    return (
        ("trainable parameters", tuple((param.shape, param.dtype) for param in params)),
        ("integration, gamma or rescale", (rule, method.gamma, method.rescale)),
        (
            "param_groups_by_modality",
            tuple(
                (name, tuple(index for index, param in enumerate(params) if param in members))
                for name, members in chosen.items()
            ),
        ),
        ("features", None if features is None else tuple(features)),
    )


def _averaged(
    rows: Mapping[str, Gradient],
    params: Sequence[Tensor],
    processes: Processes,
    constants: Constants,
    sharding: Sharding | None,
) -> dict[str, Gradient]:
    likes = params if sharding is None else [local_part(param) for param in params]
    united = processes.unite(rows, likes, constants)
    processes.average(united, range(len(params)) if sharding is None else sharding.averaged)
    return united


def _ranks(processes: Processes | None, sharding: Sharding | None) -> Ranks:
    found: dict[str, Any] = {}
    if processes is not None:
        found["same"] = processes.same
    if sharding is not None:
        found["total"] = sharding.total
    return Ranks(**found)


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


@cache
def _needs_closure(step: Callable[..., Any]) -> bool:
    closure = inspect.signature(step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
