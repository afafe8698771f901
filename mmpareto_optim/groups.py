"""Parameters that are handled alike: of one block, with a gradient of the same losses."""

from collections.abc import Hashable
from functools import lru_cache
from typing import NamedTuple

from mmpareto_optim.blocks import Block
from mmpareto_optim.rows import Layout, Span, spans_of


class Group(NamedTuple):
    """Parameters of one block that the same losses give a gradient.

    Attributes:
        block: the number of the block that is integrated; None where gradients are added.
        rows: which of the rows have one.
        of_losses: for each loss of the block where its row stands in ``rows``, or None.
        share: what part of an inner product of these gradients this process counts.
        spans: the parameters.
    """

    block: int | None
    rows: tuple[int, ...]
    of_losses: tuple[int | None, ...]
    share: float
    spans: tuple[Span, ...]


@lru_cache(maxsize=64)
def groups_of(
    blocks: tuple[Block, ...],
    losses: tuple[str, ...],
    layouts: tuple[Layout, ...],
    shares: tuple[float, ...] | None,
) -> tuple[Group, ...]:
    """All parameters with a gradient, in groups that are handled alike.

    Args:
        blocks: those that are integrated.
        losses: names of the losses of the first rows.
        layouts: of the rows.
        shares: for each parameter as in :class:`Group`; None for 1.
    """
    block_of = {i: number for number, block in enumerate(blocks) for i in block.positions}
    members: dict[tuple[int | None, tuple[int, ...], float, Hashable], list[int]] = {}
    for position, form in enumerate(layouts[0].forms):
        rows = tuple(i for i, layout in enumerate(layouts) if layout.given[position])
        share = 1.0 if shares is None else shares[position]
        if rows:
            key = (block_of.get(position), rows, share, (form.dtype, form.device))
            members.setdefault(key, []).append(position)
    groups = []
    for (block, rows, share, _), positions in members.items():
        objectives = () if block is None else blocks[block].objectives
        in_rows = [losses.index(name) for name in objectives]
        of_losses = tuple(rows.index(row) if row in rows else None for row in in_rows)
        here = [layouts[row] for row in rows]
        # As they lie in the rows, where long gradients lie apart from those around them.
        spans = spans_of(here, sorted(positions, key=here[0].places.__getitem__))
        groups.append(Group(block, rows, of_losses, share, tuple(spans)))
    return tuple(groups)
