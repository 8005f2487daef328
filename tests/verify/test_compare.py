"""The noise of few values, and right rewrites that no verdict may call wrong."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from right_rewrites import Affine, folded, rewrite
from torch import Tensor, nn

from graphsurgery.errors import VerificationError
from graphsurgery.verify import Baseline, Comparison, Inputs, OutputVerdict, Verdict
from graphsurgery.verify.compare import (
    ORDER_OF_SUMMATION,
    STORED_WEIGHTS,
    Yardstick,
    allowed_factor,
    canonical,
)
from graphsurgery.verify.judge import _conclude


class Returns(nn.Module):
    """What a function gives."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what(x)


def yardstick(draw: Tensor, draws: int = 1) -> Yardstick:
    """A float32 output of one case whose anchor is zero where `draw` is, and one elsewhere."""
    anchor = (draw != 0).double()
    made = Yardstick([anchor], [("example",)], [tuple(anchor.shape)], 2.0**-23, 1e-38, ORDER_OF_SUMMATION)
    for _ in range(draws):
        made.add_draw([anchor + draw])
    return made


def test_the_factor_is_that_of_the_values_that_moved() -> None:
    """Written out: c sqrt(ln(2 N m / a) / ln(2 n k)); of 3 times 100 values 100, 1 and 0 move."""
    draw = torch.zeros(1, 3, 10, 10, dtype=torch.float64)
    draw[0, 0], draw[0, 1, 4, 7] = 1e-5, 1e-5
    (factor, _, _) = yardstick(draw, draws=2)._levels(1)[0]
    # ln(2 * 3 * 100 / 1e-6) = 20.2124, ln(2 * 100 * 2) = 5.99146, ln(2 * 1 * 2) = 1.38629
    assert factor.flatten().tolist() == pytest.approx([7.346879, 15.273608, 15.273608], rel=1e-6)
    assert torch.equal(factor, allowed_factor(3, 100, torch.tensor([[100, 1, 1]]), 2, 4.0))


def test_an_element_that_moves_in_one_draw_of_two_counts_once() -> None:
    first, second = torch.zeros(2, 1, 1, 2, 2, dtype=torch.float64).unbind(0)
    first[0, 0, 0, 0], second[0, 0, 0, 0], second[0, 0, 1, 1] = 1e-5, 2e-5, 1e-5
    made = yardstick(first)
    made.add_draw([made.anchors[0] + second])
    assert [int(mask.sum()) for mask in made.moved] == [2]
    other = yardstick(first)
    other.add_noise_of(made, 0.5)
    assert [int(mask.sum()) for mask in other.moved] == [2]


NOISE = torch.tensor([[4e-4, 1e-5, 0.0], [2e-5, 6e-5, 3e-6], [0.0, 0.0, 0.0]], dtype=torch.float64)
SCALE = torch.tensor([[4.0, 1.0, 0.5], [2.0, 3.0, 0.1], [5.0, 0.0, 0.25]], dtype=torch.float64)


def levels(kin: Yardstick | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Factor, T and floor of three cases of three numbers each."""
    names = ("a", "b", "c")
    made = Yardstick([SCALE], [names], [(3, 3)], 2.0**-23, 1e-38, ORDER_OF_SUMMATION, kin=kin)
    made.add_draw([SCALE + NOISE])
    return made._levels(1)[0]


def test_the_noise_of_a_case_is_smoothed_by_what_the_others_say() -> None:
    """T of the module's docstring, number by number, in plain Python."""
    noise, scale = NOISE.tolist(), SCALE.tolist()

    def shares(rows: list[list[float]]) -> list[float]:
        known = [row for row in rows if max(row) > 0]
        return [math.sqrt(sum((row[g] / max(row)) ** 2 for row in known) / len(known)) for g in range(3)]

    p, q = shares(noise), shares(scale)
    ratios = sorted(noise[s][g] / (max(scale[s]) * q[g]) for s in range(3) for g in range(3))
    r = ratios[4]  # the median of nine
    terms = [
        [(noise[s][g], max(noise[s]) * p[g], max(scale[s]) * q[g] * r) for g in range(3)] for s in range(3)
    ]
    assert {term.index(max(term)) for row in terms for term in row} == {0, 1, 2}  # each decides somewhere
    expected = [[max(term) for term in row] for row in terms]
    _, level, floor = levels()
    torch.testing.assert_close(level, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(floor, 4 * 2.0**-23 * SCALE + 1e-38, rtol=1e-12, atol=0)


def test_what_the_other_precision_showed_of_the_channels_counts_too() -> None:
    kin = Yardstick([SCALE], [("a", "b", "c")], [(3, 3)], 2.0**-10, 1e-5, ORDER_OF_SUMMATION)
    kin.add_draw([SCALE + torch.tensor([1e-6, 1e-6, 9e-3], dtype=torch.float64)])
    (_, alone, _), (_, helped, _) = levels(), levels(kin)
    assert float(alone[0, 2]) < 1e-4
    assert float(helped[0, 2]) == pytest.approx(4e-4)  # there all noise is in the last channel
    assert bool((helped >= alone).all())


def test_a_case_of_nothing_but_rounding_has_its_greatest_noise_everywhere() -> None:
    draw = torch.tensor([[3.0, 1e-3], [1e-3, 1e-5]], dtype=torch.float64)
    anchor = torch.tensor([[3.0, 0.5], [1.0, 1.0]], dtype=torch.float64)
    made = Yardstick([anchor], [("zeros", "normal")], [(2, 2)], 2.0**-23, 1e-38, ORDER_OF_SUMMATION)
    made.add_draw([anchor + draw])
    (_, level, _) = made._levels(1)[0]
    assert level[0].tolist() == [3.0, 3.0]
    assert float(level[1].max()) < 1.0


def test_noise_of_another_precision_is_taken_in_proportion() -> None:
    draw = torch.tensor([[1e-3, 2e-3, 0.0]], dtype=torch.float64)
    small, large = yardstick(1e-6 * draw + (draw != 0) * 1e-12), yardstick(draw)
    draws = small.draws
    small.add_noise_of(large, 0.5)
    assert small.noise[1][0].tolist() == [pytest.approx([5e-4, 1e-3, 0.0])]
    assert small.draws == draws
    small.add_noise_of(large, 0.25)
    assert small.noise[1][0].tolist() == [pytest.approx([5e-4, 1e-3, 0.0])]


def test_values_are_brought_to_rows_of_cases() -> None:
    def shape(size: tuple[int, ...], rows: int, stacked: bool) -> tuple[int, ...]:
        return tuple(canonical(torch.zeros(size), rows, stacked).shape)

    assert shape((3, 4), 3, True) == (3, 4)
    assert shape((3, 4), 3, False) == (1, 3, 4)
    assert shape((2, 4), 3, True) == (1, 2, 4)
    assert shape((3,), 3, True) == (3, 1)
    assert shape((4,), 3, True) == (1, 4)
    assert shape((), 1, True) == (1, 1)
    both = canonical(torch.tensor([[1 + 2j, 3 - 4j]], dtype=torch.complex64), 1, True)
    assert both.tolist() == [[[1.0, 2.0], [3.0, -4.0]]]
    assert both.dtype == torch.float64


def judged_alone(errors: list[float]) -> Comparison:
    """One case of three channels of two values each, off by `errors` in the second value of each."""
    anchor = torch.tensor([[[1.0, -2.0], [10.0, 20.0], [0.5, 0.25]]], dtype=torch.float64)
    made = Yardstick([anchor], [("only",)], [(1, 3, 2)], 2.0**-23, 1e-38, ORDER_OF_SUMMATION, axes=(1,))
    noise = torch.tensor([[[1e-6, 1e-6], [1e-5, 1e-5], [2e-7, 2e-7]]], dtype=torch.float64)
    made.add_draw([anchor + noise], reference=True)
    off = torch.zeros_like(anchor)
    off[0, :, 1] = torch.tensor(errors, dtype=torch.float64)
    return made.judge([anchor + off], "native")


def test_a_comparison_written_out() -> None:
    """Of three channels the last needs most; N = 3 slices of m = 2 values, n = 2 moved in k = 1 draw."""
    factor = 4 * math.sqrt(math.log(2 * 3 * 2 / 1e-6) / math.log(2 * 2 * 1))
    errors = [2e-6, 1e-6, 3e-6]
    found = judged_alone(errors)
    floor = [4 * 2.0**-23 * size for size in (2.0, 20.0, 0.5)]
    assert found.factor == pytest.approx(factor)
    # one case: the usual share of a channel is its own, so T is the noise or the scale's share of it
    levels = [1e-6, 1e-5, max(2e-7, 0.5 * 5e-7)]
    assert found.factor_needed == pytest.approx((3e-6 - floor[2]) / levels[2], rel=1e-6)
    assert found.ok
    assert found.max_error == pytest.approx(3e-6)
    assert found.mean_error == pytest.approx(6e-6 / 6)
    assert found.worst_index == (0, 2, 1)
    assert (found.worst_case, found.worst_expected) == ("only", 0.25)
    assert found.worst_got == pytest.approx(0.25 + 3e-6)
    assert found.rounding_ratio == pytest.approx((3e-6 / 20) / (1e-5 / 20))
    bounds = [factor * level + low for level, low in zip(levels, floor, strict=True)]
    shares = sorted(bound / size for bound, size in zip(bounds, (2.0, 20.0, 0.5), strict=True))
    assert found.resolution == pytest.approx(shares[1])
    assert found.best_resolution == pytest.approx(shares[0])
    limit = factor * levels[2] + floor[2]
    assert judged_alone([0.0, 0.0, 0.999 * limit]).ok
    assert not judged_alone([0.0, 0.0, 1.001 * limit]).ok
    assert judged_alone([0.0, 0.0, floor[2] * 0.99]).factor_needed == 0.0


def concluded(
    native: float, double: float | None = None, *, off: bool = False, rows: tuple[int, int] = (0, 0)
) -> OutputVerdict:
    """The conclusion on an output, from the best resolutions of its two comparisons."""
    one = judged_alone([1e-6, 0.0, 0.0])
    comparison = dataclasses.replace(one, best_resolution=native)
    exact = None if double is None else dataclasses.replace(one, precision="float64", best_resolution=double)
    if off and exact is not None:
        exact = dataclasses.replace(exact, factor_needed=2 * exact.factor)
    verdict = OutputVerdict("y", (1, 3, 2), "float32", 6, True, "", comparison, exact)
    verdict = dataclasses.replace(verdict, top1_checked=rows[0], top1_agreed=rows[1])
    return _conclude(verdict, comparison, exact)


def test_what_rounding_alone_explains_is_inconclusive_unless_float64_sees_more() -> None:
    assert concluded(0.99).ok
    for seen in (concluded(1.0), concluded(1.5), concluded(1.0, 1.0)):
        assert not seen.ok
        assert seen.reason.startswith("inconclusive: rounding alone explains errors of 1")
    assert concluded(1.5, 0.99).ok
    assert concluded(0.99, 1.5).ok


def test_a_failure_in_float64_alone_or_of_one_row_alone_is_one() -> None:
    assert "with both cast to float64" in concluded(0.1, 0.1, off=True).reason
    assert not concluded(0.1, 0.1, off=True).ok
    assert not concluded(0.1, 0.1, off=True).within_noise
    assert concluded(0.1, 0.1).within_noise
    assert concluded(0.1, rows=(4, 4)).ok
    verdict = concluded(0.1, rows=(4, 3))
    assert not verdict.ok
    assert verdict.reason == "1 of 4 rows have another greatest class by more than rounding"


def test_an_output_tells_the_figures_of_its_own_dtype() -> None:
    verdict = concluded(0.1)
    assert verdict.native is not None
    assert verdict.max_error == verdict.native.max_error == pytest.approx(1e-6)
    assert verdict.mean_error == verdict.native.mean_error == pytest.approx(1e-6 / 6)
    assert verdict.rounding_ratio == verdict.native.rounding_ratio == pytest.approx(0.1)
    whole = OutputVerdict("n", (2,), "int64", 2, True, "")
    assert (whole.max_error, whole.mean_error, whole.rounding_ratio) == (0.0, 0.0, None)
    assert whole.within_noise


def sparse(seed: int) -> tuple[nn.Module, Tensor]:
    """Two convolutions with norm and ReLU; of 96 channels some are closed, some open at few places."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    x = torch.randn(1, 8, 20, 20, generator=g)
    layers: list[nn.Module] = []
    value, channels = x, 8
    for last in (False, True):
        conv = nn.Conv2d(channels, 96, 3, padding=1).eval()
        with torch.no_grad():
            y = conv(value)
            scale = (torch.rand(96, generator=g) + 0.5) / y.std((0, 2, 3))
            shift = 0.3 * torch.randn(96, generator=g)
            if last:
                shift -= 2.5 * torch.rand(96, generator=g) + 1.5
            layers += [conv, Affine(scale, shift - scale * y.mean((0, 2, 3))), nn.ReLU()]
            value = nn.Sequential(*layers[-2:])(y)
        channels = 96
    open_at = (value > 0).flatten(2).sum(2)
    assert int((open_at == 0).sum()) >= 5
    assert int(((open_at > 0) & (open_at < 4)).sum()) >= 5
    return nn.Sequential(*layers).eval(), x


def judged(baseline: Baseline, model: nn.Module) -> Verdict:
    with torch.no_grad():
        return baseline.compare(model)


@pytest.mark.parametrize("seed", range(2))
def test_channels_open_at_few_positions_are_no_difference(seed: int) -> None:
    """As a network of many GFLOP is judged: three cases, one draw."""
    model, x = sparse(seed)
    right = folded(model)
    verdict = judged(Baseline(model, x, samples=3, draws=1), right)
    assert verdict.ok, str(verdict)
    # the float64 comparison has a single case and draw there, and still sees a weight
    wrong = copy.deepcopy(right)
    channel = int(right(x).detach().flatten(2).amax(2).argmax())
    with torch.no_grad():
        wrong[-2].weight[channel] *= 1 + 1e-4  # type: ignore[index, union-attr, operator]
    verdict = judged(Baseline(model, x, samples=3, draws=1), wrong)
    assert not verdict.ok
    assert any("by the noise of 1 draw a candidate differed" in note for note in verdict.notes)


def test_what_one_draw_calls_different_is_judged_by_more() -> None:
    """The noise of one draw is made too small by hand, as it is by chance where a channel is one number."""
    model, x = sparse(0)
    right, baseline = folded(model), Baseline(model, x, samples=3, draws=1)
    for output in baseline.outputs:
        assert output.yardstick is not None
        output.yardstick.noise = {a: [1e-3 * n for n in v] for a, v in output.yardstick.noise.items()}
    verdict = judged(baseline, right)
    assert verdict.ok, str(verdict)
    assert any("so it was measured on 6" in note for note in verdict.notes)
    assert baseline.outputs[0].yardstick.draws == 7  # type: ignore[union-attr]
    assert baseline.outputs[0].stored.draws == 6  # type: ignore[union-attr]
    assert judged(baseline, right).notes == verdict.notes  # measured once


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_float64_sees_is_told_in_every_dtype(dtype: torch.dtype) -> None:
    """Storage in the model's dtype is what float64 cannot see below."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    baseline = Baseline(model, torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).to(dtype))
    output = judged(baseline, model).outputs[0]
    assert output.native is not None
    assert output.float64 is not None
    unit = torch.finfo(dtype).eps
    assert unit / 10 < output.float64.best_resolution <= output.float64.resolution < output.native.resolution
    assert output.native.resolution < 1e3 * unit
    seen = f"errors below {output.float64.resolution:.0e} of a channel's largest value are not seen"
    assert (seen in output.reason) == (dtype is not torch.float32)


@pytest.mark.parametrize(("samples", "full"), [(None, True), (3, False)])
def test_float64_is_run_on_all_cases_of_a_full_battery_and_else_on_one(
    samples: int | None, full: bool
) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    baseline = Baseline(model, torch.randn(2, 6, generator=torch.Generator().manual_seed(0)), samples=samples)
    double = judged(baseline, model).outputs[0].float64
    assert double is not None
    stored = baseline.outputs[0].stored
    assert stored is not None
    assert len(stored.anchors) == (len(baseline.batches) if full else 1)
    assert stored.eps == 2.0**-52
    assert stored.program == STORED_WEIGHTS
    assert stored.kin is baseline.outputs[0].yardstick


def test_slices_run_along_both_leading_axes_where_rows_are_no_cases() -> None:
    model = Returns(lambda x: (x.flatten(1), x.sum()))
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for dynamic, axes in ((True, (1, -1)), (False, (1, 2, -1))):
        rows, total = Baseline(model, x, dynamic_batch=dynamic).outputs
        assert rows.yardstick is not None
        assert total.yardstick is not None
        assert rows.yardstick.axes == axes
        assert total.yardstick.axes == (1, 2, -1)


def test_a_reference_that_cannot_be_moved_is_said_and_only_then() -> None:
    def said(reference: object) -> bool:
        notes = Baseline(reference, torch.ones(2, 3), samples=1).notes
        return any("cannot be run with its data moved" in note for note in notes)

    class Plain:
        name = "plain"

        def run(self, inputs: Inputs) -> dict[str, Tensor]:
            return {"output": inputs.args[0] * 2}

    assert said(Plain())
    assert not said(Returns(lambda x: x * 2))


@pytest.mark.parametrize("seed", [0, 7, 14, 21, 28, 35, 36, 43, 44, 47, 50, 57, 64, 71])
def test_right_rewrites_are_not_called_wrong(seed: int) -> None:
    _no_alarm(seed)


@pytest.mark.sweep
@pytest.mark.parametrize("block", range(50))
def test_no_false_alarm_on_5000_right_rewrites(block: int) -> None:
    for seed in range(100 * block, 100 * block + 100):
        _no_alarm(seed)


def _no_alarm(seed: int) -> None:
    made = rewrite(seed)
    few = {"samples": 3, "draws": 1} if made.dear else {}
    try:
        baseline = Baseline(made.before, made.x, dynamic_batch=seed % 2 == 0, **few)  # type: ignore[arg-type]
    except VerificationError as error:  # ones in float16 overflow, and their differences are nothing
        if "NaN on every input" in str(error) and made.before(made.x).isnan().all():
            return
        raise
    verdict = judged(baseline, made.after)
    assert verdict.ok or "inconclusive" in verdict.reason, f"seed {seed}, {made.kind}: {verdict}"
