"""A linear head for each encoder of a model that has a joint loss only."""

import operator
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn

Pool = int | tuple[int, ...] | Callable[[Tensor], Tensor]
"""Dimensions to take the mean over, or a function."""


class UnimodalHeads(nn.Module):
    """A model and a linear head for each of its encoders, for losses that see one modality.

    The encoders' outputs are read by forward hooks, so the model stays as it is::

        heads = UnimodalHeads(model, {"audio": "audio_net", "visual": "visual_net"}, num_classes=6)
        opt = MMParetoOptimizer(torch.optim.SGD(heads.named_parameters(), lr=2e-3, momentum=0.9))
        out, unimodal = heads(spec, image)  # {"audio": logits, "visual": logits}
        losses = {"mm": ce(out, y), **{name: ce(logits, y) for name, logits in unimodal.items()}}
        opt.step(losses=losses)

    ``heads.model`` is what is deployed. The hooks do nothing outside of ``forward`` and are removed
    when this module is deleted.

    A head's input has shape ``(batch, channels)``. By default an output of that shape is taken as
    it is, and one of four dimensions or more, ``(batch, channels, height, width)``, is averaged
    over all that follow the channels. One of three dimensions is refused without ``pool``: give
    ``pool=1`` for a sequence ``(batch, time, channels)``, ``pool=2`` for a 1-D convolution's
    ``(batch, channels, time)``. Channels that come last, ``(batch, height, width, channels)``, are
    not recognised: give ``pool=(1, 2)``.

    A head has its encoder's device and dtype, and gets its size in the first forward. An optimizer
    may be built before that; ``DistributedDataParallel`` has to come after it.

    Args:
        model: any module whose forward calls each encoder exactly once.
        encoders: by modality the name of a submodule, as for ``model.get_submodule``, or the
            submodule itself.
        num_classes: how many logits each head gives.
        select: what to take of an encoder's output that is no tensor: an index, a key or a
            function of it; or a mapping from modalities to these.
        pool: the dimension or dimensions to average over, or a function that gives ``(batch,
            channels)``; or a mapping from modalities to these.

    Attributes:
        model: the model.
        heads: the heads by modality.
        features: by modality what the last forward read, before pooling, as ``features=`` of
            :meth:`MMParetoOptimizer.step` takes it. Empty in copies and pickles.

    Raises:
        TypeError: ``encoders`` is not a mapping from names to names or modules.
        ValueError: no encoder; one that is not in the model; ``num_classes`` not positive;
            ``select`` or ``pool`` for an unknown modality.
    """

    def __init__(
        self,
        model: nn.Module,
        encoders: Mapping[str, str | nn.Module],
        num_classes: int,
        *,
        select: Any = None,
        pool: Pool | Mapping[str, Pool] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(encoders, Mapping):
            raise TypeError(
                'encoders must be a mapping such as {"audio": "audio_net"}, from a modality to '
                f"the name of a submodule, got {type(encoders).__name__}"
            )
        if not encoders:
            raise ValueError("encoders is empty: name at least one modality's encoder")
        if operator.index(num_classes) < 1:
            raise ValueError(f"num_classes must be positive, got {num_classes}")
        if any("." in name for name in encoders):
            raise ValueError(f"a modality's name cannot have a dot in it, got {list(encoders)}")
        self.model = model
        self.features: dict[str, Tensor] = {}
        modules = {name: _found(model, name, given) for name, given in encoders.items()}
        self._select = _by_modality("select", select, encoders)
        self._pool = _by_modality("pool", pool, encoders)
        self._outputs: dict[str, list[Any]] = {}  # with an entry where a forward is under way
        self._handles = [
            encoder.register_forward_hook(partial(_keep, self._outputs, name))
            for name, encoder in modules.items()
        ]
        self.heads = nn.ModuleDict(
            {
                name: nn.LazyLinear(num_classes, **_place_of(encoder, model))
                for name, encoder in modules.items()
            }
        )

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Call the model, then the heads.

        Returns:
            The model's output, and by modality the logits of shape ``(batch, num_classes)``.

        Raises:
            RuntimeError: an encoder was not called, or called twice.
            TypeError: what ``select`` takes of an output is not a tensor.
            ValueError: an output is not of shape ``(batch, channels)`` after pooling.
        """
        self.features = {}  # lets go of the last graph
        self._outputs.update((name, []) for name in self.heads)
        try:
            output = self.model(*args, **kwargs)
            outputs = dict(self._outputs)
        finally:
            self._outputs.clear()
        features = {name: self._feature(name, found) for name, found in outputs.items()}
        logits = {}
        for name, head in self.heads.items():
            pooled = _pooled(name, features[name], self._pool[name])
            logits[name] = head(pooled.to(next(head.parameters()).dtype))
        self.features = features
        return output, logits

    def _feature(self, name: str, outputs: list[Any]) -> Tensor:
        if len(outputs) != 1:
            raise RuntimeError(
                f"the encoder of modality {name!r} was called {len(outputs)} times in this "
                "forward: name a submodule that the model calls, as a module, exactly once"
            )
        return _selected(name, outputs[0], self._select[name])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "features": {}}

    def __del__(self) -> None:
        for handle in self.__dict__.get("_handles", ()):
            handle.remove()


def _keep(outputs: dict[str, list[Any]], name: str, *hook_arguments: Any) -> None:
    if name in outputs:
        outputs[name].append(hook_arguments[-1])


def _by_modality(argument: str, choice: Any, modalities: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(choice, Mapping):
        return dict.fromkeys(modalities, choice)
    for name in choice:
        if name not in modalities:
            raise ValueError(f"{argument} has {name!r}, which is not one of {list(modalities)}")
    return {name: choice.get(name) for name in modalities}


def _found(model: nn.Module, name: str, given: str | nn.Module) -> nn.Module:
    try:
        encoder = model.get_submodule(given) if isinstance(given, str) else given
    except AttributeError:
        encoder = None
    if encoder is None or all(encoder is not module for module in model.modules()):
        what = repr(given) if isinstance(given, str) else f"this {type(given).__name__}"
        children = [child for child, _ in model.named_children()]
        raise ValueError(
            f"the model has no submodule {what}, the encoder of modality {name!r}: give a module "
            f"that is part of it, or a name from model.named_modules(), such as {children}"
        )
    return encoder


def _place_of(encoder: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Device and dtype of an encoder, or of the model where it has no parameters."""
    for param in chain(encoder.parameters(), model.parameters()):
        if param.dtype.is_floating_point:
            return {"device": param.device, "dtype": param.dtype}
    return {}


def _selected(name: str, output: Any, select: Any) -> Tensor:
    chosen, cause = output, None
    if callable(select):
        chosen = select(output)
    elif select is not None:
        try:
            chosen = output[select]
        except (KeyError, IndexError, TypeError) as error:
            chosen, cause = None, error
    if isinstance(chosen, Tensor):
        return chosen
    keys = f" with the keys {list(output)}" if isinstance(output, Mapping) else ""
    raise TypeError(
        f"the encoder of modality {name!r} gives a {type(output).__name__}{keys}, and with "
        f"select={select!r} this is no tensor: give select= an index, a key or a function"
    ) from cause


def _pooled(name: str, output: Tensor, pool: Pool | None) -> Tensor:
    try:
        if pool is None:
            pooled = output.flatten(2).mean(2) if output.ndim > 3 else output
        else:
            pooled = pool(output) if callable(pool) else output.mean(pool)
    except (IndexError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"pool={pool!r} cannot be taken of the encoder of modality {name!r}, which gives shape "
            f"{tuple(output.shape)}: give a dimension, several, or a function"
        ) from error
    if pooled.ndim != 2:
        raise ValueError(
            f"the encoder of modality {name!r} gives shape {tuple(output.shape)}, and its head "
            f"needs (batch, channels), got {tuple(pooled.shape)}: give pool=1 for (batch, time, "
            "channels), pool=2 for (batch, channels, time), or a function"
        )
    return pooled
