"""What an ONNX file may not ask of whoever reads it, looked at before any runtime sees the file.

onnx and onnxruntime refuse some of this too, each in its own words and depending on its version, and some
of it only after they were led astray. Looked at are the graph, the functions, and what is said of the
weights; the weights themselves are not read.

1. External data lies in the folder of the model: a relative path without `..`, no link, a regular file.
2. A tensor holds as many bytes as its shape and type take, inside of the file or outside of it.
3. Functions do not call themselves, and written out they are not more than `MOST_NODES` nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
from onnx import TensorProto

from graphsurgery.errors import VerificationError

__all__ = ["MOST_NODES", "check_contents"]

MOST_NODES = 10**6
"""Nodes of a graph with all functions written out: thirty short functions may stand for a milliard."""

_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
_KEYS = ("offset", "length")

Key = tuple[str, str, str]


def check_contents(model: onnx.ModelProto, file: Path) -> None:
    """Refuse a model that reads outside of its folder, lies about sizes or grows without bound.

    Args:
        model: The model, its external data not loaded.
        file: Where it was read from.

    Raises:
        VerificationError: Names the file, the tensor or function, and what is wrong with it.
    """
    try:
        _check_functions(model)
        for tensor in _tensors(model):
            if tensor.data_location == TensorProto.EXTERNAL:
                _check_external(tensor, file.parent)
            else:
                _check_inside(tensor)
    except _RefusedError as error:
        raise VerificationError(
            f"{file} was not loaded: {error}; write the model again, its data beside it"
        ) from None


class _RefusedError(Exception):
    """What is wrong with the file."""


# -- functions --------------------------------------------------------------------------------------------


def _graphs(node: onnx.NodeProto) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _nodes(graph: Any) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph or a function with those of its subgraphs."""
    for node in graph.node:
        yield node
        for inner in _graphs(node):
            yield from _nodes(inner)


def _key(node: Any) -> Key:
    return node.domain, node.op_type, getattr(node, "overload", "")


def _check_functions(model: onnx.ModelProto) -> None:
    if not model.functions:
        return
    functions = {(f.domain, f.name, getattr(f, "overload", "")): f for f in model.functions}
    calls = {name: [_key(node) for node in _nodes(function)] for name, function in functions.items()}
    try:
        order = list(
            TopologicalSorter(
                {
                    name: {called for called in called_by if called in functions}
                    for name, called_by in calls.items()
                }
            ).static_order()
        )
    except CycleError as error:
        names = " -> ".join(name for _, name, _ in error.args[1])
        raise _RefusedError(f"its functions call each other in a circle ({names})") from None
    sizes: dict[Key, int] = {}
    for name in order:
        sizes[name] = sum(sizes.get(called, 1) for called in calls[name])
    total = sum(sizes.get(_key(node), 1) for node in _nodes(model.graph))
    if total > MOST_NODES:
        raise _RefusedError(
            f"with its {len(functions)} functions written out it has {total:,} nodes, "
            f"more than {MOST_NODES:,}"
        )


# -- tensors ----------------------------------------------------------------------------------------------


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    graphs: list[Any] = [model.graph, *model.functions]
    for training in model.training_info:
        graphs += [training.initialization, training.algorithm]
    while graphs:
        graph = graphs.pop()
        yield from getattr(graph, "initializer", ())
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for node in graph.node:
            graphs += _graphs(node)
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                sparse_tensors = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
                for sparse in (*sparse_tensors, *attribute.sparse_tensors):
                    yield from (sparse.values, sparse.indices)


def _bytes(tensor: TensorProto) -> int:
    """Return how many bytes the shape and the type of a tensor take; strings have no such number."""
    if any(size < 0 for size in tensor.dims):
        raise _RefusedError(f"tensor '{tensor.name}' has a negative size in its shape {list(tensor.dims)}")
    try:
        kind = TensorProto.DataType.Name(tensor.data_type)
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError):
        raise _RefusedError(f"tensor '{tensor.name}' has no known type ({tensor.data_type})") from None
    if kind.endswith("INT4") or kind.startswith("FLOAT4"):
        bits = 4
    elif kind.endswith("INT2"):
        bits = 2
    return int(-(-math.prod(tensor.dims) * bits // 8))


def _takes(tensor: TensorProto, needed: int) -> str:
    kind = TensorProto.DataType.Name(tensor.data_type).lower()
    return f"tensor '{tensor.name}' of shape {list(tensor.dims)} and type {kind} takes {needed:,} bytes"


def _check_inside(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.STRING:
        return
    needed = _bytes(tensor)
    if tensor.HasField("raw_data"):
        held = len(tensor.raw_data)
        if held != needed:
            raise _RefusedError(f"{_takes(tensor, needed)}, and the file holds {held:,}")
    elif needed and not any(len(getattr(tensor, field)) for field in _FIELDS):
        raise _RefusedError(f"{_takes(tensor, needed)}, and the file holds none")


def _check_external(tensor: TensorProto, folder: Path) -> None:
    if tensor.data_type == TensorProto.STRING:
        raise _RefusedError(f"tensor '{tensor.name}' holds strings, which cannot lie in a file of their own")
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path = _inside(folder, entries.get("location", ""), tensor.name)
    needed, size = _bytes(tensor), path.stat().st_size
    numbers = {}
    for key in _KEYS:
        text = entries.get(key, "")
        if text and not (text.isascii() and text.isdigit() and len(text) < 20):
            raise _RefusedError(
                f"tensor '{tensor.name}' gives the {key} {text[:40]!r} of its data, no whole number"
            )
        numbers[key] = int(text) if text else None
    offset, length = numbers["offset"] or 0, numbers["length"]
    if length is not None and length != needed:
        raise _RefusedError(f"{_takes(tensor, needed)}, and its entry says {length:,}")
    if offset + needed > size:
        raise _RefusedError(
            f"{_takes(tensor, needed)} from byte {offset:,} of {path.name}, which has {size:,}"
        )


def _inside(folder: Path, location: str, name: str) -> Path:
    """Return the path of external data, a regular file in the folder of its model or in one below."""
    said = f"tensor '{name}' has its data in {location!r}"
    if not location or "\0" in location:
        raise _RefusedError(f"{said}, which names no file")
    for kind in (PurePosixPath, PureWindowsPath):
        written = kind(location)
        if written.anchor or ".." in written.parts:
            raise _RefusedError(f"{said}; data has to lie in the folder of the model")
    path = folder
    for part in PurePosixPath(location).parts:
        path = path / part
        if path.is_symlink():
            raise _RefusedError(f"{said}, of which {part} is a symbolic link")
    if not path.is_file():
        what = "does not exist" if not path.exists() else "is no regular file"
        raise _RefusedError(f"{said}, which {what}")
    if path.stat().st_nlink > 1:  # as with a link: the other name may lie anywhere; onnx declines it too
        raise _RefusedError(f"{said}, a file with {path.stat().st_nlink} names (hard links)")
    return path
