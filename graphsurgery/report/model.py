"""The report: one tree of frozen dataclasses with a versioned JSON form."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

from graphsurgery.report.codec import from_plain, parsed, to_plain
from graphsurgery.rewrite.contracts import Change, Refusal
from graphsurgery.rewrite.records import PassFailure
from graphsurgery.verify.verdict import Verdict

__all__ = [
    "SCHEMA_VERSION",
    "Captured",
    "Figures",
    "Measurement",
    "OnnxFile",
    "PassCheck",
    "Report",
    "TensorSpec",
]

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of the model.

    Attributes:
        name: The model's own name of it.
        shape: Its sizes as text; a free size is a symbol, as `"s77"`.
        dtype: As `"float32"`; the Python type for what is no tensor.
    """

    name: str
    shape: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class Captured:
    """What capture found.

    Attributes:
        dynamic_batch: Whether the leading dimension of the inputs is free.
        inputs: Flat inputs.
        outputs: Flat outputs.
        notes: What a reader should know, as why the batch is static or what could not be measured.
    """

    dynamic_batch: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figures:
    """What a graph costs, per sample.

    Attributes:
        layers: Calls by kind (`conv`, `linear`, `norm`, `elementwise`, `movement`, ...).
        nodes: Calls that a runtime executes.
        parameters: Numbers in parameters and buffers that are read.
        macs: Heavy multiplications.
        flops: Floating-point operations: two per multiplication, one per element of other work.
        size_bytes: Size of the ONNX file; None where none was written.
        latency_ms: Median time of a run on onnxruntime; None where not measured.
    """

    layers: dict[str, int]
    nodes: int
    parameters: int
    macs: int
    flops: int
    size_bytes: int | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class PassCheck:
    """The check of one run of one pass (`verify="each-pass"`).

    Attributes:
        pass_name: Name of the pass.
        ok: Whether its result agrees with the original model.
        torch: Verdict on the graph in torch.
        onnx: Verdict on the graph exported to ONNX and run on onnxruntime; None where torch differed already.
    """

    pass_name: str
    ok: bool
    torch: Verdict
    onnx: Verdict | None = None


@dataclass(frozen=True)
class Measurement:
    """A candidate that was timed on onnxruntime beside what it would replace (`cost="measured"`).

    Attributes:
        pass_name: Who proposed it; `"measured"` for the last comparison, of the whole networks.
        kind: What it is, as the kind of a change.
        modules: The user's modules that it is about.
        before_ms: Median time of what is there; None where it could not be timed.
        after_ms: Median time of what was proposed.
        ratio: Median over the blocks of the second by the first.
        least: The least ratio of a block.
        most: The greatest.
        blocks: Blocks of interleaved runs.
        faster_blocks: Those in which the proposal was faster.
        kept: Whether it is in the result.
        cached: Whether the times are those of an equal candidate, or of an earlier run.
        reason: Why it could not be timed.
    """

    pass_name: str
    kind: str
    modules: tuple[str, ...]
    before_ms: float | None = None
    after_ms: float | None = None
    ratio: float | None = None
    least: float | None = None
    most: float | None = None
    blocks: int = 0
    faster_blocks: int = 0
    kept: bool = False
    cached: bool = False
    reason: str = ""


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that was written and verified.

    Attributes:
        path: Where it is.
        size_bytes: Size, external data included.
        opset: Version of the ONNX operator set.
        external_data: Whether the weights lie in a file beside it.
        verdict: Comparison with the original model; None if it was not asked for.
    """

    path: str
    size_bytes: int
    opset: int
    external_data: bool
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Report:
    """What was done to a model, what was declined and why, what it gained and how far outputs moved.

    Attributes:
        schema_version: Version of this tree; grows when a field changes.
        model: Class name of the model.
        captured: What capture found.
        passes: Names of the passes that ran, in order.
        rounds: Rounds until nothing changed any more.
        before: Figures of the captured graph.
        after: Figures of the final graph.
        changes: Rewrites made.
        refusals: Rewrites declined on the final graph.
        failures: Passes that were rolled back, whole or some of their changes.
        verify_mode: How it was verified: `"final"`, `"each-pass"` or `"off"` (not verified).
        verification: Verdict on the result against the original in torch; None when off.
        pass_checks: Checks of single passes, with `verify="each-pass"`.
        onnx: The exported file; None until there is one.
        seconds: Wall time of each stage, and of each pass under `pass:<name>`.
        torch_version: Version of torch it was made with.
        measured: What was timed to decide, with `cost="measured"`.
    """

    schema_version: int
    model: str
    captured: Captured
    passes: tuple[str, ...]
    rounds: int
    before: Figures
    after: Figures
    changes: tuple[Change, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    failures: tuple[PassFailure, ...] = ()
    verify_mode: Literal["final", "each-pass", "off"] = "off"
    verification: Verdict | None = None
    pass_checks: tuple[PassCheck, ...] = ()
    onnx: OnnxFile | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    torch_version: str = ""
    measured: tuple[Measurement, ...] = ()

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report as JSON text; non-finite floats as `"NaN"`, `"Infinity"`, `"-Infinity"`.

        Args:
            indent: As for `json.dumps`.
        """
        return json.dumps(to_plain(self), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The text is no JSON, of another schema version, or a field is missing, unknown or of
                the wrong type.
        """
        value = parsed(text)
        version = value.get("schema_version") if isinstance(value, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(f"expected a report of schema version {SCHEMA_VERSION}, got version {version!r}")
        return from_plain(cls, value)

    def __str__(self) -> str:
        """The report as plain text, 100 columns wide."""
        from graphsurgery.report.text import plain_text  # rich is loaded only to show a report

        return plain_text(self)

    def __rich__(self) -> object:
        """What `rich.print(report)` shows."""
        from graphsurgery.report.text import render  # as above

        return render(self)
