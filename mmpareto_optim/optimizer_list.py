"""Several optimizers as one, for a graph that they share: Muon and AdamW, encoders and heads."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from mmpareto_optim.base_optimizer import needs_closure


def as_one(optimizers: Any, *, not_a: type[Optimizer]) -> Optimizer:
    """The optimizer itself, or one that steps several; raises for anything else."""
    several: Any = optimizers.values() if isinstance(optimizers, Mapping) else optimizers
    is_one = isinstance(several, Optimizer) or not isinstance(several, Iterable)
    bases = [several] if is_one else list(several)
    for base in bases:
        if not isinstance(base, Optimizer):
            mend = "build the base first, as in MMParetoOptimizer(torch.optim.SGD(...))"
            if callable(getattr(base, "step", None)) and not isinstance(base, type):
                mend = f"put it around, as in {type(base).__name__}(MMParetoOptimizer(base))"
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(base).__name__}: {mend}"
            )
        if hasattr(type(base), "grad_samples"):
            raise TypeError(
                f"{type(base).__name__} (Opacus) takes a gradient for each example, which "
                "autograd.grad does not make: losses cannot be integrated under it"
            )
        if isinstance(base, not_a):
            raise TypeError(
                f"optimizer is an {not_a.__name__} already: wrap the base once, or give its "
                "attribute .optimizer"
            )
    if not bases:
        raise ValueError("optimizer is an empty list: give at least one optimizer")
    return bases[0] if len(bases) == 1 else OptimizerList(bases)


class OptimizerList(Optimizer):
    """Steps each of its optimizers; to ``state_dict()`` it is one, with the groups of all."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        self.defaults: dict[str, Any] = {}
        # What torch.optim makes of an optimizer that it unpickles: hooks on state_dict().
        super().__setstate__({})
        holder: dict[Tensor, int] = {}
        for number, optimizer in enumerate(self.optimizers):
            if needs_closure(type(optimizer).step):
                raise TypeError(
                    f"{type(optimizer).__name__} evaluates the losses more than once in a step, "
                    "which the others cannot follow: give it alone"
                )
            for index, param in enumerate(_params_of(optimizer)):
                if holder.setdefault(param, number) != number:
                    raise ValueError(
                        f"parameter {index} of optimizer {number}, of shape {tuple(param.shape)}, "
                        f"is in optimizer {holder[param]} too, and both would step it: drop one"
                    )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The very dicts of all optimizers, in a list that takes no more."""
        return _Groups(group for each in self.optimizers for group in each.param_groups)

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        for optimizer in self.optimizers:
            count = len(optimizer.param_groups)
            optimizer.param_groups, groups = groups[:count], groups[count:]

    @property
    def state(self) -> Any:  # type: ignore[override]
        """By parameter, what the optimizer that holds it keeps: a view."""
        return _States(self.optimizers)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step each optimizer; a closure is evaluated once, before the first."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return result

    step.hooked = True  # type: ignore[attr-defined]  # global hooks run for each optimizer

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all optimizers."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def train(self) -> None:
        """Put those that have a mode (schedule-free ones) into that of training."""
        for optimizer in self.optimizers:
            if hasattr(optimizer, "train"):
                optimizer.train()

    def eval(self) -> None:
        """Put those that have a mode into that of evaluation."""
        for optimizer in self.optimizers:
            if hasattr(optimizer, "eval"):
                optimizer.eval()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: nobody knows which of them is meant."""
        raise ValueError("add_param_group() is not for several optimizers: call it on one of them")

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> Any:
        """Called before the first optimizer steps."""
        return self.optimizers[0].register_step_pre_hook(lambda _, *args: hook(self, *args))

    def register_step_post_hook(self, hook: Callable[..., Any]) -> Any:
        """Called after the last optimizer has stepped."""
        return self.optimizers[-1].register_step_post_hook(lambda _, *args: hook(self, *args))

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.optimizers))

    def __reduce__(self) -> tuple[Any, ...]:
        return OptimizerList, (self.optimizers,)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As ``load_state_dict()`` calls it, with the state and the groups of all."""
        self.param_groups = state["param_groups"]
        for optimizer in self.optimizers:
            groups, held = optimizer.param_groups, set(_params_of(optimizer))
            kept = {param: value for param, value in state["state"].items() if param in held}
            optimizer.__setstate__({"state": defaultdict(dict, kept), "param_groups": groups})


class _Groups(list[dict[str, Any]]):
    """Groups of several optimizers."""

    def _refuse(self, *_: Any) -> NoReturn:
        raise ValueError(
            "the groups of several optimizers: add or remove them at the one that is meant"
        )

    append = extend = insert = pop = remove = clear = reverse = _refuse
    __setitem__ = __delitem__ = __iadd__ = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


class _States(MutableMapping[Tensor, Any]):
    """The state of several optimizers."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    def __getitem__(self, param: Tensor) -> Any:
        return self._of(param)[param]

    def __setitem__(self, param: Tensor, value: Any) -> None:
        self._of(param)[param] = value

    def __delitem__(self, param: Tensor) -> None:
        del self._of(param)[param]

    def __iter__(self) -> Iterator[Tensor]:
        return chain.from_iterable(each.state for each in self._optimizers)

    def __contains__(self, param: object) -> bool:
        return any(param in each.state for each in self._optimizers)

    def __len__(self) -> int:
        return sum(len(each.state) for each in self._optimizers)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _of(self, param: Tensor) -> Any:
        for each in self._optimizers:
            if param in each.state or any(param is held for held in _params_of(each)):
                return each.state
        raise KeyError(param)


def _params_of(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]
