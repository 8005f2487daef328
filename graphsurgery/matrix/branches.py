"""Branches of a stretch: where several paths meet, the matrix is put together from theirs.

`A = sum of S_i A_i` over the operands of the sum or concatenation in which they meet: `A_i` is the matrix of
the path to operand i, and row r of `S_i` holds one number, in the column of the element that output r takes
from the operand. So nothing is dense that was sparse, whatever the paths do to the axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import fx

from graphsurgery.affine.region import Scope
from graphsurgery.affine.runner import call, linear_part
from graphsurgery.matrix.repeated import values_read
from graphsurgery.matrix.rows import Rows, chunks, gathered, product, sparse

MEETING = frozenset({"add", "sub", "rsub", "cat", "concat", "concatenate", "stack"})
"""Ops that are linear in all their tensors together, each output taking one element of each at most."""

_SAME = 1e-12  # relative, in float64: products and sums of a few numbers


@dataclass(frozen=True)
class Selection:
    """A matrix with at most one number in a row.

    Attributes:
        columns: (rows,) int64, -1 where the row is empty.
        factors: (rows,) float64.
        width: number of columns.
    """

    columns: torch.Tensor
    factors: torch.Tensor
    width: int

    def rows(self) -> Rows:
        """Its entries."""
        inside = self.columns >= 0
        return Rows(inside.to(torch.int64), self.columns[inside], self.factors[inside])


class Part(Protocol):
    """A matrix that is made when it is asked for."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    def matrix(self, limit_bytes: int) -> torch.Tensor:
        """The matrix by compressed rows, float64; ValueError where it takes more than the limit."""


@dataclass(frozen=True)
class Branches:
    """Paths from one value that meet in a sum or a concatenation, as one matrix.

    Attributes:
        shape: rows and columns.
        paths: what each element of the meeting takes from a path, and the parts of the path, first one first.
            Values that do not depend on the first value are none.
    """

    shape: tuple[int, int]
    paths: Sequence[tuple[Selection, Sequence[Part]]]

    def matrix(self, limit_bytes: int) -> torch.Tensor:
        """See `Part`."""
        parts = [(take, chained(path, limit_bytes)) for take, path in self.paths]
        return sparse(combined(parts, self.shape), self.shape, limit_bytes)


def chained(parts: Sequence[Part], limit_bytes: int) -> torch.Tensor:
    """The product of the matrices of parts, by compressed rows.

    Args:
        parts: first one first.
        limit_bytes: what the product, and each step towards it, may take.

    Raises:
        ValueError: it takes more.
    """
    # From the narrower end, so that what is multiplied stays small.
    backwards = parts[-1].shape[0] <= parts[0].shape[1]
    ordered = parts[::-1] if backwards else parts
    matrix = ordered[0].matrix(limit_bytes)
    for part in ordered[1:]:
        other = part.matrix(limit_bytes)
        matrix = product(matrix, other, limit_bytes) if backwards else product(other, matrix, limit_bytes)
    return matrix


def selection(linear: Callable[[torch.Tensor], torch.Tensor], width: int) -> Selection | None:
    """A linear function as a selection, if it is one: seen with ones, positions and random numbers.

    A function that adds up elements gives itself away by the random numbers, with probability 1.

    Args:
        linear: from (width,) to (rows,), float64.
        width: of its argument.
    """
    factors = linear(torch.ones(width, dtype=torch.float64))
    positions = linear(torch.arange(1, width + 1, dtype=torch.float64))
    random = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    empty = factors == 0
    columns = (positions / factors.masked_fill(empty, 1.0)).round().to(torch.int64) - 1
    if not bool(((columns >= 0) & (columns < width) | empty).all()):
        return None
    columns = columns.masked_fill(empty, -1)
    wanted = random[columns.clamp(min=0)] * factors
    if not bool(((linear(random) - wanted).abs() <= _SAME * factors.abs()).all()):
        return None
    return Selection(columns, factors, width)


def taken(scope: Scope, node: fx.Node, which: fx.Node) -> Selection | None:
    """What a call in which branches meet takes from one of its operands, a sample at a time."""
    shapes = {o: [scope.actual(n, 1) for n in scope.shape(o)] for o in values_read(node, scope.constant)}

    def linear(x: torch.Tensor) -> torch.Tensor:
        def operand(value: fx.Node) -> torch.Tensor:
            if value is which:
                return x.reshape(shapes[which])
            shape = shapes.get(value) or [scope.actual(n, 1) for n in scope.shape(value)]
            return torch.zeros(shape, dtype=torch.float64)

        found: torch.Tensor = call(node, operand)
        return found.reshape(-1)

    return selection(linear, prod(shapes[which]))


def carried(run: Callable[[torch.Tensor], torch.Tensor], shape: list[int]) -> Selection | None:
    """Calls that move and scale elements, as a selection; None where they add some up.

    Args:
        run: the calls in float64, from a value of the given shape.
        shape: of the entry, for one sample.
    """
    return selection(lambda x: linear_part(run, x.reshape(shape)).reshape(-1), prod(shape))


def combined(parts: list[tuple[Selection, torch.Tensor]], shape: tuple[int, int]) -> Iterator[Rows]:
    """The rows of the sum of selections times matrices, some at a time, entries of one column added up.

    Args:
        parts: each selection with the compressed-row matrix that it takes rows of.
        shape: of the sum.
    """
    lengths = [matrix.crow_indices().diff().to(torch.int64) for _, matrix in parts]
    each = torch.zeros(shape[0], dtype=torch.int64)
    for (take, _), length in zip(parts, lengths, strict=True):
        each += length[take.columns.clamp(min=0)] * (take.columns >= 0)
    for start, stop in chunks(each):
        owners, columns, values = [], [], []
        for take, matrix in parts:
            column, factor = take.columns[start:stop], take.factors[start:stop]
            at = (column >= 0).nonzero().flatten()
            within, found, value = gathered(matrix, column[at])
            owners.append(at[within])
            columns.append(found)
            values.append(value * factor[at][within])
        key = torch.cat(owners) * shape[1] + torch.cat(columns)
        key, order = key.sort()
        value = torch.cat(values)[order]
        key, group = torch.unique_consecutive(key, return_inverse=True)
        value = torch.zeros(len(key), dtype=torch.float64).index_add_(0, group, value)
        keep = value != 0
        key, value = key[keep], value[keep]
        yield Rows(torch.bincount(key // shape[1], minlength=stop - start), key % shape[1], value)
