"""What can be chosen: how gradients are integrated, losses and features. Validated here."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor

from mmpareto_optim.rules.evaluation import check_gamma
from mmpareto_optim.rules.named import NAMES, Rule

RuleChoice = str | Rule
"""The name of a rule, or a function from a Gram matrix ``(m, m)`` to coefficients ``(m,)``."""

Rescale = Literal["encoder", "tensor"]

MOST_NAMES = 1000
"""Names of losses that are remembered: there may be new ones in each step."""


@dataclass(frozen=True)
class Options:
    """How gradients are integrated; :class:`MMParetoOptimizer` says what the fields are."""

    integration: RuleChoice
    gamma: float | None
    rescale: Rescale

    def __post_init__(self) -> None:
        if not callable(self.integration) and self.integration not in NAMES:
            names = ", ".join(f'"{name}"' for name in NAMES)
            raise ValueError(
                f"integration must be {names} or a function from a Gram matrix to coefficients, "
                f"got {self.integration!r}"
            )
        if self.rescale not in ("encoder", "tensor"):
            raise ValueError(f'rescale must be "encoder" or "tensor", got {self.rescale!r}')
        if self.gamma is not None:
            check_gamma(self.gamma)
        if self.gamma is not None and callable(self.integration):
            raise ValueError(
                f"gamma={self.gamma} is a factor on the rules that have a name: multiply the "
                "coefficients of your function by it, and leave gamma out"
            )

    @property
    def factor(self) -> float:
        """Gamma, or its default for the rule: the authors' for their own, 1 for the others."""
        default = 1.5 if self.integration == "mmpareto" else 1.0
        return default if self.gamma is None else self.gamma

    @property
    def stretches_tensors(self) -> bool:
        """Whether each parameter tensor is stretched by itself."""
        return self.integration == "mmpareto" and self.rescale == "tensor"

    @property
    def rule_name(self) -> str:
        """That of the rule, or of the user's function."""
        rule = self.integration
        return rule if isinstance(rule, str) else getattr(rule, "__name__", type(rule).__name__)

    def __str__(self) -> str:
        gamma = "" if callable(self.integration) else f", gamma={self.factor}"
        rescale = f", rescale={self.rescale!r}" if self.integration == "mmpareto" else ""
        return f"integration={self.rule_name!r}{gamma}{rescale}"


def set_attribute(owner: Any, name: str, value: Any) -> None:
    """As usual, but for a public name that there is not: a misspelt setting would do nothing."""
    kind = type(owner)
    known = name[0] == "_" or name in owner.__dict__ or hasattr(kind, name)
    if not known and kind.__module__.startswith("mmpareto_optim.") and name not in PUBLIC:
        base = getattr(owner, "optimizer", None)
        if base is None or not hasattr(base, name):
            raise no_attribute(owner, name)
        owner = base
    object.__setattr__(owner, name, value)


PUBLIC = ("optimizer", "param_groups", "most_losses", "stats", "has_integrated")
"""Attributes that instances of this package's optimizers begin with."""


def no_attribute(owner: Any, name: str) -> AttributeError:
    """An error of an attribute that neither an optimizer nor its base has."""
    base, whose = owner.__dict__.get("optimizer"), f"{type(owner).__name__} has"
    if base is not None and not hasattr(base, name):
        whose = f"{type(owner).__name__} and its base {type(base).__name__} have"
    near = get_close_matches(name, [each for each in dir(type(owner)) if each[0] != "_"], 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return AttributeError(f"{whose} no attribute {name!r}{hint}")


def is_mapping(value: Any) -> bool:
    """Whether something is one, registered as such (a ``dict``) or not (a ``TensorDict``)."""
    has_both = hasattr(value, "keys") and hasattr(value, "__getitem__")
    return isinstance(value, Mapping) or (has_both and not isinstance(value, Tensor))


def check_losses(losses: Any, *, need_graph: bool = True) -> dict[str, Tensor]:
    """The losses as a dict; raises unless they map names to scalars that have a graph."""
    if need_graph and torch.is_inference_mode_enabled():
        raise RuntimeError(
            "gradients made under torch.inference_mode() are of no use to an optimizer: call "
            "step() and backward() outside of it"
        )
    if not is_mapping(losses):
        raise TypeError(
            "losses must be a mapping from a name to a scalar tensor, such as "
            f'{{"mm": loss, "audio": audio_loss}}, got {type(losses).__name__}'
        )
    found: dict[str, Tensor] = {name: losses[name] for name in losses.keys()}  # noqa: SIM118
    if not found:
        raise ValueError("losses is empty: give at least one loss")
    for name, loss in found.items():
        if loss is None:
            raise TypeError(f"loss {name!r} is None: leave it out of losses in this step")
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"loss {name!r} must be a scalar tensor, got {type(loss).__name__}: "
                "pass the tensor itself, not its .item()"
            )
        if loss.numel() != 1:
            raise ValueError(
                f"loss {name!r} must be a scalar, got shape {tuple(loss.shape)}: "
                "reduce it with .mean() or .sum()"
            )
        if loss.is_complex():
            raise ValueError(
                f"loss {name!r} is complex, and has no direction in which it falls: take its "
                ".abs() or its .real"
            )
        if need_graph and not loss.requires_grad:
            raise ValueError(
                f"loss {name!r} has no graph, so it has no gradient: compute it from the model's "
                "output outside torch.no_grad() and without .detach(), or leave it out of losses"
            )
    return found


def check_features(features: Any) -> None:
    """Raise unless ``features`` maps names to tensors on the way to the losses."""
    if not isinstance(features, Mapping):
        raise TypeError(
            "features must be a mapping from a modality's name to its encoder's output, "
            f"got {type(features).__name__}"
        )
    if not features:
        raise ValueError("features is empty: give each encoder's output, or leave it out")
    for name, feature in features.items():
        if not isinstance(feature, Tensor):
            raise TypeError(
                f"feature {name!r} must be a tensor, got {type(feature).__name__}: an encoder "
                "with several outputs needs an entry for each"
            )
        if feature.grad_fn is None:
            raise ValueError(
                f"feature {name!r} has no graph, so there is no encoder behind it: leave it out "
                "where the encoder is frozen, and do not .detach() it where it is not"
            )
