"""The losses' gradients at the outputs of the encoders, and one gradient behind them.

Sener & Koltun (2018, Section 3.3) bound the norm in the min-norm problem by that of the
gradients at a shared representation (MGDA-UB): the encoders are then passed through once,
with the integrated gradient, and not once a loss.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmpareto_optim.gradients.exact import by_autograd, gradients_of, naming
from mmpareto_optim.gradients.graph import Edge, edge_of, edges_behind, leaves_of
from mmpareto_optim.gradients.losses import Losses
from mmpareto_optim.ground import Describe, Gradient, Gradients
from mmpareto_optim.told import warn

Features = Mapping[str, Tensor]
"""The encoders' outputs, by modality."""

IntegrateAt = Callable[[Features, dict[str, Gradient]], list[Tensor]]
"""From each loss's gradient at the features to one gradient for each feature."""


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


class AtFeatures:
    """The way of the losses' gradients through features.

    Args:
        losses: scalars with a graph.
        features: the encoders' outputs, which the losses are computed from.
        params: leaf tensors that require a gradient.
        describe: a parameter's name for error messages.

    Raises:
        ValueError: a feature twice, or one that is computed from another; a parameter that a
            loss reaches both through a feature and around it.
    """

    def __init__(
        self, losses: Losses, features: Features, params: Sequence[Tensor], describe: Describe
    ) -> None:
        self._losses = losses
        self._features = features
        self._params = params
        self._describe = describe
        self.behind = leaves_by_feature(features)
        stops = {edge_of(feature) for feature in features.values()}
        before = leaves_of(edges_behind(map(edge_of, losses.values()), stops))
        every = set[Tensor]().union(*self.behind.values())
        self._check_not_around(stops, every.intersection(params))
        self._heads = [i for i, param in enumerate(params) if param not in every]
        self._others_before = list(before.difference(params))
        self._others_behind = list(every.difference(params))
        self.others = [*self._others_before, *self._others_behind]

    def gradients(self, integrate_at: IntegrateAt, *, retain_graph: bool) -> Gradients:
        """Differentiate each loss down to the features, integrate there, and go on.

        Args:
            integrate_at: from each loss's gradient at the features to the integrated one.
            retain_graph: whether the graph is needed again.

        Returns:
            For each loss its gradient at the parameters that are not behind a feature, and, as
            what is added as it is, the integrated gradient at those that are.

        Raises:
            RuntimeError: a graph that was freed before.
        """
        outputs = list(self._features.values())
        heads = [self._params[position] for position in self._heads]
        with hooks_set_aside(outputs):
            found = gradients_of(
                self._losses,
                [*outputs, *heads],
                self._describe,
                others=self._others_before,
                retain_graph=retain_graph,
            )
        at_features = {name: gradient[: len(outputs)] for name, gradient in found.items()}
        rows: dict[str, Gradient] = {}
        for name, gradient in found.items():
            rows[name] = [None] * len(self._params)
            for position, piece in zip(self._heads, gradient[len(outputs) :], strict=True):
                rows[name][position] = piece
        del found, gradient
        integrated = integrate_at(self._features, at_features)
        return Gradients(rows, self._through_encoders(outputs, integrated, retain_graph))

    def _through_encoders(
        self, outputs: Sequence[Tensor], integrated: Sequence[Tensor], retain_graph: bool
    ) -> Gradient:
        with naming(f"features {list(self._features)}"):
            return by_autograd(
                outputs,
                self._params,
                others=self._others_behind,
                along=integrated,
                retain_graph=retain_graph,
            )

    def _check_not_around(self, stops: set[Edge], behind: set[Tensor]) -> None:
        for name, loss in self._losses.items():
            for param in leaves_of(edges_behind([edge_of(loss)], stops)) & behind:
                raise ValueError(
                    f"loss {name!r} reaches {self._describe(param)} around the features "
                    f"{list(self._features)}: give the very tensors that the heads are called "
                    "with, all of them, or leave features out for the exact gradients"
                )


def leaves_by_feature(features: Features) -> dict[str, set[Tensor]]:
    """For each feature the leaves that it is computed from."""
    names: dict[Edge, str] = {edge_of(feature): name for name, feature in features.items()}
    if len(names) < len(features):
        raise ValueError(f"two of the features {list(features)} are the same tensor: give it once")
    leaves = {}
    for name, feature in features.items():
        own = edge_of(feature)
        behind = list(edges_behind([own]))
        for edge in behind:
            if edge in names and edge != own:
                raise ValueError(
                    f"feature {name!r} is computed from feature {names[edge]!r}, whose gradient "
                    "would count twice: give features that do not depend on each other"
                )
        leaves[name] = leaves_of(behind)
    return leaves


@contextmanager
def hooks_set_aside(features: Sequence[Tensor]) -> Iterator[None]:
    """No hook of a feature runs meanwhile, and none that retains its gradient.

    In plain training they run once, on the whole gradient; so they do when the integrated one
    goes on. The dict of hooks is private to PyTorch, which is why :func:`_are_set_aside` tries.
    """
    if not _are_set_aside():
        warn(
            "this PyTorch does not let hooks on a tensor be set aside: those on features run on "
            "each loss's gradient and once more on the integrated one. Leave features out where "
            "you have such hooks"
        )
    hooks = [getattr(feature, "_backward_hooks", None) for feature in features]
    kept = [None if these is None else dict(these) for these in hooks]
    retained = [feature.grad if feature.retains_grad else None for feature in features]
    try:
        for these in hooks:
            if these is not None:
                these.clear()
        yield
    finally:
        for feature, these, before, grad in zip(features, hooks, kept, retained, strict=True):
            if these is not None and before is not None:
                these.update(before)
            if feature.retains_grad:
                feature.grad = grad


@cache
def _are_set_aside() -> bool:
    """Whether hooks that are taken out of a tensor's dict do not run."""
    feature = torch.ones(1, device="cpu", requires_grad=True) * 1
    feature.register_hook(torch.neg)
    hooks = getattr(feature, "_backward_hooks", None)
    if not isinstance(hooks, dict):
        return False
    hooks.clear()
    (gradient,) = torch.autograd.grad(feature, [feature])
    return bool(gradient > 0)
