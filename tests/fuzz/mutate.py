"""One thing made wrong in what a pass has written, before its certificate looks at it.

A pass is run with a `Saboteur` in place: it lets the pass work out its rewrite, spoils the rewrite of one
number, asks the certificate, notes what that says, and lets the spoilt rewrite through, so that the other
comparisons can be asked about the whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from graphsurgery.affine import program as steps
from graphsurgery.affine import write
from graphsurgery.affine.certify import LIMIT
from graphsurgery.affine.coefficients import Coefficients
from graphsurgery.affine.region import Scope
from graphsurgery.cost import op_name
from graphsurgery.graph import annotate, fresh_attr, get_attr_value, set_attr
from graphsurgery.layout import exchange
from graphsurgery.passes import commute_pointwise, fold_embedding, fully_convolutional, merge_siblings

MUTATIONS = ("coefficient", "bias", "transpose", "padding", "channels")
"""One coefficient off by 1e-3 of its channel's largest; no bias; a square weight the other way round; padding
shifted by one position; two output channels exchanged."""

aten = torch.ops.aten


@dataclass
class Saboteur:
    """Spoils rewrite number `target` of one run of a pass.

    Attributes:
        mutation: what it does.
        target: counted from 0.
        seen: rewrites so far.
        kind: of what was spoilt, as `"conv"`; empty where the mutation does not apply.
        residual: what the certificate found of it.
    """

    mutation: str
    target: int
    seed: int = 0
    seen: int = 0
    kind: str = ""
    residual: float = field(default=float("nan"))

    @property
    def caught(self) -> bool:
        """Whether the certificate refuses it."""
        return not self.residual <= LIMIT

    def turn(self) -> bool:
        """Whether the rewrite that is now made is the one."""
        self.seen += 1
        return self.seen - 1 == self.target

    # -- tensors

    def slots(self, slots: dict[str, Tensor], channel: int = 0) -> dict[str, Tensor] | None:
        """Spoilt weights; None where the mutation does not apply. `channel` is the axis of the outputs."""
        name = next((slot for slot in ("weight", "scale", "shift", "bias") if slot in slots), None)
        if name is None:
            return None
        value = slots[name]
        match self.mutation:
            case "coefficient":
                return {**slots, name: self.nudged(value, channel)}
            case "bias":
                gone = next((slot for slot in ("bias", "shift") if slot in slots), None)
                return None if gone is None else {**slots, gone: torch.zeros_like(slots[gone])}
            case "transpose" if name == "weight" and value.dim() > 1 and value.shape[0] == value.shape[1] > 1:
                return {**slots, name: value.transpose(0, 1).contiguous()}
            case "channels":
                if name != "weight":
                    channel = max(range(value.dim()), key=lambda axis: value.shape[axis], default=0)
                if not value.dim() or value.shape[channel] < 2:
                    return None
                order = list(range(value.shape[channel]))
                order[0], order[-1] = order[-1], order[0]
                made = {**slots, name: value.index_select(channel, torch.tensor(order))}
                other = slots.get("bias", slots.get("shift") if name == "scale" else None)
                if name == "weight" and other is not None and other.shape[0] == len(order):
                    made["bias"] = other[order]
                return made
        return None

    def nudged(self, value: Tensor, channel: int) -> Tensor:
        """One element, drawn by the seed, off by a thousandth of the largest of its channel."""
        flat = int(torch.randint(value.numel(), (), generator=torch.Generator().manual_seed(self.seed)))
        changed = value.detach().clone().reshape(-1)
        row = value.detach()
        if value.dim() > 1:
            index = torch.unravel_index(torch.tensor(flat), value.shape)[channel]
            row = value.detach().select(channel, int(index))
        size = float(row.abs().max())
        changed[flat] += 1e-3 * (size if size else float(value.detach().abs().max()))
        return changed.reshape(value.shape)

    # -- calls in a graph

    def calls(self, gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> str:
        """Spoil the first layer among some calls; its kind, empty where there is none."""
        for node in nodes:
            kind = op_name(node)
            if kind in ("linear", "conv1d", "conv2d", "conv3d") and self._layer(gm, node):
                return kind
            if kind in ("mul", "add", "batch_norm") and self._constant(gm, node, kind):
                return kind
        return ""

    def _layer(self, gm: fx.GraphModule, node: fx.Node) -> bool:
        entry, weight, *rest = node.args
        if self.mutation == "padding":
            if op_name(node) == "linear":
                return False
            with gm.graph.inserting_before(node):
                padded = gm.graph.call_function(aten.constant_pad_nd.default, (entry, [1, 0]))
                annotate(gm, padded)
                shifted = gm.graph.call_function(aten.slice.Tensor, (padded, -1, 0, -1))
            annotate(gm, shifted)
            node.args = (shifted, weight, *rest)
            return True
        slots = {"weight": _value(gm, weight)}
        if rest and rest[0] is not None:
            slots["bias"] = _value(gm, rest[0])
        spoilt = self.slots(slots)
        if spoilt is None:
            return False
        bias = [_held(gm, node, spoilt["bias"])] if "bias" in spoilt else rest[:1]
        node.args = (entry, _held(gm, node, spoilt["weight"]), *bias, *rest[1:])
        return True

    def _constant(self, gm: fx.GraphModule, node: fx.Node, kind: str) -> bool:
        if self.mutation not in ("coefficient", "channels", "bias"):
            return False
        if self.mutation == "bias" and kind == "mul":
            return False
        place = {"batch_norm": 2 if self.mutation == "bias" else 1}.get(kind)
        for i, value in enumerate(node.args):
            if (place is None or i == place) and isinstance(value, fx.Node) and _is_constant(value):
                name = "shift" if self.mutation == "bias" else "scale"
                spoilt = self.slots({name: _value(gm, value)})
                if spoilt is not None:
                    node.args = (*node.args[:i], _held(gm, node, spoilt[name]), *node.args[i + 1 :])
                    return True
        return False


def _is_constant(node: fx.Node) -> bool:
    reads = node.all_input_nodes
    return node.op == "get_attr" or (
        bool(reads) and node.op == "call_function" and all(map(_is_constant, reads))
    )


def _value(gm: fx.GraphModule, node: Any) -> Tensor:
    """The value of a constant."""
    if node.op == "get_attr":
        value: Tensor = get_attr_value(gm, str(node.target)).detach()
        return value
    made: Tensor = node.target(*fx.node.map_arg(node.args, lambda n: _value(gm, n)))
    return made


def _held(gm: fx.GraphModule, reader: fx.Node, value: Tensor) -> fx.Node:
    """A new constant of the graph."""
    name = fresh_attr(gm, "spoilt")
    set_attr(gm, name, value.contiguous(), parameter=True)
    with gm.graph.inserting_before(reader):
        node = gm.graph.get_attr(name)
    annotate(gm, node)
    return node


# -- where passes are spoilt --------------------------------------------------------------------------------


@contextmanager
def spoiling(saboteur: Saboteur) -> Iterator[None]:
    """All certificates while it lasts ask the saboteur first."""
    with ExitStack() as stack:
        for place, name, wrapped in (
            (write, "residual", _fold(saboteur, write.residual)),
            (write, "fill", _fill(saboteur, write.fill)),
            (merge_siblings, "_residual", _siblings(saboteur, merge_siblings._residual)),
            (commute_pointwise, "_residual", _commuted(saboteur, commute_pointwise._residual)),
            (fully_convolutional, "residual", _spread(saboteur, fully_convolutional.residual)),
            (fold_embedding, "_apply", _table(saboteur, fold_embedding._apply)),
            (fold_embedding, "_new_table", _new_table(saboteur, fold_embedding._new_table)),
            (exchange.Exchange, "certify", _exchanged(saboteur, exchange.Exchange.certify)),
        ):
            stack.enter_context(mock.patch.object(place, name, wrapped))
        yield


def _fill(saboteur: Saboteur, right: Callable[..., Coefficients]) -> Callable[..., Coefficients]:
    def fill(region: Any, *args: Any) -> Coefficients:
        filled = right(region, *args)
        if not saboteur.turn():
            return filled
        spoilt = _spoilt_form(saboteur, filled, region.scope.shape(region.entry))
        return filled if spoilt is None else spoilt

    return fill


def _spoilt_form(saboteur: Saboteur, filled: Coefficients, entry: Sequence[int]) -> Coefficients | None:
    layer = next((s for s in filled.form.steps if isinstance(s, (steps.Conv, steps.ConvTranspose))), None)
    if saboteur.mutation == "padding":
        if layer is None:
            return None
        at = filled.form.steps.index(layer)
        before = filled.form.steps[at - 1].out if at else tuple(entry)
        shape = tuple(layer.into if isinstance(layer, steps.ConvTranspose) else before)
        shifted = (
            steps.Pad(((1, 0),), (*shape[:-1], shape[-1] + 1)),
            steps.Take(len(shape) - 1, 0, shape[-1], 1, False, shape),
        )
        form = replace(filled.form, steps=(*filled.form.steps[:at], *shifted, *filled.form.steps[at:]))
        spoilt = Coefficients(form, filled.slots, filled.method)
    else:
        transposed = isinstance(layer, steps.ConvTranspose)
        slots = saboteur.slots(dict(filled.slots), channel=1 if transposed else 0)
        if slots is None:
            return None
        spoilt = Coefficients(filled.form, slots, filled.method)
    saboteur.kind = _kind(filled)
    return spoilt


def _kind(filled: Coefficients) -> str:
    layer = next((s for s in filled.form.steps if isinstance(s, (steps.Conv, steps.ConvTranspose))), None)
    if isinstance(layer, steps.ConvTranspose):
        return "transposed convolution"
    if layer is not None:
        depthwise = layer.groups > 1 and layer.features == 1
        return "depthwise convolution" if depthwise else "convolution"
    linear = any(isinstance(step, steps.Linear) for step in filled.form.steps)
    return "Linear" if linear else "scale and shift"


def _fold(saboteur: Saboteur, right: Callable[..., float]) -> Callable[..., float]:
    def residual(*args: Any) -> float:
        found = right(*args)
        if saboteur.kind and saboteur.residual != saboteur.residual:
            saboteur.residual = found
            return 0.0
        return found

    return residual


def _siblings(saboteur: Saboteur, right: Callable[..., float]) -> Callable[..., float]:
    def residual(scope: Any, members: Any, slots: dict[str, Tensor], *args: Any) -> float:
        if not saboteur.turn():
            return right(scope, members, slots, *args)
        spoilt = saboteur.slots(slots)
        if spoilt is None:
            return right(scope, members, slots, *args)
        slots.update(spoilt)
        saboteur.kind, saboteur.residual = "merged layer", right(scope, members, slots, *args)
        return 0.0

    return residual


def _commuted(saboteur: Saboteur, right: Callable[..., float]) -> Callable[..., float]:
    def residual(scope: Any, swap: Any, new: tuple[fx.Node, ...]) -> float:
        before = set(scope.gm.graph.nodes)
        if saboteur.turn() and saboteur.calls(scope.gm, new):
            fresh = [node for node in scope.gm.graph.nodes if node not in before]
            pads = [node for node in fresh if node.op != "get_attr"]
            at = next((i for i, node in enumerate(new) if pads and pads[-1] in node.all_input_nodes), 0)
            saboteur.kind = "commuted layer"
            saboteur.residual = right(Scope(scope.gm), swap, (*new[:at], *pads, *new[at:]))
            return 0.0
        return right(scope, swap, new)

    return residual


def _spread(saboteur: Saboteur, right: Callable[..., float]) -> Callable[..., float]:
    def residual(old: Any, new: Any, twins: Any, *args: Any) -> float:
        if not saboteur.turn():
            return right(old, new, twins, *args)
        for twin in twins.values():
            kind = saboteur.calls(new.gm, twin.made) if saboteur.mutation != "padding" else ""
            if kind:
                saboteur.kind = "Linear over a map"
                saboteur.residual = right(old, Scope(new.gm), twins, *args)
                return 0.0
        return right(old, new, twins, *args)

    return residual


def _table(saboteur: Saboteur, right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply(scope: Any, found: Any, rows: Tensor) -> Tensor:
        made = right(scope, found, rows)
        if not getattr(saboteur, "tabling", False):
            return made
        saboteur.tabling = False  # type: ignore[attr-defined]  # the first part of the table only
        match saboteur.mutation:
            case "coefficient":
                spoilt: Tensor | None = saboteur.nudged(made, 1)
            case "bias":
                spoilt = made - right(scope, found, torch.zeros_like(rows))
            case "transpose" if rows.shape[1] == made.shape[1] > 1:
                linear = made - right(scope, found, torch.zeros_like(rows))
                basis = torch.eye(rows.shape[1], dtype=rows.dtype)
                weight = right(scope, found, basis) - right(scope, found, torch.zeros_like(basis))
                spoilt = made - linear + rows @ weight.T
            case "channels" if made.shape[1] > 1:
                spoilt = made.flip(1)
            case _:
                spoilt = None
        if spoilt is None:
            return made
        saboteur.kind = "embedding"
        return spoilt

    return apply


def _new_table(saboteur: Saboteur, right: Callable[..., Any]) -> Callable[..., Any]:
    def new_table(*args: Any) -> Any:
        saboteur.tabling = saboteur.turn()  # type: ignore[attr-defined]
        table, largest, residual = right(*args)
        if saboteur.kind == "embedding" and saboteur.residual != saboteur.residual:
            saboteur.residual, residual = residual, 0.0
        return table, largest, residual

    return new_table


def _exchanged(saboteur: Saboteur, right: Callable[..., float]) -> Callable[..., float]:
    def certify(self: Any, old: fx.Node, new: fx.Node, calls: Sequence[fx.Node]) -> float:
        if not (saboteur.turn() and saboteur.calls(self.work, calls)):
            return right(self, old, new, calls)
        saboteur.kind = "exchanged layer"
        try:
            saboteur.residual = right(self, old, new, calls)
        except exchange.Refused as refused:
            saboteur.residual = float("inf") if refused.code == "certificate" else 0.0
        return 0.0

    return certify
