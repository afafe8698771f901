"""Types that several modules name."""

from collections.abc import Callable, Mapping

from torch import Tensor

Gradient = list[Tensor | None]
"""One tensor for each parameter, None where there is none."""

Losses = Mapping[str, Tensor]
"""Scalars with a graph, by name."""

Features = Mapping[str, Tensor]
"""The encoders' outputs, by modality."""

Describe = Callable[[Tensor], str]
"""A parameter's name for error messages."""

Constants = Callable[[], tuple[tuple[str, object], ...]]
"""Gives, by name, what must be alike on all ranks."""
