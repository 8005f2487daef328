"""An exported file against the module that it was made of, run by what can run it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from graphsurgery.errors import RuntimeUnavailableError, VerificationError
from graphsurgery.export.by_node import BY_NODE_NOTE, NodeByNode, holds_bfloat16
from graphsurgery.verify import Baseline, Inputs, OnnxRunner, Verdict
from graphsurgery.verify.runners import OnnxVariant

if TYPE_CHECKING:
    from graphsurgery.export.exporter import ExportInfo

__all__ = ["baseline_of", "compare_file", "input_names"]


def input_names(info: ExportInfo, example: Inputs) -> list[str] | None:
    """Return the names of the tensors among the inputs; None if they cannot be told apart."""
    leaves, names = example.leaves(), list(info.input_names)
    if len(names) == len(leaves):
        return [name for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor)]
    return names if len(names) == len(example.tensors()) else None


def baseline_of(reference: nn.Module, info: ExportInfo) -> Baseline:
    """Return the runs of the reference that a file is compared with."""
    example = Inputs(tuple(info.args), dict(info.kwargs))
    return Baseline(
        reference,
        example,
        dynamic_batch=info.dynamic_batch,
        refused_batches=getattr(info, "refused_batches", ()),
        batch_axes=getattr(info, "batch_axes", None),
    )


def compare_file(
    file: Path, info: ExportInfo, baseline: Baseline, outputs: tuple[str, ...] = ()
) -> tuple[Verdict, ...]:
    """Compare onnxruntime, optimisations off and on, with the reference; in bfloat16 node by node.

    Args:
        file: The file.
        info: What it was made with.
        baseline: The reference's runs.
        outputs: What its outputs are to be called; none where that is not known.

    Raises:
        VerificationError: They differ, in their names too, or onnxruntime cannot run the file.
    """
    verdicts = []
    example = Inputs(tuple(info.args), dict(info.kwargs))
    if holds_bfloat16(file):
        return (_compare_by_node(file, baseline, input_names(info, example), outputs),)
    for optimised in (False, True):
        name = f"onnxruntime {file.name} ({'optimised' if optimised else 'not optimised'})"
        try:
            runner = OnnxRunner(file, optimised=optimised, input_names=input_names(info, example), name=name)
        except RuntimeUnavailableError as error:
            raise VerificationError(
                f"{file.name} could not be verified and is not kept ({error}); verify=False keeps it so"
            ) from error
        _check_output_names(file, runner.output_names, outputs)
        try:
            verdicts.append(baseline.compare(runner).raise_if_failed())
        except VerificationError as error:
            if not baseline.double:
                raise
            raise VerificationError(
                f"{error}; the model is float64, and attributes of an ONNX file (the eps of a norm) are "
                "float32 by the standard: where that is the difference, export the model in float32"
            ) from error
    return tuple(verdicts)


def _compare_by_node(
    file: Path, baseline: Baseline, names: list[str] | None, outputs: tuple[str, ...]
) -> Verdict:
    """Compare a file with values in bfloat16, for which onnxruntime has few kernels on the CPU.

    Raises:
        VerificationError: They differ, or the nodes cannot be run either.
    """
    try:
        graph = NodeByNode(file)
        _check_output_names(file, graph.output_names, outputs)
        title = f"onnxruntime {file.name} (node by node, bfloat16 computed in float32 and rounded)"
        found = baseline.compare(OnnxVariant(title, graph, tuple(names) if names else None))
    except RuntimeUnavailableError as error:
        raise VerificationError(
            f"{file.name} could not be verified and is not kept ({error}); verify=False keeps it so"
        ) from error
    return dataclasses.replace(found, notes=(BY_NODE_NOTE, *found.notes)).raise_if_failed()


def _check_output_names(file: Path, names: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    if wanted and names != wanted:
        raise VerificationError(f"{file.name} calls its outputs {names}, expected {wanted}")
