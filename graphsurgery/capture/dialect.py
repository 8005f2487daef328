"""Bring a functional ATen graph into the one form that the passes see."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from graphsurgery.calls import arguments, is_random
from graphsurgery.errors import CaptureError
from graphsurgery.graph import annotate, source_line

__all__ = ["canonicalize", "refuse_foreign"]

aten = torch.ops.aten


# -- what has no place in a captured graph


def refuse_foreign(gm: fx.GraphModule) -> None:
    """Refuse operations that are no function of the inputs, or that no pass could read.

    Raises:
        CaptureError: The graph draws random numbers, updates statistics, or calls an operator with a body.
    """
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        where = f" (at {source_line(node)})" if source_line(node) else ""
        if isinstance(node.target, HigherOrderOperator):
            raise CaptureError(
                f"the model uses {node.target}{where}, an operator with a body of its own, which "
                "is not supported; move it (an autocast that is on, a loop, a branch on values) out of "
                "forward, or let gs.optimize_parts work on its submodules."
            )
        if isinstance(node.target, OpOverload):
            if _updates_statistics(node):
                raise CaptureError(
                    f"the graph holds a normalisation in training mode{where}; "
                    "trace or export the model again after model.eval()."
                )
            if is_random(node):
                raise CaptureError(
                    f"the model draws random numbers in evaluation mode{where}; "
                    "pass the noise as an input, or switch it off in evaluation."
                )


def _updates_statistics(node: fx.Node) -> bool:
    return (
        node.target
        in (aten.batch_norm.default, aten.native_batch_norm.default, aten.cudnn_batch_norm.default)
        and bool(arguments(node)["training"])
        and isinstance(arguments(node)["running_mean"], fx.Node)
    )


# -- one spelling for each thing

_ALIASES = {
    "multiply": "mul",
    "subtract": "sub",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
}
_RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.view_copy.default,
    aten._reshape_copy.default,
)
_SHAPED = (
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
    aten.reshape_as.default,
)
_NOTHING = (
    aten.detach.default,
    aten.alias.default,
    aten.lift.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
)
_CHECKS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)


def canonicalize(gm: fx.GraphModule) -> None:
    """Rewrite `gm` in place: views to reshape, eval batch norm to `aten.batch_norm`, aliases to one name."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        if node.target in _CHECKS:
            gm.graph.erase_node(node)
        elif node.target in _NOTHING:
            _replace(node, node.args[0])
        elif node.target in _RESHAPES:
            node.target = aten.reshape.default
        elif node.target in _SHAPED:
            _to_reshape(node)
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            _to_batch_norm(gm, node)
        else:
            _rename(node)
            rule = _RULES.get(node.target)
            if rule is not None:
                rule(node)
    gm.graph.eliminate_dead_code(is_impure_node=_is_kept)


def _is_kept(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output")


def _replace(node: fx.Node, value: Any) -> None:
    node.replace_all_uses_with(value, propagate_meta=False)
    node.graph.erase_node(node)


def _rename(node: fx.Node) -> None:
    if not isinstance(node.target, OpOverload):
        return
    namespace, name = node.target._schema.name.split("::")
    if namespace == "aten" and name in _ALIASES:
        twin = getattr(getattr(aten, _ALIASES[name]), node.target._overloadname, None)
        if isinstance(twin, OpOverload):
            node.target = twin


def _to_reshape(node: fx.Node) -> None:
    """Write a view whose sizes are implied as a reshape with at most one -1."""
    shape = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    if shape.count(-1) <= 1 and 0 not in shape:
        node.target, node.args, node.kwargs = aten.reshape.default, (node.args[0], shape), {}


def _to_batch_norm(gm: fx.GraphModule, node: fx.Node) -> None:
    x, weight, bias, mean, var, momentum, eps = node.args
    with gm.graph.inserting_before(node):
        norm = gm.graph.call_function(
            aten.batch_norm.default, (x, weight, bias, mean, var, False, momentum, eps, False)
        )
    norm.meta = {key: value for key, value in node.meta.items() if key != "tensor_meta"}
    annotate(gm, norm)
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] == 0:
            _replace(user, norm)


def _rank(node: fx.Node) -> int:
    operand = node.args[0]
    if not isinstance(operand, fx.Node):
        raise TypeError(f"operand of {node.name} is {operand!r}, expected a node")
    return int(operand.meta["val"].dim())


def _permute(node: fx.Node, dims: list[int]) -> None:
    node.target, node.args, node.kwargs = aten.permute.default, (node.args[0], dims), {}


def _swap_last(node: fx.Node) -> None:
    node.target, node.args = aten.transpose.int, (node.args[0], -2, -1)


def _reverse(node: fx.Node) -> None:
    _permute(node, list(range(_rank(node)))[::-1])


def _movedim(node: fx.Node) -> None:
    rank = _rank(node)
    dims: tuple[Any, ...] = node.args[1:3]
    source, destination = ([d] if isinstance(d, int) else list(d) for d in dims)
    source, destination = [d % rank for d in source], [d % rank for d in destination]
    rest = iter([d for d in range(rank) if d not in source])
    _permute(node, [source[destination.index(d)] if d in destination else next(rest) for d in range(rank)])


def _transpose(node: fx.Node) -> None:
    node.target = aten.transpose.int


def _pad(node: fx.Node) -> None:
    given = arguments(node)
    if given["mode"] == "constant":
        value = given["value"]
        node.args = (node.args[0], node.args[1], 0.0 if value is None else value)
        node.target, node.kwargs = aten.constant_pad_nd.default, {}


def _copy(node: fx.Node) -> None:
    """`x.copy_(y)` of one shape and dtype is `y`."""
    target, source = (
        value.meta.get("val") if isinstance(value, fx.Node) else None for value in node.args[:2]
    )
    if not isinstance(target, torch.Tensor) or not isinstance(source, torch.Tensor):
        return
    if (
        target.dtype == source.dtype
        and target.device == source.device
        and tuple(target.shape) == tuple(source.shape)
    ):
        _replace(node, node.args[1])


_RULES: dict[Any, Callable[[fx.Node], None]] = {
    aten.mT.default: _swap_last,
    aten.numpy_T.default: _reverse,
    aten.movedim.int: _movedim,
    aten.movedim.intlist: _movedim,
    aten.moveaxis.int: _movedim,
    aten.moveaxis.intlist: _movedim,
    aten.swapaxes.default: _transpose,
    aten.swapdims.default: _transpose,
    aten.pad.default: _pad,
    aten.copy.default: _copy,
}
