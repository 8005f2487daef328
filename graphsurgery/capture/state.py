"""Leave the caller's model as it was: unwrapping, and a guard around everything that runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graphsurgery.errors import CaptureError

__all__ = ["check_supported", "evaluated", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside of `DataParallel`, `DistributedDataParallel` and `torch.compile` wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def check_supported(model: nn.Module) -> None:
    """Refuse the kinds of modules that cannot be captured at all.

    Raises:
        CaptureError: The model is scripted, not yet initialised, or holds no values.
    """
    for path, module in model.named_modules():
        where = f"submodule {path!r}" if path else f"the model ({type(model).__name__})"
        if isinstance(module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
            raise CaptureError(
                f"{where} is TorchScript, which hides its operators; pass the original nn.Module instead."
            )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise CaptureError(
                f"{name!r} is not initialised yet (a lazy module); run the model once on an input first."
            )
        if tensor.device.type == "meta":
            raise CaptureError(
                f"{name!r} lies on the meta device and holds no values; load the trained weights first."
            )


_TABLES = ("_parameters", "_buffers", "_modules")


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` in evaluation mode, and afterwards undo whatever running it has changed.

    No method of the user's is called for that (`train()` is sometimes overridden to rewrite weights):
    training flags, attributes and buffers that were set or written meanwhile are put back directly.
    """
    modules = list(model.modules())
    attributes = [dict(module.__dict__) for module in modules]
    tables = [{name: dict(module.__dict__[name]) for name in _TABLES} for module in modules]
    values = [
        (tensor, tensor._version, tensor.detach().clone())
        for tensor in {id(buffer): buffer for buffer in model.buffers()}.values()
        if not tensor.is_inference()
    ]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, saved, saved_tables in zip(modules, attributes, tables, strict=True):
            _put_back(module.__dict__, saved)
            for name, entries in saved_tables.items():
                _put_back(module.__dict__[name], entries)
        with torch.no_grad():
            for tensor, version, value in values:
                if tensor._version != version:
                    tensor.copy_(value)


def _put_back(table: dict[str, Any], saved: dict[str, Any]) -> None:
    if table.keys() == saved.keys() and all(table[key] is value for key, value in saved.items()):
        return
    table.clear()
    table.update(saved)
