"""Small encoders of many kinds: each maps a batch of its modality to features (batch, FEATURES)."""

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.fuzz.functions import Added, NumpySine, Replayed, SineAndCosine, applied

INPUTS, LENGTH, TOKENS, FEATURES = 4, 5, 7, 4
# Outputs of a layer whose weight is so large that the library need not copy its gradient.
WIDE = 2**15 // INPUTS
# How deep a graph is at least and at most that is drawn as one: the library walks 3,000 nodes.
SHALLOWEST, DEEPEST = 3000, 6000


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Tied(nn.Module):
    """One matrix used there and, transposed, back."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(FEATURES, FEATURES) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.t()) @ self.weight


class Reused(nn.Module):
    """One layer applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(torch.tanh(self.layer(x))))


class LowRank(nn.Module):
    """A frozen matrix and a trained correction of rank two that starts at zero (LoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(INPUTS, FEATURES)
        self.base.weight.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, INPUTS))
        self.up = nn.Parameter(torch.zeros(FEATURES, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.base(x)) + x @ self.down.t() @ self.up.t()


class Gated(nn.Module):
    """A residual branch behind a gain that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(()))
        self.branch = nn.Linear(INPUTS, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * torch.tanh(self.branch(x))


class Shared(nn.Module):
    """Two parameters whose gradients a custom function returns as one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(FEATURES, INPUTS))
        self.second = nn.Parameter(torch.randn(FEATURES, INPUTS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x @ applied(Added, self.first, self.second).t())


class Waves(nn.Module):
    """A custom function with two outputs, of which the second may go unused."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.inside = nn.Linear(INPUTS, FEATURES)
        self.both = both

    def forward(self, x: Tensor) -> Tensor:
        sine, cosine = applied(SineAndCosine, self.inside(x))
        return torch.as_tensor(sine + 0.5 * cosine if self.both else sine)


class Symmetric(nn.Module):
    """A parametrization: only the symmetric part of a square matrix is used."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + x.t()) / 2


class Recurrent(nn.Module):
    """The last output of a recurrent network."""

    def __init__(self, cell: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.cell = cell(INPUTS, FEATURES, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(INPUTS, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.attend(x, x, x, need_weights=False)[0].mean(1))


class Graphed(nn.Module):
    """A layer that is replayed from a graph: its gradients lie in the same memory each time."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, INPUTS))
        self.bias = nn.Parameter(torch.randn(outputs))
        self.memory: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = applied(Replayed, x, self.weight, self.bias, self.memory)
        return _pooled(torch.as_tensor(y))


class Points(nn.Module):
    """As many points as one likes, of which each input takes the nearest (Gaussian splatting)."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(count, INPUTS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(torch.softmax(x @ self.points.t(), 1) @ self.points)


class Deep(nn.Module):
    """A state that is carried on for thousands of operations (a long sequence, unrolled)."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.inside = nn.Linear(INPUTS, FEATURES)
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        state = torch.tanh(self.inside(x))
        for _ in range(self.count):
            state = -state
        return state


def _pooled(y: Tensor) -> Tensor:
    """Many outputs as few features."""
    return torch.as_tensor(y.unflatten(1, (FEATURES, -1)).mean(2) * 3)


def _graphed(chance: Random) -> nn.Module:
    graphed = Graphed(WIDE if chance.random() < 0.7 else FEATURES)
    below = [nn.Linear(INPUTS, INPUTS), nn.Tanh()] if chance.random() < 0.5 else []
    return nn.Sequential(*below, graphed)


def _wide(chance: Random) -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, WIDE), nn.Tanh(), Apply(_pooled))


def _mlp(chance: Random) -> nn.Module:
    act = chance.choice([nn.ReLU, nn.Tanh, nn.GELU])()
    return nn.Sequential(
        nn.Linear(INPUTS, 5), act, nn.Linear(5, FEATURES, bias=chance.random() < 0.7)
    )


def _conv(chance: Random) -> nn.Module:
    return nn.Sequential(
        Apply(lambda x: x.transpose(1, 2)),
        nn.Conv1d(INPUTS, 6, 3, groups=chance.choice([1, 2])),
        nn.Tanh(),
        Apply(lambda x: x.mean(2)),
        nn.Linear(6, FEATURES),
    )


def _norm(chance: Random) -> nn.Module:
    norm = chance.choice([nn.LayerNorm(6), nn.BatchNorm1d(6), nn.GroupNorm(2, 6), nn.RMSNorm(6)])
    return nn.Sequential(nn.Linear(INPUTS, 6), norm, nn.Tanh(), nn.Linear(6, FEATURES))


def _embedding(chance: Random) -> nn.Module:
    if chance.random() < 0.5:
        return nn.Sequential(nn.EmbeddingBag(TOKENS, 5, mode="mean"), nn.Linear(5, FEATURES))
    return nn.Sequential(nn.Embedding(TOKENS, FEATURES), Apply(lambda x: x.tanh().mean(1)))


def _recurrent(chance: Random) -> nn.Module:
    return Recurrent(chance.choice([nn.RNN, nn.GRU, nn.LSTM]))


def _parametrized(chance: Random) -> nn.Module:
    layer = nn.Linear(FEATURES, FEATURES)
    if chance.random() < 0.5:
        parametrizations.weight_norm(layer)
    else:
        parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(FEATURES, FEATURES))


def _dead(chance: Random) -> nn.Module:
    below = nn.Linear(INPUTS, 5)
    with torch.no_grad():
        below.bias[: chance.choice([3, 5])] = -1e3
    return nn.Sequential(below, nn.ReLU(), nn.Linear(5, FEATURES))


def _frozen(chance: Random) -> nn.Module:
    layers = [nn.Linear(INPUTS, 5), nn.Linear(5, 5), nn.Linear(5, FEATURES)]
    layers[chance.randrange(2)].requires_grad_(False)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def _numpy(chance: Random) -> nn.Module:
    return nn.Sequential(
        nn.Linear(INPUTS, FEATURES), Apply(lambda x: applied(NumpySine, x)), Tied()
    )


# The shape of what goes in, and how to make the encoder.
KINDS: dict[str, tuple[str, Callable[[Random], nn.Module]]] = {
    "linear": ("vector", lambda chance: nn.Linear(INPUTS, FEATURES)),
    "mlp": ("vector", _mlp),
    "conv": ("sequence", _conv),
    "norm": ("vector", _norm),
    "embedding": ("tokens", _embedding),
    "recurrent": ("sequence", _recurrent),
    "attention": ("sequence", lambda chance: Attention()),
    "tied": ("vector", lambda chance: Tied()),
    "reused": ("vector", lambda chance: Reused()),
    "parametrized": ("vector", _parametrized),
    "low rank": ("vector", lambda chance: LowRank()),
    "gated": ("vector", lambda chance: Gated()),
    "dead": ("vector", _dead),
    "frozen": ("vector", _frozen),
    "shared memory": ("vector", lambda chance: Shared()),
    "numpy": ("vector", _numpy),
    "graphed": ("vector", _graphed),
    "wide": ("vector", _wide),
    "points": ("vector", lambda chance: Points(chance.choice([3, 5]))),
    "waves": ("vector", lambda chance: Waves(chance.random() < 0.5)),
}

# Not drawn like the others, as it takes long.
DEEP = "deep"
KINDS[DEEP] = ("vector", lambda chance: Deep(chance.randint(SHALLOWEST, DEEPEST)))


def inputs(kind: str, batch: int, draw: torch.Generator) -> Tensor:
    """One batch for an encoder of this kind."""
    shape = KINDS[kind][0]
    if shape == "tokens":
        return torch.randint(0, TOKENS, (batch, LENGTH), generator=draw)
    if shape == "sequence":
        return torch.randn(batch, LENGTH, INPUTS, generator=draw)
    return torch.randn(batch, INPUTS, generator=draw)
