"""Axes as atoms: what a region does to each axis, decided from shapes before any weight is read.

Every dimension of every value in a region is a tuple of atoms, major first, whose sizes multiply to the
dimension's size. An atom is

- an *entry digit* `(axis, stride, size)`: the coordinate `coord // stride % size` of an entry axis, carried
  to the output unchanged. It is *varied* when the coefficients differ along it (a per-channel scale,
  groups), else *shared*;
- *windowed*: output position p reads the entry digit's positions `s*p + lo ... s*p + hi` every `step`, or,
  *transposed*, the digit's position p writes output positions `s*p + lo ... s*p + hi` every `step`;
- *fresh*: a feature made by a layer from the features it consumed.

Entry digits that were consumed are *gone*. In a region the carried, windowed and gone digits partition the
entry axes, so together they say which layer the region is. An atom is *uneven* when the shift (the value at
zero input) may differ along it; fresh and varied atoms always may.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from graphsurgery.affine.windows import Window

__all__ = ["Atom", "Axes", "Dims", "NoFold", "Window", "size_of"]


class NoFold(Exception):
    """A region or a form is not possible; carries the refusal's stable code and reason."""

    def __init__(self, code: str, reason: str) -> None:
        """Keep the code and the one-sentence reason."""
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Atom(NamedTuple):
    """One factor of a dimension; see the module's text. `axis` is -1 for fresh atoms."""

    size: int
    axis: int = -1
    stride: int = 1
    varied: bool = False
    uneven: bool = False
    window: Window | None = None

    @property
    def fresh(self) -> bool:
        """Whether the atom is a feature made inside of the region."""
        return self.axis < 0

    @property
    def carried(self) -> bool:
        """Whether the atom is an entry digit that is carried unchanged."""
        return self.axis >= 0 and self.window is None

    @property
    def shared(self) -> bool:
        """Whether the atom is carried and every coordinate has the same coefficients."""
        return self.carried and not self.varied

    def digit(self) -> Atom:
        """The bare entry digit behind this atom (for windowed atoms: what the window reads)."""
        size = self.window.base if self.window else self.size
        return Atom(size, self.axis, self.stride)

    def split(self, major: int) -> tuple[Atom, Atom]:
        """The atom as (major, minor) of sizes `major` and `size // major`; not for windowed atoms."""
        minor = self.size // major
        if self.fresh:
            return self._replace(size=major), self._replace(size=minor)
        return self._replace(size=major, stride=self.stride * minor), self._replace(size=minor)


Dims = tuple[tuple[Atom, ...], ...]


def size_of(dim: Iterable[Atom]) -> int:
    """Number of coordinates of a dimension."""
    return prod(atom.size for atom in dim)


@dataclass(frozen=True)
class Axes:
    """What a region, from its entry to one value, does to each axis.

    Attributes:
        dims: the atoms of each dimension of the value.
        gone: entry digits consumed on the way.
        shifted: whether the value at zero input may be other than zero.
        scaled: whether the linear part may be other than a pure carry along shared and varied atoms.
        pinned: whether the region runs at its real sizes only (sizes baked into views or constants).
        symbols: primes that stand for symbolic sizes; atoms with such a factor can only be shared.
        causes: why axes lost their structure on the way, as (code, reason), for refusals.
    """

    dims: Dims
    gone: tuple[Atom, ...] = ()
    shifted: bool = False
    scaled: bool = False
    pinned: bool = False
    symbols: tuple[int, ...] = ()
    causes: tuple[tuple[str, str], ...] = ()

    @classmethod
    def entry(cls, shape: Sequence[int], symbols: Sequence[int]) -> Axes:
        """The axes of a region's entry: every axis one shared digit."""
        dims = tuple((Atom(size, axis),) if size != 1 else () for axis, size in enumerate(shape))
        return cls(dims, symbols=tuple(symbols))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, symbols as primes."""
        return tuple(size_of(dim) for dim in self.dims)

    def atoms(self) -> list[Atom]:
        """All atoms, in order of the dimensions."""
        return [atom for dim in self.dims for atom in dim]

    def symbolic(self, atom: Atom) -> bool:
        """Whether the atom's size has a symbolic factor."""
        return any(atom.size % prime == 0 for prime in self.symbols)

    # -- what rules do -------------------------------------------------------------------------------

    def with_dims(self, dims: Iterable[tuple[Atom, ...]]) -> Axes:
        """The same with other dimensions."""
        return replace(self, dims=tuple(dims))

    def with_dim(self, index: int, dim: tuple[Atom, ...]) -> Axes:
        """The same with one other dimension."""
        dims = list(self.dims)
        dims[index] = dim
        return replace(self, dims=tuple(dims))

    def consume(self, atoms: Iterable[Atom]) -> Axes:
        """Atoms mixed into features: their entry digits are gone. The dims are the caller's to rewrite.

        Raises:
            NoFold: an atom holds a symbolic size, such as the batch.
        """
        gone = list(self.gone)
        for atom in atoms:
            if atom.fresh or atom.digit().size == 1:
                continue
            if self.symbolic(atom):
                raise NoFold(
                    "batch-mixed", "it mixes values along an axis of symbolic size, such as the batch"
                )
            gone.append(atom.digit())
        return replace(self, gone=tuple(gone))

    def mix(self, index: int, size: int, cause: tuple[str, str]) -> Axes:
        """One dimension turned into `size` fresh features: no structure is known along it from here on."""
        mixed = self.consume(self.dims[index]).with_dim(index, (Atom(size),) if size != 1 else ())
        return replace(mixed, pinned=True, causes=(*self.causes, cause))

    def shuffle(self, index: int, size: int, cause: tuple[str, str]) -> Axes:
        """As `mix`, by an op that some features do not mind: where there are only such, nothing is lost."""
        if all(atom.fresh for atom in self.dims[index]):
            return self.with_dim(index, (Atom(size),) if size != 1 else ())
        return self.mix(index, size, cause)

    def drop(self, index: int) -> Axes:
        """One dimension of size one left out."""
        return self._housed(self.dims[:index] + self.dims[index + 1 :], self.dims[index])

    def _housed(self, dims: Dims, single: Iterable[Atom]) -> Axes:
        """The given dimensions, and single positions of windows that have no dimension of their own.

        They live in the first dimension, which is the batch as a rule and not mixed.
        """
        single = [atom._replace(uneven=False) for atom in single]
        if not single:
            return self.with_dims(dims)
        if not dims:
            return self.consume(single).with_dims(())
        return replace(self.with_dims(((*dims[0], *single), *dims[1:])), pinned=True)

    def vary(self, index: int) -> Axes:
        """Coefficients differ along one dimension; windowed atoms there lose their structure.

        Raises:
            NoFold: the dimension holds a symbolic size.
        """
        axes, dim = self, []
        for atom in self.dims[index]:
            if axes.symbolic(atom):
                raise NoFold("batch-varied", "its coefficients differ along an axis of symbolic size")
            if atom.window is not None and atom.size != 1:
                axes = axes.consume([atom])
                atom = Atom(atom.size)
            elif atom.carried:
                atom = atom._replace(varied=True)
            dim.append(atom)
        return axes.with_dim(index, tuple(dim))

    def shift_along(self, indices: Iterable[int]) -> Axes:
        """The shift may differ along the given dimensions.

        Raises:
            NoFold: such a dimension holds a symbolic size.
        """
        dims = list(self.dims)
        for index in indices:
            if any(self.symbolic(atom) for atom in dims[index]):
                raise NoFold("batch-varied", "it adds a constant that differs along an axis of symbolic size")
            dims[index] = tuple(a._replace(uneven=True) if a.size != 1 else a for a in dims[index])
        return replace(self, dims=tuple(dims), shifted=True)

    def reshape(self, shape: Sequence[int]) -> Axes:
        """The value viewed in another shape: atoms are split and regrouped, major first.

        Where the sizes do not factor, the atoms concerned are mixed.

        Raises:
            NoFold: a symbolic size would have to be mixed, or sizes hold symbols that do not factor alike.
        """
        if size_of(self.atoms()) != prod(shape):
            raise NoFold("dynamic-shape", "symbolic sizes before and after a view cannot be compared")
        axes: Axes = self
        queue = [atom for atom in self.atoms() if atom.size != 1]
        single = [atom for atom in self.atoms() if atom.size == 1 and not atom.fresh]
        dims: list[tuple[Atom, ...]] = []
        position = 0
        while position < len(shape):
            dim: list[Atom] = []
            need = shape[position]
            while need != 1:
                atom = queue.pop(0)
                if need % atom.size == 0:
                    dim.append(atom)
                    need //= atom.size
                elif atom.size % need == 0 and (atom.window is None or not axes.symbolic(atom)):
                    if atom.window is not None:
                        axes, atom = axes.consume([atom]), Atom(atom.size)
                    major, minor = atom.split(need)
                    dim.append(major)
                    queue.insert(0, minor)
                    need = 1
                else:
                    axes, dims_here, queue = axes._scramble([*dim, atom, *queue], shape[position:])
                    dims.extend(dims_here[:-1])
                    position += len(dims_here) - 1
                    dim, need = list(dims_here[-1]), 1
            dims.append(tuple(dim))
            position += 1
        return axes._housed(tuple(dims), single)

    def _scramble(self, queue: list[Atom], shape: Sequence[int]) -> tuple[Axes, Dims, list[Atom]]:
        """Mix the shortest run of atoms that covers whole leading dimensions of `shape`."""
        have, want, taken, dims = 1, 1, 0, 0
        while dims == 0 or have != want:
            if want <= have and dims < len(shape):
                want *= shape[dims]
                dims += 1
            else:
                have *= queue[taken].size
                taken += 1
        axes = self.consume(queue[:taken])
        if any(self.symbolic(atom) for atom in queue[:taken]):
            raise NoFold("batch-mixed", "a view scrambles an axis of symbolic size")
        fresh = tuple((Atom(size),) if size != 1 else () for size in shape[:dims])
        cause = ("scramble", "a view regroups axes whose sizes do not factor")
        return replace(axes, causes=(*axes.causes, cause)), fresh, queue[taken:]

    # -- what forms ask ------------------------------------------------------------------------------

    def entry_digits(self) -> list[Atom]:
        """The digits into which the region divides the entry, in entry order."""
        digits = [atom.digit() for atom in self.atoms() if not atom.fresh] + list(self.gone)
        return sorted(digits, key=lambda atom: (atom.axis, -atom.stride))

    def mixed(self, keep: Iterable[Atom]) -> Axes:
        """Everything but the given atoms mixed into features."""
        kept = set(keep)
        axes = self.consume(atom for atom in self.atoms() if atom not in kept)
        return axes.with_dims(tuple(a if a in kept else Atom(a.size) for a in dim) for dim in self.dims)
