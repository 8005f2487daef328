"""Calls on the features of a flattened map, written as calls that do the same at every position of a map.

A *head* starts where a map `(B, C, *S)` is flattened to `(B, C * prod(S))`. What follows has one of two
forms:

* *flat*: the elements of the map still stand side by side; its twin is the map itself;
* *vector* `(B, F)`: a Linear has read all of them; its twin has shape `(B, F, *P)`, one vector for every
  position of the window `S` on a larger map, and `P` is all ones on a map of size `S`.

A Linear on a flat value becomes a convolution whose kernel is `S`; one on a vector, a 1x1 convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx, nn

from graphsurgery.affine.per_position import is_pointwise, is_whole
from graphsurgery.cost import SPLITS, op_name
from graphsurgery.graph import annotate, get_attr_value, origin, set_attr
from graphsurgery.values import is_tensor, tensor_meta

__all__ = ["Flat", "NoMap", "Spread", "Twin", "linear_of"]

aten = torch.ops.aten
_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_ALONG_FEATURES = frozenset(
    [
        *("softmax", "log_softmax", "_softmax", "_log_softmax", "cat", "glu", "slice", "cumsum", "flip"),
        *("mean", "sum", "amax", "amin", "logsumexp", "var", "std", "argmax", "argmin", "linalg_vector_norm"),
    ]
)
"""Calls along one axis, which their second argument names, or the third of those below."""
_AXIS_THIRD = (SPLITS | {"linalg_vector_norm"}) - {"unbind"}
_LAST_AXIS = ("layer_norm", "rms_norm")


class NoMap(Exception):
    """A call has no form over a map.

    Attributes:
        code: stable code of the reason.
        node: the call.
    """

    def __init__(self, code: str, node: fx.Node, reason: str) -> None:
        super().__init__(f"{node.name!r} ({op_name(node)}) {reason}")
        self.code, self.node = code, node


@dataclass(frozen=True)
class Flat:
    """How a flat value lists the elements of a map.

    Attributes:
        sizes: of the map's axes behind the batch: channels, then positions.
        order: the axes of the map (1 for channels) in the order in which they are flattened.
        moves: the calls that flatten, in graph order: permutes and reshapes.
        channels: the axis of channels in what the first of the moves reads.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]
    moves: tuple[fx.Node, ...]
    channels: int = 1

    def same(self, other: Flat | None) -> bool:
        """Whether both list elements alike."""
        return other is not None and (self.sizes, self.order) == (other.sizes, other.order)


@dataclass(frozen=True)
class Twin:
    """The map that stands for a value of the head.

    Attributes:
        node: the map.
        flat: how the value lists its elements; None for a vector.
        made: the calls that were written for it, in graph order; for a flattened map at most a permute.
    """

    node: fx.Node
    flat: Flat | None
    made: tuple[fx.Node, ...] = ()


def linear_of(node: fx.Node, constant: frozenset[fx.Node]) -> tuple[Any, Any, Any, bool] | None:
    """Operand, weight, bias of a Linear, and whether its weight is `(in, out)`; None where a call is none."""
    name, args = op_name(node), node.args
    if node.op != "call_function" or node.kwargs or node in constant:
        return None
    if name == "linear":
        found = (args[0], args[1], args[2] if len(args) > 2 else None, False)
    elif name in ("matmul", "mm"):
        found = (args[0], args[1], None, True)
    elif name == "addmm" and len(args) == 3:
        found = (args[1], args[2], args[0], True)
    else:
        return None
    x, weight, bias, _ = found
    read = (weight,) if bias is None else (weight, bias)
    if not all(isinstance(value, fx.Node) and value in constant for value in read) or x in constant:
        return None
    if not isinstance(x, fx.Node) or not is_tensor(x) or tensor_meta(x).dim() != 2:
        return None
    sizes = [tensor_meta(value).dim() for value in read if isinstance(value, fx.Node)]
    return found if sizes == [2, 1][: len(read)] else None


class Spread:
    """Writes the twins of a head's values into a graph.

    Attributes:
        gm: the graph module, which is changed.
        twins: what was written, by the value that it stands for.
        written: names of the attributes that were given another shape.
    """

    def __init__(
        self, gm: fx.GraphModule, constant: frozenset[fx.Node], own: Callable[[fx.Node], bool], rank: int
    ) -> None:
        """Start without twins.

        Args:
            gm: the graph module.
            constant: its constant nodes.
            own: whether a weight (a `get_attr` node) is read by one Linear alone, and by no other name.
            rank: number of axes of positions.
        """
        self.gm, self.constant, self.own, self.rank = gm, constant, own, rank
        self.twins: dict[fx.Node, Twin] = {}
        self.written: list[str] = []
        self._made: list[fx.Node] = []

    def write(self, node: fx.Node) -> None:
        """Write the twin of a call of which some operand has one.

        Raises:
            NoMap: there is none.
        """
        operands = [operand for operand in node.all_input_nodes if operand in self.twins]
        flats = [self.twins[operand].flat for operand in operands]
        flat = flats[0]
        if any((flat is None) is not (other is None) for other in flats) or (
            flat is not None and not all(flat.same(other) for other in flats)
        ):
            raise NoMap("no-map-form", node, "joins values that list different things")
        for operand in node.all_input_nodes:
            if operand not in self.twins and operand not in self.constant:
                raise NoMap("no-map-form", node, f"also reads {operand.name!r}, which is no part of the head")
        self._made = []
        with self.gm.graph.inserting_before(node):
            twin = self._linear(node, flat)
            if twin is None:
                self._require_shape(node, operands[0])
                twin = self._flat(node, flat) if flat is not None else self._vector(node)
                kept = flat
            else:
                kept = None
        self.twins[node] = Twin(twin, kept, tuple(self._made))

    def _require_shape(self, node: fx.Node, operand: fx.Node) -> None:
        if op_name(node) in SPLITS:
            return  # the pieces are looked at where they are taken
        if not is_tensor(node) or tensor_meta(node).dim() != 2:
            raise NoMap("no-map-form", node, "reads the head's features and gives no list of features")
        if op_name(node) == "getitem":
            return  # pieces of a split along the features
        if str(tensor_meta(node).shape[0]) != str(tensor_meta(operand).shape[0]):
            raise NoMap("mixed-axes", node, "mixes the samples of a batch")

    # -- layers

    def _linear(self, node: fx.Node, flat: Flat | None) -> fx.Node | None:
        found = linear_of(node, self.constant)
        if found is None or found[0] not in self.twins:
            return None
        x, weight, bias, turned = found
        features = tensor_meta(weight).shape[0 if turned else 1]
        sizes = (int(features), *[1] * self.rank) if flat is None else flat.sizes
        order = tuple(range(1, self.rank + 2)) if flat is None else flat.order
        read = (weight, bias) if bias is not None else (weight,)
        kernel = self._kernel(node, weight, turned, sizes, order)
        return self._call(node, _CONVS[self.rank - 1], (self.twins[x].node, kernel, *read[1:]))

    def _kernel(
        self, node: fx.Node, weight: fx.Node, turned: bool, sizes: Sequence[int], order: Sequence[int]
    ) -> fx.Node:
        """The weight as `(out, channels, *kernel)`: under its old name, or a view where it is tied."""

        def shaped(value: torch.Tensor) -> torch.Tensor:
            value = value.t() if turned else value
            return value.reshape(len(value), *(sizes[axis - 1] for axis in order)).permute(0, *back)

        back = [1 + order.index(axis) for axis in range(1, len(order) + 1)]
        if weight.op == "get_attr" and self.own(weight):
            name = str(weight.target)
            old = get_attr_value(self.gm, name)
            new = shaped(old.detach()).contiguous().requires_grad_(old.requires_grad)
            set_attr(self.gm, name, new, parameter=isinstance(old, nn.Parameter))
            self.written.append(name)
            return self._call(node, None, name)
        if turned:
            weight = self._call(node, aten.permute.default, (weight, [1, 0]))
        split = [-1, *(sizes[axis - 1] for axis in order)]
        weight = self._call(node, aten.reshape.default, (weight, split))
        if list(order) == sorted(order):
            return weight
        return self._call(node, aten.permute.default, (weight, [0, *back]))

    def _call(self, node: fx.Node, target: Any, args: Any) -> fx.Node:
        """A call, or without a target the read of an attribute, where `node` came from."""
        graph = self.gm.graph
        made = graph.get_attr(args) if target is None else graph.call_function(target, args)
        made.meta.update(origin(node))
        annotate(self.gm, made)
        self._made.append(made)
        return made

    # -- all else

    def _flat(self, node: fx.Node, flat: Flat) -> fx.Node:
        if not is_pointwise(node) and op_name(node) != "prelu":
            if op_name(node) in ("batch_norm", "layer_norm", "rms_norm"):
                raise NoMap(
                    "position-weights",
                    node,
                    f"has weights for each of {prod(flat.sizes):,} places of the map",
                )
            raise NoMap("not-per-position", node, "does not act alike on each element of the flattened map")
        for operand in node.all_input_nodes:
            if operand not in self.twins and tensor_meta(operand).numel() != 1:
                shape = tuple(tensor_meta(operand).shape)
                raise NoMap("position-weights", node, f"takes another number at each place, of shape {shape}")
        return self._copy(node, {})

    def _vector(self, node: fx.Node) -> fx.Node:
        name = op_name(node)
        first: Any = node.args[0]
        rest: Any = node.args[1:]
        if name in ("prelu", "getitem", "expand_as") or (name == "batch_norm" and rest[4] is False):
            return self._copy(node, {})
        if is_pointwise(node):
            constants = [operand for operand in node.all_input_nodes if operand not in self.twins]
            return self._copy(node, {constant: self._per_feature(node, constant) for constant in constants})
        along = self._along_features(node)
        if along is not None:
            return self._copy(node, {}, along)
        if name == "expand" and first in self.twins and not node.kwargs:
            features = tensor_meta(node).shape[1]
            return self._copy(node, {}, (first, [-1, features, *[-1] * self.rank]))
        if name in _LAST_AXIS and first in self.twins and list(rest[0]) == list(tensor_meta(node).shape[1:]):
            last = [0, *range(2, self.rank + 2), 1]
            back = [0, self.rank + 1, *range(1, self.rank + 1)]
            moved = self._call(node, aten.permute.default, (self.twins[first].node, last))
            normed = self._copy(node, {first: moved})
            return self._call(node, aten.permute.default, (normed, back))
        raise NoMap("no-map-form", node, "reads the head's features and has no form over a map")

    def _along_features(self, node: fx.Node) -> tuple[Any, ...] | None:
        """The arguments of a call along the features, with the axis as that of a map; None if it is none."""
        name, args = op_name(node), list(node.args)
        if name not in _ALONG_FEATURES | _AXIS_THIRD or node.kwargs:
            return None
        if name == "cat" and any(read not in self.twins for read in node.all_input_nodes):
            return None
        index = 2 if name in _AXIS_THIRD else 1
        default = -1 if name in ("glu", "linalg_vector_norm") else 0
        axis: Any = args[index] if len(args) > index else default
        if name == "slice" and axis == 0 and is_whole(node):
            return tuple(args)  # `x[:, 2:5]` begins with a slice of all samples
        if axis not in (1, -1, [1], [-1]):
            return None
        args[index:] = [[1] if isinstance(axis, list) else 1, *args[index + 1 :]]
        return tuple(args)

    def _copy(self, node: fx.Node, instead: dict[fx.Node, fx.Node], args: Any = None) -> fx.Node:
        """The same call on the twins."""

        def twin(operand: fx.Node) -> fx.Node:
            if operand in instead:
                return instead[operand]
            return self.twins[operand].node if operand in self.twins else operand

        made = self.gm.graph.call_function(
            node.target,  # type: ignore[arg-type]  # an op
            fx.map_arg(tuple(node.args if args is None else args), twin),
            dict(fx.map_arg(node.kwargs, twin)),
        )
        made.meta.update(origin(node))
        annotate(self.gm, made)
        self._made.append(made)
        return made

    def _per_feature(self, node: fx.Node, constant: fx.Node) -> fx.Node:
        """A constant of a vector with axes of positions behind it."""
        shape = [int(size) for size in tensor_meta(constant).shape]
        if prod(shape) == 1:
            return constant
        if prod(shape[:-1]) != 1:
            raise NoMap("no-map-form", node, f"takes other numbers for each sample, of shape {tuple(shape)}")
        return self._call(node, aten.reshape.default, (constant, [shape[-1], *[1] * self.rank]))
