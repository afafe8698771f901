"""From the rows of several losses to one gradient: Gram matrices, coefficients, sums."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmpareto_optim.blocks import Block
from mmpareto_optim.distributed.single import Processes
from mmpareto_optim.gram import gram_matrix, sum_of
from mmpareto_optim.groups import Group, groups_of
from mmpareto_optim.options import Options
from mmpareto_optim.rows import ONE, Form, Row, Span, combine, unflatten
from mmpareto_optim.rules.evaluation import applied_gamma
from mmpareto_optim.rules.named import Rounding, Rule, coefficients_of_blocks
from mmpareto_optim.stats import BlockStats, StatsByBlock
from mmpareto_optim.tensor_stretch import combine_and_stretch


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
        gradients: dict[int, Tensor] = {}
        together: list[tuple[Span, Tensor]] = []
        stretches: list[dict[int, Tensor]] = [{} for _ in met]
        for group, of_spans in zip(groups, pieces, strict=True):
            factors = _factors(group, coefficients, of_spans[0][0])
            for span in group.spans:
                of_rows = of_spans.pop(0)
                if group.block is not None and self._options.stretches_tensors:
                    flat, stretch = self._stretched(
                        group, span, of_rows, factors, grams[group.block]
                    )
                    stretches[group.block].update(
                        zip(span.positions, stretch.unbind(), strict=True)
                    )
                else:
                    flat = combine(of_rows, factors)
                form, is_new = span.forms[0], flat is not of_rows[0]
                if len(span.forms) == 1 and (is_new or form.is_long):
                    alone = flat.to(form.dtype.to_real(), copy=not is_new)
                    gradients[span.positions[0]] = form.restored(alone)
                    del alone
                else:
                    together.append((span, flat))
                del flat, of_rows
                if release:
                    for row, place in zip(group.rows, span.places, strict=True):
                        rows[row].release(place)
        gradients |= unflatten(together)
        is_own = callable(self._options.integration)
        gamma = 1.0 if is_own else self._options.factor
        stats = StatsByBlock()
        for block, gram, each, of_block in zip(met, grams, coefficients, stretches, strict=True):
            stretch_of_all = _in_order(of_block, gram)
            stats[block.name] = BlockStats(block.objectives, gram, each, gamma, stretch_of_all)
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


def _factors(group: Group, coefficients: Sequence[Tensor], row: Tensor) -> Sequence[float | Tensor]:
    """For each row of a group its coefficient; 1 for what is added as it is."""
    factors: list[float | Tensor] = [ONE] * len(group.rows)
    if group.block is not None:
        numbers = _as_numbers(coefficients[group.block], row)
        for place, number in zip(group.of_losses, numbers, strict=True):
            if place is not None:
                factors[place] = number
    return factors


def _as_numbers(coefficients: Tensor, row: Tensor) -> Sequence[float | Tensor]:
    """Numbers, where nothing waits for them; otherwise tensors like a row, without dimensions."""
    if "cpu" in (coefficients.device.type, row.device.type):
        return coefficients.tolist()
    return coefficients.to(row, non_blocking=True).unbind()


def _known_factors(stats: Mapping[str, BlockStats]) -> dict[str, list[float]]:
    found = {}
    for name, of_block in stats.items():
        if of_block.gram.device.type == "cpu":
            longest = 1.0 if of_block.stretch is None else of_block.stretch.amax()
            found[name] = (of_block.coefficients * longest).tolist()
    return found


def _in_order(stretches: Mapping[int, Tensor], gram: Tensor) -> Tensor | None:
    """By position of the parameter, on the device of the Gram matrix."""
    if not stretches:
        return None
    return torch.stack([stretches[position].to(gram.device) for position in sorted(stretches)])
