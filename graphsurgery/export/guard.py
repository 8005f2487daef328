"""What an ONNX file may not ask of whoever reads it, looked at before any runtime sees the file.

onnx and onnxruntime refuse some of this too, each in its own words and depending on its version, and some
of it only after they were led astray. Looked at are the graph, the functions, and what is said of the
weights; the weights themselves are not read.

1. External data lies in the folder of the model: a relative path without `..`, no link, a regular file,
   and no address in memory, which onnxruntime writes as a path too.
2. A tensor holds as many bytes or numbers as its shape and type take, inside of the file or outside of it.
   Sparse tensors of a file written out are not more than `MOST_SPREAD` times what they hold.
3. Functions do not call themselves, and written out they are not more than `MOST_NODES` nodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
from onnx import TensorProto

from graphsurgery.errors import VerificationError

__all__ = ["HARMLESS_BYTES", "MOST_NODES", "MOST_SPREAD", "check_contents"]

MOST_NODES = 10**6
"""Nodes of a graph with all functions written out: thirty short functions may stand for a milliard."""

MOST_SPREAD = 64
"""How many times more bytes the sparse tensors of a file may stand for than they hold."""

HARMLESS_BYTES = 64 * 10**6
"""Sparse tensors that stand for no more than this may hold as few numbers as they like."""

_MOST_NUMBERS = 2**63 - 1  # of a tensor: what a size can count, and a number that can be written out
_BEYOND = 10**18  # nodes: no count goes on from here
_AXES_SHOWN = 8
_ADDRESS = re.compile(r"_ORT_\w*MEM_ADDR_")  # "*/_ORT_MEM_ADDR_/*": the offset is read as a pointer
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
        _check_spread(model)
    except _RefusedError as error:
        raise VerificationError(
            f"{file} was not loaded: {error}; write the model again, its data beside it"
        ) from None


class _RefusedError(Exception):
    """What is wrong with the file."""


# -- functions --------------------------------------------------------------------------------------------


def _attributes(graph: Any) -> Iterator[onnx.AttributeProto]:
    """Yield the attributes of the nodes of a graph or function, and the defaults of those of a function."""
    yield from getattr(graph, "attribute_proto", ())
    for node in graph.node:
        yield from node.attribute


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph or function and the graphs in it."""
    yield graph
    for attribute in _attributes(graph):
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from _graphs(inner)


def _nodes(graph: Any) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph or a function with those of its subgraphs."""
    for inner in _graphs(graph):
        yield from inner.node


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
        sizes[name] = min(sum(sizes.get(called, 1) for called in calls[name]), _BEYOND)
    total = sum(sizes.get(_key(node), 1) for node in _nodes(model.graph))
    if total > MOST_NODES:
        raise _RefusedError(
            f"with its {len(functions)} functions written out it has "
            f"{f'{total:,}' if total < _BEYOND else f'at least {_BEYOND:,}'} nodes, "
            f"more than {MOST_NODES:,}"
        )


# -- tensors ----------------------------------------------------------------------------------------------


def _all_graphs(model: onnx.ModelProto) -> Iterator[Any]:
    graphs: list[Any] = [model.graph, *model.functions]
    for training in model.training_info:
        graphs += [training.initialization, training.algorithm]
    for graph in graphs:
        yield from _graphs(graph)


def _sparse(model: onnx.ModelProto) -> Iterator[onnx.SparseTensorProto]:
    for graph in _all_graphs(model):
        yield from getattr(graph, "sparse_initializer", ())
        for attribute in _attributes(graph):
            if attribute.HasField("sparse_tensor"):
                yield attribute.sparse_tensor
            yield from attribute.sparse_tensors


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    for graph in _all_graphs(model):
        yield from getattr(graph, "initializer", ())
        for attribute in _attributes(graph):
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
    for sparse in _sparse(model):
        yield from (sparse.values, sparse.indices)


def _shape(dims: Sequence[int]) -> str:
    shown = [str(size) for size in dims[:_AXES_SHOWN]]
    return f"[{', '.join([*shown, *(['...'] if len(dims) > _AXES_SHOWN else [])])}]"


def _numbers(tensor: TensorProto, dims: Sequence[int]) -> int:
    """Return how many numbers a shape takes."""
    if any(size < 0 for size in dims):
        raise _RefusedError(f"tensor '{tensor.name}' has a negative size in its shape {_shape(dims)}")
    if 0 in dims:
        return 0
    count = 1
    for size in dims:
        count *= size
        if count > _MOST_NUMBERS:
            raise _RefusedError(
                f"tensor '{tensor.name}' of shape {_shape(dims)} ({len(dims)} axes) takes more than "
                f"{_MOST_NUMBERS:,} numbers"
            )
    return count


def _kind(tensor: TensorProto) -> str:
    try:
        return str(TensorProto.DataType.Name(tensor.data_type))
    except ValueError:
        raise _RefusedError(f"tensor '{tensor.name}' has no known type ({tensor.data_type})") from None


def _bits(tensor: TensorProto) -> int:
    """Return how many bits of a file one number of a tensor takes."""
    packed = re.match(r"U?INT([24])$|FLOAT([46])E", _kind(tensor))
    if packed:
        return int(packed[1] or packed[2])
    try:
        return 8 * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except KeyError:
        raise _RefusedError(f"tensor '{tensor.name}' has no known type ({tensor.data_type})") from None


def _bytes(tensor: TensorProto, dims: Sequence[int] | None = None) -> int:
    """Return how many bytes the shape and the type of a tensor take; strings have no such number."""
    return -(-_numbers(tensor, tensor.dims if dims is None else dims) * _bits(tensor) // 8)


def _described(tensor: TensorProto) -> str:
    return f"tensor '{tensor.name}' of shape {_shape(tensor.dims)} and type {_kind(tensor).lower()}"


def _takes(tensor: TensorProto, needed: int) -> str:
    return f"{_described(tensor)} takes {needed:,} bytes"


def _check_inside(tensor: TensorProto) -> None:
    if tensor.HasField("raw_data") and tensor.data_type != TensorProto.STRING:
        held, needed = len(tensor.raw_data), _bytes(tensor)
        if held != needed:
            raise _RefusedError(f"{_takes(tensor, needed)}, and the file holds {held:,}")
        return
    numbers, bits = _numbers(tensor, tensor.dims), _bits(tensor)
    if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        numbers *= 2
    elif bits in (2, 4):  # bytes in which several numbers lie; those of six bits lie one by one
        numbers = -(-numbers * bits // 8)
    field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    held = len(getattr(tensor, field))
    if numbers and not held and tensor.data_type != TensorProto.STRING:
        raise _RefusedError(f"{_takes(tensor, _bytes(tensor))}, and the file holds none")
    if held != numbers:
        raise _RefusedError(
            f"{_described(tensor)} takes {numbers:,} entries of {field}, and the file holds {held:,}"
        )


def _check_spread(model: onnx.ModelProto) -> None:
    """Refuse sparse tensors that would fill the memory when they are written out."""
    total = held = 0
    for sparse in _sparse(model):
        values = sparse.values
        if values.data_type == TensorProto.STRING:
            raise _RefusedError(f"the sparse tensor '{values.name}' holds strings")
        total += _bytes(values, sparse.dims)
        held += _bytes(values) + _bytes(sparse.indices)
    if total > max(HARMLESS_BYTES, MOST_SPREAD * held):
        raise _RefusedError(
            f"its sparse tensors hold {held:,} bytes and take {total:,} written out, more than "
            f"{MOST_SPREAD} times as many"
        )


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
    if _ADDRESS.search(location):
        raise _RefusedError(f"{said}, an address in memory and no file")
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
