"""Partial surgery: fold the submodules that can be captured, where the whole of a model cannot.

The model is run once and watched; then its tree is walked from the top. What can be captured is optimised on
the inputs that it had in the run, with free sizes; what cannot is taken apart into its children. The results
are put into a copy of the model, and the whole is compared with the original.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graphsurgery import passes as _passes
from graphsurgery.capture.inputs import Inputs, difference, normalize
from graphsurgery.capture.program import quiet
from graphsurgery.capture.state import check_numbers, kept, unwrap
from graphsurgery.cost import CostModel
from graphsurgery.errors import CaptureError, VerificationError
from graphsurgery.measure import MeasuredCost
from graphsurgery.partial.calls import comparable, free_of_history, merged, own_copy
from graphsurgery.partial.fold import Outcome, Settings, fold_part
from graphsurgery.partial.graft import Grafts
from graphsurgery.partial.record import Recorder
from graphsurgery.partial.result import Part, PartsResult
from graphsurgery.partial.screen import Screen
from graphsurgery.partial.whole import Whole, culprits
from graphsurgery.pipeline import OnEvent, Passes, VerifyMode
from graphsurgery.report.parts import PARTS_SCHEMA_VERSION, PartsReport, WholeCheck
from graphsurgery.rewrite import Event

__all__ = ["Part", "PartsResult", "optimize_parts"]


def optimize_parts(
    model: nn.Module,
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
    *,
    method: str = "forward",
    further_calls: Iterable[Any] = (),
    keep: Collection[str] = (),
    fixed_sizes: bool = False,
    passes: Passes = None,
    verify: VerifyMode = "final",
    max_param_growth: float | None = None,
    cost: str | CostModel | MeasuredCost | None = None,
    on_event: OnEvent | None = None,
) -> PartsResult:
    """Fold the largest submodules of a model that can be captured, and leave the rest as it is.

    For models that `optimize` cannot capture whole: detectors, loops that depend on values, custom operators,
    decoders with a cache. A part is replaced only where a graph can stand for it: it is called (not read) by
    the others, always with the same kinds of arguments, has no hooks, leaves nothing behind, and agrees with
    the original on every recorded call. `report` has the reason for all others.

    Args:
        model: The model; it is not changed. It is copied, and put in evaluation mode by its own `.eval()`.
        args: What it is called with: a tensor, a tuple of positional arguments or a mapping of keyword
            arguments. Any object that the model takes will do.
        kwargs: Further keyword arguments.
        method: What is called, `"generate"` for example; the model itself is then kept.
        further_calls: Other calls to record and to compare on, each as `args`; what differs in size between
            calls must be free in the parts.
        keep: Paths of modules that must stay what they are (`""` is the model itself); what is inside of
            them is still looked at.
        fixed_sizes: Whether a part may be replaced by a graph that takes fewer sizes than the part itself,
            and raises a `ValueError` on others; of use where all calls have the sizes of the recorded ones.
        passes: As for `optimize`.
        verify: As for `optimize`, for each part; `"off"` compares the whole with the original neither.
        max_param_growth: As for `optimize`.
        cost: As for `optimize`.
        on_event: Called at the start and end of every stage and part.

    Returns:
        The result, what became of each part, and the report.

    Raises:
        CaptureError: The model cannot be copied, or does not run on the arguments.
        PassError: A pass is unknown.
        VerificationError: The model differs from itself from run to run.
        ValueError: `verify` is none of the three, `keep` names no module, or a keyword argument is given
            twice.
    """
    if verify not in ("final", "each-pass", "off"):
        raise ValueError(f"verify must be 'final', 'each-pass' or 'off', got {verify!r}")
    _passes.select(passes, cost)  # what is unknown is said before any work is done
    calls = [merged(normalize(args), kwargs), *(merged(normalize(call), None) for call in further_calls)]
    surgery = _Surgery(_copied(unwrap(model)), calls, method, keep, on_event)
    settings = Settings(passes, verify, max_param_growth, cost, fixed_sizes)
    with torch.inference_mode(False):
        return surgery.result(settings)


def _copied(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise CaptureError(f"cannot take apart a {type(model).__name__}, expected an nn.Module")
    check_numbers(model)
    held = (value for module in model.modules() for value in (*vars(module).values(), *module.buffers(False)))
    try:
        return copy.deepcopy(model, free_of_history(held)).eval()
    except Exception as error:  # deepcopy and eval run the code of the caller's classes
        raise CaptureError(
            f"{type(model).__name__} cannot be copied, and the caller's own is not touched: "
            f"{type(error).__name__}: {error}"
        ) from error


class _Surgery:
    """One operation on a copy of the model that is ours."""

    def __init__(
        self,
        model: nn.Module,
        calls: list[Inputs],
        method: str,
        keep: Collection[str],
        on_event: OnEvent | None,
    ) -> None:
        self.model, self.calls, self.method = model, calls, method
        self.recorder = Recorder(model)
        known = {path for paths in self.recorder.paths.values() for path in paths}
        for path in keep:
            if path not in known:
                raise ValueError(f"keep names {path!r}, which is no module of {type(model).__name__}")
        self.keep = keep
        self.seconds: dict[str, float] = {}
        self._on_event = on_event
        self._outcomes: dict[int, tuple[nn.Module, Outcome]] = {}

    def result(self, settings: Settings) -> PartsResult:
        """Record, fold, graft and compare."""
        start = time.perf_counter()
        self._tell("stage-start", "record", 0)
        with kept(self.model):
            found, left = self.recorder.left_by(self._run)
            first = comparable(found)
        with kept(self.model):
            # What is cached in a first call is no state that changes from call to call.
            again = comparable(self._run())
            self.recorder.look(self._run)
        differs = difference(first, again)
        if differs is not None:
            raise VerificationError(
                f"{type(self.model).__name__} differs from itself when it is called again: {differs}; look "
                "for randomness or state outside of it, as nothing can be compared with it"
            )
        with kept(self.model), contextlib.suppress(CaptureError):  # it may decline inputs that are made up
            self.recorder.refuse_unsteady(left, self.recorder.left_by(self._run_elsewhere)[1])
        start = self._lap("record", start)
        screen = Screen(self.recorder, self.keep, default_passes=settings.passes is None)
        with kept(self.model):
            self._walk(screen, settings)
        start = self._lap("fold", start)
        grafts, chosen = Grafts(self.model), []
        for module, outcome in self._outcomes.values():
            if outcome.result is not None:
                grafts.add(module, outcome.result.module, self.recorder.uses[id(module)].read)
                chosen.append(module)
        checks: tuple[WholeCheck, ...] = ()
        if settings.verify != "off":
            self._tell("stage-start", "verify", 2)
            with quiet():
                checks, undone = culprits(Whole(self.model, self.method, self.calls), grafts, chosen)
            for key, reason in undone.items():
                module, outcome = self._outcomes[key]
                said = f"with it the whole model differs from the original: {reason}"
                wrong = replace(outcome, status="refused", code="whole-differs", reason=said, result=None)
                self._outcomes[key] = module, wrong
            chosen = [module for module in chosen if id(module) not in undone]
        self._lap("verify", start)
        root = grafts.use(chosen)
        parts = self._parts()
        report = PartsReport(
            schema_version=PARTS_SCHEMA_VERSION,
            model=type(self.model).__name__,
            method=self.method,
            parts=tuple(part.record() for part in parts),
            checks=checks,
            notes=() if chosen else ("no part was folded: the result is a copy of the model",),
            seconds=self.seconds,
            torch_version=torch.__version__,
        )
        return PartsResult(root, parts, report)

    def _run_elsewhere(self) -> list[Any]:
        """Call the model on other values of floating-point inputs, near those given."""
        return self._run([call.map_tensors(_beside) for call in self.calls])

    def _run(self, calls: Sequence[Inputs] | None = None) -> list[Any]:
        """Call the model as it was given; from one seed, so that every run is the same."""
        found = []
        for call in self.calls if calls is None else calls:
            own = own_copy(call)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                try:
                    function = self.model if self.method == "forward" else getattr(self.model, self.method)
                    found.append(function(*own.args, **own.kwargs))
                except Exception as error:  # the caller's model can raise anything
                    raise CaptureError(
                        f"{type(self.model).__name__}.{self.method} fails on the arguments given "
                        f"({call.describe()}): {type(error).__name__}: {error}; pass such as it takes."
                    ) from error
        return found

    def _walk(self, screen: Screen, settings: Settings) -> None:
        """From the top: fold what can be captured, go into what cannot; level by level."""
        level, seen = [self.model], {id(self.model)}
        while level:
            below: list[nn.Module] = []
            able: list[nn.Module] = []
            for module in level:
                found = screen(module)
                if found is None:
                    able.append(module)
                    continue
                if found.refusal is not None:
                    self._outcomes[id(module)] = module, Outcome("refused", *found.refusal)
                if found.descend:
                    below += module.children()
            with kept(
                self.model
            ):  # a part is captured as it was before the run: what that cached depends on it
                recorded = self.recorder.inputs_of(able, self._run) if able else {}
            for index, module in enumerate(able):
                self._tell(
                    "stage-start", f"fold {self.recorder.path(module) or 'the model'}", index, len(able)
                )
                outcome = fold_part(module, recorded.pop(id(module)), settings)
                self._outcomes[id(module)] = module, outcome
                if outcome.status == "refused":
                    below += module.children()
            level = [module for module in below if id(module) not in seen and not seen.add(id(module))]  # type: ignore[func-returns-value]

    def _parts(self) -> tuple[Part, ...]:
        parts = []
        for key, (path, *also) in self.recorder.paths.items():
            if key in self._outcomes:
                module, found = self._outcomes[key]
                calls = self.recorder.uses[key].calls
                what = (found.status, found.code, found.reason, calls, found.result, found.report)
                parts.append(Part(path, tuple(also), type(module).__name__, *what))
        return tuple(parts)

    def _lap(self, name: str, start: float) -> float:
        now = time.perf_counter()
        self.seconds[name] = now - start
        return now

    def _tell(self, kind: Any, name: str, index: int, total: int = 3) -> None:
        if self._on_event is not None:
            self._on_event(Event(kind, name, index, total))


def _beside(tensor: Tensor) -> Tensor:
    return tensor * (1 + 2.0**-6) if tensor.is_floating_point() else tensor
