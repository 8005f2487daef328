"""What an exported program knows of the sizes of its inputs, as rules that a call can be compared with.

Three sources, all torch's own: the sizes of the placeholders (numbers, symbols, expressions of symbols), the
ranges of the symbols (`range_constraints`), and the conditions met in tracing (`_guards_code`). They are what
`ExportedProgram.module()` checks too.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import sympy  # type: ignore[import-untyped]  # ships no types
import torch
from torch import fx
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from graphsurgery.capture.checked import FIXED_KINDS, Rules, check_inputs, kind_of, lengths_of
from graphsurgery.capture.expressions import evaluate, places, translate
from graphsurgery.capture.guards import GuardReader
from graphsurgery.capture.inputs import Inputs
from graphsurgery.capture.small import Condition, Sizes, Space, settle

__all__ = ["TRIED", "InputSizes"]

TRIED = 16
"""Batch sizes up to this one are asked for in `InputSizes.refused_batches`."""

_UNBOUND = 2  # torch traces for sizes of 2 and more, and lets 0 and 1 pass where nothing else is known
Bounds = dict[sympy.Symbol, tuple[int | None, int | None]]
"""The least and the greatest value of each free size."""


class InputSizes:
    """The sizes of the flat inputs of one captured graph.

    Args:
        program: Where the graph comes from.
        gm: The graph module, whose placeholders' `meta["val"]` are fake values.
        names: Names of the flat inputs.
        example: The example inputs.
        batched: Whether the leading dimension is free; it is called `batch` then.
        given: What the caller gave for sizes (`Dim`, `Dim.DYNAMIC`), by flat argument and axis.

    Attributes:
        free: Name of each free size that is an axis of an input as it stands.
    """

    def __init__(
        self,
        program: ExportedProgram,
        gm: fx.GraphModule,
        names: tuple[str, ...],
        example: Inputs,
        *,
        batched: bool,
        given: Mapping[tuple[int, int], Any],
    ) -> None:
        self._program = program
        self._codegen: Any = gm.graph._codegen
        self._names = names
        self._values = [node.meta.get("val") for node in gm.graph.nodes if node.op == "placeholder"]
        self._example = example
        self._leaves = self.flat(example)
        count, spec = len(self._leaves), pytree.tree_structure((example.args, example.kwargs))
        self._order: list[int] = self.flat(Inputs(*pytree.tree_unflatten(range(count), spec)))
        self._given = given
        self._batched = batched
        self._found = self._axes()
        self.free: dict[sympy.Symbol, str] = {}
        self._where: dict[sympy.Symbol, tuple[Any, ...]] = {}
        self._exprs = {self._place(index, axis): expr for index, axis, expr in self._found}
        for index, axis, expr in self._found:
            if expr.is_Symbol and expr not in self.free:
                name = (
                    f"{names[index]}_dim{axis}"
                    if isinstance(self._values[index], torch.Tensor)
                    else names[index]
                )
                size = self._given_size(index, axis)
                name = size.__name__ if isinstance(size, Dim) else name
                if batched and axis == 0 and "batch" not in self.free.values():
                    name = "batch"
                while name in self.free.values():
                    name += "_"
                self.free[expr] = name
                self._where[expr] = self._place(index, axis)

    def flat(self, inputs: Inputs) -> list[Any]:
        """Return inputs in the order of the placeholders."""
        order = self._codegen.pytree_info.in_spec.children()[1].context
        return pytree.tree_leaves((inputs.args, {key: inputs.kwargs[key] for key in order}))

    def _axes(self) -> list[tuple[int, int, sympy.Expr]]:
        """Every symbolic size: input, axis, expression."""
        found = []
        for index, value in enumerate(self._values):
            sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
            for axis, size in enumerate(sizes):
                if isinstance(size, torch.SymInt) and not size.node.expr.is_number:
                    found.append((index, axis, size.node.expr))
        return found

    def _place(self, index: int, axis: int) -> tuple[Any, ...]:
        tensor = isinstance(self._values[index], torch.Tensor)
        return ("size", index, axis) if tensor else ("value", index)

    # -- other sizes than the example's

    def example_size(self, symbol: sympy.Symbol) -> int:
        """Return the size that a free size has in the example."""
        place = self._where[symbol] if symbol in self._where else self._root(symbol)
        return int(evaluate(place, self._leaves))

    def resized(self, inputs: Inputs, sizes: Sizes) -> Inputs | None:
        """Return `inputs` with free sizes changed, by cutting or repeating; None if they cannot be."""
        values = {symbol: self.example_size(symbol) for symbol in self.free} | dict(sizes)
        leaves = self.flat(inputs)
        for index, axis, expr in self._found:
            if sizes.keys().isdisjoint(expr.free_symbols):
                continue
            wanted = expr.subs(values)
            if not wanted.is_Integer or wanted < 0:
                return None
            leaf = leaves[index]
            if isinstance(leaf, torch.Tensor) and leaf.shape[axis] != wanted:
                rows = torch.arange(int(wanted), device=leaf.device) % max(leaf.shape[axis], 1)
                leaves[index] = leaf.index_select(axis, rows)
            elif not isinstance(leaf, torch.Tensor):
                leaves[index] = int(wanted)
        args, kwargs = pytree.tree_unflatten(leaves, self._codegen.pytree_info.in_spec)
        return Inputs(args, kwargs)

    def refused_batches(self, rules: Rules, inputs: Inputs) -> tuple[int, ...]:
        """Return the batch sizes up to `TRIED` that the rules refuse; none where the batch is not free."""
        if self._batch() is None or not (rules.sizes or rules.conditions):
            return ()
        meta = inputs.map_tensors(lambda tensor: tensor.to("meta"))
        return tuple(size for size in range(1, TRIED + 1) if not self._accepts(rules, meta, size))

    def _batch(self) -> sympy.Symbol | None:
        """Return the batch: a leading size, or what the first is made of where none is free itself."""
        found = next((symbol for symbol, name in self.free.items() if name == "batch"), None)
        if found is None and self._batched:
            leading = next((expr for _, axis, expr in self._found if axis == 0), sympy.Integer(0))
            found = next(iter(leading.free_symbols), None)
            found = None if found is None or self._root(found) is None else found
        return found

    def batch_axes(self) -> tuple[tuple[int, int, int, int], ...] | None:
        """Return `CaptureInfo.batch_axes`; None where no size is made of the batch alone."""
        batch = self._batch()
        if batch is None:
            return None
        found = [(self._order[index], 0, 1, 0) for index, expr in self._beside(batch) if expr != batch]
        for index, axis, expr in self._found:
            if batch not in expr.free_symbols:
                continue
            factor, offset = expr.coeff(batch, 1), expr.subs(batch, 0)
            if not (factor.is_Integer and offset.is_Integer and expr == factor * batch + offset):
                return None
            tensor = isinstance(self._values[index], torch.Tensor)
            found.append((self._order[index], axis if tensor else -1, int(factor), int(offset)))
        return tuple(sorted(found))

    def _beside(self, batch: sympy.Symbol) -> set[tuple[int, sympy.Expr]]:
        """Leading sizes that no condition ties to the batch, as those of a mask that is only indexed."""
        tensors = (
            (i, e) for i, axis, e in self._found if axis == 0 and isinstance(self._values[i], torch.Tensor)
        )
        own = ((i, e) for i, e in tensors if e in self._where and not isinstance(self._given_size(i), Dim))
        return {(i, e) for i, e in own if self.example_size(e) == self.example_size(batch)}

    def _group(self) -> frozenset[sympy.Symbol]:
        """Return the batch, where it is free, and what is beside it."""
        batch = self._batch()
        return frozenset() if batch is None else frozenset({batch, *(e for _, e in self._beside(batch))})

    def _accepts(self, rules: Rules, inputs: Inputs, size: int) -> bool:
        changed = self.resized(inputs, dict.fromkeys(self._group(), size))
        if changed is None:
            return False
        try:
            check_inputs(self.flat(changed), *rules[:3])
        except ValueError:
            return False
        return True

    def names(self) -> dict[str, str]:
        """Return `CaptureInfo.size_names`: the caller's where there are some (`h` of `32 * Dim("h")`)."""
        found = dict(self.free)
        for index, axis, expr in self._found:
            size = self._given_size(index, axis)
            if isinstance(size, Dim) and len(expr.free_symbols) == 1:
                found[next(iter(expr.free_symbols))] = getattr(size, "root", size).__name__
        return {str(symbol): name for symbol, name in found.items()}

    # -- rules

    def rules(self, agrees: Callable[[Sizes, Inputs], bool] | None) -> tuple[Rules, tuple[str, ...]]:
        """Return the rules, and notes on conditions that could not be made one.

        Args:
            agrees: Whether the model runs at some sizes, on these inputs, and the graph gives the same; asked
                where a size is 0 or 1, see `graphsurgery.capture.small`. None where there is no model: then
                all conditions of the tracing hold, and 0 and 1 are taken where none speaks against it.
        """
        inputs = tuple(self._input(index) for index in range(len(self._values)))
        conditions, notes = self._conditions()
        bounds = {symbol: self._range(symbol, *place[1:]) for symbol, place in self._where.items()}
        traced = {symbol: self._traced_least(symbol) for symbol in self.free}
        conditions += [condition for condition in traced.values() if condition is not None]
        if agrees is not None:
            conditions = self._settle(conditions, bounds, agrees)
        for symbol, condition in traced.items():
            if condition is not None and condition in conditions:  # as a bound it has a better message
                conditions.remove(condition)
                bounds[symbol] = (condition.expression[2], bounds[symbol][1])
        bounded = tuple((self.free[symbol], *both) for symbol, both in bounds.items() if both != (None, None))
        said = tuple((condition.text, condition.expression) for condition in conditions)
        return Rules(inputs, bounded, said, lengths_of(self._codegen.pytree_info)), notes

    def _traced_least(self, symbol: sympy.Symbol) -> Condition | None:
        """Return the lower bound of a free size that the model, not the caller, put on it."""
        place = self._where[symbol]
        low = getattr(self._program.range_constraints.get(symbol), "lower", None)
        own = self._range(symbol, *place[1:])[0]
        if not isinstance(low, sympy.Integer) or low <= max(own or 0, _UNBOUND):
            return None
        return Condition(f"{self._text(place)} >= {low}", (">=", place, int(low)))

    def _settle(
        self, conditions: list[Condition], bounds: Bounds, agrees: Callable[[Sizes, Inputs], bool]
    ) -> list[Condition]:
        """Return the conditions that remain after trials; what is refused is put into `bounds`."""
        example = {symbol: self.example_size(symbol) for symbol in self.free}

        def run(sizes: Sizes) -> bool:
            inputs = self.resized(self._example, sizes)
            return inputs is not None and agrees(sizes, inputs)

        space = Space(
            example,
            {symbol: (low or 0, high) for symbol, (low, high) in bounds.items()},
            self._where,
            {symbol: self._text(place) for symbol, place in self._where.items()},
            self._symbols_in,
            self._shapes,
            self._group(),
        )
        settled = settle(space, conditions, run)
        for symbol, values in settled.refused.items():
            bounds[symbol] = (max(values) + 1, bounds[symbol][1])
        return list(settled.conditions)

    def _symbols_in(self, expression: Any) -> set[sympy.Symbol] | None:
        exprs = [self._exprs[place] for place in places(expression) if place in self._exprs]
        symbols: set[sympy.Symbol] = set().union(*(expr.free_symbols for expr in exprs))
        return symbols if symbols <= self.free.keys() else None

    def _shapes(self, sizes: Sizes) -> list[Any] | None:
        """Return, in place of the flat inputs, their shapes at the given sizes; None if there are none."""
        found: list[Any] = [
            SimpleNamespace(shape=list(leaf.shape)) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in self._leaves
        ]
        for index, axis, expr in self._found:
            if expr.is_Symbol and expr in sizes:
                size = sizes[expr]
            elif expr.free_symbols.isdisjoint(self.free):
                continue  # of a symbol that is no axis itself, and stays as it is
            else:
                wanted = expr.subs(sizes)
                if not wanted.is_Integer or wanted < 0:
                    return None
                size = int(wanted)
            if isinstance(self._leaves[index], torch.Tensor):
                found[index].shape[axis] = size
            else:
                found[index] = size
        return found

    def _input(self, index: int) -> tuple[str, str, Any]:
        name, value = self._names[index], self._values[index]
        if isinstance(value, torch.Tensor):
            sizes = tuple(self._size(index, axis, size) for axis, size in enumerate(value.shape))
            return name, kind_of(value), sizes
        if isinstance(value, torch.SymInt):
            return name, "number", (self._size(index, 0, value),)
        return (name, "fixed", value) if type(value) in FIXED_KINDS else (name, "any", None)

    def _size(self, index: int, axis: int, size: Any) -> int | str | None:
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if expr.is_number:
            return int(expr)
        if expr in self.free:
            return self.free[expr]
        if self._solved(expr) is not None:
            return None  # a condition says the rest
        return int(evaluate(self._place(index, axis), self._leaves))

    def _given_size(self, index: int, axis: int = 0) -> Any:
        return self._given.get((self._order[index], axis))

    def _range(self, expr: sympy.Expr, index: int, axis: int = 0) -> tuple[int | None, int | None]:
        """Return the least size that the caller allows on an axis (1 is nobody else's), and the greatest."""
        bounds = self._program.range_constraints.get(expr)
        low, high = getattr(bounds, "lower", None), getattr(bounds, "upper", None)
        given = getattr(self._given_size(index, axis), "min", None)
        lowest = given or (1 if low == 1 else None)
        return lowest, int(high) if isinstance(high, sympy.Integer) else None

    # -- conditions

    def _conditions(self) -> tuple[list[Condition], tuple[str, ...]]:
        found: dict[str, Condition] = {}

        def add(text: str, expression: Any, *, fixed: bool = False) -> None:
            if text not in found or fixed:
                found[text] = Condition(text, expression, fixed)

        notes: list[str] = []
        for index, axis, expr in self._found:
            solved = None if expr in self.free else self._solved(expr)
            if solved is not None:
                place = self._place(index, axis)
                add(f"{self._text(place)} == {self._expression_text(expr)}", ("==", place, solved))
                low, high = self._range(expr, index, axis)
                traced = getattr(self._program.range_constraints.get(expr), "lower", None)
                if isinstance(traced, sympy.Integer) and traced > max(low or 0, _UNBOUND):
                    low = int(traced)
                if low is not None:
                    add(f"{self._text(place)} >= {low}", (">=", place, low), fixed=True)
                if high is not None:
                    add(f"{self._text(place)} <= {high}", ("<=", place, high), fixed=True)
        reader = GuardReader(self._program, self._codegen, self._names)
        for guard in dict.fromkeys(self._program._guards_code or ()):
            try:
                text, expression = reader.read(guard)
                with contextlib.suppress(ArithmeticError):
                    evaluate(expression, self._leaves)
            except (LookupError, SyntaxError, TypeError, AttributeError, RecursionError):
                notes.append(f"a condition of torch.export on the inputs is not checked in calls: {guard}")
                continue
            if not self._is_said(expression):
                add(text, expression)
        return list(found.values()), tuple(notes)

    def _is_said(self, expression: Any) -> bool:
        """Return whether a condition is that two axes have one size, which is named the same for both."""
        equal = isinstance(expression, tuple) and expression[0] == "=="
        exprs = [self._exprs.get(place) for place in expression[1:]] if equal else []
        return len(exprs) == 2 and exprs[0] is not None and exprs[0] == exprs[1]

    def _solved(self, expr: sympy.Expr) -> Any:
        """Return an expression that tells what an axis of size `expr` must be, None if there is none."""
        names = {str(symbol): place for symbol, place in self._where.items()}
        for symbol in expr.free_symbols - self._where.keys():
            root = self._root(symbol)
            if root is None:
                return None
            names[str(symbol)] = root
        try:
            tree = ast.parse(_python(expr), mode="eval").body
            return translate(tree, lambda node: names[ast.unparse(node)])
        except (LookupError, AttributeError):  # a function that has no word in code
            return None

    def _root(self, symbol: sympy.Symbol) -> Any:
        """Return a symbol that is no axis itself (of `3*Dim("h")`), by means of the axis made of it."""
        for index, axis, expr in self._found:
            if expr.free_symbols == {symbol}:
                factor = expr.coeff(symbol)
                rest = expr - factor * symbol
                if factor.is_Integer and factor > 0 and rest.is_Integer:
                    return ("//", ("-", self._place(index, axis), int(rest)), int(factor))
        return None

    def _text(self, place: tuple[Any, ...]) -> str:
        name = self._names[place[1]]
        return f"{name}.shape[{place[2]}]" if place[0] == "size" else name

    def _expression_text(self, expr: sympy.Expr) -> str:
        text = _python(expr)
        for symbol in expr.free_symbols:
            name = self._text(self._where[symbol]) if symbol in self._where else "n"
            text = re.sub(rf"\b{symbol}\b", name, text)
        return text


def _python(expr: sympy.Expr) -> str:
    return str(PythonPrinter().doprint(expr))
