"""Measuring a model without leaving a trace in it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Put back the model's buffers and the default random generators of the CPU and its devices."""
    buffers = [
        (module, name, buffer, buffer.data)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    accelerators = [device for device in devices if device.type not in ("cpu", "meta")]
    kind = accelerators[0].type if accelerators else "cpu"
    try:
        # By .data: what is put back is the memory itself, which nobody wrote to meanwhile, and
        # graphs that have saved a buffer stay valid.
        for _, _, buffer, original in buffers:
            buffer.data = original.clone()
        with torch.random.fork_rng([d.index for d in accelerators], device_type=kind):
            yield
    finally:
        for module, name, buffer, original in buffers:
            buffer.data = original
            setattr(module, name, buffer)


def trainable_parameters(
    model: nn.Module, params: nn.Module | Iterable[Tensor] | None
) -> list[Tensor]:
    """The trainable ones of ``params``, all of the model for None."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    params = model if params is None else params
    candidates = list(params.parameters() if isinstance(params, nn.Module) else params)
    known = set(map(id, model.parameters()))
    if not all(id(param) in known for param in candidates):
        raise ValueError("params holds what is no parameter of the model: pass model.encoder, say")
    trainable = [param for param in dict.fromkeys(candidates) if param.requires_grad]
    if not trainable:
        raise ValueError("params holds no trainable parameter: give some that require a gradient")
    return trainable
