"""Stretches under `no_grad` and an autocast that is off are captured as the calls that they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graphsurgery as gs
from graphsurgery.capture import capture
from graphsurgery.cost import op_name
from graphsurgery.errors import CaptureError


class Modes(nn.Module):
    """Nested, repeated, with several results, constants inside, and a stretch of which nothing is read."""

    def __init__(self, enabled: bool = False) -> None:
        super().__init__()
        self.enabled = enabled
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)
        self.scale = torch.tensor([1.0, -2.0, 0.5, 3.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            y = self.first(x)
            with torch.no_grad():
                z = self.second(y) * self.scale
                y = y.relu()
        with torch.set_grad_enabled(False):
            unread = y + 1.0
            z = z + y.sum(1, keepdim=True)
        del unread
        return z


def test_bodies_are_put_in_their_place() -> None:
    model = Modes().eval().double()
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gm = capture(model, x)
    assert gm.meta["graphsurgery"].dynamic_batch
    found = [op_name(node) for node in gm.graph.nodes if node.op == "call_function"]
    assert sorted(found) == ["add", "linear", "linear", "mul", "relu", "sum"]
    assert [name for name, part in gm.named_children() if isinstance(part, torch.fx.GraphModule)] == []
    for rows in (1, 3, 5):
        y = torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
        assert torch.equal(gm(y), model(y))


def test_folds_across_the_edge_of_a_body(tmp_path: Path) -> None:
    result = gs.optimize(Modes().eval(), torch.randn(2, 4))
    assert [change.kind for change in result.report.changes] == ["linear+mul"]
    exported = result.export_onnx(tmp_path / "m.onnx")
    assert exported.verdict is not None
    assert exported.verdict.ok


def test_exported_programs_too() -> None:
    model, x = Modes().eval(), torch.randn(2, 4)
    program = torch.export.export(model, (x,))
    assert any("wrap_with" in str(node.target) for node in program.graph.nodes), "there is no body"
    assert torch.equal(capture(program)(x), model(x))
    assert any("wrap_with" in str(node.target) for node in program.graph.nodes), "the caller's was changed"


def test_an_autocast_that_is_on_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"wrap_with_autocast.*an operator with a body"):
        capture(Modes(enabled=True).eval(), torch.randn(2, 4))
