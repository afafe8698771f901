"""Whose memory a gradient is in: what nobody else holds may be written, and handed on."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from mmpareto_optim.ground import Gradient, gradient_dtype

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
    are counted, not Python's references to one: the tensor that the alias was made of counts
    for as long as anybody has it.
    """
    if _ALONE is None or type(alias) is not Tensor or alias.layout != torch.strided:
        return False
    storage = alias.untyped_storage()
    if not storage.resizable() or storage.nbytes() != alias.nbytes:
        return False
    if alias.device.type == "cpu" and storage.is_shared():
        return False
    del storage
    return _holders(alias) == _ALONE


def secured(gradient: Gradient) -> None:
    """Make each tensor of a gradient one in memory that nobody else can write to."""
    for position in range(len(gradient)):  # enumerate() would hold on to what it gave
        found = gradient[position]
        if found is not None:
            gradient[position] = alias = alias_of(found)
            del found
            if not is_owned(alias):
                gradient[position] = alias.clone()


def total_of(pieces: list[Tensor], param: Tensor) -> Tensor:
    """The sum of some gradients, as ``.grad`` of a parameter: in memory of its own.

    Args:
        pieces: at least one; emptied, so that memory which nobody else holds serves the result.
        param: whose dtype and memory layout the result has.
    """
    first = alias_of(pieces.pop(0))
    dtype = gradient_dtype(param)
    # In half precision the sum is rounded once.
    exact = torch.promote_types(dtype, torch.float32) if pieces else dtype
    if not (first.stride() == param.stride() and first.dtype == exact and is_owned(first)):
        first = torch.empty_like(param, dtype=exact, requires_grad=False).copy_(first)
    for piece in pieces:
        first += piece
    pieces.clear()
    return first if first.dtype == dtype else first.to(dtype)


def _holders(tensor: Tensor) -> tuple[int, int]:
    """How many hold a tensor's storage, and how many the object in Python that stands for it."""
    storage = tensor.untyped_storage()
    count = 0 if _use_count is None else _use_count(storage._cdata)
    return count, sys.getrefcount(storage)


def _alone() -> tuple[int, int] | None:
    """What is counted where nobody else holds a tensor; None if that tells nothing."""
    tensor = torch.empty(1, device="cpu")
    alone = _holders(tensor)
    other = tensor.detach()
    shared = _holders(tensor)
    del other
    storage = tensor.untyped_storage()
    asked_for = _holders(tensor)
    del storage
    return alone if _use_count and alone not in (shared, asked_for) else None


_ALONE = _alone()
