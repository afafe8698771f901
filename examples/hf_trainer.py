"""Hugging Face's Trainer on several losses.

The model's output holds ``losses``, the mapping that MMParetoOptimizer takes, next to the
``loss`` that the Trainer evaluates by, and perhaps ``features``, the encoders' outputs::

    trainer = MMParetoTrainer(
        model,
        TrainingArguments(...),
        train_dataset=data,
        mmpareto={"param_groups_by_modality": {"text": model.text, "image": model.vision}},
    )
    trainer.train()

Any optimizer of ``TrainingArguments`` is wrapped. Needs ``transformers`` and ``accelerate``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from mmpareto_optim import MMParetoOptimizer

FOR_TRAINING = ("losses", "features")
"""What a model's output holds for the training step alone: neither is a prediction."""


class MMParetoTrainer(Trainer):  # type: ignore[misc]  # transformers is optional
    """A Trainer that hands the losses on one by one instead of their sum.

    Args:
        args: as for ``Trainer``.
        mmpareto: keyword arguments of ``MMParetoOptimizer``, such as ``rescale``.
        kwargs: as for ``Trainer``.
    """

    def __init__(
        self, *args: Any, mmpareto: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self._mmpareto = dict(mmpareto or {})
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> MMParetoOptimizer:
        base = super().create_optimizer(model)
        if not isinstance(base, MMParetoOptimizer):
            base = MMParetoOptimizer(base, **self._mmpareto)
        self.optimizer = base
        return base

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        accelerated: Any = self.optimizer  # Accelerate's own, with ours inside
        if not isinstance(accelerated.optimizer, MMParetoOptimizer):
            raise TypeError(
                f"the optimizer is a {type(accelerated.optimizer).__name__}, not the "
                "MMParetoOptimizer of create_optimizer: DeepSpeed replaces it, use DDP or FSDP2"
            )
        model.train()
        accelerated.train()  # schedule-free optimizers have a mode too
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            output = model(**inputs)
        losses = self._losses_of(output)
        total = torch.stack([loss.detach() for loss in losses.values()]).sum()
        if self.accelerator.scaler is not None:  # fp16
            losses = {name: self.accelerator.scaler.scale(loss) for name, loss in losses.items()}
        accelerated.optimizer.backward(losses, features=output.get("features"))
        return total

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        if ignore_keys is None:  # as the Trainer has it
            config = getattr(self.model, "config", None)
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        ignored = [*ignore_keys, *FOR_TRAINING]
        found: tuple[Tensor | None, Any, Any] = super().prediction_step(
            model, inputs, prediction_loss_only, ignored
        )
        return found

    def _losses_of(self, output: Any) -> dict[str, Tensor]:
        """The losses of one micro-batch; one that is None has nothing to say in it."""
        losses = output.get("losses")
        if not isinstance(losses, Mapping):
            raise TypeError(
                "the model's output must hold 'losses', a mapping from a name to a scalar tensor"
            )
        steps = self.current_gradient_accumulation_steps
        present = {name: loss / steps for name, loss in losses.items() if loss is not None}
        if not present:
            raise ValueError(f"all losses of the model are None: {', '.join(losses)}")
        return present
