"""Gradients of one block as rows of flat buffers: flatten, Gram matrix, combine, unflatten."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from mmpareto_optim.solver import solver_dtype

CHUNK = 2**18
"""Columns that the Gram matrix converts at a time: 2 MiB a row, about a core's cache."""


class FlatGradients:
    """Gradients of ``params`` as rows, in one buffer for each device and dtype.

    Rows are kept in at least float32, whatever the dtype of the parameters.

    Args:
        params: leaf tensors of any shapes, dtypes and devices.
        rows: how many gradients to hold. Their values are undefined until copied.
    """

    def __init__(self, params: Sequence[Tensor], rows: int) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for param in params:
            groups.setdefault((param.device, param.dtype), []).append(param)
        self._buffers = [_Buffer(_Layout(group), rows) for group in groups.values()]

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest dtype that any row is kept in."""
        dtypes = [buffer.data.dtype for buffer in self._buffers]
        return torch.float32 if torch.float32 in dtypes else torch.float64

    def gradient(self, row: int) -> dict[Tensor, Tensor]:
        """Row ``row`` as a view for each parameter, in the parameter's shape."""
        return {
            param: view
            for buffer in self._buffers
            for param, view in zip(buffer.layout.params, buffer.views[row], strict=True)
        }

    def copy(self, row: int, gradient: Mapping[Tensor, Tensor]) -> None:
        """Overwrite row ``row``; parameters that ``gradient`` lacks get zeros."""
        for buffer in self._buffers:
            views, values = buffer.matched(row, gradient)
            if len(views) < len(buffer.views[row]):
                buffer.data[row].zero_()
            if views:
                torch._foreach_copy_(views, values)

    def add(self, row: int, gradient: Mapping[Tensor, Tensor]) -> None:
        """Add to row ``row`` in place."""
        for buffer in self._buffers:
            views, values = buffer.matched(row, gradient)
            if views:
                wide = [value.to(view.dtype) for view, value in zip(views, values, strict=True)]
                torch._foreach_add_(views, wide)

    def gram(self) -> Tensor:
        """Inner products of the rows, shape ``(rows, rows)``, on the first buffer's device.

        Real parts of them where gradients are complex. Accumulated in float64, which holds
        products of float32 numbers exactly, and which no setting of the float32 matmul
        precision (TF32, bfloat16) touches.
        """
        total, *others = [buffer.gram() for buffer in self._buffers]
        for other in others:
            total = total + other.to(total.device, non_blocking=True)
        return total

    def combine(self, coefficients: Tensor) -> "FlatGradients":
        """``sum_i c_i row_i`` as a new single row; ``coefficients`` has shape ``(rows,)``."""
        combined = FlatGradients.__new__(FlatGradients)
        combined._buffers = [buffer.combine(coefficients) for buffer in self._buffers]
        return combined

    def norms(self) -> Tensor:
        """Norm of each parameter's part of the first row, shape ``(parameters,)``.

        The parameters are in buffer order, and the result on the first buffer's device.
        """
        norms = [torch.stack(torch._foreach_norm(buffer.views[0])) for buffer in self._buffers]
        return torch.cat([norm.to(norms[0].device, norms[0].dtype) for norm in norms])

    def scale(self, factors: Tensor) -> None:
        """Multiply each parameter's part of the first row, in the order of :meth:`norms`."""
        parts = torch.split(factors, [len(buffer.layout.params) for buffer in self._buffers])
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer.scale(part)

    def as_grads(self) -> dict[Tensor, Tensor]:
        """The first row as views of one flat vector in the parameters' own dtype."""
        return {
            param: view
            for buffer in self._buffers
            for param, view in zip(buffer.layout.params, buffer.as_grads(), strict=True)
        }


class _Layout:
    """Where each of some parameters of one device and dtype lies in a flat real vector."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self.sizes = [param.numel() * (2 if param.is_complex() else 1) for param in params]
        self.strides = [_dense_strides(param) for param in params]
        self.dtype = params[0].dtype.to_real()
        self.device = params[0].device

    @cached_property
    def repeats(self) -> Tensor:
        """The sizes, on the device."""
        return torch.tensor(self.sizes, device=self.device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views in the parameters' shapes and memory formats."""
        pieces = torch.split(flat, self.sizes)
        if self.params[0].is_complex():
            pieces = tuple(torch.view_as_complex(piece.view(-1, 2)) for piece in pieces)
        return [
            piece.as_strided(param.shape, strides)
            for piece, param, strides in zip(pieces, self.params, self.strides, strict=True)
        ]


class _Buffer:
    """Rows of one layout."""

    def __init__(self, layout: _Layout, rows: int) -> None:
        self.layout = layout
        precise = torch.promote_types(layout.dtype, torch.float32)
        self.data = torch.empty(rows, sum(layout.sizes), dtype=precise, device=layout.device)
        self.views = [layout.views(row) for row in self.data]

    def matched(
        self, row: int, gradient: Mapping[Tensor, Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The row's views and the values for them, where ``gradient`` has a value."""
        pairs = zip(self.views[row], self.layout.params, strict=True)
        found = [(view, gradient[param]) for view, param in pairs if param in gradient]
        return [view for view, _ in found], [value for _, value in found]

    def gram(self) -> Tensor:
        rows, columns = self.data.shape
        wide = self.data.new_empty(rows, min(columns, CHUNK), dtype=solver_dtype(self.data))
        gram = wide.new_zeros(rows, rows)
        for chunk in torch.split(self.data, CHUNK, dim=1):
            exact = wide[:, : chunk.shape[1]].copy_(chunk)
            gram.addmm_(exact, exact.T)
        return gram

    def combine(self, coefficients: Tensor) -> "_Buffer":
        factors = coefficients.to(self.data.device, self.data.dtype, non_blocking=True)
        combined = _Buffer(self.layout, rows=1)
        (total,) = combined.data
        # Elementwise and not a matmul, which may run in TF32.
        torch.mul(self.data[0], factors[0], out=total)
        for row, factor in zip(self.data[1:], factors[1:], strict=True):
            total.addcmul_(row, factor)
        return combined

    def scale(self, factors: Tensor) -> None:
        local = factors.to(self.data.device, self.data.dtype, non_blocking=True)
        columns = self.data.shape[1]
        self.data[0].mul_(local.repeat_interleave(self.layout.repeats, output_size=columns))

    def as_grads(self) -> list[Tensor]:
        if self.data.dtype == self.layout.dtype:
            return self.views[0]
        return self.layout.views(self.data[0].to(self.layout.dtype))


def _dense_strides(param: Tensor) -> tuple[int, ...]:
    """The parameter's strides if it is dense (channels-last, say), otherwise contiguous ones."""
    if param.is_contiguous():
        return param.stride()
    return torch.empty_like(param, device="meta").stride()
