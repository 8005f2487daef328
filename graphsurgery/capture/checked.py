"""The result takes no other inputs than those its graph holds for: what a call is compared with, and how.

The rules are plain tuples of numbers and strings, written into the code of the graph module, so that they
stay with whatever copies, saves or retraces that code. `graphsurgery.capture.rules` derives them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from graphsurgery.capture.expressions import compiled, evaluate

__all__ = [
    "FIXED_KINDS",
    "CheckedCodeGen",
    "Rules",
    "check_inputs",
    "check_lengths",
    "install",
    "kind_of",
    "lengths_of",
    "shape_text",
]

FIXED_KINDS = (bool, int, float, str, type(None))
_AGAIN = "capture the original model again with"


class Rules(NamedTuple):
    """What the flat inputs of a graph must be. Every part is made of tuples, strings, numbers and None alone.

    Attributes:
        inputs: For each input its name, its kind (`kind_of` a tensor, `number`, `fixed` or `any`), and what
            is expected: of a tensor or number its sizes, of a fixed one its value. A size is a number, the
            name of a free one, or None where conditions say the rest.
        sizes: The free sizes that have bounds: name, lowest and highest value or None.
        conditions: Further conditions on the sizes, as text and as an expression for `evaluate`.
        lengths: The lists, tuples and mappings among the arguments: name, number of the argument, keys that
            lead there, number of items, or for a mapping its keys.
    """

    inputs: tuple[tuple[str, str, Any], ...]
    sizes: tuple[tuple[str, int | None, int | None], ...]
    conditions: tuple[tuple[str, Any], ...]
    lengths: tuple[tuple[str, int, tuple[Any, ...], int | tuple[Any, ...]], ...] = ()


def kind_of(tensor: torch.Tensor) -> str:
    """Return what kind of numbers a tensor holds; modules may be cast, so the precision is left open."""
    dtype = tensor.dtype
    if dtype.is_floating_point:
        return "floating-point"
    if dtype.is_complex:
        return "complex"
    return "boolean" if dtype == torch.bool else "integer"


def lengths_of(info: _PyTreeInfo) -> tuple[tuple[str, int, tuple[Any, ...], Any], ...]:
    """Return `Rules.lengths` of the arguments that a graph takes apart."""
    found: list[tuple[str, int, tuple[Any, ...], Any]] = []

    def walk(spec: Any, name: str, number: int, path: tuple[Any, ...]) -> None:
        keys = spec.context if spec.type is dict else range(spec.num_children)
        if spec.type not in (list, tuple, dict) or not all(isinstance(key, (str, int)) for key in keys):
            return
        found.append((name, number, path, tuple(keys) if spec.type is dict else spec.num_children))
        for key, child in zip(keys, spec.children(), strict=True):
            walk(child, f"{name}[{key!r}]", number, (*path, key))

    args, kwargs = info.in_spec.children()
    for number, spec in enumerate((*args.children(), *kwargs.children())):
        walk(spec, info.orig_args[number], number, ())
    return tuple(found)


def check_inputs(values: Sequence[Any], inputs: Any, sizes: Any, conditions: Any) -> None:
    """Refuse inputs that the graph was not captured for.

    Args:
        values: The flat inputs of a call.
        inputs: See `Rules`, as the next two.
        sizes: Bounds of free sizes.
        conditions: Further conditions.

    Raises:
        ValueError: An input is of another kind, rank, size or value, or the sizes do not fit together.
    """
    for value in values:
        if isinstance(
            value, fx.Proxy
        ):  # traced, as when unpickled: the check becomes a call in the new graph
            arguments = (tuple(values), inputs, sizes, conditions)
            value.tracer.create_proxy("call_function", check_inputs, arguments, {})
            return
    # Under torch.jit.trace sizes are tensors, and a comparison would be warned about.
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]  # public, but untyped
    found: dict[str, tuple[Any, str, int]] = {}
    for value, (name, kind, expected) in zip(values, inputs, strict=True):
        if kind == "fixed":
            _check_fixed(name, value, expected)
        elif kind != "any" and not traced:
            shape = (value,) if kind == "number" else _shape_of(value, name, kind, expected)
            for axis, wanted in enumerate(expected):
                if type(wanted) is int:
                    if shape[axis] != wanted:
                        raise ValueError(_other_size(name, axis, expected, shape))
                elif wanted is not None:
                    first = found.setdefault(wanted, (shape[axis], name, axis))
                    if shape[axis] != first[0]:
                        raise ValueError(_unequal(name, axis, shape[axis], expected, first))
    if traced:
        return
    for wanted, low, high in sizes:
        size, name, axis = found[wanted]
        if (low is not None and size < low) or (high is not None and size > high):
            raise ValueError(_out_of_range(name, axis, wanted, size, low, high))
    if not conditions:
        return
    if not torch.compiler.is_compiling() and compiled(conditions)(values):
        return
    for text, condition in conditions:
        if not _holds(condition, values):
            raise ValueError(
                f"the graph holds only where {text}, got {_given(values, inputs)}; "
                f"{_AGAIN} inputs of these sizes."
            )


def check_lengths(arguments: Sequence[Any], lengths: Any) -> None:
    """Refuse lists, tuples and mappings with more, fewer or other items than in the example.

    Args:
        arguments: The arguments of a call, before they are taken apart.
        lengths: See `Rules`.

    Raises:
        ValueError: One has another number of items or other keys, or is none.
    """
    for value in arguments:
        if isinstance(value, fx.Proxy):
            value.tracer.create_proxy("call_function", check_lengths, (tuple(arguments), lengths), {})
            return
    for name, number, path, items in lengths:
        value = functools.reduce(operator.getitem, path, arguments[number])  # what contains it was before it
        keys = None if type(items) is int else items
        kind, length = ("list or tuple", items) if keys is None else ("mapping", len(items))
        if not isinstance(value, (list, tuple) if keys is None else dict):
            raise ValueError(
                f"the argument {name!r} is a {type(value).__name__}, expected a {kind} of {length} items as "
                f"in the example; {_AGAIN} such an argument."
            )
        if len(value) != length:
            raise ValueError(
                f"the argument {name!r} has {len(value)} items, expected {length} as in the example; "
                f"{_AGAIN} that many."
            )
        for key in keys or ():
            if key not in value:
                raise ValueError(
                    f"the argument {name!r} has the keys {list(value)}, expected {list(items)} as in the "
                    f"example; {_AGAIN} those."
                )


def _holds(condition: Any, values: Sequence[Any]) -> bool:
    try:
        return bool(evaluate(condition, values))
    except ArithmeticError:  # e.g. a division by batch - 2
        return False


def _shape_of(value: Any, name: str, kind: str, expected: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"the input {name!r} is a {type(value).__name__}, expected a {kind} tensor of "
            f"{shape_text(expected)}."
        )
    shape = value.shape
    if len(shape) != len(expected):
        raise ValueError(
            f"the input {name!r} has {len(shape)} axes, {shape_text(shape)}, expected "
            f"{len(expected)}, {shape_text(expected)}; {_AGAIN} such an input."
        )
    if kind_of(value) != kind:
        raise ValueError(
            f"the input {name!r} is {str(value.dtype).removeprefix('torch.')}, expected {kind} values as in "
            f"the example; convert it, or {_AGAIN} such an input."
        )
    return shape


def _check_fixed(name: str, value: Any, expected: Any) -> None:
    if value is expected:
        return
    number = (torch.SymInt, torch.SymFloat, torch.SymBool, type(expected))
    if isinstance(value, number) and (value == expected or (value != value and expected != expected)):
        return
    got = f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
    raise ValueError(
        f"the argument {name!r} was captured as {expected!r} and is fixed at it, got {got}; "
        f"{_AGAIN} that value."
    )


# -- messages


def shape_text(sizes: Any) -> str:
    """Return a shape in words, e.g. `(batch, 3, 8, 8)`."""
    inner = ", ".join("?" if size is None else str(size) for size in sizes)
    return f"({inner},)" if len(sizes) == 1 else f"({inner})"


def _given(values: Sequence[Any], inputs: Any) -> str:
    return ", ".join(
        f"{name} of {shape_text(value.shape)}" if isinstance(value, torch.Tensor) else f"{name} = {value}"
        for value, (name, kind, _) in zip(values, inputs, strict=True)
        if kind not in ("fixed", "any")
    )


def _other_size(name: str, axis: int, expected: Any, shape: Any) -> str:
    return (
        f"the input {name!r} has the size {shape[axis]} on axis {axis}, expected {expected[axis]}: it was "
        f"captured as {shape_text(expected)}, got {shape_text(shape)}; {_AGAIN} that size, or with "
        f"dynamic_shapes in which axis {axis} of {name!r} is free."
    )


def _unequal(name: str, axis: int, size: Any, expected: Any, first: tuple[Any, str, int]) -> str:
    return (
        f"the input {name!r} has the size {size} on axis {axis}, expected {first[0]} as {first[1]!r} has on "
        f"axis {first[2]}: both are {expected[axis]!r} in the graph; pass sizes that agree, or {_AGAIN} such "
        "inputs."
    )


def _out_of_range(name: str, axis: int, wanted: str, size: Any, low: int | None, high: int | None) -> str:
    expected = f"{low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}"
    return (
        f"the input {name!r} has the size {size} on axis {axis}, expected {expected} for {wanted!r}; "
        f"{_AGAIN} that size, or with dynamic_shapes that allow it."
    )


# A retraced graph (an unpickled one) does not use what a check returns, and must not lose it for that.
fx.node.has_side_effect(check_inputs)
fx.node.has_side_effect(check_lengths)


class CheckedCodeGen(_PyTreeCodeGen):
    """Takes the arguments apart as they were taken in the example, and checks them."""

    def __init__(self, info: _PyTreeInfo, rules: Rules) -> None:
        super().__init__(info)
        self.rules = rules

    def gen_fn_def(self, free_vars: list[str], *args: Any, **kwargs: Any) -> str:
        """Return the head of `forward`, with the check behind it."""
        names = [text.split(":")[0].split("#")[0].strip() for text in free_vars]
        values = "".join(f"{name}, " for name in names)
        *parts, _ = self.rules
        check = f"_check_inputs(({values}), {', '.join(map(repr, parts))})"
        return f"{super().gen_fn_def(free_vars, *args, **kwargs)}\n    {check}"

    def gen_var_bindings(self, fn_args: list[str], free_vars: list[str], expanded_def: bool) -> str:
        """Return the lines that take the arguments apart, with a check of their lengths before them."""
        lines = super().gen_var_bindings(fn_args, free_vars, expanded_def)
        if not self.rules.lengths:
            return lines
        arguments = "".join(f"{name}, " for name in self.pytree_info.orig_args)
        return f"\n    _check_lengths(({arguments}), {self.rules.lengths!r}){lines}"

    def process_inputs(self, *inputs: Any) -> Any:
        """Return the flat inputs, checked; for `fx.Interpreter`."""
        flat = super().process_inputs(*inputs)
        expected, sizes, conditions, lengths = self.rules
        nested = any(
            isinstance(value, (list, tuple, dict)) for value in inputs
        )  # else they may be flat already
        if nested and len(inputs) == len(self.pytree_info.orig_args):
            check_lengths(inputs, lengths)
        if len(flat) != len(expected):
            raise ValueError(
                f"the graph takes {len(expected)} inputs, got {len(flat)}; pass as many as captured."
            )
        check_inputs(flat, expected, sizes, conditions)
        return flat

    def additional_globals(self) -> list[tuple[str, Any]]:
        """Return what the code needs besides torch."""
        return [
            *super().additional_globals(),
            ("_check_inputs", check_inputs),
            ("_check_lengths", check_lengths),
        ]


def install(gm: fx.GraphModule, rules: Rules) -> tuple[str, ...]:
    """Make the code of `gm` check what it is called with; return a note for each argument that is fixed.

    The check is part of how the graph takes its arguments, so it stays with copies of the graph, is there
    under `fx.Interpreter` (of lists and mappings where it is given the arguments; flat inputs have none), and
    is done while `torch.export` traces, whose own guards it becomes.
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
