"""How long the losses' gradients are, and how much they vary from batch to batch."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from mmpareto_optim.accumulation import add_what_functions_wrote, grads_set_aside
from mmpareto_optim.autograd import by_autograd, check_dense
from mmpareto_optim.monitoring.preserve import preserved_state, trainable_parameters
from mmpareto_optim.options import check_losses
from mmpareto_optim.rules.evaluation import solver_dtype
from mmpareto_optim.types import Describe, Gradient, Losses

Batch = TypeVar("Batch")

# Numbers of all gradients together that are brought to float64 at a time.
CHUNK_SIZE = 2**21


@dataclass(frozen=True)
class GradientNoise:
    """A loss's gradient ``g`` over ``n`` batches: its mean and its batch-sampling covariance C.

    Attributes:
        squared_norm: estimate of ``||E g||^2``. Unbiased, so that it may fall below zero where
            the noise hides the mean.
        trace: estimate of ``tr C = E ||g - E g||^2``, unbiased.
        largest_eigenvalue: that of the sample covariance. It overestimates C's own, the more so
            the fewer the batches: compare losses at the same ``n``.
        products: by loss, an unbiased estimate of the inner product of this loss's expected
            gradient and that one's; this loss's own entry is ``squared_norm``.
        cosines: by loss, that product over both norms, which may lie outside of [-1, 1]; NaN where
            a ``squared_norm`` is not positive.
    """

    squared_norm: float
    trace: float
    largest_eigenvalue: float
    products: Mapping[str, float]
    cosines: Mapping[str, float]

    @property
    def norm(self) -> float:
        """Length of the mean gradient, the root of ``squared_norm``; 0 where that is negative."""
        return math.sqrt(max(self.squared_norm, 0.0))


def gradient_noise(
    model: nn.Module,
    loss_fn: Callable[[Batch], Mapping[str, Tensor]],
    batches: Iterable[Batch],
    params: nn.Module | Iterable[Tensor] | None = None,
) -> dict[str, GradientNoise]:
    """Length, noise and products of the losses' gradients, for each loss that reaches ``params``.

    Length and noise are the quantities of Assumption 1 of Wei & Hu (ICML 2024): of an encoder's
    two gradients the unimodal one is the longer and has the larger covariance::

        noise = gradient_noise(model, losses_of, islice(loader, 32), model.audio)
        print(noise["mm"].norm, noise["audio"].norm)
        print(noise["mm"].trace, noise["audio"].trace)
        print(noise["mm"].cosines["audio"])

    Two losses' gradients of one batch share its examples, and that part of their noise adds to
    their product. ``products`` are means over all pairs of different batches, which share none:
    ``(S_i . S_j - sum_k g_ik . g_jk) / (n (n - 1))`` with ``g_ik`` the gradient of loss i in batch
    k and ``S_i`` its sum over the batches (a U-statistic: Hoeffding 1948).

    The estimates hold for batches of one size, drawn independently. For those of one shuffled
    epoch of M batches ``trace`` holds too, and ``squared_norm`` is too small by ``trace / M`` on
    average. Memory: ``n`` gradients of ``params`` for each loss.

    Args:
        model: in the mode that is wanted; it and the random generators are afterwards as before.
        loss_fn: from a batch to scalars by name, as for :meth:`MMParetoOptimizer.backward`.
        batches: at least two.
        params: a module or parameters of the model, without frozen ones; all by default.
    """
    chosen = trainable_parameters(model, params)
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    rows: dict[str, list[Tensor]] = {}
    with preserved_state(model), torch.enable_grad():
        for number, batch in enumerate(batches):
            losses = check_losses(loss_fn(batch))
            rows = rows or {name: [] for name in losses}
            if losses.keys() != rows.keys():
                raise ValueError(f"batch {number} has losses {list(losses)}, others {list(rows)}")
            with grads_set_aside(chosen):
                gradients = _gradients_of(losses, chosen, lambda p: f"parameter {names[p]!r}")
            for name, gradient in gradients.items():
                rows[name].append(_flat(gradient, chosen))
                if not rows[name][-1].isfinite().all():
                    raise ValueError(f"loss {name!r}: a gradient not finite in batch {number}")
    count = max(map(len, rows.values()), default=0)
    if count < 2:
        raise ValueError(f"batches has {count} batches: a covariance takes at least two")
    reaching = {name: of_loss for name, of_loss in rows.items() if any(map(Tensor.any, of_loss))}
    if not reaching:
        raise ValueError("no loss reaches params: give parameters that the losses depend on")
    return _estimate(reaching)


def _flat(gradient: Gradient, params: list[Tensor]) -> Tensor:
    """A copy of a gradient's real numbers, zeros where there is none."""
    parts = [
        torch.zeros_like(param) if part is None else part.resolve_conj()
        for part, param in zip(gradient, params, strict=True)
    ]
    real = [torch.view_as_real(part) if part.is_complex() else part for part in parts]
    return torch.cat([part.flatten().to(params[0].device) for part in real])


def _gradients_of(
    losses: Losses, params: Sequence[Tensor], describe: Describe
) -> dict[str, Gradient]:
    """For each loss its gradient at the parameters, on this process; frees the graph.

    These tensors may share memory with others that autograd handed out: they are to be read.
    """
    found = {}
    for name in reversed(list(losses)):
        retain = name != next(iter(losses))
        found[name] = by_autograd([losses[name]], params, retain_graph=retain)
        add_what_functions_wrote(found[name], params)
        check_dense([name], found[name], params, describe)
    return {name: found[name] for name in losses}


@torch.no_grad()
def _estimate(rows: dict[str, list[Tensor]]) -> dict[str, GradientNoise]:
    names, every = list(rows), [row for of_loss in rows.values() for row in of_loss]
    m, n = len(rows), len(every) // len(rows)
    # No (d, d) covariance: its trace and eigenvalues are those of the centred gradients' (n, n)
    # Gram matrix.
    of_means = torch.zeros(m, m, dtype=torch.float64, device="cpu")
    centred_grams = torch.zeros(m, n, n, dtype=torch.float64, device="cpu")
    covariances = torch.zeros(m, m, dtype=torch.float64, device="cpu")
    chunks = [row.split(max(1, CHUNK_SIZE // len(every))) for row in every]
    for pieces in zip(*chunks, strict=True):
        each = torch.stack(pieces).to(solver_dtype(pieces[0])).view(m, n, -1)
        means = each.mean(1)
        centred = each - means.unsqueeze(1)
        of_means += (means @ means.T).cpu()
        centred_grams += (centred @ centred.mT).cpu()
        covariances += (centred.flatten(1) @ centred.flatten(1).T).cpu() / (n - 1)
    # The sum over pairs of batches, written so that large means do not cancel.
    products = of_means - covariances / n
    norms = products.diagonal().where(products.diagonal() > 0, math.nan).sqrt()
    cosines = products / norms / norms.unsqueeze(1)
    eigenvalues = torch.linalg.eigvalsh(centred_grams / (n - 1))[:, -1]
    return {
        name: GradientNoise(
            float(products[i, i]),
            float(covariances[i, i]),
            float(eigenvalues[i]),
            dict(zip(names, products[i].tolist(), strict=True)),
            dict(zip(names, cosines[i].tolist(), strict=True)),
        )
        for i, name in enumerate(names)
    }
