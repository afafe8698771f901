"""A few processes that run what tests ask of them, so that starting them is paid for once."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 60
"""Seconds after which a rank that waits for another gives up, and its test fails."""


class Processes:
    """The ranks of a gloo group; calling it runs a function on each and gives their results."""

    def __init__(self, pipes: list[Any]) -> None:
        self._pipes = pipes

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(2 * PATIENCE), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        failures = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        assert not failures, "\n".join(failures)
        return [result for _, result in answers]


@contextmanager
def started(size: int, folder: Path) -> Iterator[Processes]:
    context = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        worker = context.Process(target=_serve, args=(rank, size, folder, theirs), daemon=True)
        worker.start()
        pipes.append(ours)
        workers.append(worker)
    try:
        yield Processes(pipes)
    finally:
        for pipe in pipes:
            pipe.send(None)
        for worker in workers:
            worker.join(5)
            worker.kill()


def _serve(rank: int, size: int, folder: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=PATIENCE),
    )
    while (task := pipe.recv()) is not None:
        function, args, kwargs = task
        torch.manual_seed(0)
        try:
            pipe.send((None, function(*args, **kwargs)))
        except BaseException:  # what pytest.raises raises is no Exception
            pipe.send((traceback.format_exc(), None))
    dist.destroy_process_group()
