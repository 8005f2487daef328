"""Why what is left is left: norms with no layer to fold into, values read twice, parallel branches."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from graphsurgery.affine import rules
from graphsurgery.affine.region import Scope, is_heavy
from graphsurgery.affine.search import Declined, is_member
from graphsurgery.cost import op_name
from graphsurgery.graph import module_path
from graphsurgery.values import is_tensor

_JOINS = frozenset({"add", "sub", "cat"})


def outlook(scope: Scope) -> Iterator[Declined]:
    """Findings about the calls of a folded graph that no chain speaks of."""
    for node in scope.gm.graph.nodes:
        if node.op != "call_function" or node in scope.constant:
            continue
        if op_name(node) == "batch_norm":
            yield from _norm(scope, node)
        elif op_name(node) in _JOINS:
            yield from _branches(scope, node)


def _norm(scope: Scope, node: fx.Node) -> Iterator[Declined]:
    """A norm that stays: what stands before and after it."""
    if not is_member(scope, node):
        yield Declined((node,), "batch-statistics", "the norm's parameters or statistics are not constant")
        return
    live = rules.live_operand(node, scope.constant)
    if live is None:
        return
    before, shared = _towards_entry(scope, live)
    after = _towards_exit(scope, node)
    if is_heavy(before) and is_member(scope, before) and shared is None:
        return  # the chain between them has its own finding
    if shared is not None and is_heavy(before):
        code = "several-users"
        cause = (
            f"the value of {_called(shared)} before it has {len(shared.users)} readers ({_readers(shared)})"
        )
    else:
        code = "not-affine"
        cause = f"{_called(before)} before it is not a layer that it folds into"
    if after is None:
        behind = "its own value is read by several calls or is an output"
    elif is_heavy(after) and is_member(scope, after):
        return
    else:
        behind = f"{_called(after)} follows it"
    yield Declined((node,), code, f"the norm stays: {cause}, and {behind}")


def _towards_entry(scope: Scope, live: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The nearest layer or other call up to a value, and the first value on the way read elsewhere."""
    shared = None
    while True:
        shared = live if shared is None and len(live.users) > 1 else shared
        if is_heavy(live) or not is_member(scope, live):
            return live, shared
        operand = rules.live_operand(live, scope.constant)
        if operand is None:
            return live, shared
        live = operand


def _towards_exit(scope: Scope, node: fx.Node) -> fx.Node | None:
    """The nearest layer or non-affine call after a call; None where its value is read more than once."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op == "output":
            return None
        if is_heavy(node) or not is_member(scope, node):
            return node
    return None


def _branches(scope: Scope, node: fx.Node) -> Iterator[Declined]:
    """A sum or concatenation whose operands all come from one value by affine calls."""
    live = _joined(scope, node)
    if len(live) < 2:
        return
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is not None and op_name(reader) in _JOINS and len(_joined(scope, reader)) > 1:
        return  # a longer sum: its last call speaks for all of it
    lines = [_affine_line(scope, operand) for operand in live]
    common = set(lines[0]).intersection(*lines[1:])
    layers = [n for line in lines for n in line if is_heavy(n) and not set(line) <= common]
    if not common or not any(is_heavy(n) for n in layers):
        return
    entry = next(n for n in lines[0] if n in common)
    inner = [n for line in lines for n in line[: line.index(entry)]]
    if not any(is_heavy(n) for n in inner):
        return
    names = ", ".join(dict.fromkeys(_called(n) for n in inner if is_heavy(n)))
    yield Declined(
        (*dict.fromkeys(n for n in inner if is_heavy(n)), node),
        "branches",
        f"parallel branches from {_called(entry)} ({names}) meet in {_called(node)}: branches are not merged",
    )


def _joined(scope: Scope, node: fx.Node) -> list[fx.Node]:
    return [o for o in node.all_input_nodes if o not in scope.constant and is_tensor(o)]


def _affine_line(scope: Scope, node: fx.Node) -> list[fx.Node]:
    """A value and all values before it along affine calls; through sums it follows every operand."""
    line, queue = [], [node]
    while queue:
        current = queue.pop(0)
        if current in line:
            continue
        line.append(current)
        if is_member(scope, current):
            operand = rules.live_operand(current, scope.constant)
            if operand is not None:
                queue.append(operand)
        elif op_name(current) in _JOINS:
            queue.extend(o for o in current.all_input_nodes if o not in scope.constant and is_tensor(o))
    return line


def _called(node: fx.Node) -> str:
    path = module_path(node)
    return f"{op_name(node)} {path!r}" if path else f"{op_name(node)} {node.name!r}"


def _readers(node: fx.Node) -> str:
    readers = [_called(user) if user.op != "output" else "the output" for user in node.users]
    return ", ".join(readers[:3] + (["..."] if len(readers) > 3 else []))
