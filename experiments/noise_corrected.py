"""An experiment: MMPareto decided by a Gram matrix without the batch's noise.

Two gradients of one batch have its noise in common, so that their product is biased; products of
different parts of the batch are not. Here the conflict and the min-norm weights of coloured and
gray digits are taken from those, and the length from the gradients themselves.

    python experiments/noise_corrected.py --seeds 5
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from colored_gray_digits import HEADS, make_data, make_model
from common import BATCH_SIZE, Split, accuracy, batches

from mmpareto_optim import min_norm_weights, mmpareto_coefficients

PARTS, GAMMA = 4, 1.5
Rule = Callable[[Tensor, Tensor], Tensor]
"""From the Gram matrix, and that across parts, to coefficients."""


def corrected(gram: Tensor, across: Tensor) -> Tensor:
    """MMPareto of ``across``, stretched to the length of the sum as ``gram`` has it."""
    if across[0, 1] >= 0:
        return torch.full_like(gram[0], GAMMA)
    values, vectors = torch.linalg.eigh(across)  # an estimate need not be a Gram matrix
    alpha = min_norm_weights(vectors @ (values.clamp(min=0)[:, None] * vectors.T))
    stretch = (gram.sum() / (alpha @ gram @ alpha * len(alpha) ** 2)).sqrt().clamp(min=1)
    return GAMMA * stretch * len(alpha) * alpha


RULES: dict[str, Rule] = {
    "uniform": lambda gram, _: torch.ones_like(gram[0]),
    "uniform x 1.5": lambda gram, _: torch.full_like(gram[0], GAMMA),
    "MMPareto": lambda gram, _: mmpareto_coefficients(gram, GAMMA),
    "MMPareto across parts": corrected,
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, rule: Rule, batch: Split) -> Tensor:
    """One step; for each encoder whether there is a conflict, and whether across parts."""
    parts = [batch[index] for index in torch.arange(len(batch)).chunk(PARTS)]
    params = dict(model.named_parameters())
    of_parts = [
        _gradients(model, list(params.values()), part, len(part) / len(batch)) for part in parts
    ]
    flags = []
    result = torch.stack([gradient for part in of_parts for gradient in part.values()]).sum(0)
    for modality in list(HEADS)[1:]:
        places = _places(params, f"encoders.{modality}.")
        rows = torch.stack([torch.stack([p["mm"], p[modality]])[:, places] for p in of_parts])
        gram = rows.sum(0) @ rows.sum(0).T
        across = PARTS / (PARTS - 1) * (gram - (rows @ rows.mT).sum(0))
        result[places] = rule(gram, across) @ rows.sum(0)
        flags.append(torch.stack([gram[0, 1] < 0, across[0, 1] < 0]))
    sizes = [param.numel() for param in params.values()]
    for param, piece in zip(params.values(), result.split(sizes), strict=True):
        param.grad = piece.view_as(param).to(param.dtype)
    optimizer.step()
    return torch.stack(flags)


def _gradients(
    model: nn.Module, params: Sequence[Tensor], part: Split, weight: float
) -> dict[str, Tensor]:
    logits = model(*part.inputs)
    found = {}
    for head, output in logits.items():
        loss = weight * cross_entropy(output, part.labels[head])
        gradient = torch.autograd.grad(
            loss,
            params,
            retain_graph=True,
            materialize_grads=True,
            allow_unused=True,
        )
        found[head] = torch.cat([piece.flatten().double() for piece in gradient])
    return found


def _places(params: Mapping[str, Tensor], prefix: str) -> slice:
    """Where an encoder's numbers are among those of all parameters, which it has in one piece."""
    ends = torch.tensor([param.numel() for param in params.values()]).cumsum(0).tolist()
    members = [index for index, name in enumerate(params) if name.startswith(prefix)]
    return slice(ends[members[0] - 1] if members[0] else 0, ends[members[-1]])


def train(rule: Rule, seed: int, options: argparse.Namespace) -> tuple[dict[str, float], Tensor]:
    train_split, test_split = make_data(options, seed)
    torch.manual_seed(seed)
    model = make_model(False)
    sgd = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)
    steps = options.epochs * ceil(len(train_split) / BATCH_SIZE)
    schedule = OneCycleLR(sgd, options.lr, steps, cycle_momentum=False)
    flags = []
    for _ in range(options.epochs):
        for batch in batches(train_split, torch.randperm(len(train_split))):
            flags.append(step(model, sgd, rule, batch))
            schedule.step()
    test = batches(test_split, torch.arange(len(test_split)), 1000)
    return accuracy(model, test), torch.stack(flags).double().mean((0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=0.1)
    options = parser.parse_args()
    options.data, options.validate = "digits", False
    for name, rule in RULES.items():
        runs = [train(rule, seed, options) for seed in range(options.seeds)]
        scores = [
            f"{head} {mean(values):.2f} ± {stdev(values) if len(values) > 1 else 0:.2f}"
            for head in HEADS
            if (values := [found[head] for found, _ in runs])
        ]
        conflict, across = torch.stack([flags for _, flags in runs]).mean(0).tolist()
        print(
            f"{name:22} {', '.join(scores)}; conflict {conflict:.1%}, across parts {across:.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
