"""Whose memory a gradient is in: what nobody else holds may be written, and handed on."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

# What autograd asks, too, before it lets a gradient become .grad uncopied. Private in Python:
# where it is missing, or does not tell two tensors in one memory from one, everything is copied.
_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def alias_of(tensor: Tensor) -> Tensor:
    """Another tensor in the same memory, which does not keep the first one alive."""
    return tensor.detach()


def is_owned(alias: Tensor) -> bool:
    """Whether the memory of an alias is torch's own and nobody else's.

    Not so where NumPy, DLPack, a buffer or a file is behind it, or another process; where another
    tensor, or somebody who asked for its storage, has it; or where it is a part of more. Tensors
    are counted, those that autograd saved among them, and not Python's references to one: the
    tensor that the alias was made of counts for as long as anybody has it.
    """
    if _use_count is None or type(alias) is not Tensor or alias.layout != torch.strided:
        return False
    storage = alias.untyped_storage()
    # A storage that is not torch's own cannot be resized.
    if not storage.resizable() or storage.nbytes() != alias.nbytes:
        return False
    if alias.device.type == "cpu" and storage.is_shared():
        return False
    del storage
    return _holders(alias) == _ALONE


def _holders(tensor: Tensor) -> tuple[int, int]:
    """How many hold a tensor's storage, and how many the object in Python that stands for it."""
    storage = tensor.untyped_storage()
    count = 0 if _use_count is None else _use_count(storage._cdata)
    return count, sys.getrefcount(storage)


def _counted_alone() -> tuple[int, int] | None:
    """What is counted where nobody else holds a tensor; None if counting tells nothing."""
    tensor = torch.empty(1, device="cpu")
    alone = _holders(tensor)
    other = tensor.detach()
    shared = _holders(tensor)
    del other
    storage = tensor.untyped_storage()
    asked_for = _holders(tensor)
    del storage
    return None if alone in (shared, asked_for) else alone


_ALONE = _counted_alone()
