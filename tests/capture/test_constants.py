"""Choices that hang on constants alone are made while a model is traced; those on data are refused."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses import fake_tensor

import graphsurgery as gs
from graphsurgery.capture import capture
from graphsurgery.errors import CaptureError


def test_the_normalisation_of_torchvision_is_folded() -> None:
    torch.manual_seed(0)
    normalise = torchvision.transforms.Normalize([0.1, 0.2, 0.3], [0.2, 0.3, 0.4])
    model = nn.Sequential(normalise, nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    before = fake_tensor.CONSTANT_NUMEL_LIMIT
    result = gs.optimize(model, torch.randn(2, 3, 8, 9))
    assert before == fake_tensor.CONSTANT_NUMEL_LIMIT
    calls = [node for node in result.graph_module.graph.nodes if node.op == "call_function"]
    assert len(calls) == 2  # convolution and ReLU
    picture = torch.randn(3, 3, 8, 9, dtype=torch.float64)
    # What was folded is stored in float32: some units in its last place beside values of about ten.
    torch.testing.assert_close(result.module.double()(picture), model.double()(picture), rtol=0, atol=1e-5)


class ByValue(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.tensor([1.0, 2.0, 3.0])
        weights[1] = 5.0  # what is written into a constant counts
        if weights.sum() > 8:
            return x * weights
        return x - weights


def test_a_constant_that_was_written_into_has_its_new_value() -> None:
    graph = capture(ByValue(), torch.randn(2, 3))
    x = torch.randn(2, 3)
    assert torch.equal(graph(x), ByValue()(x))


class ByData(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.tensor([1.0, 2.0, 3.0]) + x
        return both if both.sum() > 0 else -both


def test_a_choice_on_data_is_refused() -> None:
    with pytest.raises(CaptureError, match="depends on the values"):
        capture(ByData(), torch.randn(2, 3))
