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

__all__ = [
    "Float64Mode",
    "Nudger",
    "cause_of_nan",
    "copy_module",
    "float64_state",
    "nudge_inputs",
    "nudged_state",
    "promote",
    "state_of",
    "stored_state",
    "to_float64",
    "uses_low_precision",
]

_TO_DOUBLE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}


class Float64Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every operation in float64, also where a program asks for a lower precision by name.

    `module.double()` does not reach a `x.float()` in a forward, a dtype baked into a graph, a constant that
    is no buffer, nor `torch.zeros(n)`: each of these would bring float32 rounding into the anchor, or stop it
    with a mismatch of dtypes. Below the dispatcher all of them are a dtype argument or a tensor, and are
    replaced here.

    Args:
        nudger: Moves the constants that are no parameters (tensors of lower precision, numbers in sums and
            products), as storing them, or what is made of them (6 + 0.1), in their dtype or in float32 may
            have done; None leaves them exact.
    """

    def __init__(self, nudger: Nudger | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._nudger = nudger

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self._nudger is not None:
            # A number beside integers alone would make floats of them.
            numbers = func.overloadpacket.__name__ in _ARITHMETIC and any(
                isinstance(value, Tensor) and value.is_floating_point() for value in args
            )
            args, kwargs = pytree.tree_map(lambda value: self._nudge(value, numbers), (args, kwargs or {}))
        args, kwargs = pytree.tree_map(promote, (args, kwargs or {}))
        return pytree.tree_map(promote, func(*args, **kwargs))

    def _nudge(self, value: Any, numbers: bool) -> Any:
        """Move a constant that is no parameter: all that was one is float64 by now."""
        if self._nudger is None:
            return value
        if isinstance(value, Tensor) and value.dtype in _TO_DOUBLE and value.is_floating_point():
            return self._nudger(value.double(), torch.finfo(value.dtype).eps)
        if numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(self._nudger(torch.tensor(value, dtype=torch.float64), _FLOAT32_EPS))
        return value


_ARITHMETIC = frozenset({"add", "sub", "rsub", "mul", "div"})
_FLOAT32_EPS = 2.0**-23


def promote(value: Any) -> Any:
    """Return a tensor or a dtype of lower precision in float64, complex ones in complex128; else as it is."""
    if isinstance(value, Tensor):
        return value.to(_TO_DOUBLE[value.dtype]) if value.dtype in _TO_DOUBLE else value
    if isinstance(value, torch.dtype):
        return _TO_DOUBLE.get(value, value)
    return value


def copy_module(module: nn.Module, shared: Sequence[Tensor] = ()) -> nn.Module:
    """Return a deep copy in eval semantics that needs no gradient.

    Args:
        module: The module.
        shared: The tensors whose memory it shares with `module`; of all others it has copies.
    """
    memo: dict[int, Any] = {}
    for tensor in shared:
        own = tensor.detach()
        memo[id(tensor)] = nn.Parameter(own, requires_grad=False) if isinstance(tensor, nn.Parameter) else own
    for part in module.modules():
        for value in (*vars(part).values(), *part.buffers(recurse=False)):
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
    return inputs.replace([promote(leaf) if isinstance(leaf, Tensor) else leaf for leaf in inputs.leaves()])


_TABLE = 32749
"""Random numbers drawn for a model: prime, to be out of step with any layout; one thread's work."""


class Nudger:
    """Moves tensors by about one unit in the last place, at random.

    Args:
        seed: Seed of its own generator.
        ulps: How many units.
    """

    def __init__(self, seed: int, ulps: float) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(_TABLE, generator=self._generator, dtype=torch.float64) - 0.5
        # Magnitudes between a half and one: a result that hangs on one value alone always moves.
        self._steps = torch.where(drawn < 0, drawn - 0.5, drawn + 0.5) * ulps

    def __call__(self, tensor: Tensor, eps: float | None = None) -> Tensor:
        """Return `tensor * (1 + d)` in its dtype, d of random sign, magnitude `ulps * eps` to half of it.

        Args:
            tensor: Any tensor; returned as it is unless real floating point.
            eps: The unit; None for the distance from 1 to the next number of the tensor's dtype.
        """
        return self.moved(tensor, self.offset(tensor), eps)

    def offset(self, tensor: Tensor) -> int:
        """Draw where in the table the numbers of a tensor begin; 0 for one that is not moved."""
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return 0
        return int(torch.randint(_TABLE, (), generator=self._generator))

    def moved(
        self, tensor: Tensor, offset: int, eps: float | None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return a tensor, in `dtype` if given, moved by the table's numbers from `offset` on."""
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return tensor if dtype is None else tensor.to(dtype)
        unit = torch.finfo(tensor.dtype).eps if eps is None else eps
        wanted = dtype or tensor.dtype
        work = wanted if wanted in (torch.float32, torch.float64) else torch.float32
        moved = tensor.detach().to(work, copy=True).contiguous().view(-1)
        # A factor, not a summand: an infinity in a mask stays what it is.
        factors = (1.0 + self._steps.roll(offset) * unit).to(moved)
        # By chunks of one table: a random number of its own for each weight takes longer than a run.
        for chunk in moved.split(_TABLE):  # type: ignore[no-untyped-call]
            chunk.mul_(factors[: len(chunk)])
        return moved.view(tensor.shape).to(wanted)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the float parameters and buffers of `module` by name, each once, without gradients."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name: t.detach() for name, t in tensors if t.is_floating_point() or t.is_complex()}


def nudged_state(module: nn.Module, ulps: float, seed: int) -> dict[str, Tensor]:
    """Return the state of `module` with every real tensor moved by `ulps` units in the last place."""
    nudger = Nudger(seed, ulps)
    return {name: nudger(tensor) for name, tensor in state_of(module).items()}


def float64_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of `module` in float64 (complex tensors in complex128)."""
    return {name: tensor.to(_TO_DOUBLE.get(tensor.dtype)) for name, tensor in state_of(module).items()}


def stored_state(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return the state of `module` in float64, each real tensor moved by half a unit of its own dtype.

    This is what storing the parameters in that dtype may have done to them, without any rounding of
    arithmetic.
    """
    nudger = Nudger(seed, 0.5)
    wide = float64_state(module)
    units = {name: torch.finfo(tensor.dtype).eps for name, tensor in state_of(module).items()}
    return {name: nudger(tensor, units[name]) for name, tensor in wide.items()}


def nudge_inputs(inputs: Inputs, ulps: float, seed: int) -> Inputs:
    """Return the inputs with every float tensor moved by `ulps` units in the last place."""
    nudger = Nudger(seed, ulps)
    return inputs.replace([nudger(x) if isinstance(x, Tensor) else x for x in inputs.leaves()])


def cause_of_nan(module: nn.Module | None) -> str:
    """Return what to do about outputs that are all NaN: the first parameter that is not finite, if any is."""
    for name, tensor in module.named_parameters() if module is not None else ():
        for found, kind in ((tensor.isnan(), "NaN"), (tensor.isinf(), "infinite")):
            if bool(found.any()):
                many = f"{int(found.sum())} of {tensor.numel()} values of {name!r}"
                return f"{many} are {kind}: load sound weights"
    return "look for NaN or infinities in its weights or in the example"
