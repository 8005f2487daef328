"""Which modules may be replaced by a graph, as far as the recorded runs tell; before anything is captured."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from graphsurgery.partial.graft import is_carried
from graphsurgery.partial.record import Recorder, Use

__all__ = ["Passed", "Screen"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CAPTURED = (SpectralNorm, WeightNorm)  # hooks of torch's own that compute a weight, which capture traces


@dataclass(frozen=True)
class Passed:
    """A module that is passed over.

    Attributes:
        refusal: Code and reason; None where it is not worth a line.
        descend: Whether its children are to be looked at.
    """

    refusal: tuple[str, str] | None
    descend: bool


class Screen:
    """Tells which modules may be replaced; made before any hooks but the user's are on them.

    Args:
        recorder: What was recorded.
        keep: Paths of modules that must stay.
        default_passes: Whether the default passes run; they find nothing in a single layer.
    """

    def __init__(self, recorder: Recorder, keep: Collection[str], *, default_passes: bool) -> None:
        self._recorder = recorder
        self._keep = frozenset(keep)
        self._default_passes = default_passes
        self._hooked = {
            path: hook for path, module in recorder.model.named_modules() if (hook := _hook_of(module))
        }

    def __call__(self, module: nn.Module) -> Passed | None:
        """Return why a module is passed over; None where it may be captured."""
        use = self._recorder.uses[id(module)]
        if self._is_lone(module):
            return Passed(None, descend=False)
        if use.calls == 0:
            called = any(self._recorder.uses[id(part)].calls for part in module.modules())
            if called:
                return Passed(None, descend=True)
            return Passed(("not-called", "it was not called in the recorded runs"), descend=False)
        refusal = self._refusal(module, use)
        return None if refusal is None else Passed(refusal, descend=True)

    def _is_lone(self, module: nn.Module) -> bool:
        """Whether there can be nothing to fold: no weights, or a single layer of torch's own."""
        if not self._default_passes:
            return False
        if next(module.parameters(), None) is None and next(module.buffers(), None) is None:
            return True
        return not module._modules and type(module).__module__.startswith("torch.nn.")

    def _refusal(self, module: nn.Module, use: Use) -> tuple[str, str] | None:
        paths = self._recorder.paths[id(module)]
        if not self._keep.isdisjoint(paths):
            return "kept", "it is to be kept"
        if use.training is not None:
            where = f", {use.training!r} of it" if use.training else ""
            return "training", f"it was called in training mode{where}; a graph is for inference"
        hooked = next((path for path in self._hooked if _inside(path, paths)), None)
        if hooked is not None:
            where = "it" if hooked in paths else f"{hooked!r} in it"
            return "hooked", f"{where} has the hook {self._hooked[hooked]}, which a graph would not call"
        if use.not_plain is not None:
            what, kind = use.not_plain
            return "not-plain", f"it {what} a {kind}, which is no tensor, number or plain container"
        if not any("[" in form for form in use.forms):
            return "not-plain", "it takes no tensor"
        if use.entered:
            return "entered", f"{use.entered!r} in it is called from outside"
        state = self._state(module)
        if state:
            return "keeps-state", f"a call leaves {state} behind"
        if use.foreign:
            return "keeps-state", f"{next(iter(use.foreign))!r} of it, or in it, is set from outside"
        if use.writes:
            return "writes-input", "it writes into one of its arguments"
        read = next((name for name in use.read if not self._can_be_read(module, name)), None)
        if read is not None:
            return "read", f"{read!r} of it is used from outside, which a graph does not have"
        if len(use.forms) > 1:
            first, second = list(use.forms)[:2]
            return "calls-differ", f"it is called with {first[:120]} and with {second[:120]}"
        return None

    def _state(self, module: nn.Module) -> str:
        for part in module.modules():
            hooks = [hook for table in _HOOKS for hook in getattr(part, table).values()]
            own = {hook.name for hook in hooks if isinstance(hook, _CAPTURED)}  # the weight it computes
            names = [name for name in self._recorder.changed.get(id(part), ()) if name not in own]
            if names:
                return f"{names[0]!r} of {self._recorder.path(part) or 'the model'}"
        return ""

    def _can_be_read(self, module: nn.Module, name: str) -> bool:
        if name in self._recorder.uses[id(module)].written:
            return False  # each call sets it, and a graph would keep what the last one did
        return not hasattr(module, name) or is_carried(module, name)


def _inside(path: str, owners: Collection[str]) -> bool:
    return any(path == owner or not owner or path.startswith(f"{owner}.") for owner in owners)


def _hook_of(module: nn.Module) -> str:
    """Return the name of a hook that the user has put on a module, "" if none."""
    for table in _HOOKS:
        for hook in getattr(module, table).values():
            if not isinstance(hook, _CAPTURED):
                return str(getattr(hook, "__qualname__", None) or type(hook).__name__)
    return ""
