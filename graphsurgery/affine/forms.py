"""Forms: which layers can stand for a region, read off its axes alone.

Shared positions and mixed features are a Linear or a 1x1 convolution; windows a convolution; varied axes
its groups; everything but the batch mixed a Linear on the flattened entry; only a scale and a shift a
multiply-add; only movement a view or a permute.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from math import ceil, prod

from graphsurgery.affine.atoms import Atom, Axes, NoFold, Window
from graphsurgery.affine.program import Conv, Layout, Linear, Pad, Scale, Shape, Shift, Step, moves


@dataclass(frozen=True)
class Form:
    """One way to write a region.

    Attributes:
        kind: `movement`, `scale`, `linear`, `conv1d`, `conv2d` or `conv3d`.
        axes: the axes that it realises (those of the region, some perhaps mixed).
        steps: its program.
        slots: shapes of the tensors that the program reads.
        out: layout of the layer's value, in the labels of `Roles`.
        spatial: for convolutions, which window of `Roles.windowed` each kernel axis is; None where carried.
    """

    kind: str
    axes: Axes
    steps: tuple[Step, ...]
    slots: dict[str, Shape]
    out: Layout = ()
    spatial: tuple[int | None, ...] = ()

    @property
    def uneven(self) -> bool:
        """Whether the program adds a map of shifts over positions."""
        return self.kind not in ("scale", "movement") and "shift" in self.slots


class Roles:
    """The atoms of a region by what they do, with a label for each, the same on both sides.

    Labels of carried and windowed atoms stand for the entry digit on the entry side and for the atom on the
    exit side; gone digits and fresh atoms have labels of their own.
    """

    def __init__(self, axes: Axes, rank: int) -> None:
        """Sort the atoms of `axes`, whose entry has `rank` dimensions."""
        self.axes = axes
        labels = count()
        self.exit_sizes: dict[int, int] = {}
        self.entry_sizes: dict[int, int] = {}
        self.atoms: dict[int, Atom] = {}
        exit_layout: list[tuple[int, ...]] = []
        of_digit: dict[tuple[int, int], int] = {}
        for dim in axes.dims:
            row = []
            for atom in dim:
                label = next(labels)
                self.atoms[label] = atom
                self.exit_sizes[label] = atom.size
                if not atom.fresh:
                    of_digit[atom.axis, atom.stride] = label
                    self.entry_sizes[label] = atom.digit().size
                row.append(label)
            exit_layout.append(tuple(row))
        self.gone: tuple[int, ...] = ()
        entry: list[list[int]] = [[] for _ in range(rank)]
        for digit in axes.entry_digits():
            known = of_digit.get((digit.axis, digit.stride))
            if known is None:
                known = next(labels)
                self.entry_sizes[known] = digit.size
                self.gone += (known,)
            entry[digit.axis].append(known)
        self.exit: Layout = tuple(exit_layout)
        self.entry: Layout = tuple(tuple(dim) for dim in entry)

    def _pick(self, test: str) -> tuple[int, ...]:
        return tuple(label for label, atom in self.atoms.items() if getattr(atom, test))

    @cached_property
    def shared(self) -> tuple[int, ...]:
        """Carried atoms with the same coefficients everywhere, in exit order."""
        return self._pick("shared")

    @cached_property
    def varied(self) -> tuple[int, ...]:
        """Carried atoms along which coefficients differ, in exit order."""
        return tuple(label for label, atom in self.atoms.items() if atom.carried and atom.varied)

    @cached_property
    def fresh(self) -> tuple[int, ...]:
        """Features, in exit order."""
        return self._pick("fresh")

    @cached_property
    def windowed(self) -> tuple[int, ...]:
        """Windowed atoms, in entry order."""
        return tuple(
            label for dim in self.entry for label in dim if label in self.atoms and self.atoms[label].window
        )

    def sizes(self, labels: Iterable[int]) -> int:
        """Number of coordinates of the labels, on the exit side where they have one."""
        return prod(self.exit_sizes.get(label, self.entry_sizes.get(label, 1)) for label in labels)

    def symbolic(self, labels: Iterable[int]) -> bool:
        """Whether one of the labels holds a symbolic size."""
        return any(self.axes.symbolic(self.atoms[label]) for label in labels if label in self.atoms)


def candidates(axes: Axes, entry: Sequence[int], heavy: bool) -> list[Form]:
    """All forms of a region.

    Args:
        axes: the region's axes.
        entry: shape of its entry, symbols as primes.
        heavy: whether the region multiplies by weights; one without never gains a layer.

    Raises:
        NoFold: there is none.
    """
    rank = len(entry)
    if prod(_sizes(axes.entry_digits())) != prod(entry):
        raise NoFold("unsupported", "the entry is read more than once or not as a whole")
    roles = Roles(axes, rank)
    if not (roles.gone or roles.windowed or roles.fresh):
        return [_elementwise(roles)]
    if not heavy:
        raise NoFold("no-heavy", "a region without a layer does not gain one")
    forms: list[Form] = []
    reasons: list[NoFold] = []
    for variant in _variants(axes, roles):
        kept = Roles(variant, rank)
        for build in (_pointwise, _grouped):
            try:
                forms.extend(build(kept))
            except NoFold as reason:
                reasons.append(reason)
    if not forms:
        # That a Linear cannot read windows says nothing; what kept the convolution from it does.
        raise next((reason for reason in reasons if reason.code != "structure"), reasons[0])
    return forms


def _sizes(atoms: Iterable[Atom]) -> list[int]:
    return [atom.size for atom in atoms]


def _variants(axes: Axes, roles: Roles) -> list[Axes]:
    """The axes as they are, with windows mixed, and with everything but the batch mixed."""
    variants = [axes]
    keeps = [[a for a in axes.atoms() if a.carried]] if roles.windowed else []
    keeps.append([a for a in axes.atoms() if a.shared and (axes.symbolic(a) or a.axis == 0)])
    for keep in keeps:
        try:
            variant = axes.mixed(keep)
        except NoFold:
            continue
        if variant not in variants:
            variants.append(variant)
    return variants


def _elementwise(roles: Roles) -> Form:
    axes = roles.axes
    steps = list(moves(roles.entry, roles.exit, roles.exit_sizes))
    slots: dict[str, Shape] = {}
    shape = axes.shape
    if axes.scaled:
        slots["scale"] = _broadcast(roles, roles.exit, roles.varied)
        steps.append(Scale(shape))
    if axes.shifted:
        slots["shift"] = _broadcast(roles, roles.exit, _differing(roles))
        steps.append(Shift(shape))
    return Form("scale" if slots else "movement", axes, tuple(steps), slots, roles.exit)


def _differing(roles: Roles) -> tuple[int, ...]:
    """Labels along which the shift may differ."""
    return tuple(label for label, a in roles.atoms.items() if a.fresh or a.uneven or (a.carried and a.varied))


def _broadcast(roles: Roles, layout: Layout, labels: Iterable[int]) -> Shape:
    """Shape of a constant that differs along the labels, in a layout.

    Raises:
        NoFold: such a label shares a dimension with a symbolic size.
    """
    wanted = set(labels)
    shape = []
    for dim in layout:
        differs = bool(wanted & set(dim))
        if differs and roles.symbolic(dim):
            raise NoFold("position-bias", "its shift differs along an axis that is merged with the batch")
        shape.append(roles.sizes(dim) if differs else 1)
    return tuple(shape)


def _pointwise(roles: Roles) -> list[Form]:
    """A Linear over the gone digits, one application for each shared position."""
    if roles.windowed or roles.varied:
        raise NoFold("structure", "it reads windows or groups")
    forms = []
    shared = set(roles.shared)
    for grouping in dict.fromkeys((roles.entry, roles.exit)):
        lead = tuple(d for d in (tuple(a for a in dim if a in shared) for dim in grouping) if d)
        into, out = (*lead, roles.gone), (*lead, roles.fresh)
        forms.append(_finish(roles, "linear", into, out, _linear(roles, out)))
    return forms


def _linear(roles: Roles, out: Layout) -> tuple[Linear, dict[str, Shape]]:
    features, size = roles.sizes(roles.gone), roles.sizes(roles.fresh)
    slots: dict[str, Shape] = {"weight": (size, features)}
    bias = _has_bias(roles)
    if bias:
        slots["bias"] = (size,)
    return Linear(bias, features, tuple(roles.sizes(dim) for dim in out)), slots


def _has_bias(roles: Roles) -> bool:
    return roles.axes.shifted and not _positions(roles)


def _positions(roles: Roles) -> tuple[int, ...]:
    """Position labels along which the shift may differ."""
    return tuple(label for label in roles.shared + roles.windowed if roles.atoms[label].uneven)


def _finish(
    roles: Roles, kind: str, into: Layout, out: Layout, layer: tuple[Linear | Conv, dict[str, Shape]]
) -> Form:
    """Moves to the layer, the layer, a map of shifts where needed, and moves from it."""
    step, slots = layer
    steps: list[Step] = [*moves(roles.entry, into, roles.entry_sizes), step]
    if roles.axes.shifted and not _has_bias(roles):
        slots = {**slots, "shift": _broadcast(roles, out, _differing(roles))}
        steps.append(Shift(step.out))
    steps.extend(moves(out, roles.exit, roles.exit_sizes))
    return Form(kind, roles.axes, tuple(steps), slots, out)


def _grouped(roles: Roles) -> list[Form]:
    """A convolution: varied digits are its groups, windows its kernel, other positions stay as they are."""
    forms: list[Form] = []
    reason: NoFold | None = None
    shared = set(roles.shared)
    lead = tuple(a for a in (roles.entry[0] if roles.entry else ()) if a in shared)
    rest = [tuple(a for a in dim if a in shared or a in roles.windowed) for dim in roles.entry[1:]]
    natural = [dim for dim in rest if dim]
    windowed = set(roles.windowed)
    leads = bool(roles.entry) and bool(windowed & set(roles.entry[0]))  # no convolution runs over its batch
    if not leads and all(len(dim) == 1 or not set(dim) & windowed for dim in natural):
        options = [(lead, natural)]
    else:
        options = []
    options.append((roles.shared, [(label,) for label in roles.windowed]))
    for batch, spatial in options:
        positions = spatial or [()]
        if len(positions) > 3:
            reason = NoFold("rank", f"a convolution over {len(positions)} axes does not exist")
            continue
        channels = roles.varied + roles.gone
        into: Layout = (tuple(batch), channels, *positions)
        out: Layout = (tuple(batch), roles.varied + roles.fresh, *positions)
        try:
            pad, conv, slots, which = _conv(roles, into, out)
        except NoFold as refusal:
            reason = refusal
            continue
        form = _finish(roles, f"conv{len(positions)}d", into, out, (conv, slots))
        steps = form.steps
        if pad is not None:
            index = steps.index(conv)
            steps = (*steps[:index], pad, *steps[index:])
        forms.append(replace(form, steps=steps, spatial=which))
    if not forms and reason is not None:
        raise reason
    return forms


def _conv(
    roles: Roles, into: Layout, out: Layout
) -> tuple[Pad | None, Conv, dict[str, Shape], tuple[int | None, ...]]:
    options: list[tuple[int, int, int, int]] = []  # kernel, stride, padding, dilation
    explicit: list[tuple[int, int]] = []
    which: list[int | None] = []
    symmetric = True
    for dim in into[2:]:
        atom = roles.atoms[dim[0]] if dim else None
        if atom is None or atom.window is None:
            options.append((1, 1, 0, 1))
            explicit.append((0, 0))
            which.append(None)
            continue
        w, size = atom.window, atom.size
        if roles.axes.pinned and not inside(w, size):
            raise NoFold(
                "border", "every window leaves the entry, whose size is fixed by a view or a constant"
            )
        low, high = -w.lo, w.s * (size - 1) + w.hi - (w.base - 1)
        options.append((w.taps, w.s, low, max(w.step, 1)))
        explicit.append((low, high if high > 0 or _count(w.base + low, w) != size else 0))
        if not roles.symbolic(dim):  # over symbolic sizes only symmetric windows are made, so they agree
            symmetric &= low >= 0 and _count(w.base + 2 * low, w) == size
        which.append(roles.windowed.index(dim[0]))
    kernel, stride, _, dilation = (tuple(column) for column in zip(*options, strict=True))
    shape_in = [prod(roles.entry_sizes[a] for a in dim) for dim in into]
    pad, zeros = None, _zeros(options, explicit, symmetric)
    if zeros is None:
        padded = [n + a + b for n, (a, b) in zip(shape_in[2:], explicit, strict=True)]
        pad = Pad(tuple(explicit), (*shape_in[:2], *padded))
        zeros = (0,) * len(kernel)
    groups, features = roles.sizes(roles.varied), prod(roles.entry_sizes[a] for a in roles.gone)
    channels = roles.sizes(out[1])
    slots: dict[str, Shape] = {"weight": (channels, features, *kernel)}
    bias = _has_bias(roles)
    if bias:
        slots["bias"] = (channels,)
    shape = tuple(roles.sizes(dim) for dim in out)
    return pad, Conv(bias, kernel, stride, zeros, dilation, groups, features, shape), slots, tuple(which)


def _zeros(
    options: list[tuple[int, int, int, int]], explicit: list[tuple[int, int]], symmetric: bool
) -> Shape | str | None:
    """The padding option of a convolution, or None where only a pad of its own can give these zeros."""
    if symmetric:
        return tuple(low for _, _, low, _ in options)
    spans = [dilation * (kernel - 1) for kernel, _, _, dilation in options]
    same = [(span // 2, span - span // 2) for span in spans]
    return "same" if same == explicit and all(stride == 1 for _, stride, _, _ in options) else None


def interior(w: Window) -> int:
    """The first output position whose window does not reach before the entry."""
    return max(0, ceil(-w.lo / w.s))


def inside(w: Window, positions: int) -> bool:
    """Whether some output position's window lies inside of the entry."""
    return interior(w) < positions and w.s * interior(w) + w.hi <= w.base - 1


def _count(padded: int, w: Window) -> int:
    """Number of output positions of a window over `padded` positions."""
    return (padded - (w.hi - w.lo) - 1) // w.s + 1
