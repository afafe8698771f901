"""What ``.grad`` has to be after a backward, computed slowly and without the library.

One plain backward for each loss, everything else in numpy and float64. The definitions are those
of the design: a loss reaches a parameter once it has given it a gradient other than zero, and a
zero gradient counts as an absent loss within its block.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.history import History, Outcome, Pair
from tests.fuzz.rules import Array, Settings, combine


def exact(
    history: History,
    losses: Mapping[str, Tensor],
    parameters: Sequence[Tensor],
    settings: Settings,
    modalities: Iterable[Sequence[int]] = (),
) -> dict[int, Outcome]:
    """The ``.grad`` of each parameter after ``backward(losses)``; ``parameters`` are left alone."""
    for index, parameter in enumerate(parameters):
        if not _as_written(history, index, parameter):
            _start_again(history, index, parameter)
    history.wake()
    _accumulate(history, gradients(losses, parameters))
    named = [list(members) for members in modalities]
    outcomes = {index: Outcome(None) for index in range(len(parameters))}
    for names, members, rule in _blocks(history, parameters, settings, named):
        outcomes |= _integrated(history, names, members, parameters, rule)
    return {index: _onto_start(history, index, outcome) for index, outcome in outcomes.items()}


def at_features(
    history: History,
    losses: Mapping[str, Tensor],
    features: Sequence[tuple[Tensor, Tensor]],
    parameters: Sequence[Tensor],
    settings: Settings,
) -> tuple[dict[int, Outcome], list[Outcome]]:
    """The same with ``features``: pairs of a feature and of the leaf that the losses saw.

    Each call integrates its own batch at the features, and what that gives parameters behind them
    is added to the ``.grad`` that is there; others are treated as without features.
    The second list holds what is integrated at each feature, before hooks on it ran.
    """
    leaves, count = [leaf for _, leaf in features], len(parameters)
    both = gradients(losses, [*parameters, *leaves])
    history.wake()
    at = [_at_feature(history, both, count + i, leaf, settings) for i, leaf in enumerate(leaves)]
    behind = _behind([feature for feature, _ in features], at, parameters)
    for index, parameter in enumerate(parameters):
        if index in behind or not _as_written(history, index, parameter):
            _start_again(history, index, parameter)
    _accumulate(history, {pair: g for pair, g in both.items() if pair[1] < count})
    outcomes = {index: Outcome(None) for index in range(count)}
    for names, members, rule in _blocks(history, parameters, settings, []):
        outcomes |= _integrated(history, names, members, parameters, rule)
    outcomes |= behind
    return {i: _onto_start(history, i, outcome) for i, outcome in outcomes.items()}, at


def gradients(losses: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[Pair, Array]:
    """The gradient of each loss alone, as a plain backward would accumulate it."""
    found: dict[Pair, Array] = {}
    for name, loss in losses.items():
        if loss.requires_grad:
            given = _plainly(partial(loss.backward, retain_graph=True), parameters)
            found |= {(name, index): g for index, g in given.items()}
    return found


def of_sum(losses: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[int, Array]:
    """The gradient of the sum of all losses, in one pass."""
    every = [loss for loss in losses.values() if loss.requires_grad]
    return _plainly(lambda: torch.autograd.backward(every, retain_graph=True), parameters)


def _plainly(backward: Callable[[], object], parameters: Sequence[Tensor]) -> dict[int, Array]:
    """What ``backward()`` accumulates into each parameter; the ``.grad`` there is put back."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    backward()
    found = {at: array(p.grad) for at, p in enumerate(parameters) if p.grad is not None}
    for parameter, grad in zip(parameters, before, strict=True):
        parameter.grad = grad
    return found


def _as_written(history: History, index: int, parameter: Tensor) -> bool:
    """Whether ``.grad`` is what was written, of a parameter that is still trained."""
    if index not in history.written or not parameter.requires_grad:
        return False
    tensor, values = history.written[index]
    grad = parameter.grad
    return grad is tensor and bool(torch.equal(_bits(grad), _bits(values)))


def _start_again(history: History, index: int, parameter: Tensor) -> None:
    history.start_again(index, None if parameter.grad is None else array(parameter.grad))


def _accumulate(history: History, found: Mapping[Pair, Array]) -> None:
    for pair, gradient in found.items():
        if np.isfinite(gradient).all():
            history.look(pair, bool(gradient.any()))
        history.sums[pair] = np.asarray(history.sums.get(pair, 0.0) + gradient)
        history.sizes[pair] = history.sizes.get(pair, 0.0) + float(np.linalg.norm(gradient))


def _joined(
    by_reach: Mapping[frozenset[str], list[int]], parameters: Sequence[Tensor]
) -> dict[frozenset[str], list[int]]:
    """Small blocks in the large ones that they join."""
    size = {names: sum(parameters[p].numel() for p in at) for names, at in by_reach.items()}

    def host(names: frozenset[str]) -> frozenset[str]:
        larger = [n for n in size if names < n]
        few = size[names] < len(names)
        fit = [n for n in larger if few and size[n] >= len(n)]
        fit = fit or [n for n in larger if size[n] >= 100 * size[names]]
        if len(names) < 2 or not fit:
            return names
        return host(min(fit, key=lambda n: size[n]))

    joined: dict[frozenset[str], list[int]] = {}
    for names, members in by_reach.items():
        joined.setdefault(host(names), []).extend(members)
    return joined


def _blocks(
    history: History,
    parameters: Sequence[Tensor],
    settings: Settings,
    modalities: list[list[int]],
) -> list[tuple[list[str], list[int], Settings]]:
    """Names of losses, indices of parameters and the rule of each block."""
    count = len(parameters)
    if modalities:
        blocks = [(_union(history, members), members, settings) for members in modalities]
        rest = sorted(set(range(count)) - {index for members in modalities for index in members})
        everyone = sorted({name for name, _ in history.sums})
        return [*blocks, (everyone, rest, Settings("uniform", 1.0))]
    by_reach: dict[frozenset[str], list[int]] = {}
    for index in range(count):
        by_reach.setdefault(history.reaching(index), []).append(index)
    by_reach = _joined(by_reach, parameters)
    return [(sorted(names), members, settings) for names, members in by_reach.items()]


def _union(history: History, members: Iterable[int]) -> list[str]:
    return sorted(set().union(*(history.reaching(index) for index in members)))


def _integrated(
    history: History,
    names: Sequence[str],
    members: Sequence[int],
    parameters: Sequence[Tensor],
    settings: Settings,
) -> dict[int, Outcome]:
    """One block integrated as one vector; parameters that no loss gave anything stay away."""
    live = [p for p in members if any(at == p for _, at in history.sums)]
    if not live:
        return {}
    nothing = {p: np.zeros(tuple(parameters[p].shape)) for p in live}
    rows = [[history.sums.get((name, p), nothing[p]) for p in live] for name in names]
    sizes = [[history.sizes.get((name, p), 0.0) for p in live] for name in names]
    shapes = [nothing[p] for p in live]
    combined = combine(rows, sizes, shapes, settings, [parameters[p].dtype for p in live])
    found = {}
    for p, (value, scale, doubt) in zip(live, combined, strict=True):
        # What has just come alive belongs to no block yet.
        others = [pair for pair in history.sums if pair[1] == p and pair[0] not in names]
        value = np.asarray(value + sum(history.sums[pair] for pair in others))
        found[p] = Outcome(value, max(scale, *(history.sizes[o] for o in others), 0.0), doubt)
    return found


def _at_feature(
    history: History, found: Mapping[Pair, Array], index: int, leaf: Tensor, settings: Settings
) -> Outcome:
    """The integrated gradient at one feature, a block of its own."""
    every = {pair: g for pair, g in found.items() if pair[1] == index}
    if not every:
        return Outcome(None)
    for pair, g in every.items():
        if np.isfinite(g).all():
            history.look(pair, bool(g.any()))
    rows = [[g] for p, g in every.items() if p in history.reached or not np.isfinite(g).all()]
    added = [g for p, g in every.items() if p not in history.reached and np.isfinite(g).all()]
    if not rows:
        return Outcome(np.asarray(sum(added)), 0.0)
    if callable(settings.rule) and not all(row[0].any() for row in rows):
        return Outcome(np.zeros(tuple(leaf.shape)), 0.0, "a callable and a zero at a feature")
    sizes = [[float(np.linalg.norm(row[0]))] for row in rows]
    shapes = [np.zeros(tuple(leaf.shape))]
    value, scale, doubt = combine(rows, sizes, shapes, settings, [leaf.dtype])[0]
    return Outcome(np.asarray(value + sum(added)), scale, doubt)


def _behind(
    features: Sequence[Tensor], combined: Sequence[Outcome], parameters: Sequence[Tensor]
) -> dict[int, Outcome]:
    """A plain backward of the features with their integrated gradients."""
    pairs = list(zip(features, combined, strict=True))
    going = {z: torch.from_numpy(o.value).to(z.dtype) for z, o in pairs if o.value is not None}
    if not going:
        return {}
    given = _plainly(lambda: torch.autograd.backward([*going], [*going.values()]), parameters)
    doubt = next((out.doubt for out in combined if out.doubt), "")
    # Rounding at a feature is relative to its largest term, and goes to all parameters behind it.
    lost = max(out.scale / (float(going[z].norm()) or 1.0) for z, out in pairs if z in going)
    scale = lost * max((float(np.linalg.norm(g)) for g in given.values()), default=0.0)
    return {index: Outcome(g, scale, doubt) for index, g in given.items()}


def _onto_start(history: History, index: int, outcome: Outcome) -> Outcome:
    start = history.start[index]
    if outcome.value is None:
        return Outcome(start)
    if start is None:
        return outcome
    size = float(np.linalg.norm(start))
    return Outcome(np.asarray(start + outcome.value), max(outcome.scale, size), outcome.doubt)


def array(tensor: Tensor) -> Array:
    """A float64 copy of a tensor's values."""
    return np.array(tensor.detach().double().numpy())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)
