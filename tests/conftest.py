import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=60)
settings.load_profile("default")


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
