"""The check of the first step: a graph that does not bear several passes is told of, once."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, one_hot
from torch.utils.checkpoint import checkpoint

from mmpareto_optim import GradientIntegrator, MMParetoOptimizer
from tests.models import Losses, grads

Through = Callable[[Tensor], Tensor]


class Shared(nn.Module):
    """An encoder, something that its output goes through, and two heads on that."""

    def __init__(self, through: Through) -> None:
        super().__init__()
        self.encoder, self.inner = nn.Linear(4, 5), nn.Linear(5, 5)
        self.one, self.other = nn.Linear(5, 1), nn.Linear(5, 1)
        self.through = through
        self.x = torch.randn(8, 4)

    def losses(self) -> Losses:
        z = self.through(self.inner(self.encoder(self.x).tanh()))
        return {
            "one": (self.one(z) - 1).square().mean(),
            "other": 3 * (self.other(z) + 2).square().mean(),
        }


class Saved(torch.autograd.Function):
    """A function of a tensor, and how its backward makes the gradient of what it kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Any], backward: Any) -> Tensor:
        y, ctx.kept = function(x)
        ctx.how = backward
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.how(ctx.kept, gradients[0]), None, None


def saved(x: Tensor, function: Callable[[Tensor], Any], backward: Any) -> Tensor:
    y: Tensor = Saved.apply(x, function, backward)  # type: ignore[no-untyped-call]
    return y


LABEL = torch.arange(8) % 5


def fused_cross_entropy(z: Tensor) -> Tensor:
    """Its forward makes the gradient, which its backward multiplies in place."""

    def forward(x: Tensor) -> Any:
        gradient = (x.softmax(1) - one_hot(LABEL, 5)) / len(x)
        return torch.nn.functional.cross_entropy(x, LABEL), gradient

    return z + saved(z, forward, lambda kept, g: kept.mul_(g))


def normalised_in_place(z: Tensor) -> Tensor:
    """Its backward makes the input again in the memory of the output."""

    def forward(x: Tensor) -> Any:
        std, mean = torch.std_mean(x, 0, correction=0)
        y = (x - mean) / std
        return y.clone(), (y, std, mean)

    def backward(kept: Any, g: Tensor) -> Tensor:
        y, std, mean = kept
        found: Tensor = (g - g.mean(0) - y * (g * y).mean(0)) / std
        y.mul_(std).add_(mean)
        return found

    return saved(z, forward, backward)


def hook_that_removes_itself(z: Tensor) -> Tensor:
    """As of deep equilibria, which solve a linear system there."""
    z = z * 1.0

    def solve(gradient: Tensor) -> Tensor:
        handle.remove()
        found: Tensor = torch.linalg.solve(torch.eye(5) * 0.4, gradient, left=False)
        return found

    handle = z.register_hook(solve)
    return z


def hooked(hook: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    z = z * 1.0
    z.register_hook(hook)
    return z


def clipped_by_norm(gradient: Tensor) -> Tensor:
    factor: Tensor = (0.01 / gradient.norm()).clamp(max=1)
    return gradient * factor


def redrawn_dropout(z: Tensor) -> Tensor:
    found: Tensor = checkpoint(dropout, z, 0.5, use_reentrant=False, preserve_rng_state=False)
    return found


NOT_ADDITIVE: dict[str, Through] = {
    "fused cross entropy": fused_cross_entropy,
    "in-place normalisation": normalised_in_place,
    "a hook that removes itself": hook_that_removes_itself,
    "a hook that clips numbers": partial(hooked, lambda g: g.clamp(-0.01, 0.01)),
    "a hook that clips the norm": partial(hooked, clipped_by_norm),
    "a hook that takes signs": partial(hooked, torch.sign),
    "a hook that adds noise": partial(hooked, lambda g: g + torch.rand_like(g)),
    "a dropout drawn anew": redrawn_dropout,
}


def told(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(each.filename == __file__ for each in caught)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("kind", NOT_ADDITIVE)
def test_what_does_not_add_up_is_told_of_once(kind: str) -> None:
    model = Shared(NOT_ADDITIVE[kind])
    opt = MMParetoOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.01))
    (message,) = told(lambda: opt.step(losses=model.losses()))
    assert "do not add up" in message
    assert "parameter 'encoder." in message or "parameter 'inner." in message
    assert "check=False" in message
    opt.zero_grad()
    assert not told(lambda: opt.step(losses=model.losses()))


@pytest.mark.parametrize("kind", NOT_ADDITIVE)
def test_the_check_changes_no_gradient(kind: str) -> None:
    def once(check: bool) -> list[Tensor | None]:
        torch.manual_seed(0)
        model = Shared(NOT_ADDITIVE[kind])
        integrator = GradientIntegrator(model.parameters(), check=check)
        messages = told(lambda: integrator.backward(model.losses()))
        assert len(messages) == check
        assert all("param_groups[0]['params'][" in message for message in messages)
        return grads(model)

    torch.testing.assert_close(once(True), once(False), rtol=0, atol=0)


def static_buffer(z: Tensor) -> Tensor:
    """Each backward returns the same memory."""
    buffer = torch.empty_like(z)
    return saved(z, lambda x: (x.tanh(), x), lambda x, g: buffer.copy_(g * (1 - x.tanh() ** 2)))


def test_static_buffers_are_right() -> None:
    model, twin = Shared(static_buffer), Shared(torch.tanh)
    twin.load_state_dict(model.state_dict())
    twin.x = model.x
    for owner in (model, twin):
        integrator = GradientIntegrator(owner.parameters())
        for _ in range(2):
            integrator.backward(owner.losses())
    torch.testing.assert_close(grads(model), grads(twin))


@pytest.mark.parametrize("where", ["before the feature", "behind the feature"])
def test_features_mend_what_is_before_them(where: str) -> None:
    """The encoder is passed through once, and the check sees what is passed once a loss."""
    model, twin = Shared(normalised_in_place), Shared(lambda z: (z - z.mean(0)) / z.std(0, False))
    twin.load_state_dict(model.state_dict())
    twin.x = model.x
    opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), integration="uniform")

    def step() -> None:
        z = model.encoder(model.x)
        if where == "before the feature":
            z = normalised_in_place(z)
            losses = {"one": model.one(z).sin().mean(), "other": model.other(z).square().mean()}
        else:
            y = normalised_in_place(z)
            losses = {"one": model.one(y).sin().mean(), "other": model.other(y).square().mean()}
        opt.backward(losses, features={"z": z})

    if where == "behind the feature":
        (message,) = told(step)
        assert "feature 'z'" in message
        return
    step()
    y = twin.through(twin.encoder(twin.x))
    (twin.one(y).sin().mean() + twin.other(y).square().mean()).backward()
    torch.testing.assert_close(grads(model), grads(twin), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("check", "visits"), [(True, [3, 2, 2]), (False, [2, 2, 2])])
def test_one_pass_more_in_the_first_step(check: bool, visits: list[int]) -> None:
    seen: list[int] = []
    model = Shared(partial(hooked, lambda g: seen.append(1) or g))  # type: ignore[func-returns-value]
    opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), check=check)
    opt.step(losses={"one": model.losses()["one"]})  # nothing that could add up
    assert len(seen) == 1
    found = []
    for _ in visits:
        seen.clear()
        opt.step(losses=model.losses())
        found.append(len(seen))
    assert found == visits
