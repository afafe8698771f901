"""Hugging Face's Trainer on several losses.

The model's output holds ``losses``, the mapping that MMParetoOptimizer takes, next to the
``loss`` that the Trainer evaluates by::

    trainer = MMParetoTrainer(model, TrainingArguments(...), train_dataset=data)
    trainer.train()

Any optimizer of ``TrainingArguments`` is wrapped. Needs ``transformers`` and ``accelerate``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from mmpareto_optim import MMParetoOptimizer


class MMParetoTrainer(Trainer):  # type: ignore[misc]  # transformers is optional
    """A Trainer that hands the losses on one by one instead of their sum."""

    def create_optimizer(self, model: nn.Module | None = None) -> MMParetoOptimizer:
        base = super().create_optimizer(model)
        self.optimizer = base if isinstance(base, MMParetoOptimizer) else MMParetoOptimizer(base)
        return self.optimizer

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            losses = model(**inputs).get("losses")
        if not isinstance(losses, Mapping):
            raise TypeError(
                "the model's output must hold 'losses', a mapping from a name to a scalar tensor"
            )
        steps = self.current_gradient_accumulation_steps
        losses = {name: loss / steps for name, loss in losses.items()}
        total = torch.stack([loss.detach() for loss in losses.values()]).sum()
        if self.accelerator.scaler is not None:  # fp16
            losses = {name: self.accelerator.scaler.scale(loss) for name, loss in losses.items()}
        accelerated: Any = self.optimizer  # Accelerate's own, with ours inside
        accelerated.optimizer.backward(losses)
        return total
