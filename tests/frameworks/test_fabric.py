"""Lightning Fabric, and which hooks run in it and in Lightning when losses are integrated."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW

from mmpareto_optim import MMParetoOptimizer
from tests.frameworks.loops import scaled_step
from tests.models import LateFusion, audio_visual_batch

pytest.importorskip("lightning", reason="the integrations extra is not installed")
from lightning import LightningModule, Trainer
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision

# The library warns of its own affairs.
pytestmark = pytest.mark.filterwarnings("ignore")

AROUND_A_STEP = (
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_after_optimizer_step",
    "on_before_zero_grad",
)


class Called(LateFusion):
    """Forward gives the losses, as a module that Fabric sets up is called."""

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        return self.losses(batch)  # type: ignore[arg-type]


def batches(count: int = 4) -> list[tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(3)
    return [audio_visual_batch(8) for _ in range(count)]


def momentum(model: nn.Module) -> MMParetoOptimizer:
    return MMParetoOptimizer(SGD(model.parameters(), lr=0.1, momentum=0.9))


def several(model: nn.Module) -> MMParetoOptimizer:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    return MMParetoOptimizer([SGD(matrices, lr=0.1, momentum=0.9), AdamW(rest, lr=0.01)])


def parameters(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(parameters(found), parameters(expected), rtol=0, atol=0)


def train(fabric: Any, prepared: Any, ours: Any, count: int = 4) -> None:
    for batch in batches(count):
        fabric.backward(ours.total(prepared(*batch)))
        fabric.clip_gradients(prepared, ours, max_norm=0.1)
        ours.step()
        ours.zero_grad()


@pytest.mark.parametrize("optimizer_of", [momentum, several])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_trains_as_by_hand(optimizer_of: Any, precision: Any) -> None:
    model = Called()
    plain = deepcopy(model)
    fabric = Fabric(accelerator="cpu", precision=precision)
    prepared, ours = fabric.setup(model, optimizer_of(model))
    train(fabric, prepared, ours)
    opt = optimizer_of(plain)
    for batch in batches():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            losses = plain.losses(batch)
        opt.backward(losses)
        # Fabric's norm adds up in the optimizer's order.
        nn.utils.clip_grad_norm_([p for group in opt.param_groups for p in group["params"]], 0.1)
        opt.step()
        opt.zero_grad()
    assert_same(model, plain)


def test_what_is_set_up_is_as_ours() -> None:
    """Fabric's optimizer inherits ours; its step takes no losses."""
    model, fabric = Called(), Fabric(accelerator="cpu")
    plain = deepcopy(model)
    opt = momentum(model)
    prepared, ours = fabric.setup(model, opt)
    prepared.mark_forward_method("losses")
    rows = torch.utils.data.TensorDataset(*audio_visual_batch(32))
    loader = torch.utils.data.DataLoader(rows, batch_size=8)
    for batch in fabric.setup_dataloaders(loader):
        ours.backward(prepared.losses(batch))
        ours.step()
        ours.zero_grad()
    reference = momentum(plain)
    for batch in loader:
        reference.step(losses=plain.losses(batch))
        reference.zero_grad()
    assert_same(model, plain)
    assert list(opt.stats) == ["mm+audio", "mm+visual"]
    with pytest.raises(TypeError, match="losses"):
        ours.step(losses=model.losses(audio_visual_batch()))


def test_float16_with_a_scaler() -> None:
    model = Called()
    plain = deepcopy(model)
    plugin = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=2.0**8))
    fabric = Fabric(accelerator="cpu", plugins=plugin)
    prepared, ours = fabric.setup(model, momentum(model))
    opt, scaler = momentum(plain), GradScaler("cpu", init_scale=2.0**8)
    for number, batch in enumerate(batches()):
        factor = torch.inf if number == 1 else 1.0  # a step that is skipped
        losses = prepared(*batch)
        fabric.backward(ours.total({name: loss * factor for name, loss in losses.items()}))
        ours.step()
        ours.zero_grad()
        with torch.autocast("cpu", torch.float16):
            losses = plain.losses(batch)
        scaled_step(opt, scaler, {name: loss * factor for name, loss in losses.items()})
        assert_same(model, plain)


def test_a_checkpoint_resumes(tmp_path: Path) -> None:
    model, fabric = Called(), Fabric(accelerator="cpu")
    prepared, ours = fabric.setup(model, several(model))
    train(fabric, prepared, ours)
    fabric.save(tmp_path / "now.ckpt", {"model": prepared, "optimizer": ours})
    train(fabric, prepared, ours)
    resumed = Called()
    prepared, ours = fabric.setup(resumed, several(resumed))
    fabric.load(tmp_path / "now.ckpt", {"model": prepared, "optimizer": ours})
    train(fabric, prepared, ours)
    assert_same(resumed, model)


def test_outputs_that_want_fabrics_backward_name_the_mend() -> None:
    model, fabric = Called(), Fabric(accelerator="cpu", precision="bf16-mixed")
    prepared, ours = fabric.setup(model, momentum(model))
    with pytest.raises(RuntimeError, match=r"loss 'visual' .* fabric\.backward\(opt\.total"):
        ours.backward(prepared(*batches(1)[0]))
    assert all(param.grad is None for param in model.parameters())


class Noting:
    """Notes calls of the hooks of Fabric's callbacks, and of tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[str] = []
        for name in AROUND_A_STEP:
            setattr(self, name, lambda *_, name=name, **__: self.seen.append(name))
        weight = next(model.parameters())
        weight.register_hook(lambda _: self.seen.append("hook of a tensor"))
        weight.register_post_accumulate_grad_hook(lambda _: self.seen.append("post-accumulate"))


def test_hooks_of_fabric() -> None:
    """Beside the hooks that run when Fabric does the backward."""
    model = Called()
    noting = Noting(model)
    fabric = Fabric(accelerator="cpu", callbacks=noting)
    prepared, ours = fabric.setup(model, momentum(model))
    for _ in range(2):  # the first step may look at more
        noting.seen.clear()
        ours.backward(prepared(*batches(1)[0]))
        ours.step()
        ours.zero_grad()
    # The first weight is the audio encoder's, which two losses reach.
    assert noting.seen == ["hook of a tensor"] * 2 + ["on_after_optimizer_step"]
    noting.seen.clear()
    fabric.backward(sum(prepared(*batches(1)[0]).values()))
    ours.step()
    assert noting.seen == ["hook of a tensor", "post-accumulate", "on_after_optimizer_step"]
    ours.zero_grad()
    noting.seen.clear()
    fabric.backward(ours.total(prepared(*batches(1)[0])))
    ours.step()
    assert noting.seen == ["hook of a tensor"] * 2 + ["on_after_optimizer_step"]
    noting.seen.clear()
    fabric.call("on_after_backward")
    assert noting.seen == ["on_after_backward"]


class Module(LightningModule):  # type: ignore[misc]
    def __init__(self, how: str) -> None:
        super().__init__()
        self.automatic_optimization = how == "automatic"
        self.model, self.how = Called(), how
        self.noting = Noting(self.model)
        for name in AROUND_A_STEP:
            setattr(self, name, getattr(self.noting, name))

    def configure_optimizers(self) -> Any:
        return momentum(self.model)

    def training_step(self, *batch: Any) -> Tensor | None:
        self.noting.seen.clear()  # the first step may look at more
        opt: Any = self.optimizers()
        losses = self.model.losses(batches(1)[0])
        if self.automatic_optimization:
            total: Tensor = opt.total(losses)
            return total
        if self.how == "manual_backward":
            self.manual_backward(sum(losses.values()))
        else:
            scaled = self.trainer.precision_plugin.pre_backward
            losses = {name: scaled(loss, self) for name, loss in losses.items()}
            opt.optimizer.backward(losses)
        opt.step()
        opt.zero_grad()
        return None


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (
            "automatic",
            [
                "on_before_zero_grad",
                "on_before_backward",
                *["hook of a tensor"] * 2,
                "on_after_backward",
                "on_before_optimizer_step",
            ],
        ),
        (
            "manual",
            [*["on_before_backward"] * 3, *["hook of a tensor"] * 2, "on_before_optimizer_step"],
        ),
        (
            "manual_backward",
            [
                "on_before_backward",
                "hook of a tensor",
                "post-accumulate",
                "on_after_backward",
                "on_before_optimizer_step",
            ],
        ),
    ],
)
def test_hooks_of_lightning(tmp_path: Path, how: str, expected: list[str]) -> None:
    module = Module(how)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **quiet,
    )
    trainer.fit(module, torch.utils.data.DataLoader([torch.zeros(1)] * 2))  # type: ignore[arg-type]
    assert module.noting.seen == expected
