"""Parameters as ``torch.optim`` takes them, and blocks chosen by hand."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

Modalities = dict[str, dict[Tensor, str]]
"""For each modality its parameters, each with a name for error messages."""


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """What ``torch.optim`` takes as ``params``, as dicts of lists of tensors."""
    if isinstance(params, nn.Module):
        raise TypeError(
            f"params must be parameters, got the module {type(params).__name__}: give its "
            ".parameters() or .named_parameters()"
        )
    if isinstance(params, Optimizer):
        raise TypeError(
            f"params must be parameters, got the optimizer {type(params).__name__}: give its "
            ".param_groups, or wrap it, as in MMParetoOptimizer(optimizer)"
        )
    items = list(params)
    if not items:
        raise ValueError("params is empty: give the parameters whose gradients are integrated")
    groups = items if all(isinstance(item, Mapping) for item in items) else [{"params": items}]
    return [_as_group(dict(group)) for group in groups]


def _as_group(group: dict[str, Any]) -> dict[str, Any]:
    listed = group["params"]
    items = [listed] if isinstance(listed, Tensor) else list(listed)
    if items and all(map(_is_pair, items)):
        group["param_names"] = [name for name, _ in items]
        items = [param for _, param in items]
    for item in items:
        if not isinstance(item, Tensor):
            raise TypeError(
                f"params must hold tensors, (name, tensor) pairs or groups, got "
                f"{type(item).__name__}: pass model.parameters() or model.named_parameters()"
            )
    group["params"] = items
    return group


def describe(wanted: Tensor, groups: Sequence[Mapping[str, Any]]) -> str:
    """A parameter's name for error messages, or where it stands."""
    for number, group in enumerate(groups):
        for index, param in enumerate(group["params"]):
            if param is wanted and "param_names" in group:
                return f"parameter {group['param_names'][index]!r}"
            if param is wanted:
                return f"param_groups[{number}]['params'][{index}] of shape {_shape(wanted)}"
    raise KeyError(wanted)


def parameters_by_modality(groups: Any, held: Sequence[Mapping[str, Any]]) -> Modalities:
    """Named parameters of what ``param_groups_by_modality`` may be, which is read once, here.

    A string is a prefix of names that the groups ``held`` have for their parameters.

    Raises:
        TypeError: not a mapping, or an entry of another kind; names the modality.
        ValueError: no entry, an empty one, a prefix that no name has, a parameter in two
            modalities, or a trainable one that is not held; names them.
    """
    if not isinstance(groups, Mapping):
        several = ": several optimizers go in one list, as in MMParetoOptimizer([muon, adamw])"
        raise TypeError(
            "param_groups_by_modality must be a mapping from a modality's name to a module or its "
            f"parameters, got {type(groups).__name__}"
            f"{several if isinstance(groups, Optimizer) else ''}"
        )
    if not groups:
        raise ValueError(
            "param_groups_by_modality is empty: name at least one modality, or leave it out "
            "to have the blocks found from which losses reach which parameters"
        )
    modalities = {
        str(name): _named_parameters(str(name), entry, held) for name, entry in groups.items()
    }
    if len(modalities) < len(groups):
        raise ValueError(f"two modalities have the same name as text: {list(groups)}; rename one")
    owner: dict[Tensor, str] = {}
    for modality, params in modalities.items():
        for param, name in params.items():
            if owner.setdefault(param, modality) != modality:
                raise ValueError(
                    f"parameter {name} of modality {modality!r} is in modality {owner[param]!r} "
                    "too: leave it in one of them, or in neither to have its gradients added"
                )
    check_held(modalities, (param for group in held for param in group["params"]))
    return modalities


def positions_by_modality(modalities: Modalities, params: Sequence[Tensor]) -> object:
    """Each modality's name, and where its members stand among some parameters."""
    return tuple(
        (name, tuple(i for i, param in enumerate(params) if param in members))
        for name, members in modalities.items()
    )


def check_held(modalities: Modalities, held: Iterable[Tensor]) -> None:
    """Raise ValueError if a trainable parameter of a modality is not held."""
    known = set(held)
    for modality, params in modalities.items():
        for param, name in params.items():
            if param.requires_grad and param not in known:
                raise ValueError(
                    f"parameter {name} of modality {modality!r} is not held by the base "
                    "optimizer: add it with add_param_group(), freeze it with "
                    "requires_grad_(False), or leave it out of param_groups_by_modality"
                )


def _named_parameters(
    modality: str, entry: Any, held: Sequence[Mapping[str, Any]]
) -> dict[Tensor, str]:
    if isinstance(entry, nn.Module):
        entry = entry.named_parameters()
    elif isinstance(entry, str | bytes | Tensor) or not isinstance(entry, Iterable):
        entry = [entry]
    pairs: list[tuple[str, Any]] = []
    for index, item in enumerate(entry):
        if isinstance(item, nn.Module):
            pairs += [(f"{index}.{name}", param) for name, param in item.named_parameters()]
        elif isinstance(item, str):
            pairs += _with_prefix(item, modality, held)
        else:
            pairs.append(item if _is_pair(item) else (str(index), item))
    for _, param in pairs:
        if not isinstance(param, Tensor):
            raise TypeError(
                f"modality {modality!r} must be modules, parameters, (name, parameter) pairs or "
                f"prefixes of parameters' names, got {type(param).__name__}"
            )
    if not pairs:
        raise ValueError(f"modality {modality!r} has no parameters: give some, or leave it out")
    return {param: f"{name!r} of shape {_shape(param)}" for name, param in pairs}


def _with_prefix(
    prefix: str, modality: str, groups: Sequence[Mapping[str, Any]]
) -> list[tuple[str, Tensor]]:
    """The parameters of the module that has this name, or the one parameter that has it."""
    named = [
        pair
        for group in groups
        for pair in zip(group.get("param_names", ()), group["params"], strict=False)
    ]
    if not named:
        raise ValueError(
            f"modality {modality!r} is {prefix!r}, and the base has no names for its parameters: "
            "build it from model.named_parameters(), or give the module instead of the string"
        )
    found = [(name, param) for name, param in named if f"{name}.".startswith(f"{prefix}.")]
    if not found:
        modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name, _ in named))
        more = f" and {len(modules) - 8} more" if len(modules) > 8 else ""
        raise ValueError(
            f"modality {modality!r} is {prefix!r}, and no parameter of the base is named so, or "
            f"{prefix}.something: its modules are {', '.join(modules[:8])}{more}"
        )
    return found


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)


def _shape(param: Tensor) -> object:
    return "not known yet" if is_lazy(param) else tuple(param.shape)
