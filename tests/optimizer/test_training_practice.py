"""Clipping, accumulation, schedules, averaging, groups: as around any optimizer."""

import inspect
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from mmpareto_optim import MMParetoOptimizer
from tests.models import LateFusion, Losses, audio_visual_batch, grads

Batch = tuple[Tensor, Tensor, Tensor]


def wrapped(model: nn.Module, **options: Any) -> MMParetoOptimizer:
    return MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **options)


def parameters(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def clip_norm(model: nn.Module) -> None:
    assert float(nn.utils.clip_grad_norm_(model.parameters(), 0.05)) > 0.05


def clip_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.003)


@pytest.mark.parametrize("clip", [clip_norm, clip_value])
def test_clipping_acts_on_the_integrated_gradient(clip: Callable[[nn.Module], None]) -> None:
    """The oracle: a plain optimizer that is handed the clipped integrated gradient."""
    model = LateFusion()
    plain = deepcopy(model)
    opt, base = wrapped(model), torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        batch = audio_visual_batch()
        wrapped(plain).backward(plain.losses(batch))
        unclipped = grads(plain)
        clip(plain)
        base.step()
        base.zero_grad()

        opt.backward(model.losses(batch))
        clip(model)
        assert any(not a.equal(b) for a, b in zip(grads(model), unclipped, strict=True))  # type: ignore[union-attr, arg-type]
        opt.step()
        opt.zero_grad()
        assert_same(parameters(model), parameters(plain))


@pytest.mark.parametrize("clip", [None, clip_norm, clip_value])
def test_accumulation_then_clipping_is_one_large_batch(
    clip: Callable[[nn.Module], None] | None,
) -> None:
    small = LateFusion(dtype=torch.float64)
    large = deepcopy(small)
    opts = {model: wrapped(model) for model in (small, large)}
    for _ in range(3):
        batch = audio_visual_batch(dtype=torch.float64)
        for part in zip(*(tensor.chunk(4) for tensor in batch), strict=True):
            opts[small].backward({name: loss / 4 for name, loss in small.losses(part).items()})
        opts[large].backward(large.losses(batch))
        for model, opt in opts.items():
            if clip is not None:
                clip(model)
            opt.step()
            opt.zero_grad()
    torch.testing.assert_close(parameters(small), parameters(large))


# What each scheduler of torch needs beyond the optimizer.
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 0.9**step),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, total_iters=2),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, total_iters=4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=4),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 5),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, [0.2, 0.1], total_steps=10),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.LinearLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.9)],
        milestones=[2],
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.9)], opt
    ),
    "SWALR": lambda opt: swa_utils.SWALR(opt, swa_lr=0.05, anneal_epochs=3),
}


def test_the_table_holds_the_schedulers_of_torch() -> None:
    exported = {
        name
        for name, member in vars(lr_scheduler).items()
        if inspect.isclass(member) and issubclass(member, lr_scheduler.LRScheduler)
        if not name.startswith("_")
    } - {"LRScheduler"}
    assert exported <= SCHEDULERS.keys()


def two_groups(model: LateFusion) -> torch.optim.SGD:
    audio = list(model.audio.parameters())
    rest = [param for param in model.parameters() if param not in set(audio)]
    groups: list[dict[str, Any]] = [{"params": audio, "lr": 0.2}, {"params": rest}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


# PyTorch 2.8 of its own SequentialLR.
@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_are_the_base_optimizers(name: str) -> None:
    model = LateFusion()
    plain = deepcopy(model)
    opt, base = MMParetoOptimizer(two_groups(model)), two_groups(plain)
    ours, theirs = SCHEDULERS[name](opt), SCHEDULERS[name](base)
    seen = []
    for step in range(6):
        batch = audio_visual_batch()
        opt.zero_grad()
        opt.step(losses={"mm": model.losses(batch)["mm"]})
        base.zero_grad()
        plain.losses(batch)["mm"].backward()
        base.step()
        for scheduler in (ours, theirs):
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(1.0 + step) if plateau else scheduler.step()
        settings = [
            [(group["lr"], group["momentum"]) for group in optimizer.param_groups]
            for optimizer in (opt, base)
        ]
        assert settings[0] == settings[1]
        assert ours.get_last_lr() == theirs.get_last_lr()
        seen.append(settings[0])
    assert any(setting != seen[0] for setting in seen)
    assert_same(parameters(model), parameters(plain))
    ours.load_state_dict(theirs.state_dict())


def test_averaged_models() -> None:
    """SWA and EMA average what the wrapped optimizer made; batch norm is then re-estimated."""
    model = LateFusion()
    model.audio.append(nn.BatchNorm1d(6))
    opt = wrapped(model)
    ema_average = swa_utils.get_ema_multi_avg_fn(0.5)
    swa, ema = (
        swa_utils.AveragedModel(model),
        swa_utils.AveragedModel(model, multi_avg_fn=ema_average),
    )
    visited: list[list[Tensor]] = []
    expected_ema = parameters(model)
    for step in range(4):
        opt.zero_grad()
        opt.step(losses=model.losses(audio_visual_batch()))
        for averaged in (swa, ema):
            averaged.update_parameters(model)
        visited.append(parameters(model))
        expected_ema = (
            visited[0]
            if step == 0
            else [(old + new) / 2 for old, new in zip(expected_ema, visited[-1], strict=True)]
        )
    means = [torch.stack(values).mean(0) for values in zip(*visited, strict=True)]
    torch.testing.assert_close(parameters(swa.module), means)
    torch.testing.assert_close(parameters(ema.module), expected_ema)
    encoder = swa.module.get_submodule("audio")
    swa_utils.update_bn([audio_visual_batch()[0] for _ in range(3)], encoder)
    assert encoder.get_buffer("3.num_batches_tracked") == 3


@pytest.mark.filterwarnings("ignore:the losses reach trainable parameters that no optimizer")
def test_learning_rates_and_weight_decay_are_a_groups_own() -> None:
    """The oracle: plain SGD by hand, p - lr (g + decay p), with the integrated g."""
    model, batch = LateFusion(), audio_visual_batch()
    settings = {"audio": (0.5, 0.0), "visual": (0.0, 0.9), "mm_head": (0.1, 0.2)}
    base = torch.optim.SGD(
        [
            {"params": getattr(model, name).parameters(), "lr": lr, "weight_decay": decay}
            for name, (lr, decay) in settings.items()
        ]
    )
    before = {name: parameters(getattr(model, name)) for name in settings}
    MMParetoOptimizer(base).step(losses=model.losses(batch))
    for name, (lr, decay) in settings.items():
        part = getattr(model, name)
        for param, old, gradient in zip(part.parameters(), before[name], grads(part), strict=True):
            assert gradient is not None
            torch.testing.assert_close(param.detach(), old - lr * (gradient + decay * old))


def step(opt: MMParetoOptimizer, losses: Losses) -> None:
    opt.zero_grad()
    opt.step(losses=losses)


def test_frozen_parameters_stay_and_join_when_thawed() -> None:
    model = LateFusion()
    opt = wrapped(model)
    for param in model.audio.parameters():
        param.requires_grad_(False)
    start = parameters(model.audio)
    for _ in range(2):
        step(opt, model.losses(audio_visual_batch()))
    assert_same(parameters(model.audio), start)
    assert list(opt.stats) == ["mm+visual"]

    for param in model.audio.parameters():
        param.requires_grad_(True)
    twin, other = deepcopy((opt, model))
    batch = audio_visual_batch()
    step(opt, model.losses(batch))
    assert list(opt.stats) == ["mm+audio", "mm+visual"]
    # What a fresh optimizer would do for the thawed encoder, which has no momentum yet.
    fresh = wrapped(other)
    step(fresh, other.losses(batch))
    assert_same(parameters(model.audio), parameters(other.audio))
    assert twin.state.keys().isdisjoint(other.audio.parameters())


def test_freezing_with_momentum_stops_a_parameter() -> None:
    """A parameter frozen in mid-training has no gradient, so momentum does not move it."""
    model = LateFusion()
    opt = wrapped(model)
    step(opt, model.losses(audio_visual_batch()))
    for param in model.audio.parameters():
        param.requires_grad_(False)
    held = parameters(model.audio)
    for _ in range(2):
        step(opt, model.losses(audio_visual_batch()))
    assert_same(parameters(model.audio), held)


@pytest.mark.parametrize("explicit", [False, True])
def test_parameters_added_in_mid_training(explicit: bool) -> None:
    model = LateFusion()
    blocks = {"audio": model.audio} if explicit else None
    opt = wrapped(model, param_groups_by_modality=blocks)
    step(opt, model.losses(audio_visual_batch()))
    adapter = nn.Linear(6, 6)
    before = adapter.weight.detach().clone()
    model.visual.append(adapter)
    opt.add_param_group({"params": adapter.parameters(), "lr": 0.01})
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    batch = audio_visual_batch()
    step(opt, model.losses(batch))
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [0.05, 0.005]
    assert list(opt.stats) == (["audio"] if explicit else ["mm+audio", "mm+visual"])
    # The optimizer knows it: it was moved by its own learning rate, and its momentum is kept.
    torch.testing.assert_close(
        adapter.weight.detach(), before - 0.01 * opt.state[adapter.weight]["momentum_buffer"]
    )
    assert not adapter.weight.equal(before)
