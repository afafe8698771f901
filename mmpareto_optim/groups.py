"""Parameters as ``torch.optim`` takes them."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """What ``torch.optim`` takes as ``params``, as dicts of lists of tensors."""
    if isinstance(params, nn.Module):
        raise TypeError(
            f"params must be parameters, got the module {type(params).__name__}: give its "
            ".parameters() or .named_parameters()"
        )
    items = list(params)
    if not items:
        raise ValueError("params is empty: give the parameters whose gradients are integrated")
    groups = items if all(isinstance(item, Mapping) for item in items) else [{"params": items}]
    return [_as_group(dict(group)) for group in groups]


def _as_group(group: dict[str, Any]) -> dict[str, Any]:
    listed = group["params"]
    items = [listed] if isinstance(listed, Tensor) else list(listed)
    named = [item for item in items if isinstance(item, tuple) and len(item) == 2]
    if named:
        group["param_names"] = [name for name, _ in named]
        items = [param for _, param in named]
    for item in items:
        if not isinstance(item, Tensor):
            raise TypeError(
                f"params must hold tensors, (name, tensor) pairs or groups, got "
                f"{type(item).__name__}: pass model.parameters() or model.named_parameters()"
            )
    group["params"] = items
    return group
