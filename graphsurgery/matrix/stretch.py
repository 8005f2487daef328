"""Which calls a matrix is asked of: found by module path in a captured graph, and whether they are affine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from graphsurgery.affine import rules
from graphsurgery.affine.atoms import Axes, NoFold
from graphsurgery.affine.region import Scope
from graphsurgery.affine.runner import runner
from graphsurgery.cost import op_name
from graphsurgery.errors import NotAffineError
from graphsurgery.graph import module_path, source_line
from graphsurgery.matrix.repeated import depending, repeated_axes, values_read
from graphsurgery.values import is_tensor, tensor_meta

Path = str | tuple[str, str] | list[str] | None

_MIXING = frozenset({"batch-mixed", "batch-varied", "batch-statistics"})


@dataclass(frozen=True)
class Stretch:
    """All calls between one value of a graph and another.

    Attributes:
        scope: the graph.
        entry: the value that they read.
        exit: the value that they make; the entry itself where there are no calls.
        nodes: the calls in graph order.
    """

    scope: Scope
    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]

    def run(self, x: torch.Tensor, batch: int) -> torch.Tensor:
        """The calls in float64.

        Args:
            x: the entry, float64.
            batch: what the batch symbols stand for.
        """
        if not self.nodes:
            return x
        with torch.set_grad_enabled(x.requires_grad):  # of such an input only the derivative is right
            return runner(self.scope, self.entry, self.nodes, batch)(x)

    def cuts(self) -> list[fx.Node]:
        """The values through which every path from the entry to the exit leads, both included."""
        order = {node: i for i, node in enumerate((self.entry, *self.nodes))}
        last = dict.fromkeys(order, 0)
        for node in self.nodes:
            last.update({o: order[node] for o in node.all_input_nodes if o in order})
        found, reach = [self.entry], 0
        for value, reader in pairwise((self.entry, *self.nodes)):
            reach = max(reach, last[value])
            if reach <= order[reader] and is_tensor(reader):
                found.append(reader)
        return found

    def axes(self, start: fx.Node, stop: fx.Node) -> Axes:
        """What the calls between two cuts do to the axes of the first.

        Raises:
            NotAffineError: one of them is no affine op, or mixes samples; the message names it.
        """
        known = {start: self.scope.entry_axes(start)}
        nodes = self.scope.between(start, stop) if stop is not start else ()
        live = depending(self.scope, start, nodes)
        for node in nodes:
            try:
                if node in live:
                    known[node] = _follow(self.scope, node, known.__getitem__)
                else:
                    known[node] = repeated_axes(self.scope, start, node)
            except NoFold as refusal:
                raise NotAffineError(_complaint(node, refusal), refusal.code) from None
        return known[stop]


class _ZeroPad(rules.Step):
    """A pad with some value, as if it were zero."""

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        return 0 if name == "value" else super().argument(index, name, default)


def _follow(scope: Scope, node: fx.Node, axes_of: Callable[[fx.Node], Axes]) -> Axes:
    read = values_read(node, scope.constant)
    if len(read) == 1 < len(rules.live_operands(node, scope.constant)):  # of the others only the shape counts
        return rules.apply(rules.Step(node, read[0], axes_of(read[0]), scope.sizes))
    try:
        return rules.follow(node, axes_of, scope.constant, scope.sizes)
    except NoFold as refusal:
        if refusal.code != "pad-value":
            raise
    (live,) = rules.live_operands(node, scope.constant)
    axes = rules.apply(_ZeroPad(node, live, axes_of(live), scope.sizes))
    widths: Any = node.args[1]
    rank = len(axes.dims)
    return axes.shift_along(rank - 1 - i // 2 for i, width in enumerate(widths) if width)


def place(node: fx.Node) -> str:
    """Where a call comes from: its op, module path and source line, as far as they are known."""
    path, line = module_path(node), source_line(node)
    where = f" of {path!r}" if path else ""
    return f"{op_name(node)}{where}" + (f" ({line})" if line else "")


def _complaint(node: fx.Node, refusal: NoFold) -> str:
    mixes = refusal.code in _MIXING
    return (
        f"the stretch is {'one affine map of all samples together' if mixes else 'no affine map'}: at "
        f"{place(node)}, {refusal.reason}; choose a stretch without it by path=(first module, last module)."
    )


def find(gm: fx.GraphModule, path: Path) -> Stretch:
    """The calls that belong to a module, or lead from one module to another, of a captured graph.

    Args:
        gm: the graph; not changed.
        path: dotted path of one module, or of the first and the last one; None for the whole graph.

    Raises:
        NotAffineError: they read more than one value, or make more than one.
        ValueError: no call comes from such a module, or the path is none.
    """
    scope = Scope(gm)
    if path is None:
        entry, exit_ = _whole(scope)
    else:
        first, last = _ends(path)
        entry, exit_ = _read_by(scope, first), _made_by(scope, last)
        if first != last and not scope.position(entry) < scope.position(exit_):
            raise NotAffineError(
                f"{last!r} does not follow {first!r}: {exit_.name!r} is computed no later than "
                f"{entry.name!r}; give the first module of the stretch first.",
                "order",
            )
    nodes = () if exit_ is entry else scope.between(entry, exit_)
    others = [node for node in nodes if node.op != "call_function"]
    if others or (nodes and not any(entry in node.all_input_nodes for node in nodes)):
        names = ", ".join(repr(node.name) for node in others)
        raise NotAffineError(
            f"{exit_.name!r} is not computed from {entry.name!r} alone: it also reads {names}; choose a "
            "stretch whose last module follows from what its first one reads.",
            "several-inputs",
        )
    for node in (entry, exit_):
        if not is_tensor(node) or not tensor_meta(node).is_floating_point() or not tensor_meta(node).dim():
            raise NotAffineError(
                f"{node.name!r} at an end of the stretch is no tensor of floating-point numbers with a batch "
                "dimension, which a matrix needs.",
                "unsupported",
            )
        if 0 in tensor_meta(node).shape:
            raise NotAffineError(
                f"{node.name!r} at an end of the stretch has the shape {tuple(tensor_meta(node).shape)} "
                "and no elements; give example inputs with some.",
                "empty",
            )
    if nodes and exit_ not in depending(scope, entry, nodes):
        raise _constant(exit_)
    return Stretch(scope, entry, exit_, nodes)


def _ends(path: str | tuple[str, ...] | list[str]) -> tuple[str, str]:
    """The first and the last module of a path: `"a"`, `"a..b"` or `("a", "b")`."""
    ends = path.split("..") if isinstance(path, str) else path
    if isinstance(ends, (tuple, list)) and all(isinstance(end, str) for end in ends):
        if len(ends) == 1:
            return ends[0], ends[0]
        if len(ends) == 2:
            return ends[0], ends[1]
    raise ValueError(
        f"expected the path of a module ('layer1.0.conv1'), or of the first and the last one of a stretch "
        f"('0..2' or ('0', '2')), got {path!r}"
    )


def _constant(node: fx.Node) -> NotAffineError:
    return NotAffineError(f"the output {node.name!r} does not depend on the input.", "constant")


def _whole(scope: Scope) -> tuple[fx.Node, fx.Node]:
    (output,) = scope.gm.graph.find_nodes(op="output")
    exits = list(dict.fromkeys(output.all_input_nodes))
    exit_ = _single(exits, "the model gives {} tensors ({}), expected one", "several-outputs")
    if exit_ in scope.constant:
        raise _constant(exit_)
    needed = {exit_}
    stack = [exit_]
    while stack:
        for operand in rules.live_operands(stack.pop(), scope.constant):
            if operand not in needed:
                needed.add(operand)
                stack.append(operand)
    entries = [node for node in scope.gm.graph.nodes if node.op == "placeholder" and node in needed]
    if not entries:
        raise _constant(exit_)
    return _single(entries, "the model's output reads {} inputs ({}), expected one", "several-inputs"), exit_


def _single(found: Collection[fx.Node], complaint: str, code: str) -> fx.Node:
    if len(found) != 1:
        names = ", ".join(node.name for node in found)
        text = complaint.format(len(found), names or "none")
        raise NotAffineError(f"{text}; choose a part of the model by path=.", code)
    (node,) = found
    return node


def _within(scope: Scope, path: str) -> set[fx.Node]:
    """The calls, constant ones left out, that come from a module or from below it."""
    calls = [node for node in scope.gm.graph.nodes if node.op == "call_function"]
    found = {
        node
        for node in calls
        if node not in scope.constant and (module_path(node) + ".").startswith(path + "." if path else "")
        if not rules.is_size(node)
    }
    if not found:
        known = sorted({step for node in calls for step in _prefixes(module_path(node))})
        near = get_close_matches(path, known, n=3, cutoff=0.5) or known[:5]
        raise ValueError(
            f"no call of the graph comes from a module {path!r} (one that computes nothing leaves none); "
            f"there are {', '.join(near)}, ..."
        )
    return found


def _prefixes(path: str) -> Iterator[str]:
    steps = path.split(".")
    return (".".join(steps[: i + 1]) for i in range(len(steps)))


def _read_by(scope: Scope, path: str) -> fx.Node:
    inside = _within(scope, path)
    found = {o for node in inside for o in rules.live_operands(node, scope.constant) if o not in inside}
    message = f"{path!r} reads {{}} values ({{}}), or is called more than once, expected one value"
    return _single(found, message, "several-inputs")


def _made_by(scope: Scope, path: str) -> fx.Node:
    inside = _within(scope, path)
    found = {node for node in inside if any(user not in inside for user in node.users)}
    message = f"{path!r} makes {{}} values ({{}}), or is called more than once, expected one value"
    return _single(found, message, "several-outputs")
