"""Integration at features: one gradient for each, each a block of its own."""

from typing import Any

import torch
from torch import Tensor

from mmpareto_optim.blocks import Block, Reach
from mmpareto_optim.gradients.features import Features
from mmpareto_optim.ground import Gradient, Gradients
from mmpareto_optim.integration import Integrated
from mmpareto_optim.method import Method
from mmpareto_optim.parallel.alone import Alone
from mmpareto_optim.report import AtFeatures


@torch.no_grad()
def integrated_at(
    reach: Reach,
    method: Method,
    processes: Alone,
    constants: Any,
    seen: AtFeatures,
    features: Features,
    rows: dict[str, Gradient],
) -> list[Tensor]:
    """One gradient for each feature.

    Args:
        reach: what losses have moved; features count by name.
        method: how blocks are integrated.
        processes: how several processes do it as one.
        constants: what these have in common.
        seen: is told what was integrated.
        features: by name, the tensors that the heads are called with.
        rows: for each loss its gradient at each feature, or None.

    Raises:
        ValueError: no loss reaches a feature; names it.
    """
    outputs = [feature.detach() for feature in features.values()]
    rows = processes.united(rows, outputs, constants)
    for position, name in enumerate(features):
        if all(row[position] is None for row in rows.values()):
            raise ValueError(
                f"no loss reaches feature {name!r}: give the very tensor that the heads are "
                "called with, or leave it out"
            )
    reached = reach.of(rows, list(features), processes.largest_at_features)
    blocks = [
        Block(name, reached[position], (position,), by_hand=True)
        for position, name in enumerate(features)
    ]
    found = Gradients(rows, [None] * len(outputs))
    integrated = Integrated(
        blocks, outputs, found, method, processes, processes.grams_at_features, keep=False
    )
    gradients = integrated.gradients()
    seen.stats = integrated.stats()
    seen.objectives = {block.name: block.objectives for block in blocks}
    return [gradients[position] for position in range(len(outputs))]
