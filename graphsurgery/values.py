"""What is known of a graph's values before anything runs: sizes, and which of them are constant.

Sizes of a captured graph may hold symbols (a dynamic batch is `s77`). Analysis wants plain integers, so
symbols are bound to numbers: to 1 where a cost per sample is asked for, to a large prime where axes are
factored (a merged `batch * 196` then divides without ambiguity), to the real size where a region is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import sympy  # type: ignore[import-untyped]  # ships no types
import torch
from torch import fx

# The first of the primes that stand for symbols: above any real size, so that no product of real sizes is
# divided by one of them.
_FIRST_PRIME = 1_000_000_007

_WORD = re.compile(r"\b[A-Za-z_]\w*")

EXAMPLE_SHAPE = "example_shape"
"""Key of `node.meta` of an input: its sizes in the example, where they are not the hints of its symbols."""


def symbols_of(size: int | torch.SymInt) -> frozenset[sympy.Symbol]:
    """The free symbols of one size; empty for a plain integer."""
    if isinstance(size, int):
        return frozenset()
    return frozenset(size.node.expr.free_symbols)


def size_text(size: int | torch.SymInt, names: Mapping[str, str]) -> str:
    """Write a size with the names of its symbols: `4*s39` as `4*height`; a symbol without one stays."""
    return _WORD.sub(lambda found: names.get(found[0], found[0]), str(size))


def named_sizes(graph: fx.Graph, names: Mapping[str, str]) -> list[dict[int, str]]:
    """Return, for each placeholder, the `size_text` of its free sizes whose symbols have names, by axis."""
    values = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    shapes = [value.shape if isinstance(value, torch.Tensor) else () for value in values]
    return [
        {
            axis: size_text(size, names)
            for axis, size in enumerate(shape)
            if symbols_of(size) and names.keys() >= {str(symbol) for symbol in symbols_of(size)}
        }
        for shape in shapes
    ]


@lru_cache(maxsize=65536)
def _substitute(expr: sympy.Expr, binding: tuple[tuple[sympy.Symbol, int], ...]) -> int:
    return int(expr.subs(dict(binding)))


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's value is a single tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def tensor_meta(node: fx.Node) -> torch.Tensor:
    """The fake tensor of a node.

    Raises:
        TypeError: the node has no single-tensor value recorded.
    """
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        raise TypeError(f"node {node.name!r} ({node.target}) has no tensor value recorded in meta['val']")
    return val


class Sizes:
    """The symbolic sizes of one graph and how they are bound to integers.

    A size is read as a product of a number and factors. A factor that is no symbol (the size behind a strided
    convolution, `(s - 1) // 2 + 1`) counts as one, with a prime of its own.

    Attributes:
        batch: symbols that lead an input tensor (axis 0); a dynamic batch.
        others: all other symbols, with the size they have in the example.
        primes: each prime in use and the expression that it stands for.
        known: those primes whose expression the ranges of its symbols leave but one number:
            `(s - 1) // 512 + 1` for an `s` up to 512.
    """

    def __init__(self, graph: fx.Graph, shapes: Mapping[str, Sequence[int]] | None = None) -> None:
        """Collect the symbols of a graph from the shapes of its values.

        Args:
            graph: The graph.
            shapes: Sizes of inputs by the name of their placeholder, which stand for the example's.
        """
        given: dict[sympy.Expr, int] = {}
        for node in graph.nodes:
            if shapes is not None and node.op == "placeholder" and node.name in shapes:
                own: tuple[int | torch.SymInt, ...] = tuple(tensor_meta(node).shape)
                for size, number in zip(own, shapes[node.name], strict=True):
                    if not isinstance(size, int):
                        given[size.node.expr] = number
        batch: dict[sympy.Symbol, None] = {}
        others: dict[sympy.Symbol, int] = {}
        expressions: dict[sympy.Expr, None] = {}
        single: dict[sympy.Expr, int] = {}
        for node in graph.nodes:
            if not is_tensor(node):
                continue
            shape: tuple[int | torch.SymInt, ...] = tuple(tensor_meta(node).shape)
            for axis, size in enumerate(shape):
                if isinstance(size, int):
                    continue
                expressions[size.node.expr] = None
                env = size.node.shape_env
                bounds = env.bound_sympy(size.node.expr) if env is not None else None
                if bounds is not None and bounds.is_singleton():
                    single[size.node.expr] = int(bounds.lower)
                for symbol in symbols_of(size):
                    if node.op == "placeholder" and axis == 0:
                        others.pop(symbol, None)
                        batch[symbol] = None
                    elif symbol not in batch:
                        found = given.get(symbol)
                        others.setdefault(
                            symbol, _in_example(node, axis, size, symbol) if found is None else found
                        )
        self.batch = tuple(batch)
        self.others = tuple(others.items())
        tokens: dict[sympy.Expr, None] = dict.fromkeys((*batch, *others))
        tokens.update((factor, None) for expr in expressions for factor in _factors(expr)[1])
        self._prime_of: dict[sympy.Expr, int] = dict(zip(tokens, _primes(len(tokens)), strict=True))
        self.primes = {prime: expr for expr, prime in self._prime_of.items()}
        self.known = {self._prime_of[expr]: size for expr, size in single.items() if expr in self._prime_of}

    def per_sample(self, size: int | torch.SymInt) -> int:
        """A size with every batch symbol taken as 1 and every other at the example's size.

        At least 1 where it is an expression: half of a batch of 1 would be nothing, and so would its cost.
        """
        return size if isinstance(size, int) else max(1, self.at(size, 1))

    def prime(self, size: int | torch.SymInt) -> int:
        """A size with every symbol taken as a large prime of its own."""
        if isinstance(size, int):
            return size
        expr: sympy.Expr = size.node.expr
        if expr in self._prime_of:
            return self._prime_of[expr]
        number, factors = _factors(expr)
        if any(factor not in self._prime_of for factor in factors):
            raise KeyError(f"size {expr} is not a size of the graph that was read")
        return prod((number, *(self._prime_of[factor] for factor in factors)))

    def same(self, size: int, other: int | torch.SymInt) -> bool:
        """Whether a size written with primes is that size; torch writes one that is `known` either way."""
        return size == self.prime(other) or (isinstance(other, int) and self.known.get(size) == other)

    def at(self, size: int | torch.SymInt, batch: int) -> int:
        """A size with every batch symbol taken as `batch` and every other at the example's size."""
        return size if isinstance(size, int) else _substitute(size.node.expr, self._binding(batch))

    def actual(self, size: int, batch: int) -> int:
        """A size written with primes, at a real batch size; other symbols as in the example."""
        for prime, expr in self.primes.items():
            while size and size % prime == 0:
                size = size // prime * _substitute(expr, self._binding(batch))
        return size

    def _binding(self, batch: int) -> tuple[tuple[sympy.Symbol, int], ...]:
        return (*((symbol, batch) for symbol in self.batch), *self.others)


def _primes(count: int) -> list[int]:
    primes = [_FIRST_PRIME]
    while len(primes) < count:
        primes.append(int(sympy.nextprime(primes[-1])))
    return primes[:count]


def _factors(expr: sympy.Expr) -> tuple[int, list[sympy.Expr]]:
    """A size as a positive number times symbols and other expressions; one factor where it is no product."""
    number, factors = 1, []
    for factor in sympy.Mul.make_args(expr):
        base, power = factor.as_base_exp()
        if factor.is_Integer and factor > 0:
            number *= int(factor)
        elif not factor.is_number and power.is_Integer and power > 0:
            factors += [base] * int(power)
        else:
            return 1, [expr]
    return number, factors


def _in_example(node: fx.Node, axis: int, size: torch.SymInt, symbol: sympy.Symbol) -> int:
    """The example's value of a symbol that was found in a size of a value."""
    known = node.meta.get(EXAMPLE_SHAPE)
    return _hint(size, symbol) if known is None or size.node.expr != symbol else int(known[axis])


def _hint(size: torch.SymInt, symbol: sympy.Symbol) -> int:
    """The example's value of a symbol, from the shape environment of a size; 2 where unknown."""
    env = size.node.shape_env
    for table in ("backed_var_to_val", "var_to_val"):
        values = getattr(env, table, None)
        if values is not None:  # the second name is that of older versions, and warns in newer ones
            return int(values.get(symbol, 2))
    return 2


def constant_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes whose value depends on parameters, buffers and literals only, and on no symbol.

    A random or mutating op is never constant.
    """
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            constant.add(node)
        elif node.op == "call_function" and _is_pure(node.target):
            if _has_symbol(node.meta.get("val")):
                continue
            if all(operand in constant for operand in node.all_input_nodes):
                constant.add(node)
    return frozenset(constant)


def _has_symbol(value: Any) -> bool:
    if isinstance(value, torch.SymInt):
        return True
    if isinstance(value, torch.Tensor):
        return any(isinstance(size, torch.SymInt) for size in value.shape)
    if isinstance(value, (tuple, list)):
        return any(_has_symbol(item) for item in value)
    return False


def _is_pure(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return True
    if target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags


def operand_tensors(node: fx.Node) -> Iterable[fx.Node]:
    """The tensor-valued operands of a node, in order, each once."""
    return (operand for operand in node.all_input_nodes if is_tensor(operand))
