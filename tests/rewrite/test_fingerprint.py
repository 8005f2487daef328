"""Fingerprints see every byte, whatever the dtype and layout."""

from __future__ import annotations

import pytest
import torch

from graphsurgery.rewrite.fingerprint import same_bits, tensor_digest

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.complex64,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 7, 1024, 5003])
def test_one_changed_element_changes_the_digest(dtype: torch.dtype, numel: int) -> None:
    a = (torch.arange(numel) % 97).to(dtype)
    for position in {0, numel // 2, numel - 1}:
        b = a.clone()
        b[position] += 1
        assert tensor_digest(a) != tensor_digest(b)
        assert not same_bits(a, b)
    assert tensor_digest(a) == tensor_digest(a.clone())
    assert same_bits(a, a.clone())


def test_order_shape_dtype_and_sign_of_zero_count() -> None:
    a = torch.arange(6000.0)
    different = [a.flip(0), a.reshape(60, 100), a.double(), torch.cat([-a[:1], a[1:]])]
    assert len({tensor_digest(t) for t in [a, *different]}) == 5
    assert not any(same_bits(a, t) for t in different)


def test_layout_and_offset_do_not_count() -> None:
    a = torch.randn(33, 65, generator=torch.Generator().manual_seed(0))
    shifted = torch.cat([torch.zeros(1), a.flatten()])[1:].reshape(33, 65)
    assert tensor_digest(a) == tensor_digest(a.t().contiguous().t()) == tensor_digest(shifted)
    assert same_bits(a, a.t().contiguous().t())


def test_nan_equals_nan_and_empty_equals_empty() -> None:
    nan = torch.full((3,), torch.nan)
    assert same_bits(nan, nan.clone())
    assert tensor_digest(torch.empty(0)) != tensor_digest(torch.empty(0, 2))
