"""The stats of every step of a training, kept on the device until somebody reads them."""

import csv
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from operator import itemgetter
from os import PathLike
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

from torch.optim import SGD, Optimizer

from mmpareto_optim.monitoring.history import BlockHistory, RecordedStep
from mmpareto_optim.monitoring.summary import Summary, summarize
from mmpareto_optim.stats import BlockStats

Row = dict[str, Any]
"""One block at one step."""

# Attributes of the stats that become columns.
SCALAR_COLUMNS = ("conflict", "harmful", "cosine", "scale", "coefficients", "norms")
COLUMNS = (*SCALAR_COLUMNS, "min_norm", "alignment", "alpha", "cosines")


class HasStats(Protocol):
    """A :class:`MMParetoOptimizer`, a :class:`GradientIntegrator`."""

    @property
    def stats(self) -> Mapping[str, BlockStats]:
        """What the last integration saw, by block."""


class ScalarWriter(Protocol):
    """A ``torch.utils.tensorboard.SummaryWriter``, say."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Add a number to a curve."""


class ConflictRecorder:
    """Collects ``opt.stats`` step by step, for a summary, a table, TensorBoard or a picture.

    Call :meth:`record` after each step, or register it as a hook once for the whole training::

        recorder = ConflictRecorder()
        opt.register_step_post_hook(recorder.record)
        for epoch in range(epochs):
            recorder.epoch = epoch
            ...
        print(recorder.summary())

    Recording does not wait for the device. Each step adds one small copy for each block, which
    stays on the block's device until it is read: ``8 * (m * m + m + 1)`` bytes for a block of
    ``m`` losses, which is 56 MB for two losses and a million steps.

    Attributes:
        step: number of the next step; to be set where steps are not recorded.
        epoch: what the rows to come have as their epoch.
    """

    def __init__(self) -> None:
        self.step = 0
        self.epoch: int | None = None
        self.histories: dict[tuple[str, tuple[str, ...]], BlockHistory] = {}
        self._base = ""
        self._recorded = 0
        # By the id of a writer, as two may be equal: itself, and how many calls of record() it has.
        self._writers: WeakValueDictionary[int, ScalarWriter] = WeakValueDictionary()
        self._written: dict[int, int] = {}
        self._last_written = self._written_before = 0

    def record(self, source: HasStats, *_hook_arguments: object) -> None:
        """Add what the last integration of an optimizer or integrator saw as one step.

        Call it once for each step, whatever the number of micro-batches, and not after a step in
        which nothing was integrated: that would record the step before once more. The other
        arguments that a step hook gets are ignored.
        """
        step = RecordedStep(self._recorded, self.step, self.epoch)
        stats_by_block = getattr(source, "stats", None)
        if not isinstance(stats_by_block, Mapping):
            raise TypeError(
                "source must be an MMParetoOptimizer or a GradientIntegrator, got "
                f"{type(source).__name__}: record the wrapper, not its base"
            )
        for block, stats in stats_by_block.items():
            key = (block, stats.objectives)
            self.histories.setdefault(key, BlockHistory(*key)).append(step, stats)
        self._base = self._base or _steps_otherwise(source)
        self._recorded += 1
        self.step += 1

    def summary(self) -> Summary:
        """A few numbers for each block, and whether integration can pay there.

        When printed, it shows a table, the losses that the sum opposes, a verdict for each block,
        and a sentence if the optimizer's steps are known not to be along its gradients.
        """
        return summarize(self.histories.values(), self._base)

    def rows(self) -> list[Row]:
        """A dict for each step and block, in their order; ``pandas.DataFrame`` takes the list.

        It has ``step``, ``epoch``, ``block``, ``objectives`` (the losses' names joined by ``+``),
        ``conflict``, ``harmful``, ``cosine`` (the smallest), ``scale`` (with ``rescale="tensor"``
        the mean over the tensors), ``min_norm`` and ``alignment``; for each loss
        ``coefficient/NAME``, ``norm/NAME`` and ``alpha/NAME``; for each two of them
        ``cosine/NAME+NAME``. See :class:`BlockStats` for what they are. A ``GradScaler``'s factor
        is in the norms.
        """
        return self._rows(COLUMNS)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the table; columns that a block does not have (other losses) stay empty."""
        rows = self.rows()
        columns = dict.fromkeys(column for row in rows for column in row)
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(columns))
            writer.writeheader()
            writer.writerows(rows)

    def write_scalars(self, writer: ScalarWriter) -> None:
        """Write the steps that this writer has not got yet, as curves ``BLOCK/COLUMN``.

        The columns are ``conflict``, ``harmful``, ``cosine``, ``scale``, ``coefficient/NAME`` and
        ``norm/NAME``, with ``-`` for ``+`` and ``_`` for characters that MLflow does not accept. A
        new writer gets everything; after :meth:`load_state_dict` it gets what some writer had not
        got before ``state_dict()``.
        """
        is_known = self._writers.get(id(writer)) is writer
        first = self._written[id(writer)] if is_known else self._written_before
        for row in self._rows(SCALAR_COLUMNS, first):
            step, _, block, _ = (row.pop(name) for name in ("step", "epoch", "block", "objectives"))
            for column, value in row.items():
                tag = f"{block}/{column}".replace("+", "-")
                writer.add_scalar(re.sub(r"[^\w./ -]", "_", tag), float(value), step)
        self._writers[id(writer)] = writer
        self._written[id(writer)] = self._last_written = self._recorded

    def state_dict(self) -> dict[str, Any]:
        """All that was recorded: plain values and tensors, for ``torch.save``."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "base": self._base,
            "recorded": self._recorded,
            "written": min((self._written[i] for i in self._writers), default=self._last_written),
            "histories": [history.state_dict() for history in self.histories.values()],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the recorder that gave ``state_dict`` stopped; earlier steps are dropped."""
        histories = [BlockHistory(**state) for state in state_dict["histories"]]
        self.histories = {(history.block, history.objectives): history for history in histories}
        self.step, self.epoch = state_dict["step"], state_dict["epoch"]
        self._recorded, self._base = state_dict["recorded"], state_dict.get("base", "")
        self._writers, self._written = WeakValueDictionary(), {}
        self._last_written = self._written_before = state_dict["written"]

    # Copied and pickled as its state: writers, and weak references to them, cannot be.
    __getstate__ = state_dict
    __setstate__ = load_state_dict

    def _rows(self, attributes: Sequence[str], first: int = 0) -> list[Row]:
        """The rows from that record on, with columns for some attributes of the stats."""
        rows: list[tuple[int, Row]] = []
        for history in self.histories.values():
            recent = history.part(slice(bisect_left(history.steps, (first,)), None))
            columns = _columns(recent.stats(), attributes)
            names = {"block": history.block, "objectives": "+".join(map(str, history.objectives))}
            for recorded, *values in zip(recent.steps, *columns.values(), strict=True):
                row = {"step": recorded.step, "epoch": recorded.epoch, **names}
                rows.append((recorded.number, row | dict(zip(columns, values, strict=True))))
        return [row for _, row in sorted(rows, key=itemgetter(0))]


def _steps_otherwise(source: Any) -> str:
    """By name, the bases of an optimizer whose steps are not along the gradient."""
    while hasattr(source, "stats"):  # Lightning's optimizer holds ours, which holds the base
        source = getattr(source, "optimizer", None)
    bases = getattr(source, "optimizers", [source])
    return " or ".join({type(base).__name__: 0 for base in bases if not _is_along_gradient(base)})


def _is_along_gradient(base: Optimizer | None) -> bool:
    """Whether the base is plain SGD; or unknown, as beside an integrator."""
    return base is None or (
        type(base) is SGD
        and not any(group["momentum"] or group["weight_decay"] for group in base.param_groups)
    )


def _columns(stats: BlockStats, attributes: Iterable[str]) -> dict[str, list[Any]]:
    """A number for each step: one column for the block, one for each loss or pair of losses."""
    columns = {}
    names = list(enumerate(stats.objectives))
    for attribute in attributes:
        values, title = getattr(stats, attribute), attribute.removesuffix("s")
        if values.ndim == 1:
            columns[title] = values.tolist()
        elif values.ndim == 2:
            columns.update({f"{title}/{name}": values[:, i].tolist() for i, name in names})
        else:
            for (i, one), (j, other) in combinations(names, 2):
                columns[f"{title}/{one}+{other}"] = values[:, i, j].tolist()
    return columns
