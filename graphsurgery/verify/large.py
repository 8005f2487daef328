"""Large modules in float64, or with moved weights, without a second set of their weights.

Modules of more bytes than `graphsurgery.sharing.LARGE_BYTES` are not held a second time in another precision
or with moved weights: each weight is turned when a call reads it, and let go. That takes longer than to turn
all of them once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from graphsurgery.sharing import put_back
from graphsurgery.verify.inputs import Inputs
from graphsurgery.verify.precision import Float64Mode, Nudger, promote, state_of, to_float64

if TYPE_CHECKING:
    from graphsurgery.verify.outputs import Outputs
    from graphsurgery.verify.runners import Runner

__all__ = ["LargeRunner", "TurnedMode"]


class TurnedMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Turns the parameters of a module when a call reads them, so that one layer at a time is held twice.

    Args:
        module: The module whose parameters and float buffers are turned.
        ulps: How far each is moved, in units in the last place of its dtype; the same way each time.
        seed: Seed of the movement.
        double: Whether they are turned into float64 first.
    """

    def __init__(self, module: nn.Module, ulps: float, seed: int, *, double: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._double = double
        self._nudger = Nudger(seed, ulps)
        state = state_of(module)
        names = dict((*module.named_parameters(), *module.named_buffers()))
        # By the object: views that a forward makes of a parameter are made of what was turned already.
        self._offsets = {id(names[name]): self._nudger.offset(tensor) for name, tensor in state.items()}
        self._kept = names  # an id holds only as long as its object lives

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Without the float64 mode around this one, which would take part in the turning.
        with _disable_current_modes():
            args, kwargs = pytree.tree_map(self.turn, (args, kwargs or {}))
        return func(*args, **kwargs)

    def turn(self, value: Any) -> Any:
        """Return a parameter turned; anything else as it is."""
        if not isinstance(value, Tensor) or id(value) not in self._offsets:
            return value
        offset = self._offsets[id(value)]
        if value.is_complex() or not self._double:  # complex numbers are not moved
            return self._nudger.moved(value, offset, None)
        unit = torch.finfo(value.dtype).eps
        return self._nudger.moved(value, offset, unit, torch.float64)


class _BeforeConvolutions(TorchFunctionMode):
    """Turns the operands of convolutions before torch compares their dtypes, which it does above dispatch."""

    def __init__(self, turn: Callable[[Any], Any]) -> None:
        super().__init__()
        self._turn = turn

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if str(getattr(func, "__name__", "")).startswith("conv"):
            with _disable_current_modes():
                args, kwargs = pytree.tree_map(self._turn, (args, kwargs))
        return func(*args, **kwargs)


class LargeRunner:
    """Runs a module that is ours alone with its parameters turned as they are read, none held in between.

    A forward that looks at the dtype of a parameter itself (the recurrent layers of torch do) is run with all
    of them turned at once, as a small one. So is one that writes into its tensors (a cache that it fills and
    reads): what is turned is let go, and what was written there with it.

    Args:
        name: What a report calls it.
        whole: Makes the runner that turns all at once.
        module: The module.
        call: Runs a module.
        double: Whether every operation is in float64.
        moved: By how many units in the last place the parameters are moved, and the seed of it; None not at
            all.
        shared: Tensors whose memory is not ours alone.
        writes: Whether the forward is known to write into the module's tensors.
    """

    def __init__(
        self,
        name: str,
        whole: Callable[[], Runner],
        module: nn.Module,
        call: Callable[[nn.Module, Inputs], Outputs],
        double: bool,
        moved: tuple[float, int] | None = None,
        shared: Sequence[Tensor] = (),
        writes: Callable[[], bool] = lambda: False,
    ) -> None:
        self.name = name
        self._whole = whole
        self._module = module
        self._call = call
        self._double = double
        self._moved = moved
        self._shared = shared
        self._writes = writes

    def run(self, inputs: Inputs) -> Outputs:
        """Return the outputs."""
        if self._writes():
            return self._turned_at_once(inputs)
        # Made before the float64 mode is entered, under which it would read all weights in float64.
        turned = TurnedMode(self._module, *self._moved, double=self._double) if self._moved else None
        with ExitStack() as modes:
            modes.enter_context(put_back(self._shared))
            if self._double:
                modes.enter_context(Float64Mode(Nudger(self._moved[1], 0.5) if self._moved else None))
            if turned is not None:  # entered last, it sees each call first
                modes.enter_context(turned)
            if self._double:
                modes.enter_context(_BeforeConvolutions(turned.turn if turned else promote))
            try:
                return self._call(self._module, to_float64(inputs) if self._double else inputs)
            except Exception:  # noqa: BLE001 - a dtype that does not fit, an operator that takes no mode
                pass
        return self._turned_at_once(inputs)

    def _turned_at_once(self, inputs: Inputs) -> Outputs:
        with put_back(self._shared):  # what is no float is not turned, and shared still
            return self._whole().run(inputs)
