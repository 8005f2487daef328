"""Rows put together into one matrix, and segments multiplied."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from math import prod
from typing import Literal

import torch

from graphsurgery.matrix.segments import Rows, Segment


def assembled(parts: list[Segment], form: Literal["auto", "dense", "sparse"]) -> torch.Tensor:
    """The product of the matrices of segments.

    Args:
        parts: the segments, first one first.
        form: `"sparse"`, `"dense"`, or `"auto"` for whichever takes less memory.

    Returns:
        (out, in), float64, dense or compressed by rows.
    """
    if len(parts) == 1 and (form == "dense" or (form == "auto" and parts[0].region.tally.heavy)):
        whole = parts[0].whole()
        if whole is not None:
            return whole if form == "dense" else _smaller(whole)
    # From the narrower end, so that what is multiplied stays small.
    backwards = parts[-1].shape[0] <= parts[0].shape[1]
    ordered = parts[::-1] if backwards else parts
    matrix = sparse(ordered[0].rows(), ordered[0].shape)
    for part in ordered[1:]:
        other = sparse(part.rows(), part.shape)
        matrix = _product(matrix, other) if backwards else _product(other, matrix)
    if form == "auto":
        return _smaller(matrix)
    return matrix.to_dense() if form == "dense" else matrix


def _smaller(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix in the layout that takes less memory."""
    dense = matrix.layout == torch.strided
    entries = int(matrix.count_nonzero()) if dense else matrix.values().numel()
    if 12 * entries >= 8 * prod(matrix.shape):  # eight bytes a number, four for its column
        return matrix if dense else matrix.to_dense()
    if not dense:
        return matrix
    row, column = matrix.nonzero().unbind(1)
    counts = torch.bincount(row, minlength=len(matrix))
    return sparse([Rows(counts, column, matrix[row, column])], (len(matrix), matrix.shape[1]))


def sparse(rows: Iterable[Rows], shape: tuple[int, int]) -> torch.Tensor:
    """Rows as one compressed-row tensor of float64, its indices int32 where they fit.

    Args:
        rows: all rows in order.
        shape: of the matrix.
    """
    small = torch.int32 if max(shape) < 2**31 else torch.int64
    counts, columns, values = [], [], []
    for some in rows:
        counts.append(some.counts)
        columns.append(some.columns.to(small))
        values.append(some.values)
    starts = torch.zeros(shape[0] + 1, dtype=torch.int64)
    torch.cumsum(torch.cat(counts), 0, out=starts[1:])
    index = small if int(starts[-1]) < 2**31 else torch.int64
    column = torch.cat(columns).to(index)
    columns.clear()
    value = torch.cat(values)
    values.clear()
    return _compressed(starts.to(index), column, value, shape)


def _compressed(
    starts: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once a process that the layout is in beta
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=True)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product of two compressed-row tensors, without the zeros that sums leave."""
    # By coordinates: the product of compressed rows needs MKL, which not every build of torch has.
    found = torch.sparse.mm(left.to_sparse(), right.to_sparse()).coalesce()
    row, column = found.indices()
    keep = found.values() != 0
    counts = torch.bincount(row[keep], minlength=found.shape[0])
    rows = Rows(counts, column[keep], found.values()[keep])
    return sparse([rows], (found.shape[0], found.shape[1]))
