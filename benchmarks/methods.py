"""Ways to make one training step of a late-fusion model, side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from models import Inputs, LateFusion
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mmpareto_optim import MMParetoOptimizer

Step = Callable[[], object]
GAMMA = 1.5


def sgd(model: LateFusion) -> torch.optim.SGD:
    # Slow enough that no method learns the one batch by heart while it is timed.
    return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)


def losses_of(model: LateFusion, inputs: Inputs) -> dict[str, Tensor]:
    spec, image, label = inputs
    return model.losses(model.features(spec, image), label)


def uniform(model: LateFusion, inputs: Inputs) -> Step:
    """Plain training: one backward of the sum."""
    optimizer = sgd(model)

    def step() -> None:
        losses = losses_of(model, inputs)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()

    return step


def two_backward_floor(model: LateFusion, inputs: Inputs) -> Step:
    return backward_floor(sgd(model), lambda: list(losses_of(model, inputs).values()))


def backward_floor(
    optimizer: torch.optim.Optimizer, losses_now: Callable[[], list[Tensor]]
) -> Step:
    """The autograd calls that exact integration cannot avoid; gradients are merely added."""
    params = [param for group in optimizer.param_groups for param in group["params"]]

    def step() -> None:
        losses = losses_now()
        optimizer.zero_grad()
        for loss in losses:
            last = loss is losses[-1]
            found = torch.autograd.grad(loss, params, retain_graph=not last, allow_unused=True)
            for param, gradient in zip(params, found, strict=True):
                if gradient is not None and param.grad is None:
                    param.grad = gradient
                elif gradient is not None:
                    param.grad.add_(gradient)
        optimizer.step()

    return step


def authors_procedure(model: LateFusion, inputs: Inputs) -> Step:
    """What the authors' training loop does, in our words."""
    optimizer = sgd(model)
    encoders = {name: list(getattr(model, name).parameters()) for name in ("audio", "visual")}

    def weights(joint: Tensor, unimodal: Tensor) -> tuple[float, float]:
        if cosine_similarity(joint, unimodal, dim=0) > 0:
            return 0.5, 0.5
        mm, um, uu = (float(a @ b) for a, b in ((joint, joint), (unimodal, joint), (unimodal,) * 2))
        share = (uu - um) / (mm + uu - 2 * um)
        return share, 1 - share

    def step() -> None:
        losses = losses_of(model, inputs)
        optimizer.zero_grad()
        collected: dict[tuple[str, str], list[Tensor]] = {}
        for name, loss in losses.items():
            loss.backward(retain_graph=True)
            for modality in encoders if name == "mm" else (name,):
                grads = [param.grad for param in encoders[modality]]
                collected[name, modality] = [g.clone() for g in grads if g is not None]
            optimizer.zero_grad()
        shares = {
            modality: weights(
                torch.cat([g.flatten() for g in collected["mm", modality]]),
                torch.cat([g.flatten() for g in collected[modality, modality]]),
            )
            for modality in encoders
        }
        torch.stack(list(losses.values())).sum().backward()
        for modality, params in encoders.items():
            joint, unimodal = shares[modality]
            pairs = zip(collected["mm", modality], collected[modality, modality], strict=True)
            for param, (g_joint, g_unimodal) in zip(params, pairs, strict=True):
                new = 2 * joint * g_joint + 2 * unimodal * g_unimodal
                ratio = param.grad.norm() / new.norm()
                param.grad = (ratio if ratio > 1 else 1) * new * GAMMA
        optimizer.step()

    return step


def torchjd(model: LateFusion, inputs: Inputs) -> Step:
    """TorchJD: the Jacobian of all losses, one at a time, aggregated by MGDA."""
    from torchjd.aggregation import MGDA
    from torchjd.autojac import backward, jac_to_grad

    optimizer = sgd(model)
    aggregator = MGDA()

    def step() -> None:
        losses = list(losses_of(model, inputs).values())
        optimizer.zero_grad()
        backward(losses, parallel_chunk_size=1)
        jac_to_grad(model.parameters(), aggregator)
        optimizer.step()

    return step


def exact(model: LateFusion, inputs: Inputs) -> Step:
    optimizer = MMParetoOptimizer(sgd(model))

    def step() -> None:
        losses = losses_of(model, inputs)
        optimizer.zero_grad()
        optimizer.step(losses=losses)

    return step


def feature_space(model: LateFusion, inputs: Inputs) -> Step:
    optimizer = MMParetoOptimizer(sgd(model))

    def step() -> None:
        spec, image, label = inputs
        features = model.features(spec, image)
        losses = model.losses(features, label)
        optimizer.zero_grad()
        optimizer.step(losses=losses, features=features)

    return step


METHODS: dict[str, Callable[[LateFusion, Inputs], Step]] = {
    "uniform": uniform,
    "two-backward floor": two_backward_floor,
    "authors' procedure": authors_procedure,
    "TorchJD (MGDA)": torchjd,
    "ours, exact": exact,
    "ours, feature-space": feature_space,
}
