"""The verdict between torch modules: correct programs pass, wrong ones do not, and what it says of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from graphsurgery.capture import capture
from graphsurgery.errors import VerificationError
from graphsurgery.restore import restore
from graphsurgery.verify import Baseline, Inputs, TorchRunner, Verdict, verify


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def warm(norm: nn.BatchNorm2d, seed: int, spread: float = 1.0) -> nn.BatchNorm2d:
    """Give a batch norm statistics and an affine map that a fold has to get right."""
    g, n = generator(seed), norm.num_features
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn(n, generator=g))  # type: ignore[union-attr]
        norm.running_var.copy_(0.1 + 2 * torch.rand(n, generator=g))  # type: ignore[union-attr]
        norm.weight.copy_(torch.randn(n, generator=g) * spread ** torch.randn(n, generator=g))
        norm.bias.copy_(torch.randn(n, generator=g))
    return norm


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)  # type: ignore[union-attr]
    found = copy.deepcopy(conv)
    shift = conv.bias.double() if conv.bias is not None else 0.0
    bias = (shift - norm.running_mean.double()) * scale + norm.bias.double()  # type: ignore[union-attr]
    found.weight = nn.Parameter(
        (conv.weight.double() * scale.view(-1, 1, 1, 1)).to(conv.weight.dtype).detach()
    )
    found.bias = nn.Parameter(bias.to(conv.weight.dtype).detach())
    return found


ACTIVATIONS: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh)


def pair(
    seed: int, depth: int = 2, *, head: bool = True, spread: float = 1.0
) -> tuple[nn.Sequential, nn.Sequential]:
    """Return a network of conv + norm + activation, and the same with every norm folded."""
    torch.manual_seed(seed)
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    channels = 3
    for i in range(depth):
        conv = nn.Conv2d(channels, 4 + 2 * i, 3, padding=i % 2, bias=seed % 2 == 0)
        norm = warm(nn.BatchNorm2d(4 + 2 * i), seed + i, spread)
        act = ACTIVATIONS[(seed + i) % len(ACTIVATIONS)]()
        before += [conv, norm, act]
        after += [folded(conv, norm), nn.Identity(), act]
        channels = 4 + 2 * i
    tail: list[nn.Module] = (
        [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 7)] if head else []
    )
    return nn.Sequential(*before, *tail).eval(), copy.deepcopy(nn.Sequential(*after, *tail)).eval()


def image(seed: int = 0, rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, 9, 9, generator=generator(seed))


# -- correct programs pass ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block", [*range(8), *(pytest.param(block, marks=pytest.mark.sweep) for block in range(8, 20))]
)
def test_no_false_alarm_on_correct_folds(block: int) -> None:
    for seed in range(12 * block, 12 * block + 12):
        a, b = pair(seed, 1 + seed % 4, head=seed % 3 > 0, spread=10.0 ** (seed % 3))
        verdict = verify(a, b, image(seed) * 10.0 ** (seed % 5 - 2), dynamic_batch=seed % 2 == 0)
        assert verdict.ok, f"seed {seed}: {verdict}"


def test_accepts_weights_of_one_whose_outputs_are_large() -> None:
    """Weights of one and ELU: correct networks differ by large absolute numbers."""

    def network(*convs: nn.Module) -> nn.Sequential:
        return nn.Sequential(*convs)

    g = generator(0)
    layers: list[nn.Conv1d] = []
    for _ in range(6):
        conv = nn.Conv1d(8, 8, 5, padding=2)
        nn.init.ones_(conv.weight)
        nn.init.constant_(conv.bias, 0.1)  # type: ignore[arg-type]
        layers.append(conv)
    scale = 0.5 + torch.rand(8, generator=g)

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * scale.view(-1, 1)

    first = network(*(m for conv in layers for m in (conv, Scaled(), nn.ELU())))
    second = copy.deepcopy(network(*(m for conv in layers for m in (conv, nn.Identity(), nn.ELU()))))
    for conv in second:
        if isinstance(conv, nn.Conv1d):
            conv.weight.data = (conv.weight.double() * scale.double().view(-1, 1, 1)).float()
            conv.bias.data = (conv.bias.double() * scale.double()).float()  # type: ignore[union-attr]
    x = 10 * torch.randn(2, 8, 48, generator=g)
    verdict = verify(first, second, x, dynamic_batch=True)
    assert verdict.outputs[0].max_error > 100.0
    assert verdict.ok, str(verdict)
    with torch.no_grad():
        second[6].weight[3, 5, 2] *= 1 + 1e-3  # type: ignore[index, operator]
    wrong = verify(first, second, x, dynamic_batch=True)
    assert not wrong.ok, str(wrong)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_accepts_what_a_norm_on_nearly_constant_maps_amplifies(value: float) -> None:
    """One over the root of eps multiplies the rounding of the weights some 300-fold."""
    a, b = pair(2, 1, head=False)
    a.append(nn.InstanceNorm2d(4)).append(nn.GroupNorm(2, 4))
    b.append(nn.InstanceNorm2d(4)).append(nn.GroupNorm(2, 4))
    verdict = verify(a.eval(), b.eval(), torch.full((2, 3, 9, 9), value), dynamic_batch=True)
    assert verdict.ok, str(verdict)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_accepts_correct_folds_in_any_float_dtype_and_catches_a_wrong_bias(
    dtype: torch.dtype, seed: int
) -> None:
    a, b = (m.to(dtype) for m in pair(seed, 2))
    convs = [m for m in a if isinstance(m, nn.Conv2d)]
    norms = [m for m in a if isinstance(m, nn.BatchNorm2d)]
    for i, (conv, norm) in enumerate(zip(convs, norms, strict=True)):
        b[3 * i] = folded(conv, norm)
    x = image(seed).to(dtype)
    verdict = verify(a, b, x, dynamic_batch=True)
    assert verdict.ok, str(verdict)
    assert verdict.outputs[0].dtype == str(dtype).removeprefix("torch.")
    assert (verdict.outputs[0].float64 is None) == (dtype == torch.float64)
    with torch.no_grad():
        b[0].bias += 1.0  # type: ignore[union-attr, operator]
    assert not verify(a, b, x, dynamic_batch=True).ok


def test_identical_modules_need_no_factor_in_float64() -> None:
    a, _ = pair(0)
    verdict = verify(a, a, image())
    assert verdict.ok
    assert verdict.outputs[0].float64 is not None
    assert verdict.outputs[0].float64.max_error == 0.0
    assert verdict.outputs[0].rounding_ratio == 1.0


# -- wrong programs do not ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_catches_one_coefficient_off_by_a_thousandth(seed: int) -> None:
    a, b = pair(seed, 1 + seed % 3)
    conv = b[0]
    with torch.no_grad():
        flat = conv.weight.view(-1)  # type: ignore[union-attr, operator]
        flat[int(flat.abs().argmax())] *= 1 + 1e-3
    verdict = verify(a, b, image(seed), dynamic_batch=True)
    assert not verdict.ok, str(verdict)
    with pytest.raises(VerificationError, match="times the rounding noise, allowed"):
        verdict.raise_if_failed()


@pytest.mark.parametrize("seed", range(6))
def test_catches_a_dropped_bias_and_swapped_channels(seed: int) -> None:
    a, b = pair(seed)
    dropped, swapped = copy.deepcopy(b), copy.deepcopy(b)
    with torch.no_grad():
        dropped[3].bias[1] = 0  # type: ignore[index, operator]
        order = torch.tensor([1, 0, 2, 3])
        swapped[0].weight.copy_(b[0].weight[order])  # type: ignore[union-attr, operator, index]
        swapped[0].bias.copy_(b[0].bias[order])  # type: ignore[union-attr, operator, index]
    baseline = Baseline(a, image(seed), dynamic_batch=True)
    assert baseline.compare(b).ok
    assert not baseline.compare(dropped).ok
    assert not baseline.compare(swapped).ok


def test_an_error_in_a_tiny_channel_does_not_hide_behind_a_large_one() -> None:
    class Scale(nn.Module):
        def __init__(self, values: Tensor) -> None:
            super().__init__()
            self.values = nn.Parameter(values)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.values.view(-1, 1, 1)

    values = torch.tensor([1e6, 1.0, 1e-6])
    wrong = values * torch.tensor([1.0, 1.0, 1.0 + 1e-4])
    verdict = verify(Scale(values), Scale(wrong), image())
    assert not verdict.ok
    assert verdict.outputs[0].native is not None
    assert verdict.outputs[0].native.worst_index[1] == 2


def test_catches_an_error_at_one_border_pixel() -> None:
    class Corner(nn.Module):
        def __init__(self, error: float) -> None:
            super().__init__()
            self.error = error

        def forward(self, x: Tensor) -> Tensor:
            y = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
            mask = torch.zeros_like(y)
            mask[:, :, 0, -1] = self.error
            return y + y * mask

    assert verify(Corner(0.0), Corner(0.0), image()).ok
    verdict = verify(Corner(0.0), Corner(1e-4), image())
    assert not verdict.ok
    assert verdict.outputs[0].native is not None
    assert verdict.outputs[0].native.worst_index[2:] == (0, 8)


# -- structure ----------------------------------------------------------------------------------------------


class Returns(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what(x)


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (lambda x: (x, x), lambda x: (x,), "it has 1 outputs"),
        (
            lambda x: {"a": x, "b": x},
            lambda x: {"a": x, "c": x},
            "its outputs are called a, c, expected a, b",
        ),
        (lambda x: {"a": x, "b": x + 1}, lambda x: {"b": x + 1, "a": x}, "in this order"),
        (lambda x: x, lambda x: (x,), "its outputs are called 0, expected output"),
        (lambda x: x, lambda x: x[:, :2], "has shape"),
        (lambda x: x, lambda x: x.double(), "is float64, expected float32"),
        (lambda x: x, lambda x: x.missing, "it failed at batch 2 .example.: AttributeError"),
        (lambda x: x, lambda x: "text", "is a str"),
    ],
    ids=["count", "name", "order", "tuple", "shape", "dtype", "raises", "type"],
)
def test_outputs_are_matched_in_count_order_name_shape_and_dtype(
    first: Any, second: Any, reason: str
) -> None:
    verdict = verify(Returns(first), Returns(second), image())
    assert not verdict.ok
    with pytest.raises(VerificationError, match=reason):
        verdict.raise_if_failed()


def test_nested_outputs_none_and_numbers() -> None:
    def both(x: Tensor) -> Any:
        return {"logits": x.flatten(1) * 2, "more": [x.sum((1, 2)), None, x.shape[0], 0.5]}

    verdict = verify(Returns(both), Returns(both), image(), dynamic_batch=True)
    assert verdict.ok, str(verdict)
    assert [output.name for output in verdict.outputs] == ["logits", "more.0", "more.2", "more.3"]
    assert verdict.batch_sizes == (1, 2, 5)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (lambda x: (x, None), lambda x: (x,), r"returns tuple\(value\), the reference tuple\(value, None\)"),
        (lambda x: (x, x), lambda x: [x, x], r"returns list\(value, value\)"),
        (lambda x: {"a": x, "b": None}, lambda x: {"a": x}, r"dict\(a: value, b: None\)"),
        (lambda x: (x, (x, ())), lambda x: (x, [x, ()]), r"tuple\(value, list\(value, tuple\(\)\)\)"),
        (lambda x: (x, x), lambda x: torch.return_types.max((x, x)), "returns max"),
    ],
    ids=["none", "list", "key", "nested", "named"],
)
def test_the_structure_of_the_outputs_counts(first: Any, second: Any, said: str) -> None:
    verdict = verify(Returns(first), Returns(second), image())
    assert not verdict.ok
    assert re.search(f"output structure differs.*{said}|are called", verdict.reason), verdict.reason
    assert not verify(Returns(second), Returns(first), image()).ok
    for same in (first, second):
        assert verify(Returns(same), Returns(same), image(), dynamic_batch=True).ok


@pytest.mark.parametrize(
    "what",
    [
        lambda x: Pair(x * 2, x),
        lambda x: [x.flatten(1).max(1), {"n": None}],
        lambda x: OrderedDict(b=x, a=x + 1),
        lambda x: (x.shape[0], x * 2),
    ],
    ids=["namedtuple", "list", "ordered", "number"],
)
def test_a_captured_graph_keeps_the_structure(what: Any) -> None:
    model = Returns(what).eval()
    for program in (capture(model, image()), restore(capture(model, image()))):
        verdict = verify(model, program, image())
        assert verdict.ok, verdict.reason


def test_keyword_inputs_and_both_kinds() -> None:
    class Scaled(nn.Module):
        def __init__(self, slope: float) -> None:
            super().__init__()
            self.slope = slope

        def forward(self, x: Tensor, *, scale: Tensor, flag: bool = True) -> Tensor:
            return x * scale * self.slope if flag else x

    keywords = {"x": image(), "scale": image(1)}
    assert verify(Scaled(2.0), Scaled(2.0), keywords, dynamic_batch=True).ok
    assert not verify(Scaled(2.0), Scaled(2.001), keywords, dynamic_batch=True).ok
    mixed = Inputs((image(),), {"scale": image(1), "flag": False})
    assert verify(Scaled(2.0), Scaled(3.0), mixed).ok


def test_an_input_without_a_batch_dimension_is_no_constant() -> None:
    class Times(nn.Module):
        def forward(self, x: Tensor, k: Tensor) -> Tensor:
            return x * k

    class Doubles(nn.Module):
        def forward(self, x: Tensor, k: Tensor) -> Tensor:
            return x * 2.0

    inputs = (image(), torch.tensor(2.0))
    assert verify(Times(), Times(), inputs, dynamic_batch=True).ok
    for dynamic in (True, False):
        assert not verify(Times(), Doubles(), inputs, dynamic_batch=dynamic).ok


@pytest.mark.parametrize(
    "x", [torch.arange(6).view(2, 3), torch.ones(2, 3).bool(), torch.ones(2, 3)], ids=lambda x: str(x.dtype)
)
def test_integer_inputs_are_said_to_keep_to_the_example(x: Tensor) -> None:
    twice = Returns(lambda x: x * 2.0)
    said = any("keep to the range of the example" in note for note in verify(twice, twice, x).notes)
    assert said == (not x.is_floating_point())


def test_non_contiguous_and_scalar_outputs() -> None:
    def both(x: Tensor) -> Any:
        return x.transpose(1, 3), x.mean(), torch.view_as_complex(x[..., :2].contiguous())

    right = verify(Returns(both), Returns(both), image())
    assert right.ok
    assert right.reason.startswith("3 outputs, ")
    wrong = verify(Returns(both), Returns(lambda x: (*both(x)[:2], both(x)[2] * 1.001)), image())
    assert [output.ok for output in wrong.outputs] == [True, True, False]
    assert wrong.reason == f"output '2': {wrong.outputs[2].reason}"
    more = verify(Returns(both), Returns(lambda x: tuple(y * 1.001 for y in both(x))), image())
    assert more.reason == f"output '0': {more.outputs[0].reason} (and 2 more outputs)"


# -- NaN, infinity, integers, nothing -----------------------------------------------------------------------


def test_nan_and_infinity_must_agree_in_place_and_nan_is_warned_about() -> None:
    def root(x: Tensor) -> Tensor:
        return torch.sqrt(x) + 1 / torch.relu(x)

    verdict = verify(Returns(root), Returns(root), image())
    assert verdict.ok, str(verdict)
    assert verdict.outputs[0].nan > 0
    assert any("NaN" in note for note in verdict.notes)
    filled = verify(Returns(root), Returns(lambda x: root(x).nan_to_num(0.0, torch.inf)), image())
    assert not filled.ok
    assert "got a finite value where the reference has NaN" in filled.reason
    infinite = verify(Returns(lambda x: x), Returns(lambda x: x / (x != x[0, 0, 0, 0])), image())
    assert "got +inf" in infinite.reason or "got -inf" in infinite.reason


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("right", [1.0, torch.inf, -torch.inf, torch.nan])
def test_one_value_of_another_kind_is_named(right: float, wrong: float) -> None:
    def last(value: float) -> nn.Module:
        return Returns(lambda x: torch.cat([x.flatten(1)[:, :-1], torch.full_like(x[:, 0, 0, :1], value)], 1))

    verdict = verify(last(right), last(wrong), image())
    words = {torch.inf: "+inf", -torch.inf: "-inf", 1.0: "a finite value"}
    assert verdict.ok == (words.get(right, "NaN") == words.get(wrong, "NaN"))
    if not verdict.ok:
        said = f"2 values differ in kind: got {words.get(wrong, 'NaN')} where the reference has "
        assert f"{said}{words.get(right, 'NaN')}, first at [0, 242] on 'example'" in verdict.reason
        assert verdict.outputs[0].differs_on == "example"


def test_overflow_of_the_reference_alone_is_no_difference() -> None:
    a = Returns(lambda x: (x * 60000) / 60000)
    b = Returns(lambda x: x * 1.0)
    verdict = verify(a, b, image().half())
    assert verdict.ok, str(verdict)


def test_nan_weights_leave_nothing_to_compare() -> None:
    a, _ = pair(0)
    with torch.no_grad():
        a[0].weight.fill_(torch.nan)  # type: ignore[union-attr, operator]
    with pytest.raises(VerificationError, match="is NaN on every input"):
        verify(a, a, image())


@pytest.mark.parametrize(
    "what", [lambda x: (), lambda x: None, lambda x: x[:, :0]], ids=["none", "None", "empty"]
)
def test_zero_comparisons_are_an_error(what: Any) -> None:
    with pytest.raises(VerificationError, match="nothing can be compared"):
        verify(Returns(what), Returns(what), image())


def test_integer_outputs_are_equal_where_rounding_does_not_decide() -> None:
    a, b = pair(3)

    def classes(net: nn.Module) -> nn.Module:
        return nn.Sequential(net, Returns(lambda y: y.argmax(1)))

    assert verify(classes(a), classes(b), image(), dynamic_batch=True).ok
    wrong = copy.deepcopy(b)
    with torch.no_grad():
        wrong[-1].bias[2] += 100  # type: ignore[index, operator]
    verdict = verify(classes(a), classes(wrong), image(), dynamic_batch=True)
    assert not verdict.ok
    assert verdict.outputs[0].mismatches > 0
    assert "values differ that rounding does not decide" in verdict.reason
    assert verdict.outputs[0].differs_on == "example"
    assert verdict.reason.endswith("on 'example'")


class Tie(nn.Module):
    """Which of two sums of the same numbers is the greater, as rounding tells."""

    def __init__(self, *, turned: bool, wrong: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(64, generator=torch.Generator().manual_seed(1)))
        self.turned, self.wrong = turned, wrong

    def forward(self, x: Tensor) -> Tensor:
        p = x * self.weight
        sums = [p[..., :32].sum(-1) + p[..., 32:].sum(-1), p[..., ::2].sum(-1) + p[..., 1::2].sum(-1)]
        greater = torch.stack(sums[::-1] if self.turned else sums, -1).argmax(-1)
        return 1 - greater if self.wrong else greater


def test_integers_that_few_draws_leave_decided_are_drawn_again() -> None:
    x = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
    baseline = Baseline(Tie(turned=False), x, dynamic_batch=True, draws=1)
    few = sum(int(mask.sum()) for mask in baseline.outputs[0].undecided)
    verdict = baseline.compare(Tie(turned=True))
    assert verdict.ok, str(verdict)
    assert verdict.outputs[0].undecided > few
    assert any("measured on 6" in note for note in verdict.notes)
    wrong = baseline.compare(Tie(turned=False, wrong=True))
    assert not wrong.ok
    assert wrong.outputs[0].mismatches > 0


def test_an_argmax_near_a_tie_is_no_failure() -> None:
    def tie(order: tuple[float, ...]) -> Any:
        def forward(x: Tensor) -> Any:
            y = x.flatten(1)
            for factor in order:
                y = y * factor
            y = torch.cat([y, y[:, :1] * (1 + 1e-8)], 1)
            return y, y.argmax(1)

        return Returns(forward)

    verdict = verify(tie((3.0, 1 / 3.0, 0.7)), tie((0.7, 1 / 3.0, 3.0)), image(), dynamic_batch=True)
    assert verdict.ok, str(verdict)
    assert verdict.outputs[0].top1_agreed == verdict.outputs[0].top1_checked


def test_rows_in_which_the_reference_overflows_have_no_class() -> None:
    """Logits of 1e5, 2e5 and 3e5 in float64 are infinities in float16, where none is the greatest."""
    model = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1e4], [2e4], [3e4]]).expand(3, 4))
    x = torch.tensor([[2.5, 2.5, 2.5, 2.5], [0.1, 0.1, 0.1, 0.1]], dtype=torch.float16)
    model = model.to(torch.float16).eval()
    turned = copy.deepcopy(model)
    verdict = verify(model, turned, x)
    assert verdict.ok, verdict
    assert verdict.outputs[0].top1_checked > 0
    with torch.no_grad():
        turned.weight.copy_(model.weight.flip(0))
    assert not verify(model, turned, x).ok


def test_top1_is_counted_for_rows_with_a_clear_margin() -> None:
    a, b = pair(5)
    output = verify(a, b, image(), dynamic_batch=True).outputs[0]
    assert 0 < output.top1_checked <= 8
    assert output.top1_agreed == output.top1_checked
    assert "top-1 agrees" in output.reason


# -- the caller's things ------------------------------------------------------------------------------------


def test_caller_is_untouched() -> None:
    a, b = pair(0)
    a.append(nn.Dropout(0.5)).train()
    b.append(nn.Dropout(0.5)).train()
    calls: list[int] = []
    a[0].register_forward_hook(lambda *_: calls.append(1))
    states = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    x, kept = image(), image()
    random = torch.get_rng_state()
    assert verify(a, b, x, dynamic_batch=True).ok
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(x, kept)
    assert all(part.training for m in (a, b) for part in m.modules())
    for m, state in zip((a, b), states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in m.state_dict().items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in m.parameters())


def test_modules_that_write_into_their_input_or_buffers() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1  # type: ignore[operator]
            return x.mul_(2.0)

    module = Counts()
    assert verify(module, module, image(), dynamic_batch=True).ok
    assert float(module.seen) == 0


def test_random_forward_sees_the_same_numbers_on_both_sides() -> None:
    noisy = Returns(lambda x: x + torch.rand(x.shape, dtype=x.dtype))
    assert verify(noisy, Returns(lambda x: torch.rand(x.shape, dtype=x.dtype) + x), image()).ok
    runner = TorchRunner(noisy)
    first = runner.run(Inputs((image(),)))["output"]
    torch.rand(1)  # whatever was drawn before
    assert torch.equal(first, runner.run(Inputs((image(),)))["output"])


def test_reference_that_raises_and_things_that_are_no_program() -> None:
    with pytest.raises(VerificationError, match=r"raised on the example inputs.*no attribute"):
        verify(Returns(lambda x: x.missing), nn.Identity(), image())
    with pytest.raises(VerificationError, match="cannot run a int"):
        verify(3, nn.Identity(), image())


def test_cases_that_the_reference_declines_are_said() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if float(x.abs().max()) == 0:
                raise ValueError("nothing to normalise")
            return x / x.abs().max()

    verdict = verify(Picky(), Picky(), image())
    assert verdict.ok
    assert "zeros" not in verdict.cases
    assert any("declined zeros" in note for note in verdict.notes)


def test_without_a_float64_run_the_verdict_says_so() -> None:
    class OnlyFloat32(nn.Module):
        def __init__(self, slope: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(slope))

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise TypeError("float32 only")
            return torch.tanh(x * self.weight)

    verdict = verify(OnlyFloat32(2.0), OnlyFloat32(2.0), image())
    assert verdict.ok
    assert "no float64 anchor" in verdict.anchor
    assert verdict.outputs[0].native is not None
    assert verdict.outputs[0].native.reference_max_error is None
    assert not verify(OnlyFloat32(2.0), OnlyFloat32(2.0001), image()).ok


def test_verdict_is_plain_data_and_text() -> None:
    a, b = pair(1)
    verdict = verify(a, b, image(), dynamic_batch=True, seed=4)
    assert isinstance(verdict, Verdict)
    assert verdict.seed == 4
    assert json.loads(json.dumps(dataclasses.asdict(verdict)))["ok"] is True
    assert "equal up to rounding" in str(verdict)
    assert "\n  8 cases (example, normal, " in str(verdict)
    assert "anchor: torch Sequential in float64" in str(verdict)
    assert verdict.raise_if_failed() is verdict
    native = verdict.outputs[0].native
    assert native is not None
    assert native.factor_needed <= native.factor
    assert native.resolution < 1e-4
    assert len(native.worst_index) == 2


class Partly(nn.Module):
    """One output without elements beside one with."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x[:, :0]


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_output_without_elements_is_compared_in_shape_and_dtype(dynamic: bool) -> None:
    x = torch.randn(3, 4, generator=generator(0))
    verdict = verify(Partly(), Partly(), x, dynamic_batch=dynamic)
    assert verdict.ok, str(verdict)
    assert verdict.outputs[1].elements == 0
    assert verdict.outputs[1].native is None
    assert verdict.outputs[1].reason == "no values: only shape and dtype were compared"

    class Other(Partly):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x[:, :0].long()

    assert "output '1' is int64" in verify(Partly(), Other(), x, dynamic_batch=dynamic).reason


def test_an_output_that_has_elements_in_some_runs_only() -> None:
    """The first run gives none: its shape depends on the values."""

    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x[x[:, 0] > 5.0]
            return y

    class Wrong(Positive):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x) * 1.001
            return y

    x = torch.randn(3, 4, generator=generator(0))
    verdict = verify(Positive(), Positive(), x)
    assert verdict.ok, str(verdict)
    assert verdict.outputs[0].elements > 0
    assert not verify(Positive(), Wrong(), x).ok


@pytest.mark.parametrize("spread", [0.0, 0.1], ids=["zeros", "weights"])
def test_an_output_that_never_changes_is_noted(spread: float) -> None:
    """Networks are often made with a last layer of zeros: equal outputs then say nothing of the rest."""

    def network(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        nn.init.constant_(made[2].weight, spread)  # type: ignore[arg-type]
        nn.init.constant_(made[2].bias, 0.5)  # type: ignore[arg-type]
        return made.eval()

    verdict = verify(network(1), network(2), torch.randn(2, 8, generator=generator(3)))
    assert verdict.ok is (spread == 0.0)
    assert any("the same on every input that was tried" in note for note in verdict.notes) is (spread == 0.0)
    alone = verify(network(1), network(1), torch.randn(1, 8, generator=generator(3)), samples=1)
    assert not any("the same on every input" in note for note in alone.notes)  # one case tells nothing of it
