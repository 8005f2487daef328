"""A layer is a matrix: 1x1 convolutions as a product over channels, k x k convolutions as a sparse one.

1. A 1x1 convolution C -> F on an H x W map is the product (H W, C) x (C, F).
2. So two of them with nothing between them are one, with equal channel counts for half the price.
3. A k x k convolution of the flattened map is the product with a doubly block-Toeplitz matrix, mostly zeros.
4. Layers in a row are the product of their matrices, borders included.

Ends with an error when a product differs from the network, or a network from its folded form.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import graphsurgery as gs

LIMIT = 1e-12  # relative, in float64


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors of one shape, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def pointwise() -> float:
    conv = nn.Conv2d(64, 128, 1).double()
    x = torch.randn(4, 64, 32, 32, dtype=torch.float64)
    found = gs.affine_matrix(conv, x, form="channels")
    rows = x.movedim(1, -1).reshape(-1, 64)  # (H W, C) of each sample, one below the other
    product = rows @ found.matrix.T + found.bias
    print(f"1x1 convolution: {tuple(rows.shape)} x {tuple(found.matrix.T.shape)} = {tuple(product.shape)}")
    print(f"  rank {found.rank}, condition number {found.condition_number:.1f}")
    return difference(product.reshape(4, 32, 32, 128).movedim(-1, 1), conv(x))


@torch.no_grad()
def equal_channels() -> float:
    model = nn.Sequential(
        nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1)
    ).double()
    x = torch.randn(4, 64, 16, 16, dtype=torch.float64)
    first, second = (gs.affine_matrix(model, x, path=path, form="channels") for path in ("0", "1"))
    both = gs.affine_matrix(model, x, path=("0", "1"), form="channels")
    result = gs.optimize(model, x)
    convs, left = ([m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (model, result.module))
    print(f"equal channels, nothing between the first two: {len(convs)} -> {len(left)} 1x1 convolutions")
    print(f"  {result.report.before.macs:,} -> {result.report.after.macs:,} multiplications")
    if len(left) != 2:
        raise SystemExit(f"expected the two convolutions before the ReLU folded into one, got {left}")
    return max(
        difference(second.matrix @ first.matrix, both.matrix),
        difference(left[0].weight.flatten(1), both.matrix),
        difference(result.module(x), model(x)),
    )


@torch.no_grad()
def windows() -> float:
    conv = nn.Conv2d(3, 8, 3, padding=1).double()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    found = gs.affine_matrix(conv, x, form="sparse")
    out, into = found.matrix.shape
    print(f"3x3 convolution of a 64 x 64 map: a {out} x {into} matrix, {found.nonzeros:,} of its entries")
    print(f"  not zero ({found.density:.2%}): {found.size_bytes:,} bytes; dense it takes {8 * out * into:,}")
    product = (found.matrix @ x.flatten(1).T).T + found.bias
    return difference(product, conv(x).flatten(1))


@torch.no_grad()
def stretch() -> float:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1), nn.ReLU()
    )
    model = model.double().eval()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    gm = gs.capture(model, x)
    first, last, both = (gs.affine_matrix(gm, path=path) for path in (("0", "1"), "2", ("0", "2")))
    print(f"two padded convolutions: {last!r}\n  times {first!r}\n  is {both!r}")
    product = (both.matrix @ x.flatten(1).T).T + both.bias
    try:
        gs.affine_matrix(gm)
    except gs.NotAffineError as refusal:
        print(f"  with the ReLU: {refusal.code}: {refusal}")
    else:
        raise SystemExit("a ReLU is not affine, but got a matrix")
    step = last.matrix.to_dense() @ first.matrix.to_dense()
    return max(difference(both.matrix.to_dense(), step), difference(product, model[:3](x).flatten(1)))


def main() -> int:
    torch.manual_seed(0)
    worst = 0.0
    for part in (pointwise, equal_channels, windows, stretch):
        found = part()
        worst = max(worst, found)
        print(f"  largest relative difference {found:.1e}")
    print("all equal" if worst <= LIMIT else f"expected at most {LIMIT:.0e}, got {worst:.1e}")
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
