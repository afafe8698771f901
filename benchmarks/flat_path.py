"""Flatten, Gram matrix and combination of one encoder: the bytes they move, against the fewest.

    python benchmarks/flat_path.py

The *floor* reads two gradients for the Gram matrix, reads them again for the combination and
writes its result. Bytes are counted operation by operation on tensors without data, as a GPU
would be given them (an input once, an output once; views are free). Where there is a GPU the
path is timed as well, as a CUDA graph, and the floor at the speed of a copy; medians, on three
sets of gradients in turn so that none stays in the cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from models import resnet18, transformer
from step_time import captured
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmpareto_optim.flat.block import FlatBlock
from mmpareto_optim.rules import mmpareto_coefficients

ENCODERS = {
    "ResNet-18": lambda: resnet18(3),
    "Transformer, width 256": lambda: transformer(256, 4),
    "Transformer, width 1024": lambda: transformer(1024, 6),
}
SETS, ROUNDS = 3, 30


class Bytes(TorchDispatchMode):
    """Counts what each operation reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aliases = [value.alias_info for value in func._schema.returns]
        if not any(alias and not alias.is_write for alias in aliases):
            read = {id(leaf): leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
            written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            moved = [leaf.numel() * leaf.itemsize for leaf in [*read.values(), *written]]
            self.of[func.overloadpacket.__name__] += sum(moved)
        return result


def path(params: list[Tensor], rows: list[list[Tensor]]) -> list[Tensor]:
    block = FlatBlock(params, [list(row) for row in rows])
    return block.combine(mmpareto_coefficients(block.gram(), 1.5, eps=2**-23))


def gradients(params: list[Tensor]) -> list[list[Tensor]]:
    return [[torch.randn_like(param) for param in params] for _ in range(2)]


def milliseconds(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source)) for _ in range(20)]
    return 2 * source.nbytes / (float(np.median(times)) / 1000)


def counted(encoder: torch.nn.Module) -> tuple[int, dict[str, int]]:
    """The floor's bytes, and those of the path by operation."""
    params = [param.detach().to("meta") for param in encoder.parameters()]
    rows = gradients(params)
    path(params, rows)  # plans the layout
    with Bytes() as moved:
        path(params, rows)
    return 5 * sum(param.numel() * param.itemsize for param in params), moved.of


def timed(encoder: torch.nn.Module) -> float:
    """Milliseconds on the GPU."""
    params = [param.detach().cuda() for param in encoder.parameters()]
    replays = [captured(partial(path, params, gradients(params))) for _ in range(SETS)]
    return float(np.median([milliseconds(replay) for _ in range(ROUNDS) for replay in replays]))


def main() -> None:
    speed = bandwidth() if torch.cuda.is_available() else None
    for name, build in ENCODERS.items():
        floor, moved = counted(build())
        total = sum(moved.values())
        print(
            f"{name}: {total / 1e6:.0f} MB, the floor is {floor / 1e6:.0f} MB, {floor / total:.0%}"
        )
        for operation, number in sorted(moved.items(), key=lambda item: -item[1]):
            if number > total / 100:
                print(f"    {operation:28s} {number / 1e6:8.0f} MB")
        if speed:
            ms, floor_ms = timed(build()), floor / speed * 1000
            print(
                f"    {torch.cuda.get_device_name()}: {ms:.4f} ms, floor / time {floor_ms / ms:.0%}"
            )


if __name__ == "__main__":
    main()
