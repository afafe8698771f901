"""What a base optimizer must be, and torch.optim's contract for an optimizer around one."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from mmpareto_optim.messages import warn
from mmpareto_optim.options import is_mapping


def forwarded_property(holder: str, name: str, doc: str | None = None) -> Any:
    """An attribute of something that the optimizer holds, which reads and writes it there."""

    def write(self: Any, value: Any) -> None:
        setattr(getattr(self, holder), name, value)

    return property(lambda self: getattr(getattr(self, holder), name), write, doc=doc)


def forwarded_hook(name: str) -> Any:
    """A method that registers a hook on the base, which is handed the optimizer around it."""

    def register(self: Any, hook: Callable[..., Any], *args: Any, **options: Any) -> Any:
        register_on_base = getattr(self.optimizer, name)
        return register_on_base(lambda _, *given: hook(self, *given), *args, **options)

    register.__name__ = name
    register.__doc__ = "As in ``torch.optim``; the hook is called with this optimizer."
    return register


def check_step(base: Optimizer, closure: Any, losses: Any, features: Any, by_hand: Any) -> None:
    """Raise TypeError for arguments of ``step`` that do not go together, or with the base."""
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
            "step() takes features only with losses: a closure calls backward(losses, features=...)"
        )
    if by_hand is not None and losses is None and closure is None:
        raise TypeError("step() takes param_groups_by_modality only with losses or a closure")
    if closure is None and needs_closure(type(base).step):
        raise TypeError(
            f"{type(base).__name__} evaluates the losses more than once in a step: "
            "call step(closure) with a closure that returns the mapping of losses"
        )


def raise_if_second_order(base: Optimizer, error: RuntimeError) -> None:
    """Raise a step's error with its mend, if the base wants to differentiate gradients once more.

    Such bases (AdaHessian, SophiaH) raise about a gradient without a ``grad_fn``, as they step.
    """
    if "grad_fn" not in str(error):
        return
    names = (type(each).__name__ for each in getattr(base, "optimizers", [base]))
    raise RuntimeError(
        f"{' or '.join(names)} differentiates the gradients once more, as after "
        "backward(create_graph=True), and integrated gradients have no graph: take a base of "
        "first derivatives, or one whose step takes an estimate of the Hessian (docs/faq.md)"
    ) from error


def integrating(
    closure: Callable[[], Any],
    backward: Callable[[Any], None],
    mean: Callable[[Tensor], Tensor],
    groups: Iterable[Mapping[str, Any]],
) -> Callable[[], Any]:
    """A closure for the base of one that returns losses: they are integrated, and their sum given.

    The sum is a mean over the processes: what a line search decides by must be the same on all.
    """

    def evaluate() -> Any:
        before = _versions_of_grads(groups)
        losses = closure()
        if not is_mapping(losses):
            _check_differentiated(losses, before, _versions_of_grads(groups))
            return losses
        backward(losses)
        return mean(sum(losses[name].detach() for name in losses.keys()))  # noqa: SIM118

    return evaluate


Grads = list[tuple[Tensor | None, int]]


def _versions_of_grads(groups: Iterable[Mapping[str, Any]]) -> Grads:
    """By which it is told whether a ``.grad`` has changed."""
    grads = [param.grad for group in groups for param in group["params"]]
    return [(grad, 0 if grad is None else grad._version) for grad in grads]


def _check_differentiated(result: Any, before: Grads, after: Grads) -> None:
    """Raise or warn of what a closure returned that is no mapping, if it left no gradient.

    Raises:
        TypeError: several losses without names.
        RuntimeError: a loss, and no gradient has changed.
    """
    if isinstance(result, list | tuple):
        raise TypeError(
            f"the closure returned a {type(result).__name__}: return the mapping of losses alone, "
            'as in {"mm": loss, "audio": audio_loss}'
        )
    pairs = zip(before, after, strict=True)
    is_unchanged = all(old[0] is new[0] and old[1] == new[1] for old, new in pairs)
    mend = "return the mapping of losses, or call backward() in it"
    if isinstance(result, Tensor) and result.requires_grad and is_unchanged:
        raise RuntimeError(f"the closure left no gradient: {mend}")
    # A framework's closure returns None where gradients are there before, or a batch is skipped.
    if result is None and all(grad is None for grad, _ in after):
        warn(f"the closure returned None, and there is no gradient: {mend}")


@cache
def needs_closure(step: Callable[..., Any]) -> bool:
    """Whether an optimizer's ``step`` cannot do without a closure."""
    closure = inspect.signature(step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
