"""Turn a head that flattens the map into convolutions, so that the network takes larger inputs.

Rule:      Linear(flatten(x))  ==  conv(x), the kernel the whole map; each later Linear a 1x1 convolution
Requires:  a flatten of channels and positions that leads to a Linear (else no match); refused with:
           `mixed-axes` the flatten mixes samples, or gives no list of features;
           `pool-not-identity` a pool of fixed size in front of it that changes the example's map;
           `global-pool` a global pool in front of it: the network takes any size already, and the mean of a
           map is not the map;
           `position-weights` the flattened map meets a norm or constant that differs by position;
           `not-per-position` a call on the way mixes positions (softmax over positions, attention, mean);
           `no-map-form` a call reads the head's features in a way that has no form over a map;
           `flat-output` the flattened map itself is an output;
           `no-mean` with `scores="mean"`, an output of whole numbers or truth values;
           `fixed-size` a call holds a size of the example, so that the network runs at no other;
           `not-finite` weights hold NaN or infinity;  `certificate` a layer differs in float64 at a position
Preserves: signature, dtypes; values up to rounding, at the example's size. The shape of an output of the head
           becomes (B, classes, *positions), all ones at that size, unless `scores="mean"`.
Source:    Long et al., "Fully convolutional networks for semantic segmentation", 2015, section 3.1; the mean
           of scores: Simonyan and Zisserman, "Very deep convolutional networks", 2015, section 3.2

The result equals the original at the example's size. At a larger size each position holds what the original
head makes of that window of the feature map; where nothing before the head is padded, that is the original
network on the crop. A padded convolution sees the neighbourhood where a crop shows it zeros, so there the
features near the crop's edges differ by nature.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import sympy  # type: ignore[import-untyped]  # ships no types
import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphsurgery.affine.certify import LIMIT
from graphsurgery.affine.certify_spread import residual
from graphsurgery.affine.per_position import acts_per_position
from graphsurgery.affine.pointwise import memory_readers
from graphsurgery.affine.pools import keeps_all, pool_call, pooled
from graphsurgery.affine.region import Scope
from graphsurgery.affine.spread import NoMap, Spread, Twin
from graphsurgery.cost import Cost, node_cost
from graphsurgery.errors import PassError
from graphsurgery.graph import INFO_KEY, CaptureInfo, annotate, copy_graph_module, delete_unused_attrs, origin
from graphsurgery.layout.flattened import FlattenedMap, HeadSearch, without_channels
from graphsurgery.rewrite.contracts import Change, NodeRef, Pass, PassResult, Preserves, Refusal
from graphsurgery.rewrite.free_sizes import FixedSize, free_axes, free_sizes
from graphsurgery.rewrite.sweep import erase_unread
from graphsurgery.values import is_tensor, tensor_meta

__all__ = ["FullyConvolutional"]

aten = torch.ops.aten


@dataclass(frozen=True)
class FullyConvolutional(Pass):
    """Makes flatten + Linear a convolution over the whole map, and frees height and width.

    Weights keep their names and bits; `classifier.0.weight` gets the shape of a convolution's.

    Attributes:
        scores: what an output of the head becomes: `"map"`, scores at every position, `(B, classes, H', W')`;
            or `"mean"`, their mean over the positions, `(B, classes)` at every size.
    """

    scores: Literal["map", "mean"] = "map"

    name: ClassVar[str] = "fully-convolutional"
    summary: ClassVar[str] = "flatten + Linear as a convolution over the whole map; height and width free"
    preserves: ClassVar[Preserves] = Preserves(shapes=False)
    default: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PassError: `scores` is neither of the two.
        """
        if self.scores not in ("map", "mean"):
            raise PassError(f"scores is 'map' or 'mean', got {self.scores!r}")

    def run(self, gm: fx.GraphModule) -> PassResult:
        """See `Pass.run`."""
        reasons: list[NoMap | FixedSize] = []  # the more telling the further ahead
        for channels_last in (False, True):
            surgery = _Surgery(gm, self.scores, channels_last)
            try:
                heads = surgery.search.heads()
                if not heads:
                    return PassResult(gm)
                entries, flattened = {head.entry for head in heads}, surgery.old[heads[0].flattened]
                return PassResult(surgery.gm, (surgery.operate(heads),))
            except NoMap as declined:
                reasons = [declined]
                break
            except FixedSize as declined:
                if declined.node not in surgery.old:
                    reasons.append(without_channels(flattened))  # the kernel does not fit
                elif declined.node in entries:
                    reasons.append(declined)
                else:
                    reasons.insert(0, declined)
        refusal = Refusal(self.name, reasons[0].code, (NodeRef.of(reasons[0].node),), str(reasons[0]))
        return PassResult(gm, (), (refusal,))


class _Surgery:
    """A copy of the graph under work."""

    def __init__(self, original: fx.GraphModule, scores: str, channels_last: bool) -> None:
        self.original, self.scores = original, scores
        self.gm = copy_graph_module(original)
        self.old = dict(zip(self.gm.graph.nodes, original.graph.nodes, strict=True))
        self.pools: list[fx.Node] = []
        self._drop_pools(HeadSearch(Scope(self.gm), channels_last))
        self.scope = Scope(self.gm)
        self.search = HeadSearch(self.scope, channels_last)
        self.readers = memory_readers(self.scope)

    def _drop_pools(self, search: HeadSearch) -> None:
        """Take the pools that keep the example's map off the way to a flatten; other readers keep them."""
        leading = {node for node in self.gm.graph.nodes if search.flattened(node)}
        for node in reversed(self.gm.graph.nodes):
            if not leading.isdisjoint(node.users):
                leading.add(node)
        for node in list(self.gm.graph.nodes):
            if node in leading and keeps_all(node):
                node.replace_all_uses_with(pooled(node), delete_user_cb=leading.__contains__)
                for unread in dict.fromkeys((node, pool_call(node))):
                    if not unread.users:
                        self.pools.append(unread)
                        self.gm.graph.erase_node(unread)

    # -- rewriting it

    def operate(self, heads: list[FlattenedMap]) -> Change:
        """Rewrite all heads of the graph.

        Raises:
            NoMap: it cannot be done.
            FixedSize: the graph runs at the example's size alone.
        """
        rank = len(heads[0].flat.sizes) - 1
        for head in heads:
            if len(head.flat.sizes) - 1 != rank:
                raise NoMap(
                    "mixed-axes", head.flattened, "flattens a map of another rank than the one before it"
                )
        spread = Spread(self.gm, self.scope.constant, self._own, rank)
        turned = [self._channels_first(head) for head in heads]
        for head, made in zip(heads, turned, strict=True):
            spread.twins[head.flattened] = Twin(made[-1] if made else head.entry, head.flat, made)
        for node in list(self.gm.graph.nodes):
            if node.op == "call_function" and any(read in spread.twins for read in node.all_input_nodes):
                spread.write(node)
        means, trailing = self._outputs(spread)
        for node in reversed(spread.twins):
            if not node._erased:
                read = node.all_input_nodes
                self.gm.graph.erase_node(node)  # a dropout counts as impure, so no sweep takes it
                erase_unread(read)
        free = free_sizes(self.gm, {head.entry: head.positions for head in heads})
        self._require_local([head.entry for head in heads], free)
        info = self.gm.meta.get(INFO_KEY)
        if isinstance(info, CaptureInfo):
            self.gm.meta[INFO_KEY] = replace(info, trailing_axes=trailing)
        delete_unused_attrs(self.gm)
        self.gm.graph.lint()
        self.gm.recompile()
        return self._change(spread, means, heads)

    def _channels_first(self, head: FlattenedMap) -> tuple[fx.Node, ...]:
        """The permute that gives a map as the kernel reads it, if it needs one."""
        if head.flat.channels == 1:
            return ()
        with self.gm.graph.inserting_before(head.flattened):
            made = self.gm.graph.call_function(
                aten.permute.default, (head.entry, [0, head.flat.channels, *head.positions])
            )
        made.meta.update(origin(head.flattened))
        annotate(self.gm, made)
        return (made,)

    def _own(self, weight: fx.Node) -> bool:
        """Whether one call reads a weight, under this name alone."""
        return len(self.readers[weight]) == 1

    def _outputs(self, spread: Spread) -> tuple[list[fx.Node], tuple[int, ...]]:
        """Let the outputs read the maps; return means that were written, and the new axes of each output."""
        output = self.gm.graph.output_node()
        means: dict[fx.Node, fx.Node] = {}

        def read(node: fx.Node) -> fx.Node:
            twin = spread.twins.get(node)
            if twin is None:
                return node
            if twin.flat is not None:
                raise NoMap("flat-output", node, f"is an output and lists a map of {_times(twin.flat.sizes)}")
            if self.scores == "map":
                return twin.node
            dtype = tensor_meta(node).dtype
            if not dtype.is_floating_point:
                raise NoMap(
                    "no-mean",
                    node,
                    f"is an output of {dtype}, of which scores='mean' has no mean; take 'map'",
                )
            if node not in means:
                with self.gm.graph.inserting_before(output):
                    means[node] = self.gm.graph.call_function(
                        aten.mean.dim, (twin.node, list(range(2, spread.rank + 2)))
                    )
                means[node].meta.update(origin(node))
                annotate(self.gm, means[node])
            return means[node]

        leaves = pytree.tree_leaves(output.args[0])
        grown = [leaf in spread.twins and self.scores == "map" for leaf in leaves]
        output.args = (fx.map_arg(output.args[0], read),)
        return list(means.values()), tuple(spread.rank * new for new in grown)

    def _require_local(self, entries: list[fx.Node], free: frozenset[sympy.Symbol]) -> None:
        """Refuse what mixes positions on the way to a map.

        Raises:
            NoMap: a call does.
        """
        stack, seen = list(entries), set(entries)
        while stack:
            node = stack.pop()
            if not acts_per_position(node, lambda value: free_axes(value, free)):
                raise NoMap(
                    "not-per-position",
                    node,
                    "mixes positions of the map or exchanges its axes, so on a larger map no window of it is "
                    "what it was",
                )
            stack += (more := set(node.all_input_nodes) - seen)
            seen |= more

    def _change(self, spread: Spread, means: list[fx.Node], heads: list[FlattenedMap]) -> Change:
        """Certify what was written, and describe it.

        Raises:
            NoMap: it differs from the original head.
        """
        old, new = Scope(self.original), Scope(self.gm)
        replaced = [self.old[node] for node in spread.twins]
        worst = residual(old, new, {self.old[node]: twin for node, twin in spread.twins.items()}, self.old)
        if not worst <= LIMIT:
            constants = {read for node in replaced for read in node.all_input_nodes if read in old.constant}
            if not all(bool(torch.isfinite(old.constant_value(read)).all()) for read in constants):
                raise NoMap("not-finite", replaced[0], "leads to weights that hold NaN or infinity")
            raise NoMap(
                "certificate",
                replaced[0],
                f"leads to layers that differ by {worst:.1e} in float64 at some position, expected at most "
                f"{LIMIT:.0e}; please report this",
            )
        moves = [self.old[move] for head in heads for move in head.flat.moves[:-1]]
        before = sorted({*map(self.old.__getitem__, self.pools), *moves, *replaced}, key=old.position)
        after = [node for twin in spread.twins.values() for node in twin.made] + means
        after = [node for node in after if node.op == "call_function" and node not in new.constant]
        sizes = " and ".join(_times(head.flat.sizes[1:]) for head in heads)
        return Change(
            FullyConvolutional.name,
            "flatten+linear",
            tuple(map(NodeRef.of, before)),
            tuple(map(NodeRef.of, after)),
            tuple(spread.written),
            _cost(old, before),
            _cost(new, after),
            worst,
            f"a kernel of {sizes}; {_inputs(self.gm)}",
        )


def _cost(scope: Scope, nodes: list[fx.Node]) -> Cost:
    return sum((node_cost(node, scope.sizes) for node in nodes), Cost(params=scope.params(nodes)[0]))


def _times(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))


def _inputs(gm: fx.GraphModule) -> str:
    """Which sizes of the inputs are free now, for a reader."""
    parts = []
    for node in gm.graph.find_nodes(op="placeholder"):
        shape = tensor_meta(node).shape if is_tensor(node) else ()
        axes = [str(axis) for axis, size in enumerate(shape) if axis and not isinstance(size, int)]
        parts += [f"axes {', '.join(axes)} of input {str(node.target)!r} are free"] * bool(axes)
    return "; ".join(parts)
