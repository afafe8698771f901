"""What has accumulated since the last ``zero_grad``: a row for each loss, and ``.grad``."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmpareto_optim.distributed.single import Processes
from mmpareto_optim.rows import Row, layout_of, sum_of_rows
from mmpareto_optim.types import Gradient


class _Written(NamedTuple):
    """What was written to a parameter's ``.grad``, by which an edit of it is told."""

    gradient: Tensor
    version: int
    fingerprint: Tensor


class GradAccumulator:
    """The gradients of each loss since the last ``zero_grad``, and what was written for them.

    A ``.grad`` that was not written from here (another ``backward()``'s, or ours after
    somebody clipped, unscaled or zeroed it) is *foreign*: it is never integrated but, as in
    plain PyTorch, what comes next is added to it.

    Attributes:
        params: the parameters.
        rows: by the name of the loss.
        plain: what is added as it is: encoders' gradients that were integrated at the features.
        foreign: for each parameter the ``.grad`` to add to, or None.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        rows: Mapping[str, Row],
        plain: Row | None,
        foreign: Gradient,
    ) -> None:
        self.params = params
        self.rows = dict(rows)
        self.plain = plain
        self.foreign = foreign
        self._written: dict[int, _Written] = {}

    def extend(self, earlier: "GradAccumulator", processes: Processes) -> None:
        """Add what has accumulated before, as far as its ``.grad`` is untouched."""
        new_places = {param: position for position, param in enumerate(self.params)}
        kept = {
            old: new_places[param]
            for old, param in enumerate(earlier.params)
            if param in new_places and earlier._seems_untouched(old)
        }
        if not kept:
            return
        untouched = processes.all_of(earlier._untouched(list(kept), processes))
        kept = {old: kept[old] for old, same in zip(list(kept), untouched, strict=True) if same}
        for old, new in kept.items():
            self.foreign[new] = earlier.foreign[old]
        for name, row in earlier.rows.items():
            self.rows[name] = self._with(self.rows.get(name), row, kept)
        if earlier.plain is not None:
            self.plain = self._with(self.plain, earlier.plain, kept)

    def _with(self, new: Row | None, old: Row, kept: Mapping[int, int]) -> Row:
        if new is not None and new.layout is old.layout and len(kept) == len(self.params):
            for total, segment in zip(new.segments, old.segments, strict=True):
                total.add_(segment)
            return new
        pieces = old.pieces(len(self.params), kept)
        if new is not None:
            return sum_of_rows(new, pieces)
        given = tuple(piece is not None for piece in pieces)
        return layout_of(tuple(old.layout.forms), given).row_of(pieces)

    def write(self, gradients: dict[int, Tensor], processes: Processes, *, keep: bool) -> None:
        """Make each gradient, and what is foreign, the ``.grad`` of the parameter at its position.

        All or none: sums come before the first write, and what was written is taken back if one
        fails.

        Args:
            gradients: by position.
            processes: those that share the parameters.
            keep: whether an edit has to be told later.
        """
        before = {position: self.params[position].grad for position in gradients}
        totals = {position: self._with_foreign(position, g) for position, g in gradients.items()}
        written = {}
        if keep:
            written = {
                position: _Written(total, total._version, fingerprint(processes.local(total)))
                for position, total in totals.items()
            }
        try:
            for position, total in totals.items():
                self.params[position].grad = total
        except BaseException:
            for position, gradient in before.items():
                self.params[position].grad = gradient
            raise
        self._written = written

    def _with_foreign(self, position: int, gradient: Tensor) -> Tensor:
        foreign = self.foreign[position]
        return gradient if foreign is None else (gradient + foreign).to(gradient.dtype)

    def _seems_untouched(self, position: int) -> bool:
        """As far as the object and its version counter tell."""
        written = self._written.get(position)
        if written is None:
            return False
        gradient, version, _ = written
        return self.params[position].grad is gradient and gradient._version == version

    def _untouched(self, positions: Sequence[int], processes: Processes) -> list[bool]:
        """Whether ``.grad`` is what was written, whatever its version counter says.

        An edit through ``.data`` or NumPy is seen by its result alone. On a device this waits.
        """
        written = [self._written[position] for position in positions]
        if any(each.fingerprint.is_meta for each in written):
            return [True] * len(positions)
        same = [
            (fingerprint(processes.local(gradient)) == before).to(written[0].fingerprint.device)
            for gradient, _, before in written
        ]
        return torch.stack(same).tolist()


def fingerprint(tensor: Tensor) -> Tensor:
    """A number that tells a tensor's bits and their order, a scalar of int64."""
    bits = _bits(tensor)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for piece in bits.split(_CHUNK):
        weights = _weights(bits.device)[: len(piece)]
        total = total * _MULTIPLIER + (piece * weights).sum()
    return total


_CHUNK = 2**18
_MULTIPLIER = 6364136223846793005
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.view(_INTEGERS[real.element_size()]).reshape(-1)


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    return torch.arange(1, _CHUNK + 1, dtype=torch.int64, device=device)
