import os

# Before torch is imported, and for the processes that tests start: their tensors are so small
# that two threads take longer than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.processes import Processes, started

settings.register_profile("default", deadline=None, max_examples=60)
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz", "the differential fuzzer (tests/fuzz/test_fuzz.py)")
    group.addoption("--fuzz-models", type=int, default=200, help="how many models to draw")
    group.addoption("--fuzz-seed", type=int, default=0, help="the seed of the first model")


@pytest.fixture(autouse=True)
def _same_start_for_every_test() -> None:
    torch.manual_seed(0)


@pytest.fixture
def data_dir() -> Path:
    """The folder of real data; skips where there is none."""
    folder = os.environ.get("MMPARETO_DATA")
    if folder is None:
        pytest.skip("MMPARETO_DATA is not set: no real data to read")
    return Path(folder)


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Two processes that average gradients over gloo; started once for all tests."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("no gloo in this build of torch")
    with started(2, tmp_path_factory.mktemp("two")) as processes:
        yield processes
