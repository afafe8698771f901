"""A loss reaches what it has moved: code that gives every parameter a gradient of zeros."""

import gc
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmpareto_optim import MMParetoOptimizer
from tests.models import LateFusion, Losses, audio_visual_batch, grads


class Two(torch.autograd.Function):
    """A custom function with an output for each of two losses."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return one.clone(), other.clone()

    @staticmethod
    def backward(ctx: Any, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return one, other


def assigned(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    collected = torch.zeros(2)
    collected[0] = one
    collected[1] = other
    return collected[0], collected[1]


def in_columns(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    means = torch.cat([one.view(1, 1), other.view(1, 1)], dim=1).mean(0)
    return means[0], means[1]


TOGETHER: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "assigned": assigned,
    "stack": lambda one, other: torch.stack([one, other]),
    "unbind": lambda one, other: torch.stack([one, other]).unbind(),
    "split": lambda one, other: torch.stack([one, other]).split(1),
    "chunk": lambda one, other: torch.stack([one, other]).chunk(2),
    "columns": in_columns,
    "custom function": Two.apply,
}


class Tasks(nn.Module):
    """A trunk under two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 1), nn.Linear(6, 1)

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(x).tanh()  # type: ignore[no-any-return]

    def losses(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (self.a(z) - y).square().mean(), 7 * (self.b(z) + y).square().mean()


def by_square(gram: Tensor) -> Tensor:
    return 1 / gram.diagonal().sqrt()


@pytest.mark.parametrize("integration", ["mmpareto", "pareto", by_square])
@pytest.mark.parametrize("with_features", [False, True])
@pytest.mark.parametrize("how", TOGETHER)
def test_losses_that_went_through_one_tensor(
    how: str, with_features: bool, integration: Any
) -> None:
    apart, together = Tasks(), Tasks()
    together.load_state_dict(apart.state_dict())
    opts = [
        MMParetoOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), integration=integration)
        for net in (apart, together)
    ]
    for _ in range(3):
        x, y = torch.randn(8, 5), torch.randn(8, 1)
        for net, opt in zip((apart, together), opts, strict=True):
            z = net.features(x)
            a, b = net.losses(z, y) if net is apart else TOGETHER[how](*net.losses(z, y))
            opt.zero_grad()
            opt.step(losses={"a": a, "b": b}, features={"z": z} if with_features else None)
        torch.testing.assert_close(grads(together), grads(apart))
        assert list(opts[1].stats) == list(opts[0].stats)


def test_the_cure_for_unused_parameters() -> None:
    plain, cured = LateFusion(), LateFusion()
    cured.load_state_dict(plain.state_dict())
    batch = audio_visual_batch()
    for net in (plain, cured):
        losses = net.losses(batch)
        if net is cured:
            everything = torch.stack([param.sum() for param in net.parameters()]).sum()
            losses = {name: loss + 0 * everything for name, loss in losses.items()}
        MMParetoOptimizer(torch.optim.SGD(net.parameters(), lr=0.1)).backward(losses)
    torch.testing.assert_close(grads(cured), grads(plain))


def test_both_modalities_through_one_head() -> None:
    model = LateFusion()
    twin = deepcopy(model)
    batch = audio_visual_batch()
    for net in (model, twin):
        z = net.features(batch)
        if net is model:
            parts = net.audio_head(torch.cat([z["audio"], z["visual"]])).chunk(2)
        else:
            parts = [net.audio_head(z["audio"]), net.audio_head(z["visual"])]
        losses = {
            name: nn.functional.cross_entropy(part, batch[2])
            for name, part in zip(("audio", "visual"), parts, strict=True)
        }
        opt = MMParetoOptimizer(torch.optim.SGD(net.parameters(), lr=0.1))
        opt.backward(losses)
        assert list(opt.stats) == ["audio+visual"]
    for part in ("audio", "visual", "audio_head"):
        pairs = zip(
            getattr(model, part).parameters(), getattr(twin, part).parameters(), strict=True
        )
        for found, expected in pairs:
            torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("integration", ["mmpareto", "pareto", "uniform"])
def test_zero_is_absent(integration: Any) -> None:
    found = []
    for case in ("left out", "times zero", "saturated", "saturated later"):
        torch.manual_seed(0)
        model, batch = LateFusion(), audio_visual_batch()
        opt = MMParetoOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), integration=integration, gamma=1.5
        )
        if case == "saturated later":
            opt.backward(model.losses(batch))
            opt.zero_grad()
        losses: Losses = {name: model.losses(batch)[name] for name in ("mm", "visual")}
        if case == "left out":
            del losses["visual"]
        elif case == "times zero":
            losses["visual"] = 0 * losses["visual"]
        else:
            losses["visual"] = losses["visual"].clamp(max=0.0)
        opt.backward(losses)
        found.append([None if g is None or not g.any() else g for g in grads(model)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


class Cross(nn.Module):
    """Two encoders and a fusion trunk that all three losses reach."""

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.visual, self.mixed = nn.Linear(5, 4), nn.Linear(7, 4), nn.Linear(8, 8)

    def losses(self, batch: tuple[Tensor, Tensor, Tensor]) -> Losses:
        audio, visual = self.audio(batch[0]), self.visual(batch[1])
        mixed = self.mixed(torch.cat([audio, visual], 1)).tanh()
        return {
            "mm": mixed.square().mean(),
            "audio": (mixed[:, :4] - audio).square().mean(),
            "visual": (mixed.sum(1, keepdim=True) - visual.detach() - 1).square().mean(),
        }


@pytest.mark.parametrize("integration", ["mmpareto", "pareto", "uniform"])
@pytest.mark.parametrize("missing", ["audio", "visual"])
def test_a_missing_loss_of_three_leaves_the_blocks_of_two(missing: str, integration: Any) -> None:
    found = []
    for zero in (False, True):
        torch.manual_seed(0)
        model, batch = Cross(), audio_visual_batch()
        opt = MMParetoOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), integration=integration
        )
        if zero:
            opt.backward(model.losses(batch))
            opt.zero_grad()
        losses = model.losses(batch)
        if zero:
            losses[missing] = 0 * losses[missing]
        else:
            del losses[missing]
        opt.backward(losses)
        found.append(grads(model))
    torch.testing.assert_close(found[1], found[0])


def test_what_no_loss_moves() -> None:
    """Zeros where plain training gives zeros, None where it gives None."""
    used, zeros, unused = (nn.Parameter(torch.ones(2)) for _ in range(3))
    opt = MMParetoOptimizer(torch.optim.SGD([used, zeros, unused], lr=0.1))
    opt.backward({"a": used.sum() + 0 * zeros.sum(), "b": (used * used).sum() + 0 * zeros.sum()})
    assert zeros.grad is not None
    assert not zeros.grad.any()
    assert unused.grad is None


def test_a_gradient_that_is_not_finite_confirms_nothing() -> None:
    model = Tasks()
    opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = torch.randn(8, 5), torch.randn(8, 1)
    for spoilt in (True, False, False):
        both = torch.stack(model.losses(model.features(x), y))
        losses = (both * torch.inf if spoilt else both).unbind()
        opt.zero_grad()
        opt.backward({"a": losses[0], "b": losses[1]})
    assert [block.objectives for block in opt.blocks] == [("a", "b"), ("a",), ("b",)]


def test_parameters_that_were_replaced_are_let_go_of() -> None:
    model = nn.Linear(3, 2)
    opt = MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))

    def step() -> None:
        found = model(torch.randn(4, 3))
        opt.zero_grad()
        opt.step(losses={"a": found.square().mean(), "b": found.sin().mean()})

    step()
    old = weakref.ref(model.weight)
    model.weight = nn.Parameter(torch.randn(2, 3))
    opt.param_groups[0]["params"][0] = model.weight
    step()
    step()
    gc.collect()
    assert old() is None
