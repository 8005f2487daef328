"""Leave the caller's model as it was: unwrapping, and a guard around everything that runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from graphsurgery.digest import tensor_digest
from graphsurgery.errors import CaptureError
from graphsurgery.graph import tensor_bytes
from graphsurgery.sharing import large_tensors, put_back

__all__ = ["check_numbers", "check_supported", "evaluated", "kept", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside of `DataParallel`, `DistributedDataParallel` and `torch.compile` wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]  # a module, as asked above
        else:
            return model


def check_numbers(model: nn.Module) -> None:
    """Refuse models with weights that keep their numbers elsewhere: quantised by torchao, or distributed.

    Raises:
        CaptureError: A parameter or buffer is such a tensor.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if bool(is_traceable_wrapper_subclass(tensor)):  # bool: mypy knows no class that is both
            raise CaptureError(
                f"{name!r} is of type {type(tensor).__name__}, whose numbers lie in other tensors; give the "
                "model as it is before it is quantised or distributed, and do that to the result."
            )


def check_supported(model: nn.Module) -> None:
    """Refuse the kinds of modules that cannot be captured at all.

    Raises:
        CaptureError: The model is scripted, not yet initialised, quantised by torchao, or holds no values.
    """
    check_numbers(model)
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
        if tensor.layout is not torch.strided:
            raise CaptureError(
                f"{name!r} is a sparse tensor ({tensor.layout}), expected a dense one; densify it."
            )
        if tensor.is_inference():
            raise CaptureError(
                f"{name!r} was made under torch.inference_mode, which forbids tracing; "
                "load the model outside of it."
            )
        if tensor.device.type == "meta":
            raise CaptureError(
                f"{name!r} lies on the meta device and holds no values; load the trained weights first."
            )


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` in evaluation mode, and afterwards undo whatever running it has changed."""
    with kept(model):
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Undo afterwards whatever running `model` has changed.

    No method of the user's is called for that (`train()` is sometimes overridden to rewrite weights):
    training flags, attributes (and what dicts and lists among them hold), parameters, buffers and tensors
    that are neither are put back directly. The large tensors of a large model are copied only before
    something writes into them.

    Raises:
        CaptureError: A large tensor was written other than through torch, so that it cannot be put back.
    """
    modules = list(model.modules())
    tables = [(module.__dict__, dict(module.__dict__)) for module in modules]
    for module in modules:
        tables += [(value, dict(value)) for value in module.__dict__.values() if isinstance(value, dict)]
    lists = [
        (value, list(value)) for module in modules for value in vars(module).values() if type(value) is list
    ]
    # Writes through `.data` leave no trace in the version counter, so the values themselves are compared.
    loose = [value for _, entries in tables for value in entries.values()]
    loose += [value for _, saved in lists for value in saved]
    held = (*model.parameters(), *model.buffers(), *filter(_is_plain, loose))
    tensors = {id(tensor): tensor for tensor in held}.values()
    large = large_tensors(model)
    guarded = {id(tensor): tensor_digest(tensor) for tensor in large}
    memories = [(tensor, tensor.detach()) for tensor in tensors]
    values = [(memory, memory.clone()) for tensor, memory in memories if id(tensor) not in guarded]
    try:
        with put_back(large):
            yield
    finally:
        for table, entries in tables:
            if not _same(list(table), list(entries)) or not _same(
                list(table.values()), list(entries.values())
            ):
                table.clear()
                table.update(entries)
        for items, saved in lists:
            if not _same(items, saved):
                items[:] = saved
        with torch.no_grad():
            for tensor, memory in memories:
                if tensor.data_ptr() != memory.data_ptr():
                    tensor.data = memory
            for memory, value in values:
                if not torch.equal(tensor_bytes(memory), tensor_bytes(value)):
                    memory.copy_(value)
        _require_as_before(model, guarded)


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor that holds numbers of its own, to be put back like a buffer."""
    return (
        type(value) in (torch.Tensor, nn.Parameter, nn.Buffer)
        and value.layout is torch.strided
        and not value.is_quantized
        and not value.is_inference()
        and value.device.type != "meta"
    )


def _require_as_before(model: nn.Module, digests: dict[int, bytes]) -> None:
    names = (*model.named_parameters(), *model.named_buffers()) if digests else ()
    lost = [name for name, t in names if id(t) in digests and tensor_digest(t) != digests[id(t)]]
    if lost:
        raise CaptureError(
            f"running {type(model).__name__} wrote into {', '.join(lost)} other than through torch, and a "
            "tensor of that size is not copied before: expected a forward that leaves its parameters as they "
            "are; load the model anew and take the write out of it"
        )


def _same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))
