"""The two parts of the features that a linear head reads: what reaches its outputs, and what cannot.

With `M = [weight | bias]^T`, of shape (features + 1, outputs), and `f' = [f, 1]`, a head computes `f' M`. The
complete orthonormal factor of `M = Q R` (Golub and Van Loan, "Matrix Computations", section 5.2) splits `f'`
in two: `f' Q[:, :rank]` spans all that the outputs depend on, `f' Q[:, rank:]` is orthogonal to every column
of `M`. Without a bias the constant is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["ORTHONORMAL", "Subspace", "decompose", "off_orthonormal"]

ORTHONORMAL = 1e-12
"""Largest entry that `Q^T Q - I` may have in float64; Householder reflections leave about 1e-15."""


@dataclass(frozen=True)
class Subspace:
    """`M = Q[:, :rank] R`, the orthonormal split of what a head reads.

    Attributes:
        Q: (width, width) float64, orthonormal; the first `rank` columns span the columns of `M`.
        R: (rank, outputs) float64, upper trapezoidal, its diagonal not negative: the factor is unique where
            the columns of `M` are independent.
        singular_values: (min(width, outputs),) float64, those of `M`, descending.
        tolerance: Singular values up to this one count as zero.
        bias: Whether the last coordinate of the width is the constant 1 that the bias stands beside.
    """

    Q: torch.Tensor
    R: torch.Tensor
    singular_values: torch.Tensor
    tolerance: float
    bias: bool

    @property
    def rank(self) -> int:
        """How many dimensions reach the outputs."""
        return int(self.R.shape[0])

    @property
    def width(self) -> int:
        """How many dimensions there are: the features, and the constant where there is a bias."""
        return int(self.Q.shape[0])

    @property
    def features(self) -> int:
        """How many features the head reads."""
        return self.width - int(self.bias)

    @property
    def outputs(self) -> int:
        """How many outputs the head has."""
        return int(self.R.shape[1])

    def __str__(self) -> str:
        wide = f"{self.features} features" + (" and the bias" if self.bias else "")
        return (
            f"rank {self.rank} of {self.width} ({wide}) for {self.outputs} outputs: {self.rank} "
            f"class-specific directions, {self.width - self.rank} residual"
        )

    def coordinates(self, features: torch.Tensor) -> torch.Tensor:
        """The coordinates `f' Q` of features: class-specific ones first, `rank` of them, then residual ones.

        Args:
            features: (..., features) of any float dtype.

        Returns:
            (..., width) float64, of the same norm as `[f, 1]` (as `f` without a bias).
        """
        wide = features.to(torch.float64)
        turn = self.Q.to(wide.device)
        found = wide @ turn[: self.features]
        return found + turn[-1] if self.bias else found


def decompose(weight: torch.Tensor, bias: torch.Tensor | None, *, rtol: float | None = None) -> Subspace:
    """Split what `f weight^T + bias` reads into what reaches the outputs and what cannot.

    The rank is the number of singular values above `rtol` times the largest, by default
    `max(width, outputs) * 2^-52`: the rule of `numpy.linalg.matrix_rank` and of MATLAB's `rank` for float64.
    It asks the stored weights as they are: a product of thin matrices that was rounded to float32 has full
    rank, and its small singular values reach the outputs.

    The plain QR by Householder reflections is taken where it will do. Where columns of `M` depend on each
    other (classes that are tied), the first `rank` columns of its `Q` need not span them: then `Q` is turned
    by the left singular vectors of its triangle, and by a QR again until `R` is trapezoidal.

    Args:
        weight: (outputs, features), float.
        bias: (outputs,), float, or None.
        rtol: What counts as zero, relative to the largest singular value; for a look at what lies close to a
            smaller space. Above the default, `M` and `Q R` differ by up to that much.

    Raises:
        ValueError: Shapes do not fit, a number is not finite, or `rtol` is not within [0, 1).
    """
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = f"{tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}"
        raise ValueError(f"expected a weight (outputs, features) and a bias (outputs,) or None, got {shapes}")
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"expected rtol within [0, 1), got {rtol}")
    columns = [weight] if bias is None else [weight, bias.unsqueeze(1)]
    matrix = torch.cat(columns, 1).detach().to(torch.float64).T
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("the weights hold NaN or infinity, expected finite numbers")
    turn, upper = _complete_qr(matrix)
    # The triangle has the singular values of the matrix, and is smaller; a wide one has a triangle too.
    small = upper if upper.shape[1] == len(upper) else torch.linalg.qr(upper.T, mode="r").R.T
    values = torch.linalg.svdvals(small)
    largest = float(values.max()) if values.numel() else 0.0
    tolerance = (max(matrix.shape) * torch.finfo(torch.float64).eps if rtol is None else rtol) * largest
    rank = int((values > tolerance).sum())
    if rank < len(upper):
        left = torch.linalg.svd(small).U
        again, inner = torch.linalg.qr((left.T @ upper)[:rank])
        inside = turn[:, : len(upper)] @ left
        turn = torch.cat([inside[:, :rank] @ again, inside[:, rank:], turn[:, len(upper) :]], 1)
        upper = inner
    sign = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(matrix)
    turn = torch.cat([turn[:, :rank] * sign, turn[:, rank:]], 1)
    return Subspace(turn, upper * sign.unsqueeze(1), values, tolerance, bias is not None)


def _complete_qr(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q (m, m) and R (min(m, n), n) of a matrix (m, n), float64.

    LAPACK's `orgqr` takes most of the time where m is large (4.6 of 5.6 s for 4097 x 1000). The product of
    the reflections is `I - V T V^T`, with `T^-1` the upper triangle of `V^T V`, its diagonal halved (Joffrain
    and others, "Accumulating Householder transformations, revisited", 2006): three products of matrices.
    """
    packed, tau = torch.geqrf(matrix)
    count = min(matrix.shape)
    vectors = packed[:, :count].tril(-1)
    vectors.diagonal().fill_(1.0)
    vectors = vectors * (tau != 0)  # what needs no reflection has none
    inverse = (vectors.T @ vectors).triu(1)
    inverse.diagonal().copy_(torch.where(tau != 0, 1 / tau.masked_fill(tau == 0, 1.0), 1.0))
    half = torch.linalg.solve_triangular(inverse, vectors.T, upper=True)
    turn = -(vectors @ half)
    turn.diagonal().add_(1.0)
    return turn, packed[:count].triu()


_WHOLE = 1024
"""Up to so many columns every entry of `Q^T Q` is looked at; beyond it takes longer than the QR itself."""
_PROBES = 32


def off_orthonormal(matrix: torch.Tensor) -> float:
    """How far `Q^T Q` is from the identity, computed in float64; infinite where it is not finite.

    Args:
        matrix: (n, n), float.

    Returns:
        The largest entry of `|Q^T Q - I|`. Of more than 1,024 columns the largest norm of a row of it, which
        is no less, by 32 random vectors z: the mean square of an entry of `(Q^T Q - I) z` is the square of
        that row's norm. It comes out below half of the norm with a probability of 1e-5.
    """
    wide = matrix.detach().to(torch.float64)
    if len(wide) <= _WHOLE:
        found = (wide.T @ wide - torch.eye(len(wide), dtype=torch.float64, device=wide.device)).abs()
        off = found.max()
    else:
        probes = torch.randn(len(wide), _PROBES, generator=torch.Generator().manual_seed(0)).to(wide)
        off = (wide.T @ (wide @ probes) - probes).square().mean(1).sqrt().max()
    return float(off) if bool(torch.isfinite(off)) else float("inf")
