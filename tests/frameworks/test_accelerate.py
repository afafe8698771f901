"""Accelerate, around one base optimizer or several, against a loop by hand."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from mmpareto_optim import MMParetoOptimizer
from tests.frameworks.loops import accelerated
from tests.models import LateFusion, audio_visual_batch

accelerate = pytest.importorskip("accelerate", reason="the integrations extra is not installed")

# The library warns of its own affairs.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def accelerator() -> Iterator[Any]:
    from accelerate.state import AcceleratorState

    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)


def momentum(model: nn.Module) -> list[Optimizer]:
    return [SGD(model.parameters(), lr=0.02, momentum=0.9)]


def bases(model: nn.Module) -> list[Optimizer]:
    """Muon for the matrices, where this PyTorch has it, and AdamW for the rest."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    muon = getattr(torch.optim, "Muon", SGD)
    return [muon(matrices, lr=0.02), AdamW(rest, lr=0.01)]


Bases = Callable[[nn.Module], list[Optimizer]]
either = pytest.mark.parametrize("bases_of", [momentum, bases])


def loader() -> DataLoader[tuple[Tensor, ...]]:
    torch.manual_seed(3)
    return DataLoader(TensorDataset(*audio_visual_batch(32)), batch_size=8)


def parameters(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def prepared(accelerator: Any, model: LateFusion, bases_of: Bases) -> tuple[Any, ...]:
    opt = MMParetoOptimizer(bases_of(model))
    schedule = lr_scheduler.ExponentialLR(opt, 0.9)
    found: tuple[Any, ...] = accelerator.prepare(model, opt, loader(), schedule)
    return found


def by_hand(model: LateFusion, bases_of: Bases) -> MMParetoOptimizer:
    opt = MMParetoOptimizer(bases_of(model))
    schedule = lr_scheduler.ExponentialLR(opt, 0.9)
    for number, batch in enumerate(loader(), start=1):
        losses = model.losses(batch)
        opt.backward({name: loss / 2 for name, loss in losses.items()})
        if number % 2 == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()
            opt.zero_grad()
            schedule.step()
    return opt


@either
def test_prepare_accumulate_clip_and_schedule(accelerator: Any, bases_of: Bases) -> None:
    model = LateFusion()
    plain = deepcopy(model)
    model, opt, batches, schedule = prepared(accelerator, model, bases_of)
    accelerated(accelerator, model, opt, batches, schedule)
    expected = by_hand(plain, bases_of)
    torch.testing.assert_close(parameters(model), parameters(plain), rtol=0, atol=0)
    rates = [group["lr"] for group in opt.param_groups]
    assert rates == [group["lr"] for group in expected.param_groups]
    assert rates == pytest.approx([0.02 * 0.81, 0.01 * 0.81][: len(rates)])
    assert list(opt.optimizer.stats) == ["mm+audio", "mm+visual"]


@either
def test_save_and_load_state(accelerator: Any, tmp_path: Path, bases_of: Bases) -> None:
    model = LateFusion()
    everything = prepared(accelerator, model, bases_of)
    accelerated(accelerator, *everything)
    accelerator.save_state(tmp_path)
    accelerated(accelerator, *everything)
    expected = parameters(model)
    accelerator.load_state(tmp_path)
    accelerated(accelerator, *everything)
    torch.testing.assert_close(parameters(model), expected, rtol=0, atol=0)


def test_a_scaler_skips_all_bases_or_none(accelerator: Any) -> None:
    """Accelerate makes the scaler on a GPU only; here it is handed the CPU's."""
    accelerator.scaler = GradScaler("cpu", init_scale=4.0)
    accelerator.gradient_accumulation_steps = 1
    model = LateFusion()
    plain = deepcopy(model)
    model, opt, batches, _ = prepared(accelerator, model, bases)
    ours = MMParetoOptimizer(bases(plain))
    for number, batch in enumerate(batches):
        losses = dict(model.losses(batch))
        if number == 1:
            losses["mm"] = losses["mm"] * torch.inf
        accelerator.backward(opt.optimizer.total(losses))
        opt.step()
        opt.zero_grad()
        assert opt.step_was_skipped == (number == 1)
        if number != 1:
            ours.step(losses=plain.losses(batch))
            ours.zero_grad()
        torch.testing.assert_close(parameters(model), parameters(plain))


def test_modes_pass_through(accelerator: Any) -> None:
    model = LateFusion()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    averaging = AdamWScheduleFree(rest, lr=0.01)
    opt = accelerator.prepare(MMParetoOptimizer([SGD(matrices, lr=0.1), averaging]))
    opt.train()
    assert averaging.param_groups[0]["train_mode"]
    opt.eval()
    assert not averaging.param_groups[0]["train_mode"]


def test_losses_to_the_accelerated_optimizer_are_refused(accelerator: Any) -> None:
    model = LateFusion()
    opt = accelerator.prepare(MMParetoOptimizer(momentum(model)))
    with pytest.raises(TypeError, match="losses"):
        opt.step(losses=model.losses(audio_visual_batch()))
