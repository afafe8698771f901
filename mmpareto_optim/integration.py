"""From several gradients for each parameter to one: rows, Gram matrices, coefficients, sums."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from mmpareto_optim.blocks import Block
from mmpareto_optim.flat.memory import total_of
from mmpareto_optim.ground import Gradient, Gradients
from mmpareto_optim.method import Method
from mmpareto_optim.parallel.alone import Alone
from mmpareto_optim.parts import Parts
from mmpareto_optim.rules import Rounding, Rule, applied_gamma, coefficients_of_blocks
from mmpareto_optim.stats import BlockStats


class Integrated:
    """Blocks whose coefficients are known, and the rows that these belong to.

    Args:
        blocks: groups of parameters.
        params: all parameters, which the positions of a block count.
        found: for each objective its gradient, one tensor or None for each of ``params``, and what
            is added to the result as it is.
        method: how blocks are integrated.
        processes: how several processes do it as one.
        grams: from the rows of blocks to their Gram matrices.
        keep: whether ``found`` is needed afterwards; otherwise it is emptied.

    Attributes:
        grams: by block, the Gram matrices of those that are integrated.

    Raises:
        ValueError: an integration function of the user's returns another shape.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        params: Sequence[Tensor],
        found: Gradients,
        method: Method,
        processes: Alone,
        grams: Callable[[Sequence[Any]], Sequence[Tensor]],
        *,
        keep: bool,
    ) -> None:
        self._blocks = [block for block in blocks if block.integrated]
        self._params = params
        self._rows = found.rows
        self._plain = found.plain
        self._method = method
        self._processes = processes
        self._keep = keep
        flats = self._flattened()
        found_grams = grams(flats) if flats else []
        self.grams = dict(zip(self._blocks, found_grams, strict=True))
        self._grams = self._united(list(self.grams.values()))
        self._coefficients = self._solved(flats)
        self._flats: list[Any] | None = flats
        self._stretches: list[Tensor | None] = [None] * len(flats)

    def gradients(self) -> dict[int, Tensor]:
        """One new tensor in the parameter's shape for each position that has a gradient.

        Called again, the same gradients are computed again, if what was found is kept.
        """
        flats = self._flattened() if self._flats is None else self._flats
        self._flats = None
        found: dict[int, Tensor] = {}
        for index, (block, flat) in enumerate(zip(self._blocks, flats, strict=True)):
            found.update(zip(block.positions, self._combined(index, flat), strict=True))
        del flats
        added = {}
        for block in self._blocks:
            added.update(dict.fromkeys(block.positions, self._rows_beside(block.objectives)))
        everything = self._rows_beside(())
        for position, param in enumerate(self._params):
            pieces = self._pieces(position, added.get(position, everything))
            if pieces:
                total = total_of(pieces, self._processes.own_part(param))
                found[position] = found[position] + total if position in found else total
        return {p: self._processes.whole(self._params[p], part) for p, part in found.items()}

    @property
    def coefficients(self) -> dict[tuple[str, int], Tensor]:
        """By objective and position; what is added as it is has none."""
        return {
            (name, position): coefficient
            for block, found in zip(self._blocks, self._coefficients, strict=True)
            for name, coefficient in zip(block.objectives, found.unbind(), strict=True)
            for position in block.positions
        }

    def stats(self, parts: Parts | None = None) -> dict[str, BlockStats]:
        """What was seen of each block, after :meth:`gradients`.

        Args:
            parts: those that the gradients are sums of, if that is known.
        """
        across = self._across(parts)
        found = {}
        for index, block in enumerate(self._blocks):
            gram = self._grams[index]
            named = not callable(self._method.integration)
            found[block.name] = BlockStats(
                block.objectives,
                gram,
                self._coefficients[index],
                self._method.factor if named else 1.0,
                self._stretches[index],
                across[index],
            )
        return found

    def _across(self, parts: Parts | None) -> Sequence[Tensor | None]:
        found = [None if parts is None else parts.across(*pair) for pair in self.grams.items()]
        known = [gram for gram in found if gram is not None]
        return self._united(known) if len(known) == len(found) else found

    def _united(self, grams: list[Tensor]) -> list[Tensor]:
        """Gram matrices of the blocks, or others of their shapes, for a rule that has a name."""
        if callable(self._method.integration):
            return grams
        return united(self._blocks, list(self.grams.values()), grams)

    def _flattened(self) -> list[Any]:
        flats = []
        for block in self._blocks:
            taken = [self._take(self._rows[name], block.positions) for name in block.objectives]
            members = [self._params[position] for position in block.positions]
            flats.append(self._processes.flat(members, taken, keep=self._keep))
        return flats

    def _take(self, row: Gradient, positions: Sequence[int]) -> Gradient:
        taken = [row[position] for position in positions]
        if not self._keep:
            for position in positions:
                row[position] = None
        return taken

    def _rows_beside(self, objectives: Sequence[str]) -> list[Gradient]:
        """What is added as it is: heads, and gradients that have been zero so far."""
        return [*(row for name, row in self._rows.items() if name not in objectives), self._plain]

    def _pieces(self, position: int, rows: Sequence[Gradient]) -> list[Tensor]:
        pieces = []
        for row in rows:
            gradient = row[position]
            if gradient is not None:
                pieces.append(gradient)
                if not self._keep:
                    row[position] = None
        return pieces

    def _combined(self, index: int, flat: Any) -> list[Tensor]:
        coefficients = self._coefficients[index]
        if not self._method.by_tensor:
            return flat.combine(coefficients)  # type: ignore[no-any-return]
        gamma = applied_gamma(self._grams[index], self._method.factor)
        combined, self._stretches[index] = flat.combine_and_stretch(coefficients, gamma)
        return combined  # type: ignore[no-any-return]

    def _solved(self, flats: Sequence[Any]) -> list[Tensor]:
        if callable(self._method.integration):
            return [
                self._processes.same(self._of_users_rule(block, gram.to(flat.dtype)))
                for block, gram, flat in zip(self._blocks, self._grams, flats, strict=True)
            ]
        return coefficients_of_blocks(
            str(self._method.integration),
            self._grams,
            self._method.factor,
            [Rounding(*flat.errors) for flat in flats],
            stretched=not self._method.by_tensor,
        )

    def _of_users_rule(self, block: Block, gram: Tensor) -> Tensor:
        coefficients = self._rule_of(block)(gram)
        expected = (len(block.objectives),)
        if not isinstance(coefficients, Tensor) or coefficients.shape != expected:
            found = getattr(coefficients, "shape", type(coefficients).__name__)
            raise ValueError(
                f"the integration function must return coefficients of shape {expected} for "
                f"block {block.name!r} of objectives {block.objectives}, got {found}"
            )
        return coefficients

    def _rule_of(self, block: Block) -> Rule:
        """The user's function; of one with a memory, which a ``reset()`` tells of, a copy."""
        rule: Any = self._method.integration
        if not callable(getattr(rule, "reset", None)):
            return rule  # type: ignore[no-any-return]
        if block.name not in self._method.copies:
            self._method.copies[block.name] = deepcopy(rule)
        return self._method.copies[block.name]


def united(
    blocks: Sequence[Block], grams: Sequence[Tensor], added: Sequence[Tensor]
) -> list[Tensor]:
    """Gram matrices of blocks, added up where the same losses have a gradient other than zero.

    A zero gradient counts as an absent loss: one that is multiplied by zero leaves the blocks
    that there are without it, and parameters that the same losses reach are one block. Decided on
    the device. Blocks chosen by hand stay as they are.

    Args:
        blocks: the blocks.
        grams: their Gram matrices, which tell what is zero.
        added: what is added up, of the same shapes: these, or others of the same blocks.
    """
    total = list(added)
    for one, block in enumerate(blocks):
        for two, other in enumerate(blocks):
            common = [name for name in block.objectives if name in other.objectives]
            if one == two or len(common) < 2 or block.by_hand or other.by_hand:
                continue
            here = [block.objectives.index(name) for name in common]
            there = [other.objectives.index(name) for name in common]
            same = _same_present(grams[one], here, grams[two], there)
            total[one] = total[one] + _moved(added[two], there, here, len(grams[one]), same)
    return total


def _same_present(one: Tensor, here: list[int], other: Tensor, there: list[int]) -> Tensor:
    """Whether the same of two blocks' gradients are not zero, a boolean scalar."""
    first, second = one.diagonal() != 0, (other.diagonal() != 0).to(one.device)
    same = first.sum() == second.sum()
    in_common = torch.stack([first[i] & second[j] for i, j in zip(here, there, strict=True)])
    return same & (in_common.sum() == first.sum())


def _moved(gram: Tensor, there: list[int], here: list[int], size: int, condition: Tensor) -> Tensor:
    """The entries ``there`` of a Gram matrix at the places ``here`` of another, or zeros."""
    result = torch.zeros(size, size, dtype=gram.dtype, device=condition.device)
    for i, j in zip(here, there, strict=True):
        for k, n in zip(here, there, strict=True):
            result[i, k] = torch.where(condition, gram[j, n].to(condition.device), 0.0)
    return result
