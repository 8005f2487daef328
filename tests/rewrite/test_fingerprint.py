"""Fingerprints see every byte, whatever the dtype and layout."""

from __future__ import annotations

import pytest
import torch

import graphsurgery as gs
from graphsurgery.graph import structural_hash, tensor_bytes
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


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool], ids=str)
@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_single_element_may_have_any_stride(dtype: torch.dtype, step: int) -> None:
    row = (torch.arange(9) % 2).to(dtype)
    one, scalar = row[1:2:step].as_strided((1,), (step,), 1), row[1]
    for tensor in (one, scalar, row[1:4:step][:1], torch.empty(0, dtype=dtype), row[::step]):
        assert same_bits(tensor, tensor.clone())
        assert tensor_digest(tensor) == tensor_digest(tensor.clone())
    assert tensor_bytes(one).tolist() == tensor_bytes(scalar).tolist()
    assert tensor_bytes(row).numel() == 9 * row.element_size()
    assert not same_bits(one, torch.zeros(1, dtype=dtype))


def test_conjugate_sparse_and_meta_tensors_have_digests() -> None:
    z = torch.tensor([1 + 2j, 3 - 1j])
    assert same_bits(z.conj(), z.conj().clone())
    assert tensor_digest(z.conj()) != tensor_digest(z)
    assert tensor_digest(torch.eye(3).to_sparse()) != tensor_digest(2 * torch.eye(3).to_sparse())
    assert tensor_digest(torch.empty(3, device="meta")) != tensor_digest(torch.empty(4, device="meta"))


def test_a_model_with_an_oddly_strided_buffer_goes_all_the_way() -> None:
    class Shift(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.arange(1.0, 5.0)[::4])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + self.shift)

    model = Shift().eval()
    assert model.shift.stride() == (4,)
    result = gs.optimize(model, torch.randn(2, 3))
    assert not result.report.failures
    assert len(structural_hash(result.graph_module)) == 64
