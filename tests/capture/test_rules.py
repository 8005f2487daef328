"""Sizes of one captured graph: which depend on each other, and which of them the graph was made for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import graphsurgery as gs
from graphsurgery.graph import capture_info
from graphsurgery.verify.inputs import as_inputs, battery

DYNAMIC = Dim.DYNAMIC


def _derived(kind: str) -> tuple[Any, Any, Any]:
    n = Dim("n")
    a, b = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    m = torch.randn(3, 3, dtype=torch.float64)
    return {
        "concatenated": (lambda a, b: torch.cat([b, b]) + a, (a, b), ({0: 2 * n}, {0: n})),
        "sums": (lambda b, a: b.sum() + a.sum(), (b, a), ({0: n}, {0: 2 * n})),
        "one more": (lambda a, b: a[1:] + b, (a[:4], b), ({0: n + 1}, {0: n})),
        "square": (lambda b, m: m @ b, (b, m), ({0: n}, {0: n, 1: n})),
        "second axis": (lambda b, m: m @ b, (b, m[:2]), ({0: n}, {1: n})),
        "fixed beside it": (lambda b, m: b + m.sum(), (b, m), ({0: n}, None)),
        "other size": (lambda b, m: b + m.sum(), (b, m), ({0: n}, {0: Dim("k")})),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["concatenated", "sums", "one more", "square", "second axis", "fixed beside it", "other size"],
)
def test_verification_keeps_sizes_that_depend_on_the_batch_together(kind: str) -> None:
    torch.manual_seed(0)
    function, inputs, shapes = _derived(kind)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = function(first, second)
            return self.linear(result.expand(2, 4)) if result.dim() == 0 else self.linear(result)

    model = Two().double().eval()
    result = gs.optimize(model, inputs, dynamic_shapes=shapes)
    verdict = result.report.verification
    assert verdict is not None
    assert verdict.ok
    info = capture_info(result.module)
    runs = battery(
        as_inputs(inputs),
        dynamic_batch=info.dynamic_batch,
        refused=info.refused_batches,
        axes=info.batch_axes,
    )
    shapes_run = {tuple(tensor.shape for tensor in run.inputs.tensors()) for run in runs}
    assert len(shapes_run) > 1  # another batch than the example's is among them
    for run in runs:
        torch.testing.assert_close(result.module(*run.inputs.args), model(*run.inputs.args))
