"""Rows of sparse matrices: put together, looked up, multiplied, in memory proportional to their entries."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

CHUNK = 2**18
"""Entries that are written at once; they take some ten times eight bytes each meanwhile."""

_LEAST_FILL = 2.0**-6  # so that a few empty rows do not make the next chunk too large

DEFAULT_LIMIT = 2**32
"""Bytes that a matrix may take: a dense one of 23,170 x 23,170, or 357 million non-zeros."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a matrix, one after the other.

    Attributes:
        counts: (rows,) int64, entries of each row.
        columns: (entries,) int64, ascending within a row.
        values: (entries,) float64.
    """

    counts: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor


def require(size: int, what: str, limit_bytes: int) -> None:
    """Raise where a matrix would be too large.

    Raises:
        ValueError: `size` is more than the limit.
    """
    if size > limit_bytes:
        raise ValueError(
            f"{what}, more than the limit of {limit_bytes:,} bytes; call affine_matrix(limit_bytes=...) with "
            "more, or take the matrix of a smaller example or of a part by path=."
        )


def sparse(rows: Iterable[Rows], shape: tuple[int, int], limit_bytes: int = DEFAULT_LIMIT) -> torch.Tensor:
    """Rows as one compressed-row tensor of float64, its indices int32 where they fit.

    Args:
        rows: all rows in order.
        shape: of the matrix.
        limit_bytes: what it may take.

    Raises:
        ValueError: it takes more.
    """
    small = torch.int32 if max(shape) < 2**31 else torch.int64
    counts, columns, values, entries = [], [], [], 0
    for some in rows:
        counts.append(some.counts)
        columns.append(some.columns.to(small))
        values.append(some.values)
        entries += len(some.columns)
        require(
            entries * (8 + small.itemsize),
            f"the sparse matrix of {shape[0]:,} x {shape[1]:,} has {entries:,} non-zeros and more",
            limit_bytes,
        )
    starts = torch.zeros(shape[0] + 1, dtype=torch.int64)
    if counts:
        torch.cumsum(torch.cat(counts), 0, out=starts[1:])
    index = small if entries < 2**31 else torch.int64
    column = _joined(columns, index)
    return compressed(starts.to(index), column, _joined(values, torch.float64), shape)


def _joined(parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Parts one after the other, each let go as it is copied."""
    whole = torch.empty(sum(len(part) for part in parts), dtype=dtype)
    at = 0
    for i, part in enumerate(parts):
        whole[at : at + len(part)] = part
        at += len(part)
        parts[i] = whole[:0]
    return whole


def compressed(
    starts: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    """A compressed-row tensor, its indices checked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once a process that the layout is in beta
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=True)


def gathered(matrix: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The entries of some rows of a compressed-row matrix.

    Args:
        matrix: the matrix.
        rows: (n,) int64, which of its rows, each as often as it is named.

    Returns:
        For each entry which of `rows` it belongs to, its column (int64), and its value.
    """
    starts = matrix.crow_indices().to(torch.int64)
    counts = starts[rows + 1] - starts[rows]
    owner = torch.repeat_interleave(torch.arange(len(rows)), counts)
    within = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    entry = starts[rows][owner] + within
    return owner, matrix.col_indices()[entry].to(torch.int64), matrix.values()[entry]


def product(left: torch.Tensor, right: torch.Tensor, limit_bytes: int = DEFAULT_LIMIT) -> torch.Tensor:
    """The product of two compressed-row matrices, without the zeros that sums leave.

    Some rows of the left one at a time: what torch makes of a whole product takes six times its memory.

    Args:
        left: (m, k), float64.
        right: (k, n), float64.
        limit_bytes: what the product may take.

    Raises:
        ValueError: it takes more.
    """
    shape = (left.shape[0], right.shape[1])
    return sparse(_products(left, right, shape), shape, limit_bytes)


def _products(left: torch.Tensor, right: torch.Tensor, shape: tuple[int, int]) -> Iterator[Rows]:
    counts = left.crow_indices().diff().to(torch.int64)
    lengths = right.crow_indices().diff().to(torch.int64)
    # How many products each row sums up: its entries are no more than that, nor than there are columns.
    met = torch.zeros(shape[0], dtype=torch.int64)
    for start, stop in chunks(counts):
        line, column, _ = gathered(left, torch.arange(start, stop))
        met[start:stop].index_add_(0, line, lengths[column])
    ends, start, fill = met.clamp(max=shape[1]).cumsum(0), 0, 1.0
    while start < shape[0]:
        before = int(ends[start - 1]) if start else 0
        stop = _until(ends, start, before + int(CHUNK / fill))
        line, column, value = gathered(left, torch.arange(start, stop))
        # The rows that are named, and no more: torch reads all of its right side for each product.
        named, place = torch.unique(column, return_inverse=True)
        # By coordinates: the product of compressed rows needs MKL, which not every build of torch has.
        part = _by_coordinates(line, place, value, (stop - start, len(named)))
        found = torch.sparse.mm(part, _by_coordinates(*gathered(right, named), (len(named), shape[1])))
        found = found.coalesce()
        row, column = found.indices()
        keep = found.values() != 0
        yield Rows(torch.bincount(row[keep], minlength=stop - start), column[keep], found.values()[keep])
        # Windows that overlap make far fewer entries than products: go by what was found.
        fill = max(len(keep) / max(1, int(ends[stop - 1]) - before), fill / 4, _LEAST_FILL)
        start = stop


def _by_coordinates(
    row: torch.Tensor, column: torch.Tensor, value: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    index = torch.stack([row, column])
    return torch.sparse_coo_tensor(index, value, shape, is_coalesced=True, check_invariants=False)


def chunks(entries: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Runs of rows that hold about `CHUNK` entries together, at least one row each."""
    ends, start = entries.cumsum(0), 0
    while start < len(entries):
        stop = _until(ends, start, (int(ends[start - 1]) if start else 0) + CHUNK)
        yield start, stop
        start = stop


def _until(ends: torch.Tensor, start: int, most: int) -> int:
    """The row behind those that end by a number of entries; one row at least."""
    return min(len(ends), max(start + 1, int(torch.searchsorted(ends, most, right=True))))
