"""Record the values of a graph anew, with sizes of its inputs free that were those of the example.

A graph that was captured for one height and width runs at others as soon as no call in it holds a size of its
own. Whether that is so is asked of torch: the calls are traced on fake tensors whose sizes are symbols, and a
call that needs a certain size either raises, binds a symbol to a number, or leaves a condition.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]  # ships no types
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from graphsurgery.cost import op_name
from graphsurgery.graph import get_attr_value
from graphsurgery.values import EXAMPLE_SHAPE, is_tensor, tensor_meta

__all__ = ["FixedSize", "free_axes", "free_sizes"]

_GROWN = 2
"""How many times the example's size a free size is traced at: where a map has one position left, torch takes
its size for a constant."""

_LARGER = ((1, 1), (2, 3), (31, 7), (32, 64), (160, 161))  # added to the sizes; every condition has to hold

Axis = tuple[fx.Node, int]


class FixedSize(Exception):
    """The sizes of the inputs cannot be free.

    Attributes:
        node: the call that needs a certain size.
        code: stable code for a refusal.
    """

    code = "fixed-size"

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(f"{node.name!r} ({op_name(node)}) {reason}")
        self.node = node


def free_axes(node: fx.Node, free: frozenset[sympy.Symbol]) -> tuple[int, ...]:
    """The axes of a value whose sizes depend on the symbols in `free`."""
    return tuple(i for i, size in enumerate(tensor_meta(node).shape) if _symbols(size) & free)


def free_sizes(gm: fx.GraphModule, wanted: Mapping[fx.Node, Sequence[int]]) -> frozenset[sympy.Symbol]:
    """Free the input sizes that certain axes of certain values come from, and record all values anew.

    Sizes that were free before stay so. `gm` is changed in `node.meta["val"]` alone.

    Args:
        gm: a graph in the captured dialect.
        wanted: values, and axes of each that have to grow with the inputs; one of size 1 may stay if another
            grows.

    Returns:
        The new symbols; each is a size of an input.

    Raises:
        FixedSize: an axis does not grow, or the graph runs only at certain sizes.
    """
    feeding = _inputs_of(wanted)
    labels = _labels(gm)
    declined: FixedSize | None = None
    for first in (True, False):  # channels first, then channels last
        asked = {
            (node, axis): f"{labels[node]}_dim{axis}"
            for node in feeding
            for axis in range(1, tensor_meta(node).dim())
            if axis != (1 if first else tensor_meta(node).dim() - 1)
            if isinstance(size := tensor_meta(node).shape[axis], int) and size > 1
        }
        try:
            trace = _settled(gm, asked, wanted)
            _free_checks(gm, trace)
            return _record(trace)
        except FixedSize as error:
            declined = declined or error
    raise declined or RuntimeError("no layout was tried")


def _labels(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """The inputs under the names that the model has for them, where the graph knows them."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    rules = getattr(gm.graph._codegen, "rules", None)
    if rules is None:
        return {node: node.name for node in placeholders}
    return {node: given[0] for node, given in zip(placeholders, rules.inputs, strict=True)}


def _inputs_of(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The inputs of more than two axes that some values are computed from."""
    stack, seen = list(nodes), set(nodes)
    while stack:
        stack += (more := set(stack.pop().all_input_nodes) - seen)
        seen |= more
    return [n for n in seen if n.op == "placeholder" and is_tensor(n) and tensor_meta(n).dim() > 2]


def _settled(
    gm: fx.GraphModule, asked: Mapping[Axis, str], wanted: Mapping[fx.Node, Sequence[int]]
) -> _Trace:
    """The trace in which those input sizes are free that the wanted axes come from.

    Raises:
        FixedSize: an axis does not grow, or the graph runs only at certain sizes.
    """
    trace = _Trace(gm, asked)
    trace.run()
    needed: set[sympy.Symbol] = set()
    names = {trace.final(symbol) for symbol in trace.symbols.values()}
    for node, axes in wanted.items():
        found = [_symbols(trace.values[node].shape[axis]) for axis in axes]
        each = [{trace.final(symbol) for symbol in symbols} & names for symbols in found]
        for axis, symbols in zip(axes, each, strict=True):
            if not symbols and (tensor_meta(node).shape[axis] != 1 or not any(each)):
                raise trace.culprit(node, axis)
        if len(set().union(*each)) < sum(map(len, each)):
            raise FixedSize(node, "has axes that hang on each other, as only a square input gives them")
        needed.update(*each)
    kept = {axis: key for axis, key in asked.items() if trace.final(trace.symbols[key]) in needed}
    if kept != asked:
        return _settled(gm, kept, wanted)
    if trace.bound:
        raise trace.culprit(next(iter(wanted)), 2)
    for node, condition in trace.conditions:
        if not trace.holds(condition):
            raise FixedSize(node, f"runs only where {condition}")
    return trace


def _free_checks(gm: fx.GraphModule, trace: _Trace) -> None:
    """Let the checks of the inputs take what is free now, from the example's size on."""
    codegen = gm.graph._codegen
    rules = getattr(codegen, "rules", None)
    if rules is None:
        return
    names: dict[sympy.Expr, str] = {}
    inputs, bounds = list(rules.inputs), list(rules.sizes)
    placeholders = gm.graph.find_nodes(op="placeholder")
    for (node, axis), key in trace.free.items():
        name = names.setdefault(trace.final(trace.symbols[key]), key)
        index = placeholders.index(node)
        label, kind, sizes = inputs[index]
        if name == key:
            bounds.append((name, sizes[axis], None))
        inputs[index] = (label, kind, (*sizes[:axis], name, *sizes[axis + 1 :]))
    own: Any = copy.copy(codegen)  # other graphs share the one that was there
    own.rules = rules._replace(inputs=tuple(inputs), sizes=tuple(bounds))
    gm.graph._codegen = own


def _record(trace: _Trace) -> frozenset[sympy.Symbol]:
    for node, value in trace.values.items():
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            node.meta.setdefault(EXAMPLE_SHAPE, tuple(map(_example, node.meta["val"].shape)))
        node.meta["val"] = value
    return frozenset(trace.symbols.values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging the traceback of a fake kernel that raises: it is an answer here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Trace:
    """One trace of the calls.

    Attributes:
        env: what the symbols are bound to.
        symbols: the new symbols by name.
        values: the fake values.
        bound: names of the new symbols that became a number, and the call that did it.
        conditions: what the calls asked of the sizes.
    """

    def __init__(self, gm: fx.GraphModule, free: Mapping[Axis, str]) -> None:
        self.gm = gm
        self.env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.env)
        self.free = free
        self.symbols: dict[str, sympy.Symbol] = {}
        self.values: dict[fx.Node, Any] = {}
        self.bound: dict[str, fx.Node] = {}
        self.conditions: list[tuple[fx.Node, sympy.Expr]] = []
        self._sizes: dict[str, torch.SymInt] = {}

    def run(self) -> None:
        """Trace all calls.

        Raises:
            FixedSize: one of them does not run.
        """
        for node in self.gm.graph.nodes:
            if node.op == "output":
                continue
            try:
                with self.mode, torch.no_grad(), _quiet():
                    self.values[node] = self._value(node)
            except Exception as error:  # a fake kernel raises all kinds
                line = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise FixedSize(node, f"does not run at other sizes ({line[:160]})") from error
            new = self.env.guards[len(self.conditions) :]
            self.conditions += [(node, guard.expr) for guard in new]
            for key, symbol in self.symbols.items():
                if not isinstance(self.final(symbol), sympy.Symbol):
                    self.bound.setdefault(key, node)

    def _value(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self.mode.from_tensor(get_attr_value(self.gm, str(node.target)), static_shapes=True)
        if node.op == "placeholder":
            old = node.meta.get("val")
            if not isinstance(old, torch.Tensor):
                return old
            sizes = [self._size(node, axis, size) for axis, size in enumerate(old.shape)]
            return torch.empty(sizes, dtype=old.dtype, device=old.device)
        call: Callable[..., Any] = node.target  # type: ignore[assignment]  # the dialect calls operators only
        args = fx.map_arg(node.args, self.values.__getitem__)
        return call(*args, **fx.map_arg(node.kwargs, self.values.__getitem__))

    def _size(self, node: fx.Node, axis: int, size: int | torch.SymInt) -> int | torch.SymInt:
        if isinstance(size, int):
            key = self.free.get((node, axis))
            if key is None:
                return size
            made = self._symbol(key, _GROWN * size)
            self.symbols[key] = made.node.expr
            return made
        # a size that was free before: the same symbol wherever it stood
        return self._symbol(f"_{size.node.expr}", max(2, int(size.node.hint or 2)))

    def _symbol(self, key: str, hint: int) -> torch.SymInt:
        if key not in self._sizes:
            from torch._dynamo.source import ConstantSource  # loads the whole compiler: seconds

            source = ConstantSource(key)
            symbol = self.env.create_symbol(hint, source, DimDynamic.DYNAMIC)
            self._sizes[key] = self.env.create_symintnode(symbol, hint=hint, source=source)  # type: ignore[assignment]
        return self._sizes[key]

    def final(self, symbol: sympy.Expr) -> sympy.Expr:
        """What a symbol stands for by now."""
        return self.env.replace(symbol)

    def culprit(self, node: fx.Node, axis: int) -> FixedSize:
        """Who is to blame for an axis of a value that does not grow with the inputs."""
        for call in self.bound.values():
            return FixedSize(call, "holds a size of the example")
        return FixedSize(node, f"has a size of its own along axis {axis}, whatever the input")

    def holds(self, condition: sympy.Expr) -> bool:
        """Whether a condition holds at all of the larger sizes that are tried."""
        return all(self._holds(condition, added) for added in _LARGER)

    def _holds(self, condition: sympy.Expr, added: tuple[int, int]) -> bool:
        hints: Any = [(size.node.expr, size.node.hint) for size in self._sizes.values()]
        binding = {symbol: int(hint) for symbol, hint in hints}
        for i, symbol in enumerate(self.symbols.values()):
            binding[symbol] += added[i % 2]
        return bool(condition.subs(binding) == sympy.true)


def _symbols(size: int | torch.SymInt) -> frozenset[sympy.Symbol]:
    return frozenset() if isinstance(size, int) else frozenset(size.node.expr.free_symbols)


def _example(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint or 2)
