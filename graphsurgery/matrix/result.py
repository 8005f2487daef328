"""What `affine_matrix` gives back: the matrix, the bias, and what can be asked of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Literal

import torch

from graphsurgery.matrix.plot import draw_matrix
from graphsurgery.matrix.spectrum import DEFAULT_LIMIT, singular_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class AffineMatrix:
    """An affine map of samples: `y = matrix @ x + bias`, `x` and `y` flattened in the order of their axes.

    Attributes:
        matrix: (out, in), float64, an ordinary tensor or `torch.sparse_csr`.
        bias: (out,), float64.
        input_shape: shape of `x` before it is flattened, without the batch; (C,) for `"channels"`.
        output_shape: the same of `y`; (F,) for `"channels"`.
        form: `"dense"`, `"sparse"`, or `"channels"`: the matrix is applied at every position alike.
        axes: for `"channels"` the axes of the channels in the stretch's input and output, the batch being
            axis 0; else None.
        residual: the certificate, the largest relative deviation from the stretch in float64.
    """

    matrix: torch.Tensor
    bias: torch.Tensor
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    form: Literal["dense", "sparse", "channels"]
    axes: tuple[int, int] | None = None
    residual: float = float("nan")

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """`A x + b` for a batch.

        Args:
            x: (batch, *input_shape); for `"channels"` any shape with the channels at `axes[0]`. Any
                floating-point dtype; float64 is computed with.

        Returns:
            (batch, *output_shape), float64; for `"channels"` the shape of `x`, the channels at `axes[1]`.

        Raises:
            ValueError: the shape is another one.
        """
        x = x.to(torch.float64)
        if self.axes is not None:
            into, out = self.axes
            if x.dim() <= into or x.shape[into] != self.input_shape[0]:
                raise ValueError(
                    f"expected {self.input_shape[0]} channels at axis {into}, got the shape {tuple(x.shape)}"
                )
            return (x.movedim(into, -1) @ self.matrix.T + self.bias).movedim(-1, out)
        if tuple(x.shape[1:]) != self.input_shape:
            raise ValueError(f"expected (batch, *{self.input_shape}), got the shape {tuple(x.shape)}")
        y = self.matrix @ x.reshape(len(x), prod(self.input_shape)).T
        return (y.T + self.bias).reshape(len(x), *self.output_shape)

    @cached_property
    def nonzeros(self) -> int:
        """How many entries of the matrix are not zero."""
        values = self.matrix if self.matrix.layout == torch.strided else self.matrix.values()
        return int(values.count_nonzero())

    @property
    def density(self) -> float:
        """The share of entries that are not zero."""
        return self.nonzeros / max(1, prod(self.matrix.shape))

    @property
    def sparsity(self) -> float:
        """The share of entries that are zero."""
        return 1 - self.density

    @property
    def size_bytes(self) -> int:
        """Bytes that the matrix takes: its numbers, and the indices of a sparse one."""
        parts = [self.matrix]
        if self.matrix.layout != torch.strided:
            parts = [self.matrix.values(), self.matrix.crow_indices(), self.matrix.col_indices()]
        return sum(part.numel() * part.element_size() for part in parts)

    def singular_values(self, limit_bytes: int = DEFAULT_LIMIT) -> torch.Tensor:
        """All min(out, in) singular values, greatest first, float64.

        A sparse matrix is taken apart into blocks that share no row and no column (a 1x1 convolution has one
        for each position, a depthwise one for each channel), which are made dense one by one.

        Args:
            limit_bytes: what the largest block may take as a dense matrix.

        Raises:
            ValueError: the largest block takes more, or a number is not finite.
        """
        return singular_values(self.matrix, limit_bytes)

    @cached_property
    def _spectrum(self) -> torch.Tensor:
        return self.singular_values()

    @property
    def rank(self) -> int:
        """The numerical rank: singular values above `max(out, in) * eps` of the greatest, eps of float64.

        Raises:
            ValueError: as `singular_values`.
        """
        values = self._spectrum
        if not len(values):
            return 0
        floor = max(self.matrix.shape) * torch.finfo(torch.float64).eps * float(values[0])
        return int((values > floor).sum())

    @property
    def condition_number(self) -> float:
        """The greatest singular value over the least of all min(out, in); infinite below full rank.

        Raises:
            ValueError: as `singular_values`.
        """
        values = self._spectrum
        full = len(values) > 0 and self.rank == len(values)
        return float(values[0] / values[-1]) if full else float("inf")

    def plot(self, ax: Axes | None = None, cells: int = 400) -> Axes:
        """Draw the matrix, red for positive entries, blue for negative ones.

        Needs matplotlib: `pip install 'graphsurgery[plot]'`.

        Args:
            ax: where to draw; by default a new figure.
            cells: rows and columns that are drawn at most; of a larger matrix each cell shows the entry that
                is largest in it.

        Returns:
            The matplotlib axes.

        Raises:
            RuntimeUnavailableError: matplotlib is not installed.
        """
        return draw_matrix(self.matrix, ax, cells)

    def __repr__(self) -> str:
        """Shapes and density; not the numbers."""
        out, into = self.matrix.shape
        return (
            f"AffineMatrix({out} x {into}, {self.form}, {self.nonzeros:,} non-zeros ({self.density:.3%}), "
            f"{self.input_shape} -> {self.output_shape}, residual {self.residual:.1e})"
        )
