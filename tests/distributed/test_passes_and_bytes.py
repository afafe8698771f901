"""What docs/scaling.md says of passes and of bytes between processes, counted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmpareto_optim import GradientIntegrator
from tests.processes import Processes, started

Losses = dict[str, Tensor]
WIDTH = 6


def trunk_and_heads(losses: int) -> nn.ModuleList:
    trunk = nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())])
    return nn.ModuleList([trunk, *[nn.Linear(WIDTH, 1) for _ in range(losses)]])


def losses_of(model: nn.ModuleList, feature: Tensor) -> Losses:
    return {str(i): head(feature).square().mean() for i, head in enumerate(model[1:])}


@contextmanager
def calls_of(module: Any, name: str, seen: Callable[..., None]) -> Iterator[None]:
    original = getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(module, name, counted)
    try:
        yield
    finally:
        setattr(module, name, original)


@pytest.mark.parametrize("losses", [2, 5, 20])
@pytest.mark.parametrize("way", ["exact", "features"])
def test_passes(losses: int, way: str) -> None:
    model = trunk_and_heads(losses)
    integrator = GradientIntegrator(model.parameters())
    passes: list[Any] = []
    for _ in range(2):  # the first time, what PyTorch does with hooks is tried out
        passes.clear()
        integrator.zero_grad()
        feature = model[0](torch.randn(4, WIDTH))
        with calls_of(torch.autograd, "grad", lambda *args, **_: passes.append(args)):
            features = {"trunk": feature} if way == "features" else None
            integrator.backward(losses_of(model, feature), features=features)
    assert len(passes) == losses + (way == "features")


def check_bytes(losses: int, way: str) -> None:
    torch.manual_seed(0)
    model = trunk_and_heads(losses)
    integrator = GradientIntegrator(model.parameters())
    moved: dict[torch.dtype, int] = {}

    def seen(tensor: Tensor, *_: Any, **__: Any) -> None:
        moved[tensor.dtype] = moved.get(tensor.dtype, 0) + tensor.nbytes

    for _ in range(2):  # the first step compares more
        moved.clear()
        feature = model[0](torch.randn(4, WIDTH))
        with calls_of(dist, "all_reduce", seen):
            integrator.zero_grad()
            features = {"trunk": feature} if way == "features" else None
            integrator.backward(losses_of(model, feature), features=features)
    trunk = sum(p.numel() for p in model[0].parameters())
    heads = sum(p.numel() for p in model.parameters()) - trunk
    gradients = trunk * (1 if way == "features" else losses) + heads
    assert moved[torch.float32] == 4 * gradients
    assert moved.get(torch.float64, 0) == (8 * losses**2 if way == "features" else 0)
    # For each loss, before the first, behind the features and before .grad: two numbers.
    assert moved[torch.int64] <= 16 * (losses * (1 + (way == "features")) + 2 + (way == "features"))


@pytest.mark.parametrize("losses", [2, 5])
@pytest.mark.parametrize("way", ["exact", "features"])
def test_bytes_that_are_averaged(two: Processes, losses: int, way: str) -> None:
    two(check_bytes, losses, way)


@pytest.mark.slow
def test_bytes_that_four_ranks_average(tmp_path: Path) -> None:
    with started(4, tmp_path) as four:
        for way in ("exact", "features"):
            four(check_bytes, 5, way)


def check_shards(losses: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = trunk_and_heads(losses)
    fully_shard(model[0])
    integrator = GradientIntegrator(model[0].parameters())
    grams: list[int] = []

    def seen(tensor: Tensor, *_: Any, **__: Any) -> None:
        if tensor.dtype == torch.float64:
            grams.append(tensor.nbytes)

    for _ in range(2):  # the first step looks at what the losses reach
        grams.clear()
        feature = model[0](torch.randn(4, WIDTH))
        with calls_of(dist, "all_reduce", seen):
            integrator.zero_grad()
            integrator.backward(losses_of(model, feature))
    assert grams == [8 * losses**2]


@pytest.mark.parametrize("losses", [2, 5])
def test_shards_add_up_gram_matrices(two: Processes, losses: int) -> None:
    two(check_shards, losses)
