"""Singular values of a matrix, block by block where it falls into blocks."""

from __future__ import annotations

import torch

DEFAULT_LIMIT = 2**29
"""Bytes that the largest block may take as a dense matrix: 8,192 x 8,192."""


def singular_values(matrix: torch.Tensor, limit_bytes: int) -> torch.Tensor:
    """All min(out, in) singular values, greatest first; see `AffineMatrix.singular_values`."""
    count = min(matrix.shape)
    if matrix.layout == torch.strided:
        _require(matrix.shape[0], matrix.shape[1], limit_bytes)
        values = _svd(matrix)
    else:
        values = _of_blocks(matrix, limit_bytes)
    values = values.sort(descending=True).values[:count]
    # Rows and columns without entries belong to no block: their singular values are zero.
    return torch.cat([values, values.new_zeros(count - len(values))])


def _svd(matrices: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(matrices).all()):
        raise ValueError("the matrix holds NaN or infinity and has no singular values")
    values: torch.Tensor = torch.linalg.svdvals(matrices)
    return values.flatten()


def _require(rows: int, columns: int, limit_bytes: int) -> None:
    size = 8 * rows * columns
    if size > limit_bytes:
        raise ValueError(
            f"the largest block of the matrix is {rows:,} x {columns:,}, {size:,} bytes as a dense matrix, "
            f"more than the limit of {limit_bytes:,}; call singular_values(limit_bytes=...) with more, or "
            "take the matrix of a smaller example."
        )


def _of_blocks(matrix: torch.Tensor, limit_bytes: int) -> torch.Tensor:
    found = matrix.to_sparse().coalesce()
    (row, column), value = found.indices(), found.values()
    if not len(value):
        return value
    of_row, of_column = _components(row, column, (matrix.shape[0], matrix.shape[1]))
    entry_block = of_row[row]
    blocks, entry_block = torch.unique(entry_block, return_inverse=True)
    number = torch.full((matrix.shape[0] + 1,), -1)
    number[blocks] = torch.arange(len(blocks))
    (row_at, heights), (column_at, widths) = (
        _places(number[label], len(blocks)) for label in (of_row, of_column)
    )
    shapes, kind = torch.unique(torch.stack([heights, widths], 1), dim=0, return_inverse=True)
    for height, width in shapes.tolist():
        _require(height, width, limit_bytes)
    values = []
    for which, (height, width) in enumerate(shapes.tolist()):
        members = (kind == which).nonzero().flatten()
        many = max(1, limit_bytes // (8 * height * width))
        order = torch.full((len(blocks),), -1)
        order[members] = torch.arange(len(members))
        for start in range(0, len(members), many):
            at = order[entry_block]
            chosen = (at >= start) & (at < start + many)
            dense = value.new_zeros(min(many, len(members) - start), height, width)
            dense[at[chosen] - start, row_at[row[chosen]], column_at[column[chosen]]] = value[chosen]
            values.append(_svd(dense))
    return torch.cat(values)


def _components(
    row: torch.Tensor, column: torch.Tensor, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row and column the least row that entries connect it with; `shape[0]` for lone columns."""
    of_row = torch.arange(shape[0])
    while True:
        of_column = torch.full((shape[1],), shape[0]).scatter_reduce(0, column, of_row[row], "amin")
        spread = of_row.scatter_reduce(0, row, of_column[column], "amin")
        spread = torch.minimum(spread, spread[spread])  # halves the way that a label has to go
        if torch.equal(spread, of_row):
            return of_row, of_column
        of_row = spread


def _places(block: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row (or column) its place within its block, and the size of each block; -1 is no block."""
    inside = block >= 0
    sizes = torch.bincount(block[inside], minlength=count)
    order = torch.where(inside, block, count).argsort(stable=True)
    first = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    place = torch.empty_like(block)
    place[order] = torch.arange(len(block)) - first[torch.where(inside, block, count)[order]]
    return place, sizes
