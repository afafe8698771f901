"""Small models of the three shapes that the library is for, and their losses."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Losses = dict[str, Tensor]

FLOAT32_PRODUCTS = 256 * 2.0**-24
"""How far an inner product of float32 gradients may be off, relative to the product of their
lengths: 256 numbers at a time are multiplied and added in float32."""


class LateFusion(nn.Module):
    """Two encoders, two unimodal heads, a joint head."""

    def __init__(self, width: int = 8, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.audio = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 6))
        self.visual = nn.Sequential(nn.Linear(7, width), nn.Tanh(), nn.Linear(width, 6))
        self.audio_head, self.visual_head = nn.Linear(6, 3), nn.Linear(6, 3)
        self.mm_head = nn.Linear(12, 3)
        self.to(dtype)

    def losses(self, batch: tuple[Tensor, Tensor, Tensor]) -> Losses:
        return self.losses_at(self.features(batch), batch[2])

    def features(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        return {"audio": self.audio(batch[0]), "visual": self.visual(batch[1])}

    def losses_at(self, features: dict[str, Tensor], label: Tensor) -> Losses:
        audio, visual = features["audio"], features["visual"]
        joint = self.mm_head(torch.cat([audio, visual], dim=1))
        return {
            "mm": cross_entropy(joint, label),
            "audio": cross_entropy(self.audio_head(audio), label),
            "visual": cross_entropy(self.visual_head(visual), label),
        }


def audio_visual_batch(
    size: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Random inputs; labels that disagree with each other from one modality to the other."""
    return (
        torch.randn(size, 5, dtype=dtype),
        torch.randn(size, 7, dtype=dtype),
        torch.randint(3, (size,)),
    )


def vectors_as_losses(param: Tensor, gradients: Tensor) -> Losses:
    """Linear losses whose gradients with respect to ``param`` are the rows of ``gradients``."""
    return {f"loss{i}": (param * row.view_as(param)).sum() for i, row in enumerate(gradients)}


def assert_gram(found: Tensor, rows: Tensor) -> None:
    """That ``found`` holds the inner products of ``rows``, each up to the bound of its error."""
    wide = rows.detach().double()
    size = rows.shape[1]
    relative = size * 2.0**-52  # of the products here as well
    if rows.dtype != torch.float64:
        relative += FLOAT32_PRODUCTS
    lengths = wide.norm(dim=1)
    apart = (found.double().cpu() - wide @ wide.T).abs()
    assert (apart <= relative * torch.outer(lengths, lengths)).all(), apart.max()


def grads(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def train(model: LateFusion, step: Callable[[Losses], object], steps: int) -> list[Tensor]:
    """Steps on the same batches whatever the model; the parameters afterwards."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        batch = (
            torch.randn(16, 5, generator=generator).to(dtype),
            torch.randn(16, 7, generator=generator).to(dtype),
            torch.randint(3, (16,), generator=generator),
        )
        step(model.losses(batch))
    return [param.detach().clone() for param in model.parameters()]
