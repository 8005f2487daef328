"""An ONNX graph on onnxruntime node by node, for dtypes that it has no kernels for on the CPU.

A bfloat16 operator takes its operands exactly, computes in float32 and rounds what it gives: that is done
here with float32 kernels, one node at a time, so that no more than the weights of one layer are widened.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from torch import Tensor

from graphsurgery.errors import GraphSurgeryError, RuntimeUnavailableError, VerificationError
from graphsurgery.export.sessions import OnnxSession, read_model

__all__ = ["BY_NODE_NOTE", "NodeByNode", "holds_bfloat16"]

BY_NODE_NOTE = (
    "the file as a whole was not run: onnxruntime has few bfloat16 kernels on the CPU; its nodes were run "
    "one by one by float32 kernels, their results rounded to bfloat16, and the outputs compared"
)
"""What verdict and result say of a file in bfloat16."""

_BF16 = TensorProto.BFLOAT16
_SMALL = 2**16  # bytes; shapes and axes, which inference reads, take less, and no large weight is read


def holds_bfloat16(path: str | os.PathLike[str]) -> bool:
    """Return whether a value of an ONNX file is in bfloat16, as far as the file says.

    Raises:
        VerificationError: The file cannot be read.
    """
    model = read_model(path, weights=False)
    declared = _declared(model)
    if any(name not in declared for node in model.graph.node for name in node.output if name):
        model = _inferred(model, Path(path), strict=False)
    return any(kind == _BF16 for kind in _kinds(model).values())


class NodeByNode:
    """An ONNX file whose nodes are run one after the other, bfloat16 as float32 that is rounded.

    Weights are read from the file when a node needs them.

    Args:
        path: The file; its external data lie beside it.

    Attributes:
        inputs: Dtype and shape of each input, as in `OnnxSession`.
        output_names: Names of its outputs.

    Raises:
        RuntimeUnavailableError: The graph holds other graphs (If, Loop) or functions, or a node of whose
            outputs nothing says the type, so that nothing says whether they are rounded.
        VerificationError: The file cannot be read, or the types or shapes in it contradict the operators:
            onnxruntime refuses such a file, and nodes run one by one in float32 would hide it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._folder = str(Path(path).parent)
        self._model = read_model(path, weights=False)
        graph = self._model.graph
        nested = [
            node.op_type for node in graph.node if any(a.HasField("g") or a.graphs for a in node.attribute)
        ]
        if nested or self._model.functions:
            what = f"the operator {nested[0]}" if nested else "functions"
            raise RuntimeUnavailableError(f"the graph holds {what}, which cannot be run node by node")
        _check_names(graph, path)
        self._kinds = _kinds(_inferred(self._model, Path(path), strict=True))
        for node in graph.node:
            untyped = [name for name in node.output if name and name not in self._kinds]
            if untyped:
                raise RuntimeUnavailableError(
                    f"{path} does not say of which type {untyped[0]!r} is, an output of {node.op_type}; "
                    f"a node of unknown type cannot be run by itself"
                )
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        # One for all nodes that do the same: a session takes about a megabyte, and many times longer to make
        # than to run.
        self._sessions: dict[tuple[bytes, tuple[torch.dtype, ...]], OnnxSession] = {}
        self.output_names = tuple(value.name for value in graph.output)
        self.inputs: dict[str, tuple[torch.dtype | None, tuple[int | str | None, ...]]] = {
            value.name: (_torch_dtype(value.type.tensor_type.elem_type), _shape(value))
            for value in graph.input
            if value.name not in self._weights
        }

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs by name, in the dtypes that the file declares.

        Args:
            feeds: Tensors by input name.

        Raises:
            RuntimeUnavailableError: onnxruntime has no kernel for a node in float32 either.
            VerificationError: A node fails.
        """
        nodes = self._model.graph.node
        last = {name: place for place, node in enumerate(nodes) for name in node.input}
        values = {name: tensor.detach().cpu() for name, tensor in feeds.items()}
        for place, node in enumerate(nodes):
            values.update(self._run_node(node, values))
            for name in {*node.input, *node.output}:
                if last.get(name, -1) <= place and name not in self.output_names:
                    values.pop(name, None)
        return {name: values[name] if name in values else self._weight(name) for name in self.output_names}

    def _run_node(self, node: onnx.NodeProto, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = {
            name: _widened(values[name] if name in values else self._weight(name))
            for name in node.input
            if name
        }
        alone, inputs, outputs = _alone(node)
        key = alone.SerializeToString(deterministic=True), tuple(tensor.dtype for tensor in given.values())
        if key not in self._sessions:
            self._sessions[key] = self._session(alone, {inputs[name]: given[name] for name in given})
        found = self._sessions[key].run({inputs[name]: tensor for name, tensor in given.items()})
        return {
            name: found[own].to(torch.bfloat16) if self._kinds.get(name) == _BF16 else found[own]
            for name, own in outputs.items()
        }

    def _session(self, alone: onnx.NodeProto, given: Mapping[str, Tensor]) -> OnnxSession:
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(tensor.numpy().dtype), None)
            for name, tensor in given.items()
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in alone.output if name]
        graph = helper.make_graph([alone], alone.op_type, inputs, outputs)
        model = helper.make_model(graph, opset_imports=self._model.opset_import)
        model.ir_version = self._model.ir_version
        try:
            return OnnxSession(model.SerializeToString(), optimised=False)
        except GraphSurgeryError as error:
            raise RuntimeUnavailableError(f"{alone.op_type} cannot be run by itself: {error}") from error

    def _weight(self, name: str) -> Tensor:
        array = numpy_helper.to_array(self._weights[name], base_dir=self._folder)
        if self._weights[name].data_type == _BF16:
            return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(np.array(array))


def _alone(node: onnx.NodeProto) -> tuple[onnx.NodeProto, dict[str, str], dict[str, str]]:
    """Return a node in float32 under names by position, and these by the names of its inputs and outputs."""
    inputs: dict[str, str] = {}
    for name in filter(None, node.input):
        inputs.setdefault(name, f"input{len(inputs)}")
    outputs = {name: f"output{index}" for index, name in enumerate(node.output) if name}
    alone = onnx.NodeProto(
        op_type=node.op_type,
        domain=node.domain,
        input=[inputs.get(name, "") for name in node.input],
        output=[outputs.get(name, "") for name in node.output],
        attribute=node.attribute,
    )
    if node.overload:
        alone.overload = node.overload
    for attribute in alone.attribute:
        if attribute.HasField("t") and attribute.t.data_type == _BF16:
            array = numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(numpy_helper.from_array(array, attribute.t.name))
        if attribute.name in {"to", "dtype", "output_dtype"} and attribute.i == _BF16:
            attribute.i = TensorProto.FLOAT
    return alone, inputs, outputs


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _check_names(graph: onnx.GraphProto, path: str | os.PathLike[str]) -> None:
    given = {value.name for value in (*graph.input, *graph.initializer)}
    for inputs, outputs in [
        *((node.input, node.output) for node in graph.node),
        ([value.name for value in graph.output], []),
    ]:
        missing = [name for name in inputs if name and name not in given]
        if missing:
            raise VerificationError(f"the graph of {path} reads {missing[0]!r}, which no node gives")
        given.update(outputs)


def _inferred(model: onnx.ModelProto, file: Path, *, strict: bool) -> onnx.ModelProto:
    """Return a model with the types of all values, its large weights left out.

    Raises:
        VerificationError: If `strict`, types or shapes that it declares are not those that follow.
    """
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    try:
        for tensor in copied.graph.initializer:
            needed = math.prod(tensor.dims)
            if len(tensor.raw_data) > _SMALL:
                tensor.ClearField("raw_data")  # a protobuf message ends at 2 GB
            elif needed <= _SMALL // 8 and external_data_helper.uses_external_data(tensor):
                external_data_helper.load_external_data_for_tensor(tensor, str(file.parent))
        return onnx.shape_inference.infer_shapes(copied, check_type=strict, strict_mode=strict)
    except onnx.shape_inference.InferenceError as error:
        text = " ".join(str(error).split())[:300]
        hint = (
            "; a later opset (22 for convolutions and pools) may take the type"
            if "unsupported type" in text
            else ""
        )
        raise VerificationError(f"{file} is no valid ONNX model: {text}{hint}") from error


def _kinds(model: onnx.ModelProto) -> dict[str, int]:
    """The element types of all values, as the model declares them."""
    kinds = _declared(model)
    kinds.update((tensor.name, tensor.data_type) for tensor in model.graph.initializer)
    return kinds


def _declared(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    return {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type
    }


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str | None, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims)


def _torch_dtype(kind: int) -> torch.dtype | None:
    if kind == _BF16:
        return torch.bfloat16
    try:
        return torch.from_numpy(np.empty(0, helper.tensor_dtype_to_np_dtype(kind))).dtype
    except (KeyError, TypeError):
        return None
