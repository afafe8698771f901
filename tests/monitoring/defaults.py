"""Default devices and dtypes that users set, under which nothing here may change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
