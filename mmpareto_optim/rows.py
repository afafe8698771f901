"""Gradients as rows: flat memory, one row for each loss.

A row has one tensor for each device and dtype, in which the gradients of the parameters that the
loss gives one lie one after the other, and a tensor of its own for each long one. They are copies
of autograd's tensors, which may be somebody's buffer; only long ones may stay where they are, to
be read, until the step ends. Rows are in at least float32, whatever the dtype of the gradients;
complex numbers count as pairs of real ones.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmpareto_optim.types import Gradient

LONG = 2**15
"""Numbers of a gradient from which it is not copied in among others, and may stay where it is."""

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
        device: that of the parameter.
        row_dtype: that of rows.
        epsilon: machine epsilon of rows.
        written_rounding: unit roundoff of ``.grad``, 0 if it is not rounded to from a row.
        size: how many real numbers its gradient has.
    """

    def __init__(
        self, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.row_dtype = torch.promote_types(dtype.to_real(), torch.float32)
        self.epsilon = torch.finfo(self.row_dtype).eps
        self.written_rounding = 0.0
        if dtype.to_real() != self.row_dtype:
            self.written_rounding = torch.finfo(dtype).eps / 2
        like = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        self._order = _memory_order(like)
        self._inverse = None if self._order is None else _inverse(self._order)
        self._piece_shape = self._arranged(like).shape
        self.size = self._piece_shape.numel()

    def flat(self, gradient: Tensor) -> Tensor:
        """A gradient's real numbers in the order in which the parameter's lie in memory."""
        if self._order is None and not self.dtype.is_complex:
            return gradient.flatten()
        return self._arranged(gradient).flatten()

    def restored(self, flat: Tensor) -> Tensor:
        """A gradient from its numbers; not a view, which would refuse ``detach_()``."""
        gradient = flat.view(self._piece_shape)
        if self.dtype.is_complex:
            gradient = torch.view_as_complex(gradient)
        return (gradient if self._inverse is None else gradient.permute(self._inverse)).data

    def _arranged(self, gradient: Tensor) -> Tensor:
        if self._order is not None:
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

    def __init__(self, forms: Sequence[Form], given: Given) -> None:
        self.forms = forms
        self.given = given
        self.segments: list[list[int]] = []
        self.places: dict[int, Place] = {}
        shared: dict[tuple[torch.device, torch.dtype], int] = {}
        sizes: list[int] = []
        for position in (index for index, there in enumerate(given) if there):
            form = forms[position]
            number = len(self.segments)
            if form.size < LONG:
                number = shared.setdefault((form.device, form.dtype), number)
            if number == len(self.segments):
                self.segments.append([])
                sizes.append(0)
            self.segments[number].append(position)
            self.places[position] = Place(number, sizes[number], sizes[number] + form.size)
            sizes[number] += form.size

    def flatten(self, gradient: Gradient, kept: Container[int] = ()) -> "Row":
        """A gradient as a row.

        Args:
            gradient: for each parameter a tensor; zeros for None.
            kept: positions of long ones that need not be copied.
        """
        return self.row_of(
            [None if g is None else self.forms[i].flat(g) for i, g in enumerate(gradient)], kept
        )

    def row_of(self, pieces: Gradient, kept: Container[int] = ()) -> "Row":
        """As :meth:`flatten`, of gradients that are flat already."""
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


class Row:
    """The gradient of one loss in memory of our own.

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
        if place.stop - place.start >= LONG and len(self.layout.segments[place.segment]) == 1:
            self.segments[place.segment] = self.segments[place.segment].new_empty(0)

    def pieces(self, size: int, positions: Mapping[int, int] | None = None) -> Gradient:
        """The flat gradients of the parameters, views.

        Args:
            size: how long the list is.
            positions: which to take, and where they stand in the list; all if None.
        """
        found: Gradient = [None] * size
        for position, place in self.layout.places.items():
            if positions is None:
                found[position] = self.part(place)
            elif position in positions:
                found[positions[position]] = self.part(place)
        return found


def forms_of(likes: Iterable[Tensor]) -> tuple[Form, ...]:
    """What some parameters, or tensors like their gradients, are."""
    return tuple(
        _form(like.shape, like.stride(), gradient_dtype(like), like.device) for like in likes
    )


@lru_cache(maxsize=256)
def layout_of(forms: tuple[Form, ...], given: Given) -> Layout:
    """The layout for a loss that gives some of the parameters a gradient."""
    return Layout(forms, given)


def sum_of_rows(new: Row, old: Gradient) -> Row:
    """A row and flat gradients together; the row's own memory, where it has a place for them."""
    if any(piece is not None and i not in new.layout.places for i, piece in enumerate(old)):
        given = tuple(
            there or piece is not None for there, piece in zip(new.layout.given, old, strict=True)
        )
        layout = layout_of(tuple(new.layout.forms), given)
        new = layout.row_of(new.pieces(len(old)))
    for position, piece in enumerate(old):
        if piece is not None:
            new.part(new.layout.places[position]).add_(piece)
    return new


@dataclass(frozen=True)
class Span:
    """Parameters that lie one after the other in each of some rows.

    Attributes:
        positions: which.
        forms: what they are.
        places: where, for each of the rows.
    """

    positions: tuple[int, ...]
    forms: tuple[Form, ...]
    places: tuple[Place, ...]


def spans_of(layouts: Sequence[Layout], positions: Sequence[int]) -> list[Span]:
    """The fewest spans of some parameters, which all of the rows have."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and all(_follow(layout.places, runs[-1][-1], position) for layout in layouts):
            runs[-1].append(position)
        else:
            runs.append([position])
    forms = layouts[0].forms
    return [
        Span(
            tuple(run),
            tuple(forms[position] for position in run),
            tuple(_from_to(layout.places[run[0]], layout.places[run[-1]]) for layout in layouts),
        )
        for run in runs
    ]


def combine(rows: Sequence[Tensor], coefficients: Sequence[float | Tensor]) -> Tensor:
    """``sum_i c_i row_i``, a new tensor but for a row by itself.

    Elementwise and not by a matmul, which may run in TF32. Coefficients are numbers where nothing
    waits for them, as an operation begins sooner with them; otherwise tensors without dimensions.
    """
    if len(rows) == 1 and coefficients[0] is ONE:
        return rows[0]
    if rows[0].device.type != "cpu":
        coefficients = [
            c.to(rows[0], non_blocking=True) if isinstance(c, Tensor) else c for c in coefficients
        ]
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


def unflatten(flat: Tensor, forms: Sequence[Form], *, is_new: bool) -> list[Tensor]:
    """The gradients of some parameters from one flat tensor, each in memory of its own.

    Args:
        flat: the gradients one after the other.
        forms: what the parameters are.
        is_new: whether the tensor's memory may be that of a gradient.
    """
    dtype = forms[0].dtype.to_real()
    if len(forms) == 1:
        return [forms[0].restored(flat.to(dtype, copy=not is_new))]
    if flat.dtype != dtype:
        flat = flat.to(dtype)
    sizes = [form.size for form in forms]
    pieces = [flat.new_empty(size) for size in sizes]
    torch.split_with_sizes_copy(flat, sizes, out=pieces)
    return [form.restored(piece) for form, piece in zip(forms, pieces, strict=True)]


def gradient_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's ``.grad``; before PyTorch 2.10 that is the parameter's."""
    chosen: torch.dtype | None = getattr(param, "grad_dtype", None) if param.is_leaf else None
    return param.dtype if chosen is None else chosen


@lru_cache(maxsize=4096)
def _form(
    shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Form:
    return Form(shape, stride, dtype, device)


def _follow(places: Mapping[int, Place], one: int, two: int) -> bool:
    return places[one].segment == places[two].segment and places[one].stop == places[two].start


def _from_to(first: Place, last: Place) -> Place:
    return Place(first.segment, first.start, last.stop)


def _memory_order(like: Tensor) -> list[int] | None:
    """Dimensions of a dense parameter from the slowest to the fastest; None if contiguous."""
    if like.is_contiguous():
        return None
    strides = torch.empty_like(like).stride()
    return sorted(range(like.ndim), key=lambda dimension: -strides[dimension])


def _inverse(order: list[int]) -> list[int]:
    return [order.index(dimension) for dimension in range(len(order))]
