"""What an exported program knows of the sizes of its inputs, as rules that a call can be compared with.

Three sources, all torch's own: the sizes of the placeholders (numbers, symbols, expressions of symbols), the
ranges of the symbols (`range_constraints`), and the conditions met in tracing (`_guards_code`). They are what
`ExportedProgram.module()` checks too.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]  # ships no types
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from graphsurgery.capture.checked import FIXED_KINDS, CheckedCodeGen, Rules, check_inputs, kind_of
from graphsurgery.capture.expressions import evaluate, places, translate
from graphsurgery.capture.inputs import Inputs

__all__ = ["TRIED", "InputSizes", "install"]

TRIED = 16
"""Batch sizes up to this one are asked for in `InputSizes.refused_batches`."""

_UNBOUND = 2  # torch traces for sizes of 2 and more, and lets 0 and 1 pass where nothing else is known


class InputSizes:
    """The sizes of the flat inputs of one captured graph.

    Args:
        program: Where the graph comes from.
        gm: The graph module, whose placeholders' `meta["val"]` are fake values.
        names: Names of the flat inputs.
        example: The example inputs.
        batched: Whether the leading dimension is free; it is called `batch` then.
        given: Names of sizes that the caller gave, by flat input and axis.

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
        given: Mapping[tuple[int, int], str],
    ) -> None:
        self._program = program
        self._codegen: Any = gm.graph._codegen
        self._names = names
        self._values = [node.meta.get("val") for node in gm.graph.nodes if node.op == "placeholder"]
        self._leaves = self.flat(example)
        self.free: dict[sympy.Symbol, str] = {}
        self._where: dict[sympy.Symbol, tuple[Any, ...]] = {}
        self._exprs = {self._place(index, axis): expr for index, axis, expr in self._axes()}
        for index, axis, expr in self._axes():
            if expr.is_Symbol and expr not in self.free:
                name = (
                    f"{names[index]}_dim{axis}"
                    if isinstance(self._values[index], torch.Tensor)
                    else names[index]
                )
                name = given.get((index, axis), name)
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
        return int(evaluate(self._where[symbol], self._leaves))

    def resized(self, inputs: Inputs, symbol: sympy.Symbol, size: int) -> Inputs | None:
        """Return `inputs` with one free size changed, by cutting or repeating; None if it cannot be."""
        values = {other: self.example_size(other) for other in self.free} | {symbol: size}
        leaves = self.flat(inputs)
        for index, axis, expr in self._axes():
            if symbol not in expr.free_symbols:
                continue
            wanted = expr.subs(values)
            if not wanted.is_Integer or wanted < 0:
                return None
            leaf = leaves[index]
            if isinstance(leaf, torch.Tensor):
                rows = torch.arange(int(wanted), device=leaf.device) % max(leaf.shape[axis], 1)
                leaves[index] = leaf.index_select(axis, rows)
            else:
                leaves[index] = int(wanted)
        args, kwargs = pytree.tree_unflatten(leaves, self._codegen.pytree_info.in_spec)
        return Inputs(args, kwargs)

    def refused_batches(self, rules: Rules, inputs: Inputs) -> tuple[int, ...]:
        """Return the batch sizes up to `TRIED` that the rules refuse; none where the batch is not free."""
        batch = self._batch()
        if batch is None or not (rules.sizes or rules.conditions):
            return ()
        meta = inputs.map_tensors(lambda tensor: tensor.to("meta"))
        return tuple(size for size in range(1, TRIED + 1) if not self._accepts(rules, meta, batch, size))

    def _batch(self) -> sympy.Symbol | None:
        return next((symbol for symbol, name in self.free.items() if name == "batch"), None)

    def batch_axes(self, inputs: Inputs) -> tuple[tuple[int, int, int, int], ...] | None:
        """Return `CaptureInfo.batch_axes`; None where no input has the batch as it stands."""
        batch = self._batch()
        if batch is None:
            return None
        count = len(pytree.tree_leaves((inputs.args, inputs.kwargs)))
        spec = pytree.tree_structure((inputs.args, inputs.kwargs))
        order = self.flat(Inputs(*pytree.tree_unflatten(range(count), spec)))
        found = []
        for index, axis, expr in self._axes():
            if batch not in expr.free_symbols:
                continue
            factor, offset = expr.coeff(batch, 1), expr.subs(batch, 0)
            if not (factor.is_Integer and offset.is_Integer and expr == factor * batch + offset):
                return None
            tensor = isinstance(self._values[index], torch.Tensor)
            found.append((order[index], axis if tensor else -1, int(factor), int(offset)))
        return tuple(sorted(found))

    def _accepts(self, rules: Rules, inputs: Inputs, symbol: sympy.Symbol, size: int) -> bool:
        changed = self.resized(inputs, symbol, size)
        if changed is None:
            return False
        try:
            check_inputs(self.flat(changed), *rules[:3])
        except ValueError:
            return False
        return True

    # -- rules

    def rules(self, holds_at_one: Mapping[sympy.Symbol, bool]) -> tuple[Rules, tuple[str, ...]]:
        """Return the rules, and notes on conditions that could not be made one.

        Args:
            holds_at_one: The free sizes that were tried at 1, and whether the graph is right there. Where it
                is, no condition of the tracing stands against it; where not, 1 is refused.
        """
        inputs = tuple(self._input(index) for index in range(len(self._values)))
        sizes = [(name, *self._range(symbol)) for symbol, name in self.free.items()]
        for index, symbol in enumerate(self.free):
            name, low, high = sizes[index]
            if low is None and not holds_at_one.get(symbol, True):
                sizes[index] = (name, 2, high)
        conditions, notes = self._conditions()
        bounded = tuple(size for size in sizes if size[1:] != (None, None))
        exempt = {symbol for symbol, holds in holds_at_one.items() if holds}
        lifted = tuple((text, self._but_at_one(expression, exempt)) for text, expression in conditions)
        return Rules(inputs, bounded, lifted, self._lengths()), notes

    def _lengths(self) -> tuple[tuple[str, int, tuple[Any, ...], int], ...]:
        info = self._codegen.pytree_info
        found: list[tuple[str, int, tuple[Any, ...], int]] = []

        def walk(spec: Any, name: str, number: int, path: tuple[Any, ...]) -> None:
            keys = spec.context if spec.type is dict else range(spec.num_children)
            if spec.type not in (list, tuple, dict) or not all(isinstance(key, (str, int)) for key in keys):
                return
            found.append((name, number, path, spec.num_children))
            for key, child in zip(keys, spec.children(), strict=True):
                walk(child, f"{name}[{key!r}]", number, (*path, key))

        args, kwargs = info.in_spec.children()
        for number, spec in enumerate((*args.children(), *kwargs.children())):
            walk(spec, info.orig_args[number], number, ())
        return tuple(found)

    def _but_at_one(self, expression: Any, exempt: set[sympy.Symbol]) -> Any:
        """Lift a condition on one free size where that is 1 and the graph was tried at 1."""
        symbols: set[sympy.Symbol] = set()
        for place in places(expression):
            symbols |= self._exprs.get(place, sympy.Integer(0)).free_symbols
        if len(symbols) == 1 and symbols <= exempt:
            return ("or", ("==", self._where[symbols.pop()], 1), expression)
        return expression

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

    def _range(self, expr: sympy.Expr) -> tuple[int | None, int | None]:
        bounds = self._program.range_constraints.get(expr)
        low = getattr(bounds, "lower", None)
        high = getattr(bounds, "upper", None)
        lowest = int(low) if isinstance(low, sympy.Integer) and low > _UNBOUND else None
        return lowest, int(high) if isinstance(high, sympy.Integer) else None

    # -- conditions

    def _conditions(self) -> tuple[list[tuple[str, Any]], tuple[str, ...]]:
        found: dict[str, Any] = {}
        notes: list[str] = []
        for index, axis, expr in self._axes():
            solved = None if expr in self.free else self._solved(expr)
            if solved is not None:
                place = self._place(index, axis)
                text = f"{self._text(place)} == {self._expression_text(expr)}"
                found[text] = ("==", place, solved)
                low, high = self._range(expr)
                if low is not None:
                    found[f"{self._text(place)} >= {low}"] = (">=", place, low)
                if high is not None:
                    found[f"{self._text(place)} <= {high}"] = ("<=", place, high)
        sources = self._sources()
        for guard in dict.fromkeys(self._program._guards_code or ()):
            try:
                tree = ast.parse(guard, mode="eval").body
                expression = translate(tree, lambda node: self._find(node, sources))
                with contextlib.suppress(ArithmeticError):
                    evaluate(expression, self._leaves)
            except (LookupError, SyntaxError, TypeError, AttributeError, RecursionError):
                notes.append(f"a condition of torch.export on the inputs is not checked in calls: {guard}")
                continue
            if not self._is_said(expression):
                found[self._readable(tree, sources)] = expression
        return list(found.items()), tuple(notes)

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
        for index, axis, expr in self._axes():
            if expr.free_symbols == {symbol}:
                factor = expr.coeff(symbol)
                rest = expr - factor * symbol
                if factor.is_Integer and factor > 0 and rest.is_Integer:
                    return ("//", ("-", self._place(index, axis), int(rest)), int(factor))
        return None

    # -- torch's words for the inputs

    def _sources(self) -> dict[str, int]:
        """Return what guards may call the flat inputs: `L['x']`, `L['xs'][0]`, `L['flat_args'][0]`."""
        info = self._codegen.pytree_info
        guards = " ".join(self._program._guards_code or ())
        positional = info.in_spec.children()[0].num_children
        keywords = list(info.in_spec.children()[1].context)
        tree = pytree.tree_unflatten([0] * info.in_spec.num_leaves, info.in_spec)
        found: dict[str, int] = {}
        for index, (path, _) in enumerate(pytree.tree_flatten_with_path(tree)[0]):
            key: Any = path[1]
            args = isinstance(key, pytree.SequenceKey)
            number = key.idx if args else positional + keywords.index(key.key)
            name, rest = info.orig_args[number], pytree.keystr(path[2:])
            found[f"L[{name!r}]{rest}"] = index
            found[f"L['flat_args'][{index}]"] = index
            varying = re.fullmatch(r"(.+)_(\d+)", name)
            if args and varying:  # of `*xs`, whose items are called xs_0, xs_1
                found.setdefault(f"L[{varying[1]!r}][{varying[2]}]{rest}", index)
            elif not args:  # of `**options`, by whatever name
                for group in re.findall(rf"L\['(\w+)'\]\['{name}'\]", guards):
                    found.setdefault(f"L[{group!r}][{name!r}]{rest}", index)
        return found

    def _find(self, node: ast.expr, sources: Mapping[str, int]) -> Any:
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            call = node.value
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr == "size"
            ):
                return ("size", _index(call.func.value, sources), node.slice.value)
        return ("value", _index(node, sources))

    def _readable(self, tree: ast.expr, sources: Mapping[str, int]) -> str:
        text = ast.unparse(tree)
        for source in sorted(sources, key=len, reverse=True):
            name = self._names[sources[source]]
            text = text.replace(f"{source}.size()", f"{name}.shape").replace(source, name)
        return text

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


def _index(node: ast.expr, sources: Mapping[str, int]) -> int:
    return sources[ast.unparse(node)]


def install(gm: fx.GraphModule, rules: Rules) -> tuple[str, ...]:
    """Make the code of `gm` check what it is called with; return a note for each argument that is fixed.

    The check is part of how the graph takes its arguments, so it stays with copies of the graph, is there
    under `fx.Interpreter`, and is done while `torch.export` traces, whose own guards it becomes.
    """
    if rules.inputs:
        info = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]  # a captured graph has it
        gm.graph._codegen = CheckedCodeGen(info, rules)
        gm.recompile()
    return tuple(
        f"the argument {name!r} is fixed at {value!r}, as in the example"
        for name, kind, value in rules.inputs
        if kind == "fixed" and value is not None
    )
