"""Norms over channels where the channels are not on the axis that the op wants.

Layer norm over an axis that is not last is written by hand from means, as ONNX has no operator for it:
`(x - mean) * rsqrt(mean((x - mean)^2) + eps) * weight + bias`, the form of Apple's rewriting of transformers
for the Neural Engine (https://machinelearning.apple.com/research/neural-engine-transformers). Batch norm over
the last axis is batch norm of the value seen as `(N, C)`. Both keep the parameters as they are, and both are
recognised again (`lifted`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from graphsurgery.affine.certify import LIMIT
from graphsurgery.calls import arguments
from graphsurgery.cost import op_name
from graphsurgery.graph import annotate, origin
from graphsurgery.layout.certify import apart, drawn, evaluator
from graphsurgery.layout.orders import inverse, natural
from graphsurgery.layout.write import Writer, permute
from graphsurgery.rewrite.moves import is_reshape
from graphsurgery.values import Sizes, tensor_meta

__all__ = ["fits", "lift", "written"]

aten = torch.ops.aten

Write = Callable[[Writer, Any], fx.Node]


def fits(node: fx.Node, order: Sequence[int]) -> bool:
    """Whether a norm can be written for an operand in this order."""
    if op_name(node) != "batch_norm":
        return True
    free = sum(not isinstance(size, int) for size in tensor_meta(node).shape)
    return order[1] == 1 or (order[-1] == 1 and free <= 1)


def written(node: fx.Node, constant: frozenset[fx.Node]) -> Write | None:
    """How a norm is written in another order.

    None for norms of half precision, which torch computes in float32 within, and where parameters are
    computed from live values.
    """
    given = arguments(node)
    if tensor_meta(node).dtype in (torch.float16, torch.bfloat16):
        return None
    operands = [o for o in node.all_input_nodes if o is not given["input"]]
    if any(operand not in constant for operand in operands):
        return None
    if op_name(node) == "batch_norm":
        return lambda w, m: _batch_norm(w, node, given, m.reads)
    if len(given["normalized_shape"]) != 1:
        return None
    if op_name(node) == "rms_norm" and given["eps"] is None:
        return None
    return lambda w, m: _layer_norm(w, node, given, m.reads)


def _layer_norm(writer: Writer, node: fx.Node, given: dict[str, Any], order: Sequence[int]) -> fx.Node:
    rank = len(order)
    axis = list(order).index(rank - 1)
    x = writer.read(given["input"], tuple(order))
    if axis == rank - 1:
        return writer.call(node.target, *fx.map_arg(node.args, lambda o: _swapped(writer, o, given, x)))
    if op_name(node) == "layer_norm":
        mean = writer.call(aten.mean.dim, x, [axis], True)
        x = writer.call(aten.sub.Tensor, x, mean)
    square = writer.call(aten.mul.Tensor, x, x)
    variance = writer.call(aten.mean.dim, square, [axis], True)
    spread = writer.call(aten.add.Scalar, variance, given["eps"])
    value = writer.call(aten.mul.Tensor, x, writer.call(aten.rsqrt.default, spread))
    for name, op in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
        if given.get(name) is not None:
            value = writer.call(op, value, writer.constant(given[name], rank, tuple(order)))
    return value


def _swapped(writer: Writer, operand: fx.Node, given: dict[str, Any], x: fx.Node) -> fx.Node:
    return x if operand is given["input"] else writer.made[operand][0]


def _batch_norm(writer: Writer, node: fx.Node, given: dict[str, Any], order: Sequence[int]) -> fx.Node:
    x = writer.read(given["input"], tuple(order))
    axis = list(order).index(1)
    shape: list[Any] = list(tensor_meta(x).shape)
    flat = axis == len(order) - 1 and axis != 1
    if flat:
        x = writer.call(aten.reshape.default, x, [-1, shape[-1]])
    args = fx.map_arg(node.args, lambda o: _swapped(writer, o, given, x))
    value = writer.call(node.target, *args)
    if flat:
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        return writer.call(aten.reshape.default, value, sizes)
    return value


# -- the way back


def lift(gm: fx.GraphModule, names: Collection[str]) -> int:
    """Write every norm of these two forms as the op itself between permutes, in `gm`.

    Args:
        gm: The graph to write in.
        names: Names of the norms to look for.

    Returns:
        How many were found.
    """
    found = 0
    for node in reversed(list(gm.graph.nodes)):  # the last call of a norm comes before its parts
        if node.op == "call_function" and not node._erased:
            found += "batch_norm" in names and _lift_batch_norm(gm, node)
            if not node._erased:
                found += _lift_layer_norm(gm, node, names)
    return found


def _between(gm: fx.GraphModule, last: fx.Node, x: fx.Node, axis: int, end: int, make: Any) -> bool:
    """Put `make(value)` in place of `last`, with `axis` of `x` moved to `end` before and back after.

    Returns:
        False, with nothing changed, where both are not the same in float64.
    """
    rank = tensor_meta(x).dim()
    step = [a for a in range(rank) if a != axis]
    step.insert(end, axis)
    still = tuple(step) == natural(rank)
    with gm.graph.inserting_before(last):
        turned = x if still else permute(gm.graph, x, tuple(step))
        value = make(turned)
        result = value if still else permute(gm.graph, value, inverse(tuple(step)))
    new = [node for node in dict.fromkeys((turned, value, result)) if node is not x]
    for node in new:
        node.meta.update(origin(last))
        annotate(gm, node)
    sizes = Sizes(gm.graph)
    drawn_x = drawn(x, sizes, 0)
    with torch.no_grad():
        wanted, got = (evaluator(gm, sizes, {x: drawn_x})(node) for node in (last, result))
    if not apart(wanted, got) <= LIMIT:
        for node in reversed(new):
            gm.graph.erase_node(node)
        return False
    result.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(result)
    _erase_back(last, x)
    return True


def _erase_back(last: fx.Node, stop: fx.Node) -> None:
    stack = [last]
    while stack:
        node = stack.pop()
        if node is not stop and not node._erased and not node.users and node.op != "placeholder":
            stack += node.all_input_nodes
            node.graph.erase_node(node)


def _operand(node: Any, place: int, name: str) -> fx.Node | None:
    """An operand of a call of that name, else None."""
    if not isinstance(node, fx.Node) or op_name(node) != name or len(node.args) <= place:
        return None
    value = node.args[place]
    return value if isinstance(value, fx.Node) else None


def _lift_batch_norm(gm: fx.GraphModule, node: fx.Node) -> bool:
    """`reshape(batch_norm(reshape(x, [-1, C])), shape of x)`."""
    norm = node.args[0] if is_reshape(node) else None
    if not isinstance(norm, fx.Node) or op_name(norm) != "batch_norm" or len(norm.users) != 1:
        return False
    flat = norm.args[0]
    if not isinstance(flat, fx.Node) or not is_reshape(flat) or tensor_meta(flat).dim() != 2:
        return False
    x = flat.args[0]
    if not isinstance(x, fx.Node) or str(tensor_meta(x).shape) != str(tensor_meta(node).shape):
        return False
    rank = tensor_meta(x).dim()
    if rank < 3 or tensor_meta(x).shape[-1] != tensor_meta(flat).shape[-1]:
        return False
    target, rest = norm.target, norm.args[1:]
    return _between(gm, node, x, rank - 1, 1, lambda v: gm.graph.call_function(target, (v, *rest)))  # type: ignore[arg-type]


def _lift_layer_norm(gm: fx.GraphModule, node: fx.Node, names: Collection[str]) -> bool:
    """The form by hand, over one axis, as `written` makes it; the last call of it is `node`."""
    found = _by_hand(node)
    if found is None:
        return False
    x, centred, axis, eps, weight, bias = found
    features = tensor_meta(x).shape[axis]
    target: Any = aten.layer_norm.default if centred else aten.rms_norm.default
    name = "layer_norm" if centred else "rms_norm"
    if name not in names or not isinstance(features, int) or (bias is not None and not centred):
        return False
    if any(vector is not None and tensor_meta(vector).numel() != features for vector in (weight, bias)):
        return False  # one number for all features
    tail = (weight, bias, eps, False) if centred else (weight, eps)
    last = tensor_meta(x).dim() - 1
    return _between(gm, node, x, axis, last, lambda v: gm.graph.call_function(target, (v, [features], *tail)))


def _by_hand(node: fx.Node) -> tuple[fx.Node, bool, int, float, fx.Node | None, fx.Node | None] | None:
    """Operand, whether it is centred, axis, eps, weight and bias of a norm by hand that ends in `node`."""
    rank = tensor_meta(node).dim() if isinstance(node.meta.get("val"), torch.Tensor) else 0
    slots: dict[str, fx.Node] = {}
    core: Any = node
    for slot, name in (("bias", "add"), ("weight", "mul")):
        value, parameter = _operand(core, 0, name), _operand(core, 1, name)
        root = _vector(parameter)
        if value is None or root is None or core.kwargs:
            continue
        slots[slot] = root
        slots[f"{slot} as read"] = parameter  # type: ignore[assignment]  # it has a root
        core = value
    deviation, scale = _operand(core, 0, "mul"), _operand(core, 1, "mul")
    spread = _operand(scale, 0, "rsqrt")
    variance = _operand(spread, 0, "add")
    square = _operand(variance, 0, "mean")
    if deviation is None or square is None or spread is None or variance is None:
        return None
    if op_name(square) != "mul" or square.args != (deviation, deviation) or len(variance.args) != 3:
        return None
    axes, eps = variance.args[1], spread.args[1]
    if not isinstance(axes, list) or len(axes) != 1 or variance.args[2] is not True:
        return None
    if not isinstance(eps, float) or spread.kwargs:
        return None
    axis = int(axes[0]) % rank
    x, mean = _operand(deviation, 0, "sub"), _operand(deviation, 1, "sub")
    centred = x is not None and mean is not None and mean.args == (x, [axes[0]], True)
    centred = centred and op_name(mean) == "mean"  # type: ignore[arg-type]  # a node
    source = x if centred else deviation
    inner = [spread, variance, square, scale] + ([deviation, mean] if centred else [])
    if any(n is not None and n is not node and not set(n.users) <= {*inner, core} for n in inner):
        return None
    for slot in ("weight", "bias"):
        if slot in slots and not _lies_along(slots[f"{slot} as read"], axis, rank):
            return None
    if core is not node and (len(core.users) != 1 or source is None):
        return None
    return source, centred, axis, eps, slots.get("weight"), slots.get("bias")  # type: ignore[return-value]


def _vector(node: fx.Node | None) -> fx.Node | None:
    """The parameter of one axis that a node is a reshape of."""
    while node is not None and is_reshape(node):
        node = node.args[0]  # type: ignore[assignment]  # a reshape reads one node
    return node if node is not None and node.op == "get_attr" and tensor_meta(node).dim() == 1 else None


def _lies_along(node: fx.Node, axis: int, rank: int) -> bool:
    shape = list(tensor_meta(node).shape)
    full = [1] * (rank - len(shape)) + shape
    return all(size == 1 for a, size in enumerate(full) if a != axis)
