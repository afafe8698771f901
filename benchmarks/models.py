"""Two-encoder classifiers of the kinds that the method is used on, with random batches."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from resnet import resnet18

__all__ = ["CLASSES", "Inputs", "LateFusion", "build", "resnet18", "transformer"]

CLASSES = 6


class LateFusion(nn.Module):
    """An encoder and a head a modality, a joint head on both features."""

    def __init__(
        self, audio: nn.Module, visual: nn.Module, width: int, fusion: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.audio, self.visual = audio, visual
        self.fusion = fusion or nn.Linear(2 * width, CLASSES)
        self.audio_head, self.visual_head = nn.Linear(width, CLASSES), nn.Linear(width, CLASSES)

    def features(self, spec: Tensor, image: Tensor) -> dict[str, Tensor]:
        return {"audio": self.audio(spec), "visual": self.visual(image)}

    def losses(self, features: dict[str, Tensor], label: Tensor) -> dict[str, Tensor]:
        audio, visual = features["audio"], features["visual"]
        dimension = -1 if isinstance(self.fusion, nn.Linear) else 1
        joint = self.fusion(torch.cat([audio, visual], dim=dimension))
        if audio.ndim == 3:  # tokens
            audio, visual = audio.mean(1), visual.mean(1)
        return {
            "mm": cross_entropy(joint, label),
            "audio": cross_entropy(self.audio_head(audio), label),
            "visual": cross_entropy(self.visual_head(visual), label),
        }


def transformer(width: int, layers: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        width, nhead=width // 64, dim_feedforward=4 * width, dropout=0.0, batch_first=True
    )
    return nn.TransformerEncoder(layer, layers)


def mlp(given: int, width: int, depth: int) -> nn.Sequential:
    widths = [given] + [width] * depth
    layers = (nn.Linear(*pair) for pair in pairwise(widths))
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))


class Mean(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


Inputs = tuple[Tensor, Tensor, Tensor]


def build(name: str, batch: int, width: int | None = None) -> tuple[LateFusion, Inputs]:
    """A model and a random batch ``(spec, image, label)``; ``width`` where it can vary."""
    label = torch.randint(CLASSES, (batch,))
    if name == "resnet18":
        model = LateFusion(resnet18(1), resnet18(3), 512)
        return model, (torch.randn(batch, 1, 128, 128), torch.randn(batch, 3, 112, 112), label)
    if name == "transformer":
        width = width or 256
        encoders = [nn.Sequential(nn.Linear(64, width), transformer(width, 4)) for _ in range(2)]
        fusion = nn.Sequential(transformer(width, 2), Mean(), nn.Linear(width, CLASSES))
        model = LateFusion(encoders[0], encoders[1], width, fusion)
        return model, (torch.randn(batch, 64, 64), torch.randn(batch, 49, 64), label)
    width = width or 64
    given, depth = (width, 4) if name == "wide mlp" else (32, 2)
    encoders = [mlp(given, width, depth) for _ in range(2)]
    model = LateFusion(encoders[0], encoders[1], width)
    return model, (torch.randn(batch, given), torch.randn(batch, given), label)
