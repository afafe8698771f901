"""Custom autograd functions whose backward hands out memory that must not be written to."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Added(torch.autograd.Function):
    """The sum of two tensors; one tensor is the gradient of both."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        return first + second

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


class Total(torch.autograd.Function):
    """The sum of all entries; the gradient is one number, expanded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.expand(ctx.shape)


class NumpySine(torch.autograd.Function):
    """A sine computed by numpy; the gradient lives in numpy's memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = np.cos(x.detach().float().numpy())
        return torch.from_numpy(np.sin(x.detach().float().numpy())).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.from_numpy(grad.float().numpy() * ctx.slope).to(grad.dtype)


class Form(torch.autograd.Function):
    """The inner product with a constant; the gradient is the constant itself, not a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, constant: Tensor) -> Tensor:
        ctx.constant = constant
        return (x * constant).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        plain = bool(grad == 1)
        return (ctx.constant if plain else grad * ctx.constant), None


class Copies(torch.autograd.Function):
    """Each scalar as an output of one function; the gradients of the others are zeros."""

    @staticmethod
    def forward(ctx: Any, *scalars: Tensor) -> tuple[Tensor, ...]:
        return tuple(scalar.clone() for scalar in scalars)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


class SineAndCosine(torch.autograd.Function):
    """Two outputs of which a loss may use one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx: Any, to_sine: Tensor, to_cosine: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.as_tensor(to_sine * x.cos() - to_cosine * x.sin())


class Replayed(torch.autograd.Function):
    """A layer whose backward leaves all gradients in the same memory each time.

    So does a replayed CUDA graph, and no version counter tells of it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, memory: dict[str, Tensor]
    ) -> Tensor:
        y = torch.tanh(x @ weight.t() + bias)
        ctx.save_for_backward(x, weight, y)
        ctx.memory = memory
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        inside = grad * (1 - y * y)
        results = (inside @ weight, inside.t() @ x, inside.sum(0))
        wanted = zip(("x", "weight", "bias"), results, ctx.needs_input_grad, strict=False)
        return *(_static(ctx.memory, k, g) if needed else None for k, g, needed in wanted), None


def _static(memory: dict[str, Tensor], name: str, values: Tensor) -> Tensor:
    known = memory.get(name)
    if known is None or (known.shape, known.dtype) != (values.shape, values.dtype):
        known = memory[name] = torch.empty_like(values)
    known.data.copy_(values)
    return known.detach()


def applied(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """A function's outputs; torch leaves ``apply`` without types."""
    return function.apply(*inputs)
