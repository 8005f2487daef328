"""Large models are shared, not copied: which are large, and how what shares their memory stays as it was.

A copy of a model of several gigabytes costs more than all else that is done with it. So its large tensors are
used where they lie, and a run of code that is not ours is watched: a tensor is copied just before the first
call that writes into its memory, and put back after the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from graphsurgery.graph import copy_graph_module

__all__ = [
    "LARGE_BYTES",
    "SMALL_BYTES",
    "WriteGuard",
    "apart",
    "is_large",
    "large_tensors",
    "own_memory",
    "plain_tensors",
    "put_back",
]

LARGE_BYTES = 2**28
"""Models of more bytes than this are shared; smaller ones are copied, which is simpler and no dearer."""

SMALL_BYTES = 2**20
"""Tensors up to this are copied of a large model too: its counters, statistics and tables."""


def is_large(module: nn.Module) -> bool:
    """Return whether the parameters and buffers of a module take more than `LARGE_BYTES`."""
    return sum(map(_bytes, (*module.parameters(), *module.buffers()))) > LARGE_BYTES


def large_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Return the parameters and buffers above `SMALL_BYTES` that are plain and dense, of a large module.

    Of a module that is not large there are none.
    """
    if not is_large(module):
        return []
    return [tensor for tensor in plain_tensors(module) if _bytes(tensor) > SMALL_BYTES]


def plain_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Return the parameters and buffers of a module that are plain and dense, each once."""
    plain = (torch.Tensor, nn.Parameter, nn.Buffer)
    return [
        tensor
        for tensor in {id(t): t for t in (*module.parameters(), *module.buffers())}.values()
        if type(tensor) in plain and tensor.layout is torch.strided and not tensor.is_quantized
    ]


def _bytes(tensor: torch.Tensor) -> int:
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        return 0
    return tensor.numel() * tensor.element_size()


def own_memory(gm: fx.GraphModule, other: fx.GraphModule) -> fx.GraphModule:
    """Return `gm` with copies of those tensors whose memory `other` holds too; what was tied stays tied.

    Args:
        gm: A graph; it is not changed, and is returned as it is where nothing is shared.
        other: Another one.
    """
    taken = {_storage_key(tensor) for _, _, tensor in _held(other)} - {None}
    if not any(_storage_key(tensor) in taken for _, _, tensor in _held(gm)):
        return gm
    result = copy_graph_module(gm)
    made: dict[int, torch.Tensor] = {}
    for table, name, tensor in _held(result):
        if _storage_key(tensor) not in taken:
            continue
        if id(tensor) not in made:
            own = tensor.detach().clone()
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(own, requires_grad=tensor.requires_grad) if parameter else own
        table[name] = made[id(tensor)]
    return result


def apart(value: Any, module: nn.Module, state: Iterable[torch.Tensor] = ()) -> Any:
    """Return a nested value with copies of those tensors whose memory a module keeps beyond the call.

    Args:
        value: What a call of the module returned; it is returned as it is where it shares nothing.
        module: The module.
        state: Tensors that stand in for its own.
    """
    kept = {_storage_key(tensor) for _, _, tensor in _held(module)}
    kept |= {_storage_key(tensor) for tensor in state}
    kept.discard(None)

    def own(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, torch.Tensor) and _storage_key(leaf) in kept else leaf

    if not any(_storage_key(leaf) in kept for leaf in pytree.tree_leaves(value)):
        return value
    return pytree.tree_map(own, value)


def _held(module: nn.Module) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
    """Return every tensor of a module, by the table and the name under which it stands."""
    tables: list[dict[str, Any]] = []
    for part in module.modules():
        tables += [part._parameters, part._buffers, part.__dict__]
    return [(t, name, value) for t in tables for name, value in t.items() if isinstance(value, torch.Tensor)]


def put_back(tensors: Sequence[torch.Tensor]) -> AbstractContextManager[object]:
    """Return a context at whose end `tensors` hold what they held; where there are none it does nothing."""
    return WriteGuard(tensors) if tensors else nullcontext()


class WriteGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types no mode
    """Puts back what is written into the memory of some tensors while it is entered.

    Every call through torch is seen, those on `.data` and on views too. What writes behind torch's back
    (numpy, an operator that does not declare it), in another thread or in the body of a control-flow operator
    is not.

    Args:
        tensors: The tensors, plain and dense.

    Attributes:
        wrote: Whether anything was written, in all the time that it was entered.
    """

    supports_higher_order_operators = True  # without, torch raises where a forward holds one

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        storages = [tensor.untyped_storage() for tensor in tensors]
        self._storages = {storage._cdata: storage for storage in storages}
        self._saved: dict[int, torch.UntypedStorage] = {}
        self.wrote = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) and func._schema.is_mutable:
            with _disable_current_modes():
                self._save(func, args, kwargs)
        return func(*args, **kwargs)

    def _save(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                key = _storage_key(tensor)
                if key is not None and key in self._storages and key not in self._saved:
                    self._saved[key] = self._storages[key].clone()  # type: ignore[no-untyped-call]
                    self.wrote = True

    def __exit__(self, *error: Any) -> None:
        """Put back what was written."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for key, saved in self._saved.items():
            self._storages[key].copy_(saved)
        self._saved.clear()


def _storage_key(value: Any) -> int | None:
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and wrapped tensors have no memory of their own
        return None
