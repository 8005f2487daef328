"""Why what is left is left: layers that stay apart, branches that stay parallel, norms without a layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from graphsurgery.affine import rules
from graphsurgery.affine.atoms import NoFold
from graphsurgery.affine.choice import objection, options
from graphsurgery.affine.region import Region, Scope, is_heavy
from graphsurgery.affine.search import is_entry
from graphsurgery.cost import Cost, op_name
from graphsurgery.graph import module_path
from graphsurgery.values import is_tensor


@dataclass(frozen=True)
class Declined:
    """Calls that stay apart, and why.

    Attributes:
        nodes: the calls concerned.
        code: stable code of the reason.
        reason: one sentence.
        before: cost as it is, where cost was the question.
        after: cost of the best form, where there is one.
    """

    nodes: tuple[fx.Node, ...]
    code: str
    reason: str
    before: Cost | None = None
    after: Cost | None = None


def outlook(scope: Scope, growth: float) -> Iterator[Declined]:
    """Why layers of a folded graph stay apart, and norms stay.

    Args:
        scope: the graph after folding.
        growth: how many times the parameters a form may have.
    """
    for node in scope.gm.graph.nodes:
        if node.op != "call_function" or node in scope.constant or not is_tensor(node):
            continue
        if is_layer(node) and is_member(scope, node):
            yield from _pair(scope, node, growth)
        if op_name(node) == "batch_norm":
            yield from _norm(scope, node)
        elif len(rules.live_operands(node, scope.constant)) > 1 and rules.has_rule(node, 2):
            yield from _branches(scope, node, growth)


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


def _pair(scope: Scope, node: fx.Node, growth: float) -> Iterator[Declined]:
    """Two neighbouring layers of a straight line that stay apart."""
    before = rules.live_operand(node, scope.constant)
    while before is not None and is_member(scope, before) and len(before.users) == 1:
        if is_layer(before):
            entry = rules.live_operand(before, scope.constant)
            if entry is not None:
                yield from _declined(scope, entry, node, (before, node), growth)
            return
        before = rules.live_operand(before, scope.constant)


def _branches(scope: Scope, node: fx.Node, growth: float) -> Iterator[Declined]:
    """A sum or concatenation whose operands all come from one value by affine calls, layers among them."""
    readers = list(node.users)
    if (
        len(readers) == 1
        and len(rules.live_operands(readers[0], scope.constant)) > 1
        and rules.has_rule(readers[0], 2)
    ):
        return  # a longer sum: its last call speaks for all of it
    entry = nearest_cut(scope, node)
    if entry is None:
        return
    inner = scope.between(entry, node)
    layers = [member for member in inner if is_heavy(member)]
    if not layers:
        return
    outside = next((n for n in inner[:-1] if any(user not in inner for user in n.users)), None)
    if outside is not None:
        reason = f"the value of {_called(outside)} between the branches is read elsewhere too"
        yield Declined((*layers, node), "several-users", reason)
        return
    yield from _declined(scope, entry, node, (*layers, node), growth)


def _declined(
    scope: Scope, entry: fx.Node, node: fx.Node, layers: tuple[fx.Node, ...], growth: float
) -> Iterator[Declined]:
    """Why a region is not one layer, if it is not."""
    try:
        if not is_entry(scope, entry) or any(0 in scope.shape(n) for n in layers):
            raise NoFold("empty", "it works on a tensor without elements")
        region = Region(scope, entry, node, scope.axes(entry, node))
        option = options(region)[0]
    except NoFold as refusal:
        yield Declined(layers, refusal.code, refusal.reason)
        return
    reason = objection(region, option, growth)
    if reason is None:
        return
    code, cause = _cause(region)
    yield Declined(layers, code, f"{cause}; {reason}" if cause else reason, region.tally.cost, option.cost)


def _cause(region: Region) -> tuple[str, str]:
    """What lies behind a form that does not pay."""
    if region.axes.causes:
        return region.axes.causes[-1]
    if region.tally.shares:
        return "shared-weights", "some of the weights are read by other calls too and would stay"
    return "costs-more", ""


def nearest_cut(scope: Scope, node: fx.Node) -> fx.Node | None:
    """The last value through which every affine path to a call runs; None where they do not meet."""
    frontier = set(rules.live_operands(node, scope.constant))
    while len(frontier) > 1:
        last = max(frontier, key=scope.position)
        frontier.discard(last)
        operands = rules.live_operands(last, scope.constant)
        if not operands or not rules.has_rule(last, len(operands)):
            return None
        frontier.update(operands)
    return next(iter(frontier), None)


def is_member(scope: Scope, node: fx.Node) -> bool:
    """Whether a call is affine in exactly one live operand, as far as its op says."""
    if node in scope.constant or not rules.has_rule(node):
        return False
    return rules.live_operand(node, scope.constant) is not None


def is_layer(node: fx.Node) -> bool:
    """Whether a call is a layer of its own: it multiplies by weights, normalises, scales or pools."""
    name = op_name(node)
    return is_heavy(node) or name in ("batch_norm", "mul", "div", "add", "sub", "rsub") or "pool" in name


def _called(node: fx.Node) -> str:
    path = module_path(node)
    return f"{op_name(node)} {path!r}" if path else f"{op_name(node)} {node.name!r}"


def _readers(node: fx.Node) -> str:
    readers = [_called(user) if user.op != "output" else "the output" for user in node.users]
    return ", ".join(readers[:3] + (["..."] if len(readers) > 3 else []))
