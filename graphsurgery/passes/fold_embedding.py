"""Fold the affine layers behind an embedding into its table.

Rule:      layer(table[i]) == (layer applied to every row of the table)[i]
Requires:  layers that act on the features alone (Linear, constant scale and shift), dropout in evaluation
           between them at most (else no match); refused with:
           `several-users` the looked-up value is read by other calls too;
           `table-grows` the new table would be larger than the old one;
           `shared-table` the table is read elsewhere (a tied head), so that it would stay;
           `mutated` the table is written on lookup (`max_norm`);
           `not-finite`, `overflow` a row does not fit the dtype;  `certificate` a mixture of rows differs
Preserves: signature, shapes, dtypes; values up to rounding. The table keeps its name. The row of
           `padding_idx` is a row like any other: the index has no meaning in evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from graphsurgery.affine.certify import LIMIT, deviation
from graphsurgery.affine.pointwise import memory_readers, read_layer
from graphsurgery.affine.region import Scope
from graphsurgery.affine.runner import runner
from graphsurgery.cost import Cost, node_cost, op_name
from graphsurgery.graph import (
    annotate,
    copy_graph_module,
    delete_unused_attrs,
    fresh_attr,
    get_attr_value,
    module_path,
    set_attr,
)
from graphsurgery.rewrite.contracts import Change, NodeRef, Pass, PassResult, Refusal
from graphsurgery.rewrite.identities import IDENTITIES
from graphsurgery.rewrite.sweep import erase_unread
from graphsurgery.values import tensor_meta

__all__ = ["FoldEmbedding"]

_MIXTURES = 8
_CHUNK = 2**22  # elements of the table that are held in float64 at a time

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldEmbedding(Pass):
    """Folds the Linear, scale and shift behind an embedding into its rows, where the table does not grow."""

    name: ClassVar[str] = "fold-embedding"
    summary: ClassVar[str] = "the Linear, scale and shift behind an embedding into its table"

    def run(self, gm: fx.GraphModule) -> PassResult:
        """See `Pass.run`."""
        if not gm.graph.find_nodes(op="call_function", target=aten.embedding.default):
            return PassResult(gm)
        work = copy_graph_module(gm)
        changes: list[Change] = []
        while True:
            scope = Scope(work)
            refusals: list[Refusal] = []
            # Lookups are apart from each other: tables that two of them read are refused.
            made = [change for found in _lookups(scope) if (change := _settle(scope, found, refusals))]
            if not made:
                break
            changes += made
        if not changes:
            return PassResult(gm, (), tuple(refusals))
        delete_unused_attrs(work)
        work.graph.lint()
        work.recompile()
        return PassResult(work, tuple(changes), tuple(refusals))


@dataclass(frozen=True)
class _Lookup:
    """An embedding and the calls behind it that act on features alone, each read by the next one only.

    Attributes:
        embedding: the lookup.
        chain: the calls; the last one is a layer.
        widths: features after each of them.
    """

    embedding: fx.Node
    chain: tuple[fx.Node, ...]
    widths: tuple[int, ...]

    @property
    def table(self) -> fx.Node:
        table = self.embedding.args[0]
        if not isinstance(table, fx.Node):
            raise TypeError(f"{self.embedding.name} has no table")
        return table

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.embedding, *self.chain)

    def upto(self, width: int) -> _Lookup | None:
        """The longest part of it whose last value has at most that many features."""
        counts = [i + 1 for i, n in enumerate(self.widths) if n <= width and not _is_identity(self.chain[i])]
        return (
            _Lookup(self.embedding, self.chain[: counts[-1]], self.widths[: counts[-1]]) if counts else None
        )


# -- what is there


def _lookups(scope: Scope) -> Iterator[_Lookup]:
    """All embeddings with at least one layer behind them."""
    for node in list(scope.gm.graph.find_nodes(op="call_function", target=aten.embedding.default)):
        table = node.args[0]
        if table not in scope.constant and not _rescales(table):
            continue
        if node in scope.constant or tensor_meta(node).dim() < 2 or 0 in tensor_meta(table).shape:
            continue
        chain: list[fx.Node] = []
        last = node
        for user in node.users:  # any reader that is a layer makes it a lookup to talk about
            if _acts_on_features(scope, user) or _is_identity(user):
                last = user
                chain = [user]
                break
        while chain and len(last.users) == 1:
            last = next(iter(last.users))
            if not (_acts_on_features(scope, last) or _is_identity(last)):
                break
            chain.append(last)
        while chain and _is_identity(chain[-1]):
            chain.pop()
        if chain:
            yield _Lookup(node, tuple(chain), tuple(int(tensor_meta(n).shape[-1]) for n in chain))


def _acts_on_features(scope: Scope, node: fx.Node) -> bool:
    layer = read_layer(scope, node)
    return layer is not None and layer.axes <= {tensor_meta(layer.live).dim() - 1}


def _rescales(node: fx.Node) -> bool:
    """Whether it writes rows of a table: `max_norm`."""
    return op_name(node).startswith("embedding_renorm")


def _is_identity(node: fx.Node) -> bool:
    """Whether it is a dropout in evaluation, a copy or a cast to the same dtype."""
    for kind, rule in IDENTITIES:
        source = rule(node) if kind in ("nothing", "dropout", "cast") else None
        if source is not None:
            return tensor_meta(source).dtype == tensor_meta(node).dtype
    return False


# -- whether it may be folded


def _settle(scope: Scope, found: _Lookup, refusals: list[Refusal]) -> Change | None:
    """Fold the longest part of a lookup that does not make the table larger, or say why not."""
    rows, width = (int(n) for n in tensor_meta(found.table).shape)
    part = found.upto(width)
    before, after = _costs(scope, part or found)
    both = f"now {before}; folded {after}"

    def refuse(code: str, reason: str) -> None:
        refs = tuple(NodeRef.of(node) for node in (part or found).nodes)
        refusals.append(Refusal(FoldEmbedding.name, code, refs, reason, before, after))

    if part is None:
        refuse("table-grows", f"the table of {rows:,} x {width} would be {found.widths[-1]} wide: {both}")
        return None
    objection = _objection(scope, part)
    if objection is not None:
        refuse(objection[0], f"{objection[1]}: {both}")
        return None
    table, largest, residual = _new_table(scope, part)
    if not largest < float("inf"):
        refuse("not-finite", "the new table holds NaN or infinity, as what it comes from does")
    elif largest > torch.finfo(table.dtype).max:
        refuse("overflow", f"the new table reaches {largest:.1e}, which does not fit {table.dtype}")
    elif not residual <= LIMIT:
        reason = f"the new table deviates by {residual:.1e} in float64, expected at most {LIMIT:.0e}"
        refuse("certificate", f"{reason}; please report this")
    else:
        refs, kind = tuple(NodeRef.of(node) for node in part.nodes), "+".join(map(op_name, part.nodes))
        written = _write(scope, part, table)
        detail = f"a table of {table.shape[0]:,} x {table.shape[1]:,}"
        lookup = (NodeRef.of(part.embedding),)
        return Change(FoldEmbedding.name, kind, refs, lookup, (written,), before, after, residual, detail)
    return None


def _costs(scope: Scope, found: _Lookup) -> tuple[Cost, Cost]:
    """What it costs now, with the parameters that only it reads, and what the folded lookup will."""
    params, _ = scope.params(found.nodes)
    before = sum((node_cost(node, scope.sizes) for node in found.nodes), Cost(params=params))
    lookup = node_cost(found.embedding, scope.sizes)
    rows, width = (int(n) for n in tensor_meta(found.table).shape)
    new = found.widths[-1]
    return before, Cost(moved=lookup.moved // width * new, params=rows * new, nodes=lookup.nodes)


def _objection(scope: Scope, found: _Lookup) -> tuple[str, str] | None:
    inside = _constants_behind(found.table)
    known = memory_readers(scope)
    readers = [user for leaf in inside for user in known.get(leaf, ())]
    readers += [user for node in inside for user in node.users]
    writer = next((node for node in (*inside, *readers) if _rescales(node)), None)
    if writer is not None:
        return "mutated", f"{writer.name!r} rescales rows of the table on every lookup"
    other = next((user for user in readers if user not in inside and user is not found.embedding), None)
    if other is not None:
        return "shared-table", f"the table is read by {other.name!r} too and would stay"
    for node in found.nodes[:-1]:
        if len(node.users) > 1:
            return "several-users", f"{node.name!r} is read by {len(node.users)} calls"
    return None


def _constants_behind(node: fx.Node) -> dict[fx.Node, None]:
    found = {node: None}
    stack = [node]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in found:
                found[operand] = None
                stack.append(operand)
    return found


# -- folding it


def _new_table(scope: Scope, found: _Lookup) -> tuple[torch.Tensor, float, float]:
    """The new table in the model's dtype, its largest magnitude, and the residual of its certificate.

    The certificate takes random mixtures `u` of all rows, with weights that add up to one: an affine map
    takes the mixture of rows to the same mixture of new rows.
    """
    node = found.table
    old = get_attr_value(scope.gm, str(node.target)).detach() if node.op == "get_attr" else None
    old = scope.constant_value(node) if old is None else old
    rows, width = old.shape
    table = torch.empty((rows, found.widths[-1]), dtype=tensor_meta(found.chain[-1]).dtype, device=old.device)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(_MIXTURES, rows, generator=generator).double().to(old.device)
    weights += (1 - weights.sum(1, keepdim=True)) / rows
    mixed_old, mixed_new = (
        torch.zeros(_MIXTURES, n, dtype=torch.float64, device=old.device) for n in (width, found.widths[-1])
    )
    largest = 0.0
    step = max(1, _CHUNK // max(width, found.widths[-1]))
    for start in range(0, rows, step):
        chunk = old[start : start + step].double()
        new = _apply(scope, found, chunk)
        mixed_old += weights[:, start : start + step] @ chunk
        mixed_new += weights[:, start : start + step] @ new
        reached = float(new.abs().max())
        largest = max(largest, reached) if reached == reached else float("nan")
        table[start : start + step] = new
        if not largest < float("inf"):
            return table, float("inf"), float("inf")
    wanted = _apply(scope, found, mixed_old)
    return table, largest, deviation(wanted, mixed_new, [0])


def _apply(scope: Scope, found: _Lookup, rows: torch.Tensor) -> torch.Tensor:
    """The chain on feature vectors in float64: (n, width) to (n, new width)."""
    rank = tensor_meta(found.embedding).dim()
    value = rows.reshape(*[1] * (rank - 2), *rows.shape)
    with torch.no_grad():
        return runner(scope, found.embedding, found.chain, 1)(value).reshape(rows.shape[0], -1)


def _write(scope: Scope, found: _Lookup, table: torch.Tensor) -> str:
    """Put the new table in place of the old one, drop the chain, and return the name of the table."""
    gm, graph, old, last = scope.gm, scope.gm.graph, found.table, found.chain[-1]
    leaves = [str(n.target) for n in _constants_behind(old) if n.op == "get_attr"]
    held = [get_attr_value(gm, leaf) for leaf in leaves]
    target = str(old.target)
    if old.op != "get_attr":  # a computed table gets a name of its own
        target = fresh_attr(gm, f"{module_path(found.embedding) or found.embedding.name}.weight")
    table.requires_grad_(any(tensor.requires_grad for tensor in held))
    set_attr(gm, target, table, parameter=any(isinstance(tensor, nn.Parameter) for tensor in held))
    with graph.inserting_before(found.embedding):
        new = graph.get_attr(target)
    annotate(gm, new)
    found.embedding.replace_input_with(old, new)
    last.replace_all_uses_with(found.embedding)
    found.embedding.meta["val"] = last.meta["val"]
    constants = [old, *(operand for node in found.chain for operand in node.all_input_nodes)]
    for node in reversed(found.chain):
        graph.erase_node(node)
    erase_unread(node for node in constants if node in scope.constant)
    return target
