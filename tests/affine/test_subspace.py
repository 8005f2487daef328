"""The split of what a head reads: orthonormal, complete, of the right rank, whatever the weights are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from graphsurgery.affine.subspace import ORTHONORMAL, decompose, off_orthonormal


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tied(outputs: int, features: int) -> Tensor:
    """Weights whose second and third class are the first: a plain QR starts with dependent columns."""
    weight = random(outputs, features)
    weight[1], weight[2] = weight[0], 2 * weight[0]
    return weight


def product(outputs: int, features: int, rank: int) -> Tensor:
    return random(outputs, rank) @ random(rank, features, seed=1)


HEADS = {
    "wide": (random(5, 20), 5),
    "one-class": (random(1, 20), 1),
    "more-classes": (random(30, 20), 20),
    "tied": (tied(5, 20), 3),
    "tied-more-classes": (tied(30, 20), 20),
    "thin-product": (product(12, 20, 4), 4),
    "thin-product-more-classes": (product(40, 20, 4), 4),
    "a-zero-class": (random(5, 20) * torch.tensor([[0.0], [1], [1], [1], [1]], dtype=torch.float64), 4),
    "large": (random(5, 20) * 1e12, 5),
    "small": (random(5, 20) * 1e-12, 5),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", HEADS)
def test_splits(name: str, bias: bool) -> None:
    weight, rank = HEADS[name]
    scale = weight.abs().max()
    shift = None
    if bias:  # within the span where the rank is to stay; of its own in the others
        full = rank < min(weight.shape)
        shift = weight @ random(weight.shape[1], seed=3) if full else random(len(weight), seed=2) * scale
    found = decompose(weight, shift)
    width = weight.shape[1] + bias
    expected = rank if rank < min(weight.shape) else min(width, len(weight))
    assert found.rank == expected
    assert found.Q.shape == (width, width)
    assert found.R.shape == (expected, len(weight))
    assert off_orthonormal(found.Q) <= ORTHONORMAL
    matrix = torch.cat([weight, shift.unsqueeze(1)], 1).T if shift is not None else weight.T
    # float64 products of up to some hundred numbers, whose sums reach some thirty times the scale
    assert torch.allclose(found.Q[:, :expected] @ found.R, matrix, rtol=0, atol=1e-13 * float(scale) * 30)
    # nothing residual reaches the outputs
    assert (found.Q[:, expected:].T @ matrix).abs().sum() <= 1e-11 * float(scale)
    # R is trapezoidal, its diagonal not negative
    below = found.R.tril(-1)
    assert below.abs().max() == 0
    assert (found.R.diagonal() >= 0).all()


def test_is_the_plain_qr_where_that_is_unique() -> None:
    weight = random(5, 20)
    found = decompose(weight, None)
    plain_q, plain_r = np.linalg.qr(weight.T.numpy())
    sign = np.sign(np.diag(plain_r))
    assert np.abs(found.R.numpy() - plain_r * sign[:, None]).max() < 1e-13
    assert np.abs(found.Q[:, :5].numpy() - plain_q * sign).max() < 1e-13


def test_a_plain_qr_would_miss_the_space_of_tied_classes() -> None:
    """The reason for the detour over singular vectors."""
    weight = tied(5, 20)
    plain = torch.linalg.qr(weight.T, mode="complete").Q
    assert (plain[:, 3:].T @ weight.T).abs().max() > 0.1
    found = decompose(weight, None)
    assert found.rank == 3
    assert (found.Q[:, 3:].T @ weight.T).abs().max() < 1e-13


def test_the_rank_is_numpys() -> None:
    for seed in range(20):
        generator = np.random.default_rng(seed)
        outputs, features, rank = generator.integers(1, 30, 3)
        weight = product(int(outputs), int(features), int(rank))
        assert decompose(weight, None).rank == np.linalg.matrix_rank(weight.T.numpy())


def test_a_rounded_product_has_full_rank_unless_asked_otherwise() -> None:
    weight = product(12, 20, 4).float()
    assert decompose(weight, None).rank == 12
    near = decompose(weight, None, rtol=1e-5)
    assert near.rank == 4
    assert near.singular_values[4] <= near.tolerance < near.singular_values[3]
    assert off_orthonormal(near.Q) <= ORTHONORMAL


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_norms_of_the_parts_add_up(bias: bool) -> None:
    found = decompose(random(5, 20), random(5, seed=2) if bias else None)
    features = random(2, 7, 20, seed=4) * 100
    turned = found.coordinates(features)
    norm = features.square().sum(-1) + bias
    parts = turned[..., :5].square().sum(-1) + turned[..., 5:].square().sum(-1)
    assert ((parts - norm).abs() <= 1e-12 * norm).all()
    assert (found.features, found.width, found.outputs, found.bias) == (20, 20 + bias, 5, bias)


def test_zero_weights_have_rank_zero() -> None:
    found = decompose(torch.zeros(3, 4), torch.zeros(3))
    assert found.rank == 0
    assert found.R.shape == (0, 3)
    assert off_orthonormal(found.Q) <= ORTHONORMAL


def test_detects_one_coefficient_that_is_off() -> None:
    q = decompose(random(5, 20), random(5)).Q.clone()
    q[3, 4] *= 1 + 1e-6
    assert off_orthonormal(q) > 100 * ORTHONORMAL
    q[3, 4] = torch.nan
    assert off_orthonormal(q) == float("inf")


@pytest.mark.parametrize(
    ("weight", "bias", "rtol", "said"),
    [
        (torch.ones(3, 4), torch.ones(4), None, r"expected a weight \(outputs, features\)"),
        (torch.ones(3, 4, 1), None, None, r"got \(3, 4, 1\) and None"),
        (torch.full((3, 4), torch.nan), None, None, "NaN or infinity"),
        (torch.ones(3, 4), None, 1.0, "rtol"),
        (torch.ones(3, 4), None, -1e-3, "rtol"),
    ],
)
def test_refuses(weight: Tensor, bias: Tensor | None, rtol: float | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decompose(weight, bias, rtol=rtol)
