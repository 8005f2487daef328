"""A stretch in segments, each as many layers as make one kernel, and the entries of their matrices.

A segment is a region of the affine engine. Its canonical coefficients `K[v, f, g, *taps]` hold for all
carried positions alike, so the matrix of a sample is `K` repeated: row (shared q, varied v, feature f,
position p) has the value `K[v, f, g, t]` in column (q, v, g, s*p + lo + t*step), where that lies inside.
Rows come in order and with ascending columns, as the compressed-row format wants them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import prod

import torch
from torch import fx

from graphsurgery.affine.atoms import Atom, Axes, NoFold, Window
from graphsurgery.affine.kernel import kernel_pieces
from graphsurgery.affine.region import Region, Scope, is_heavy
from graphsurgery.affine.roles import Roles
from graphsurgery.cost import op_name
from graphsurgery.errors import NotAffineError
from graphsurgery.matrix.branches import MEETING, Branches, carried, taken
from graphsurgery.matrix.repeated import depending, values_read
from graphsurgery.matrix.rows import CHUNK, DEFAULT_LIMIT, Rows, sparse
from graphsurgery.matrix.stretch import Stretch
from graphsurgery.values import tensor_meta

_DEARER = 8
"""How many times the numbers of two segments the coefficients of both as one may have; they are all found."""


@dataclass(frozen=True)
class _Kernel:
    """The non-zero coefficients by row (v, f), within a row in the order of their columns.

    Attributes:
        starts: (rows + 1,) where each row begins.
        offsets: (n,) the column of the gone coordinate.
        taps: for each window (n,) where the tap lies beside `s*p`.
        values: (n,) float64.
    """

    starts: torch.Tensor
    offsets: torch.Tensor
    taps: tuple[torch.Tensor, ...]
    values: torch.Tensor


class Segment:
    """One region of a stretch and the matrix of a sample of it."""

    def __init__(self, region: Region) -> None:
        """Read sizes off a region; the batch counts as one.

        Raises:
            NotAffineError: the batch is not the leading part of both ends.
        """
        self.region, self.axes = region, region.axes
        scope = region.scope
        self.roles = roles = Roles(region.axes, len(scope.shape(region.entry)))
        self.into, self.out = _flat(roles.entry), _flat(roles.exit)
        self.entry_sizes = {label: scope.actual(n, 1) for label, n in roles.entry_sizes.items()}
        self.exit_sizes = {label: scope.actual(n, 1) for label, n in roles.exit_sizes.items()}
        self.batch = batch = batch_size(scope, region.entry)
        if batch is None or batch > 1:
            label = _batch_label(roles, self.into, batch)
            if label is None or label != _first(self.out, roles.exit_sizes):
                raise NotAffineError(
                    f"the batch does not lead both ends of the stretch, {region.entry.name!r} and "
                    f"{region.exit.name!r}, or its samples are treated differently; choose a stretch whose "
                    "ends keep it in front.",
                    "batch-order",
                )
            if batch is not None:
                self.entry_sizes[label] = self.exit_sizes[label] = 1
        self.transposed = not all(w.ordinary() for w in _windows(region.axes))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return prod(self.exit_sizes[a] for a in self.out), prod(self.entry_sizes[a] for a in self.into)

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """What each window reads (or, transposed, writes), in the order of the taps."""
        found = []
        for label in self.roles.windowed:
            atom = self.roles.atoms[label]
            w = atom.window and (
                atom.window.reverse(atom.size) if self.transposed else atom.window.ordinary()
            )
            if w is None:
                raise ValueError(f"no window of that kind for the atom {atom}")
            found.append(w)
        return tuple(found)

    def matrix(self, limit_bytes: int = DEFAULT_LIMIT) -> torch.Tensor:
        """The matrix by compressed rows, float64.

        Raises:
            ValueError: it takes more than the limit.
        """
        region = self.region
        if self.batch is None and region.exit is not region.entry and not region.tally.heavy:
            shape = [region.scope.actual(n, 1) for n in region.scope.shape(region.entry)]
            found = carried(region.runner(1), shape)
            if found is not None:
                return sparse([found.rows()], self.shape, limit_bytes)
        return sparse(self.rows(), self.shape, limit_bytes)

    def whole(self) -> torch.Tensor | None:
        """The matrix itself, float64, where all is mixed and it is no larger than its coefficients."""
        roles = self.roles
        if self.windows or any(self.exit_sizes[a] != 1 for a in (*roles.shared, *roles.varied)):
            return None
        matrix = torch.zeros(self.shape, dtype=torch.float64)
        for piece in kernel_pieces(self.region, self.transposed):
            rows = piece.values[0]
            if piece.whole:
                return rows.clone(memory_format=torch.contiguous_format)
            matrix.narrow(piece.dim - 1, piece.start, rows.shape[piece.dim - 1]).copy_(rows)
        return matrix

    def at_one_position(self) -> Segment:
        """The same, with one coordinate only of everything that is carried alike."""
        alone = copy(self)
        one = dict.fromkeys(self.roles.shared, 1)
        alone.entry_sizes, alone.exit_sizes = {**self.entry_sizes, **one}, {**self.exit_sizes, **one}
        return alone

    def rows(self) -> Iterator[Rows]:
        """The rows of the matrix in order, some at a time."""
        kernel = self._kernel()
        counts = kernel.starts.diff()
        total = self.shape[0]
        step = max(1, CHUNK // max(1, int(counts.max())))
        for start in range(0, total, step):
            yield self._some(kernel, counts, torch.arange(start, min(total, start + step)))

    def _some(self, kernel: _Kernel, counts: torch.Tensor, row: torch.Tensor) -> Rows:
        roles = self.roles
        at = dict(zip(self.out, _digits(row, [self.exit_sizes[a] for a in self.out]), strict=True))
        stride = _strides(self.into, self.entry_sizes)
        which = torch.zeros_like(row)
        for label in (*roles.varied, *roles.fresh):
            which = which * self.exit_sizes[label] + at[label]
        base = sum((at[a] * stride[a] for a in (*roles.shared, *roles.varied)), torch.zeros_like(row))
        number = counts[which]
        owner = torch.repeat_interleave(torch.arange(len(row)), number)
        within = torch.arange(len(owner)) - (number.cumsum(0) - number)[owner]
        entry = kernel.starts[which][owner] + within
        column = base[owner] + kernel.offsets[entry]
        keep = torch.ones(len(owner), dtype=torch.bool)
        for label, w, taps in zip(roles.windowed, self.windows, kernel.taps, strict=True):
            position, tap = at[label][owner], taps[entry]
            if w.transposed:
                read = torch.div(position - tap, w.s, rounding_mode="floor")
                keep &= read * w.s == position - tap
            else:
                read = position * w.s + tap
            keep &= (read >= 0) & (read < self.entry_sizes[label])
            column += read * stride[label]
        owner = owner[keep]
        return Rows(torch.bincount(owner, minlength=len(row)), column[keep], kernel.values[entry[keep]])

    def _kernel(self) -> _Kernel:
        """The non-zero coefficients, found piece by piece."""
        roles, windows = self.roles, self.windows
        stride = _strides(self.into, self.entry_sizes)
        # Columns of one row ascend with the gone digits and the taps, those of later axes fastest.
        turning = [a for a in self.into if a in roles.gone or a in roles.windowed]
        taps = dict(zip(roles.windowed, windows, strict=True))
        sizes = {a: taps[a].taps if a in taps else self.entry_sizes[a] for a in turning}
        keys, offsets, values = [], [], []
        positions: list[list[torch.Tensor]] = [[] for _ in windows]
        for piece in kernel_pieces(self.region, self.transposed):
            varied, feature, gone, *tap = piece.values.nonzero().unbind(1)
            values.append(piece.values[(varied, feature, gone, *tap)])
            feature, gone = (i + piece.start * (piece.dim == d) for d, i in ((1, feature), (2, gone)))
            digits = dict(zip(roles.gone, _digits(gone, [sizes[a] for a in roles.gone]), strict=True))
            for found, w, t, label in zip(positions, windows, tap, roles.windowed, strict=True):
                found.append(w.offset(0) + t * w.step)
                digits[label] = w.taps - 1 - t if w.transposed else t
            key = varied * prod(self.exit_sizes[a] for a in roles.fresh) + feature
            offsets.append(sum((digits[a] * stride[a] for a in roles.gone), torch.zeros_like(gone)))
            for label in turning:
                key = key * sizes[label] + digits[label]
            keys.append(key)
        key, order = torch.cat(keys).sort()
        each = prod(sizes.values())
        rows = prod(self.exit_sizes[a] for a in (*roles.varied, *roles.fresh))
        starts = torch.zeros(rows + 1, dtype=torch.int64)
        starts[1:] = torch.bincount(key // each, minlength=rows).cumsum(0)
        return _Kernel(
            starts,
            torch.cat(offsets)[order],
            tuple(torch.cat(found)[order] for found in positions),
            torch.cat(values)[order],
        )


@dataclass(frozen=True)
class _Step:
    """What lies between two cuts: first value, last value, and what is done to the axes of the first."""

    start: fx.Node
    stop: fx.Node
    axes: Axes
    branches: Branches | None = None


def segments(stretch: Stretch, whole: bool = False) -> list[Segment | Branches]:
    """The stretch in parts: windows that its layers read stay windows, and what was sparse stays sparse.

    Args:
        stretch: the calls.
        whole: as few segments as can be, and no branches.

    Raises:
        NotAffineError: a call is no affine op, or mixes samples, or moves the batch.
    """
    if not stretch.nodes:
        return [_segment(stretch, _Step(stretch.entry, stretch.exit, stretch.axes(*[stretch.entry] * 2)))]
    found: list[_Step] = []
    for start, stop in pairwise(stretch.cuts()):
        step = _Step(start, stop, stretch.axes(start, stop))
        if not whole:
            step = replace(step, branches=_branches(stretch, step))
        joined = _joined(stretch, found[-1], step, whole) if found else None
        if joined is None:
            found.append(replace(step, axes=_expressible(step.axes)))
        else:
            found[-1] = joined
    return [step.branches or _segment(stretch, step) for step in found]


def _segment(stretch: Stretch, step: _Step) -> Segment:
    return Segment(Region(stretch.scope, step.start, step.stop, step.axes))


def _joined(stretch: Stretch, before: _Step, step: _Step, whole: bool) -> _Step | None:
    """A segment and the step behind it as one; None where that would lose windows."""
    if before.branches or step.branches:
        return None
    try:
        axes = stretch.axes(before.start, step.stop)
    except NotAffineError:
        return None
    heavy = any(is_heavy(node) for node in stretch.scope.between(step.start, step.stop))
    if not _lossless(before.axes, step.axes, axes, heavy) or _expressible(axes) is not axes:
        return None
    joined = _Step(before.start, step.stop, axes)
    kept = len(_windows(axes)) >= max(len(_windows(one.axes)) for one in (before, step))
    if kept or whole:
        return joined
    each = sum(_coefficients(stretch.scope, one.start, one.axes) for one in (before, step))
    return joined if _coefficients(stretch.scope, before.start, axes) <= _DEARER * each else None


def _coefficients(scope: Scope, entry: fx.Node, axes: Axes) -> int:
    """How many numbers make a matrix: those of one position of what is carried alike."""
    roles = Roles(axes, len(scope.shape(entry)))
    taps = (w.taps if w.ordinary() else w.base for w in _windows(axes))
    labels = (*roles.varied, *roles.fresh, *roles.gone)
    return scope.actual(roles.sizes(labels), 1) * prod(taps)


def _branches(stretch: Stretch, step: _Step) -> Branches | None:
    """A step in which paths meet by its paths; None where it is a layer, or cannot be taken apart."""
    scope = stretch.scope
    nodes = scope.between(step.start, step.stop)
    if op_name(step.stop) not in MEETING or batch_size(scope, step.start) is not None:
        return None
    read = dict.fromkeys(values_read(step.stop, scope.constant))
    if list(read) == [step.start]:
        return None
    weights = (o for node in nodes if is_heavy(node) for o in node.all_input_nodes if o in scope.constant)
    size = sum(tensor_meta(weight).numel() for weight in weights)
    if _coefficients(scope, step.start, step.axes) <= _DEARER * size:
        return None
    live = depending(scope, step.start, nodes)
    try:
        shape = _segment(stretch, replace(step, axes=_expressible(step.axes))).shape
        paths = []
        for operand in read:
            if operand not in live:
                continue
            take = taken(scope, step.stop, operand)
            if take is None:
                return None
            inside = scope.between(step.start, operand) if operand is not step.start else ()
            paths.append((take, segments(Stretch(scope, step.start, operand, inside))))
    except NotAffineError:  # the batch is elsewhere in between: the step as a whole may still do
        return None
    return Branches(shape, paths)


def _expressible(axes: Axes) -> Axes:
    """The axes, windows mixed where some can be read as ordinary ones only and some as transposed only."""
    windows = _windows(axes)
    sizes = [atom.size for atom in axes.atoms() if atom.window]
    if all(w.ordinary() for w in windows):
        return axes
    if all(w.reverse(size) for w, size in zip(windows, sizes, strict=True)):
        return axes
    try:
        return axes.mixed(atom for atom in axes.atoms() if atom.carried)
    except NoFold as refusal:
        raise NotAffineError(f"the stretch cannot be followed: {refusal.reason}.", refusal.code) from None


def _windows(axes: Axes) -> list[Window]:
    return [atom.window for atom in axes.atoms() if atom.window]


def _lossless(first: Axes, second: Axes, whole: Axes, heavy: bool) -> bool:
    """Whether two segments as one mix only what the first mixes, or a layer of what the first carries.

    A second segment without weights (not `heavy`) that mixes positions, such as an interpolation, is one
    small map for each channel, and better left so.
    """
    mixed = list(first.gone)
    for axis, dim in enumerate(first.dims if heavy else ()):
        stride = 1
        for atom in reversed(dim):
            reach = Atom(atom.size, axis, stride)
            if not atom.fresh and any(_meet(reach, digit) for digit in second.gone):
                mixed.append(atom.digit())
            stride *= atom.size
    return all(_covered(digit, mixed) for digit in whole.gone)


def _meet(a: Atom, b: Atom) -> bool:
    return a.axis == b.axis and a.stride < b.stride * b.size and b.stride < a.stride * a.size


def _covered(digit: Atom, by: Iterable[Atom]) -> bool:
    """Whether a digit lies within the union of others."""
    reached = digit.stride
    for other in sorted((a for a in by if a.axis == digit.axis), key=lambda a: a.stride):
        if other.stride <= reached:
            reached = max(reached, other.stride * other.size)
    return reached >= digit.stride * digit.size


# -- the batch and the order of labels


def batch_size(scope: Scope, node: fx.Node) -> int | None:
    """The fixed size of a value's batch, which is its first dimension; None where it is free."""
    lead = scope.shape(node)[0]
    return None if any(lead % prime == 0 for prime in scope.primes) else lead


def _batch_label(roles: Roles, into: tuple[int, ...], batch: int | None) -> int | None:
    """The label of the batch: the first one of the entry, if it is carried alike for every sample."""
    label = _first(into, roles.entry_sizes)
    atom = roles.atoms.get(label) if label is not None else None
    if label is None or atom is None or not atom.shared or atom.uneven:
        return None
    leads = roles.axes.symbolic(atom) if batch is None else atom.size == batch
    return label if leads else None


def _first(labels: Iterable[int], sizes: Mapping[int, int]) -> int | None:
    return next((label for label in labels if sizes[label] != 1), None)


def _flat(layout: Iterable[Iterable[int]]) -> tuple[int, ...]:
    return tuple(label for dim in layout for label in dim)


def _strides(labels: tuple[int, ...], sizes: Mapping[int, int]) -> dict[int, int]:
    found, stride = {}, 1
    for label in reversed(labels):
        found[label] = stride
        stride *= sizes[label]
    return found


def _digits(index: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """The coordinates of flat indices, major first."""
    found = []
    for size in reversed(sizes):
        found.append(index % size)
        index = torch.div(index, size, rounding_mode="floor")
    return found[::-1]
