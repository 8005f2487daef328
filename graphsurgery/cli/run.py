"""What the commands do, apart from printing the result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from torch import nn

import graphsurgery as gs
from graphsurgery.cli.data import read_data
from graphsurgery.cli.dynamic import free_sizes
from graphsurgery.cli.errors import UsageError, first_line, nearest
from graphsurgery.cli.inputs import example_inputs
from graphsurgery.cli.loading import LoadedModel, load_model, model_file, reject_non_finite
from graphsurgery.cli.options import check_opset, with_options
from graphsurgery.cli.outputs import check_writable, staged_model
from graphsurgery.cli.progress import progress
from graphsurgery.export.files import staged
from graphsurgery.report.codec import to_plain

__all__ = [
    "Compared",
    "Outcome",
    "Request",
    "describe_passes",
    "inspect",
    "optimize",
    "split_head",
    "verdict_json",
    "verify",
]


@dataclass(frozen=True)
class Request:
    """What `optimize` was asked for.

    Attributes:
        model: MODEL as given.
        inputs: The `--input` options.
        passes: Names of passes; None for the default ones.
        verify: When to verify.
        output: Where the ONNX file goes.
        save: Where the exported program goes.
        report: Where the JSON report goes.
        options: The `--option` options.
        data: The user's own data, an `.npz` file or a folder of `.npy` files.
        data_limit: How many samples of it are run at most.
        opset: Opset of the ONNX file; None leaves it to the export.
        cost: What decides: counts, or times where they leave doubt.
        dynamic: The `--dynamic` options.
    """

    model: str
    inputs: tuple[str, ...]
    passes: tuple[str, ...] | None
    verify: Literal["final", "each-pass", "off"]
    output: Path | None
    save: Path | None
    report: Path | None
    options: tuple[str, ...] = ()
    data: Path | None = None
    data_limit: int | None = None
    opset: int | None = None
    cost: Literal["flops", "measured"] = "flops"
    dynamic: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What `optimize` did.

    Attributes:
        report: The report.
        ok: Whether nothing that was verified differed.
        written: Files that were written.
    """

    report: gs.Report
    ok: bool
    written: tuple[Path, ...]


def optimize(request: Request, console: Console) -> Outcome:
    """Load, fold, verify and write; the files appear when all of them were made, else none does.

    A measurement that fails is a note of the report, and keeps no file back.

    Raises:
        UsageError: The request cannot be carried out as given.
        GraphSurgeryError: As raised by the pipeline.
    """
    # an unknown name or option is said before any work is done
    passes = with_options(gs.passes.select(request.passes, request.cost), request.options)
    outputs = {"-o": request.output, "--save": request.save, "--report": request.report}
    check_writable(outputs, {"MODEL": model_file(request.model), "--data": request.data})
    check_opset(request.opset, request.output)
    loaded, inputs = _load(request.model, list(request.inputs))
    if request.data is not None and request.verify == "off":
        raise UsageError("--data is for the verification, which --verify off leaves out; leave out one.")
    data = _data(request.data, request.data_limit, inputs, loaded, request.model)
    shapes = free_sizes(request.dynamic, inputs, loaded, request.model)
    with progress(console) as on_event:
        result = gs.optimize(
            loaded.model,
            inputs,
            passes=passes,
            verify=request.verify,
            dynamic_shapes=shapes,
            on_event=on_event,
            data=data,
            data_limit=request.data_limit,
            cost=request.cost if request.cost == "measured" else None,  # passes have their own of the other
        )
        ok = _verified(result.report)
        if not ok:
            return Outcome(result.report, False, ())
        with ExitStack() as files:  # renamed when the block has ended well, the report last
            report = None if request.report is None else files.enter_context(staged(request.report))
            if request.save is not None:
                on_event(gs.Event("stage-start", "write and load the exported program", 0, 1))
                result.save(files.enter_context(staged(request.save)), verify=request.verify != "off")
            if request.output is not None:
                on_event(gs.Event("stage-start", "export to ONNX, run and measure", 0, 1))
                model = files.enter_context(staged_model(request.output))
                result.export_onnx(model, verify=request.verify != "off", measure=True, opset=request.opset)
                if result.report.onnx is not None:
                    onnx = dataclasses.replace(result.report.onnx, path=str(request.output))
                    result.report = dataclasses.replace(result.report, onnx=onnx)
            if report is not None:
                report.write_text(result.report.to_json() + "\n", encoding="utf-8")
    return Outcome(result.report, True, tuple(path for path in outputs.values() if path is not None))


def split_head(
    model: str,
    inputs: list[str],
    head: str | None,
    keep_head: bool,
    output: Path | None,
    console: Console,
    *,
    opset: int | None = None,
    dynamic: Sequence[str] = (),
) -> Outcome:
    """Split the head of a model, verify the result, and write it.

    Raises:
        UsageError: The request cannot be carried out as given.
        GraphSurgeryError: As raised by `gs.split_head` and the export.
    """
    check_writable({"-o": output}, {"MODEL": model_file(model)})
    check_opset(opset, output)
    loaded, examples = _load(model, inputs)
    shapes = free_sizes(dynamic, examples, loaded, model)
    with console.status("splitting") if console.is_terminal else ExitStack():
        result = gs.split_head(loaded.model, examples, head=head, keep_head=keep_head, dynamic_shapes=shapes)
        if output is None:
            return Outcome(result.report, True, ())
        with staged_model(output) as file:
            result.export_onnx(file, opset=opset)
    if result.report.onnx is not None:
        onnx = dataclasses.replace(result.report.onnx, path=str(output))
        result.report = dataclasses.replace(result.report, onnx=onnx)
    return Outcome(result.report, True, (output,))


def inspect(model: str, inputs: list[str], console: Console, *, dynamic: Sequence[str] = ()) -> gs.Report:
    """Find what could be folded and what refuses.

    Raises:
        UsageError: The model or its inputs cannot be used.
        GraphSurgeryError: As raised by the pipeline.
    """
    loaded, examples = _load(model, inputs)
    shapes = free_sizes(dynamic, examples, loaded, model)
    with progress(console) as on_event:
        return gs.inspect(loaded.model, examples, dynamic_shapes=shapes, on_event=on_event)


@dataclass(frozen=True)
class Compared:
    """What `verify` found.

    Attributes:
        verdict: The verdict.
        location: Where the programs begin to differ; None where they do not, or it was not looked for.
        unlocated: Why the place of a difference was looked for in vain; "" otherwise.
    """

    verdict: gs.Verdict
    location: gs.Localization | None = None
    unlocated: str = ""


def verify(
    reference: str,
    candidate: str,
    inputs: list[str],
    runtimes: list[str],
    console: Console,
    *,
    locate: bool = True,
    dynamic_batch: bool = False,
    dynamic: Sequence[str] = (),
    data: Path | None = None,
    data_limit: int | None = None,
) -> Compared:
    """Compare two programs, the one that is judged on the runtimes named, if any; locate a difference.

    Raises:
        UsageError: A side or its inputs cannot be used.
        GraphSurgeryError: As raised by the verification.
    """
    for name in runtimes:
        if name not in gs.RUNTIMES:
            hint = nearest(name, gs.RUNTIMES) or f"; expected one of {', '.join(gs.RUNTIMES)}."
            raise UsageError(f"--runtime '{name}' is unknown{hint}")
    sides = [_side(reference), _side(candidate)]
    models = [side for side in sides if isinstance(side, LoadedModel)]
    bringing = [side for side in models if side.example_inputs is not None]
    examples = example_inputs(inputs, next(iter(bringing or models), None), reference)
    if examples is None:
        raise UsageError(
            f"{reference} brings positional and keyword inputs at once; give all of them by --input."
        )
    own = _data(data, data_limit, examples, next(iter(bringing or models), sides[0]), reference)
    options: dict[str, Any] = {"dynamic_batch": dynamic_batch, "data": own, "data_limit": data_limit}
    with console.status("comparing") if console.is_terminal else ExitStack():
        try:
            programs = _freed(sides[0], examples, dynamic, reference), _program(sides[1])
            verdict = gs.verify(*programs, examples, runtimes=runtimes or None, **options)
        except (
            gs.VerificationError
        ) as error:  # a difference is returned; raised is what could not be compared
            raise UsageError(str(error)) from error
        if verdict.ok or not locate:
            return Compared(verdict)
        try:
            found = gs.localize(*programs, examples, runtimes=runtimes, **options)
            return Compared(verdict, found)
        except Exception as error:  # noqa: BLE001 - the verdict stands, whatever keeps its place from being found
            return Compared(verdict, unlocated=first_line(error))


def describe_passes() -> list[dict[str, Any]]:
    """Name, summary, default, what is preserved and options of every pass that can be named."""
    return [
        {
            "name": name,
            "summary": item.summary,
            "default": item.default,
            "preserves": dataclasses.asdict(item.preserves),
            "options": {field.name: str(field.type) for field in dataclasses.fields(item)},
        }
        for name, item in gs.passes.available().items()
    ]


def verdict_json(found: Compared) -> str:
    """The verdict as JSON text, with the place of a difference under "location"."""
    location = None if found.location is None else to_plain(found.location)
    plain = {**to_plain(found.verdict), "location": location, "unlocated": found.unlocated}
    return json.dumps(plain, indent=2, allow_nan=False)


def _load(spec: str, inputs: list[str]) -> tuple[LoadedModel, Any]:
    loaded = load_model(spec)
    examples = example_inputs(inputs, loaded, spec)
    reject_non_finite(loaded, spec)
    return loaded, examples


def _data(path: Path | None, limit: int | None, examples: Any, side: LoadedModel | Path, spec: str) -> Any:
    """The batches in `--data`; None where none are given."""
    if path is None:
        if limit is not None:
            raise UsageError("--data-limit is for --data, which is not given; give both, or leave it out.")
        return None
    if examples is None:
        raise UsageError(
            f"{spec} brings positional and keyword inputs at once, which --data cannot name; give "
            "all of them by --input."
        )
    return read_data(path, examples, side)


def _side(spec: str) -> LoadedModel | Path:
    """One side of `verify`: an ONNX file or a model."""
    if not spec.endswith(".onnx"):
        return load_model(spec)
    if not Path(spec).is_file():
        raise UsageError(f"{spec} does not exist or is no file.")
    return Path(spec)


def _program(side: LoadedModel | Path) -> Any:
    """What `gs.verify` takes for a side."""
    if isinstance(side, Path):
        return side
    return side.model if isinstance(side.model, nn.Module) else side.model.module()


def _freed(side: LoadedModel | Path, examples: Any, dynamic: Sequence[str], spec: str) -> Any:
    """What `gs.verify` takes for the reference, captured with free sizes where they are given."""
    if not dynamic:
        return _program(side)
    if isinstance(side, Path):
        raise UsageError(f"--dynamic is for a model that is captured, and {spec} is an ONNX file.")
    return gs.capture(side.model, examples, dynamic_shapes=free_sizes(dynamic, examples, side, spec))


def _verified(report: gs.Report) -> bool:
    """Whether no comparison found a difference; a pass that was rolled back is not in the result."""
    return report.verification is None or report.verification.ok
