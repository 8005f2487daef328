"""ONNX files: written whole or not at all, run on onnxruntime, timed. The only place that imports onnx."""

from __future__ import annotations

from graphsurgery.export.exporter import ExportInfo, ExportResult, export_onnx, free_call
from graphsurgery.export.opset import OPSET, check_opset
from graphsurgery.export.sessions import OnnxSession, input_shapes, latency_ms, load_model, node_counts

__all__ = [
    "OPSET",
    "ExportInfo",
    "ExportResult",
    "OnnxSession",
    "check_opset",
    "export_onnx",
    "free_call",
    "input_shapes",
    "latency_ms",
    "load_model",
    "node_counts",
]
