"""Where a file can be changed into a wrong one: operators, comparisons, conditions, constants, arguments.

Left alone are what runs at import, what is raised, annotations and text.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

_SWAPS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    **{ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE)},
    **{ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,)},
    **{ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.Add: (ast.Sub,)},
    **{ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,), ast.FloorDiv: (ast.Mult,)},
    **{ast.Mod: (ast.Mult,), ast.Pow: (ast.Mult,), ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,)},
    **{ast.And: (ast.Or,), ast.Or: (ast.And,), ast.USub: (ast.UAdd,)},
}
_PAIRS = [("max", "min"), ("amax", "amin"), ("any", "all"), ("maximum", "minimum"), ("floor", "ceil")]
_NAMES = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}


class Site(NamedTuple):
    """One possible change: its lines and column, what is done, and what does it to the tree."""

    first: int
    last: int
    column: int
    change: str
    make: Callable[[], None]


def sites(tree: ast.Module) -> list[Site]:
    """Return every change that can be made inside the functions of a file, in the order of the tree."""
    return list(_sites(tree, False))


def _sites(node: ast.AST, inside: bool) -> Iterator[Site]:
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.arguments):
        return
    if isinstance(node, ast.FunctionDef):
        children: list[Any] = node.body
        inside = True
    elif isinstance(node, ast.AnnAssign):
        children = [node.value] if node.value is not None else []
    else:
        children = list(ast.iter_child_nodes(node))
    if inside:
        at: Any = node.target if isinstance(node, ast.comprehension) else node
        for change, make in _changes(node):
            # of a compound statement, its first line alone
            last = at.lineno if isinstance(at, ast.stmt) else at.end_lineno
            yield Site(at.lineno, last, at.col_offset, change, make)
    for child in children:
        yield from _sites(child, inside)


def _changes(node: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    def put(field: str, value: object) -> Callable[[], None]:
        return partial(setattr, node, field, value)

    match node:
        case ast.Compare():
            for place, operator in enumerate(node.ops):
                for other in _SWAPS[type(operator)]:
                    yield other.__name__, partial(node.ops.__setitem__, place, other())
        case ast.UnaryOp(op=ast.Not()):
            yield "no not", put("operand", ast.UnaryOp(ast.Not(), node.operand))
        case ast.BinOp() | ast.AugAssign() | ast.BoolOp() | ast.UnaryOp():
            for other in _SWAPS.get(type(node.op), ()):
                yield other.__name__, put("op", other())
        case ast.Constant(value=bool() as value):
            yield "flipped", put("value", not value)
        case ast.Constant(value=int() as value):
            yield "one more", put("value", value + 1)
        case ast.Constant(value=float() as value):
            yield "doubled", put("value", 2 * value if value else 1.0)
        case ast.Name(id=name) if name in _NAMES:
            yield _NAMES[name], put("id", _NAMES[name])
        case ast.Attribute(attr=name) if name in _NAMES:
            yield _NAMES[name], put("attr", _NAMES[name])
        case ast.If() | ast.IfExp() | ast.While():
            yield "negated", put("test", ast.UnaryOp(ast.Not(), node.test))
        case ast.Expr(value=ast.Call()):
            yield "dropped", put("value", ast.Constant(None))
        case ast.comprehension(ifs=[_, *_]):
            yield "no filter", put("ifs", [])
        case ast.Call(args=[ast.Name(), _, *_]):
            yield "swapped arguments", put("args", [node.args[1], node.args[0], *node.args[2:]])
