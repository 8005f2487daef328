"""The same program in float64, and the same program with its data moved by a unit in the last place.

The first gives the anchor, the second measures what rounding can do to this program on this input.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphsurgery.verify.inputs import Inputs

__all__ = ["Float64Mode", "copy_module", "nudge", "nudge_inputs", "nudge_module", "nudge_module_float64", "to_float64", "uses_low_precision"]

_TO_DOUBLE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}


class Float64Mode(TorchDispatchMode):
    """Runs every operation in float64, also where a program asks for a lower precision by name.

    `module.double()` does not reach a `x.float()` in a forward, a dtype baked into a graph, a constant that is no
    buffer, nor `torch.zeros(n)`: each of these would bring float32 rounding into the anchor, or stop it with a
    mismatch of dtypes. Below the dispatcher all of them are a dtype argument or a tensor, and are replaced here.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = pytree.tree_map(_promote, (args, kwargs or {}))
        return pytree.tree_map(_promote, func(*args, **kwargs))


def _promote(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(_TO_DOUBLE[value.dtype]) if value.dtype in _TO_DOUBLE else value
    if isinstance(value, torch.dtype):
        return _TO_DOUBLE.get(value, value)
    return value


def copy_module(module: nn.Module) -> nn.Module:
    """Return a deep copy in eval semantics that shares no storage with `module` and needs no gradient."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                # deepcopy declines tensors with a history, which the hook of `weight_norm` leaves behind.
                memo[id(value)] = value.detach().clone()
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        part.training = False  # `.eval()` raises on the module of an exported program
    return copied.requires_grad_(False)


def _floats(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point() or t.is_complex()]


def uses_low_precision(module: nn.Module, inputs: Inputs) -> bool:
    """Return whether anything in the module or its inputs is below float64, or there is no float at all."""
    floats = [*_floats(module), *(t for t in inputs.tensors() if t.is_floating_point() or t.is_complex())]
    return not floats or any(t.dtype in _TO_DOUBLE for t in floats)


def to_float64(inputs: Inputs) -> Inputs:
    """Return the inputs with every float tensor in float64; integers stay as they are."""
    return inputs.replace([_promote(leaf) if isinstance(leaf, Tensor) else leaf for leaf in inputs.leaves()])


def nudge(tensor: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Return `tensor * (1 + d)`, d of random sign with magnitude between eps/2 and eps, in the tensor's dtype.

    The magnitude is kept away from zero, so that a result that hangs on one value alone always moves.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return tensor
    drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5
    step = (drawn.sign() * (0.5 + drawn.abs()) * eps).to(tensor.device)
    return (tensor.to(torch.float64) * (1.0 + step)).to(tensor.dtype)


def nudge_module(module: nn.Module, ulps: float, seed: int) -> nn.Module:
    """Move every parameter and float buffer of `module`, in place, by `ulps` units in the last place of its dtype.

    Returns:
        `module`, which must be a copy of our own.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in _floats(module):
            if tensor.is_floating_point():
                tensor.copy_(nudge(tensor, ulps * torch.finfo(tensor.dtype).eps, generator))
    return module


def nudge_module_float64(module: nn.Module, seed: int) -> nn.Module:
    """Cast a copy of our own to float64 and move each parameter by half a unit in the last place of its old dtype.

    This is what storing the parameters in that dtype may have done to them, without any rounding of arithmetic.
    """
    generator = torch.Generator().manual_seed(seed)
    dtypes = [tensor.dtype for tensor in _floats(module)]
    module.double()
    with torch.no_grad():
        for tensor, dtype in zip(_floats(module), dtypes, strict=True):
            if tensor.is_floating_point():
                tensor.copy_(nudge(tensor, 0.5 * torch.finfo(dtype).eps, generator))
    return module


def nudge_inputs(inputs: Inputs, ulps: float, seed: int) -> Inputs:
    """Return the inputs with every float tensor moved by `ulps` units in the last place."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [
        nudge(leaf, ulps * torch.finfo(leaf.dtype).eps, generator)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
        else leaf
        for leaf in inputs.leaves()
    ]
    return inputs.replace(leaves)
