"""Which version of ONNX's default operator set a file is written in."""

from __future__ import annotations

from functools import cache

import onnx
import onnx_ir
import onnxruntime
from onnx import TensorProto, helper

from graphsurgery.errors import ExportError

__all__ = ["LEAST", "OPSET", "OPSET_BFLOAT16", "check_opset", "declines_bfloat16"]

OPSET = 20
"""Opset of the files.

The least one in which every layer that passes leave whole is one node (LayerNormalization came with 17, Gelu
and GridSample in three dimensions with 20), and what torch's exporter emits by itself: another number sends
the graph through onnx's version converter, which knows fewer operators than the exporter.
"""

OPSET_BFLOAT16 = 22
"""Opset of files whose operators take bfloat16 no earlier: convolutions and pools came to it with 22."""

LEAST = 18
"""The least that torch's exporter writes; asked for less it writes this."""


def check_opset(opset: int) -> None:
    """See that an opset can be written.

    Raises:
        ExportError: It cannot.
    """
    most = _latest()
    if isinstance(opset, bool) or not isinstance(opset, int) or not LEAST <= opset <= most:
        raise ExportError(
            f"opset {opset!r} cannot be written; expected a number from {LEAST}, the least torch exports, "
            f"to {most}, the latest that the installed onnx and onnxruntime take"
        )


@cache
def _latest() -> int:
    """The latest opset of which both packages take a graph; onnxruntime tells it by no other way."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "graph", [value], [out])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for opset in range(onnx.defs.onnx_opset_version(), OPSET, -1):
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        try:
            onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception:  # noqa: BLE001 - of a class of its own for each code
            continue
        return opset
    return OPSET


def declines_bfloat16(model: onnx_ir.Model, opset: int) -> bool:
    """Return whether an operator of the graph reads bfloat16, and does not take it in this opset."""
    for node in model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx"):
            continue
        try:
            formal = onnx.defs.get_schema(node.op_type, opset).inputs
        except onnx.defs.SchemaError:
            continue
        for position, value in enumerate(node.inputs):
            if value is None or value.dtype != onnx_ir.DataType.BFLOAT16 or not formal:
                continue
            if "tensor(bfloat16)" not in formal[min(position, len(formal) - 1)].types:
                return True
    return False
