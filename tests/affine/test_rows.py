"""Large Linears are filled some rows at a time: the same weights, each part with a certificate of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery.affine import rows, write

WIDTH, OUT = 6, 10


class Net(nn.Module):
    """Layers as `kind` says, on (batch, tokens, features), between nonlinearities."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.norm = nn.RMSNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, OUT), nn.Linear(WIDTH, OUT, bias=False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, OUT)
        self.wide, self.square = nn.Linear(WIDTH, 4 * OUT), nn.Linear(4 * OUT, OUT)
        self.scale, self.shift = nn.Parameter(torch.rand(OUT) + 0.5), nn.Parameter(torch.randn(1, 1, OUT))
        self.gain = nn.Parameter(torch.rand(1) + 0.5)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        if self.kind == "lora":
            x = self.first(x) + self.up(self.down(x)) * 2.0
        elif self.kind == "norm":
            x = self.first(self.norm(x)) * self.scale
        elif self.kind == "scaled sum":
            x = ((self.first(x) * self.scale - self.second(x)) * self.gain + self.shift) / 3.0
        elif self.kind == "chain":
            x = self.square(self.wide(x)) * self.scale
        elif self.kind == "read twice":  # the first one's features are inputs of the second, too
            x = self.first(x)
            x = x + x.flip(-1) * self.scale
        return torch.tanh(x)


def data() -> Tensor:
    return torch.randn(3, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The parts that are filled from now on."""
    found: list[tuple[int, int]] = []

    def gather(whole: Any, part: rows.Rows, *rest: Any) -> None:
        found.append((part.start, part.stop))
        rows.gather(whole, part, *rest)

    monkeypatch.setattr(write, "gather", gather)
    return found


@pytest.mark.parametrize("kind", ["lora", "norm", "scaled sum", "chain"])
def test_parts_give_the_weights_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Net(kind), data()
    whole = gs.optimize(model, x)
    monkeypatch.setattr(rows, "CHUNK_BYTES", 8 * WIDTH * 4)
    found = counted(monkeypatch)
    result = gs.optimize(model, x)
    assert found == [(0, 4), (4, 8), (8, 10)]
    assert [change.kind for change in result.report.changes] == [c.kind for c in whole.report.changes]
    state = result.module.state_dict()
    for name, wanted in whole.module.state_dict().items():
        # the same products, summed in another order
        torch.testing.assert_close(state[name], wanted, rtol=1e-12, atol=1e-13)
    # float64, where a fold rounds sums of its own
    torch.testing.assert_close(result.module(x), model(x), rtol=1e-10, atol=1e-12)
    assert all(change.residual is not None and change.residual < 1e-12 for change in result.report.changes)


def test_a_low_precision_layer_is_stored_as_the_whole_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Net("lora").to(torch.bfloat16), data().to(torch.bfloat16)
    whole = gs.optimize(model, x)
    monkeypatch.setattr(rows, "CHUNK_BYTES", 8 * WIDTH * 3)
    result = gs.optimize(model, x)
    state = result.module.state_dict()
    assert all(torch.equal(state[name], wanted) for name, wanted in whole.module.state_dict().items())
    assert state["first.weight"].dtype == torch.bfloat16


def test_what_mixes_features_is_filled_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK_BYTES", 1)
    found = counted(monkeypatch)
    model, x = Net("read twice"), data()
    result = gs.optimize(model, x)
    assert not found
    # float64, where a fold rounds sums of its own
    torch.testing.assert_close(result.module(x), model(x), rtol=1e-10, atol=1e-12)


def test_small_layers_are_filled_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    found = counted(monkeypatch)
    assert gs.optimize(Net("lora"), data()).report.changes
    assert not found


def _one_off(fill: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def wrong(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        found = fill(*args)
        if calls == 2:
            found.slots["weight"][1, 1] *= 1.001
        return found

    return wrong


def test_detects_a_wrong_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK_BYTES", 8 * WIDTH * 4)
    monkeypatch.setattr(write, "fill", _one_off(write.fill))
    report = gs.optimize(Net("lora"), data()).report
    assert not report.changes
    assert "certificate" in {refusal.code for refusal in report.refusals}


def test_detects_parts_in_the_wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK_BYTES", 8 * WIDTH * 5)

    def swapped(whole: dict[str, Tensor], part: rows.Rows, *rest: Any) -> None:
        other = rows.Rows(OUT - part.stop, OUT - part.start, part.region, part.form)
        rows.gather(whole, other, *rest)

    monkeypatch.setattr(write, "gather", swapped)
    report = gs.optimize(Net("lora"), data()).report
    assert {failure.code for failure in report.failures} == {"verification"}
    assert not report.changes


@pytest.mark.parametrize("size", [1, 4])
def test_a_constant_that_others_are_computed_of_is_not_cut(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.scale = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.rand(WIDTH) + 0.5)
            self.double().eval()

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(torch.tanh(x) * (self.scale * 2.0)) * self.scale
            return torch.tanh(torch.nn.functional.linear(x, self.layer.weight.t()))

    model, x = Net(), data()
    monkeypatch.setattr(rows, "CHUNK_BYTES", 8 * WIDTH * size)
    result = gs.optimize(model, x, verify="off")
    assert result.report.changes
    assert "internal" not in {refusal.code for refusal in result.report.refusals}
    # float64, where a fold rounds sums of its own
    torch.testing.assert_close(result.module(x), model(x), rtol=1e-10, atol=1e-12)
