"""Float64 whatever the program asks for, copies that leave the original alone, moves of one unit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery.verify.inputs import as_inputs
from graphsurgery.verify.precision import (
    Float64Mode,
    Nudger,
    cause_of_nan,
    copy_module,
    nudge_inputs,
    nudged_state,
    stored_state,
    to_float64,
    uses_low_precision,
)


class Shifted(nn.Module):
    def __init__(self, shift: float = 3) -> None:
        super().__init__()
        self.shift = shift
        self.place = nn.Parameter(torch.tensor([-0.0064, 0.3, 0.7]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.shift, alpha=2) + self.place


class AsksForFloat32(nn.Module):
    """Every way in which float32 enters behind the back of `module.double()`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.plain = torch.full((4,), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).float() + self.plain
        y = y.to(torch.float32) * torch.ones(4) / 3 + torch.full((4,), 0.7, dtype=torch.float32)
        return torch.softmax(y, dim=-1, dtype=torch.float32) + torch.arange(4.0) + y.half().float()


def test_float64_mode_reaches_casts_constants_and_factories() -> None:
    torch.manual_seed(0)
    module, x = AsksForFloat32(), torch.randn(2, 4)
    plain = float(torch.tensor(0.1))
    expected = torch.nn.functional.linear(
        x.double(), module.layer.weight.double(), module.layer.bias.double()
    )
    expected = (expected + plain) / 3 + 0.7
    expected = torch.softmax(expected, dim=-1) + torch.arange(4.0, dtype=torch.float64) + expected
    copied = copy_module(module).double()
    with Float64Mode(), torch.no_grad():
        got = copied(x.double())
    assert got.dtype == torch.float64
    # the same float64 program, with kernels that may add in another order
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_integers_that_are_added_to_floats_are_moved_and_those_of_integers_are_not() -> None:
    x, whole = torch.zeros(4, dtype=torch.float64), torch.arange(4)
    with Float64Mode(Nudger(0, 0.5)):
        moved, scaled, of_integers = torch.add(x, 3, alpha=2), (x + 1) * 7, whole * 3 + 1
    assert 0 < float((moved - 6).abs().max()) < 6 * 2.0**-23
    assert 0 < float((scaled - 7).abs().max()) < 7 * 2.0**-22
    assert torch.equal(of_integers, torch.arange(4) * 3 + 1)
    assert of_integers.dtype == torch.int64


def test_a_number_merged_into_a_small_parameter_is_rounding() -> None:
    """6 + 0.01 in float32 is off by more than storing 0.01 is; at x = 0 nothing else is."""
    result = gs.optimize(Shifted().eval(), torch.randn(2, 3))
    assert [change.kind for change in result.report.changes] == ["add+add"]
    assert not result.report.failures
    verdict = gs.verify(Shifted(), Shifted(3 + 1.5e-6), torch.randn(2, 3))
    assert not verdict.ok
    assert "cast to float64" in verdict.reason


def test_float64_mode_moves_constants_that_are_no_parameters() -> None:
    """A number of a product, and a tensor of lower precision: each by half a unit of float32 at most."""
    x = torch.linspace(1, 2, 50, dtype=torch.float64)
    plain = torch.full((50,), 0.7)

    def run(nudger: Nudger | None) -> tuple[Tensor, Tensor, Tensor]:
        with Float64Mode(nudger):
            return x * 0.3, x + plain, torch.clamp(x, max=1.3)

    for exact, moved, share in zip(run(None), run(Nudger(1, 0.5)), (0.3, 0.7, 0.0), strict=True):
        off = (moved - exact).abs().max() / share if share else (moved - exact).abs().max()
        assert (2.0**-26 < float(off) < 2.0**-22) if share else float(off) == 0.0


def test_copy_shares_nothing_and_is_in_eval_semantics() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    copied = copy_module(module)
    assert module.training
    assert not any(part.training for part in copied.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    mine = {t.untyped_storage().data_ptr() for t in (*copied.parameters(), *copied.buffers())}
    yours = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    assert not mine & yours


def test_copy_of_a_module_with_tensors_that_have_a_history() -> None:
    module = nn.Linear(3, 3)
    module.register_buffer("seen", module.weight * 2)
    module.cached = module.weight * 3
    assert torch.equal(copy_module(module).cached, module.cached)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_nudge_moves_by_about_one_unit(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    eps = torch.finfo(dtype).eps
    moved = Nudger(seed=1, ulps=1.0)(x)
    share = ((moved.double() - x.double()) / x.double()).abs() / eps
    assert moved.dtype == dtype
    assert float(share.max()) <= 1.6  # the move, and the rounding of the result
    assert float((share > 0).double().mean()) > 0.9
    assert not torch.equal(moved, Nudger(seed=2, ulps=1.0)(x))


def test_each_tensor_is_moved_by_numbers_of_its_own() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    nudger, other = Nudger(seed=1, ulps=1.0), Nudger(seed=1, ulps=1.0)
    first, second = nudger(x), nudger(x)
    assert not torch.equal(first, second)
    assert torch.equal(other(x), first)
    assert other.offset(torch.arange(5)) == other.offset(torch.empty(0)) == 0
    assert torch.equal(other(x), second)  # nothing was drawn for these


def test_nudge_keeps_zeros_infinities_integers_and_layout() -> None:
    nudger = Nudger(seed=0, ulps=1.0)
    x = torch.tensor([0.0, float("inf"), float("-inf"), float("nan")])
    assert torch.equal(nudger(x)[:3], x[:3])
    assert bool(nudger(x)[3].isnan())
    assert torch.equal(nudger(torch.arange(5)), torch.arange(5))
    across = torch.randn(3, 4).t()
    torch.testing.assert_close(nudger(across), across)


def test_nudged_float64_is_off_by_the_storage_of_the_old_dtype() -> None:
    module = nn.Linear(50, 50)
    moved = stored_state(module, seed=0)["weight"]
    weight = module.weight.detach().double()
    share = ((moved - weight) / weight).abs().max() / 2.0**-24
    assert moved.dtype == torch.float64
    assert 0.9 < float(share) <= 1.0


def test_nudged_module_and_inputs_are_those_of_the_seed() -> None:
    module = nn.Linear(5, 5)
    one, same, other = (nudged_state(module, 1.0, seed)["weight"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, module.weight)
    inputs = as_inputs((torch.randn(3), torch.arange(3)))
    assert torch.equal(nudge_inputs(inputs, 1.0, 0).args[1], torch.arange(3))
    assert to_float64(inputs).args[0].dtype == torch.float64


def test_low_precision_is_found_in_parameters_buffers_and_inputs() -> None:
    x = as_inputs(torch.randn(2, 3, dtype=torch.float64))
    assert not uses_low_precision(nn.Linear(3, 3).double(), x)
    assert uses_low_precision(nn.Linear(3, 3), x)
    assert uses_low_precision(nn.Linear(3, 3).double(), as_inputs(torch.randn(2, 3)))


@pytest.mark.parametrize(
    ("value", "kind"), [(torch.nan, "NaN"), (torch.inf, "infinite"), (-torch.inf, "infinite")]
)
def test_the_first_parameter_that_is_not_finite_is_named(value: float, kind: str) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert (
        cause_of_nan(module)
        == cause_of_nan(None)
        == "look for NaN or infinities in its weights or in the example"
    )
    with torch.no_grad():
        module[1].weight[0, 1:] = value
        module[1].bias[0] = value
    assert cause_of_nan(module) == f"2 of 9 values of '1.weight' are {kind}: load sound weights"
