"""How long the losses' gradients are, and how much they vary from batch to batch."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from mmpareto_optim.autograd import gradients_of, grads_set_aside
from mmpareto_optim.options import check_losses
from mmpareto_optim.types import Gradient
from mmpareto_optim.insight.undisturbed import chosen_parameters, undisturbed
from mmpareto_optim.rules import solver_dtype

Batch = TypeVar("Batch")

# Numbers of one gradient that are brought to float64 at a time.
CHUNK = 2**16


@dataclass(frozen=True)
class GradientNoise:
    """A loss's gradient over ``n`` batches: its mean and its batch-sampling covariance C.

    Attributes:
        batches: the number ``n`` of batches.
        squared_norm: estimate of ``||E g||^2``. Unbiased, so that it may fall below zero where
            the noise hides the mean.
        trace: estimate of ``tr C = E ||g - E g||^2``, unbiased.
        largest_eigenvalue: that of the sample covariance, whose rank is at most ``n - 1``. It
            overestimates C's own, the more so the fewer the batches: with noise that is equal in
            all of many directions it is near ``trace / (n - 1)`` whatever C's is. Compare
            losses at the same ``n``.
    """

    batches: int
    squared_norm: float
    trace: float
    largest_eigenvalue: float

    @property
    def norm(self) -> float:
        """Length of the mean gradient: the root of ``squared_norm``, 0 where that is negative."""
        return math.sqrt(max(self.squared_norm, 0.0))


def gradient_noise(
    model: nn.Module,
    loss_fn: Callable[[Batch], Mapping[str, Tensor]],
    batches: Iterable[Batch],
    params: nn.Module | Iterable[Tensor] | None = None,
) -> dict[str, GradientNoise]:
    """Magnitude and batch-sampling covariance of each loss's gradient, at the present parameters.

    The quantities of Assumption 1 of Wei & Hu (ICML 2024): of an encoder's two gradients the
    unimodal one is the longer and has the larger covariance::

        noise = gradient_noise(model, losses_of, islice(loader, 32), model.audio)
        print(noise["mm"].norm, noise["audio"].norm)
        print(noise["mm"].trace, noise["audio"].trace)

    The estimates hold for batches drawn independently. For those of one shuffled epoch of M
    batches ``trace`` holds too, and ``squared_norm`` is too small by ``trace / M`` on average.
    The covariance is that of a batch of the given size: it goes as one over the size, and a
    shorter last batch spoils it (``drop_last=True``). Dropout adds its own noise in training
    mode; so it does in training.

    The covariance is never formed: its trace and eigenvalues are those of the ``(n, n)`` Gram
    matrix of the centred gradients. Memory: ``n`` gradients of ``params`` for each loss.

    Args:
        model: in the mode that is wanted. Its parameters, ``.grad`` and buffers (BatchNorm's
            statistics) and the random generators' states are afterwards as before.
        loss_fn: from a batch to scalars by name, as for :meth:`MMParetoOptimizer.backward`.
        batches: at least two.
        params: a module or parameters of the model, an encoder's, say; all by default. Frozen
            ones are left out.

    Returns:
        By name, for each loss that reaches ``params``.

    Raises:
        TypeError: what is no module, parameter, mapping or loss.
        ValueError: fewer than two batches; batches with different losses; no loss reaches
            ``params``; a gradient that is not finite (names the loss and the batch).
    """
    chosen = chosen_parameters(model, params)
    samples: list[dict[str, Gradient]] = []
    with undisturbed(model), torch.enable_grad():
        for number, batch in enumerate(batches):
            losses = loss_fn(batch)
            check_losses(losses)
            if samples and losses.keys() != samples[0].keys():
                raise ValueError(
                    f"batch {number} has losses {list(losses)}, the ones before it "
                    f"{list(samples[0])}: return the same losses for every batch"
                )
            with grads_set_aside(chosen):
                samples.append(gradients_of(losses, chosen, lambda p: _describe(model, p)))
    if len(samples) < 2:
        raise ValueError(f"batches has {len(samples)} batches: a covariance takes at least two")
    noise = {}
    for name in list(samples[0]):
        gradients = [sample.pop(name) for sample in samples]
        if any(part is not None for gradient in gradients for part in gradient):
            noise[name] = _noise(name, gradients)
    if not noise:
        raise ValueError("no loss reaches params: give parameters that the losses depend on")
    return noise


def _describe(model: nn.Module, wanted: Tensor) -> str:
    return next(
        f"parameter {name!r}" for name, param in model.named_parameters() if param is wanted
    )


@torch.no_grad()
def _noise(loss: str, gradients: list[Gradient]) -> GradientNoise:
    n = len(gradients)
    gram = torch.zeros(n, n, dtype=torch.float64)
    squared_mean = 0.0
    finite = torch.ones(n, dtype=torch.bool)
    for parts in zip(*gradients, strict=True):
        for rows in _chunks(parts):
            mean = rows.mean(0)
            centred = rows - mean
            gram += (centred @ centred.T).cpu()
            squared_mean += float(mean.square().sum())
            finite &= rows.isfinite().all(1).cpu()
    if not finite.all():
        batch = int((~finite).nonzero()[0])
        raise ValueError(f"loss {loss!r} has a gradient that is not finite in batch {batch}")
    covariance = gram / (n - 1)
    trace = float(covariance.trace())
    # The mean of n gradients is itself noisy: its square is too long by tr C / n.
    squared_norm = squared_mean - trace / n
    return GradientNoise(n, squared_norm, trace, float(torch.linalg.eigvalsh(covariance)[-1]))


def _chunks(parts: Sequence[Tensor | None]) -> Iterator[Tensor]:
    """The batches' gradients of one parameter as rows ``(n, numbers)``, a piece at a time."""
    like = next((part for part in parts if part is not None), None)
    if like is None:
        return
    rows = [torch.zeros_like(like) if part is None else part.resolve_conj() for part in parts]
    if like.is_complex():
        rows = [torch.view_as_real(row) for row in rows]
    for pieces in zip(*(row.reshape(-1).split(CHUNK) for row in rows), strict=True):
        yield torch.stack(pieces).to(solver_dtype(like))
