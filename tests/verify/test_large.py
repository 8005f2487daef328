"""Large modules are turned layer by layer: the same numbers bit for bit, and the same verdicts."""

from __future__ import annotations

import copy
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery import sharing
from graphsurgery.verify import Inputs, TorchRunner


class Net(nn.Module):
    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.cells = nn.LSTM(8, 6, batch_first=True) if recurrent else None
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2) @ self.weight.t()
        y = y[..., :6] if self.cells is None else self.cells(y)[0]
        return self.second(torch.tanh(self.first(y))) * 1.1


def inputs() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("recurrent", [False, True], ids=["tied", "recurrent"])
def test_layer_by_layer_gives_the_same_bits(recurrent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, call = TorchRunner(Net(recurrent).eval()), Inputs((inputs(),))

    def answers() -> list[Tensor]:
        made = (runner.float64(), runner.nudged(3, 1.0), runner.float64_stored(3))
        return [variant.run(call)["output"] for variant in made]

    whole = answers()
    monkeypatch.setattr(sharing, "LARGE_BYTES", 0)
    for wanted, found in zip(whole, answers(), strict=True):
        assert wanted.dtype == found.dtype
        assert torch.equal(wanted, found)
    assert not torch.equal(whole[1], runner.run(call)["output"])  # the weights were moved indeed


def test_all_weights_are_turned_at_once_only_where_a_forward_looks_at_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sharing, "LARGE_BYTES", 0)
    for recurrent in (False, True):
        model = Net(recurrent).eval()
        for program in (model, gs.capture(model, (inputs(),))):
            runner = TorchRunner(program)
            for variant in (runner.float64(), runner.float64_stored(3)):
                whole = Mock(wraps=variant._whole)  # type: ignore[attr-defined]
                variant._whole = whole  # type: ignore[attr-defined]
                variant.run(Inputs((inputs(),)))
                assert whole.called == (recurrent and program is model)


def test_a_wrong_weight_of_a_large_module_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "LARGE_BYTES", 0)
    model = Net(False).eval()
    other = copy.deepcopy(model)
    assert gs.verify(model, other, inputs()).ok
    with torch.no_grad():
        other.weight[0, 0] *= 1.001
    assert not gs.verify(model, other, inputs()).ok
