"""What is known of a graph's values before anything runs: sizes, and which of them are constant.

Sizes of a captured graph may hold symbols (a dynamic batch is `s77`). Analysis wants plain integers, so
symbols are bound to numbers: to 1 where a cost per sample is asked for, to a large prime where axes are
factored (a merged `batch * 196` then divides without ambiguity), to the real size where a region is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import sympy
import torch
from torch import fx

# Primes far above any real size, so that no product of real sizes divides by one of them.
_PRIMES = (15485863, 32452843, 49979687, 67867967, 86028121, 104395301, 122949823, 141650939)


def symbols_of(size: int | torch.SymInt) -> frozenset[sympy.Symbol]:
    """The free symbols of one size; empty for a plain integer."""
    if isinstance(size, int):
        return frozenset()
    return frozenset(size.node.expr.free_symbols)


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


@dataclass(frozen=True)
class Sizes:
    """The symbols of one graph and how they are bound to integers.

    Attributes:
        batch: symbols that lead an input tensor (axis 0); a dynamic batch.
        others: all other symbols, with the size they have in the example.
    """

    batch: tuple[sympy.Symbol, ...]
    others: tuple[tuple[sympy.Symbol, int], ...]

    @classmethod
    def of(cls, graph: fx.Graph) -> Sizes:
        """Collect the symbols of a graph from its placeholders' and nodes' shapes."""
        batch: dict[sympy.Symbol, int] = {}
        others: dict[sympy.Symbol, int] = {}
        for node in graph.nodes:
            if not is_tensor(node):
                continue
            for axis, size in enumerate(tensor_meta(node).shape):
                for symbol in symbols_of(size):
                    leads = node.op == "placeholder" and axis == 0
                    hint = _hint(size, symbol)
                    if leads:
                        others.pop(symbol, None)
                        batch.setdefault(symbol, hint)
                    elif symbol not in batch:
                        others.setdefault(symbol, hint)
        return cls(tuple(batch), tuple(others.items()))

    @cached_property
    def _per_sample(self) -> tuple[tuple[sympy.Symbol, int], ...]:
        return tuple((s, 1) for s in self.batch) + self.others

    @cached_property
    def _primes(self) -> tuple[tuple[sympy.Symbol, int], ...]:
        symbols = self.batch + tuple(s for s, _ in self.others)
        return tuple(zip(symbols, (_PRIMES * (1 + len(symbols) // len(_PRIMES)))[: len(symbols)], strict=True))

    def per_sample(self, size: int | torch.SymInt) -> int:
        """A size with every batch symbol taken as 1 and every other at the example's size."""
        return size if isinstance(size, int) else _substitute(size.node.expr, self._per_sample)

    def prime(self, size: int | torch.SymInt) -> int:
        """A size with every symbol taken as a large prime of its own."""
        return size if isinstance(size, int) else _substitute(size.node.expr, self._primes)

    def at(self, size: int | torch.SymInt, batch: int) -> int:
        """A size with every batch symbol taken as `batch` and every other at the example's size."""
        if isinstance(size, int):
            return size
        binding = tuple((s, batch) for s in self.batch) + self.others
        return _substitute(size.node.expr, binding)

    def symbol_primes(self) -> Mapping[int, sympy.Symbol]:
        """Which symbol each prime stands for."""
        return {prime: symbol for symbol, prime in self._primes}


def _hint(size: int | torch.SymInt, symbol: sympy.Symbol) -> int:
    """The example's value of a symbol, from the shape environment of a size that holds it."""
    if isinstance(size, int):
        return size
    env = size.node.shape_env
    for table in ("backed_var_to_val", "var_to_val"):
        values = getattr(env, table, None)
        if values is not None and symbol in values:
            return int(values[symbol])
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
