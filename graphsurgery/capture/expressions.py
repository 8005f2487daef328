"""Conditions on sizes as tuples of numbers and words: from Python's syntax, evaluated, and compiled.

As plain data they can be written into the code of a graph module, pickled, and read by `torch.compile`.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

__all__ = ["OPERATORS", "compiled", "evaluate", "function_of", "places", "translate"]

OPERATORS: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
    "neg": operator.neg,
    "not": operator.not_,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"max": max, "min": min}

_WORDS: dict[type, str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.USub: "neg",
    ast.Not: "not",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.And: "and",
    ast.Or: "or",
}


def evaluate(expression: Any, values: Sequence[Any]) -> Any:
    """Return the value of an expression: a number, or a tuple of an operator and its operands.

    `("size", i, axis)` is a size of the input `i`, `("value", i)` the number passed as input `i`; other words
    are those of `torch`'s own guards.
    """
    if not isinstance(expression, tuple):
        return expression
    word = expression[0]
    if word == "size":
        return values[expression[1]].shape[expression[2]]
    if word == "value":
        return values[expression[1]]
    if word == "and":
        return all(evaluate(operand, values) for operand in expression[1:])
    if word == "or":
        return any(evaluate(operand, values) for operand in expression[1:])
    operands = [evaluate(operand, values) for operand in expression[1:]]
    return function_of(word)(*operands)


def function_of(word: str) -> Any:
    """Return what a word in an expression calls.

    Raises:
        LookupError, AttributeError: It is none of torch's words.
    """
    known = OPERATORS.get(word) or _FUNCTIONS.get(word)
    if known is not None:
        return known
    first, *rest = word.split(".")  # `math.ceil`, `torch.sym_float`
    return functools.reduce(getattr, rest, SYMPY_INTERP[first])


_COMPILED: dict[int, tuple[Any, Callable[[Sequence[Any]], bool]]] = {}


def compiled(conditions: Any) -> Callable[[Sequence[Any]], bool]:
    """Return whether all conditions hold as one function, many times as fast as `evaluate`."""
    if id(conditions) not in _COMPILED:  # kept in the table, so that the id stays its own
        code = " and ".join(_source(condition) for _, condition in conditions)
        function = eval(f"lambda values: {code}", dict(SYMPY_INTERP))  # the words of `evaluate`, nothing else

        def holds(values: Sequence[Any]) -> bool:
            try:
                return bool(function(values))
            except ArithmeticError:
                return False

        _COMPILED[id(conditions)] = conditions, holds
    return _COMPILED[id(conditions)][1]


def _source(expression: Any) -> str:
    if not isinstance(expression, tuple):
        return repr(expression)
    word = expression[0]
    if word == "size":
        return f"values[{expression[1]}].shape[{expression[2]}]"
    if word == "value":
        return f"values[{expression[1]}]"
    operands = [_source(operand) for operand in expression[1:]]
    if word in ("neg", "not"):
        return f"({'-' if word == 'neg' else 'not '}{operands[0]})"
    if word in ("and", "or") or word in OPERATORS:
        return f"({f' {word} '.join(operands)})"
    return f"{word}({', '.join(operands)})"


def translate(node: ast.expr, leaf: Callable[[ast.expr], Any]) -> Any:
    """Return a Python expression as one for `evaluate`; `leaf` turns what is neither number nor operation."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.BinOp):
        return (_WORDS[type(node.op)], translate(node.left, leaf), translate(node.right, leaf))
    if isinstance(node, ast.UnaryOp):
        return (_WORDS[type(node.op)], translate(node.operand, leaf))
    if isinstance(node, ast.BoolOp):
        return (_WORDS[type(node.op)], *(translate(value, leaf) for value in node.values))
    if isinstance(node, ast.Compare):
        terms = [translate(term, leaf) for term in (node.left, *node.comparators)]
        pairs = [(_WORDS[type(op)], a, b) for op, a, b in zip(node.ops, terms, terms[1:], strict=False)]
        return pairs[0] if len(pairs) == 1 else ("and", *pairs)
    if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
        word = ast.unparse(node.func)
        if word.replace(".", "").isidentifier():
            function_of(word)
            return (word, *(translate(argument, leaf) for argument in node.args))
    return leaf(node)


def places(expression: Any) -> set[tuple[Any, ...]]:
    """Return the sizes and numbers of inputs that an expression reads."""
    if not isinstance(expression, tuple):
        return set()
    if expression[0] in ("size", "value"):
        return {expression}
    return set().union(*(places(operand) for operand in expression[1:]))
