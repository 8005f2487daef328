"""Calls cut out of a graph as a small graph of their own, at the sizes of the example.

Everything in a cut has a name of its own making, so that equal stretches of different layers are equal cuts:
what the times of one are, are those of all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import getitem
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from graphsurgery.cost import Cost, graph_cost
from graphsurgery.graph import annotate, capture_info, fake_mode, get_attr_value
from graphsurgery.measure.errors import NotMeasured
from graphsurgery.rewrite.fingerprint import fingerprint
from graphsurgery.values import Sizes, constant_nodes, is_tensor

__all__ = ["Cut", "cut"]


@dataclass(frozen=True)
class Cut:
    """A stretch of a graph with fixed sizes.

    Attributes:
        gm: The calls; placeholders `x0`, `x1`, ... for what enters them, a tuple of what leaves them.
        inputs: A tensor for each placeholder: the example's own where it is an input of the model, else
            drawn.
    """

    gm: fx.GraphModule
    inputs: tuple[torch.Tensor, ...]

    @cached_property
    def key(self) -> str:
        """Hash of the calls, their options, wiring, shapes and dtypes; not of the weights' values."""
        digest = hashlib.blake2b(fingerprint(self.gm, _kind).encode(), digest_size=16)
        digest.update(repr([(tuple(x.shape), x.dtype) for x in self.inputs]).encode())
        return digest.hexdigest()

    @cached_property
    def cost(self) -> Cost:
        """What it costs by counts, at the example's batch."""
        return graph_cost(self.gm)

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(value.numel() * value.element_size() for value in self.gm.buffers())


def _kind(tensor: torch.Tensor) -> bytes:
    return repr((tuple(tensor.shape), tensor.dtype)).encode()


def cut(gm: fx.GraphModule, names: Collection[str] | None = None) -> Cut:
    """Cut calls out of a captured graph, which is not changed.

    Args:
        gm: The graph.
        names: Names of its calls; those that it has not, and constants, do not count. None for all calls.

    Raises:
        NotMeasured: There is nothing to run, or a size is not known from the example.
    """
    try:
        return _Cutting(gm, names).done()
    except NotMeasured:
        raise
    except Exception as error:  # a foreign graph may hold anything
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        raise NotMeasured(f"it cannot be cut out of the graph ({reason})") from error


class _Cutting:
    """One cut while it is made."""

    def __init__(self, gm: fx.GraphModule, names: Collection[str] | None) -> None:
        self.gm = gm
        self.sizes = Sizes(gm.graph)
        self.batch = _batch(gm, self.sizes)
        self.constant = constant_nodes(gm.graph)
        self.inside = self._inside(names)
        self.graph, self.root = fx.Graph(), nn.Module()
        self.inputs: list[torch.Tensor] = []
        self.known: dict[fx.Node, Any] = {}

    def _inside(self, names: Collection[str] | None) -> set[fx.Node]:
        """The calls asked for, and the parts that are taken of their tuples."""
        inside: set[fx.Node] = set()
        for node in self.gm.graph.nodes:
            if node.op != "call_function" or node in self.constant or _is_number(node):
                continue
            if node.target is getitem:  # of a tuple that stays outside it is a value that enters
                if node.args[0] in inside:
                    inside.add(node)
            elif names is None or node.name in names:
                inside.add(node)
        return inside

    def done(self) -> Cut:
        nodes = [node for node in self.gm.graph.nodes if node in self.inside]
        leaving = [node for node in nodes if is_tensor(node) and set(node.users) - self.inside]
        if not leaving:
            raise NotMeasured("none of its calls gives a value to another")
        for node in nodes:  # placeholders lead a graph
            for operand in node.all_input_nodes:
                outside = operand not in self.inside and operand not in self.constant
                if outside and operand not in self.known and is_tensor(operand):
                    self._enter(operand)
        for node in nodes:
            self._copy(node)
        self.graph.output(tuple(self.known[node] for node in leaving))
        made = fx.GraphModule(self.root, self.graph)
        mode = fake_mode(self.gm)
        for node, value in zip(made.graph.find_nodes(op="placeholder"), self.inputs, strict=True):
            node.meta["val"] = mode.from_tensor(value, static_shapes=True)
        for node in made.graph.nodes:
            if node.op in ("call_function", "get_attr"):
                annotate(made, node)
        return Cut(made, tuple(self.inputs))

    def _enter(self, node: fx.Node) -> None:
        self.known[node] = self.graph.placeholder(f"x{len(self.inputs)}")
        self.inputs.append(_example_of(self.gm, node) if node.op == "placeholder" else self._drawn(node))

    def _drawn(self, node: fx.Node) -> torch.Tensor:
        """A value as another call would give it: normal numbers, indices of zero, masks that let through."""
        value = node.meta["val"]
        shape = [self.sizes.at(size, self.batch) for size in value.shape]
        if value.is_floating_point() or value.is_complex():
            seed = torch.Generator().manual_seed(len(self.inputs))
            return torch.randn(shape, generator=seed).to(value.dtype)
        return torch.full(shape, value.dtype == torch.bool, dtype=value.dtype)

    def _copy(self, node: fx.Node) -> None:
        """Copy a call or constant, and the constants that it reads."""
        stack = [node]
        while stack:
            last = stack[-1]
            missing = [
                operand
                for operand in last.all_input_nodes
                if operand in self.constant and operand not in self.known and is_tensor(operand)
            ]
            if missing:
                stack += missing
                continue
            stack.pop()
            if last in self.known:
                continue
            if last.op == "get_attr":
                name = f"c{len(self.root._buffers)}"
                value = get_attr_value(self.gm, str(last.target)).detach()
                self.root.register_buffer(name, value)
                self.known[last] = self.graph.get_attr(name)
            else:
                arguments = map_aggregate((last.args, last.kwargs), self._argument)
                self.known[last] = self.graph.call_function(last.target, *arguments)  # type: ignore[arg-type]  # a call

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.known[value] if value in self.known else self._number(value.meta.get("val"))
        return self._number(value) if isinstance(value, torch.SymInt) else value

    def _number(self, value: Any) -> Any:
        """What a size, or a value that is no tensor, is in the example."""
        if isinstance(value, torch.SymInt):
            return self.sizes.at(value, self.batch)
        if isinstance(value, (bool, int, float, str, type(None))):
            return value
        raise NotMeasured(f"it reads a {type(value).__name__} that is known in a run only")


def _is_number(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float))


def _example_of(gm: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    """The example's value of an input."""
    value = _leaves(gm)[gm.graph.find_nodes(op="placeholder").index(node)]
    if not isinstance(value, torch.Tensor):
        raise NotMeasured(f"input {node.name!r} is a {type(value).__name__} in the example")
    return value.detach()


def _leaves(gm: fx.GraphModule) -> list[Any]:
    info = capture_info(gm)
    return pytree.tree_leaves((info.args, info.kwargs), is_leaf=lambda leaf: leaf is None)


def _batch(gm: fx.GraphModule, sizes: Sizes) -> int:
    """The batch of the example: what its free leading sizes are made of."""
    placeholders: Sequence[fx.Node] = gm.graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, _leaves(gm), strict=False):
        if not is_tensor(node) or not isinstance(value, torch.Tensor) or not value.ndim:
            continue
        size, actual = node.meta["val"].shape[0], value.shape[0]
        if isinstance(size, torch.SymInt):
            for batch in range(actual, 0, -1):
                if sizes.at(size, batch) == actual:
                    return int(batch)
    return 1
