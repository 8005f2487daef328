"""The matrix of a stretch from those of its parts, in the layout that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch

from graphsurgery.matrix.branches import Branches, chained
from graphsurgery.matrix.rows import Rows, require, sparse
from graphsurgery.matrix.segments import Segment


def assembled(
    parts: Sequence[Segment | Branches], form: Literal["auto", "dense", "sparse"], limit_bytes: int
) -> torch.Tensor:
    """The product of the matrices of parts.

    Args:
        parts: first one first.
        form: `"sparse"`, `"dense"`, or `"auto"` for whichever takes less memory.
        limit_bytes: what the matrix may take.

    Returns:
        (out, in), float64, dense or compressed by rows.

    Raises:
        ValueError: it takes more than the limit.
    """
    shape = (parts[-1].shape[0], parts[0].shape[1])
    dense = 8 * prod(shape)
    if form == "dense":
        require(dense, f"the dense matrix of {shape[0]:,} x {shape[1]:,} takes {dense:,} bytes", limit_bytes)
    (only,) = parts if len(parts) == 1 else (None,)
    if isinstance(only, Segment) and dense <= limit_bytes and form != "sparse":
        whole = only.whole() if form == "dense" or only.region.tally.heavy else None
        if whole is not None:
            return whole if form == "dense" else _smaller(whole)
    matrix = chained(parts, limit_bytes)
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
