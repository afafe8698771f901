"""What can be chosen: how gradients are integrated, losses and features. Validated here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from mmpareto_optim.rules.evaluation import check_gamma
from mmpareto_optim.rules.named import NAMES, Rule

RuleChoice = str | Rule
"""The name of a rule, or a function from a Gram matrix ``(m, m)`` to coefficients ``(m,)``."""

Rescale = Literal["encoder", "tensor"]


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


def check_losses(losses: Any) -> None:
    """Raise unless ``losses`` maps names to scalars that have a graph."""
    if not isinstance(losses, Mapping):
        raise TypeError(
            "losses must be a mapping from a name to a scalar tensor, such as "
            f'{{"mm": loss, "audio": audio_loss}}, got {type(losses).__name__}'
        )
    if not losses:
        raise ValueError("losses is empty: give at least one loss")
    for name, loss in losses.items():
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
        if not loss.requires_grad:
            raise ValueError(
                f"loss {name!r} has no graph, so it has no gradient: compute it from the model's "
                "output outside torch.no_grad() and without .detach(), or leave it out of losses"
            )


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
