"""What people do to ``.grad`` between two micro-batches."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Edit = Callable[[Sequence[Tensor]], object]


def _each(change: Callable[[Tensor], object]) -> Edit:
    def edit(parameters: Sequence[Tensor]) -> None:
        for parameter in _held(parameters):
            change(parameter)

    return edit


def _held(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter for parameter in parameters if parameter.grad is not None]


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _remove(parameter: Tensor) -> None:
    parameter.grad = None


def _replace(parameter: Tensor) -> None:
    parameter.grad = _grad(parameter).clone() * 0.5


def _copy(parameter: Tensor) -> None:
    parameter.grad = _grad(parameter).clone()


def _through_numpy(parameter: Tensor) -> None:
    grad = _grad(parameter)
    if grad.dtype == torch.bfloat16:
        grad.view(torch.int16).numpy()[...] = 0
    else:
        grad.numpy()[...] *= 0.5


def _foreach_zero(parameters: Sequence[Tensor]) -> None:
    data = [_grad(parameter).data for parameter in _held(parameters)]
    if data:
        torch._foreach_zero_(data)


def _clip(parameters: Sequence[Tensor]) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, 1e-2)


def _penalty(parameters: Sequence[Tensor]) -> None:
    terms = [p.double().square().sum() for p in parameters if p.requires_grad]
    if terms:
        torch.stack(terms).sum().mul(0.05).backward()


EDITS: dict[str, Edit] = {
    "none": _each(_remove),
    "replaced": _each(_replace),
    "copied": _each(_copy),
    "zero_": _each(lambda p: _grad(p).zero_()),
    "data.zero_": _each(lambda p: _grad(p).data.zero_()),
    "data.mul_": _each(lambda p: _grad(p).data.mul_(0.5)),
    "foreach zero": _foreach_zero,
    "numpy": _each(_through_numpy),
    "clipped": _clip,
    "penalty": _penalty,
}
# These leave the same tensor in place: if its values stay too, nobody can tell that it was edited.
SAME_TENSOR = ("zero_", "data.zero_", "data.mul_", "foreach zero", "numpy", "clipped", "penalty")
