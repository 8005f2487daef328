"""What a node, a stretch of nodes or a whole graph costs, counted from shapes alone.

Heavy multiplications (`macs`) are what convolutions, matrix products and attention do. Elementwise work,
movement of data, parameters and nodes are counted apart, since a runtime pays for them differently.
All figures are per sample: a dynamic batch counts as 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx

from graphsurgery.errors import PassError
from graphsurgery.values import Sizes, constant_nodes, is_tensor, operand_tensors, tensor_meta

# fmt: off
SPLITS = frozenset((
    "split", "split_with_sizes", "chunk", "tensor_split", "unbind",
    "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk",
))
"""Ops that give a tuple of pieces of their operand; `getitem` says which piece."""

_VIEWS = SPLITS | frozenset((
    "reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as",
    "alias", "detach", "lift_fresh_copy", "slice", "select", "narrow", "getitem", "dropout", "clone",
    "contiguous",
))
_MOVEMENT = frozenset((
    "permute", "transpose", "movedim", "t", "numpy_T", "mT", "cat", "stack", "pad", "constant_pad_nd", "roll",
    "flip", "index", "index_select", "repeat", "tile", "repeat_interleave", "gather", "embedding",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d", "_pad_circular",
))
# fmt: on
_PERMUTES = frozenset(("permute", "transpose", "t", "numpy_T"))
_ONE_BY_ONE = 8
"""What an element costs that is copied alone, in elements of rows that are copied whole."""

_KINDS = {
    "conv": (
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
    ),
    "linear": ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "vdot", "einsum"),
    "attention": ("scaled_dot_product_attention",),
    "norm": ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"),
    "embedding": ("embedding",),
    "pool": (
        *(
            f"{kind}_pool{rank}d"
            for kind in ("avg", "max", "adaptive_avg", "adaptive_max")
            for rank in (1, 2, 3)
        ),
        *(f"max_pool{rank}d_with_indices" for rank in (2, 3)),
        "mean",
    ),
    "movement": tuple(sorted(_VIEWS | _MOVEMENT)),
}
_KIND_OF = {op: kind for kind, ops in _KINDS.items() for op in ops}


@dataclass(frozen=True)
class Cost:
    """Cost of a piece of a graph, per sample.

    Attributes:
        macs: heavy multiplications (each one multiply and one add).
        elementwise: elements written by all other arithmetic (activations, norms, adds, pool reads).
        moved: elements copied by permutes, concatenations, splits, pads and gathers; those that a permute
            has to copy one by one count eight times (`copied`).
        params: numbers held in parameters and buffers that it reads.
        nodes: calls that a runtime executes.
    """

    macs: int = 0
    elementwise: int = 0
    moved: int = 0
    params: int = 0
    nodes: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations: two per multiplication and one per element of other work."""
        return 2 * self.macs + self.elementwise

    def __add__(self, other: Cost) -> Cost:
        """Sum figure by figure."""
        return Cost(*(a + b for a, b in zip(self.figures(), other.figures(), strict=True)))

    def __sub__(self, other: Cost) -> Cost:
        """Difference figure by figure."""
        return Cost(*(a - b for a, b in zip(self.figures(), other.figures(), strict=True)))

    def figures(self) -> tuple[int, int, int, int, int]:
        """The figures in field order."""
        return (self.macs, self.elementwise, self.moved, self.params, self.nodes)

    def __str__(self) -> str:
        """One line for refusals and tables."""
        moved = f", {self.moved:,} moved" if self.moved else ""
        work = f"{self.macs:,} MACs, {self.elementwise:,} elementwise{moved}"
        return f"{work}, {self.params:,} parameters, {self.nodes} nodes"


Score = tuple[float, ...]


@runtime_checkable
class CostModel(Protocol):
    """What is cheaper than what."""

    @property
    def name(self) -> str:
        """Name for reports."""

    def score(self, cost: Cost) -> Score:
        """Figures to minimise, first figure first.

        The figures of several pieces are added, so each must be additive; and every length the same.
        """


@dataclass(frozen=True)
class FlopsModel:
    """The default: floating-point operations plus moved elements, then nodes, then parameters."""

    name: str = "flops"

    def score(self, cost: Cost) -> Score:
        """(operations and moved elements, nodes, parameters)."""
        return (cost.flops + cost.moved, cost.nodes, cost.params)


FLOPS = FlopsModel()
MEASURED = "measured"
"""What `graphsurgery.optimize` takes as `cost` to time candidates; it counts nothing, so is no cost model."""


def cost_model(wanted: str | CostModel) -> CostModel:
    """A cost model by name, or the one given.

    Raises:
        PassError: there is none of that name, or what was given is no cost model.
    """
    if not isinstance(wanted, str):
        if isinstance(wanted, type) or not isinstance(wanted, CostModel):
            raise PassError(
                f"cost is the name of a cost model or a CostModel, got {wanted!r}; {FLOPS.name!r} is one"
            )
        _try_score(wanted)
        return wanted
    if wanted == MEASURED:
        raise PassError(
            f"cost={MEASURED!r} times candidates, which a pass by itself cannot; "
            "give it to graphsurgery.optimize"
        )
    if wanted != FLOPS.name:
        raise PassError(
            f"there is no cost model named {wanted!r}; expected {FLOPS.name!r}, a CostModel or (in optimize) "
            f"{MEASURED!r}"
        )
    return FLOPS


def _try_score(model: CostModel) -> None:
    """Call a model once, so that a fault of it is named before a pass fails on it."""
    try:
        score = model.score(Cost())
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise PassError(f"the cost model {model!r} fails on a Cost of nothing: {found}") from error
    if not (isinstance(score, tuple) and score and all(isinstance(figure, (int, float)) for figure in score)):
        raise PassError(f"score() of the cost model {model!r} gives a tuple of numbers, got {score!r}")


def op_name(node: fx.Node) -> str:
    """The bare name of the op a node calls: `conv2d`, `add`, `getitem`; the node's op for other nodes."""
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target))


def axis_order(node: fx.Node) -> list[int] | None:
    """The order in which a permute reads the axes of its operand: output axis `i` is input axis `order[i]`.

    Returns:
        None if `node` is no permute.
    """
    name = op_name(node)
    if name not in _PERMUTES or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    rank = node.meta["val"].dim()
    order = list(range(rank))
    if name in ("t", "numpy_T"):
        return order[::-1]
    arguments: tuple[Any, ...] = (*node.args[1:], *node.kwargs.values())
    if name == "transpose":
        a, b = (axis % rank if rank else 0 for axis in arguments)
        if rank:
            order[a], order[b] = order[b], order[a]
        return order
    return [axis % rank for axis in arguments[0]]


def kind_of(node: fx.Node) -> str:
    """The kind of layer: conv, linear, attention, norm, embedding, pool, movement, or elementwise."""
    return _KIND_OF.get(op_name(node), "elementwise")


def node_cost(node: fx.Node, sizes: Sizes | None = None) -> Cost:
    """Cost of one node without the parameters it reads (they may be shared)."""
    name = op_name(node)
    if node.op == "call_function" and name in SPLITS:
        # A view in torch; every other runtime copies the pieces.
        sizes = sizes or Sizes(node.graph)
        return Cost(moved=sum(_count(piece, sizes) for piece in node.meta["val"]), nodes=1)
    if node.op != "call_function" or not is_tensor(node):
        return Cost()
    sizes = sizes or Sizes(node.graph)
    out = _numel(node, sizes)
    if name in ("alias", "detach", "getitem", "sym_size"):
        return Cost()
    if name in _VIEWS:
        return Cost(nodes=1)
    order = axis_order(node)
    if order is not None:
        operand: Any = node.args[0]
        return Cost(moved=copied(out, order, [sizes.at(n, 2) for n in tensor_meta(operand).shape]), nodes=1)
    if name in _MOVEMENT:
        return Cost(moved=out, nodes=1)
    macs = _macs(node, name, out, sizes)
    if macs is not None:
        return Cost(macs=macs, nodes=1)
    return Cost(elementwise=_elementwise(node, name, out, sizes), nodes=1)


def copied(elements: int, order: Sequence[int], sizes: Sequence[int]) -> int:
    """What a permute costs in elements of a copy that runs through memory.

    onnxruntime copies rows whole where the last axis stays, and moves a single axis by transposing matrices;
    both run at the speed of memory. All else it copies element by element, which takes 8 times as long
    (measured by `benchmarks/permutes.py`). So two permutes of the first kinds may cost a quarter of the one
    that does what both do.

    Args:
        elements: How many elements the value has, per sample.
        order: Output axis `i` is input axis `order[i]`.
        sizes: Sizes of the operand; of an axis that is free, any above 1.
    """
    blocks: list[list[int]] = []  # of axes that stay side by side
    for axis in order:
        if blocks and axis == blocks[-1][-1] + 1:
            blocks[-1].append(axis)
        else:
            blocks.append([axis])
    if _ascends([axis for axis in order if sizes[axis] != 1]):
        return elements
    rows = blocks[-1][-1] == len(order) - 1 and prod(sizes[axis] for axis in blocks[-1]) > 1
    one_moves = any(
        _ascends([axis for block in blocks if block is not moved for axis in block]) for moved in blocks
    )
    return elements if rows or one_moves else _ONE_BY_ONE * elements


def _ascends(numbers: Sequence[int]) -> bool:
    return list(numbers) == sorted(numbers)


def graph_cost(gm: fx.GraphModule, shapes: Mapping[str, Sequence[int]] | None = None) -> Cost:
    """Cost of a whole graph, per sample; parameters that no node reads are not counted.

    Args:
        gm: A captured graph.
        shapes: Sizes of inputs by the name of their placeholder, which stand for the example's where these
            are free.
    """
    sizes = Sizes(gm.graph, shapes)
    constant = constant_nodes(gm.graph)
    total = Cost()
    attributes = {
        n.target: int(tensor_meta(n).numel()) for n in gm.graph.nodes if n.op == "get_attr" and is_tensor(n)
    }
    for node in gm.graph.nodes:
        if node not in constant:
            total += node_cost(node, sizes)
    return total + Cost(params=sum(attributes.values()))


def layer_counts(gm: fx.GraphModule) -> dict[str, int]:
    """How many layers of each kind a graph calls; constants and symbol arithmetic are left out."""
    constant = constant_nodes(gm.graph)
    counts = Counter(
        kind_of(node)
        for node in gm.graph.nodes
        if node.op == "call_function" and is_tensor(node) and node not in constant
    )
    return dict(sorted(counts.items()))


def _numel(node: fx.Node, sizes: Sizes) -> int:
    return _count(tensor_meta(node), sizes)


def _count(value: torch.Tensor, sizes: Sizes) -> int:
    return prod(sizes.per_sample(size) for size in value.shape)


def _shape(node: Any, sizes: Sizes) -> tuple[int, ...]:
    return tuple(sizes.per_sample(size) for size in tensor_meta(node).shape)


def _macs(node: fx.Node, name: str, out: int, sizes: Sizes) -> int | None:
    """Heavy multiplications of a node, None where the op is not a heavy one."""
    args: tuple[Any, ...] = node.args
    if name in ("linear",):
        return out * _shape(args[1], sizes)[-1]
    if name.startswith("conv_transpose") or (name == "convolution" and args[6]):
        # weight: (in, out/groups, *kernel); each input element meets out/groups * kernel weights
        return _numel(args[0], sizes) * prod(_shape(args[1], sizes)[1:])
    if name.startswith("conv"):
        return out * prod(_shape(args[1], sizes)[1:])
    if name in ("matmul", "mm", "bmm", "mv", "dot", "vdot"):
        return out * _shape(args[0], sizes)[-1]
    if name in ("addmm", "baddbmm", "addmv"):
        return out * _shape(args[1], sizes)[-1]
    if name == "scaled_dot_product_attention":
        queries, keys = _shape(args[0], sizes), _shape(args[1], sizes)
        return prod(queries) * keys[-2] + prod(queries[:-1]) * keys[-2] * _shape(args[2], sizes)[-1]
    if name == "einsum":
        return _einsum_macs(str(args[0]), [_shape(operand, sizes) for operand in args[1]])
    return None


def _einsum_macs(equation: str, shapes: list[tuple[int, ...]]) -> int:
    """Product of the sizes of all labels; an ellipsis counts with the axes that it stands for."""
    labels: dict[str, int] = {}
    for term, shape in zip(equation.replace(" ", "").split("->")[0].split(","), shapes, strict=True):
        named = len(term.replace("...", ""))
        free = "".join(chr(0x100 + i) for i in range(len(shape) - named))
        for label, size in zip(term.replace("...", free), shape, strict=True):
            labels[label] = max(size, labels.get(label, 1))
    return prod(labels.values())


def _elementwise(node: fx.Node, name: str, out: int, sizes: Sizes) -> int:
    if "pool" in name or name in ("mean", "sum", "amax", "amin", "prod"):
        source = node.args[0]
        read = _numel(source, sizes) if isinstance(source, fx.Node) and is_tensor(source) else out
        return max(out, read)
    if kind_of(node) == "norm":
        # batch norm is one multiply-add per element; the others also take two moments
        return 2 * out if name == "batch_norm" else 4 * out
    operands = [_numel(operand, sizes) for operand in operand_tensors(node)]
    return max([out, *operands])
