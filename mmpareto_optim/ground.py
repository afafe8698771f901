"""What several rooms name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

Gradient = list[Tensor | None]
"""One tensor for each parameter, None where there is none."""

Describe = Callable[[Tensor], str]
"""A parameter's name for error messages."""


@dataclass
class Gradients:
    """What one backward found.

    Attributes:
        rows: for each loss its gradient, to be integrated.
        plain: what is added as it is: encoders' gradients that were integrated at the features.
    """

    rows: dict[str, Gradient]
    plain: Gradient


def same_objects(some: Sequence[object], others: Sequence[object]) -> bool:
    """Whether two sequences hold the same objects, in the same order."""
    return len(some) == len(others) and all(map(is_, some, others))


def gradient_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's ``.grad``; before PyTorch 2.10 that is the parameter's."""
    chosen: torch.dtype | None = getattr(param, "grad_dtype", None) if param.is_leaf else None
    return param.dtype if chosen is None else chosen
