"""What has accumulated since ``zero_grad``, and what a backward sets aside: .grad, autocast."""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mmpareto_optim.rows import Row, layout_of, sum_of_rows
from mmpareto_optim.rules.named import Rule
from mmpareto_optim.types import Gradient

if TYPE_CHECKING:
    from mmpareto_optim.distributed.single import Processes


Autocast = dict[str, torch.dtype]
"""By type of device the dtype of an autocast region."""


TELLS = torch.__version__ >= "2.13"
"""Whether weak references end with a tensor. In 2.8 the garbage collector may end those of one that
only PyTorch still holds; versions in between were not tried."""


class _Written(NamedTuple):
    """What was written to a parameter's ``.grad``, by which an edit of it is told.

    Not by the tensor itself, which lives as long as anybody else needs it: ``alive`` is a weak
    reference that ends the window with the last of them; in older PyTorch the tensor, after all.
    """

    identity: int
    version: int
    fingerprint: Tensor
    alive: object


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
        rules_before: a user's rules with a memory, as they were when it began.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        rows: dict[str, Row],
        plain: Row | None,
        foreign: Gradient,
        rules_before: dict[tuple[bool, str], Rule],
    ) -> None:
        self.params = params
        self.rows = rows
        self.plain = plain
        self.foreign = foreign
        self.rules_before = rules_before
        self._written: dict[int, _Written] = {}

    def _forget(self, position: int) -> None:
        """Let go of the rows when the last ``.grad`` has been set to None."""
        self._written.pop(position, None)
        if not self._written:
            self.rows, self.plain = {}, None

    def goes_on(self) -> bool:
        """Whether what comes next is added to it, as far as version counters tell."""
        return any(map(self._seems_untouched, self._written))

    def extend(self, earlier: "GradAccumulator", processes: "Processes") -> None:
        """Add what has accumulated before, as far as its ``.grad`` is untouched."""
        places = {param: position for position, param in enumerate(self.params)}
        before, now = (next(iter(each.rows.values())).layout.forms for each in (earlier, self))
        olds = [
            old
            for old, param in enumerate(earlier.params)
            # In another memory format its numbers are in another order.
            if param in places
            and before[old] is now[places[param]]
            and earlier._seems_untouched(old)
        ]
        if not olds:
            return
        untouched = processes.all_of(earlier._untouched(olds, processes))
        kept = {
            old: places[earlier.params[old]]
            for old, same in zip(olds, untouched, strict=True)
            if same
        }
        for old, new in kept.items():
            self.foreign[new] = earlier.foreign[old]
        for name, row in earlier.rows.items():
            self.rows[name] = self._sum(self.rows.get(name), row, kept)
        if earlier.plain is not None:
            self.plain = self._sum(self.plain, earlier.plain, kept)

    def _sum(self, new: Row | None, old: Row, kept: Mapping[int, int]) -> Row:
        if new is not None and new.layout is old.layout and len(kept) == len(self.params):
            for total, segment in zip(new.segments, old.segments, strict=True):
                total.add_(segment)
            return new
        pieces = old.pieces(kept, len(self.params))
        if new is not None:
            return sum_of_rows(new, pieces)
        forms = next(iter(self.rows.values())).layout.forms
        return layout_of(forms, tuple(piece is not None for piece in pieces)).row_of(pieces)

    def write(self, gradients: dict[int, Tensor], processes: "Processes", *, keep: bool) -> None:
        """Make each gradient, and what is foreign, the ``.grad`` of the parameter at its position.

        All or none: sums come before the first write, and what was written is taken back if one
        fails. With ``keep`` an edit is told later.
        """
        totals = {position: self._with_foreign(position, g) for position, g in gradients.items()}
        if keep:
            owner = weakref.ref(self)
            self._written = {
                position: _Written(
                    id(total),
                    total._version,
                    fingerprint(processes.local(total)),
                    weakref.ref(total, partial(_forget_in, owner, position)) if TELLS else total,
                )
                for position, total in totals.items()
            }
        processes.agree_to_write()
        before = {position: self.params[position].grad for position in totals}
        try:
            for position, total in totals.items():
                self.params[position].grad = total
        except BaseException:
            for position, gradient in before.items():
                self.params[position].grad = gradient
            raise

    def _with_foreign(self, position: int, gradient: Tensor) -> Tensor:
        foreign = self.foreign[position]
        return gradient if foreign is None else (gradient + foreign).to(gradient.dtype)

    def _seems_untouched(self, position: int) -> bool:
        """As far as the object and its version counter tell."""
        written, gradient = self._written.get(position), self.params[position].grad
        if written is None or gradient is None or id(gradient) != written.identity:
            return False
        return gradient._version == written.version

    def _untouched(self, positions: Sequence[int], processes: "Processes") -> list[bool]:
        """Whether ``.grad`` is what was written, whatever its version counter says.

        An edit through ``.data`` or NumPy is seen by its result alone. On a device this waits.
        """
        written = [self._written[position] for position in positions]
        gradients = [self.params[position].grad for position in positions]
        now = [fingerprint(processes.local(g)) for g in gradients if g is not None]
        if now[0].is_meta:
            return [True] * len(positions)
        same = [one == each.fingerprint for one, each in zip(now, written, strict=True)]
        return torch.stack([each.to(same[0].device) for each in same]).tolist()


def _forget_in(owner: "weakref.ref[GradAccumulator]", position: int, _: object) -> None:
    accumulator = owner()
    if accumulator is not None:
        accumulator._forget(position)


CHUNK = 2**18
MULTIPLIER = 6364136223846793005
"""Odd and large, as of a linear congruential generator (Knuth 1997, Section 3.3.4)."""


def fingerprint(tensor: Tensor) -> Tensor:
    """A number that tells a tensor's bits and their order, a scalar of int64."""
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    bits = real.reshape(-1)
    bits = bits.view({1: torch.int8, 2: torch.int16}.get(bits.element_size(), torch.int32))
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for piece in bits.split(CHUNK):
        total = total * MULTIPLIER + (piece * _weights(bits.device)[: len(piece)]).sum()
    return total


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    """Odd numbers that have nothing in common (as of a splitmix64 generator)."""
    mixed = torch.arange(1, CHUNK + 1, dtype=torch.int64, device=device) * -7046029254386353131
    mixed = (mixed ^ (mixed >> 32)) * MULTIPLIER
    return (mixed ^ (mixed >> 29)) | 1


@contextmanager
def grads_set_aside(params: Sequence[Tensor]) -> Iterator[Gradient]:
    """No parameter has a ``.grad`` meanwhile; gives those that there were, and puts them back."""
    before = [param.grad for param in params]
    try:
        try:
            for param, gradient in zip(params, before, strict=True):
                if gradient is not None:
                    param.grad = None
            yield before
        finally:
            _put_back(params, before)
    finally:  # once more, after an interrupt in the middle
        _put_back(params, before)


def _put_back(params: Sequence[Tensor], gradients: Gradient) -> None:
    for param, gradient in zip(params, gradients, strict=True):
        if param.grad is not gradient:
            param.grad = gradient


def add_what_functions_wrote(gradient: Gradient, params: Sequence[Tensor]) -> bool:
    """Add to a gradient what was accumulated into ``.grad`` meanwhile; whether there was any.

    A function whose own backward calls ``backward`` (a reversible layer) accumulates there for
    the parameters inside it, which is a part of the gradient that ``torch.autograd.grad`` does not
    return.
    """
    written = {i: p.grad for i, p in enumerate(params) if p.is_leaf and p.grad is not None}
    for position, by_function in written.items():
        known, params[position].grad = gradient[position], None
        gradient[position] = by_function if known is None else known + by_function
    return bool(written)


def autocast_around(tensors: Iterable[Tensor]) -> Autocast:
    """The autocast regions that this is called in, for the devices of some tensors."""
    kinds = {tensor.device.type for tensor in tensors} - {"meta"}
    return {k: torch.get_autocast_dtype(k) for k in kinds if torch.is_autocast_enabled(k)}


def switched(autocast: Autocast, *, on: bool) -> AbstractContextManager[None]:
    """Autocast regions are entered, or left, meanwhile."""
    return _switched(autocast, on) if autocast else nullcontext()


@contextmanager
def _switched(autocast: Autocast, on: bool) -> Iterator[None]:
    with ExitStack() as stack:
        for kind, dtype in autocast.items():
            stack.enter_context(torch.autocast(kind, dtype, enabled=on))
        yield
