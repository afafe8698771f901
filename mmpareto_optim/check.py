"""What is checked in the first step: graphs that cannot bear several passes, losses given twice."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmpareto_optim.messages import warn
from mmpareto_optim.rows import Form
from mmpareto_optim.stats import BlockStats
from mmpareto_optim.types import Describe, Gradient, Losses

TOLERANCES = {False: (0.02, 1e-3), True: (0.1, 0.03)}
"""By whether something was computed in half precision: how far two ways to one gradient may be
apart, over the norms of the losses' gradients for this parameter, and over those for all."""

OF_BIASES = 0.05
"""In place of the latter for parameters of one dimension. Before a normalisation, nothing but
rounding is left of a bias's gradient."""

SMALLEST_SCALE = 1024.0
"""Of a GradScaler, whose scales are powers of two and begin at 65,536."""


class SumCheck:
    """Adds up the losses' gradients, and compares them with the gradient of the summed losses.

    Autograd's backward is linear, so these are equal up to rounding, unless some part of the graph
    cannot be passed through once a loss. Parameters that one loss reaches are passed once anyway.
    """

    def __init__(self, forms: Sequence[Form]) -> None:
        self._forms = forms
        self._sums: Gradient = [None] * len(forms)
        self._norms: list[list[Tensor]] = [[] for _ in forms]

    def add(self, gradient: Gradient) -> None:
        """The gradient of one loss."""
        for i, (form, piece) in enumerate(zip(self._forms, gradient, strict=True)):
            if piece is not None and not piece.is_meta:
                flat, known = form.flat(piece.detach()), self._sums[i]
                self._norms[i].append(torch.linalg.vector_norm(flat, dtype=form.row_dtype))
                self._sums[i] = (
                    flat.to(form.row_dtype, copy=True) if known is None else known.add_(flat)
                )

    def compare(
        self, differentiate: Callable[[], Gradient], targets: Sequence[Tensor], describe: Describe
    ) -> bool:
        """Warn if they do not add up to the gradient of the sum; whether all could be compared.

        That takes gradients that are finite, and not zero as behind a head that begins at zero.
        """
        try:
            whole = differentiate()
        except Exception:
            # What refuses a second visit has been visited once: nothing is wrong with that.
            return True
        shared = [i for i, norms in enumerate(self._norms) if len(norms) > 1]
        sizes = [math.fsum(float(norm) for norm in self._norms[i]) for i in shared]
        apart = [self._distance(i, whole[i]) for i in shared]
        of_one, of_all = TOLERANCES[_are_in_half_precision(whole)]
        total, deviations = math.hypot(*sizes), {}
        for i, distance, size in zip(shared, apart, sizes, strict=True):
            least = of_all if targets[i].ndim > 1 else max(of_all, OF_BIASES)
            if of_one * size < distance > least * total and math.isfinite(distance):
                deviations[i] = distance / size
        warn_of_deviations(deviations, targets, describe)
        return all(map(math.isfinite, apart)) and all(sizes)

    def _distance(self, position: int, whole: Tensor | None) -> float:
        """Between the sum for a parameter and the gradient of one pass."""
        found, form = self._sums[position], self._forms[position]
        assert found is not None
        difference = found if whole is None else found - form.flat(whole).to(found)
        return float(torch.linalg.vector_norm(difference))


def _are_in_half_precision(gradient: Gradient) -> bool:
    """Whether a tenth of the numbers are: under autocast, a weight's float32 gradient is."""
    sizes = {True: 0, False: 0}
    for piece in gradient:
        if piece is not None and bool(piece.any()):
            sizes[_is_in_half_precision(piece)] += piece.numel()
    return sizes[True] * 9 > sizes[False]


def _is_in_half_precision(piece: Tensor) -> bool:
    halves = (torch.bfloat16, torch.float16)
    return piece.dtype in halves or (
        not piece.is_complex()
        and any(bool((piece.to(half).to(piece.dtype) == piece).all()) for half in halves)
    )


def warn_of_deviations(
    deviations: Mapping[int, float], targets: Sequence[Tensor], describe: Describe
) -> None:
    """One warning of gradients that do not add up, by position of their targets."""
    if not deviations:
        return
    worst = max(deviations, key=lambda position: deviations[position])
    others = f" and for {len(deviations) - 1} more" if len(deviations) > 1 else ""
    warn(
        "the losses' gradients, a backward pass each, do not add up to the gradient of their sum: "
        f"for {describe(targets[worst])} they are {deviations[worst]:.0%} apart{others}. Some "
        "backward in this model does not give the same when it runs once a loss, so the "
        "gradients of single losses are wrong: a fused or in-place kernel that writes into what "
        "forward saved, a hook that removes itself or clips, an activation checkpoint that draws "
        "other random numbers or drops what it kept (context_fn). Use the plain version of it, or "
        "features= to pass through the encoders once. Where all of this happens between one loss "
        "and the first parameter that others reach, or is meant to be, check=False is right"
    )


def warn_of_total(values: Mapping[str, float], stats: Mapping[str, BlockStats]) -> None:
    """A warning of a loss that is the sum of the others, which then count twice."""
    for name, value in values.items():
        others = math.fsum(v for other, v in values.items() if other != name)
        size = math.fsum(map(abs, values.values()))
        is_sum = len(values) > 2 and abs(value - others) <= 1e-5 * size and size > 0
        of_loss = [each for each in stats.values() if name in each.objectives]
        if is_sum and of_loss and all(_is_sum(each, name) for each in of_loss):
            warn(
                f"loss {name!r} is the sum of the others, in its value and in its gradients, so "
                "that each of them counts twice: leave it out of losses"
            )


def _is_sum(stats: BlockStats, name: str) -> bool:
    gram = stats.gram.detach().double().cpu()
    signs = torch.ones(len(gram), dtype=gram.dtype, device="cpu")
    signs[stats.objectives.index(name)] = -1.0
    return bool(signs @ gram @ signs <= 1e-4 * gram.trace())


def warn_of_one_scaled(losses: Losses) -> None:
    """A warning of losses that went through a GradScaler, while others did not."""
    factors = {name: _factor(loss) for name, loss in losses.items()}
    scale = max(factors.values())
    scaled = [name for name, factor in factors.items() if factor == scale]
    others = [name for name, factor in factors.items() if factor != scale]
    if others and scale >= SMALLEST_SCALE and math.frexp(scale)[0] == 0.5:
        warn(
            f"losses {scaled} are multiplied by {scale:.0f}, as a GradScaler does, and {others} "
            "are not: let it scale all, as in {name: scaler.scale(loss) for name, loss in "
            "losses.items()}. A weight that is meant is better another number"
        )


def _factor(loss: Tensor) -> float:
    """What the last operation multiplied by, if that is what it did; 1 otherwise."""
    node: Any = loss.grad_fn
    if loss.is_meta or node is None or "MulBackward" not in node.name():
        return 1.0
    found = [g for g in node(torch.ones_like(loss)) if g is not None]
    return float(found[0]) if len(found) == 1 and found[0].numel() == 1 else 1.0


def check_first_losses(losses: Losses, stats: Mapping[str, BlockStats]) -> None:
    """Warnings of losses that are not what was meant; waits for the device."""
    if any(loss.is_meta for loss in losses.values()) or len(losses) < 2:
        return
    warn_of_total({name: float(loss.detach()) for name, loss in losses.items()}, stats)
