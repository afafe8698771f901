"""Measuring a model without leaving a trace in it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Put back the model's buffers (BatchNorm's statistics) and the random generators' states.

    These are the default generators of the CPU and of the devices that hold the model.
    """
    buffers = [
        (module, name, buffer, buffer.data)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    accelerators = sorted({(d.type, d.index) for d in devices if d.type not in ("cpu", "meta")})
    kind = accelerators[0][0] if accelerators else "cpu"
    try:
        # By .data: what is put back is the memory itself, which nobody wrote to meanwhile, and
        # graphs that have saved a buffer stay valid.
        for _, _, buffer, original in buffers:
            buffer.data = original.clone()
        with torch.random.fork_rng([index for _, index in accelerators], device_type=kind):
            yield
    finally:
        for module, name, buffer, original in buffers:
            buffer.data = original
            setattr(module, name, buffer)


def trainable_parameters(
    model: nn.Module, params: nn.Module | Iterable[Tensor] | None
) -> list[Tensor]:
    """The trainable ones of ``params``, all of the model for None.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``params`` holds what is no parameter of the model, or none is trainable.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if params is None:
        params = model
    candidates = list(params.parameters() if isinstance(params, nn.Module) else params)
    known = set(map(id, model.parameters()))
    for index, param in enumerate(candidates):
        if id(param) not in known:
            raise ValueError(
                f"params[{index}], a {type(param).__name__}, is not a parameter of the model: pass "
                "model.encoder or model.encoder.parameters() of the model that holds it"
            )
    trainable = [param for param in dict.fromkeys(candidates) if param.requires_grad]
    if not trainable:
        raise ValueError("params holds no trainable parameter: give some that require a gradient")
    return trainable
