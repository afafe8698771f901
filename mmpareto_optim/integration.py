"""From the rows of several losses to one gradient: Gram matrices, coefficients, sums."""

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmpareto_optim.blocks import Block
from mmpareto_optim.distributed.single import Processes
from mmpareto_optim.gram import gram_matrix, sum_of
from mmpareto_optim.options import Options
from mmpareto_optim.rows import ONE, Form, Layout, Row, Span, combine, spans_of, unflatten
from mmpareto_optim.rules.evaluation import applied_gamma
from mmpareto_optim.rules.named import Rounding, Rule, coefficients_of_blocks
from mmpareto_optim.stats import BlockStats, StatsByBlock
from mmpareto_optim.tensor_stretch import combine_and_stretch


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
        spans = spans_of([layouts[row] for row in rows], positions)
        groups.append(Group(block, rows, of_losses, share, tuple(spans)))
    return tuple(groups)


class Integrated(NamedTuple):
    """What an integration gave.

    Attributes:
        gradients: by position of a parameter, each in memory of its own.
        stats: by name of a block.
        factors: by name of a block, what its gradients were multiplied by at most; on the CPU,
            and of a rule that has a name.
    """

    gradients: dict[int, Tensor]
    stats: StatsByBlock
    factors: dict[str, list[float]]

    def stats_beside(self, of_features: Mapping[str, BlockStats]) -> StatsByBlock:
        """Together with those of features, which may be called like a block."""
        named = {f"{n} (feature)" if n in self.stats else n: s for n, s in of_features.items()}
        return StatsByBlock(named | self.stats)


class Integration:
    """How blocks are integrated.

    Args:
        options: what was chosen.
        processes: those that integrate as one.
        copies: by block, the copies of a user's rule that has a memory.
        at_features: whether gradients are those at features, which each process has for its
            examples.
    """

    def __init__(
        self,
        options: Options,
        processes: Processes,
        copies: dict[tuple[bool, str], Rule],
        *,
        at_features: bool = False,
    ) -> None:
        self._options = options
        self._processes = processes
        self._copies = copies
        self._at_features = at_features

    def largest(self, sizes: Tensor) -> Tensor:
        """The largest of some sizes over the processes that have a part of a gradient."""
        return self._processes.largest(sizes, self._at_features)

    def integrate(
        self,
        blocks: Sequence[Block],
        losses: Sequence[str],
        rows: Sequence[Row],
        *,
        release: bool = True,
    ) -> Integrated:
        """One gradient for each parameter that has a gradient in some row.

        Args:
            blocks: which losses meet at which parameters.
            losses: names of the losses, of which each has a row.
            rows: theirs, and others behind them that are added as they are.
            release: whether rows are let go of as they are combined.

        Raises:
            ValueError: a user's rule returns coefficients of another shape.
        """
        met = tuple(block for block in blocks if block.integrated)
        shares = None if self._at_features else self._processes.shares
        groups = groups_of(met, tuple(losses), tuple(row.layout for row in rows), shares)
        pieces = [[_pieces(rows, group, span) for span in group.spans] for group in groups]
        grams, roundings = self._grams(len(met), groups, pieces)
        coefficients = self._coefficients(met, grams, roundings)
        numbers = [_as_numbers(each) for each in coefficients]
        gradients: dict[int, Tensor] = {}
        stretches: list[list[Tensor]] = [[] for _ in met]
        for group, of_spans in zip(groups, pieces, strict=True):
            factors = _factors(group, numbers)
            for span in group.spans:
                of_rows = of_spans.pop(0)
                if group.block is not None and self._options.stretches_tensors:
                    flat, stretch = self._stretched(
                        group, span, of_rows, factors, grams[group.block]
                    )
                    stretches[group.block].append(stretch)
                else:
                    flat = combine(of_rows, factors)
                found = unflatten(flat, span.forms, is_new=flat is not of_rows[0])
                gradients.update(zip(span.positions, found, strict=True))
                del flat, of_rows
                if release:
                    for row, place in zip(group.rows, span.places, strict=True):
                        rows[row].release(place)
        gamma = 1.0 if callable(self._options.integration) else self._options.factor
        stats = StatsByBlock()
        for block, gram, each, of_block in zip(met, grams, coefficients, stretches, strict=True):
            total = _cat_on(gram, of_block)
            stats[block.name] = BlockStats(block.objectives, gram, each, gamma, total)
        is_own = callable(self._options.integration)
        return Integrated(gradients, stats, {} if is_own else _known_factors(stats))

    def _grams(
        self, blocks: int, groups: Sequence[Group], pieces: Sequence[Sequence[Sequence[Tensor]]]
    ) -> tuple[list[Tensor], list[Rounding]]:
        """Of each block, from those of its groups."""
        parts: list[list[Tensor]] = [[] for _ in range(blocks)]
        roundings = [Rounding(0.0)] * blocks
        for group, of_spans in zip(groups, pieces, strict=True):
            if group.block is None:
                continue
            gram, error = gram_matrix([_of_losses(group, of_rows) for of_rows in of_spans])
            parts[group.block].append(gram if group.share == 1 else gram * group.share)
            here = self._rounding(group.spans[0].forms[0], error)
            roundings[group.block] = Rounding(*map(max, here, roundings[group.block]))
        grams = [sum_of(grams) for grams in parts]
        return self._processes.grams(grams, self._at_features), roundings

    def _rounding(self, form: Form, products: float) -> Rounding:
        # What was rounded before counts as if it were still to be: either way it is noise.
        averaged = self._processes.rounding
        averaged = averaged if averaged > form.epsilon else 0.0
        return Rounding(form.epsilon, max(form.written_rounding, averaged), products)

    def _coefficients(
        self, blocks: Sequence[Block], grams: Sequence[Tensor], roundings: Sequence[Rounding]
    ) -> list[Tensor]:
        rule = self._options.integration
        if not blocks:
            return []
        if callable(rule):
            return [
                self._processes.same(self._of_users_rule(rule, block, gram))
                for block, gram in zip(blocks, grams, strict=True)
            ]
        return coefficients_of_blocks(
            rule,
            grams,
            self._options.factor,
            roundings,
            stretched=not self._options.stretches_tensors,
        )

    def _of_users_rule(self, rule: Rule, block: Block, gram: Tensor) -> Tensor:
        # Copies both ways: a rule may edit what it gets, and return the same buffer again.
        coefficients = self._copy_for(rule, block)(gram.clone())
        expected = (len(block.objectives),)
        if not isinstance(coefficients, Tensor) or coefficients.shape != expected:
            found = getattr(coefficients, "shape", type(coefficients).__name__)
            raise ValueError(
                f"the integration function must return coefficients of shape {expected} for "
                f"block {block.name!r} of objectives {block.objectives}, got {found}"
            )
        return coefficients.detach().to(gram, copy=True)

    def _copy_for(self, rule: Any, block: Block) -> Rule:
        """The user's function; of one with a memory, which a ``reset()`` tells of, a copy."""
        if not callable(getattr(rule, "reset", None)):
            return rule  # type: ignore[no-any-return]
        key = self._at_features, block.name
        if key not in self._copies:
            self._copies[key] = deepcopy(rule)
        return self._copies[key]

    def _stretched(
        self,
        group: Group,
        span: Span,
        rows: Sequence[Tensor],
        factors: Sequence[float | Tensor],
        gram: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of a block's losses stretched, and those of others added."""
        own = [place for place in group.of_losses if place is not None]
        flat, stretch = combine_and_stretch(
            [rows[place] for place in own],
            [factors[place] for place in own],
            applied_gamma(gram, self._options.factor),
            [form.size for form in span.forms],
        )
        others = [row for place, row in enumerate(rows) if place not in own]
        return combine([flat, *others], [ONE] * (1 + len(others))), stretch


def _pieces(rows: Sequence[Row], group: Group, span: Span) -> list[Tensor]:
    return [rows[row].part(place) for row, place in zip(group.rows, span.places, strict=True)]


def _of_losses(group: Group, rows: Sequence[Tensor]) -> list[Tensor]:
    """The rows of a block's losses; zeros of those that do not reach it."""
    return [
        rows[0].new_zeros(1).expand_as(rows[0]) if place is None else rows[place]
        for place in group.of_losses
    ]


def _factors(group: Group, numbers: Sequence[Sequence[float | Tensor]]) -> Sequence[float | Tensor]:
    """For each row of a group its coefficient; 1 for what is added as it is."""
    factors: list[float | Tensor] = [ONE] * len(group.rows)
    if group.block is not None:
        for place, number in zip(group.of_losses, numbers[group.block], strict=True):
            if place is not None:
                factors[place] = number
    return factors


def _as_numbers(coefficients: Tensor) -> Sequence[float | Tensor]:
    """Numbers, where nothing waits for them; otherwise tensors without dimensions."""
    if coefficients.device.type == "cpu":
        return coefficients.tolist()
    return coefficients.unbind()


def _known_factors(stats: Mapping[str, BlockStats]) -> dict[str, list[float]]:
    found = {}
    for name, of_block in stats.items():
        if of_block.gram.device.type == "cpu":
            longest = 1.0 if of_block.stretch is None else of_block.stretch.amax()
            found[name] = (of_block.coefficients * longest).tolist()
    return found


def _cat_on(like: Tensor, tensors: Sequence[Tensor]) -> Tensor | None:
    return torch.cat([tensor.to(like.device) for tensor in tensors]) if tensors else None
