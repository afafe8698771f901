"""Whose memory a gradient is in: what nobody else holds may be written, and handed on."""

from collections.abc import Callable

import torch
from torch import Tensor, UntypedStorage

# What autograd asks, too, before it lets a gradient become .grad uncopied. Private in Python:
# where it is missing, everything is copied.
_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def alias_of(tensor: Tensor) -> Tensor:
    """Another tensor in the same memory, which does not keep the first one alive."""
    return tensor.detach()


def is_owned(alias: Tensor) -> bool:
    """Whether nobody else holds memory of an alias, to which there is no second reference.

    Tensors are counted, those that autograd saved among them, and not Python's references to
    one: the tensor that the alias was made of counts for as long as anybody has it.
    """
    if _use_count is None or type(alias) is not Tensor or alias.layout != torch.strided:
        return False
    storage = alias.untyped_storage()
    return _holders(storage) == _ALONE and storage.nbytes() == alias.nbytes


def _holders(storage: UntypedStorage) -> int:
    return 0 if _use_count is None else _use_count(storage._cdata)


_alone = torch.empty(0, device="cpu")
_ALONE = _holders(_alone.untyped_storage())
"""A tensor, and the object in Python that its storage is asked for by."""
