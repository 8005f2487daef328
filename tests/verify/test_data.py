"""The caller's own data: what is taken of it, what is left out, and what is refused in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import graphsurgery as gs
from graphsurgery.verify.data import Data, data_limit_for
from graphsurgery.verify.inputs import as_inputs


def numbers(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def net(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).eval()


class Gate(nn.Module):
    """Does something else, by `factor`, only where the first value is above 50: no battery leads there."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.line = net()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        y = self.line(x)
        return torch.where((x[:, :1] > 5e4) & (x[:, 1:2] < -5e4), y * self.factor, y)


def rare() -> Tensor:
    x = numbers(3, 6)
    x[1, 0], x[1, 1] = 6e4, -6e4
    return x


@pytest.mark.parametrize("dynamic", [True, False], ids=["free batch", "fixed batch"])
def test_data_find_what_the_battery_does_not(dynamic: bool) -> None:
    example = numbers(2, 6)
    kwargs: dict[str, Any] = {"dynamic_batch": dynamic}
    assert gs.verify(Gate(1.0), Gate(1.01), example, **kwargs).ok
    verdict = gs.verify(Gate(1.0), Gate(1.01), example, data=[rare()], **kwargs)
    assert not verdict.ok
    assert "data[" in verdict.reason
    assert verdict.data_samples == 3
    assert gs.verify(Gate(1.0), Gate(1.0), example, data=[rare()], **kwargs).ok


def test_localize_looks_at_the_data() -> None:
    found = gs.localize(Gate(1.0), Gate(1.01), numbers(2, 6), data=[rare()])
    assert found.found
    assert found.first is not None
    assert not gs.localize(Gate(1.0), Gate(1.01), numbers(2, 6)).found


def test_a_loader_with_labels_says_what_it_left_out() -> None:
    loader = DataLoader(TensorDataset(numbers(11, 6), torch.arange(11)), batch_size=4)
    verdict = gs.verify(net(), net(), numbers(2, 6), data=loader)
    assert verdict.ok
    assert verdict.data_samples == 11
    assert any("left out as a label" in note for note in verdict.notes)
    assert "\n  11 samples of the caller's data\n" in str(verdict)
    assert "samples of the caller" not in str(gs.verify(net(), net(), numbers(2, 6)))


def test_mappings_leave_out_other_keys_and_say_so() -> None:
    class Named(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a * 2 + b

    example = {"a": numbers(2, 3), "b": numbers(2, 3, seed=6)}
    items = [{"b": numbers(4, 3), "labels": torch.arange(4), "a": numbers(4, 3, seed=9)}]
    verdict = gs.verify(Named(), Named(), example, data=items)
    assert verdict.ok
    assert verdict.data_samples == 4
    assert any("labels was left out" in note for note in verdict.notes)


def test_the_limit_counts_samples_and_leaves_the_rest_unread() -> None:
    read = []

    def items() -> Iterator[Tensor]:
        for number in range(100):
            read.append(number)
            yield numbers(4, 6, seed=number)

    verdict = gs.verify(net(), net(), numbers(2, 6), data=items(), data_limit=10, dynamic_batch=True)
    assert verdict.data_samples == 10
    assert len(read) <= 4
    assert any("data_limit" in note for note in verdict.notes)


def test_the_default_limit_follows_the_cost() -> None:
    assert data_limit_for(1e3) == 256
    assert data_limit_for(1e12) == 8
    assert data_limit_for(8e9) == 10


def test_a_fixed_batch_is_filled_up_and_each_sample_counted_once() -> None:
    example = as_inputs(numbers(4, 6))
    taken = Data([numbers(3, 6), numbers(2, 6, seed=6)]).runs(example, limit=50, batch=4)
    assert [batch.inputs.args[0].shape[0] for batch in taken.batches] == [4, 4]
    assert taken.samples == 5 == sum(batch.samples for batch in taken.batches)
    rows = torch.cat([batch.inputs.args[0] for batch in taken.batches])
    assert torch.equal(rows[:5], torch.cat([numbers(3, 6), numbers(2, 6, seed=6)]))
    assert torch.equal(rows[5:], rows[4:5].expand(3, -1))


def test_an_iterator_can_be_read_twice_through_data() -> None:
    data = Data(iter([numbers(2, 6)]))
    first, again = (data.runs(as_inputs(numbers(2, 6)), limit=9).batches for _ in range(2))
    assert torch.equal(first[0].inputs.args[0], again[0].inputs.args[0])


def test_arrays_are_taken_and_the_caller_s_data_are_not_written() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    array = numbers(3, 6).numpy()
    kept = array.copy()
    assert gs.verify(Writes(), Writes(), numbers(2, 6), data=[array]).ok
    assert np.array_equal(array, kept)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "no samples"),
        (iter(()), "no samples"),
        (numbers(2, 6), "put a single batch in a list"),
        ([numbers(6)], "items are batches"),
        ([numbers(2, 7)], "has shape [2, 7], expected [any, 6]"),
        ([{"x": numbers(2, 6)}], "is a mapping of 'x'"),
        ([(numbers(2, 6) * float("nan"),)], "holds 12 NaN among 12 values"),
        ([numbers(2, 6).double()], "is float64, expected float32"),
        ([()], "has 0 inputs, expected 1"),
        ([3], "is a int, expected a tensor"),
        ([numbers(2, 6), numbers(2, 6) / 0 * 0], "of item 1 of the data holds 12 NaN"),
        (["text"], "is a str, expected a tensor"),
        ([np.array(["a", "b"])], "expected numbers"),
    ],
)
def test_what_does_not_fit_is_one_sentence(data: Any, said: str) -> None:
    with pytest.raises(gs.VerificationError) as raised:
        gs.verify(net(), net(), numbers(2, 6), data=data)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_inputs_of_one_item_have_one_batch() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    with pytest.raises(gs.VerificationError, match="different numbers of rows"):
        gs.verify(Two(), Two(), (numbers(2, 6), numbers(2, 6)), data=[(numbers(3, 6), numbers(2, 6))])


@pytest.mark.parametrize(
    ("example", "item"),
    [
        ((numbers(2, 3), [numbers(2, 3)]), (numbers(2, 3), (numbers(2, 3),))),
        ({"a": numbers(2, 3), "b": [numbers(2, 3)]}, {"a": numbers(2, 3), "b": (numbers(2, 3),)}),
        ((numbers(2, 3), [numbers(2, 3)]), (numbers(2, 3), [numbers(2, 3), numbers(2, 3)])),
    ],
    ids=["tuple for list", "keyword", "longer"],
)
def test_items_are_nested_as_the_example_is(example: Any, item: Any) -> None:
    inputs = as_inputs(example)
    Data([example]).check(inputs)
    with pytest.raises(gs.VerificationError, match="item 0 of the data is nested in another way"):
        Data([item]).check(inputs)


def test_a_scalar_before_the_batch_does_not_set_the_rows_of_a_run() -> None:
    class Scaled(nn.Module):
        def forward(self, scale: Tensor, x: Tensor) -> Tensor:
            return x * scale

    example = (torch.tensor(2.0), numbers(4, 6))
    verdict = gs.verify(Scaled(), Scaled(), example, data=[(torch.tensor(3.0), numbers(5, 6))])
    assert verdict.ok
    assert verdict.data_samples == 5
    assert verdict.batch_sizes[0] == 4


def test_data_that_the_reference_declines_altogether_are_an_error() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if bool((x > 1e5).any()):
                raise ValueError("too large")
            return x * 2

    example, large = numbers(2, 6), numbers(2, 6).abs() * 1e7
    with pytest.raises(gs.VerificationError, match=r"none of the data could be run.*too large"):
        gs.verify(Picky(), Picky(), example, data=[large])
    verdict = gs.verify(Picky(), Picky(), example, data=[example, large])
    assert verdict.data_samples == 2
    assert any("declined" in note for note in verdict.notes)


def test_optimize_compares_on_the_data_and_reports_how_many() -> None:
    result = gs.optimize(net(), numbers(2, 6), data=iter([(numbers(5, 6), torch.arange(5))]))
    assert result.report.verification is not None
    assert result.report.verification.ok
    assert result.report.verification.data_samples == 5
    again = gs.Report.from_json(result.report.to_json())
    assert again.verification is not None
    assert again.verification.data_samples == 5


def test_optimize_refuses_data_that_do_not_fit_before_the_passes() -> None:
    seen: list[str] = []
    with pytest.raises(gs.VerificationError, match="expected 1"):
        gs.optimize(net(), numbers(2, 6), data=[()], on_event=lambda event: seen.append(event.pass_name))
    assert "passes" not in seen
    with pytest.raises(ValueError, match="verify='off'"):
        gs.optimize(net(), numbers(2, 6), data=[numbers(2, 6)], verify="off")
    with pytest.raises(ValueError, match="at least 1"):
        gs.verify(net(), net(), numbers(2, 6), data=[numbers(2, 6)], data_limit=0)
