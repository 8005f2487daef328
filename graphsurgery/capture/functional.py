"""Turn in-place operations into functional ones by substitution, where that is plainly right.

`y = relu_(x)` becomes `y = relu(x)` and later readers of `x` read `y`. That is right when no other alias of
the memory of `x` is read later. Aliases are found by the storage of the fake values, which export shares just
as the real tensors do: this sees through views that no schema declares (dropout in eval). A part that is
written through slices is put back into the whole by `slice_scatter` and `select_scatter`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from graphsurgery.errors import CaptureError
from graphsurgery.graph import annotate, source_line

aten = torch.ops.aten

__all__ = ["NotSubstitutable", "functionalize"]


class NotSubstitutable(Exception):
    """An in-place operation needs torch's full functionalisation."""


def functionalize(gm: fx.GraphModule) -> tuple[str, ...]:
    """Replace every in-place operation of `gm`.

    Returns:
        The names of the inputs that the model writes into; the graph does not.

    Raises:
        NotSubstitutable: An alias is read later, or the operation has no functional twin.
        CaptureError: The model writes a parameter, a buffer or a constant.
    """
    work = _Substitution(gm)
    for node in list(gm.graph.nodes):
        written = _written(node)
        if not written:
            continue
        if node.target is aten.detach_.default:  # writes no memory
            node.target = aten.detach.default
            work.redirect(written[0], node)
        elif len(written) > 1:
            raise NotSubstitutable(f"{node.name} writes several tensors")
        else:
            work.substitute(node, written[0])
    return tuple(dict.fromkeys(work.inputs))


class _Substitution:
    """The state of one walk over the graph: the order of nodes, and who shares memory with whom."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.inputs: list[str] = []
        self._order: dict[fx.Node, float] = {node: index for index, node in enumerate(gm.graph.nodes)}
        self._groups: dict[int, list[fx.Node]] = {}
        for node in self._order:
            self._join_group(node)

    def _join_group(self, node: fx.Node) -> None:
        for storage in _storages(node.meta.get("val")):
            self._groups.setdefault(storage, []).append(node)

    def redirect(self, old: fx.Node, new: fx.Node) -> None:
        """Let every reader of `old` after `new` read `new`."""
        now = self._order[new]
        old.replace_all_uses_with(
            new, delete_user_cb=lambda user: self._order[user] > now, propagate_meta=False
        )

    def substitute(self, node: fx.Node, target: fx.Node) -> None:
        """Make `node`, which writes `target`, functional."""
        storages = _storages(target.meta.get("val"))
        aliases = [alias for storage in storages for alias in self._groups.get(storage, [])]
        _check_owner(aliases, node, self.inputs)
        views = _chain_of_views(target)
        parents = [view.args[0] for view in views]
        now = self._order[node]
        same = {target}
        for alias in aliases:
            if alias in (target, node) or alias in parents or self._order[alias] > now:
                continue  # what is made from the result later is made from the new value
            if any(self._order[user] > now for user in alias.users):
                if not _is_same_value(alias, target):
                    raise NotSubstitutable(f"{node.name} writes what {alias.name} views")
                same.add(alias)
        _make_functional(self.gm, node)
        for alias in same:
            self.redirect(alias, node)
        self._write_back(node, views)

    def _write_back(self, node: fx.Node, views: list[fx.Node]) -> None:
        """Give later readers of what was written through a view the whole with the new part in it."""
        part = node
        for level, view in enumerate(views, start=1):
            whole = view.args[0]
            if not isinstance(whole, fx.Node):
                raise NotSubstitutable(f"{view.name} views no node")
            with self.gm.graph.inserting_after(part):
                scatter = self.gm.graph.call_function(_SCATTERS[view.target], (whole, part, *view.args[1:]))
            scatter.meta = {key: value for key, value in node.meta.items() if key != "tensor_meta"}
            scatter.meta["val"] = whole.meta["val"]
            self._order[scatter] = self._order[node] + level / (len(views) + 1)
            self._join_group(scatter)
            self.redirect(whole, scatter)
            part = scatter


_SCATTERS: dict[Any, OpOverload] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


def _chain_of_views(node: fx.Node) -> list[fx.Node]:
    """Return the slices and selections that lead from `node` up to the whole that it is a part of."""
    chain = []
    while node.op == "call_function" and node.target in _SCATTERS and not node.kwargs:
        chain.append(node)
        parent = node.args[0]
        if not isinstance(parent, fx.Node):
            break
        node = parent
    return chain


def _storages(value: Any) -> list[int]:
    if isinstance(value, torch.Tensor):
        return [value.untyped_storage()._cdata]
    if isinstance(value, (list, tuple)):
        return [storage for item in value for storage in _storages(item)]
    return []


def _written(node: fx.Node) -> list[fx.Node]:
    """Return the operands that `node` writes into."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return []
    schema = node.target._schema
    if not schema.is_mutable:
        return []
    found: list[fx.Node] = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        found.extend(item for item in _flat(value) if isinstance(item, fx.Node))
    return found


def _flat(value: Any) -> list[Any]:
    return [item for part in value for item in _flat(part)] if isinstance(value, (list, tuple)) else [value]


def _check_owner(aliases: list[fx.Node], node: fx.Node, inputs: list[str]) -> None:
    for alias in aliases:
        if alias.op == "get_attr":
            raise CaptureError(
                f"the model writes {alias.target!r} in forward (at {source_line(node) or node.name}), so its "
                "output depends on earlier calls; keep such state out of it, or update it in training only."
            )
        if alias.op == "placeholder":
            inputs.append(str(alias.target))


def _functional_twin(target: OpOverload) -> OpOverload:
    namespace, name = target._schema.name.split("::")
    base = name.removesuffix("_")
    if torch.Tag.inplace_view in target.tags:
        raise NotSubstitutable(f"{target} changes the shape of a tensor in place")
    packet = getattr(getattr(torch.ops, namespace), base, None) if name.endswith("_") else None
    twin = getattr(packet, target._overloadname, None) if packet is not None else None
    if not isinstance(twin, OpOverload) or twin._schema.is_mutable:
        raise NotSubstitutable(f"{target} has no functional twin")
    return twin


def _make_functional(gm: fx.GraphModule, node: fx.Node) -> None:
    old_target, old_value = node.target, node.meta["val"]
    if not isinstance(old_target, OpOverload):
        raise NotSubstitutable(f"{old_target} is no operator")
    node.target = _functional_twin(old_target)
    if _may_promote(node, old_value.dtype):
        annotate(gm, node)
    if old_value.dtype != node.meta["val"].dtype or tuple(old_value.shape) != tuple(node.meta["val"].shape):
        raise NotSubstitutable(f"{old_target} keeps the dtype or shape of what it writes")
    node.meta["val"] = old_value
    node._rename(node.target._schema.name.split("::")[1])


def _may_promote(node: fx.Node, dtype: torch.dtype) -> bool:
    """Return whether the functional result could be of another dtype than the tensor that was written.

    The shape never differs, since an in-place result has that of its target; nor do scalars promote, since in
    place they must not.
    """
    values = [operand.meta.get("val") for operand in node.all_input_nodes]
    return any(isinstance(value, torch.Tensor) and value.dtype != dtype for value in values)


def _is_same_value(a: fx.Node, b: fx.Node) -> bool:
    """Return whether two nodes of one storage are the same elements in the same order."""
    x, y = a.meta["val"], b.meta["val"]
    if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
        return False
    if x.dtype != y.dtype or x.shape != y.shape or x.storage_offset() != y.storage_offset():
        return False
    return x.stride() == y.stride()
