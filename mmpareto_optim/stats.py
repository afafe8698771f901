"""What an integration saw, on the device until somebody looks."""

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from mmpareto_optim.rules.evaluation import applied_gamma
from mmpareto_optim.rules.mmpareto import min_norm_weights


class StatsByBlock(dict[str, "BlockStats"]):
    """By the name of a block what the last integration saw of it."""

    def __missing__(self, name: str) -> NoReturn:
        there = ", ".join(map(repr, self)) or "none, as no losses have met"
        raise KeyError(f"no block {name!r}; the blocks of the last integration: {there}")


@dataclass(frozen=True, eq=False)
class BlockStats:
    """The last integration of one block that ``m`` losses reach; printed as a few lines.

    Everything is a tensor on the block's device, computed when it is read: a training loop that
    does not convert them (``float()``, printing) neither pays for them nor waits for the device.
    Gram matrices and coefficients may have leading dimensions; all properties then have them too.

    Attributes:
        objectives: names of the losses that reach the block, in the order of the rows.
        gram: inner products of their gradients, shape ``(m, m)``.
        coefficients: the ``c`` of ``h = sum_i c_i g_i``, shape ``(m,)``.
        gamma: the factor that ``coefficients`` contain on top of the rule's own.
        stretch: with ``rescale="tensor"`` what each parameter tensor was multiplied by after
            that, shape ``(tensors,)``; None otherwise.
    """

    objectives: tuple[str, ...]
    gram: Tensor
    coefficients: Tensor
    gamma: float = 1.0
    stretch: Tensor | None = None

    @property
    def scale(self) -> Tensor:
        """How much longer than ``m`` times the min-norm point the result was made, a scalar.

        The mean coefficient over gamma: 1 for the plain sum, 0 where the block was found
        Pareto-stationary. With ``rescale="tensor"`` it is ``stretch``, shape ``(tensors,)``.
        """
        if self.stretch is not None:
            return self.stretch
        # A zero gradient has the mean of the others' coefficients.
        return self.coefficients.mean(-1) / applied_gamma(self.gram, self.gamma)

    @property
    def norms(self) -> Tensor:
        """Length of each loss's gradient, shape ``(m,)``."""
        return self.gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()

    @property
    def cosines(self) -> Tensor:
        """Cosine between any two losses' gradients, ``(m, m)``; NaN beside a zero one."""
        norms = self.norms
        return (self.gram / norms.unsqueeze(-2) / norms.unsqueeze(-1)).clamp(-1, 1)

    @property
    def cosine(self) -> Tensor:
        """Smallest cosine between two losses' gradients, a scalar; NaN beside a zero one."""
        return self.cosines.flatten(-2).amin(-1)

    @property
    def alignment(self) -> Tensor:
        """How far all gradients point the same way, a scalar in [-1, 1]; for two their cosine.

        ``2 ||mean_i g_i / ||g_i|| ||^2 - 1`` (Wang et al. 2025, arXiv 2502.00604): 1 where all
        have one direction, -1 where their directions add up to zero. Zero gradients are left out,
        as absent losses; NaN beside fewer than two others.
        """
        absent = self.norms == 0
        pairs = absent.unsqueeze(-2) | absent.unsqueeze(-1)
        count = (~absent).sum(-1)
        mean = self.cosines.masked_fill(pairs, 0).flatten(-2).sum(-1) / count**2
        return (2 * mean - 1).clamp(-1, 1).masked_fill(count < 2, torch.nan)

    @property
    def conflict(self) -> Tensor:
        """Whether two losses' gradients have a negative product, a boolean scalar."""
        return (self.gram < 0).flatten(-2).any(-1)

    @property
    def harmful(self) -> Tensor:
        """Whether the plain sum has a negative product with some gradient, a boolean scalar.

        A small step of plain SGD along the sum then raises that loss; where it is false such a
        step raises none. Momentum, Adam and Muon take other steps, of which this says nothing.
        """
        return self.harmed.any(-1)

    @property
    def harmed(self) -> Tensor:
        """Whose gradient the plain sum has a negative product with, boolean, shape ``(m,)``."""
        return self.gram.sum(-1) < 0

    @property
    def alpha(self) -> Tensor:
        """Simplex weights of the min-norm point, shape ``(m,)``."""
        return min_norm_weights(self.gram)

    @property
    def min_norm(self) -> Tensor:
        """Length of the min-norm point, a scalar; 0 at a Pareto-stationary point."""
        alpha = self.alpha
        square = torch.einsum("...i,...ij,...j->...", alpha, self.gram, alpha)
        return square.clamp(min=0).sqrt()

    def __str__(self) -> str:
        """A line for each loss and one for the block."""
        if self.gram.ndim > 2 or self.gram.is_meta:
            return repr(self)
        width = max(len(str(name)) for name in self.objectives)
        columns = (self.norms.tolist(), self.coefficients.tolist(), self.harmed.tolist())
        lines = [
            f"{name!s:<{width}}  norm {norm:<8.3g}  coefficient {coefficient:<8.3g}"
            f"{'  opposed by the sum' if harmed else ''}".rstrip()
            for name, norm, coefficient, harmed in zip(self.objectives, *columns, strict=True)
        ]
        if not self.gram.isfinite().all():
            return "\n".join([*lines, "the gradients, or their products, are not finite"])
        conflict = "in conflict" if self.conflict else "no conflict"
        harm = "harmful" if self.harmful else "not harmful"
        return "\n".join([*lines, f"smallest cosine {float(self.cosine):.3g}: {conflict}, {harm}"])
