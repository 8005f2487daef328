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
from graphsurgery.rewrite.moves import PERMUTES, RESHAPES

__all__ = ["newly_shared", "reads_memory", "same_layout", "same_tensor_type"]

# Ops that may hand back their operand's memory, and ops that may be a copy of it.
_PIECES = frozenset(["slice", "select", "getitem", "split", "split_with_sizes", "chunk", "unbind", "narrow"])
_VIEWS = RESHAPES | PERMUTES | _PIECES | {"alias", "detach", "mT", "expand", "dropout", "contiguous", "to"}
_CLONES = frozenset(["clone", "contiguous", "to", "_to_copy", "lift_fresh_copy", "reshape", "flatten"])
_COPIES = _CLONES | {"cat", "repeat", "mul", "div", "add", "sub", "constant_pad_nd", "pad"}
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
    if op_name(node) not in _COPIES or not _escapes(node):
        return None
    root = _root(by)
    if root.op != "call_function":
        return f"{node.name!r} copies; without it an output would share memory with {root.name!r}"
    if _escapes(root, apart_from=node):
        return f"{node.name!r} copies; without it two outputs would share the memory of {root.name!r}"
    return None


def _sizes(shape: Any) -> tuple[str, ...]:
    return tuple(str(size) for size in shape)


def _root(node: fx.Node) -> fx.Node:
    """The node whose memory `node` may show."""
    while node.op == "call_function" and op_name(node) in _VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _escapes(node: fx.Node, apart_from: fx.Node | None = None) -> bool:
    """Whether an output of the graph may show the memory of `node`, other than through `apart_from`."""
    stack, seen = [node], {apart_from}
    while stack:
        current = stack.pop()
        for user in current.users:
            if user.op == "output":
                return True
            if user not in seen and op_name(user) in _VIEWS and user.all_input_nodes[0] is current:
                seen.add(user)
                stack.append(user)
    return False
