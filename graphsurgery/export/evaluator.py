"""An ONNX graph on the reference evaluator, in its own dtypes or in float64, or with its constants moved."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from graphsurgery.errors import GraphSurgeryError, RuntimeUnavailableError, VerificationError
from graphsurgery.export.sessions import OnnxSession, read_model

__all__ = ["Evaluator", "macs", "nudged_session"]

_LOW = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
_NUMPY_EPS = {TensorProto.FLOAT: 2.0**-23, TensorProto.FLOAT16: 2.0**-10, TensorProto.DOUBLE: 2.0**-52}
_LARGEST_PROTO = 2**31 - 1
_MAX_MACS = 2e8
"""Multiplications up to which the reference evaluator, which is plain numpy, answers within seconds."""
_SHAPE_NUMBERS = 64
"""Numbers in a constant that may be a shape; what is larger is left out where only shapes are asked for."""


class Evaluator:
    """An ONNX graph on the reference evaluator of the `onnx` package.

    Args:
        model: The graph.
        double: Whether every float of it is turned into float64.

    Attributes:
        inputs: Dtype and shape of each input, as in `OnnxSession`; no dtype in float64.
    """

    def __init__(self, model: onnx.ModelProto, *, double: bool) -> None:
        self._double = double
        self._evaluator = ReferenceEvaluator(_in_float64(model) if double else model)
        self._outputs = tuple(value.name for value in model.graph.output)
        initializers = {tensor.name for tensor in model.graph.initializer}
        self.inputs: dict[str, tuple[torch.dtype | None, tuple[int | str | None, ...]]] = {
            value.name: (None, _shape(value)) for value in model.graph.input if value.name not in initializers
        }

    @classmethod
    def of_file(cls, path: str | os.PathLike[str], *, double: bool) -> Evaluator:
        """Return the evaluator of a file.

        Raises:
            RuntimeUnavailableError: The graph is too large for plain numpy, or uses what it does not know.
            VerificationError: The file cannot be read.
        """
        model = read_model(path)
        cost = macs(model)
        if cost > _MAX_MACS:
            many = "an unknown number of" if math.isinf(cost) else f"{cost:.2g}"
            raise RuntimeUnavailableError(
                f"the graph takes {many} multiplications a sample, more than the {_MAX_MACS:.0e} that the "
                "ONNX reference evaluator, which is plain numpy, does within seconds"
            )
        try:
            return cls(model, double=double)
        except Exception as error:  # operators that it does not know raise several kinds
            raise RuntimeUnavailableError(
                f"the ONNX reference evaluator cannot load the graph: {type(error).__name__}: {error}"
            ) from error

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs by name; floats in float64 if the graph was turned into it.

        Raises:
            VerificationError: The evaluator failed.
        """
        try:
            given = {name: _promote(value) if self._double else value for name, value in feeds.items()}
            with np.errstate(all="ignore"):
                found = self._evaluator.run(None, {name: x.cpu().numpy() for name, x in given.items()})
            pairs = zip(self._outputs, found, strict=True)
            return {name: torch.from_numpy(np.array(value)) for name, value in pairs}
        except Exception as error:  # plain numpy code for each operator, which raises anything
            kind = " in float64" if self._double else ""
            raise VerificationError(f"the ONNX reference evaluator failed{kind}: {error}") from error


def _promote(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str | None, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims)


def _in_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with constants, casts and declared types of lower floats turned into float64."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    graphs: list[Any] = [copied.graph, *copied.functions]
    while graphs:
        graph = graphs.pop()
        for value in (*getattr(graph, "input", ()), *getattr(graph, "output", ()), *graph.value_info):
            if not isinstance(value, str) and value.type.tensor_type.elem_type in _LOW:
                value.type.tensor_type.elem_type = TensorProto.DOUBLE
        for tensor in getattr(graph, "initializer", ()):
            _tensor_to_float64(tensor)
        for node in graph.node:
            graphs += _node_to_float64(node)
    return copied


def _tensor_to_float64(tensor: TensorProto) -> None:
    if tensor.data_type in _LOW:
        array = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _node_to_float64(node: onnx.NodeProto) -> list[Any]:
    """Turn the dtypes that a node names into float64; return its subgraphs."""
    subgraphs: list[Any] = []
    for attribute in node.attribute:
        if attribute.HasField("t"):
            _tensor_to_float64(attribute.t)
        # not `stash_type`: the evaluator computes a norm in its values' dtype, and takes no other number
        if attribute.name in {"to", "dtype", "output_dtype"} and attribute.i in _LOW:
            attribute.i = TensorProto.DOUBLE
        subgraphs += [attribute.g] if attribute.HasField("g") else []
        subgraphs += list(attribute.graphs)
    if node.op_type == "Constant":
        for attribute in node.attribute:
            if attribute.name in {"value_float", "value_floats"}:
                floats = attribute.f if attribute.name == "value_float" else list(attribute.floats)
                array = np.asarray(floats, dtype=np.float64)
                attribute.CopyFrom(onnx.helper.make_attribute("value", numpy_helper.from_array(array)))
    return subgraphs


def macs(model: onnx.ModelProto) -> float:
    """Return about how many multiplications one run takes: convolutions and products with a constant.

    A free dimension counts as one; what shape inference cannot tell counts as infinite.
    """
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            sizes[node.output[0]] = tuple(node.attribute[0].t.dims)
    try:
        inferred = onnx.shape_inference.infer_shapes(_of_one(model), data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return math.inf
    shapes = {v.name: _shape(v) for v in (*inferred.graph.value_info, *inferred.graph.output)}
    total = 0.0
    for node in model.graph.node:
        if node.op_type not in {"Conv", "ConvTranspose", "Gemm", "MatMul"}:
            continue
        weight = next((sizes[name] for name in node.input[1:2] if name in sizes), None)
        shape = shapes.get(node.output[0])
        if weight is None:
            continue
        if shape is None:
            return math.inf
        positions = shape[2:] if node.op_type.startswith("Conv") else shape[:-1]
        total += math.prod(weight) * math.prod(size for size in positions if isinstance(size, int))
    return total


def _of_one(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without its large weights, for a batch of one: a view leaves a free size unknown."""
    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        graph.input.append(value)
        sizes = graph.input[-1].type.tensor_type.shape.dim
        if value.name not in constants and sizes and not sizes[0].HasField("dim_value"):
            sizes[0].dim_value = 1
    for value in model.graph.output:
        graph.output.append(value)
        graph.output[-1].type.tensor_type.ClearField("shape")
    known = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _SHAPE_NUMBERS:
            graph.initializer.append(tensor)
        elif tensor.name not in known:
            made = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(made)
    return light


def nudged_session(path: str | os.PathLike[str], seed: int, ulps: float) -> OnnxSession | None:
    """Return a session of the file with every float constant moved by `ulps` units; None above 2 GB."""
    model = read_model(path)
    generator = np.random.default_rng(seed)
    for tensor in model.graph.initializer:
        eps = _NUMPY_EPS.get(tensor.data_type)
        if eps is None or math.prod(tensor.dims) == 0:
            continue
        array = numpy_helper.to_array(tensor)
        drawn = generator.random(array.shape) - 0.5
        step = np.sign(drawn) * (0.5 + np.abs(drawn)) * (eps * ulps)
        moved = (array.astype(np.float64) * (1.0 + step)).astype(array.dtype)
        tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
    if model.ByteSize() > _LARGEST_PROTO:
        return None
    try:
        return OnnxSession(model.SerializeToString(), optimised=False)
    except GraphSurgeryError:
        return None
