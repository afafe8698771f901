"""What can be read once and checkpoints of others: right where one loss comes, or refused."""

import sys
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mmpareto_optim import GradientIntegrator, MMParetoOptimizer
from tests.integrator.test_check import Shared, Through, saved
from tests.models import Losses, grads


def read_once(z: Tensor) -> Tensor:
    """What was offloaded is read and deleted."""

    def backward(kept: list[Tensor], g: Tensor) -> Tensor:
        if not kept:
            raise RuntimeError("the offloaded activation was read already")
        return g * kept.pop()

    return saved(z, lambda x: (x.square(), [2 * x]), backward)


SELECTIVE = partial(create_selective_checkpoint_contexts, [torch.ops.aten.tanh.default])


def selective(z: Tensor) -> Tensor:
    """Activations of chosen operations are kept, and handed out once."""
    found: Tensor = checkpoint(torch.tanh, z, use_reentrant=False, context_fn=SELECTIVE)
    return found


def with_a_second_loss(model: Shared, kind: Through) -> Losses:
    """One loss goes through it; the other has a way of its own from the same encoder."""
    z = model.inner(model.encoder(model.x).tanh())
    return {"one": model.one(kind(z)).square().mean(), "other": model.other(z).sin().mean()}


@pytest.mark.parametrize(
    ("kind", "message"),
    [(read_once, "was read already"), (selective, r"loss '(one|other)'.*context_fn")],
)
def test_what_can_be_read_once_is_right_or_refused(kind: Through, message: str) -> None:
    """Where one loss alone goes through it, it is right, and the check says nothing."""
    model = Shared(kind)
    opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), integration="uniform")
    twin = deepcopy(model)
    for _ in range(2):
        opt.zero_grad()
        twin.zero_grad()
        opt.backward(with_a_second_loss(model, kind))
        torch.stack(list(with_a_second_loss(twin, kind).values())).sum().backward()
        torch.testing.assert_close(grads(model), grads(twin))
    opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    opt.zero_grad()
    before = deepcopy(list(model.parameters()))
    # PyTorch 2.8 lets the second pass through such a checkpoint, with other activations.
    with pytest.raises((RuntimeError, UserWarning), match=rf"{message}|do not add up"):
        opt.step(losses=model.losses())
    assert all(param.grad is None for param in model.parameters())
    torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)


class Recomputed(torch.autograd.Function):
    """A checkpoint as older projects have it: its backward runs forward again and differentiates.

    ``how``: what differentiates; "once" as guided-diffusion, which then deletes what it kept.
    """

    @staticmethod
    def forward(ctx: Any, module: nn.Module, how: str, x: Tensor, *params: Tensor) -> Tensor:
        ctx.module, ctx.how, ctx.x, ctx.params = module, how, x, params
        with torch.no_grad():
            return module(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if ctx.how == "fairscale" and not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "Checkpointing is not compatible with .grad() or when an `inputs` parameter is "
                "passed to .backward(), please use .backward() if possible"
            )
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.module(x.view_as(x))
        if ctx.how in ("backward", "fairscale"):
            torch.autograd.backward(y, gradients[0])
            return None, None, x.grad, *(None for _ in ctx.params)
        found = torch.autograd.grad(y, [x, *ctx.params], gradients[0])
        if ctx.how == "once":
            del ctx.x
        return None, None, *found


def recomputed(model: Shared, how: str) -> Losses:
    z = model.encoder(model.x).tanh()
    params = () if how in ("backward", "fairscale") else tuple(model.inner.parameters())
    z = Recomputed.apply(model.inner, how, z, *params)  # type: ignore[no-untyped-call]
    return {"one": model.one(z).square().mean(), "other": model.other(z).sin().mean()}


@pytest.mark.parametrize("how", ["grad", "backward"])
def test_checkpoints_of_others_that_bear_several_passes(how: str) -> None:
    model = Shared(torch.tanh)
    twin = deepcopy(model)
    integrator = GradientIntegrator(model.parameters(), integration="uniform")
    for _ in range(3):  # without a zero_grad
        integrator.backward(recomputed(model, how))
        torch.stack(list(recomputed(twin, how).values())).sum().backward()
        torch.testing.assert_close(grads(model), grads(twin))


@pytest.mark.filterwarnings("ignore:the losses reach trainable parameters that no optimizer")
def test_a_backward_within_the_backward_at_parameters_of_others() -> None:
    """They get what plain PyTorch gives them; a check would add its own pass."""
    model = Shared(torch.tanh)
    twin = deepcopy(model)
    held = [*model.encoder.parameters(), *model.one.parameters(), *model.other.parameters()]
    GradientIntegrator(held, integration="uniform", check=False).backward(
        recomputed(model, "backward")
    )
    torch.stack(list(recomputed(twin, "backward").values())).sum().backward()
    torch.testing.assert_close(grads(model), grads(twin))


@pytest.mark.parametrize("how", ["once", "fairscale"])
def test_checkpoints_of_others_that_do_not_are_refused(how: str) -> None:
    model = Shared(torch.tanh)
    opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for call in (opt.backward, opt.step):
        with pytest.raises((RuntimeError, AttributeError)) as refused:
            call(losses=recomputed(model, how))
        if how == "fairscale" or sys.version_info >= (3, 11):  # which has notes on exceptions
            told = " ".join([str(refused.value), *getattr(refused.value, "__notes__", [])])
            assert "of loss 'one'" in told or "loss 'other' goes" in told
        assert all(param.grad is None for param in model.parameters())


def test_a_hidden_state_that_is_carried_over() -> None:
    cell, head = nn.GRUCell(3, 4), nn.Linear(4, 2)
    opt = MMParetoOptimizer(torch.optim.SGD([*cell.parameters(), *head.parameters()], lr=0.0))
    hidden = torch.zeros(2, 4)
    for batch in range(2):
        hidden = cell(torch.randn(2, 3), hidden)
        one, other = head(hidden).square().mean(0)
        if batch:
            with pytest.raises(RuntimeError, match=r"freed.*detach"):
                opt.step(losses={"one": one, "other": other})
        else:
            opt.step(losses={"one": one, "other": other})
