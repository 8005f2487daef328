"""Large modules are turned layer by layer: the same numbers bit for bit, and the same verdicts."""

from __future__ import annotations

import copy
import threading
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery import sharing
from graphsurgery.errors import VerificationError
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


class Cache(nn.Module):
    """Fills a buffer and reads it in the same call, as decoders with a static cache do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("cache", torch.zeros(4, 8))
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.cache[:2] = self.first(x[:1]).expand(2, 8)
        return self.last(torch.tanh(self.cache.sum(0) + self.first(x)))


def test_what_a_forward_writes_it_reads_in_float64_too(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, call = TorchRunner(Cache().eval()), Inputs((torch.randn(3, 8),))
    wanted = [variant.run(call)["output"] for variant in (runner.float64(), runner.nudged(3, 1.0))]
    monkeypatch.setattr(sharing, "LARGE_BYTES", 0)
    large = TorchRunner(Cache().eval())
    torch.testing.assert_close(large.run(call)["output"], wanted[0].float())
    for variant, value in zip((large.float64(), large.nudged(3, 1.0)), wanted, strict=True):
        assert torch.equal(variant.run(call)["output"], value)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a - 1, (x,)))


def test_a_forward_that_branches_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "LARGE_BYTES", 0)
    model, x = Branches().eval(), torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(model)
    assert gs.verify(model, other, x).ok
    with torch.no_grad():
        other.last.weight[0, 0] *= 1.01
    assert not gs.verify(model, other, x).ok


def test_a_write_from_another_thread_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Threaded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: self.weight.data.add_(1.0))
            thread.start()
            thread.join()
            return super().forward(x)

    monkeypatch.setattr(sharing, "LARGE_BYTES", 0)
    monkeypatch.setattr(sharing, "SMALL_BYTES", 0)
    model = Threaded(3, 3)
    with pytest.raises(VerificationError, match="other than through torch"):
        gs.verify(model, nn.Linear(3, 3), torch.ones(2, 3))
