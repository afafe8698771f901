"""What the noise of a batch adds to the products of gradients, and how it is taken out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpareto_optim.blocks import Block
from mmpareto_optim.ground import Gradient, Gradients
from mmpareto_optim.parallel.alone import Alone


@dataclass(frozen=True)
class Parts:
    """What accumulated gradients are the sums of: micro-batches, and ranks' shares of each.

    Attributes:
        count: how many parts.
        grams: for each block the sum of the parts' own Gram matrices.
    """

    count: int
    grams: Mapping[Block, Tensor]

    def carried_on(self, kept: Sequence[bool | Tensor]) -> "Parts | None":
        """These parts, as far as they are still in the sums; None if none is.

        Args:
            kept: for each parameter whether its gradient has been left as it was.
        """
        if not any(fact is not False for fact in kept):
            return None
        if any(fact is False for fact in kept):
            return Parts(self.count, {})
        on_device = [fact for fact in kept if isinstance(fact, Tensor)]
        if not on_device:
            return self
        intact = torch.stack([fact.to(on_device[0].device) for fact in on_device]).all()
        grams = {
            block: torch.where(intact.to(gram.device, non_blocking=True), gram, torch.nan)
            for block, gram in self.grams.items()
        }
        return Parts(self.count, grams)

    def followed_by(self, others: "Parts") -> "Parts":
        """Both together; of blocks that both have."""
        grams = {b: self.grams[b] + gram for b, gram in others.grams.items() if b in self.grams}
        return Parts(self.count + others.count, grams)

    def across(self, block: Block, gram: Tensor) -> Tensor | None:
        """The Gram matrix of the sums from products of different parts alone.

        Noise that is independent from part to part adds ``E[n_i . n_j]`` to the product of two
        gradients of one part, and nothing on average to that of two parts. With ``S_i`` the sum
        of ``K`` parts ``g_ik``, the products of different parts are ``S_i . S_j`` less the sum of
        ``g_ik . g_jk``: ``K (K - 1)`` pairs, in place of ``K^2``.

        Args:
            block: whose gradients they are.
            gram: of the sums, shape ``(m, m)``.

        Returns:
            Shape ``(m, m)``; None for fewer than two parts, or unlike ones.
        """
        if self.count < 2 or block not in self.grams:
            return None
        return self.count / (self.count - 1) * (gram - self.grams[block])


def rows_of_parts(found: Gradients) -> dict[str, Gradient]:
    """What one backward adds, in lists that averaging and accumulation leave alone."""
    return {name: list(row) for name, row in found.rows.items()}


def parts_so_far(
    rows: Mapping[str, Gradient],
    params: Sequence[Tensor],
    grams: Mapping[Block, Tensor],
    earlier: Parts | None,
    group: Alone,
) -> Parts:
    """The parts of what has accumulated.

    Args:
        rows: what the last backward added, from :func:`rows_of_parts`.
        params: the parameters.
        grams: by block, the Gram matrix of the sums so far.
        earlier: the parts before.
        group: the processes.
    """
    if earlier is None and group.parts == 1:  # the only part is the sum
        return Parts(1, grams)
    nothing: Gradient = [None] * len(params)
    flats = []
    for block in grams:
        members = [params[position] for position in block.positions]
        whole = [rows.get(name, nothing) for name in block.objectives]
        taken = [[row[position] for position in block.positions] for row in whole]
        flats.append(group.flat(members, taken, keep=True))
    found = group.grams_of_parts(flats) if flats else []
    last = Parts(group.parts, dict(zip(grams, found, strict=True)))
    return last if earlier is None else earlier.followed_by(last)
