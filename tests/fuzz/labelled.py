"""A subclass of Tensor that hands itself on, as those with meta data do (MONAI's, fastai's)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Labelled(Tensor):
    """Whatever is computed from one is one, and carries its label."""

    label = "unlabelled"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handle: Any = super().__torch_function__
        found = handle(func, types, args, kwargs or {})
        labels = [each.label for each in args if isinstance(each, Labelled)]
        if isinstance(found, Labelled) and labels:
            found.label = labels[0]
        return found


def labelled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as those of the subclass, in the same graph."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found[name] = tensor.as_subclass(Labelled)
        found[name].label = name  # type: ignore[attr-defined]
    return found


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is torch's own, and no parameter either."""
    return type(tensor) is torch.Tensor
