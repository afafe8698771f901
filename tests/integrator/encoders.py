"""Encoders of many kinds, whose backward is linear, and the shapes of what they take."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint


class Last(nn.Module):
    """Of a recurrent network the last output alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[0][:, -1]  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Its keys' bias has no gradient but rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0].mean(1)  # type: ignore[no-any-return]


class Modulus(nn.Module):
    """Of a linear map of complex numbers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.to(torch.complex64)).abs()  # type: ignore[no-any-return]


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        forward: Any = super().forward
        return checkpoint(forward, x, use_reentrant=False)  # type: ignore[no-any-return]


class Offloaded(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]


class Hooked(nn.Sequential):
    """With hooks that are linear: half of the gradient, and a look at it."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        y.register_hook(lambda gradient: 0.5 * gradient)
        y.register_hook(lambda gradient: None)
        return y


class Twice(nn.Linear):
    """The same weights for two views."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh() + super().forward(-x.flip(0))


def image(*norms: Callable[[int], nn.Module], first: int = 8) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, norm in zip((3, first), norms, strict=True):
        layers += [nn.Conv2d(width, first, 3, padding=1), norm(first), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def dense(*between: nn.Module, of: Callable[..., nn.Module] = nn.Sequential) -> nn.Module:
    return of(nn.Linear(6, 8), *between, nn.Linear(8, 8))


def layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)


IMAGES, ROWS, SEQUENCES, WORDS = (6, 3, 5, 5), (6, 6), (6, 4, 8), (6, 4)
ENCODERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch norm after convolutions": (lambda: image(nn.BatchNorm2d, nn.BatchNorm2d), IMAGES),
    "instance norm": (lambda: image(nn.InstanceNorm2d, nn.InstanceNorm2d), IMAGES),
    "group norm": (lambda: image(partial(nn.GroupNorm, 2), partial(nn.GroupNorm, 8)), IMAGES),
    "batch norm of rows": (lambda: dense(nn.BatchNorm1d(8), nn.ReLU()), ROWS),
    "batch norm at the end": (lambda: nn.Sequential(dense(), nn.BatchNorm1d(8)), ROWS),
    "batch norm without weights": (lambda: dense(nn.BatchNorm1d(8, affine=False)), ROWS),
    "dropout": (lambda: dense(nn.Dropout(0.5), nn.ReLU()), ROWS),
    "layer norm": (lambda: dense(nn.LayerNorm(8), nn.GELU()), ROWS),
    "weight norm": (lambda: weight_norm(nn.Linear(6, 8)), ROWS),
    "spectral norm": (lambda: spectral_norm(nn.Linear(6, 8)), ROWS),
    "dead units": (lambda: dense(nn.Threshold(1e9, 0.0)), ROWS),
    "softmax": (lambda: dense(nn.Softmax(1)), ROWS),
    "saturated": (lambda: dense(nn.Hardtanh(-1e-8, 1e-8)), ROWS),
    "lstm": (lambda: Last(nn.LSTM(8, 8, 2, batch_first=True, dropout=0.2)), SEQUENCES),
    "gru": (lambda: Last(nn.GRU(8, 4, bidirectional=True, batch_first=True)), SEQUENCES),
    "attention": (Attention, SEQUENCES),
    "transformer": (lambda: nn.Sequential(layer(), nn.Flatten(), nn.Linear(32, 8)), SEQUENCES),
    "pre-norm": (
        lambda: nn.Sequential(layer(norm_first=True), layer(), nn.Flatten(), nn.Linear(32, 8)),
        SEQUENCES,
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 2, padding_idx=0), nn.Flatten()),
        WORDS,
    ),
    "bag": (lambda: nn.EmbeddingBag(9, 8), WORDS),
    "checkpoint": (lambda: dense(nn.Dropout(0.3), nn.Tanh(), of=Checkpointed), ROWS),
    "offloaded": (lambda: dense(nn.Tanh(), of=Offloaded), ROWS),
    "linear hooks": (lambda: dense(nn.Tanh(), of=Hooked), ROWS),
    "two views": (lambda: Twice(6, 8), ROWS),
}
