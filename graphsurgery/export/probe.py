"""The values inside of an ONNX graph: what makes each, and a copy of the graph that returns some of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from graphsurgery.export.sessions import read_model

__all__ = ["OnnxValue", "values_of", "write_probe"]

_LARGEST_PROTO = 2**31 - 1


@dataclass(frozen=True)
class OnnxValue:
    """One value that a node of the main graph makes from the graph's inputs.

    Attributes:
        name: Name of the value.
        node: Name of the node, "" where it has none.
        op: Its operator type.
        inputs: Names of such values, and of graph inputs, that the node reads.
        initializers: Names of the initializers that it reads, directly or through constant nodes.
    """

    name: str
    node: str
    op: str
    inputs: tuple[str, ...]
    initializers: tuple[str, ...]


def values_of(path: str | os.PathLike[str]) -> tuple[tuple[OnnxValue, ...], tuple[str, ...]]:
    """Return the values of a file's main graph in its order, and the names of its outputs.

    What is made of constants alone is left out; so are values that are no tensors, where that is known.

    Raises:
        VerificationError: The file cannot be read.
    """
    model = read_model(path, weights=False)
    graph = model.graph
    constants: dict[str, tuple[str, ...]] = {tensor.name: (tensor.name,) for tensor in graph.initializer}
    live = {value.name for value in graph.input} - set(constants)
    sequences = {v.name for v in graph.value_info if v.type.WhichOneof("value") not in (None, "tensor_type")}
    found: list[OnnxValue] = []
    for node in graph.node:
        read = list(dict.fromkeys(_reads(node)))
        fixed = tuple(dict.fromkeys(name for source in read for name in constants.get(source, ())))
        inputs = tuple(name for name in read if name in live)
        for name in filter(None, node.output):
            if not inputs:
                constants[name] = fixed
                continue
            live.add(name)
            if name not in sequences:
                found.append(OnnxValue(name, node.name, node.op_type, inputs, fixed))
    return tuple(found), tuple(value.name for value in graph.output)


def _reads(node: onnx.NodeProto) -> list[str]:
    """Return the names that a node reads, those of its subgraphs included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        graphs: list[Any] = [attribute.g] if attribute.HasField("g") else []
        for graph in [*graphs, *attribute.graphs]:
            for inner in graph.node:
                names += _reads(inner)
    return names


def write_probe(path: str | os.PathLike[str], outputs: Sequence[str], target: Path) -> Path:
    """Write a copy of a graph that returns the values named, in this order, instead of its own outputs.

    Args:
        path: The file; it is not changed.
        outputs: Names of values of its main graph.
        target: Where the copy goes.

    Raises:
        VerificationError: The file cannot be read.
    """
    model = read_model(path)
    graph = model.graph
    typed = {value.name: value for value in (*graph.value_info, *graph.output)}
    own = [typed.get(name) or onnx.ValueInfoProto(name=name) for name in outputs]
    kept = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in own]
    for value in kept:
        if value.type.tensor_type.elem_type == TensorProto.UNDEFINED:
            value.ClearField("type")  # onnxruntime infers it
    del graph.output[:]
    graph.output.extend(kept)
    large = model.ByteSize() > _LARGEST_PROTO
    onnx.save(model, target, save_as_external_data=large)
    return target
