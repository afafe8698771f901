"""Lightning's optimization, automatic and manual, and what is around it, against a loop by hand."""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from mmpareto_optim import GradientIntegrator, MMParetoOptimizer
from tests.frameworks.loops import scaled_step
from tests.models import LateFusion, audio_visual_batch

L: Any = pytest.importorskip("lightning", reason="the integrations extra is not installed")

# The library warns of its own affairs.
pytestmark = pytest.mark.filterwarnings("ignore")

Configure = Callable[[nn.Module], Any]
Notes = list[dict[str, Any]]


def momentum(model: nn.Module) -> MMParetoOptimizer:
    return MMParetoOptimizer(SGD(model.parameters(), lr=0.1, momentum=0.9))


def bases(model: nn.Module) -> list[Any]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    return [SGD(matrices, lr=0.1, momentum=0.9), AdamW(rest, lr=0.01)]


def several(model: nn.Module) -> MMParetoOptimizer:
    return MMParetoOptimizer(bases(model))


def scheduled(model: nn.Module) -> Any:
    opt = momentum(model)
    return [opt], [lr_scheduler.StepLR(opt, step_size=3, gamma=0.5)]


class Module(L.LightningModule):  # type: ignore[misc]
    """The recipe's module, that notes what it does in each step."""

    def __init__(self, model: LateFusion, configure: Configure = momentum) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.configure = model, configure
        self.notes: Notes = []

    def configure_optimizers(self) -> Any:
        return self.configure(self.model)

    def training_step(self, batch: Any, index: int) -> Any:
        opt = self.optimizers()
        losses = self.model.losses(batch)
        opt.optimizer.backward(losses)
        opt.step()
        opt.zero_grad()
        schedule = self.lr_schedulers()
        if schedule is not None:
            schedule.step()
        return torch.stack([loss.detach() for loss in losses.values()]).sum()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("loss", self.model.losses(batch)["mm"])

    def on_before_optimizer_step(self, opt: Any) -> None:
        self.notes.append({"opt": opt, "lr": [group["lr"] for group in opt.param_groups]})


def loader(batches: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    torch.manual_seed(3)
    return DataLoader(TensorDataset(*audio_visual_batch(8 * batches)), batch_size=8)


def trainer_of(folder: Path, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    alone = {"accelerator": "cpu", "enable_checkpointing": False, "default_root_dir": folder}
    return L.Trainer(**{"max_epochs": 1, **quiet, **alone, **options})


def by_hand(model: LateFusion, opt: MMParetoOptimizer, batches: Iterable[Any]) -> Iterator[None]:
    """The oracle; pauses after each step."""
    for batch in batches:
        opt.step(losses=model.losses(batch))
        opt.zero_grad()
        yield


def parameters(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(parameters(found), parameters(expected), rtol=0, atol=0)


def test_the_module_steps_its_schedule(tmp_path: Path) -> None:
    module = Module(LateFusion(), scheduled)
    trainer_of(tmp_path).fit(module, loader())
    assert [note["lr"] for note in module.notes] == [[0.1]] * 3 + [[0.05]] * 3 + [[0.025]] * 2


@pytest.mark.parametrize("configure", [momentum, several, scheduled])
def test_the_rate_finder_sweeps_the_rate(tmp_path: Path, configure: Configure) -> None:
    """It hands the module its own schedule, which manual optimization steps by itself."""
    model = LateFusion()
    module, before = Module(model, configure), deepcopy(model)
    rates = {"min_lr": 1e-4, "max_lr": 1.0, "num_training": 20}
    trainer = trainer_of(tmp_path, max_epochs=20)
    finder = L.pytorch.tuner.Tuner(trainer).lr_find(
        module, loader(), **rates, early_stop_threshold=None, update_attr=False
    )
    assert_same(model, before)
    used = [note["lr"] for note in module.notes]
    assert [lr[0] for lr in used] == pytest.approx(finder.results["lr"])
    assert all(len(set(lr)) == 1 for lr in used)
    assert used[0][0] == pytest.approx(1e-4)
    assert used[-1][0] > 0.5
    assert all(a < b for (a, *_), (b, *_) in pairwise(used))
    assert torch.tensor(finder.results["loss"]).isfinite().all()
    module.notes.clear()
    trainer.fit_loop.epoch_loop.max_steps = 2
    trainer.fit(module, loader())
    assert module.notes[0]["lr"] == [group["lr"] for group in fresh(configure).param_groups]


def fresh(configure: Configure) -> Any:
    made = configure(LateFusion())
    return made[0][0] if isinstance(made, tuple) else made


@pytest.mark.parametrize("configure", [momentum, several])
def test_max_steps_are_steps_of_the_wrapper(tmp_path: Path, configure: Configure) -> None:
    model = LateFusion()
    plain = deepcopy(model)
    module = Module(model, configure)
    trainer = trainer_of(tmp_path, max_steps=5, max_epochs=-1)
    trainer.fit(module, loader())
    assert trainer.global_step == len(module.notes) == 5
    assert len(list(by_hand(plain, configure(plain), list(loader())[:5]))) == 5
    assert_same(model, plain)


class Automatic(Module):
    """The recipe's module, whose training step returns a total."""

    def __init__(self, model: LateFusion, configure: Configure = momentum) -> None:
        super().__init__(model, configure)
        self.automatic_optimization = True

    def training_step(self, batch: Any, index: int) -> Any:
        return self.optimizers().total(self.model.losses(batch))


def stepped(model: nn.Module) -> Any:
    opt = momentum(model)
    schedule = lr_scheduler.StepLR(opt, step_size=2, gamma=0.5)
    return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def built_by_a_class(model: nn.Module) -> Any:
    return MMParetoOptimizer.around(SGD)(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("configure", [momentum, several, stepped, built_by_a_class])
def test_automatic_optimization(tmp_path: Path, configure: Configure, accumulate: int) -> None:
    """Lightning divides the total by the batches of a step, clips, and steps the schedule."""
    model = LateFusion()
    plain = deepcopy(model)
    module = Automatic(model, configure)
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.1}
    trainer = trainer_of(tmp_path, **options)
    trainer.fit(module, loader())
    made = configure(plain)
    opt = made["optimizer"] if isinstance(made, dict) else made
    for number, batch in enumerate(loader(), start=1):
        losses = plain.losses((batch[0], batch[1], batch[2]))
        opt.backward({name: loss / accumulate for name, loss in losses.items()})
        if number % accumulate == 0:
            params = [param for group in opt.param_groups for param in group["params"]]
            nn.utils.clip_grad_norm_(params, 0.1)
            opt.step()
            opt.zero_grad()
            if isinstance(made, dict):
                made["lr_scheduler"]["scheduler"].step()
    assert_same(model, plain)
    assert trainer.global_step == 8 / accumulate
    assert list(trainer.optimizers[0].stats) == ["mm+audio", "mm+visual"]


def test_automatic_optimization_in_float16(tmp_path: Path) -> None:
    """Whose scaler skips a step of infinite gradients."""
    from lightning.pytorch.plugins import MixedPrecision

    class Overflowing(Automatic):
        def training_step(self, batch: Any, index: int) -> Any:
            factor = torch.inf if index == 1 else 1.0
            losses = {name: loss * factor for name, loss in self.model.losses(batch).items()}
            return self.optimizers().total(losses)

    model = LateFusion()
    plain = deepcopy(model)
    plugin = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=2.0**8))
    trainer_of(tmp_path, plugins=plugin).fit(Overflowing(model), loader(4))
    opt, scaler = momentum(plain), GradScaler("cpu", init_scale=2.0**8)
    for index, batch in enumerate(loader(4)):
        with torch.autocast("cpu", torch.float16):
            losses = plain.losses((batch[0], batch[1], batch[2]))
        factor = torch.inf if index == 1 else 1.0
        scaled_step(opt, scaler, {name: loss * factor for name, loss in losses.items()})
    assert_same(model, plain)


def test_automatic_optimization_resumes_and_finds_a_rate(tmp_path: Path) -> None:
    start = LateFusion()
    whole, first, second = (Automatic(deepcopy(start), stepped) for _ in range(3))
    trainer_of(tmp_path, max_epochs=3).fit(whole, loader(4))
    trainer = trainer_of(tmp_path, max_epochs=2, enable_checkpointing=True)
    trainer.fit(first, loader(4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer_of(tmp_path, max_epochs=3).fit(second, loader(4), ckpt_path=tmp_path / "last.ckpt")
    assert_same(second, whole)
    rates = {"min_lr": 1e-4, "max_lr": 1.0, "num_training": 20, "early_stop_threshold": None}
    trainer = trainer_of(tmp_path, max_epochs=20)
    finder = L.pytorch.tuner.Tuner(trainer).lr_find(
        Automatic(start), loader(), **rates, update_attr=False
    )
    assert len(finder.results["lr"]) == 20
    assert finder.results["lr"][-1] > 0.5


class TwoOptimizers(Module):
    """Each steps by itself; the integrator fills the gradients of both."""

    def training_step(self, batch: Any, index: int) -> Any:
        if index == 0:
            self.integrator = GradientIntegrator(self.model.parameters())
        self.integrator.zero_grad()
        self.integrator.backward(self.model.losses(batch))
        for opt in self.optimizers():
            opt.step()


def test_two_optimizers_that_step_by_themselves(tmp_path: Path) -> None:
    """Lightning counts the steps of each."""
    model = LateFusion()
    plain = deepcopy(model)
    trainer = trainer_of(tmp_path, max_steps=10, max_epochs=-1)
    trainer.fit(TwoOptimizers(model, bases), loader())
    assert trainer.global_step == 10
    assert len(list(by_hand(plain, several(plain), list(loader())[:5]))) == 5
    assert_same(model, plain)


class TwoWrappers(Module):
    """A wrapper for each modality, as of two models that are trained in turn."""

    def training_step(self, batch: Any, index: int) -> Any:
        for opt in self.optimizers():
            losses = self.model.losses(batch)
            opt.optimizer.backward(losses)
            opt.step()
            opt.zero_grad()


def halves(model: Any) -> list[MMParetoOptimizer]:
    audio = [*model.audio.parameters(), *model.audio_head.parameters()]
    rest = [p for p in model.parameters() if all(p is not q for q in audio)]
    return [MMParetoOptimizer(SGD(params, lr=0.1)) for params in (audio, rest)]


def test_two_wrappers(tmp_path: Path) -> None:
    model = LateFusion()
    plain = deepcopy(model)
    trainer = trainer_of(tmp_path)
    trainer.fit(TwoWrappers(model, halves), loader())
    assert trainer.global_step == 16
    wrappers = halves(plain)
    for batch in loader():
        for opt in wrappers:
            opt.step(losses=plain.losses(batch))
            opt.zero_grad()
    assert_same(model, plain)


def test_weight_averaging(tmp_path: Path) -> None:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    model = LateFusion()
    plain = deepcopy(model)
    averaging = callbacks.EMAWeightAveraging(decay=0.8)
    options = {"callbacks": [averaging], "val_check_interval": 3}
    trainer_of(tmp_path, **options).fit(Module(model), loader(), loader(1))
    average: list[Tensor] = []
    for _ in by_hand(plain, momentum(plain), loader()):
        now = parameters(plain)
        average = [0.8 * a + 0.2 * b for a, b in zip(average or now, now, strict=True)]
    torch.testing.assert_close(parameters(model), average)


def test_early_stopping(tmp_path: Path) -> None:
    """Its threshold is one that training crosses, by the oracle, after some epochs."""
    plain, seen = LateFusion(), []
    module = Module(deepcopy(plain))
    opt = momentum(plain)
    for _ in range(8):
        assert len(list(by_hand(plain, opt, loader()))) == 8
        with torch.no_grad():
            (held_out,) = loader(1)
            seen.append(float(plain.losses(held_out)["mm"]))
    stopping = L.pytorch.callbacks.EarlyStopping(
        "loss", patience=100, stopping_threshold=(seen[2] + seen[3]) / 2
    )
    trainer = trainer_of(tmp_path, max_epochs=8, callbacks=[stopping])
    trainer.fit(module, loader(), loader(1))
    assert trainer.current_epoch == 1 + next(
        epoch for epoch, loss in enumerate(seen) if loss < stopping.stopping_threshold
    )
    assert trainer.current_epoch < 8
    assert trainer.global_step == 8 * trainer.current_epoch


class Clipped(Module):
    """Clips, hands its losses through the precision plugin, and steps as ``how`` says."""

    def __init__(self, model: LateFusion, how: str = "the optimizer inside") -> None:
        super().__init__(model, scheduled)
        self.how = how

    def training_step(self, batch: Any, index: int) -> None:
        opt = self.optimizers()
        precision = self.trainer.precision_plugin
        losses = {
            name: precision.pre_backward(loss, self)
            for name, loss in self.model.losses(batch).items()
        }
        if self.how == "step with losses":
            opt.step(losses=losses)
        if self.how == "a total":
            self.manual_backward(opt.total(self.model.losses(batch)))
        else:
            (opt if self.how == "directly" else opt.optimizer).backward(losses)
        opt.step()
        opt.zero_grad()
        self.lr_schedulers().step()

    def on_before_optimizer_step(self, opt: Any) -> None:
        self.clip_gradients(opt, 0.1, "norm")


@pytest.mark.parametrize("how", ["the optimizer inside", "directly", "a total"])
def test_manual_optimization(tmp_path: Path, how: str) -> None:
    model = LateFusion()
    plain = deepcopy(model)
    trainer = trainer_of(tmp_path, max_epochs=2)
    trainer.fit(Clipped(model, how), loader(4))
    (opt,), (schedule,) = scheduled(plain)
    for batch in [*loader(4), *loader(4)]:
        opt.backward(plain.losses(batch))
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        opt.step()
        opt.zero_grad()
        schedule.step()
    assert_same(model, plain)
    assert trainer.global_step == 8
    (ours,) = trainer.optimizers  # what callbacks read
    assert list(ours.stats) == ["mm+audio", "mm+visual"]


@pytest.mark.parametrize("how", ["the optimizer inside", "a total"])
def test_float16_with_a_scaler(tmp_path: Path, how: str) -> None:
    """Single losses must pass through pre_backward; manual_backward does that to a total."""
    from lightning.pytorch.plugins import MixedPrecision

    model = LateFusion()
    plain = deepcopy(model)
    plugin = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=2.0**8))
    trainer_of(tmp_path, plugins=plugin).fit(Clipped(model, how), loader(4))

    (opt,), (schedule,) = scheduled(plain)
    scaler = GradScaler("cpu", init_scale=2.0**8)
    for batch in loader(4):
        with torch.autocast("cpu", torch.float16):
            losses = plain.losses((batch[0], batch[1], batch[2]))
        opt.backward({name: scaler.scale(loss) for name, loss in losses.items()})
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        schedule.step()
    assert_same(model, plain)


def test_a_checkpoint_resumes(tmp_path: Path) -> None:
    start = LateFusion()
    whole, first, second = (Clipped(deepcopy(start)) for _ in range(3))
    trainer_of(tmp_path, max_epochs=3).fit(whole, loader(4))
    trainer = trainer_of(tmp_path, max_epochs=2, enable_checkpointing=True)
    trainer.fit(first, loader(4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = trainer_of(tmp_path, max_epochs=3)
    resumed.fit(second, loader(4), ckpt_path=tmp_path / "last.ckpt")
    assert_same(second, whole)


def test_step_with_losses_is_refused_with_its_mend(tmp_path: Path) -> None:
    module = Clipped(LateFusion(), "step with losses")
    with pytest.raises(TypeError, match=r"call backward\(losses\), then step\(\)"):
        trainer_of(tmp_path).fit(module, loader())
