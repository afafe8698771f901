"""Gradients as flat rows: flatten, Gram matrix, combine, unflatten, a bucket at a time."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from mmpareto_optim.flat.buckets import Bucket, buckets_of
from mmpareto_optim.flat.combine import combine_rows
from mmpareto_optim.flat.gram import gram_of, may_be_quick, quick_gram
from mmpareto_optim.flat.memory import is_owned
from mmpareto_optim.ground import Gradient


class FlatBlock:
    """The gradients of one block, a row for each objective, flattened a bucket at a time.

    Args:
        params: the parameters of the block.
        rows: for each objective its gradient, one tensor or None for each parameter. Emptied
            bucket by bucket as they are combined, so that their memory serves the result: what
            nobody else holds is written, or is the result.
        keep: whether somebody else holds on to what is in ``rows``.
        rounded: unit roundoff of what the rows have been rounded to before; 0 if they have not.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        rows: Sequence[Gradient],
        *,
        keep: bool = False,
        rounded: float = 0.0,
    ) -> None:
        self._rows = rows
        self._rounded = rounded
        self._keep = keep
        self._buckets = buckets_of(params)
        # Flattened once for the Gram matrix and the combination, unless that takes memory.
        self._stays_flat = not keep or len(self._buckets) == 1
        self._flat: dict[Bucket, list[Tensor]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest dtype in which gradients are combined, at least float32."""
        return min((bucket.dtype for bucket in self._buckets), key=lambda d: d.itemsize)

    @property
    def errors(self) -> tuple[float, float]:
        """Machine epsilon of the combination, and unit roundoff of what is written if not exact.

        What was rounded before counts as if it were still to be: either way that much is noise.
        """
        eps = torch.finfo(self.dtype).eps
        written = max(bucket.written_error for bucket in self._buckets)
        return eps, max(written, self._rounded if self._rounded > eps else 0.0)

    def gram(self, *, quick: bool = True) -> Tensor:
        """Inner products of the rows, shape ``(rows, rows)``, on the first bucket's device.

        Their real parts where gradients are complex. Accumulated in float64, which holds
        products of float32 numbers exactly, and which no setting of the float32 matmul
        precision (TF32, bfloat16) touches. Long float32 rows on the CPU are multiplied in
        float32, in half the time or less, and once more if that leaves a doubt.

        Args:
            quick: False for rows that are a part of others, of which there is no telling.
        """
        if quick and may_be_quick(self._buckets, len(self._rows)):
            found = quick_gram(partial(map, self._flatten, self._buckets), len(self._rows))
            if found is not None:
                return found
        gram = gram_of(self._flatten(self._buckets[0]))
        for bucket in self._buckets[1:]:
            gram = gram + gram_of(self._flatten(bucket)).to(gram.device, non_blocking=True)
        return gram

    def combine(self, coefficients: Tensor) -> list[Tensor]:
        """``sum_i c_i row_i``: for each parameter a tensor in memory of its own, in its shape.

        Args:
            coefficients: shape ``(rows,)``.
        """
        return self._in_order(
            combine_rows(rows, coefficients, into=rows[0] if is_owned(rows[0]) else None)
            for rows in map(self._flatten, self._buckets)
        )

    def combine_and_stretch(
        self, coefficients: Tensor, gamma: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """:meth:`combine`, each tensor stretched to at least gamma times the norm of the sum.

        Returns:
            The tensors, and the factors that they were multiplied by.
        """
        factors = []

        def stretched() -> Iterator[Tensor]:
            for bucket in self._buckets:
                rows = self._flatten(bucket)
                result = combine_rows(rows, coefficients)
                plain_sum = combine_rows(rows, torch.ones_like(coefficients))
                stretch = gamma.to(bucket.device) * bucket.norms(plain_sum) / bucket.norms(result)
                stretch = stretch.to(result.dtype)
                stretch = torch.where(stretch.isfinite() & (stretch > 1), stretch, 1.0)
                factors.append(stretch.to(coefficients.device, non_blocking=True))
                yield result * bucket.spread(stretch)

        return self._in_order(stretched()), torch.cat(factors)

    def _flatten(self, bucket: Bucket) -> list[Tensor]:
        if bucket in self._flat:
            return self._flat[bucket]
        flat = [bucket.flatten(row) for row in self._rows]
        if self._stays_flat:
            self._flat[bucket] = flat
            self._release(bucket)
        return flat

    def _release(self, bucket: Bucket) -> None:
        if not self._keep:
            for row in self._rows:
                for position in bucket.positions:
                    row[position] = None

    def _in_order(self, results: Iterator[Tensor]) -> list[Tensor]:
        """Unflatten a result for each bucket, and let go of what it was made of."""
        found: dict[int, Tensor] = {}
        for bucket, result in zip(self._buckets, results, strict=True):
            found.update(zip(bucket.positions, bucket.unflatten(result), strict=True))
            self._flat.pop(bucket, None)
            self._release(bucket)
        return [found[position] for position in range(len(found))]
