"""Blocks chosen by hand: what a user may give as ``param_groups_by_modality``."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

Modalities = dict[str, dict[Tensor, str]]
"""For each modality its parameters, each with a name for error messages."""


def parameters_by_modality(groups: Any) -> Modalities:
    """Resolve ``param_groups_by_modality`` to named parameters.

    Args:
        groups: a mapping from a modality's name to a module or several, to parameters, or to
            ``(name, parameter)`` pairs. Generators are read once, here.

    Raises:
        TypeError: not a mapping, or an entry of another kind; names the modality.
        ValueError: no entry, an empty one, or a parameter in two modalities; names them.
    """
    if not isinstance(groups, Mapping):
        raise TypeError(
            "param_groups_by_modality must be a mapping from a modality's name to a module "
            f"or its parameters, got {type(groups).__name__}{_if_optimizer(groups)}"
        )
    if not groups:
        raise ValueError(
            "param_groups_by_modality is empty: name at least one modality, or leave it out "
            "to have the blocks found from which losses reach which parameters"
        )
    if len({str(name) for name in groups}) < len(groups):
        raise ValueError(f"two modalities have the same name as text: {list(groups)}; rename one")
    modalities = {str(name): _named_parameters(str(name), entry) for name, entry in groups.items()}
    owner: dict[Tensor, str] = {}
    for modality, params in modalities.items():
        for param, name in params.items():
            if param in owner:
                raise ValueError(
                    f"parameter {name} of modality {modality!r} is in modality "
                    f"{owner[param]!r} too: leave it in one of them, or in neither to have "
                    "its gradients added"
                )
            owner[param] = modality
    return modalities


def check_held(modalities: Modalities, held: Iterable[Tensor]) -> None:
    """Raise ValueError if a trainable parameter of a modality is not in the optimizer."""
    known = set(held)
    for modality, params in modalities.items():
        for param, name in params.items():
            if param.requires_grad and param not in known:
                raise ValueError(
                    f"parameter {name} of modality {modality!r} is not held by the base "
                    "optimizer: add it with add_param_group(), freeze it with "
                    "requires_grad_(False), or leave it out of param_groups_by_modality"
                )


def _named_parameters(modality: str, entry: Any) -> dict[Tensor, str]:
    if isinstance(entry, nn.Module):
        items: list[Any] = list(entry.named_parameters())
    elif isinstance(entry, Iterable) and not isinstance(entry, str | bytes | Tensor):
        items = list(entry)
    else:
        items = [entry]
    params: dict[Tensor, str] = {}
    for index, item in enumerate(_flattened(items)):
        name, param = item if _is_pair(item) else (str(index), item)
        if not isinstance(param, Tensor):
            raise TypeError(
                f"modality {modality!r} must be modules, parameters or (name, parameter) "
                f"pairs, got {type(param).__name__}"
            )
        params[param] = f"{name!r} of shape {tuple(param.shape)}"
    if not params:
        raise ValueError(f"modality {modality!r} has no parameters: give some, or leave it out")
    return params


def _flattened(items: Iterable[Any]) -> Iterator[Any]:
    """Modules give way to their named parameters."""
    for index, item in enumerate(items):
        if isinstance(item, nn.Module):
            yield from ((f"{index}.{name}", param) for name, param in item.named_parameters())
        else:
            yield item


def _if_optimizer(given: Any) -> str:
    if not isinstance(given, Optimizer):
        return ""
    return ": several optimizers go in one list, as in MMParetoOptimizer([muon, adamw])"


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
