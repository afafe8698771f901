"""How gradients are integrated: what the user chose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from mmpareto_optim.modalities import Modalities
from mmpareto_optim.rules import NAMES, Rule, check_gamma, default_gamma

Integration = str | Rule
"""The name of a rule, or a function from a Gram matrix ``(m, m)`` to coefficients ``(m,)``."""


@dataclass(frozen=True)
class Method:
    """How gradients are integrated; see :class:`MMParetoOptimizer` for the fields.

    Attributes:
        copies: of a rule with a memory, one for each block.
    """

    integration: Integration
    gamma: float | None
    rescale: Literal["encoder", "tensor"]
    copies: dict[str, Rule]

    @property
    def factor(self) -> float:
        """Gamma, or what it is where nobody chose it."""
        return default_gamma(self.integration) if self.gamma is None else self.gamma

    @property
    def by_tensor(self) -> bool:
        """Whether each tensor is stretched by itself."""
        return self.integration == "mmpareto" and self.rescale == "tensor"


def constants_of(
    params: Sequence[Tensor],
    method: Method,
    modalities: Modalities | None,
    features: Mapping[str, Tensor] | None,
) -> Any:
    """What ranks that train one model have in common, by the names of error messages."""
    rule: Any = method.integration
    if callable(rule):
        rule = getattr(rule, "__name__", type(rule).__name__)
    chosen = {} if modalities is None else modalities
    return (
        ("trainable parameters", tuple((param.shape, param.dtype) for param in params)),
        ("integration, gamma or rescale", (rule, method.factor, method.rescale)),
        (
            "param_groups_by_modality",
            tuple(
                (name, tuple(index for index, param in enumerate(params) if param in members))
                for name, members in chosen.items()
            ),
        ),
        ("features", None if features is None else tuple(features)),
    )


def check_settings(method: Method, memory: str, measure_every: int, measure_noise: bool) -> None:
    """Raise ValueError for what is unknown, or does not go together."""
    rule = method.integration
    if not callable(rule) and rule not in NAMES:
        names = ", ".join(f'"{name}"' for name in NAMES)
        raise ValueError(
            f"integration must be {names} or a function from a Gram matrix to coefficients, "
            f"got {rule!r}"
        )
    if method.rescale not in ("encoder", "tensor"):
        raise ValueError(f'rescale must be "encoder" or "tensor", got {method.rescale!r}')
    if method.gamma is not None:
        check_gamma(method.gamma)
        if callable(rule):
            raise ValueError(
                f"gamma={method.gamma} is a factor on the rules that have a name: multiply the "
                "coefficients of your function by it, and leave gamma out"
            )
    if memory not in ("normal", "low"):
        raise ValueError(f'memory must be "normal" or "low", got {memory!r}')
    if memory == "low" and (measure_every > 1 or measure_noise):
        raise ValueError(
            'memory="low" keeps no gradients to measure by: leave out measure_every and '
            'measure_noise, or use memory="normal"'
        )
