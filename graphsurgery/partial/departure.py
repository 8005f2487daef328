"""Where a folded part does not stand for its module: sizes that it does not take, outputs that differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from graphsurgery.capture.inputs import Inputs
from graphsurgery.capture.program import quiet, run_model
from graphsurgery.errors import CaptureError
from graphsurgery.verify import Inputs as Called
from graphsurgery.verify import accepted_by, verify

__all__ = ["departure", "resized", "runs"]


def departure(
    module: nn.Module, part: nn.Module, calls: Sequence[Inputs], *, compare: bool, fixed_sizes: bool
) -> tuple[str, str] | None:
    """Return code and reason where a part does not stand for its module; None where it does.

    Args:
        module: The original.
        part: What was made of it.
        calls: The recorded calls.
        compare: Whether to compare outputs.
        fixed_sizes: Whether the part may take fewer sizes than the original, as long as it takes these calls.
    """
    found = accepted_by([part])

    def accepts(call: Inputs) -> bool:
        return found is None or found(Called(call.args, call.kwargs))

    for call in calls:
        if not accepts(call):
            return "sizes", (
                f"it was called with {call.describe()} too, which its graph does not take: tracing fixes a "
                "size that differs between the calls"
            )
    narrow = None if fixed_sizes else _narrow(module, accepts, calls[0])
    if narrow is not None:
        return "narrow", (
            f"it takes {narrow.describe()} as well, which its graph does not: tracing fixes that size; "
            "fixed_sizes=True folds it all the same"
        )
    for call in calls if compare else ():
        verdict = verify(module, part, Called(call.args, call.kwargs), samples=1, free_sizes={})
        if not verdict.ok:
            return "differs", f"on a recorded call ({call.describe()}): {verdict.reason}"
    return None


def _narrow(module: nn.Module, accepts: Callable[[Inputs], bool], call: Inputs) -> Inputs | None:
    """Return a call of another size that the module takes and its graph does not, if there is one."""
    for index, tensor in enumerate(call.tensors()):
        for axis in range(tensor.ndim):
            size = tensor.shape[axis]
            larger = [list(resized(call, index, axis, wanted)) for wanted in (size + 1, 2 * size)]
            free = any(accepts(other) for others in larger for other in others)
            # A size of one where the graph has a fixed one may be meant to broadcast: only larger ones tell.
            smaller = [list(resized(call, index, axis, 1))] if free and size > 1 else []
            for others in [*larger, *smaller]:
                if any(accepts(other) for other in others):
                    continue
                taken = next((other for other in others if runs(module, other)), None)
                if taken is not None:
                    return taken
    return None


def resized(call: Inputs, index: int, axis: int, size: int) -> Iterator[Inputs]:
    """Give a call with another size on one axis; then on all axes that have the same size as this one.

    Args:
        call: The call; what is larger is repeated, what is smaller cut.
        index: Which of its tensors.
        axis: Which axis of it.
        size: The size.
    """
    tensors = call.tensors()
    old = tensors[index].shape[axis]
    places = {
        id(tensor): [a for a, n in enumerate(tensor.shape) if n == old] for tensor in tensors if tensor.ndim
    }

    def alone(tensor: Tensor) -> Tensor:
        return _repeated(tensor, axis, size) if tensor is tensors[index] else tensor

    def together(tensor: Tensor) -> Tensor:
        for place in places.get(id(tensor), ()):
            tensor = _repeated(tensor, place, size)
        return tensor

    yield call.map_tensors(alone)
    if sum(map(len, places.values())) > 1:
        yield call.map_tensors(together)


def _repeated(tensor: Tensor, axis: int, size: int) -> Tensor:
    order = torch.arange(size, device=tensor.device) % max(tensor.shape[axis], 1)
    return tensor.index_select(axis, order)


def runs(module: nn.Module, call: Inputs) -> bool:
    """Return whether a module takes a call."""
    try:
        with quiet():
            run_model(module, call)
    except CaptureError:
        return False
    return True
