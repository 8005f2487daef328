"""Which version of ONNX's default operator set a file is written in."""

from __future__ import annotations

import onnx
import onnx_ir

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
    most = onnx.defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int) or not LEAST <= opset <= most:
        raise ExportError(
            f"opset {opset!r} cannot be written; expected a number from {LEAST}, the least torch exports, "
            f"to {most}, the latest that the installed onnx knows"
        )


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
