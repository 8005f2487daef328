"""A module as an ONNX file: exported, checked, run on onnxruntime and compared, or not written at all."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import onnx
import onnx_ir
import torch
from onnx_ir.passes.common import NameFixPass
from torch import Tensor, fx, nn

from graphsurgery.errors import ExportError
from graphsurgery.export.attention import on_four_axes
from graphsurgery.export.by_node import BY_NODE_NOTE
from graphsurgery.export.divisors import write_divisors
from graphsurgery.export.few_channels import few_channels_as_matmul
from graphsurgery.export.files import commit, data_name, staging
from graphsurgery.export.gemm import linears_as_gemm
from graphsurgery.export.keys import transpose_keys
from graphsurgery.export.masks import hide_rows
from graphsurgery.export.names import file_outputs, name_sizes
from graphsurgery.export.opset import OPSET, OPSET_BFLOAT16, check_opset, declines_bfloat16
from graphsurgery.export.proof import baseline_of, compare_file, input_names
from graphsurgery.export.sessions import load_model
from graphsurgery.export.subtraction import cast_subtrahends
from graphsurgery.values import EXAMPLE_SHAPE, named_sizes
from graphsurgery.verify import Baseline, Inputs, Verdict

__all__ = ["ExportInfo", "ExportResult", "export_onnx", "free_call"]

_LARGEST_FILE = 2**31 - 2**20
"""Protobuf ends at 2 GB; a megabyte is left for the graph itself."""

_CHATTY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


class ExportInfo(Protocol):
    """What export needs to know of a captured model; `CaptureInfo` is one."""

    @property
    def input_names(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def output_names(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def dynamic_batch(self) -> bool: ...  # noqa: D102
    @property
    def args(self) -> tuple[Any, ...]: ...  # noqa: D102
    @property
    def kwargs(self) -> dict[str, Any]: ...  # noqa: D102


@dataclass(frozen=True)
class ExportResult:
    """A written ONNX file.

    Attributes:
        path: The file.
        size_bytes: Size of the file and its external data.
        opset: Version of the default operator set.
        verdict: Comparison of onnxruntime, optimisations on, with the original module; None if it was not
            asked for. A file with values in bfloat16 is run node by node instead, and a note says so.
        external_data: Whether the weights lie in a file of their own.
        verdicts: All comparisons: optimisations off, then on.
        notes: What a reader should know besides.
    """

    path: str
    size_bytes: int
    opset: int
    verdict: Verdict | None
    external_data: bool
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()


def export_onnx(
    module: nn.Module,
    info: ExportInfo,
    path: str | os.PathLike[str],
    *,
    reference: nn.Module | None = None,
    verify: bool = True,
    baseline: Baseline | None = None,
    external_data: bool | None = None,
    opset: int | None = None,
) -> ExportResult:
    """Write `module` as an ONNX file that was checked, run on onnxruntime and compared; or write nothing.

    Args:
        module: What is exported.
        info: Names, example inputs and whether the batch is dynamic. Then the leading dimension of the inputs
            is called `batch` in the file, unless the caller's `Dim` has another name; other sizes that
            `module`, captured, leaves free are called by their `Dim`, or by their input and axis,
            `image_dim2`; an output with the name of an input, `image_out`.
        path: The file. An older one is replaced at the end, at once.
        reference: The original module, which onnxruntime's results are compared with; None takes `module`.
        verify: Whether to compare. Without it `verdict` is None, which is not "passed".
        baseline: The reference's runs, where the caller has them already; saves running it again.
        external_data: Whether weights go to a file of their own beside it; None does so above 2 GB only.
        opset: Version of the default operator set, 18 or later; None takes 20, or 22 where an operator of the
            graph takes bfloat16 only from there on.

    Raises:
        ExportError: The model cannot be translated, not into that opset, or the file cannot be written.
        VerificationError: onnx's checker declines the file, or its results differ. Nothing is left behind.
    """
    target = Path(path)
    if opset is not None:
        check_opset(opset)
    with staging(target) as folder:
        model, names, notes = _translate(module, info, opset or OPSET)
        if opset is None and declines_bfloat16(model, OPSET):
            model, names, notes = _translate(module, info, OPSET_BFLOAT16)
        size = sum(
            value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value
        )
        external = size > _LARGEST_FILE if external_data is None else external_data
        file = folder / target.name
        _write(model, file, data_name(target) if external else None)
        load_model(file)
        verdicts: tuple[Verdict, ...] = ()
        if verify:
            verdicts = compare_file(file, info, baseline or baseline_of(reference or module, info), names)
            notes += [note for note in verdicts[-1].notes if note == BY_NODE_NOTE]
        size_bytes = sum(part.stat().st_size for part in folder.iterdir())
        commit(folder, target)
    return ExportResult(
        path=str(target),
        size_bytes=size_bytes,
        opset=_opset(model),
        verdict=verdicts[-1] if verdicts else None,
        external_data=external,
        verdicts=verdicts,
        notes=tuple(notes),
    )


# -- translation ------------------------------------------------------------------------------------------


def _translate(
    module: nn.Module, info: ExportInfo, opset: int
) -> tuple[onnx_ir.Model, tuple[str, ...], list[str]]:
    """Return the model, the names that its outputs are to have (none where they are not known), and notes."""
    example = Inputs(tuple(info.args), dict(info.kwargs))
    notes: list[str] = []
    try:
        # Gradients choose another kernel of attention, so other strides, between one tracing and the next.
        with _silence(), torch.no_grad():
            program = _torch_export(module, example, info.dynamic_batch, notes)
            on_four_axes(program)
            cast_subtrahends(program)
            write_divisors(program)
            names = file_outputs(info.input_names, info.output_names, program.graph_signature.user_outputs)
            found = torch.onnx.export(
                program,
                dynamo=True,
                optimize=True,
                opset_version=opset,
                verbose=False,
                input_names=input_names(info, example),
                output_names=list(names) or None,
            )
    except ExportError as error:
        raise ExportError(f"{type(module).__name__} cannot be translated to ONNX: {error}") from error
    except Exception as error:  # the exporter, and every operator's translation, raise their own kinds
        reason = _reason(error)
        advice = next((f"; {text}" for name, text in _ADVICE.items() if name in reason), "")
        raise ExportError(
            f"{type(module).__name__} cannot be translated to ONNX: {type(error).__name__}: {reason}{advice}"
        ) from error
    if found is None:
        raise ExportError(
            f"{type(module).__name__} cannot be translated to ONNX: the exporter returned nothing"
        )
    model: onnx_ir.Model = found.model
    if _opset(model) != opset:
        raise ExportError(
            f"{type(module).__name__} cannot be written in opset {opset}: the version converter that torch's "
            f"exporter asks for it, left it at {_opset(model)}; take another opset, or none"
        )
    # Inputs and outputs have the user's names, values within those of the graph: "linear" may be both.
    hide_rows(model)
    transpose_keys(model)
    linears_as_gemm(model)
    few_channels_as_matmul(model)
    NameFixPass()(model)
    _strip_traces(model)
    given = _size_names(module, input_names(info, example) or [], getattr(info, "size_names", {}))
    if not name_sizes(model, given, batched=info.dynamic_batch) and info.dynamic_batch:
        notes.append("the batch dimension became static in export")
    return model, names, notes


def _opset(model: onnx_ir.Model) -> int:
    return int(model.opset_imports[""])


_BATCHED = 'call model.set_experts_implementation("batched_mm") before gs.optimize'
_ADVICE = {  # by what torch's exporter says
    "transformers.grouped_mm": _BATCHED,
    "Grouped matmul": _BATCHED,  # in bfloat16 transformers calls torch's own
    "only 4D query": (
        "attention of another number of axes is exported where query, key and value have three or more, and "
        "between batch and length the same fixed sizes"
    ),
}


def _reason(error: BaseException) -> str:
    """Return the innermost cause in one line; the exporter's own message is a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _torch_export(
    module: nn.Module, example: Inputs, dynamic: bool, notes: list[str]
) -> torch.export.ExportedProgram:
    """Export, with the sizes free that are: at a batch of two, one being special to torch.export."""
    wide, free = _wide(module, example, dynamic)
    kwargs = dict(wide.kwargs or {})
    if not any(free):
        return torch.export.export(module, wide.args, kwargs, strict=False)
    try:
        shapes = _shapes(module, wide, free, torch.export.Dim.DYNAMIC)
        return torch.export.export(module, wide.args, kwargs, dynamic_shapes=shapes, strict=False)
    except (RuntimeError, ValueError, torch._dynamo.exc.UserError) as error:
        notes.append(f"torch.export declined a free size ({_reason(error)}); exported with what it infers")
        shapes = _shapes(module, wide, free, torch.export.Dim.AUTO)
        return torch.export.export(module, wide.args, kwargs, dynamic_shapes=shapes, strict=False)


def free_call(module: nn.Module, info: ExportInfo) -> tuple[Inputs, Any]:
    """Return the inputs on which a module is exported with its free sizes, and their `dynamic_shapes`."""
    example = Inputs(tuple(info.args), dict(info.kwargs))
    wide, free = _wide(module, example, info.dynamic_batch)
    return wide, _shapes(module, wide, free, torch.export.Dim.DYNAMIC)


def _wide(module: nn.Module, example: Inputs, dynamic: bool) -> tuple[Inputs, list[tuple[int, ...]]]:
    """Return the example at sizes that torch.export does not take for constants, and which axes are free."""
    free = _free_axes(module, example, dynamic)
    example = _grown(module, example)
    size = next((x.shape[0] for x in example.tensors() if x.ndim), 0)
    leaves = [
        torch.cat([x, x]) if 0 in axes and size == x.shape[0] == 1 else x
        for x, axes in zip(example.leaves(), free, strict=True)
    ]
    return example.replace(leaves), free


def _free_axes(module: nn.Module, example: Inputs, dynamic: bool) -> list[tuple[int, ...]]:
    """Return which axes of each flat input are free.

    A captured graph says so by the symbolic sizes of its placeholders; of any other module it is the leading
    axis of what has as many rows as the first tensor, if the batch is free.
    """
    leaves = example.leaves()
    nodes = module.graph.find_nodes(op="placeholder") if isinstance(module, fx.GraphModule) else []
    values = [node.meta.get("val") for node in nodes]
    if len(values) == len(leaves) and all(
        isinstance(value, Tensor) and value.ndim == leaf.ndim
        for value, leaf in zip(values, leaves, strict=True)
        if isinstance(leaf, Tensor)
    ):
        shapes = [value.shape if isinstance(value, Tensor) else () for value in values]
        return [tuple(axis for axis, size in enumerate(shape) if _is_free(size)) for shape in shapes]
    rows = next((x.shape[0] for x in example.tensors() if x.ndim), 0)
    batched = [isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == rows for x in leaves]
    return [(0,) if dynamic and carrier else () for carrier in batched]


def _grown(module: nn.Module, example: Inputs) -> Inputs:
    """Repeat the example along the axes that a captured graph was traced at a larger size for.

    At the example's own size such a graph leaves one position of a map, which torch.export would take for a
    constant.
    """
    leaves = example.leaves()
    nodes = module.graph.find_nodes(op="placeholder") if isinstance(module, fx.GraphModule) else []
    for i, node in enumerate(nodes):
        for axis, size in enumerate(node.meta.get(EXAMPLE_SHAPE, ())):
            traced = node.meta["val"].shape[axis]
            hint = _hint(traced) if axis and _is_free(traced) else 0
            if leaves[i].shape[axis] == size < hint:
                again = torch.arange(hint, device=leaves[i].device) % size
                leaves[i] = leaves[i].index_select(axis, again)
    return example.replace(leaves)


def _hint(size: Any) -> int:
    return int(size.node.hint)


def _size_names(
    module: nn.Module, names: Sequence[str], symbols: Mapping[str, str]
) -> dict[tuple[str, int], str]:
    """Return what the free sizes of a captured graph's inputs are called, by the input's name and axis."""
    if not isinstance(module, fx.GraphModule):
        return {}
    nodes = module.graph.find_nodes(op="placeholder")
    tensors = [isinstance(node.meta.get("val"), Tensor) for node in nodes]
    sizes = itertools.compress(named_sizes(module.graph, symbols), tensors)
    return {(name, axis): text for name, own in zip(names, sizes, strict=False) for axis, text in own.items()}


def _is_free(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def _shapes(module: nn.Module, inputs: Inputs, free: list[tuple[int, ...]], dim: Any) -> Any:
    """Return `dynamic_shapes`; its outer keys must be forward's own argument names, in any call."""
    collection = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf, axes in zip(inputs.leaves(), free, strict=True):
        if axes:
            collection[leaf] = dict.fromkeys(axes, dim)
    kwargs = dict(inputs.kwargs or {})
    return collection.dynamic_shapes(module, inputs.args, kwargs)  # type: ignore[no-untyped-call]


def _strip_traces(model: onnx_ir.Model) -> None:
    """Take out what torch's exporter notes of the source: absolute paths and lines of code."""
    parts: list[Any] = [model, model.graph, *model.graph.inputs, *model.graph.initializers.values()]
    parts += [value.const_value for value in model.graph.initializers.values() if value.const_value]
    nodes = list(model.graph.all_nodes())
    for function in model.functions.values():
        parts += [function, *function.inputs]
        nodes += function.all_nodes()
    for node in nodes:
        parts += [node, *node.outputs]
        for attribute in node.attributes.values():
            graphs = getattr(attribute, "value", None)
            for graph in graphs if isinstance(graphs, (list, tuple)) else (graphs,):
                if isinstance(graph, onnx_ir.Graph):
                    parts += [graph, *graph.inputs, *graph.initializers.values()]
    for part in parts:
        properties = getattr(part, "metadata_props", {})
        for key in [key for key in properties if key.startswith("pkg.torch")]:
            del properties[key]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's advice off the screen: it prints, warns and logs whatever `verbose` says."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# -- writing ----------------------------------------------------------------------------------------------


def _write(model: onnx_ir.Model, file: Path, data: str | None) -> None:
    try:
        with _silence():
            if data is None:
                onnx_ir.save(model, file)
            else:
                onnx_ir.save(model, file, external_data=data, size_threshold_bytes=1024)
    except (OSError, ValueError, RuntimeError, onnx.checker.ValidationError) as error:
        raise ExportError(f"cannot write {file.name}: {_reason(error)}") from error
