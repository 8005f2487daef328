"""The battery: what it holds, that it is seeded, and that it stays within what the caller showed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphsurgery.errors import VerificationError
from graphsurgery.verify.inputs import CASES, Inputs, as_inputs, battery, samples_for


def image(rows: int = 2) -> Inputs:
    return as_inputs(torch.randn(rows, 3, 9, 8, generator=torch.Generator().manual_seed(1)) * 2 + 5)


def test_dynamic_batch_runs_batches_of_1_2_and_5() -> None:
    batches = battery(image(), dynamic_batch=True)
    assert [batch.inputs.args[0].shape[0] for batch in batches] == [1, 2, 5]
    assert tuple(case for batch in batches for case in batch.cases) == CASES
    assert all(batch.stacked for batch in batches)


@pytest.mark.parametrize(
    ("refused", "rows", "sizes"),
    [
        ({2, 3, 4}, 2, [1, 6, 1]),
        ({5}, 2, [1, 3, 4]),
        ({2, 4, 6, 8, 10, 12, 14, 16}, 3, [1, 7]),
        (set(range(4, 17)), 3, [1] * 8),
        ({1, 2}, 4, [4, 4, 3, 4, 4, 4, 4, 4]),
        (set(range(1, 17, 2)), 4, [4, 4, 2, 4, 4, 4, 4, 4]),
        (set(range(1, 17)) - {3}, 3, [3] * 8),
    ],
    ids=["not 2 to 4", "not 5", "odd", "at most 3", "at least 3", "even", "3 alone"],
)
def test_no_batch_is_run_that_is_refused(refused: set[int], rows: int, sizes: list[int]) -> None:
    batches = battery(image(rows), dynamic_batch=True, refused=refused)
    assert [batch.inputs.args[0].shape[0] for batch in batches] == sizes
    assert tuple(case for batch in batches for case in batch.cases) == CASES
    third = torch.cat([batch.inputs.args[0] for batch in batches if "impulses" in batch.cases])
    if len(batches) == 8:  # a run of its own, of zeros but for the impulses
        assert float((third == 0).double().mean()) > 0.5
    (first,) = battery(image(rows), dynamic_batch=True, refused=refused, samples=1)
    assert torch.equal(first.inputs.args[0], batches[0].inputs.args[0])


def test_static_batch_runs_each_case_with_the_shapes_of_the_example() -> None:
    batches = battery(image(), dynamic_batch=False)
    assert [batch.cases for batch in batches] == [(case,) for case in CASES]
    assert not any(batch.stacked for batch in batches)
    assert {tuple(batch.inputs.args[0].shape) for batch in batches} == {(2, 3, 9, 8)}


def test_the_example_comes_first_and_as_it_is() -> None:
    example = image()
    assert torch.equal(battery(example, dynamic_batch=False)[0].inputs.args[0], example.args[0])
    assert torch.equal(battery(example, dynamic_batch=True)[0].inputs.args[0], example.args[0][:1])


def test_same_seed_same_battery_and_global_generator_untouched() -> None:
    state = torch.get_rng_state()
    first, again, other = (battery(image(), dynamic_batch=True, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first[2].inputs.args[0], again[2].inputs.args[0])
    assert not torch.equal(first[1].inputs.args[0], other[1].inputs.args[0])


def test_cases_hold_what_they_are_called() -> None:
    found = {b.cases[0]: b.inputs.args[0] for b in battery(image(), dynamic_batch=False)}
    assert found["zeros"].abs().max() == 0
    assert len(found["constant"].unique()) == 1
    assert found["constant"].abs().max() > 0
    assert abs(float(found["normal"].mean()) - 5) < 1
    assert abs(float(found["normal"].std()) - 2) < 0.5
    assert found["large"].abs().max() > 500 * found["normal"].abs().max()
    assert found["tiny"].abs().max() < found["normal"].abs().max() / 500
    impulses = found["impulses"]
    corners = impulses[:, [0, 0, 2, 2], [0, 8, 0, 8], [0, 7, 7, 0]]
    assert bool((corners != 0).all())
    assert 0 < int((impulses != 0).sum()) < 0.3 * impulses.numel()


def test_large_inputs_stay_finite_in_float16() -> None:
    example = as_inputs(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).half())
    for batch in battery(example, dynamic_batch=True):
        assert bool(batch.inputs.args[0].isfinite().all())
        assert batch.inputs.args[0].dtype == torch.float16


def test_integers_stay_within_the_range_of_the_example() -> None:
    ids = torch.tensor([[3, 7, 11, 5], [4, 4, 3, 9]])
    mask = torch.tensor([[True, True, False, True]])
    batches = battery(as_inputs((ids, mask)), dynamic_batch=False)
    values = torch.cat([batch.inputs.args[0].flatten() for batch in batches])
    assert int(values.min()) >= 3
    assert int(values.max()) <= 11
    assert len(values.unique()) > 6
    assert {batch.inputs.args[1].dtype for batch in batches} == {torch.bool}


def test_floats_without_the_batch_dimension_vary_between_runs() -> None:
    x, table, scalar, ids = torch.randn(2, 5), torch.randn(7, 5), torch.tensor(2.0), torch.arange(7)
    batches = battery(as_inputs((x, table, scalar, ids)), dynamic_batch=True)
    for position, value in ((1, table), (2, scalar)):
        seen = [batch.inputs.args[position] for batch in batches]
        assert torch.equal(seen[0], value)
        assert all(found.shape == value.shape and found.dtype == value.dtype for found in seen)
        assert len({tuple(found.flatten().tolist()) for found in seen}) == len(batches) == 3
    assert all(torch.equal(batch.inputs.args[3], ids) for batch in batches)


def test_keywords_and_nesting_are_kept() -> None:
    example = as_inputs({"x": torch.randn(2, 3), "more": [torch.randn(2, 1), None, 4]})
    batch = battery(example, dynamic_batch=True)[-1]
    assert set(batch.inputs.kwargs or {}) == {"x", "more"}
    assert (batch.inputs.kwargs or {})["more"][1:] == [None, 4]
    assert (batch.inputs.kwargs or {})["more"][0].shape == (5, 1)
    assert example.names() == ["x", None]


def test_numpy_arrays_become_tensors() -> None:
    assert isinstance(as_inputs(np.zeros((2, 3), dtype=np.float32)).args[0], torch.Tensor)


@pytest.mark.parametrize("nothing", [(), {}, (None,), "x.onnx", 3])
def test_no_tensor_among_the_inputs_is_an_error(nothing: object) -> None:
    with pytest.raises(VerificationError, match="at least one example tensor"):
        as_inputs(nothing)


@pytest.mark.parametrize(
    "shape",
    [(), (0,), (1,), (3,), (2, 0, 3), (1, 1, 1, 1, 1)],
    ids=["scalar", "none", "1", "3", "empty", "ones"],
)
@pytest.mark.parametrize("dynamic", [True, False])
def test_any_shape_has_a_battery(shape: tuple[int, ...], dynamic: bool) -> None:
    assert battery(as_inputs(torch.zeros(shape)), dynamic_batch=dynamic)


def test_dear_models_get_fewer_samples() -> None:
    assert samples_for(1e6) == len(CASES)
    assert samples_for(8.2e9) == 4
    assert samples_for(1e13) == 3
