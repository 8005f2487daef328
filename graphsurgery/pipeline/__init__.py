"""Capture, fold, restore, verify: the way of a model from one end to the other.

The only package that joins the layers. Nothing unverified is handed out unless it was asked for
(`verify="off"`): a result that differs from the original is taken apart, the pass that did it is named and
left out, and what remains is verified again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphsurgery import passes as _passes
from graphsurgery.capture import capture
from graphsurgery.cost import CostModel
from graphsurgery.errors import CaptureError, PassError
from graphsurgery.graph import capture_info
from graphsurgery.measure import MeasuredCost, measured_cost
from graphsurgery.pipeline.heads import (
    FeatureEnergy,
    HeadSubspace,
    SplitHeadResult,
    head_subspace,
    split_head,
)
from graphsurgery.pipeline.measured import Trial
from graphsurgery.pipeline.proof import Proof
from graphsurgery.pipeline.result import OptimizeResult
from graphsurgery.report import Report
from graphsurgery.report.build import build_report
from graphsurgery.rewrite import Event, Pass, PassManager
from graphsurgery.rewrite.fingerprint import held_tensors
from graphsurgery.rewrite.manager import MAX_ROUNDS
from graphsurgery.verify import Data, Verdict

__all__ = [
    "FeatureEnergy",
    "HeadSubspace",
    "OnEvent",
    "OptimizeResult",
    "Passes",
    "SplitHeadResult",
    "VerifyMode",
    "head_subspace",
    "inspect",
    "optimize",
    "split_head",
]

VerifyMode = Literal["final", "each-pass", "off"]
Passes = Iterable[str | Pass | type[Pass]] | str | Pass | None
OnEvent = Callable[[Event], None]


def optimize(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    passes: Passes = None,
    verify: VerifyMode = "final",
    dynamic_shapes: Any = None,
    on_event: OnEvent | None = None,
    max_param_growth: float | None = None,
    cost: str | CostModel | MeasuredCost | None = None,
    data: Data | Iterable[Any] | None = None,
    data_limit: int | None = None,
) -> OptimizeResult:
    """Fold a trained network into a cheaper one that computes the same.

    Args:
        model: The network; it is not changed. A model in training mode is taken as in evaluation mode.
        example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs; may be left out
            for an `ExportedProgram` that brings its own.
        passes: Names, instances or classes of passes, in the order to run; None for the default ones.
        verify: `"final"` compares the result with the original in torch, anchored in float64; `"each-pass"`
            does so after every pass, there also exported to ONNX and run on onnxruntime; `"off"` compares
            nothing.
        dynamic_shapes: As for `torch.export.export`; by default the batch is free where the model allows it.
        on_event: Called at the start and end of every stage and pass.
        max_param_growth: How many times the parameters of what it replaces a folded layer may have; replaces
            the option of that name of every pass that has it.
        cost: What is cheaper than what, `"flops"` or a `graphsurgery.cost.CostModel`; replaces the option of
            that name of every pass that has it. Among the default passes, `merge-siblings` runs only where
            this is given and finds the merged layer cheaper. `"measured"` or a
            `graphsurgery.MeasuredCost` times on onnxruntime what no count decides (mergers of
            siblings, folds with more multiplications in fewer calls, the swaps; of named passes those) and
            keeps what is clearly faster. All else is then by FLOPs.
        data: The caller's own inputs, on which every comparison is made besides: an iterable (a list, a
            DataLoader) of batches, each as `example_inputs` is; what comes behind the inputs (a label) is
            left out, and a note says so.
        data_limit: The greatest number of samples of `data` that are run; None chooses 8 to 256 by the cost
            of one. The report says how many it were.

    Returns:
        The module, its graph, and the report.

    Raises:
        CaptureError: The model or its inputs cannot be captured, or a parameter holds NaN.
        PassError: A pass is unknown, changes the signature (as `split-head` does), or wrote into a tensor in
            place.
        VerificationError: The captured or restored graph, before any pass, differs from the model; or the
            data are empty, hold NaN or do not fit the example.
        ExportError: With `verify="each-pass"`, the model cannot be exported to ONNX at all.
        ValueError: `verify` is none of the three, or "off" with data; `data_limit` is below 1.
    """
    read = data if data is None or isinstance(data, Data) else Data(data, data_limit)
    if read is not None and verify == "off":
        raise ValueError(
            "data are for the verification, which verify='off' leaves out; leave out one of them"
        )
    if verify not in ("final", "each-pass", "off"):
        raise ValueError(f"verify must be 'final', 'each-pass' or 'off', got {verify!r}")
    settings = measured_cost(cost)
    chosen = _with_option(_passes.select(passes, cost), "max_param_growth", max_param_growth)
    _keeps_signature(chosen)
    trial = None if settings is None else Trial(settings, chosen)
    chosen = trial.passes if trial is not None else _with_option(chosen, "cost", cost)
    rounds = MAX_ROUNDS if trial is None else trial.max_rounds
    names = ("capture", "passes", *(["measure"] if trial is not None else []), "restore")
    stages = _Stages(on_event, names if verify == "off" else (*names, "verify"))
    shared = _write_nothing(chosen)
    with stages("capture"):
        gm = _capture(model, example_inputs, dynamic_shapes, shared)
    proof = Proof(model, gm, on_event, read, shared=shared)
    if read is not None:
        read.check(proof.example)
    manager = PassManager(chosen, on_event=on_event, max_rounds=rounds)
    if verify == "each-pass":
        with stages.untold("verify:captured"):
            proof.check_captured()
        manager = PassManager(chosen, check=proof.check_pass, on_event=on_event, max_rounds=rounds)
    example = proof.info if verify == "each-pass" else None
    with stages("passes"):
        result = manager(gm, example)
    if trial is not None:
        with stages("measure"):
            if trial.slower(gm, result):
                manager = trial.without(manager)
                proof.pass_checks.clear()
                result = manager(gm, example)
    with stages("restore"):
        result, module = proof.handed_out(result)
    verdict: Verdict | None = None
    if verify != "off":
        with stages("verify"):
            result, module, verdict = proof.verified(manager, result, module)
            if trial is not None and trial.slower(gm, result):  # what is left where a change was undone
                manager = trial.without(manager)
                result, module = proof.handed_out(manager(gm, example))
                result, module, verdict = proof.verified(manager, result, module)
    report = build_report(gm, chosen, result, stages.seconds)
    report = replace(report, verify_mode=verify, verification=verdict, pass_checks=tuple(proof.pass_checks))
    if trial is not None:
        report = trial.told(report, result)
    return OptimizeResult(module, result.graph_module, report, proof, dynamic_shapes)


def inspect(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    passes: Passes = None,
    dynamic_shapes: Any = None,
    on_event: OnEvent | None = None,
) -> Report:
    """Find what could be folded and what refuses, by module path and source line; nothing is changed.

    Args:
        model: As for `optimize`.
        example_inputs: As for `optimize`.
        passes: As for `optimize`.
        dynamic_shapes: As for `optimize`.
        on_event: As for `optimize`.

    Returns:
        The report that `optimize(..., verify="off")` would give.

    Raises:
        CaptureError: As for `optimize`.
        PassError: As for `optimize`.
    """
    chosen = _passes.select(passes)
    stages = _Stages(on_event, ("capture", "passes"))
    with stages("capture"):
        gm = _capture(model, example_inputs, dynamic_shapes, _write_nothing(chosen))
    with stages("passes"):
        result = PassManager(chosen, on_event=on_event)(gm)
    return build_report(gm, chosen, result, stages.seconds)


class _Stages:
    """Times the stages and tells them to the callback."""

    def __init__(self, on_event: OnEvent | None, names: tuple[str, ...]) -> None:
        self.on_event = on_event
        self.names = names
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._tell("stage-start", name)
        with self.untold(name):
            yield
        self._tell("stage-done", name)

    @contextmanager
    def untold(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def _tell(self, kind: Literal["stage-start", "stage-done"], name: str) -> None:
        if self.on_event is not None:
            self.on_event(Event(kind, name, self.names.index(name), len(self.names)))


def _capture(model: Any, example_inputs: Any, dynamic_shapes: Any, shared: bool) -> fx.GraphModule:
    gm = capture(model, example_inputs, dynamic_shapes=dynamic_shapes, copy=not shared)
    for name, tensor in held_tensors(gm):
        if (tensor.is_floating_point() or tensor.is_complex()) and bool(torch.isnan(tensor.detach().sum())):
            count = int(torch.isnan(tensor).sum())
            if count:
                raise CaptureError(
                    f"{name!r} of {capture_info(gm).model_name} holds NaN in {count} of {tensor.numel()} "
                    "values, so no output can be compared; load a checkpoint that is whole."
                )
    return gm


def _write_nothing(chosen: tuple[Pass, ...]) -> bool:
    """Whether the graph may share the memory of the caller's model: passes of this package write into none.

    That one of another package does is found out when it is too late for the model.
    """
    return all(type(item) in _passes.ALL_PASSES for item in chosen)


def _keeps_signature(chosen: tuple[Pass, ...]) -> None:
    for item in chosen:
        if not item.preserves.signature:
            own = " (`split_head` does)" if item.name == "split-head" else ""
            raise PassError(
                f"pass {item.name!r} changes inputs or outputs of the model, which optimize keeps; run it in "
                f"a PassManager, or call the function that expects that{own}"
            )


def _with_option(chosen: tuple[Pass, ...], option: str, value: Any) -> tuple[Pass, ...]:
    """The passes, with `option` replaced in those that have it."""
    if value is None:
        return chosen
    return tuple(
        replace(item, **{option: value}) if option in {f.name for f in dataclasses.fields(item)} else item
        for item in chosen
    )
