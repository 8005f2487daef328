"""What the atoms of a region do, and what a form of it is made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from math import prod

from graphsurgery.affine.atoms import Atom, Axes, NoFold
from graphsurgery.affine.program import (
    Conv,
    ConvTranspose,
    Layout,
    Linear,
    Shape,
    Shift,
    Step,
    compact,
    moves,
)


@dataclass(frozen=True)
class Form:
    """One way to write a region.

    Attributes:
        kind: `movement`, `scale`, `linear`, or `conv` or `conv_transpose` with `1d`, `2d` or `3d`.
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
    def transposed(self) -> bool:
        """Whether the layer is a transposed convolution, with its weight as (in, out/groups, *kernel)."""
        return self.kind.startswith("conv_transpose")

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
            # A digit of size one may stand for a dimension that the entry does not have: any place will do.
            entry[min(digit.axis, rank - 1)].append(known)
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


def differing(roles: Roles) -> tuple[int, ...]:
    """Labels along which the shift may differ."""
    return tuple(label for label, a in roles.atoms.items() if a.fresh or a.uneven or (a.carried and a.varied))


def broadcast(roles: Roles, layout: Layout, labels: Iterable[int]) -> Shape:
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


def has_bias(roles: Roles) -> bool:
    """Whether the shift is one number for each channel; else it is a map."""
    return roles.axes.shifted and not _positions(roles)


def _positions(roles: Roles) -> tuple[int, ...]:
    """Position labels along which the shift may differ."""
    return tuple(label for label in roles.shared + roles.windowed if roles.atoms[label].uneven)


def finish(
    roles: Roles,
    kind: str,
    into: Layout,
    out: Layout,
    layer: tuple[Linear | Conv | ConvTranspose, dict[str, Shape]],
    taken: Layout | None = None,
) -> Form:
    """Moves to the layer, the layer, a map of shifts where needed, and moves from it.

    Args:
        roles: the atoms.
        kind: of the form.
        into: what the layer reads.
        out: what it writes.
        layer: the layer and its slots.
        taken: the layout of the entry where only some of its positions are read, else None.
    """
    step, slots = layer
    sizes = roles.entry_sizes if taken is None else {**roles.entry_sizes, **roles.exit_sizes}
    steps: list[Step] = [*moves(roles.entry if taken is None else taken, into, sizes), step]
    if roles.axes.shifted and not has_bias(roles):
        slots = {**slots, "shift": broadcast(roles, out, differing(roles))}
        steps.append(Shift(step.out))
    steps.extend(compact(moves(out, roles.exit, roles.exit_sizes)))
    return Form(kind, roles.axes, tuple(steps), slots, out)
