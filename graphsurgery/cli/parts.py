"""`optimize --parts`: fold the submodules that can be captured, write each as an ONNX file of its own."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import nn

import graphsurgery as gs
from graphsurgery.cli.errors import UsageError
from graphsurgery.cli.inputs import example_inputs
from graphsurgery.cli.loading import load_model, reject_non_finite
from graphsurgery.cli.options import check_opset, with_options
from graphsurgery.cli.outputs import check_writable
from graphsurgery.cli.progress import progress
from graphsurgery.cli.run import Request
from graphsurgery.export.files import staged

__all__ = ["PartsOutcome", "optimize_parts"]


@dataclass(frozen=True)
class PartsOutcome:
    """What `optimize --parts` did.

    Attributes:
        report: The report.
        ok: Whether nothing that was verified differed.
        written: Files that were written.
    """

    report: gs.PartsReport
    ok: bool
    written: tuple[Path, ...]


def optimize_parts(request: Request, console: Console) -> PartsOutcome:
    """Load, fold the parts, verify and write them.

    Raises:
        UsageError: The request cannot be carried out as given.
        GraphSurgeryError: As raised by `gs.optimize_parts` and the export.
    """
    passes = None
    if request.passes is not None or request.options:
        passes = with_options(gs.passes.select(request.passes, request.cost), request.options)
    _check(request)
    check_opset(request.opset, request.output)
    loaded = load_model(request.model)
    if not isinstance(loaded.model, nn.Module):
        raise UsageError(f"{request.model} is captured whole already; leave out --parts.")
    inputs = example_inputs(list(request.inputs), loaded, request.model)
    reject_non_finite(loaded, request.model)
    with progress(console) as on_event, ExitStack() as files:
        result = gs.optimize_parts(
            loaded.model,
            inputs,
            passes=passes,
            verify=request.verify,
            on_event=on_event,
            cost=request.cost if request.cost == "measured" else None,
        )
        ok = result.verdict is None or result.verdict.ok
        written: list[Path] = []
        if request.output is not None:
            on_event(gs.Event("stage-start", "export to ONNX and run", 0, 1))
            done = result.export_onnx(request.output, verify=request.verify != "off", opset=request.opset)
            written = [Path(made.path) for made in done.values()]
            ok = ok and len(done) == len(result.folded)  # the notes say of the others why not
        if request.report is not None:
            text = result.report.to_json()
            files.enter_context(staged(request.report)).write_text(text + "\n", encoding="utf-8")
            written.append(request.report)
    return PartsOutcome(result.report, ok, tuple(written))


def _check(request: Request) -> None:
    """Refuse what cannot be had of a model in parts, before the work is done."""
    if request.save is not None:
        raise UsageError(
            "--save cannot be had with --parts: a model of which only parts are graphs is no exported "
            "program; name a folder by -o for the parts, or save the module in Python (torch.save)."
        )
    if request.dynamic:
        raise UsageError(
            "--dynamic cannot be had with --parts, which frees all sizes of a part that can be free."
        )
    if request.data is not None:
        raise UsageError("--data cannot be had with --parts; let the factory bring the inputs to run on.")
    folder = request.output
    if folder is not None:
        if folder.suffix == ".onnx" or (folder.exists() and not folder.is_dir()):
            raise UsageError(
                f"-o {folder} is no folder; with --parts each part is a file in the folder named."
            )
        if not folder.parent.is_dir():
            raise UsageError(f"-o {folder} cannot be written: the folder {folder.parent} does not exist.")
    check_writable({"--report": request.report})
