"""What the tests of frameworks share: how Accelerate and the Hugging Face Trainer are driven."""

from pathlib import Path
from typing import Any

from torch import nn
from torch.amp import GradScaler

from mmpareto_optim import MMParetoOptimizer
from tests.models import Losses


def scaled_step(opt: MMParetoOptimizer, scaler: GradScaler, losses: Losses) -> None:
    """A step as PyTorch's documentation of GradScaler has it, every loss scaled."""
    opt.backward({name: scaler.scale(loss) for name, loss in losses.items()})
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()


def accelerated(accelerator: Any, model: Any, opt: Any, batches: Any, schedule: Any) -> None:
    """One epoch as Accelerate's documentation has it, with a total as its loss."""
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(opt.optimizer.total(model.losses(batch)))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()
            schedule.step()
            opt.zero_grad()


def hf_trainer(model: nn.Module, folder: Path, options: dict[str, Any], **given: Any) -> Any:
    """The recipe's trainer, in the order of the data, with ``options`` on top."""
    from transformers import Trainer, TrainingArguments

    class WithTotals(Trainer):  # type: ignore[misc]
        """Its model's output holds the losses, and features where it integrates at them."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any
        ) -> Any:
            output = model(**inputs)
            losses, features = output.pop("losses"), output.pop("features", None)
            losses = {name: loss for name, loss in losses.items() if loss is not None}
            if model.training:  # with an optimizer, which Accelerate has wrapped
                total = self.optimizer.optimizer.total(losses, features=features)
            else:
                total = sum(losses.values())
            return (total, output) if return_outputs else total

    settings = {
        "max_grad_norm": 0.1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
    }
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), **quiet, **{**settings, **options})
    return WithTotals(model, arguments, **given)
