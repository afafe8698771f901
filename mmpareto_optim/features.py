"""Feature-space integration: the losses' gradients meet at the outputs of the encoders.

Sener & Koltun (2018, Section 3.3) bound the norm in the min-norm problem by that of the
gradients at a shared representation (MGDA-UB): the encoders are then passed through once,
with the integrated gradient, and not once a loss.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmpareto_optim.blocks import Block
from mmpareto_optim.distributed import Constants, Processes
from mmpareto_optim.gradients import Gradient, gradients_of
from mmpareto_optim.graph import (
    Edge,
    check_not_blurred,
    edge_of,
    edges_behind,
    leaves_of,
)
from mmpareto_optim.integration import ONE_PROCESS, Method, Ranks, integrate
from mmpareto_optim.stats import BlockStats

ENCODERS = "(encoders)"
"""The name under which a window keeps what the encoders' single backward pass gave."""


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


def gradients_by_features(
    losses: Mapping[str, Tensor],
    features: Mapping[str, Tensor],
    params: Sequence[Tensor],
    method: Method,
    describe: Callable[[Tensor], str],
    processes: Processes | None,
    constants: Constants,
) -> tuple[dict[str, Gradient], dict[str, BlockStats]]:
    """Integrate the losses' gradients at the features and send the result through the encoders.

    Args:
        losses: scalars with a graph.
        features: the encoders' outputs, which the losses are computed from.
        params: leaf tensors that require a gradient.
        method: how the gradients at one feature are integrated.
        describe: a parameter's name for error messages.
        processes: those that integrate as one, each with features of its own examples.
        constants: what must not differ between them.

    Returns:
        For each loss its gradient with respect to the parameters that are not behind a
        feature, and under :data:`ENCODERS` the integrated gradient of those that are; what
        was seen of each feature, by name.

    Raises:
        ValueError: a feature that no loss reaches; one that is computed from another; a
            parameter that a loss reaches both through a feature and around it.
    """
    edges: dict[Edge, str] = {edge_of(feature): name for name, feature in features.items()}
    if len(edges) < len(features):
        raise ValueError(f"two of the features {list(features)} are the same tensor: give it once")
    behind = _leaves_behind(features, edges)
    check_not_blurred(losses, edges)
    _check_not_around(losses, edges, behind.intersection(params), describe)
    heads = [position for position, param in enumerate(params) if param not in behind]
    targets = [*features.values(), *(params[position] for position in heads)]

    found = gradients_of(losses, targets, describe)
    at_features = {name: gradient[: len(features)] for name, gradient in found.items()}
    ranks = ONE_PROCESS
    if processes is not None:
        at_features = processes.unite(at_features, list(features.values()), constants)
        ranks = Ranks(total=processes.grams_of_means, same=processes.same)
    integrated, stats = _integrated_at(features, at_features, method, ranks)
    rows: dict[str, Gradient] = {}
    for name, gradient in found.items():
        rows[name] = [None] * len(params)
        for position, piece in zip(heads, gradient[len(features) :], strict=True):
            rows[name][position] = piece
    if behind.intersection(params):
        rows[ENCODERS] = _through_encoders(features, params, integrated)
    return rows, stats


def _through_encoders(
    features: Mapping[str, Tensor], params: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Gradient:
    outputs = list(features.values())
    try:
        return list(torch.autograd.grad(outputs, params, gradients, allow_unused=True))
    except RuntimeError as error:
        if "second time" in str(error):
            raise RuntimeError(
                f"the graph behind the features {list(features)} has been freed by an earlier "
                "backward. Compute them anew with a forward pass before each backward() or "
                "step(losses=..., features=...)"
            ) from error
        raise


def _leaves_behind(features: Mapping[str, Tensor], edges: Mapping[Edge, str]) -> set[Tensor]:
    leaves: set[Tensor] = set()
    for name, feature in features.items():
        own = edge_of(feature)
        behind = list(edges_behind([own]))
        for edge in behind:
            if edge in edges and edge != own:
                raise ValueError(
                    f"feature {name!r} is computed from feature {edges[edge]!r}, whose gradient "
                    "would count twice: give features that do not depend on each other"
                )
        leaves |= leaves_of(behind)
    return leaves


def _check_not_around(
    losses: Mapping[str, Tensor],
    edges: Mapping[Edge, str],
    behind: set[Tensor],
    describe: Callable[[Tensor], str],
) -> None:
    for name, loss in losses.items():
        for param in leaves_of(edges_behind([edge_of(loss)], edges)) & behind:
            raise ValueError(
                f"loss {name!r} reaches {describe(param)} around the features "
                f"{list(edges.values())}: give the very tensors that the heads are called with, "
                "all of them, or leave features out for the exact gradients"
            )


def _integrated_at(
    features: Mapping[str, Tensor], gradients: dict[str, Gradient], method: Method, ranks: Ranks
) -> tuple[list[Tensor], dict[str, BlockStats]]:
    blocks = []
    for position, feature in enumerate(features):
        reaching = [name for name, gradient in gradients.items() if gradient[position] is not None]
        if not reaching:
            raise ValueError(
                f"no loss reaches feature {feature!r}: give the very tensor that the heads are "
                "called with, or leave it out"
            )
        blocks.append(Block(feature, tuple(reaching), (position,), integrated=len(reaching) > 1))
    outputs = [feature.detach() for feature in features.values()]
    combined, stats = integrate(blocks, outputs, gradients, method, keep=False, ranks=ranks)
    return [combined[position] for position in range(len(outputs))], stats
