"""A picture of a matrix; the only place that imports matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from graphsurgery.errors import RuntimeUnavailableError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_matrix(matrix: torch.Tensor, ax: Axes | None, cells: int) -> Axes:
    """Draw a matrix; see `AffineMatrix.plot`."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise RuntimeUnavailableError(
            "matplotlib draws the matrix and is not installed; run `pip install 'graphsurgery[plot]'`."
        ) from error
    picture = shrunk(matrix, cells)
    if ax is None:
        _, ax = pyplot.subplots()
    rows, columns = matrix.shape
    bound = float(picture.abs().max()) or 1.0
    ax.imshow(
        picture.numpy(),
        cmap="RdBu_r",
        vmin=-bound,
        vmax=bound,
        aspect="auto",
        interpolation="nearest",
        extent=(0, columns, rows, 0),
    )
    ax.set_xlabel(f"{columns:,} inputs")
    ax.set_ylabel(f"{rows:,} outputs")
    return ax


def shrunk(matrix: torch.Tensor, cells: int) -> torch.Tensor:
    """A matrix in at most `cells` rows and columns, each cell the entry of greatest magnitude in it.

    Args:
        matrix: (out, in), dense or `torch.sparse_csr`; a sparse one is not made dense.
        cells: at least 1.

    Returns:
        (min(out, cells), min(in, cells)), dense.

    Raises:
        ValueError: `cells` is less than 1.
    """
    if cells < 1:
        raise ValueError(f"expected at least one cell to draw, got {cells}")
    rows, columns = (min(size, cells) for size in matrix.shape)
    found = matrix.to_sparse().coalesce()
    row, column = found.indices()
    cell = (row * rows // matrix.shape[0]) * columns + column * columns // matrix.shape[1]
    high, low = (
        torch.zeros(rows * columns, dtype=matrix.dtype).scatter_reduce(0, cell, found.values(), how)
        for how in ("amax", "amin")
    )
    return torch.where(high >= -low, high, low).reshape(rows, columns)
