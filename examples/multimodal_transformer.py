"""Spoken and written digits in one Transformer: losses that reach both encoders.

Attention bottlenecks (Nagrani et al., 2021): each modality has its own layers; in the last ones a
few bottleneck tokens, attended to by both modalities and averaged between them, carry what one
tells the other. Each modality's head reads its own class token, which by then has seen the other
modality. So all three losses reach the tokens and every layer but the last of both encoders: a
block of three objectives. Only the last layers have two, as in late fusion.
The data and the options are those of audio_visual_digits.py; 3 seeds of 8 epochs unless told
otherwise.

    python multimodal_transformer.py --data DIR
    python multimodal_transformer.py --data DIR --split speaker --seeds 6
"""

from __future__ import annotations

from time import perf_counter

import torch
from audio_visual_digits import FRAMES, MELS, make_data, parse_options
from common import Tensors, compare, plot_modalities, report
from torch import Tensor, nn

HEADS = {"mm": "multimodal", "audio": "audio token", "visual": "visual token"}
BLOCKS = {
    "mm+audio+visual": "both encoders",
    "mm+audio": "last audio layer",
    "mm+visual": "last visual layer",
}
WIDTH, ATTENTION_HEADS = 64, 4
LAYERS, FUSED_LAYERS = 1, 2  # of each modality: by itself, then with the bottleneck tokens
BOTTLENECKS = 4  # tokens
# A modality's patches, each one token: 4 spectra of all mels; 7 x 7 pixels.
PATCHES = {"audio": (MELS, 4), "visual": (7, 7)}
TOKENS = {"audio": FRAMES // 4, "visual": 16}


class Tokens(nn.Module):
    """Images (n, 1, height, width) to a class token and one a patch (n, 1 + patches, width)."""

    def __init__(self, patch: tuple[int, int], count: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, patch, patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + count, WIDTH))

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patches(image).flatten(2).transpose(1, 2)
        first = self.class_token.expand(len(image), -1, -1)
        return torch.cat([first, patches], dim=1) + self.positions


class Layer(nn.Module):
    """A Transformer layer a modality; with bottlenecks, each modality attends to them too."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.ModuleDict(
            {
                name: nn.TransformerEncoderLayer(
                    WIDTH, ATTENTION_HEADS, 2 * WIDTH, 0.0, batch_first=True, norm_first=True
                )
                for name in TOKENS
            }
        )

    def forward(self, tokens: Tensors) -> Tensors:
        return {name: layer(tokens[name]) for name, layer in self.own.items()}

    def fused(self, tokens: Tensors, bottlenecks: Tensor) -> tuple[Tensors, Tensor]:
        """The new tokens, and the mean of what both modalities made of the bottlenecks."""
        seen = self({name: torch.cat([x, bottlenecks], dim=1) for name, x in tokens.items()})
        tokens = {name: x[:, :-BOTTLENECKS] for name, x in seen.items()}
        return tokens, torch.stack([x[:, -BOTTLENECKS:] for x in seen.values()]).mean(0)


class BottleneckTransformer(nn.Module):
    """Logits by head; with ``joint`` only the joint head's loss reaches the rest."""

    def __init__(self, joint: bool) -> None:
        super().__init__()
        self.joint = joint
        self.tokens = nn.ModuleDict(
            {name: Tokens(PATCHES[name], count) for name, count in TOKENS.items()}
        )
        self.apart = [Layer() for _ in range(LAYERS)]
        self.fused = [Layer() for _ in range(FUSED_LAYERS)]
        self.layers = nn.ModuleList(self.apart + self.fused)
        self.bottlenecks = nn.Parameter(0.02 * torch.randn(1, BOTTLENECKS, WIDTH))
        self.norms = nn.ModuleDict({name: nn.LayerNorm(WIDTH) for name in TOKENS})
        self.mm_head = nn.Linear(2 * WIDTH, 10)
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, 10) for name in TOKENS})

    def features(self, audio: Tensor, visual: Tensor) -> Tensors:
        inputs = {"audio": audio, "visual": visual}
        tokens = {name: embed(inputs[name]) for name, embed in self.tokens.items()}
        bottlenecks = self.bottlenecks.expand(len(audio), -1, -1)
        for layer in self.apart:
            tokens = layer(tokens)
        for layer in self.fused:
            tokens, bottlenecks = layer.fused(tokens, bottlenecks)
        return {name: norm(tokens[name][:, 0]) for name, norm in self.norms.items()}

    def logits(self, features: Tensors) -> Tensors:
        logits = {"mm": self.mm_head(torch.cat(list(features.values()), dim=1))}
        for name, head in self.heads.items():
            logits[name] = head(features[name].detach() if self.joint else features[name])
        return logits

    def forward(self, audio: Tensor, visual: Tensor) -> Tensors:
        return self.logits(self.features(audio, visual))


def main(arguments: list[str] | None = None) -> None:
    started = perf_counter()
    options = parse_options(__doc__.split("\n")[0], lr=0.03, epochs=8, arguments=arguments)
    comparison = compare(options, make_data, BottleneckTransformer)
    path = report(comparison, "multimodal_transformer", options.split, HEADS, BLOCKS, started)
    plot_modalities(comparison, HEADS, BLOCKS, path)


if __name__ == "__main__":
    main()
