"""The losses' gradients at the outputs of the encoders, and one gradient behind them.

Sener & Koltun (2018, Section 3.3) bound the norm in the min-norm problem by that of the
gradients at a shared representation (MGDA-UB): the encoders are then passed through once,
with the integrated gradient, and not once a loss.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, partial

import torch
from torch import Tensor

from mmpareto_optim.accumulation import add_what_functions_wrote, switched
from mmpareto_optim.autograd import (
    Backward,
    Differentiation,
    Rows,
    averaged_row,
    by_autograd,
    local_forms,
)
from mmpareto_optim.blocks import Block, Reach, Reached
from mmpareto_optim.graph import Edge, edge_of, edges_behind, leaves_of
from mmpareto_optim.integration import Integrated, Integration
from mmpareto_optim.messages import Seen, raise_explained, warn
from mmpareto_optim.rows import Row, flatten, forms_of
from mmpareto_optim.stats import BlockStats
from mmpareto_optim.types import Describe, Features, Gradient, Losses


def rows_through(
    differentiation: Differentiation,
    backward: Backward,
    features: Features,
    reach: Reach,
    integration: Integration,
    seen: Seen,
) -> tuple[Rows, Row, dict[str, BlockStats]]:
    """Each loss's gradient down to the features, and the integrated one behind them.

    Returns:
        The rows at the parameters that are behind no feature; the gradient of those that are,
        which is added as it is; and the stats of each feature. ``seen`` is told of the blocks.
    """
    backward = backward._replace(describe=partial(_describe, features, backward.describe))
    params, processes = backward.params, backward.processes
    paths = FeaturePaths(backward.losses, features, params, backward.describe)
    leaves = [*paths.others_before, *paths.others_behind]
    differentiation.watch.note_unheld(dict.fromkeys(leaves, next(iter(backward.losses))))
    outputs = list(features.values())
    forms, forms_at = local_forms(backward), forms_of(outputs)
    targets = [*outputs, *(params[position] for position in paths.heads)]
    rows, rows_at = {}, {}
    with hooks_set_aside(outputs):
        check = differentiation.check_of(backward, targets)
        passes = differentiation.gradients(backward, targets, paths.others_before, check)
        for name, found, _ in passes:
            at, gradient = found[: len(outputs)], paths.at_heads(found[len(outputs) :])
            del found
            row = flatten(forms_at, at)
            given = processes.given_by_all(name, row.layout.given, averages=False)
            rows_at[name] = row.extended(given)
            rows[name] = averaged_row(processes, name, forms, gradient)
            del at, gradient
    rows, rows_at = dict(reversed(rows.items())), dict(reversed(rows_at.items()))
    at_features = _integrated(features, rows_at, reach, integration, seen)
    integrated = [at_features.gradients[position] for position in range(len(outputs))]
    behind = paths.through_encoders(backward, integrated)
    add_what_functions_wrote(behind, params)
    memory = differentiation.memory(backward, forms)
    kept = memory.kept("the features", behind, is_last=True)
    plain = averaged_row(processes, "the features", forms, behind, kept)
    del behind
    processes.wait()
    seen.behind = {name: leaves.intersection(params) for name, leaves in paths.behind.items()}
    return rows, plain, at_features.stats


def _describe(features: Features, describe: Describe, target: Tensor) -> str:
    names = [name for name, feature in features.items() if feature is target]
    return f"feature {names[0]!r}" if names else describe(target)


@torch.no_grad()
def _integrated(
    features: Features, rows: Rows, reach: Reach, integration: Integration, seen: Seen
) -> Integrated:
    """One gradient for each feature, each a block of its own."""
    for position, name in enumerate(features):
        if not any(row.layout.given[position] for row in rows.values()):
            raise ValueError(
                f"no loss reaches feature {name!r}: give the very tensor that the heads are "
                "called with, or leave it out"
            )
    reached = reach.of(rows, list(features), integration.largest)
    seen.feature_blocks = _one_block_each(tuple(features), reached)
    return integration.integrate(seen.feature_blocks, list(rows), list(rows.values()))


@lru_cache(maxsize=64)
def _one_block_each(names: tuple[str, ...], reached: Reached) -> tuple[Block, ...]:
    return tuple(Block(name, reached[i], (i,)) for i, name in enumerate(names))


class FeaturePaths:
    """Which parameters are behind which feature, and the way through the encoders.

    Attributes:
        behind: for each feature the leaves that it is computed from.
        heads: positions of the parameters that are behind none.
        others_before: leaves that are not among the parameters, between losses and features.
        others_behind: those behind the features.

    Raises:
        ValueError: a feature twice, or one that is computed from another; a parameter that a
            loss reaches both through a feature and around it.
    """

    def __init__(
        self, losses: Losses, features: Features, params: Sequence[Tensor], describe: Describe
    ) -> None:
        self.features = features
        self._size = len(params)
        self.behind = _leaves_by_feature(features)
        stops = {edge_of(feature) for feature in features.values()}
        every = set[Tensor]().union(*self.behind.values())
        before: set[Tensor] = set()
        for name, loss in losses.items():
            leaves = leaves_of(edges_behind([edge_of(loss)], stops, to_the_end=True))
            for param in leaves & every.intersection(params):
                raise ValueError(
                    f"loss {name!r} reaches {describe(param)} around the features "
                    f"{list(features)}: give the very tensors that the heads are called with, all "
                    "of them, or leave features out for the exact gradients"
                )
            before |= leaves
        self.heads = [i for i, param in enumerate(params) if param not in every]
        self.others_before = list(before.difference(params))
        self.others_behind = list(every.difference(params))

    def at_heads(self, found: Gradient) -> Gradient:
        """What was found for the heads, by position of the parameter."""
        gradient: Gradient = [None] * self._size
        for position, piece in zip(self.heads, found, strict=True):
            gradient[position] = piece
        return gradient

    def through_encoders(self, backward: Backward, integrated: Sequence[Tensor]) -> Gradient:
        """The gradient at the parameters, from the integrated one at each feature."""
        try:
            with switched(backward.autocast, on=True):
                return by_autograd(
                    list(self.features.values()),
                    backward.params,
                    self.others_behind,
                    along=integrated,
                    retain_graph=backward.retain_graph,
                )
        except Exception as error:
            raise_explained(error, f"features {list(self.features)}")


def _leaves_by_feature(features: Features) -> dict[str, set[Tensor]]:
    """For each feature the leaves that it is computed from."""
    names: dict[Edge, str] = {edge_of(feature): name for name, feature in features.items()}
    if len(names) < len(features):
        raise ValueError(f"two of the features {list(features)} are the same tensor: give it once")
    leaves = {}
    for name, feature in features.items():
        own = edge_of(feature)
        behind = list(edges_behind([own], to_the_end=True))
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
@torch.enable_grad()
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
