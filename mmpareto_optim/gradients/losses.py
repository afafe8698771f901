"""What a mapping of losses must be."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

Losses = Mapping[str, Tensor]
"""Scalars with a graph, by name."""


def check_losses(losses: Any) -> None:
    """Raise unless ``losses`` maps names to scalars that have a graph."""
    if not isinstance(losses, Mapping):
        raise TypeError(
            "losses must be a mapping from a name to a scalar tensor, such as "
            f'{{"mm": loss, "audio": audio_loss}}, got {type(losses).__name__}'
        )
    if not losses:
        raise ValueError("losses is empty: give at least one loss")
    for name, loss in losses.items():
        _check_loss(name, loss)


def _check_loss(name: str, loss: Any) -> None:
    if loss is None:
        raise TypeError(f"loss {name!r} is None: leave it out of losses in this step")
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"loss {name!r} must be a scalar tensor, got {type(loss).__name__}: "
            "pass the tensor itself, not its .item()"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"loss {name!r} must be a scalar, got shape {tuple(loss.shape)}: "
            "reduce it with .mean() or .sum()"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"loss {name!r} has no graph, so it has no gradient: compute it from the "
            "model's output outside torch.no_grad() and without .detach(), or leave it "
            "out of losses"
        )
