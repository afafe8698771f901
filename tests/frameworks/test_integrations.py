"""Lightning, Accelerate and the Hugging Face Trainer: real runs, against a loop by hand."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, TensorDataset

from mmpareto_optim import MMParetoOptimizer
from tests.frameworks.loops import accelerated, hf_trainer
from tests.models import LateFusion, Losses, audio_visual_batch

# The libraries warn of their own affairs, some at import.
pytestmark = pytest.mark.filterwarnings("ignore")

MISSING = "the integrations extra is not installed"
Batch = tuple[Tensor, Tensor, Tensor]


def data() -> TensorDataset:
    return TensorDataset(*audio_visual_batch(32))


def loader(dataset: TensorDataset) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(dataset, batch_size=8)


def optimizer(model: nn.Module) -> MMParetoOptimizer:
    return MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def parameters(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def by_hand(
    model: LateFusion, batches: Iterable[Any], *, accumulate: int = 1, decay: float = 1.0
) -> list[Tensor]:
    """The oracle: the loop that the README shows, with clipping."""
    opt = optimizer(model)
    schedule = lr_scheduler.ExponentialLR(opt, decay)
    for number, batch in enumerate(batches, start=1):
        losses = model.losses(batch)
        opt.backward({name: loss / accumulate for name, loss in losses.items()})
        if number % accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()
            opt.zero_grad()
            schedule.step()
    return parameters(model)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


class TestLightning:
    @pytest.fixture
    def lightning(self) -> Any:
        return pytest.importorskip("lightning", reason=MISSING)

    def module(
        self, lightning: Any, model: LateFusion, *, how: str = "the optimizer inside"
    ) -> Any:
        class Module(lightning.LightningModule):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False
                self.model = model

            def configure_optimizers(self) -> Any:
                opt = optimizer(self.model)
                return [opt], [lr_scheduler.ExponentialLR(opt, 0.9)]

            def training_step(self, batch: Batch, index: int) -> None:
                opt = self.optimizers()
                precision = self.trainer.precision_plugin
                losses = {
                    name: precision.pre_backward(loss, self)
                    for name, loss in self.model.losses(batch).items()
                }
                if how == "step with losses":
                    opt.step(losses=losses)
                (opt if how == "directly" else opt.optimizer).backward(losses)
                opt.step()
                opt.zero_grad()
                self.lr_schedulers().step()

            def on_before_optimizer_step(self, opt: Any) -> None:
                self.clip_gradients(opt, 0.1, "norm")

        return Module()

    def trainer(self, lightning: Any, epochs: int, **options: Any) -> Any:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        checkpoints = {"enable_checkpointing": False}
        return lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", **{**quiet, **checkpoints, **options}
        )

    @pytest.mark.parametrize("how", ["the optimizer inside", "directly"])
    def test_manual_optimization(self, lightning: Any, how: str) -> None:
        model, dataset = LateFusion(), data()
        plain = deepcopy(model)
        module, trainer = self.module(lightning, model, how=how), self.trainer(lightning, 2)
        trainer.fit(module, loader(dataset))
        expected = by_hand(plain, [*loader(dataset), *loader(dataset)], decay=0.9)
        assert_same(parameters(model), expected)
        assert trainer.global_step == 8
        (ours,) = trainer.optimizers  # what callbacks read
        assert list(ours.stats) == ["mm+audio", "mm+visual"]

    def test_float16_with_a_scaler(self, lightning: Any) -> None:
        """The losses must pass through pre_backward, as manual_backward's does."""
        from lightning.pytorch.plugins import MixedPrecision

        model, dataset = LateFusion(), data()
        plain = deepcopy(model)
        scaler = GradScaler("cpu", init_scale=2.0**8)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        module = self.module(lightning, model)
        self.trainer(lightning, 1, plugins=plugin).fit(module, loader(dataset))

        opt, scaler = optimizer(plain), GradScaler("cpu", init_scale=2.0**8)
        schedule = lr_scheduler.ExponentialLR(opt, 0.9)
        for batch in loader(dataset):
            with torch.autocast("cpu", torch.float16):
                losses = plain.losses(tuple(batch))
            opt.backward({name: scaler.scale(loss) for name, loss in losses.items()})
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            schedule.step()
        assert_same(parameters(model), parameters(plain))

    def test_a_checkpoint_resumes(self, lightning: Any, tmp_path: Path) -> None:
        dataset = data()
        start = LateFusion()
        whole, first, second = (self.module(lightning, deepcopy(start)) for _ in range(3))
        self.trainer(lightning, 3).fit(whole, loader(dataset))
        trainer = self.trainer(lightning, 2, enable_checkpointing=True, default_root_dir=tmp_path)
        trainer.fit(first, loader(dataset))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        resumed = self.trainer(lightning, 3)
        resumed.fit(second, loader(dataset), ckpt_path=tmp_path / "last.ckpt")
        assert_same(parameters(second), parameters(whole))

    def test_step_with_losses_is_refused_with_its_mend(self, lightning: Any) -> None:
        module = self.module(lightning, LateFusion(), how="step with losses")
        with pytest.raises(TypeError, match=r"call backward\(losses\), then step\(\)"):
            self.trainer(lightning, 1).fit(module, loader(data()))


class TestFabric:
    def test_setup(self) -> None:
        """Fabric's optimizer inherits ours; its step takes no losses."""
        pytest.importorskip("lightning", reason=MISSING)
        from lightning.fabric import Fabric

        model, dataset = LateFusion(), data()
        plain = deepcopy(model)
        opt = optimizer(model)
        fabric = Fabric(accelerator="cpu")
        prepared, ours = fabric.setup(model, opt)
        prepared.mark_forward_method("losses")
        for batch in fabric.setup_dataloaders(loader(dataset)):
            ours.backward(prepared.losses(batch))
            fabric.clip_gradients(prepared, ours, max_norm=0.1)
            ours.step()
            ours.zero_grad()
        assert_same(parameters(model), by_hand(plain, loader(dataset)))
        assert list(opt.stats) == ["mm+audio", "mm+visual"]
        with pytest.raises(TypeError, match="losses"):
            ours.step(losses=model.losses(audio_visual_batch()))


class TestAccelerate:
    @pytest.fixture
    def accelerator(self) -> Iterator[Any]:
        accelerate = pytest.importorskip("accelerate", reason=MISSING)
        from accelerate.state import AcceleratorState

        yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        AcceleratorState._reset_state(reset_partial_state=True)

    def test_prepare_and_accumulate(self, accelerator: Any) -> None:
        model, dataset = LateFusion(), data()
        plain = deepcopy(model)
        opt = optimizer(model)
        schedule = lr_scheduler.ExponentialLR(opt, 0.9)
        model, prepared, batches, schedule = accelerator.prepare(
            model, opt, loader(dataset), schedule
        )
        accelerated(accelerator, model, prepared, batches, schedule)
        assert_same(parameters(model), by_hand(plain, loader(dataset), accumulate=2, decay=0.9))
        assert prepared.optimizer is opt
        assert list(opt.stats) == ["mm+audio", "mm+visual"]

    def test_save_and_load_state(self, accelerator: Any, tmp_path: Path) -> None:
        model = LateFusion()
        opt = optimizer(model)
        schedule = lr_scheduler.ExponentialLR(opt, 0.9)
        model, prepared, batches, schedule = accelerator.prepare(
            model, opt, loader(data()), schedule
        )
        accelerated(accelerator, model, prepared, batches, schedule)
        accelerator.save_state(tmp_path)
        accelerated(accelerator, model, prepared, batches, schedule)
        expected = parameters(model)
        accelerator.load_state(tmp_path)
        accelerated(accelerator, model, prepared, batches, schedule)
        assert_same(parameters(model), expected)

    def test_losses_to_the_accelerated_optimizer_are_refused(self, accelerator: Any) -> None:
        model = LateFusion()
        prepared = accelerator.prepare(optimizer(model))
        with pytest.raises(TypeError, match="losses"):
            prepared.step(losses=model.losses(audio_visual_batch()))


class WithOutput(LateFusion):
    """What the Trainer wants of a model: a forward that takes a batch by keywords."""

    def forward(self, spec: Tensor, image: Tensor, labels: Tensor) -> dict[str, Any]:
        losses = self.losses((spec, image, labels))
        return {"loss": losses["mm"], "losses": losses}


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(zip(("spec", "image", "labels"), self.dataset[index], strict=True))


class TestTrainer:
    @pytest.fixture(autouse=True)
    def _reset(self) -> Iterator[None]:
        pytest.importorskip("accelerate", reason=MISSING)
        from accelerate.state import AcceleratorState

        yield
        AcceleratorState._reset_state(reset_partial_state=True)

    def trainer(self, model: nn.Module, folder: Path, dataset: Any, **options: Any) -> Any:
        pytest.importorskip("transformers", reason=MISSING)
        settings = {
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
        }
        return hf_trainer(model, folder, {**settings, **options}, train_dataset=Rows(dataset))

    def test_a_run(self, tmp_path: Path) -> None:
        model, dataset = WithOutput(), data()
        plain, start = deepcopy(model), deepcopy(model)
        trainer = self.trainer(model, tmp_path, dataset, num_train_epochs=2)
        trainer.train()
        batches = [*loader(dataset), *loader(dataset)]
        assert_same(parameters(model), by_hand(plain, batches, accumulate=2))
        assert list(trainer.optimizer.optimizer.stats) == ["mm+audio", "mm+visual"]
        # What is logged is the sum of the losses, averaged over a step's micro-batches.
        with torch.no_grad():
            sums = [float(sum(start.losses(batch).values())) for batch in batches[:2]]
        assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(sums) / 2, rel=1e-4)

    def test_a_checkpoint_resumes(self, tmp_path: Path) -> None:
        start, dataset = WithOutput(), data()
        whole, first, second = (deepcopy(start) for _ in range(3))
        self.trainer(whole, tmp_path / "whole", dataset, max_steps=4).train()
        folder = tmp_path / "parts"
        saving = {"save_strategy": "steps", "save_steps": 2}
        self.trainer(first, folder, dataset, max_steps=2, **saving).train()
        self.trainer(second, folder, dataset, max_steps=4).train(
            resume_from_checkpoint=str(folder / "checkpoint-2")
        )
        assert_same(parameters(second), parameters(whole))

    def test_bfloat16(self, tmp_path: Path) -> None:
        model, dataset = WithOutput(), data()
        exact = deepcopy(model)
        self.trainer(model, tmp_path, dataset, max_steps=2, bf16=True).train()
        self.trainer(exact, tmp_path, dataset, max_steps=2).train()
        torch.testing.assert_close(parameters(model), parameters(exact), atol=0.02, rtol=0.05)
        assert any(
            not a.equal(b) for a, b in zip(parameters(model), parameters(exact), strict=True)
        )

    def test_a_model_without_losses_is_told_what_is_missing(self, tmp_path: Path) -> None:
        class Summed(WithOutput):
            def forward(self, spec: Tensor, image: Tensor, labels: Tensor) -> dict[str, Any]:
                losses: Losses = self.losses((spec, image, labels))
                return {"loss": losses["mm"]}

        with pytest.raises(TypeError, match="output must hold 'losses'"):
            self.trainer(Summed(), tmp_path, data(), max_steps=1).train()
