"""Gradients as rows: flat memory, one row for each loss.

A row has one tensor for each device and dtype, in which the gradients of the parameters that the
loss gives one lie one after the other, and a tensor of its own for each long one. They are copies
of autograd's tensors, which may be somebody's buffer; only long ones may stay where they are, to
be read, until the step ends. Rows are in at least float32, whatever the dtype of the gradients;
complex numbers count as pairs of real ones.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import lru_cache
from operator import or_
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from mmpareto_optim.types import Gradient

P = ParamSpec("P")
R = TypeVar("R")

LONG, LONG_ON_DEVICE = 2**15, 2**20
"""Numbers of a gradient from which it is not copied in among others, and may stay where it is.

On a device each of these is an operation for each loss, and small ones take less time than it takes
to issue them. The second number is an estimate, not measured.
"""

CHUNK = 2**17
"""Numbers that are combined at a time on the CPU, so that the sum stays in a core's cache."""

ONE = 1.0
"""The coefficient of a row that is added as it is."""

Given = tuple[bool, ...]
"""For each parameter whether a loss gives it a gradient."""


class Form:
    """All that flattening needs to know of a parameter.

    Attributes:
        dtype: that of ``.grad``.
        row_dtype: that of rows, of which ``epsilon`` is the machine epsilon.
        written_rounding: unit roundoff of ``.grad``, 0 if it is not rounded to from a row.
        size: how many real numbers its gradient has.
        is_long: whether these are so many that the gradient is a tensor of its own in a row.
    """

    def __init__(
        self, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.row_dtype = torch.promote_types(dtype.to_real(), torch.float32)
        self.epsilon = torch.finfo(self.row_dtype).eps
        is_rounded = dtype.to_real() != self.row_dtype
        self.written_rounding = torch.finfo(dtype).eps / 2 if is_rounded else 0.0
        like = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        strides = torch.empty_like(like).stride()  # dense, in the same order
        self._order = list(range(like.ndim))
        if not like.is_contiguous():  # a dimension of size 1 may have any stride
            self._order.sort(key=lambda dimension: -strides[dimension])
        self._inverse = [self._order.index(dimension) for dimension in range(like.ndim)]
        self._is_plain = like.is_contiguous() and not dtype.is_complex
        self._piece_shape = self._in_order(like).shape
        self.size = self._piece_shape.numel()
        self.is_long = self.size >= (LONG if device.type == "cpu" else LONG_ON_DEVICE)

    def flat(self, gradient: Tensor) -> Tensor:
        """A gradient's real numbers in the order in which the parameter's lie in memory."""
        return gradient.flatten() if self._is_plain else self._in_order(gradient).flatten()

    def restored(self, flat: Tensor) -> Tensor:
        """A gradient of its numbers, in their memory; no view, which would refuse ``detach_()``."""
        if self._is_plain:
            return flat.resize_(self._piece_shape)
        gradient = flat.view(self._piece_shape)
        gradient = torch.view_as_complex(gradient) if self.dtype.is_complex else gradient
        return gradient.permute(self._inverse).data

    def _in_order(self, gradient: Tensor) -> Tensor:
        gradient = gradient.permute(self._order)
        return torch.view_as_real(gradient.resolve_conj()) if self.dtype.is_complex else gradient


class Place(NamedTuple):
    """Where a gradient lies in a row: in which of its tensors, and from where to where."""

    segment: int
    start: int
    stop: int


class Layout:
    """Where the gradients of some parameters lie in a row.

    Args:
        forms: what the parameters are.
        given: which of them have a gradient.
    """

    def __init__(self, forms: tuple[Form, ...], given: Given) -> None:
        self.forms = forms
        self.given = given
        self.segments: list[list[int]] = []
        self.places: dict[int, Place] = {}
        shared: dict[tuple[torch.device, torch.dtype], int] = {}
        sizes: list[int] = []
        for position in (index for index, there in enumerate(given) if there):
            form = forms[position]
            number = len(self.segments)
            if not form.is_long:
                number = shared.setdefault((form.device, form.dtype), number)
            if number == len(self.segments):
                self.segments.append([])
                sizes.append(0)
            self.segments[number].append(position)
            self.places[position] = Place(number, sizes[number], sizes[number] + form.size)
            sizes[number] += form.size

    def row_of(self, pieces: Gradient, kept: Container[int] = ()) -> "Row":
        """The row of some flat gradients, zeros for None; copies but for those to be kept."""
        segments = []
        for positions in self.segments:
            form, first = self.forms[positions[0]], pieces[positions[0]]
            if positions[0] in kept and first is not None:
                segments.append(first.to(form.row_dtype))
                continue
            flats = [
                torch.zeros(self.forms[i].size, dtype=form.row_dtype, device=form.device)
                if (piece := pieces[i]) is None
                else piece
                for i in positions
            ]
            segments.append(torch.cat(flats).to(form.row_dtype))
        return Row(self, segments)


layout_of = lru_cache(maxsize=256)(Layout)


class Row:
    """The gradient of one loss.

    Attributes:
        layout: where the gradients of which parameters lie.
        segments: the tensors of which it consists.
    """

    def __init__(self, layout: Layout, segments: list[Tensor]) -> None:
        self.layout = layout
        self.segments = segments

    def part(self, place: Place) -> Tensor:
        """A piece of the row; a view."""
        return self.segments[place.segment][place.start : place.stop]

    def release(self, place: Place) -> None:
        """Let go of a long gradient, so that its memory may serve the next result."""
        if len(self.layout.segments[place.segment]) == 1:
            self.segments[place.segment] = self.segments[place.segment].new_empty(0)

    def extended(self, given: Given) -> "Row":
        """The row with zeros where others have gradients; itself if there are none."""
        if given == self.layout.given:
            return self
        everywhere = {position: position for position in range(len(given))}
        pieces = self.pieces(everywhere, len(given))
        return layout_of(self.layout.forms, given).row_of(pieces)

    def pieces(self, positions: Mapping[int, int], size: int) -> Gradient:
        """Flat gradients, views: by old position the new one, in a list of some size."""
        found: Gradient = [None] * size
        for old, new in positions.items():
            if old in self.layout.places:
                found[new] = self.part(self.layout.places[old])
        return found


def flatten(forms: tuple[Form, ...], gradient: Gradient, kept: Container[int] = ()) -> Row:
    """A gradient as a row; long ones need not be copied at the positions that are kept."""
    pieces = [None if g is None else form.flat(g) for form, g in zip(forms, gradient, strict=True)]
    return layout_of(forms, tuple([piece is not None for piece in pieces])).row_of(pieces, kept)


def forms_of(likes: Iterable[Tensor]) -> tuple[Form, ...]:
    """What some parameters, or tensors like their gradients, are."""
    return tuple([_form(t.shape, t.stride(), gradient_dtype(t), t.device) for t in likes])


def sum_of_rows(new: Row, old: Gradient) -> Row:
    """A row and flat gradients together, in the row's own memory if it has places for them all."""
    given = tuple(piece is not None for piece in old)
    new = new.extended(tuple(map(or_, given, new.layout.given)))
    for position, piece in enumerate(old):
        if piece is not None:
            new.part(new.layout.places[position]).add_(piece)
    return new


class Span(NamedTuple):
    """Parameters that lie one after the other in each of some rows, and where in each row."""

    positions: tuple[int, ...]
    forms: tuple[Form, ...]
    places: tuple[Place, ...]


def spans_of(layouts: Sequence[Layout], positions: Sequence[int]) -> list[Span]:
    """The fewest spans of some parameters, which all of the rows have."""
    spans: list[Span] = []
    for position in positions:
        form = layouts[0].forms[position]
        here = tuple(layout.places[position] for layout in layouts)
        before = spans[-1].places if spans else ()
        if before and all(old[::2] == new[:2] for old, new in zip(before, here, strict=True)):
            last = spans.pop()
            places = tuple(
                Place(old.segment, old.start, new.stop)
                for old, new in zip(last.places, here, strict=True)
            )
            spans.append(Span((*last.positions, position), (*last.forms, form), places))
        else:
            spans.append(Span((position,), (form,), here))
    return spans


def combine(rows: Sequence[Tensor], coefficients: Sequence[float | Tensor]) -> Tensor:
    """``sum_i c_i row_i``, a new tensor but for a row by itself.

    Elementwise and not by a matmul, which may run in TF32. Coefficients are numbers where nothing
    waits for them, as an operation begins sooner with them; otherwise tensors without dimensions,
    of the rows' device and dtype.
    """
    if len(rows) == 1 and coefficients[0] is ONE:
        return rows[0]
    if rows[0].device.type != "cpu" or rows[0].numel() <= CHUNK:
        return _add_others(rows[0] * coefficients[0], rows, coefficients)
    total = torch.empty_like(rows[0])
    for part, *pieces in zip(total.split(CHUNK), *(row.split(CHUNK) for row in rows), strict=True):
        _add_others(torch.mul(pieces[0], coefficients[0], out=part), pieces, coefficients)
    return total


def _add_others(
    total: Tensor, rows: Sequence[Tensor], coefficients: Sequence[float | Tensor]
) -> Tensor:
    for row, coefficient in zip(rows[1:], coefficients[1:], strict=True):
        if isinstance(coefficient, Tensor):
            total.addcmul_(row, coefficient)
        else:
            total.add_(row, alpha=coefficient)
    return total


def unflatten(flats: Sequence[tuple[Span, Tensor]]) -> dict[int, Tensor]:
    """The gradients that lie in some flat tensors, by position, each in memory of its own.

    One operation copies all of a dtype, so that heads, of which each is a block, take none more.
    """
    found: dict[int, tuple[Form, Tensor]] = {}
    copies: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for span, flat in flats:
        dtype, sizes = span.forms[0].dtype.to_real(), [form.size for form in span.forms]
        new, old = copies.setdefault((flat.device, flat.dtype, dtype), ([], []))
        pieces = [flat.new_empty(size, dtype=dtype) for size in sizes]
        found.update(zip(span.positions, zip(span.forms, pieces, strict=True), strict=True))
        new += pieces
        old += flat.split_with_sizes(sizes)
    for new, old in copies.values():
        torch._foreach_copy_(new, old)
    return {position: form.restored(piece) for position, (form, piece) in found.items()}


def gradient_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's ``.grad``; before PyTorch 2.10 that is the parameter's."""
    chosen: torch.dtype | None = getattr(param, "grad_dtype", None) if param.is_leaf else None
    return param.dtype if chosen is None else chosen


_form = lru_cache(maxsize=4096)(Form)


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function, around which ``torch.compile`` breaks its graph."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured, in which nothing may be waited for."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
