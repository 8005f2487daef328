"""Where a file can be changed into a wrong one, and the change itself, on its syntax tree.

Changed are operators, comparisons, conditions, constants, extremes (`max` for `min`), the order of the first
two arguments, filters of comprehensions, and calls whose result nobody takes, which are dropped. Left alone
is what runs at import, what raises, and text.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_SWAPS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.USub: (ast.UAdd,),
}
_PAIRS = [("max", "min"), ("amax", "amin"), ("any", "all"), ("maximum", "minimum"), ("floor", "ceil")]
_NAMES = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}


class Site(NamedTuple):
    """One possible change: the node it is made at, the statement around that, and what is done."""

    node: ast.expr | ast.stmt | ast.comprehension
    statement: ast.stmt
    change: tuple[str, ...]

    @property
    def line(self) -> int:
        """Line of the node."""
        return (self.node.target if isinstance(self.node, ast.comprehension) else self.node).lineno

    @property
    def column(self) -> int:
        """Column of the node."""
        return (self.node.target if isinstance(self.node, ast.comprehension) else self.node).col_offset


def sites(tree: ast.Module) -> list[Site]:
    """Return every change that can be made inside the functions of a file, in the order of the tree."""
    return [
        Site(node, statement, change)
        for node, statement in _inside_functions(tree, None)
        for change in _changes(node)
    ]


def _inside_functions(
    node: ast.AST, statement: ast.stmt | None
) -> Iterator[tuple[ast.expr | ast.stmt | ast.comprehension, ast.stmt]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            for inner in child.body:
                yield from _statement(inner)
        elif isinstance(child, ast.ClassDef):
            yield from _inside_functions(child, None)
        elif statement is not None and isinstance(child, ast.stmt):
            yield from _statement(child)
        elif statement is not None and not isinstance(child, ast.JoinedStr):
            if isinstance(child, ast.expr | ast.comprehension):
                yield child, statement
            yield from _inside_functions(child, statement)


def _statement(node: ast.stmt) -> Iterator[tuple[ast.expr | ast.stmt | ast.comprehension, ast.stmt]]:
    if isinstance(node, ast.FunctionDef):
        for inner in node.body:
            yield from _statement(inner)
    elif isinstance(node, ast.AnnAssign):
        if node.value is not None:
            yield node.value, node
            yield from _inside_functions(node.value, node)
    elif not isinstance(node, ast.Raise) and not _is_docstring(node):
        yield node, node
        yield from _inside_functions(node, node)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _changes(node: ast.AST) -> Iterator[tuple[str, ...]]:
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            yield from (("compare", str(place), other.__name__) for other in _SWAPS[type(operator)])
    elif isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp | ast.UnaryOp):
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield ("no not",)
        yield from (("operator", other.__name__) for other in _SWAPS.get(type(node.op), ()))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        yield ("constant",)
    elif isinstance(node, ast.Name | ast.Attribute):
        name = node.id if isinstance(node, ast.Name) else node.attr
        yield from (("name", _NAMES[name]),) if name in _NAMES else ()
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield ("negated",)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ("dropped",)
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield ("no filter",)
    elif isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[0], ast.Name):
        yield ("swapped arguments",)


def changed(path: Path, place: int) -> ast.Module:
    """Return the tree of a file with its change number `place` made."""
    tree = ast.parse(path.read_text())
    node, _, change = sites(tree)[place]
    match change, node:
        case ("compare", at, other), ast.Compare():
            node.ops[int(at)] = getattr(ast, other)()
        case ("operator", other), ast.BinOp() | ast.AugAssign() | ast.BoolOp() | ast.UnaryOp():
            node.op = getattr(ast, other)()
        case ("no not",), ast.UnaryOp():
            node.operand = ast.UnaryOp(ast.Not(), node.operand)
        case ("constant",), ast.Constant(value=bool() as value):
            node.value = not value
        case ("constant",), ast.Constant(value=int() as value):
            node.value = value + 1
        case ("constant",), ast.Constant(value=float() as value):
            node.value = 2 * value if value else 1.0
        case ("name", other), ast.Name():
            node.id = other
        case ("name", other), ast.Attribute():
            node.attr = other
        case ("negated",), ast.If() | ast.IfExp() | ast.While():
            node.test = ast.UnaryOp(ast.Not(), node.test)
        case ("dropped",), ast.Expr():
            node.value = ast.Constant(None)
        case ("no filter",), ast.comprehension():
            node.ifs = []
        case ("swapped arguments",), ast.Call():
            node.args[:2] = node.args[1::-1]
    return ast.fix_missing_locations(tree)
