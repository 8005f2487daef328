"""What is left in an ONNX graph, as it is or on onnxruntime: nodes, heavy nodes, multiplications."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

HEAVY = ("Conv", "Gemm", "MatMul", "Einsum", "Attention", "Linear")
"""Parts of the names of heavy operators: Conv, ConvTranspose, FusedConv, NhwcConv, FusedGemm, FusedMatMul."""

LEVELS = {
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


@dataclass(frozen=True, order=True)
class Left:
    """Nodes left in a graph: heavy ones, then all."""

    heavy: int
    nodes: int


def is_heavy(op_type: str) -> bool:
    """Whether an operator multiplies by a matrix or slides a kernel, whatever is fused to it."""
    return any(part in op_type for part in HEAVY)


def left(model: onnx.ModelProto) -> Left:
    """Count the nodes that run; constants are none."""
    types = [node.op_type for node in model.graph.node if node.op_type != "Constant"]
    return Left(sum(map(is_heavy, types)), len(types))


def session(
    model: onnx.ModelProto, level: str | None = None, save: Path | None = None
) -> ort.InferenceSession:
    """A session with one thread at a level of optimisation (None: not any), its graph saved if asked for."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = LEVELS[level] if level else ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save is not None:
        options.optimized_model_filepath = str(save)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def optimised(model: onnx.ModelProto, level: str) -> onnx.ModelProto:
    """The graph that onnxruntime runs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        session(model, level, path)
        return onnx.load(path)


def fewest(model: onnx.ModelProto) -> tuple[Left, int]:
    """The least that is left of a graph by itself or by any level of onnxruntime, and its multiplications."""
    found, macs = [left(model)], [multiplications(model)]
    for level in LEVELS:
        graph = optimised(model, level)
        found.append(left(graph))
        if level == "basic":  # the others hold operators whose shapes onnx cannot infer
            macs.append(multiplications(graph))
    return min(found), min(macs)


def multiplications(model: onnx.ModelProto) -> int:
    """Heavy multiplications of one sample: free sizes are taken as 1, fixed batches divided out."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    batch = 1
    for value in fixed.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_param"):
                dim.dim_value = 1
            elif axis == 0:
                batch = dim.dim_value
    del fixed.graph.value_info[:]
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in inferred.graph.initializer}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    return sum(_multiplications(node, shapes) for node in inferred.graph.node) // batch


def _multiplications(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return 0
    first, second, out = (shapes.get(name, ()) for name in (node.input[0], node.input[1], node.output[0]))
    match node.op_type:
        case "Conv":
            return prod(out) * prod(second[1:])
        case "ConvTranspose":
            return prod(first) * prod(second[1:])
        case "Gemm":
            turned = any(a.name == "transA" and a.i for a in node.attribute)
            return prod(out) * first[0 if turned else 1]
        case _:
            return prod(out) * first[-1]


def run(model: onnx.ModelProto, inputs: list[np.ndarray], level: str | None = "all") -> list[np.ndarray]:
    """The outputs of a graph on onnxruntime."""
    made = session(model, level)
    names = [value.name for value in made.get_inputs()]
    return made.run(None, dict(zip(names, inputs, strict=True)))
