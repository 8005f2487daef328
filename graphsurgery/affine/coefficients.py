"""The coefficients of a form, found by probing the region in float64.

The canonical coefficients of a region are `K[v, f, g, *taps]`: for each coordinate v of the varied digits,
the weight of gone coordinate g and kernel tap in feature f. They are found column by column (one-hot inputs)
or row by row (the adjoint: gradients of one-hot outputs), whichever are fewer. One-hots are packed into the
batch and all carried positions, which a region treats alike. Windows are read off the adjoint at one output
position whose window lies inside of the entry; transposed windows off the columns of one entry position that
writes inside of the output. Where no position sees all taps, several are looked at; a tap that none sees is
zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, product
from math import ceil, prod
from typing import Any

import torch
from torch import fx

from graphsurgery.affine.atoms import Atom, Window
from graphsurgery.affine.closed import closed_form
from graphsurgery.affine.forms import Form
from graphsurgery.affine.permuted import permuted_kernel
from graphsurgery.affine.preshift import SLOT, entry_shift
from graphsurgery.affine.program import Layout
from graphsurgery.affine.region import Region
from graphsurgery.affine.roles import Roles
from graphsurgery.affine.rules import live_operands
from graphsurgery.affine.runner import linear_part, runner
from graphsurgery.cost import op_name
from graphsurgery.values import is_tensor

DEFAULT_BUDGET = 256 * 1024 * 1024
"""Bytes that the values of one chunk of probes may take."""


@dataclass(frozen=True)
class Coefficients:
    """A form with its numbers.

    Attributes:
        form: the form.
        slots: tensors by slot name, in the shapes of `form.slots`; float64 as they are found.
        method: `closed`, `columns` or `rows`.
    """

    form: Form
    slots: dict[str, torch.Tensor]
    method: str


def fill(region: Region, form: Form, budget: int = DEFAULT_BUDGET) -> Coefficients:
    """Find the coefficients of a form.

    Args:
        region: the region.
        form: one of its forms.
        budget: bytes that a chunk of probes may take.

    """
    roles = Roles(form.axes, len(region.scope.shape(region.entry)))
    slots: dict[str, torch.Tensor] = {}
    if SLOT in form.slots:
        slots[SLOT] = entry_shift(region, form.slots[SLOT])
    closed = closed_form(region, form)
    if closed is not None:
        slots.update(closed)
        if not {"bias", "shift"} & set(form.slots) <= set(slots) or SLOT in slots:
            slots.update(_shift(region, roles, form, slots.get(SLOT)))
        return Coefficients(form, slots, "closed")
    method = "closed"
    if "weight" in form.slots or "scale" in form.slots:
        kernel = permuted_kernel(region, form)
        if kernel is None:
            kernel, method = Probe(region, roles, form.transposed).linear_part(budget)
        if "scale" in form.slots:
            slots["scale"] = _spread(kernel.flatten(), roles, roles.varied, roles.exit, form.slots["scale"])
        else:
            slots["weight"] = _weight(kernel, form)
    if {"bias", "shift"} & set(form.slots):
        slots.update(_shift(region, roles, form, slots.get(SLOT)))
    return Coefficients(form, slots, method)


@dataclass(frozen=True)
class Piece:
    """Some rows or columns of the canonical coefficients.

    Attributes:
        dim: the dimension of `K` that is cut: 1, features, or 2, gone coordinates.
        start: the first of them.
        values: `K[v, f, g, *taps]` of these only, float64.
        whole: whether these are all.
    """

    dim: int
    start: int
    values: torch.Tensor
    whole: bool

    def of(self, kernel: torch.Tensor) -> torch.Tensor:
        """The part of a whole kernel that this is."""
        return kernel.narrow(self.dim, self.start, self.values.shape[self.dim])


def _weight(kernel: torch.Tensor, form: Form) -> torch.Tensor:
    """`K[v, f, g, *taps]` as the layer's weight; a carried axis of a convolution has one tap."""
    windows = [which for which in form.spatial if which is not None]
    channels = (0, 2, 1) if form.transposed else (0, 1, 2)
    if not form.spatial:  # a Linear: windows are single positions that are taken before it
        return kernel.permute(*channels, *range(3, kernel.dim())).reshape(form.slots["weight"]).contiguous()
    kernel = kernel.permute(*channels, *(3 + which for which in windows))
    return kernel.reshape(form.slots["weight"]).contiguous()


def _shift(region: Region, roles: Roles, form: Form, before: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The region where the layer reads zero, at its real sizes, as the slot that the form gives it."""
    if not form.axes.shifted:
        return {}
    shape = [region.scope.actual(n, 1) for n in region.scope.shape(region.entry)]
    zero = torch.zeros(shape, dtype=torch.float64)
    with torch.no_grad():
        value = region.runner(1)(zero if before is None else zero - before)
    value, sizes = _by_label(value, roles.exit, roles.exit_sizes, region)
    position = {label: i for i, label in enumerate(sizes)}
    name = "bias" if "bias" in form.slots else "shift"
    target = [a for dim in form.out for a in dim]
    for label in set(position) - set(target):  # a single position, which the form leaves out
        value = value.narrow(position[label], 0, 1)
    keep = {*roles.varied, *roles.fresh}
    if name == "shift":
        keep = {a for dim, n in zip(form.out, form.slots[name], strict=True) if n != 1 for a in dim}
    for label in target:
        if label not in keep:  # uniform along this label: any coordinate will do
            value = value.narrow(position[label], 0, 1)
    left = [label for label in position if label not in target]  # single positions that the form drops
    value = value.permute([position[a] for a in (*target, *left)])
    return {name: value.reshape(form.slots[name]).clone(memory_format=torch.contiguous_format)}


def _spread(
    value: torch.Tensor, roles: Roles, labels: tuple[int, ...], layout: Layout, shape: tuple[int, ...]
) -> torch.Tensor:
    """Numbers along some labels as a constant that broadcasts in a layout.

    A dimension that differs holds all of its labels, so the numbers repeat along those that are not given.
    """
    sizes = roles.exit_sizes
    value = value.reshape([sizes[a] for a in labels])
    flat = [a for dim, n in zip(layout, shape, strict=True) if n != 1 for a in dim]
    order = [labels.index(a) for a in flat if a in labels]
    value = value.permute(order)
    for i, label in enumerate(flat):
        if label not in labels:
            value = value.unsqueeze(i)
    return value.expand([sizes[a] for a in flat]).reshape(shape).clone(memory_format=torch.contiguous_format)


def _by_label(
    value: torch.Tensor, layout: Layout, sizes: dict[int, int], region: Region
) -> tuple[torch.Tensor, list[int]]:
    """A value with one dimension for each label of its layout."""
    labels = [a for dim in layout for a in dim]
    batch = _batch_of(value, layout, sizes, region)
    return value.reshape([region.scope.actual(sizes[a], batch) for a in labels]), labels


def _batch_of(value: torch.Tensor, layout: Layout, sizes: dict[int, int], region: Region) -> int:
    unit = prod(region.scope.actual(sizes[a], 1) for dim in layout for a in dim)
    return max(1, value.numel() // unit) if region.scope.primes else 1


Taps = tuple[list[int], ...]
Look = tuple[torch.Tensor, tuple[int, ...], Taps]  # what was found, from where, and the taps to take of it


def facing(atom: Atom, transposed: bool) -> Window:
    """An atom's window as a form reads it: ordinary, or transposed."""
    window = atom.window
    found = window and (window.reverse(atom.size) if transposed else window.ordinary())
    if found is None:
        raise ValueError(f"the form has no window for the atom {atom}")
    return found


class Probe:
    """The linear part of a region, by one-hots."""

    def __init__(self, region: Region, roles: Roles, transposed: bool) -> None:
        """Take a region, its roles, and whether its windows are read as transposed ones."""
        self.region, self.roles, self.transposed = region, roles, transposed
        self.windows = [facing(roles.atoms[label], transposed) for label in roles.windowed]
        self.order_out = (*roles.shared, *roles.varied, *roles.fresh, *roles.windowed)
        self.order_in = (*roles.shared, *roles.varied, *roles.gone, *roles.windowed)
        self._forward: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def linear_part(self, budget: int) -> tuple[torch.Tensor, str]:
        """`K[v, f, g, *taps]` and the method that found it."""
        method = "columns" if self._by_columns else "rows"
        pieces = self.pieces(budget)
        first = next(pieces)
        if first.whole:  # one look sees it all: nothing to put together
            return first.values, method
        kernel = torch.zeros(*self._size, *(w.taps for w in self.windows), dtype=torch.float64)
        for piece in chain((first,), pieces):
            piece.of(kernel).copy_(piece.values)
        return kernel, method

    @property
    def _size(self) -> tuple[int, int, int]:
        """Numbers of varied coordinates, features and gone coordinates."""
        roles = self.roles
        gone = prod(roles.entry_sizes[a] for a in roles.gone)
        return roles.sizes(roles.varied), roles.sizes(roles.fresh), gone

    @property
    def _by_columns(self) -> bool:
        _, features, gone = self._size
        return self.transposed or (not self.windows and gone <= features)

    def pieces(self, budget: int) -> Iterator[Piece]:
        """`K` piece by piece, each found within the budget: features by rows, gone coordinates by columns."""
        dim, look = (2, self._columns) if self._by_columns else (1, self._rows)
        size = list(self._size)
        count = size[dim]
        for start, stop, batch in self._chunks(count, budget):
            whole = stop - start == count
            if not self.windows:
                ((found, _, _),) = look(start, stop, batch)
                yield Piece(dim, start, found, whole)
                continue
            size[dim] = stop - start
            part = torch.zeros(*size, *(w.taps for w in self.windows), dtype=torch.float64)
            for found, at, taps in look(start, stop, batch):
                self._put(part, found, at, taps)
            yield Piece(dim, start, part, whole)

    def _chunks(self, count: int, budget: int) -> Iterator[tuple[int, int, int]]:
        """Stretches of one-hots and the batch size that holds each, under the memory budget."""
        scope = self.region.scope
        positions = prod(scope.actual(self.roles.exit_sizes[a], 1) for a in self.roles.shared)
        if not any(self.roles.symbolic([a]) for a in self.roles.shared):
            chunk = positions  # a static batch: only the positions that there are
        else:
            nodes = [node for node in (self.region.entry, *self.region.nodes) if is_tensor(node)]
            bytes_each = 2 * 8 * sum(prod(scope.actual(n, 1) for n in scope.shape(node)) for node in nodes)
            chunk = max(1, budget // bytes_each) * positions
        for start in range(0, count, chunk):
            stop = min(count, start + chunk)
            yield start, stop, ceil((stop - start) / positions)

    def _sizes(self, sizes: dict[int, int], batch: int, order: tuple[int, ...]) -> list[int]:
        return [self.region.scope.actual(sizes[a], batch) for a in order]

    def _columns(self, start: int, stop: int, batch: int) -> Iterator[Look]:
        """Columns of the kernel, `[v, f, columns, *positions]`, from each place that has to be looked at."""
        roles, n = self.roles, stop - start
        entry_sizes, exit_sizes = self._probe_sizes()
        run = self.region.runner(batch)
        for at, taps in self._looks(entry_sizes, exit_sizes):
            hot = (roles.gone, start, n, batch, at)
            x = self._one_hots(roles.entry, entry_sizes, self.order_in, *hot)
            y = linear_part(run, x)
            flat = self._canonical(y, roles.exit, exit_sizes, self.order_out, roles.fresh, batch)
            yield flat[:n].permute(1, 2, 0, *self._last), at, taps

    def _rows(self, start: int, stop: int, batch: int) -> Iterator[Look]:
        """Rows of the kernel, `[v, rows, g, *positions]`, from each place that has to be looked at."""
        roles, n = self.roles, stop - start
        entry_sizes, exit_sizes = self._probe_sizes()
        last = self._last_weight
        if batch not in self._forward:  # once for all chunks of one size
            self._forward = {batch: self._traced(entry_sizes, batch, last)}
        x, y = self._forward[batch]
        for at, taps in self._looks(entry_sizes, exit_sizes):
            if last is None:
                hot = (roles.fresh, start, n, batch, at)
                seeds = self._one_hots(roles.exit, exit_sizes, self.order_out, *hot)
            else:  # what the adjoint of the last Linear makes of one-hots
                seeds = self.region.scope.constant_value(last)[start:stop].reshape(y.shape)
            (grad,) = torch.autograd.grad(y, x, seeds, retain_graph=True)
            found = self._canonical(grad, roles.entry, entry_sizes, self.order_in, roles.gone, batch)
            yield found[:n].transpose(0, 1), at, taps

    def _traced(
        self, entry_sizes: dict[int, int], batch: int, last: fx.Node | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """An entry without values, and what the region makes of it up to the last Linear, to go back from."""
        region = self.region
        shape = [prod(self._sizes(entry_sizes, batch, dim)) for dim in self.roles.entry]
        x = torch.zeros((), dtype=torch.float64).expand(shape).requires_grad_()
        nodes = region.nodes if last is None else region.nodes[:-1]
        return x, runner(region.scope, region.entry, nodes, batch)(x)

    @property
    def _last_weight(self) -> fx.Node | None:
        """The weight of the Linear that ends the region, where its rows are the region's features."""
        scope, exit_, roles = self.region.scope, self.region.exit, self.roles
        if op_name(exit_) != "linear" or len(self.region.nodes) < 2 or roles.varied or self.windows:
            return None
        live = live_operands(exit_, scope.constant)
        if live != [exit_.args[0]] or roles.exit[-1] != roles.fresh:
            return None
        positions = prod(scope.actual(roles.exit_sizes[a], 1) for a in roles.shared)
        weight = exit_.args[1]
        return weight if positions == 1 and isinstance(weight, fx.Node) else None

    @property
    def _last(self) -> range:
        return range(3, 3 + len(self.windows))

    def _put(self, kernel: torch.Tensor, found: torch.Tensor, at: tuple[int, ...], taps: Taps) -> None:
        """Write what one look met of the taps."""
        where: list[Any] = [slice(None)] * 3
        for axis, (w, p, met) in enumerate(zip(self.windows, at, taps, strict=True)):
            found = found.index_select(3 + axis, torch.tensor([w.s * p + w.offset(tap) for tap in met]))
            where.append(torch.tensor(met).reshape([-1 if i == axis else 1 for i in range(len(taps))]))
        kernel[tuple(where)] = found

    def _looks(
        self, entry_sizes: dict[int, int], exit_sizes: dict[int, int]
    ) -> Iterator[tuple[tuple[int, ...], Taps]]:
        """The window positions to look at, and the taps to take from each."""
        actual = self.region.scope.actual
        sizes = ((actual(entry_sizes[a], 1), actual(exit_sizes[a], 1)) for a in self.roles.windowed)
        each = [w.sightings(*size) for w, size in zip(self.windows, sizes, strict=True)]
        for look in product(*each):
            yield tuple(p for p, _ in look), tuple(taps for _, taps in look)

    def _probe_sizes(self) -> tuple[dict[int, int], dict[int, int]]:
        """Label sizes of the entry and the exit, where nothing bakes them in only as large as is needed."""
        roles, scope = self.roles, self.region.scope
        entry_sizes, exit_sizes = dict(roles.entry_sizes), dict(roles.exit_sizes)
        if roles.axes.pinned or not self.windows:
            return entry_sizes, exit_sizes
        own = {dim[0] for dim in roles.exit if len(dim) == 1}
        for label, w in zip(roles.windowed, self.windows, strict=True):
            # A single position may stand for a dimension that the entry, or the exit, does not have.
            if w.base != 1 and label in own:
                entry_sizes[label] = w.probe_size()
        small = [prod(scope.actual(entry_sizes[a], 1) for a in dim) for dim in roles.entry]
        with torch.no_grad():
            value = self.region.runner(1)(torch.zeros(small, dtype=torch.float64))
        for dim, size in zip(roles.exit, value.shape, strict=True):
            if len(dim) == 1 and dim[0] in roles.windowed:
                exit_sizes[dim[0]] = size
        return entry_sizes, exit_sizes

    def _one_hots(
        self,
        layout: Layout,
        sizes: dict[int, int],
        order: tuple[int, ...],
        hot: tuple[int, ...],
        start: int,
        count: int,
        batch: int,
        at: tuple[int, ...],
    ) -> torch.Tensor:
        """Ones at (position q, every varied coordinate, feature start + q, window position `at`)."""
        real = dict(zip(order, self._sizes(sizes, batch, order), strict=True))
        roles = self.roles
        size = [prod(real[a] for a in group) for group in (roles.shared, roles.varied, hot)]
        value = torch.zeros([*size, *(real[a] for a in roles.windowed)], dtype=torch.float64)
        q = torch.arange(count)
        where: tuple[Any, ...] = (q, slice(None), start + q, *at)
        value[where] = 1.0
        value = value.reshape([real[a] for a in order])
        labels = [a for dim in layout for a in dim]
        value = value.permute([order.index(a) for a in labels])
        return value.reshape([prod(real[a] for a in dim) for dim in layout])

    def _canonical(
        self,
        value: torch.Tensor,
        layout: Layout,
        sizes: dict[int, int],
        order: tuple[int, ...],
        hot: tuple[int, ...],
        batch: int,
    ) -> torch.Tensor:
        """A value as [positions, varied, features or gone, *windows]."""
        labels = [a for dim in layout for a in dim]
        real = dict(zip(order, self._sizes(sizes, batch, order), strict=True))
        value = value.reshape([real[a] for a in labels]).permute([labels.index(a) for a in order])
        roles = self.roles
        size = [prod(real[a] for a in group) for group in (roles.shared, roles.varied, hot)]
        return value.reshape([*size, *(real[a] for a in roles.windowed)])
