"""What `optimize` hands back, and the files that can be written of it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from graphsurgery.capture.inputs import Inputs as CallInputs
from graphsurgery.capture.program import export_model, quiet
from graphsurgery.errors import CaptureError, ExportError, VerificationError
from graphsurgery.export import ExportResult, export_onnx, free_call, latency_ms
from graphsurgery.export.files import staged
from graphsurgery.pipeline.proof import Proof
from graphsurgery.report import OnnxFile, Report
from graphsurgery.report.build import figures
from graphsurgery.restore import restore
from graphsurgery.values import EXAMPLE_SHAPE, is_tensor

__all__ = ["OptimizeResult"]


@dataclass
class OptimizeResult:
    """A model after the operation.

    Attributes:
        module: The result: a module with the original's signature and state-dict names.
        graph_module: The same as the graph that passes see.
        report: What was done; `export_onnx` adds to it.
    """

    module: nn.Module
    graph_module: fx.GraphModule
    report: Report
    _proof: Proof = field(repr=False)
    _dynamic_shapes: Any = field(default=None, repr=False)

    @property
    def original(self) -> nn.Module | ExportedProgram:
        """The model as it was given."""
        return self._proof.original

    def count_at(self, shapes: Sequence[Sequence[int]]) -> None:
        """Count the figures of the report for inputs of other sizes than the example's, where these are free.

        Args:
            shapes: Sizes of the flat tensor inputs, in order.
        """
        before, after = (
            figures(gm, dict(zip((node.name for node in _tensor_inputs(gm)), shapes, strict=True)))
            for gm in (self._proof.captured, self.graph_module)
        )
        self.report = replace(self.report, before=before, after=after)

    def export_onnx(
        self,
        path: str | os.PathLike[str],
        *,
        verify: bool = True,
        measure: bool = False,
        external_data: bool | None = None,
        opset: int | None = None,
    ) -> ExportResult:
        """Write the result as an ONNX file that was run on onnxruntime and compared with the original model.

        Args:
            path: The file; nothing is left there when it cannot be written or differs.
            verify: Whether to compare.
            measure: Whether to write the original too (to a temporary file), and put size and latency of both
                into the report. What cannot be measured is said in a note there and is no error.
            external_data: Whether weights go to a file of their own beside it; None does so above 2 GB only.
            opset: Version of the default operator set, 18 or later; None takes 20, or 22 where an operator of
                the graph takes bfloat16 only from there on.

        Raises:
            ExportError: The result cannot be translated, or the file not written.
            VerificationError: What onnxruntime computes differs from the original model.
        """
        start = time.perf_counter()
        baseline = self._proof.baseline_of(self.graph_module) if verify else None
        done = export_onnx(
            self.module,
            self._proof.info,
            path,
            verify=verify,
            baseline=baseline,
            external_data=external_data,
            opset=opset,
        )
        record = OnnxFile(done.path, done.size_bytes, done.opset, done.external_data, done.verdict)
        after = replace(self.report.after, size_bytes=done.size_bytes)
        seconds = {**self.report.seconds, "export": time.perf_counter() - start}
        self.report = replace(self.report, onnx=record, after=after, seconds=seconds)
        if measure:
            self._measure(done.path, done.opset)
        return done

    def _measure(self, path: str, opset: int) -> None:
        """Put size and latency of the original's and the result's ONNX file into the report, or why not."""
        start = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / "original.onnx"
                module = restore(self._proof.captured)
                original = export_onnx(module, self._proof.info, copy, verify=False, opset=opset)
                before, after = latency_ms([original.path, path], self._proof.example.tensors())
        except Exception as error:  # noqa: BLE001 - the file is good whatever keeps it from being timed
            note = f"size and latency were not compared with the original's: {error or type(error).__name__}"
            captured = self.report.captured
            self.report = replace(self.report, captured=replace(captured, notes=(*captured.notes, note)))
            return
        self.report = replace(
            self.report,
            before=replace(self.report.before, size_bytes=original.size_bytes, latency_ms=before),
            after=replace(self.report.after, latency_ms=after),
            seconds={**self.report.seconds, "measure": time.perf_counter() - start},
        )

    def save(self, path: str | os.PathLike[str], *, verify: bool = True) -> Path:
        """Write the result as an exported program (`.pt2`), which `torch.export.load` reads.

        Args:
            path: The file; an older one is replaced at the end, at once.
            verify: Whether to load it again and compare it with the original model.

        Raises:
            ExportError: The result cannot be exported, or the file not written.
            VerificationError: What was loaded differs from the original model; nothing is left there.
        """
        target = Path(path)
        info = self._proof.info
        try:
            inputs, shapes = CallInputs(info.args, dict(info.kwargs)), self._dynamic_shapes
            freed = any(EXAMPLE_SHAPE in node.meta for node in self.graph_module.graph.nodes)
            if freed:
                wide, shapes = free_call(self.module, info)  # a pass has freed sizes
                inputs = CallInputs(wide.args, dict(wide.kwargs or {}))
            exported = export_model(self.module, inputs, shapes)
            if freed:
                _accept(exported.program, info.args, info.kwargs)
            with staged(target) as temporary, quiet():
                torch.export.save(exported.program, temporary)
                if verify:
                    self._compare_saved(temporary, target)
        except (CaptureError, OSError, RuntimeError) as error:
            raise ExportError(f"{target} was not written: {str(error).splitlines()[0]}") from error
        return target

    def _compare_saved(self, file: Path, target: Path) -> None:
        baseline = self._proof.baseline_of(self.graph_module)
        try:
            baseline.compare(torch.export.load(file).module()).raise_if_failed()
        except VerificationError as error:
            raise VerificationError(
                f"{target} is not kept, as what is loaded from it differs: {error}"
            ) from error


def _tensor_inputs(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder" and is_tensor(node)]


def _accept(program: ExportedProgram, args: Any, kwargs: Any) -> None:
    """Let an exported program take the example's own sizes, and all above them.

    It was traced at larger ones, where a map has more than one position; torch writes that down as a
    condition, though every call of the program runs at one position as well.
    """
    example = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, torch.Tensor)]
    names = set(program.graph_signature.user_inputs)
    traced = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder") if node.name in names]
    inputs = [value for value in traced if isinstance(value, torch.Tensor)]
    for value, given in zip(inputs, example, strict=True):
        sizes: tuple[Any, ...] = tuple(value.shape)
        for axis, size in enumerate(sizes):
            if axis and not isinstance(size, int):
                program.range_constraints[size.node.expr] = ValueRanges(given.shape[axis], int_oo)
    program._guards_code = []
