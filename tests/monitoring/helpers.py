"""What the tests of monitoring have in common."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mmpareto_optim import BlockStats, ConflictRecorder, MMParetoOptimizer
from tests.models import LateFusion, audio_visual_batch

# Default devices and dtypes that users set, under which nothing may change.
OTHER_DEFAULTS = [("meta", torch.float32), ("cpu", torch.float64), ("cpu", torch.float16)]


@contextmanager
def defaults(device: str, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def optimizer_of(model: nn.Module, **options: Any) -> MMParetoOptimizer:
    return MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **options)


def recorded_training(steps: int) -> ConflictRecorder:
    model = LateFusion()
    opt = optimizer_of(model)
    recorder = ConflictRecorder()
    opt.register_step_post_hook(recorder.record)
    for step in range(steps):
        recorder.epoch = step // 10
        opt.step(losses=model.losses(audio_visual_batch(4)))
    return recorder


class Writer:
    """A writer that remembers."""

    def __init__(self) -> None:
        self.points: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.points.append((tag, scalar_value, global_step))


class Seen:
    """Something that has stats."""

    def __init__(self, **stats: BlockStats) -> None:
        self.stats = stats


def seen(block: str, names: tuple[str, ...]) -> Seen:
    gradients = torch.randn(len(names), 3, dtype=torch.float64)
    stats = BlockStats(names, gradients @ gradients.T, torch.ones(len(names)).double())
    return Seen(**{block: stats})
