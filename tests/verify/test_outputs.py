"""Outputs that a comparison could lose: of one name, in one memory, beyond the range of their dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphsurgery import sharing
from graphsurgery.verify import Baseline, Inputs, TorchRunner, verify
from graphsurgery.verify.outputs import Outputs, flatten_outputs


class Returns(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Written(nn.Module):
    """Writes what it computes into a buffer and returns that, or a view of it."""

    out: Tensor

    def __init__(self, function: Callable[[Tensor], Tensor], *, view: bool = False) -> None:
        super().__init__()
        self.function, self.view = function, view
        self.register_buffer("out", torch.zeros(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        self.out.copy_(self.function(x))
        return self.out.view(6, 2) if self.view else self.out


class Alone:
    """A candidate in its own dtype alone, as a file is."""

    name = "candidate"

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        self._runner = TorchRunner(Returns(function))

    def run(self, inputs: Inputs) -> Outputs:
        return self._runner.run(inputs)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("keys", [("a.b", "a"), (1, "1")], ids=str)
def test_outputs_whose_paths_read_alike_are_all_compared(keys: tuple[Any, Any]) -> None:
    def both(scale: float) -> nn.Module:
        def function(x: Tensor) -> Any:
            second = {"b": x + 1} if keys[1] == "a" else x + 1
            return {keys[0]: x * scale, keys[1]: second}

        return Returns(function)

    verdict = verify(both(2.0), both(2.0), numbers(2, 6))
    assert verdict.ok
    assert len(verdict.outputs) == 2
    assert len({output.name for output in verdict.outputs}) == 2
    assert not verify(both(2.0), both(2.1), numbers(2, 6)).ok


def test_a_third_of_one_name_has_a_name_of_its_own() -> None:
    one, two, three, four = (torch.full((1,), float(i)) for i in range(4))
    found = flatten_outputs({"a#2": one, "a": two, "b": {}, 1: three, "1": four})
    assert {name: float(value) for name, value in found.items()} == {"a#2": 0, "a": 1, "1": 2, "1#2": 3}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("view", [False, True])
def test_a_buffer_that_is_returned_keeps_the_values_of_its_run(
    large: bool, view: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run writes there again: every case would be judged by the values of the last one."""
    if large:
        monkeypatch.setattr(sharing, "LARGE_BYTES", 0)
        monkeypatch.setattr(sharing, "SMALL_BYTES", 0)
    model = Written(torch.tanh, view=view)
    fresh = Returns(lambda x: torch.tanh(x).view(6, 2) if view else torch.tanh(x))
    off = Written(lambda x: torch.tanh(x) * (1.01 if float(x.abs().max()) > 50 else 1.0), view=view)
    assert verify(model, fresh, numbers(2, 6)).ok
    assert verify(fresh, model, numbers(2, 6)).ok
    found = verify(model, off, numbers(2, 6))
    assert not found.ok
    assert found.outputs[0].native is not None
    assert found.outputs[0].native.worst_case == "large"
    assert not model.out.any()


def scaled(sign: float, replaced: float | None = None) -> Callable[[Tensor], Tensor]:
    """About 1e44 times the input, beyond float32, on three axes; `replaced` for what overflows."""

    def function(x: Tensor) -> Tensor:
        found = x.unsqueeze(-1) * 1e30 * (1e14 * sign)
        return found if replaced is None else torch.where(found.isinf(), replaced, found)

    return function


def test_overflow_to_the_other_side_differs() -> None:
    example = numbers(2, 6) + 5
    verdict = verify(Returns(scaled(1.0)), Alone(scaled(1.0)), example)
    assert verdict.ok, str(verdict)
    assert any("were not compared: the reference overflows float32" in note for note in verdict.notes)
    opposed = verify(Returns(scaled(1.0)), Alone(scaled(-1.0)), example)
    assert not opposed.ok
    assert "got -inf where the reference has +inf" in opposed.reason
    finite = verify(Returns(scaled(1.0)), Alone(scaled(1.0, replaced=1.0)), example)
    assert not finite.ok


def test_nan_for_an_overflow_is_not_said_to_agree() -> None:
    example = numbers(2, 6) + 5
    verdict = verify(Returns(scaled(1.0)), Alone(scaled(1.0, replaced=torch.nan)), example)
    assert not any("agree in place" in note for note in verdict.notes)
    assert any("were not compared" in note for note in verdict.notes)


def test_an_output_that_overflows_throughout_is_inconclusive() -> None:
    def beyond(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, (x.abs().unsqueeze(-1) + 1) * 1e30 * 1e30

    verdict = verify(Returns(beyond), Alone(beyond), numbers(2, 6))
    assert [output.ok for output in verdict.outputs] == [True, False]
    assert "inconclusive: the reference overflows float32 at every value" in verdict.reason


def test_a_noise_that_could_not_be_measured_does_not_judge_the_next_candidate() -> None:
    """In float64 the reference declines weights that are moved: then nothing is judged there."""

    class Declines(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.ones(6)), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float64 and not bool((self.scale == 1).all()):
                raise ValueError("the scale is one")
            out: Tensor = self.layer(x * self.scale)
            return out

    torch.manual_seed(0)
    model = Declines()
    baseline = Baseline(model, numbers(2, 6))
    for _ in range(2):
        verdict = baseline.compare(model)
        assert verdict.ok
        assert verdict.outputs[0].float64 is None
        assert any("not compared in float64: ValueError" in note for note in verdict.notes)
