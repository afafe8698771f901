"""What has accumulated since the last ``zero_grad``: per-loss gradients, and ``.grad``."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mmpareto_optim.ground import Gradient, Gradients

Written = Mapping[int, Tensor]
"""By position, what is written to ``.grad``."""


class Window:
    """Gradients of each loss since the last ``zero_grad``.

    A ``.grad`` that was not written from here (another ``backward()``'s, or ours after
    somebody clipped, unscaled or zeroed it) is *foreign*: it is never integrated but, as in
    plain PyTorch, what comes next is added to it.

    Attributes:
        params: the parameters.
        found: for each loss its gradient, one tensor or None for each parameter, and what is
            added as it is.
        foreign: for each parameter the ``.grad`` to add to, or None.
    """

    def __init__(self, params: Sequence[Tensor], found: Gradients, foreign: Gradient) -> None:
        self.params = params
        self.found = found
        self.foreign = foreign
        self._written: dict[int, tuple[Tensor, int]] = {}
        self._once_more: Callable[[], Written] | None = None

    def extend(
        self,
        earlier: "Window",
        on_all: Callable[[Sequence[bool | Tensor]], Sequence[bool | Tensor]],
    ) -> None:
        """Add what an earlier window holds, as far as its ``.grad`` is untouched.

        Args:
            earlier: the window that ends here.
            on_all: whether what holds here does so for all processes that have a part of it.
        """
        places = {param: index for index, param in enumerate(earlier.params)}
        kept = [(new, places[param]) for new, param in enumerate(self.params) if param in places]
        kept = [(new, old) for new, old in kept if earlier._seems_untouched(old)]
        if not kept:
            return
        same = on_all(earlier._untouched([old for _, old in kept]))
        rows = [
            (gradient, self.found.rows.setdefault(name, [None] * len(self.params)))
            for name, gradient in earlier.found.rows.items()
        ]
        rows.append((earlier.found.plain, self.found.plain))
        for (new, old), unchanged in zip(kept, same, strict=True):
            self.foreign[new] = _chosen(unchanged, earlier.foreign[old], self.foreign[new])
            for gradient, row in rows:
                row[new] = _added(_chosen(unchanged, gradient[old], None), row[new])
                gradient[old] = None  # its memory is free for the next sum

    @property
    def is_open(self) -> bool:
        """Whether any ``.grad`` still seems to be what was written."""
        return any(map(self._seems_untouched, self._written))

    def write(self, gradients: dict[int, Tensor], once_more: Callable[[], Written] | None) -> None:
        """Make each gradient, and what is foreign, the ``.grad`` of the parameter at its position.

        All or none: sums come before the first write, and what was written is taken back if one
        fails.

        Args:
            gradients: by position; emptied.
            once_more: computes the same gradients again, to tell whether ``.grad`` is still what
                was written; None if nobody will ask.
        """
        before = {position: self.params[position].grad for position in gradients}
        totals = {p: self._with_foreign(p, gradients.pop(p)) for p in list(gradients)}
        try:
            for position, total in totals.items():
                self.params[position].grad = total
        except BaseException:
            for position, gradient in before.items():
                self.params[position].grad = gradient
            raise
        self._once_more = once_more
        if once_more is not None:
            self._written = {p: (total, total._version) for p, total in totals.items()}

    def _with_foreign(self, position: int, gradient: Tensor) -> Tensor:
        foreign = self.foreign[position]
        return gradient if foreign is None else (gradient + foreign).to(gradient.dtype)

    def _seems_untouched(self, position: int) -> bool:
        written = self._written.get(position)
        if written is None:
            return False
        gradient, version = written
        return self.params[position].grad is gradient and gradient._version == version

    def _untouched(self, positions: Sequence[int]) -> list[bool | Tensor]:
        """Whether ``.grad`` is what was written, bit by bit, whatever the version counters say.

        An edit through ``.data`` or NumPy is seen by its result alone.
        """
        assert self._once_more is not None
        again = dict(self._once_more())
        return [
            _same_bits(self._with_foreign(p, again.pop(p)), self._written[p][0]) for p in positions
        ]


def _added(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return old if new is None else new
    return torch.add(old.to(torch.promote_types(old.dtype, torch.float32)), new)


def _chosen(condition: bool | Tensor, one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """One or the other; on a device, which is not waited for, by values."""
    if isinstance(condition, bool):
        return one if condition else other
    if one is None and other is None:
        return None
    nothing = torch.zeros_like(other if one is None else one)  # type: ignore[arg-type]
    return torch.where(
        condition, nothing if one is None else one, nothing if other is None else other
    )


def _same_bits(one: Tensor, other: Tensor) -> bool | Tensor:
    same = (_bits(one) == _bits(other)).all()
    return bool(same) if same.device.type == "cpu" else same


def _bits(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    real = torch.view_as_real(local) if local.is_complex() else local
    return real.view(_INTEGERS[real.element_size()])


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
