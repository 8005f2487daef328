"""What a caller could notice of a removed copy: shared memory and memory layout.

Inside a functional graph a copy, a view and the value itself are the same. Two things leak out: an output
that shares memory with an input, a parameter or another output where it was a copy before, and the strides of
an output (a caller may `.view()` it). Ops that read strides or raw memory leak inside as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphsurgery.cost import op_name

__all__ = ["is_only_a_view", "newly_shared", "reads_memory", "same_layout", "same_tensor_type", "shown"]

# Views that say nothing of it in their schema.
_SILENT_VIEWS = frozenset(
    [
        *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "getitem"),
        *("unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "type_as", "einsum"),
        *("atleast_1d", "atleast_2d", "atleast_3d", "sum_to_size", "data", "conj_physical", "to_dense"),
        *("matrix_power", "linalg_matrix_power", "unflatten_dense_tensors"),
        *("broadcast_tensors", "meshgrid", "cartesian_prod"),
        *(f"_cast_{dtype}" for dtype in ("Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")),
    ]
)
# Views of all of their operands; others are views of the first.
_OF_ALL = frozenset(
    ["atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "meshgrid", "cartesian_prod"]
)
# Views, in their schema or silent, that copy where they must.
_MAY_COPY = frozenset(
    [
        *("reshape", "flatten", "contiguous", "to", "type_as", "einsum"),
        *(
            "sum_to_size",
            "conj_physical",
            "to_dense",
            "matrix_power",
            "linalg_matrix_power",
            "cartesian_prod",
        ),
        *(name for name in _SILENT_VIEWS if name.startswith("_cast_")),
    ]
)
_READ_MEMORY = frozenset(["as_strided", "as_strided_copy", "view_as_complex", "view_as_real"])


def same_tensor_type(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes hold single tensors of one shape (symbols compared by name), dtype and device."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
        return False
    return (_sizes(x.shape), x.dtype, x.device, x.layout) == (_sizes(y.shape), y.dtype, y.device, y.layout)


def same_layout(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors of one shape have one layout in memory; strides of axes of size 1 do not matter."""
    a, b = (
        [str(step) for step, size in zip(t.stride(), t.shape, strict=True) if str(size) != "1"]
        for t in (x, y)
    )
    return a == b


def reads_memory(node: fx.Node) -> bool:
    """Whether the result of `node` may depend on strides or raw memory of its operands."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    foreign = target.namespace not in ("aten", "prims")
    return foreign or op_name(node) in _READ_MEMORY or str(target) == "aten.view.dtype"


def newly_shared(node: fx.Node, by: fx.Node) -> str | None:
    """Whose memory an output would share if `by` stood in place of `node`, a copy of it.

    Returns:
        A sentence that names it; None if no output would share more than before.
    """
    if is_only_a_view(node) or not _escapes(node):
        return None
    for root in _roots(by):
        if root.op != "call_function":
            return f"{node.name!r} copies; without it an output would share memory with {root.name!r}"
        if _escapes(root, apart_from=node):
            return f"{node.name!r} copies; without it two outputs would share the memory of {root.name!r}"
    return None


def is_only_a_view(node: fx.Node) -> bool:
    """Whether `node` never copies, so that nothing more is shared without it."""
    return _may_be_view(node) and op_name(node) not in _MAY_COPY


def shown(graph: fx.Graph) -> dict[fx.Node, set[Any]]:
    """The nodes whose memory an output may show, in one walk, each with what is shown of it.

    Returns:
        Indices of the pieces of a tuple that are shown; None where it is all of the value.
    """
    found: dict[fx.Node, set[Any]] = {}
    for node in reversed(graph.nodes):
        if node.op == "output":
            for value in node.all_input_nodes:
                found.setdefault(value, set()).add(None)
        elif node in found:
            piece = node.args[1] if op_name(node) == "getitem" else None
            for operand in _viewed(node):
                found.setdefault(operand, set()).add(piece)
    return found


def _sizes(shape: Any) -> tuple[str, ...]:
    return tuple(str(size) for size in shape)


def _may_be_view(node: fx.Node) -> bool:
    """Whether `node` may hand back the memory of an operand."""
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    if op_name(node) in _SILENT_VIEWS:
        return op_name(node) != "einsum" or len(node.all_input_nodes) == 1
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return any(value.alias_info is not None for value in target._schema.returns)


def _viewed(node: fx.Node) -> list[fx.Node]:
    """The operands whose memory `node` may hand back."""
    if not _may_be_view(node):
        return []
    return node.all_input_nodes if op_name(node) in _OF_ALL else node.all_input_nodes[:1]


def _roots(node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory `node` may show."""
    roots: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        viewed = _viewed(current)
        stack += viewed
        if not viewed:
            roots[current] = None
    return [*roots]


def _escapes(node: fx.Node, apart_from: fx.Node | None = None) -> bool:
    """Whether an output of the graph may show the memory of `node`, other than through `apart_from`."""
    stack, seen = [node], {apart_from}
    while stack:
        current = stack.pop()
        for user in current.users:
            if user.op == "output":
                return True
            if user not in seen and current in _viewed(user):
                seen.add(user)
                stack.append(user)
    return False
