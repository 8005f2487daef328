"""What `optimize_parts` hands back, and the files that can be written of it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from graphsurgery.errors import ExportError, VerificationError
from graphsurgery.export import ExportResult
from graphsurgery.pipeline import OptimizeResult
from graphsurgery.report.model import Report
from graphsurgery.report.parts import PartReport, PartsReport, PartStatus, WholeCheck

__all__ = ["Part", "PartsResult"]


@dataclass(frozen=True)
class Part:
    """A submodule and what became of it.

    Attributes:
        path: Its path in the model, `""` for the model itself.
        also: Its other paths, where one module stands at several.
        kind: Its class.
        status: `"folded"`, `"unchanged"` or `"refused"`; the latter two left the original in its place.
        code: Stable code of a refusal, `""` otherwise.
        reason: One sentence.
        calls: How often it was called in the recorded runs.
        result: What `optimize` made of it; None where it is not in the result.
        report: The report on it; None where it was not captured.
    """

    path: str
    also: tuple[str, ...]
    kind: str
    status: PartStatus
    code: str
    reason: str
    calls: int
    result: OptimizeResult | None = None
    report: Report | None = None

    def record(self) -> PartReport:
        """Return what a report holds of it."""
        return PartReport(
            self.path, self.also, self.kind, self.status, self.code, self.reason, self.calls, self.report
        )


@dataclass
class PartsResult:
    """A model of which some submodules were replaced by folded ones.

    Attributes:
        module: The result: a copy of the model, of its class, with graphs in the place of the folded parts.
            For inference: folded parts have no training mode.
        parts: Each submodule that was looked at, those that hold others before them.
        report: What was done.
    """

    module: nn.Module
    parts: tuple[Part, ...]
    report: PartsReport

    @property
    def folded(self) -> tuple[Part, ...]:
        """The parts that are in the result."""
        return tuple(part for part in self.parts if part.status == "folded")

    @property
    def verdict(self) -> WholeCheck | None:
        """The weakest comparison of the whole with the original; None where nothing was compared."""
        return min(self.report.checks, key=lambda check: (check.ok, check.decided), default=None)

    def export_onnx(
        self, folder: str | os.PathLike[str], *, verify: bool = True, opset: int | None = None
    ) -> dict[str, ExportResult]:
        """Write each folded part as an ONNX file, `backbone.onnx`, run on onnxruntime and compared.

        The model as a whole has no graph, and so no ONNX file.

        Args:
            folder: Where the files go; it is made if need be.
            verify: Whether to compare.
            opset: As for `OptimizeResult.export_onnx`.

        Returns:
            What was written, by the path of the part.

        Raises:
            ExportError: No part was folded, or none of them could be translated.
            VerificationError: None was written, and the file of one differs. Where some were not written,
                the others are, and the messages are in `report.notes`.
        """
        if not self.folded:
            raise ExportError(f"no part of {self.report.model} was folded, so there is nothing to write")
        target = Path(folder)
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExportError(f"the folder {target} cannot be made: {error.strerror or error}") from error
        done: dict[str, ExportResult] = {}
        problems: list[str] = []
        different = False
        names: set[str] = set()
        for part in self.folded:
            if part.result is None:
                continue
            name = re.sub(r"[^\w.\-]", "_", part.path) or part.kind
            while name in names:  # of paths that differ in what a file name cannot hold
                name += "_"
            names.add(name)
            try:
                done[part.path] = part.result.export_onnx(target / f"{name}.onnx", verify=verify, opset=opset)
            except (ExportError, VerificationError) as error:
                problems.append(f"{part.path or part.kind} was not written as ONNX: {error}")
                different |= isinstance(error, VerificationError)
        if not done:
            raise VerificationError(problems[0]) if different else ExportError(problems[0])
        self.report = _with_notes(self, problems)
        return done


def _with_notes(result: PartsResult, notes: list[str]) -> PartsReport:
    parts = tuple(
        replace(part.record(), report=part.result.report if part.result is not None else part.report)
        for part in result.parts
    )
    return replace(result.report, parts=parts, notes=(*result.report.notes, *notes))
