"""What the tests of frameworks share: how Accelerate and the Hugging Face Trainer are driven."""

import sys
from pathlib import Path
from typing import Any

from torch import nn


def accelerated(accelerator: Any, model: Any, opt: Any, batches: Any, schedule: Any) -> None:
    """One epoch as Accelerate's documentation has it, each loss a part of the accumulation."""
    for batch in batches:
        with accelerator.accumulate(model):
            steps = accelerator.gradient_accumulation_steps
            losses = {name: loss / steps for name, loss in model.losses(batch).items()}
            opt.optimizer.backward(losses)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()
            schedule.step()
            opt.zero_grad()


def hf_trainer(model: nn.Module, folder: Path, options: dict[str, Any], **given: Any) -> Any:
    """The example's trainer with SGD in the order of the data, and ``options`` on top."""
    from transformers import TrainingArguments

    sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))
    try:
        from hf_trainer import MMParetoTrainer
    finally:
        sys.path.pop(0)
    settings = {
        "max_grad_norm": 0.1,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
    }
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), **quiet, **{**settings, **options})
    return MMParetoTrainer(model, arguments, **given)
