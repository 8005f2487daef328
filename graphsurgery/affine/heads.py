"""The head of a network: the last layer that multiplies, found by name or by walking back from the output."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphsurgery.affine.pointwise import Layer, read_layer
from graphsurgery.affine.region import Scope, is_heavy
from graphsurgery.affine.subspace import Subspace, decompose
from graphsurgery.cost import op_name
from graphsurgery.graph import INFO_KEY, CaptureInfo, module_path
from graphsurgery.values import is_tensor, tensor_meta

__all__ = ["Head", "NoHead", "find_head"]


class NoHead(Exception):
    """There is no head to take apart.

    Attributes:
        code: Stable code of the reason.
        reason: One sentence.
        nodes: The calls it is about.
    """

    def __init__(self, code: str, reason: str, nodes: Sequence[fx.Node] = ()) -> None:
        super().__init__(reason)
        self.code, self.reason, self.nodes = code, reason, tuple(nodes)


@dataclass(frozen=True)
class Head:
    """A Linear, a 1x1 convolution or a product with a constant matrix: `f weight^T + bias` per position.

    Attributes:
        node: The call.
        features: The value that it reads.
        axis: The axis of the features; the outputs lie along the same one.
        path: Dotted path of its module, or the name of its parameter where it has no module.
    """

    node: fx.Node
    features: fx.Node
    axis: int
    path: str

    @property
    def convolves(self) -> bool:
        """Whether it is a 1x1 convolution, the features along an inner axis."""
        return op_name(self.node).startswith("conv")

    def weights(self, scope: Scope) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight (outputs, features) and bias (outputs,) or None, float64."""
        weight = scope.constant_value(self.node.args[1])  # type: ignore[arg-type]  # a node, as was checked
        bias = self.node.args[2] if len(self.node.args) > 2 and is_layer(self.node) else None
        matrix = weight.flatten(1) if is_layer(self.node) else weight.T
        return matrix, scope.constant_value(bias) if isinstance(bias, fx.Node) else None

    def subspace(self, scope: Scope, rtol: float | None = None) -> Subspace:
        """What reaches its outputs, and what cannot (see `decompose`).

        Raises:
            NoHead: `not-finite` or `zero-weights`.
        """
        weight, bias = self.weights(scope)
        if not all(bool(torch.isfinite(t).all()) for t in (weight, bias) if t is not None):
            raise NoHead("not-finite", f"the weights of {self.path!r} hold NaN or infinity", (self.node,))
        found = decompose(weight, bias, rtol=rtol)
        if found.rank == 0:
            raise NoHead(
                "zero-weights", f"the weights of {self.path!r} are all zero: nothing reaches it", (self.node,)
            )
        return found


def is_layer(node: fx.Node) -> bool:
    """Whether a call is a Linear or a convolution, with its weight (outputs, ...) and bias as arguments."""
    return op_name(node) == "linear" or op_name(node).startswith("conv")


def find_head(scope: Scope, path: str | None) -> Head:
    """Find the head of a network.

    Args:
        scope: The graph.
        path: Dotted path of the head's module (`"fc"`, `"classifier.4"`), or the name of its bare parameter;
            None takes the last layer that multiplies before the output of the name `logits` or `out`, else
            before the first one, if all that reaches the output passes through it.

    Raises:
        NoHead: `no-head`, `not-a-head`, `grouped`, `several-calls`, `several-heads` or `bypassed`.
    """
    if path is not None and not isinstance(path, str):
        raise NoHead("no-head", f"expected the path of a module, such as 'fc', or None, got {path!r}")
    heavy = [node for node in scope.gm.graph.nodes if _multiplies(scope, node)]
    return _named(scope, heavy, path) if path is not None else _last(scope, heavy)


def _named(scope: Scope, heavy: Sequence[fx.Node], path: str) -> Head:
    found = [node for node in heavy if path in (_path(node), module_path(node))]
    if len(found) > 1:
        calls = ", ".join(repr(node.name) for node in found)
        raise NoHead("several-calls", f"{path!r} multiplies in {len(found)} calls: {calls}", found)
    if found:
        return _read(scope, found[0])
    paths = list(dict.fromkeys(_path(node) for node in heavy))
    inside = [name for name in paths if path and name.startswith(path + ".")]
    near = inside or difflib.get_close_matches(path, paths, n=3, cutoff=0.4) or paths[-3:]
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "no layer of it multiplies"
    raise NoHead("no-head", f"the network has no layer at {path!r}; {hint}")


_MAIN = ("logits", "out")
"""Names of the output that is meant among several: of transformers, and of torchvision's segmentation."""


def _last(scope: Scope, heavy: Sequence[fx.Node]) -> Head:
    leaves = pytree.tree_leaves(scope.gm.graph.output_node().args[0])
    info = scope.gm.meta.get(INFO_KEY)
    names = (
        info.output_names if isinstance(info, CaptureInfo) and len(info.output_names) == len(leaves) else ()
    )
    outputs = [
        n for n in leaves if isinstance(n, fx.Node) and is_tensor(n) and tensor_meta(n).is_floating_point()
    ]
    if not outputs:
        raise NoHead(
            "no-head", "the network has no output of floating-point numbers to walk back from; name the head"
        )
    named = dict(zip(names, leaves, strict=False))  # no names: of a graph that capture did not make
    main = next((named[name] for name in _MAIN if named.get(name) in outputs), None)
    first = main or outputs[0]
    behind = _ancestors(first)
    candidates = [node for node in heavy if node in behind]
    if not candidates:
        raise NoHead("no-head", f"nothing multiplies on the way to the output {first.name!r}", (first,))
    if main is None:
        lasts = [[node for node in heavy if node in _ancestors(output)][-1:] for output in outputs]
        others = [last for found in lasts for last in found if last not in behind]
        if others:
            heads = list(dict.fromkeys((candidates[-1], *others)))
            listed = ", ".join(repr(_path(node)) for node in heads)
            raise NoHead("several-heads", f"the outputs have heads of their own: {listed}; name one", heads)
    head = _read(scope, candidates[-1])
    around = _ancestors(first, without=head.node)
    ways = [node for node in around if node.op == "placeholder"]
    if ways:
        passed = [_path(node) for node in candidates if node in around][-3:]
        beside = f", by {', '.join(map(repr, passed))}" if passed else ""
        raise NoHead(
            "bypassed",
            f"input {str(ways[0].target)!r} reaches the output around {head.path!r} too{beside}; "
            "name the head",
            (head.node,),
        )
    return head


def _read(scope: Scope, node: fx.Node) -> Head:
    layer: Layer | None = read_layer(scope, node)
    name, path = op_name(node), _path(node)
    groups = node.args[6] if name.startswith("conv") and len(node.args) > 6 else 1
    if layer is None or node.kwargs or len(layer.axes) != 1 or not _plain(scope, node):
        weight = next(
            (o for o in node.all_input_nodes if o in scope.constant and tensor_meta(o).dim() > 1), None
        )
        shape = None if weight is None else tuple(tensor_meta(weight).shape)
        raise NoHead(
            "not-a-head",
            f"{path!r} is a {name} of weight {shape}, expected a Linear or a 1x1 convolution of stride 1",
            (node,),
        )
    if groups != 1:
        raise NoHead("grouped", f"{path!r} is a convolution of {groups} groups, expected 1", (node,))
    (axis,) = layer.axes
    return Head(node, layer.live, axis, path)


def _plain(scope: Scope, node: fx.Node) -> bool:
    """Whether the weight is a plain constant that sides with (outputs, features), and the bias too."""
    tensors = [value for value in node.args[1:3] if value is not None]
    return all(isinstance(value, fx.Node) and value in scope.constant for value in tensors)


def _multiplies(scope: Scope, node: fx.Node) -> bool:
    """Whether a call multiplies a live value by constant weights."""
    if not is_heavy(node) or node in scope.constant or not is_tensor(node):
        return False
    return any(operand in scope.constant for operand in node.all_input_nodes)


def _path(node: fx.Node) -> str:
    """The module path of a layer: that of its weight; a bare parameter is a path of its own."""
    weight = node.args[1] if len(node.args) > 1 else None
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        return str(weight.target).removesuffix(".weight")
    return module_path(node) or node.name


def _ancestors(node: fx.Node, without: fx.Node | None = None) -> set[fx.Node]:
    """All values that one is computed from, itself included, but not by ways through `without`.

    Sizes do not count: a shape is read of them, no value.
    """
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        value = stack.pop()
        sized = isinstance(value.meta.get("val"), (int, torch.SymInt))
        if value is without or value in seen or sized:
            continue
        seen.add(value)
        stack += value.all_input_nodes
    return seen
