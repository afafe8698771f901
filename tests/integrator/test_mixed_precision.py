"""Autocast and loss scaling around the wrapper."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.amp import GradScaler

from mmpareto_optim import MMParetoOptimizer, mmpareto_coefficients
from tests.models import (
    LateFusion,
    Losses,
    assert_gram,
    audio_visual_batch,
    grads,
    vectors_as_losses,
)

OPTIONS: list[dict[str, Any]] = [
    {},
    {"rescale": "tensor"},
    {"integration": "pareto"},
    {"integration": "uniform"},
]


def wrapped(model: nn.Module, **options: Any) -> MMParetoOptimizer:
    return MMParetoOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), **options)


def scaled(scaler: GradScaler, losses: Losses) -> Losses:
    return {name: scaler.scale(loss) for name, loss in losses.items()}


def autocast_losses(model: LateFusion, dtype: torch.dtype, batch: Any) -> Losses:
    with torch.autocast("cpu", dtype):
        return model.losses(batch)


def snapshot(model: nn.Module, opt: MMParetoOptimizer) -> list[Tensor]:
    kept = [leaf.clone() for state in opt.state.values() for leaf in state.values()]
    return [*(param.detach().clone() for param in model.parameters()), *kept]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_integrates_what_autocast_differentiates(dtype: torch.dtype) -> None:
    """The oracle: the gradients that autograd gives for the same autocast losses."""
    model, batch = LateFusion(), audio_visual_batch()
    params = list(model.audio.parameters())
    losses = autocast_losses(model, dtype, batch)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(losses[k], params, retain_graph=True)])
        for k in ("mm", "audio")
    ]
    matrix = torch.stack(rows).double()
    wrapped(model).backward(losses)
    found = torch.cat([param.grad.flatten() for param in params if param.grad is not None])
    coefficients = mmpareto_coefficients(matrix @ matrix.T)
    torch.testing.assert_close(found, (coefficients @ matrix).float(), rtol=1e-4, atol=1e-5)
    assert found.dtype == torch.float32

    exact = deepcopy(model)
    exact.zero_grad()
    wrapped(exact).backward(exact.losses(batch))
    assert any(not a.equal(b) for a, b in zip(grads(model), grads(exact), strict=True))  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [2, 3])
def test_a_step_within_the_autocast_region_is_as_exact(dtype: torch.dtype, m: int) -> None:
    """Autocast would run the products of float32 gradients in half precision."""
    start, rows = nn.Linear(6, 4), torch.randn(m, 24)
    found = []
    for enabled in (False, True):
        layer = deepcopy(start)
        opt = wrapped(layer)
        with torch.autocast("cpu", dtype, enabled=enabled):
            opt.step(losses=vectors_as_losses(layer.weight, rows))
        (stats,) = opt.stats.values()
        found.append([stats.gram, stats.coefficients, layer.weight.detach()])
    torch.testing.assert_close(found[1], found[0])
    assert_gram(found[1][0], rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast_learns(dtype: torch.dtype) -> None:
    model, batch = LateFusion(), audio_visual_batch()
    opt, scaler = wrapped(model), GradScaler("cpu", init_scale=2.0**10)
    totals = []
    for _ in range(40):
        losses = autocast_losses(model, dtype, batch)
        opt.zero_grad()
        opt.backward(scaled(scaler, losses))
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        totals.append(sum(float(loss.detach()) for loss in losses.values()))
    assert totals[-1] < 0.8 * totals[0]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_loss_scale_does_not_show(options: dict[str, Any]) -> None:
    """A power of two is exact in floating point: the same parameters."""
    start, batch = LateFusion(), audio_visual_batch()
    ends = []
    for scale in (1.0, 2.0**-20, 2.0**16, 2.0**40):
        model = deepcopy(start)
        opt, scaler = wrapped(model, **options), GradScaler("cpu", init_scale=scale)
        for _ in range(3):
            opt.zero_grad()
            opt.backward(scaled(scaler, model.losses(batch)))
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(opt)
            scaler.update()
        ends.append(snapshot(model, opt))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0])


@given(st.integers(2, 5), st.integers(-40, 40), st.integers(0, 2**31))
def test_any_number_of_losses_and_any_power_of_two(m: int, power: int, seed: int) -> None:
    rows = torch.randn(m, 6, generator=torch.Generator().manual_seed(seed))
    found = []
    for scale in (1.0, 2.0**power):
        param = nn.Parameter(torch.zeros(6))
        opt = MMParetoOptimizer(torch.optim.SGD([param], lr=0.1))
        opt.backward(vectors_as_losses(param, rows * scale))
        assert param.grad is not None
        found.append(param.grad / scale)
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("base", ["Adam", "fused AdamW", "momentum"])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_skipped_on_inf_leaves_everything(
    base: str, unscale: bool, micro_batches: int
) -> None:
    model, batch = LateFusion(), audio_visual_batch()
    bases: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
        "fused AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
        "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    }
    opt = MMParetoOptimizer(bases[base](model.parameters()))
    scaler = GradScaler("cpu", init_scale=2.0**10)
    opt.step(losses=model.losses(batch))
    before, twin = snapshot(model, opt), deepcopy((opt, model))

    opt.zero_grad()
    for number in range(micro_batches):
        losses = scaled(scaler, model.losses(batch))
        opt.backward({**losses, "audio": losses["audio"] * (torch.inf if number == 0 else 1)})
    if unscale:
        scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    assert_same(snapshot(model, opt), before)
    assert scaler.get_scale() == 2.0**9

    # The next step is as if nothing had been: no gradient of the skipped one is left over.
    opt.zero_grad()
    opt.backward(scaled(scaler, model.losses(batch)))
    scaler.step(opt)
    other, plain = twin
    other.zero_grad()
    other.step(losses=plain.losses(batch))
    torch.testing.assert_close(snapshot(model, opt), snapshot(plain, other))


def test_small_losses_survive_float16_through_the_scale() -> None:
    """Without it their gradients are zero in float16; with it they are integrated."""
    model, batch = LateFusion(), audio_visual_batch()
    opt = wrapped(model)
    found = {}
    for scale in (1.0, 2.0**16):
        scaler = GradScaler("cpu", init_scale=scale)
        for _ in range(2):  # a loss that comes alive counts from the next backward on
            losses = autocast_losses(model, torch.float16, batch)
            opt.zero_grad()
            opt.backward(scaled(scaler, {name: loss * 1e-8 for name, loss in losses.items()}))
        scaler.unscale_(opt)
        found[scale] = min((float(s.norms.min()) for s in opt.stats.values()), default=0.0)
    assert found[1.0] == 0
    assert found[2.0**16] > 0


def test_a_model_in_bfloat16_keeps_its_dtype() -> None:
    model, batch = LateFusion(dtype=torch.bfloat16), audio_visual_batch(dtype=torch.bfloat16)
    opt = wrapped(model)
    for _ in range(3):
        opt.zero_grad()
        opt.step(losses=model.losses(batch))
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert opt.stats["mm+audio"].gram.dtype == torch.float64
    assert all(param.isfinite().all() for param in model.parameters())


def test_a_model_in_float16_is_refused_by_the_scaler_as_ever() -> None:
    """torch's own rule: master weights stay in float32, autocast does the rest."""
    model, batch = LateFusion(dtype=torch.float16), audio_visual_batch(dtype=torch.float16)
    opt, scaler = wrapped(model), GradScaler("cpu", init_scale=1.0)
    opt.backward(scaled(scaler, model.losses(batch)))
    with pytest.raises(ValueError, match="unscale FP16 gradients"):
        scaler.unscale_(opt)
