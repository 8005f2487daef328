"""optimize_parts, end to end: what is folded, what stays, wrong grafts, files."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folding import seeded
from partial_models import block, loop, part, picture, spoil_after_its_check, statuses
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import graphsurgery as gs
from graphsurgery.graph import tensor_bytes
from graphsurgery.partial import fold


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return loop()


@pytest.fixture(scope="module")
def result(model: nn.Module) -> gs.PartsResult:
    return gs.optimize_parts(model, picture(2, 3, 8, 8))


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# -- what is folded


def test_folds_the_parts_around_a_loop_that_depends_on_values(
    model: nn.Module, result: gs.PartsResult
) -> None:
    assert statuses(result) == {"": "not-captured", "stem": "folded", "body": "folded", "head": "folded"}
    assert "while" in part(result, "").reason
    assert part(result, "body").calls == 3
    assert not [module for module in result.module.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len([module for module in result.module.modules() if isinstance(module, nn.Linear)]) == 1
    assert result.verdict is not None
    assert result.verdict.ok
    assert result.verdict.decided
    # batch, height and width are free, though the only call had one value of each
    for shape in ((2, 3, 8, 8), (1, 3, 8, 8), (3, 3, 5, 12)):
        assert_close(result.module(picture(*shape, seed=1)), model(picture(*shape, seed=1)))


def test_the_result_is_a_module_of_the_same_class(model: nn.Module, result: gs.PartsResult) -> None:
    assert type(result.module) is type(model)
    x = picture(3, 3, 6, 6)
    expected = model(x)
    file = io.BytesIO()
    torch.save(result.module, file)
    file.seek(0)
    for module in (
        result.module.eval(),
        copy.deepcopy(result.module),
        torch.load(file, weights_only=False),
    ):
        assert_close(module(x), expected)
    fresh = copy.deepcopy(result.module)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh.load_state_dict(result.module.state_dict())
    assert_close(fresh(x), expected)


def test_the_callers_model_is_untouched() -> None:
    model = loop().train()
    state = {name: tensor_bytes(tensor).clone() for name, tensor in model.state_dict().items()}
    tables = [dict(vars(module)) for module in model.modules()]
    gs.optimize_parts(model, picture(2, 3, 4, 4), verify="off", keep=["stem", "body"])
    assert [dict(vars(module)) for module in model.modules()] == tables
    assert all(torch.equal(tensor_bytes(model.state_dict()[name]), value) for name, value in state.items())


class Attended(nn.Module):
    """A packed sequence (no tensor) between conv blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = block(3, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Sequential(nn.Linear(6, 12), nn.Dropout(), nn.Linear(12, 2))

    def forward(self, x: Tensor, *, lengths: list[int]) -> Tensor:
        steps = self.features(x).mean(2).transpose(1, 2)
        packed = pack_padded_sequence(steps, lengths, batch_first=True)
        return self.head(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])


def test_folds_around_an_lstm_of_packed_sequences() -> None:
    model = seeded(Attended).double().eval()
    result = gs.optimize_parts(model, picture(3, 3, 4, 9), {"lengths": [9, 5, 2]})
    assert statuses(result) == {"": "not-captured", "features": "folded", "head": "folded"}
    x, lengths = picture(2, 3, 6, 7, seed=1), [7, 3]
    assert_close(result.module(x, lengths=lengths), model(x, lengths=lengths))


class Sign(torch.autograd.Function):
    """The sign, with a gradient of its own: numpy inside, which no tracer looks into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy().copy()).sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Binary(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Sign.apply(x)


@pytest.mark.sweep
def test_folds_around_an_operator_that_cannot_be_traced() -> None:
    model = seeded(lambda: nn.Sequential(block(3, 4), Binary(), block(4, 5))).double().eval()
    result = gs.optimize_parts(model, picture(2, 3, 6, 6))
    assert statuses(result) == {"": "not-captured", "0": "folded", "2": "folded"}
    x = picture(4, 3, 7, 5, seed=1)
    assert_close(result.module(x), model(x))


def test_a_model_that_can_be_captured_is_one_part() -> None:
    model = seeded(lambda: nn.Sequential(block(3, 4), block(4, 5))).double().eval()
    result = gs.optimize_parts(model, picture(1, 3, 6, 6))
    assert statuses(result) == {"": "folded"}
    assert isinstance(result.module, torch.fx.GraphModule)
    x = picture(3, 3, 7, 5, seed=1)
    assert_close(result.module(x), model(x))


class Twice(nn.Module):
    """One block under two names, called with other sizes at each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = block(3, 3)
        self.again = nn.ModuleList([self.first, nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        if x.sum().item() > 1e9:
            return x
        return self.again[0](self.first(x)[..., ::2])


def test_a_shared_module_is_replaced_at_all_its_paths() -> None:
    model = seeded(Twice).double().eval()
    result = gs.optimize_parts(model, picture(2, 3, 8, 8))
    assert part(result, "first").also == ("again.0",)
    assert part(result, "first").calls == 2
    assert result.module.first is result.module.again[0]
    assert isinstance(result.module.first, torch.fx.GraphModule)
    x = picture(1, 3, 5, 9, seed=1)
    assert_close(result.module(x), model(x))


class Scaled(nn.Module):
    """A block behind whose number tracing bakes the width in."""

    def __init__(self) -> None:
        super().__init__()
        self.block = block(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) / float(x.shape[3])


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaled = Scaled()

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x) if x.sum().item() < 1e9 else x


def test_a_part_that_would_take_fewer_sizes_is_taken_apart() -> None:
    model = seeded(Fixed).double().eval()
    result = gs.optimize_parts(model, picture(2, 3, 6, 6))
    assert statuses(result) == {"": "not-captured", "scaled": "narrow", "scaled.block": "folded"}
    x = picture(2, 3, 6, 7, seed=1)
    assert_close(result.module(x), model(x))
    x = picture(2, 3, 6, 6)
    fixed = gs.optimize_parts(model, x, fixed_sizes=True, verify="off")
    assert statuses(fixed) == {"": "not-captured", "scaled": "folded"}
    assert_close(fixed.module(x), model(x))
    # two calls of different widths cannot be calls of one such graph
    more = gs.optimize_parts(model, x, further_calls=[picture(2, 3, 6, 7)], fixed_sizes=True, verify="off")
    assert statuses(more) == {"": "not-captured", "scaled": "sizes", "scaled.block": "folded"}


class Corner(nn.Module):
    """A block that is called with one sample and one position."""

    def __init__(self) -> None:
        super().__init__()
        self.block = block(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if x.sum().item() < 1e9 else x


def test_sizes_of_one_are_free_as_well() -> None:
    model = seeded(Corner).double().eval()
    result = gs.optimize_parts(model, picture(1, 3, 1, 1))
    assert statuses(result) == {"": "not-captured", "block": "folded"}
    for shape in ((1, 3, 1, 1), (2, 3, 4, 5), (3, 3, 1, 2)):
        assert_close(result.module(picture(*shape, seed=1)), model(picture(*shape, seed=1)))


class Shrinking(nn.Module):
    """Strided blocks that leave one position of the map they are shown."""

    def __init__(self) -> None:
        super().__init__()
        strided = [nn.Conv2d(3, 3, 3, stride=2, padding=1) for _ in range(3)]
        self.blocks = nn.Sequential(strided[0], nn.BatchNorm2d(3), strided[1], nn.ReLU(), strided[2])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x) if x.sum().item() < 1e9 else x


def test_maps_that_shrink_to_one_position_are_free_as_well() -> None:
    model = seeded(Shrinking).double().eval()
    result = gs.optimize_parts(model, picture(2, 3, 4, 4))
    assert statuses(result) == {"": "not-captured", "blocks": "folded"}
    for shape in ((2, 3, 4, 4), (1, 3, 17, 5), (3, 3, 9, 20)):
        assert_close(result.module(picture(*shape, seed=1)), model(picture(*shape, seed=1)))


def test_nothing_is_grafted_that_changes_nothing() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.sum() < 1e9 else x

    result = gs.optimize_parts(seeded(Plain).eval(), torch.randn(2, 4))
    assert statuses(result) == {"": "not-captured", "net": "unchanged"}
    assert type(result.module.net) is nn.Sequential
    assert "no part was folded" in str(result.report)
    with pytest.raises(gs.ExportError, match="nothing to write"):
        result.export_onnx("nowhere")


# -- wrong grafts


def test_detects_a_wrong_fold_in_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fold.optimize

    def wrong(module: nn.Module, *args: Any, **kwargs: Any) -> gs.OptimizeResult:
        made = right(module, *args, **kwargs)
        if isinstance(module[0], nn.Linear):
            with torch.no_grad():
                next(made.module.parameters()).view(-1)[0] += 1e-2
        return made

    monkeypatch.setattr(fold, "optimize", wrong)
    model = loop()
    result = gs.optimize_parts(model, picture(1, 3, 6, 6), keep=["body", ""])
    assert statuses(result)["head"] == "differs"
    assert statuses(result)["stem"] == "folded"
    assert_close(result.module(picture(2, 3, 6, 6)), model(picture(2, 3, 6, 6)))


@pytest.mark.parametrize("index", [pytest.param(0, marks=pytest.mark.sweep), 1])
def test_detects_and_undoes_a_wrong_graft(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = (nn.Conv2d, nn.Linear)[index]
    spoil_after_its_check(monkeypatch, lambda module: isinstance(module[0], kind))
    model = loop()
    result = gs.optimize_parts(model, picture(2, 3, 6, 6), keep=["body", ""])
    wrong, other = [("stem", "head"), ("head", "stem")][index]
    assert statuses(result)[wrong] == "whole-differs"
    assert "rounding noise" in part(result, wrong).reason
    assert statuses(result)[other] == "folded"
    assert type(result.module.get_submodule(wrong)) is nn.Sequential
    assert result.verdict is not None
    assert result.verdict.ok
    assert_close(result.module(picture(2, 3, 6, 6)), model(picture(2, 3, 6, 6)))


def test_a_model_that_differs_from_itself_is_said_so() -> None:
    turn = [0]

    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            turn[0] += 1
            return self.block(x) * (1 + 0.1 * turn[0])

    with pytest.raises(gs.VerificationError, match="differs from itself"):
        gs.optimize_parts(seeded(Random).double().eval(), picture(2, 3, 4, 4))


# -- reports and files


def test_the_report_tells_everything(result: gs.PartsResult) -> None:
    assert gs.PartsReport.from_json(result.report.to_json()) == result.report
    text = str(result.report)
    assert "stem [Sequential]" in text
    assert "not-captured" in text
    assert "the whole: 1 output" in text
    head = part(result, "head").report
    assert head is not None
    assert head.before.macs > head.after.macs
    with pytest.raises(ValueError, match="schema version"):
        gs.PartsReport.from_json(json.dumps({"schema_version": 0}))


def test_the_report_tells_parts_apart_that_have_long_names(result: gs.PartsResult) -> None:
    long = "_".join(["branch"] * 9)
    parts = [dataclasses.replace(part, path=f"{long}_{part.path}") for part in result.report.parts]
    text = str(dataclasses.replace(result.report, parts=tuple(parts)))
    shown = "".join(row.partition("│")[0].strip() for row in text.splitlines())
    for found in parts:
        if found.status == "folded":
            assert found.path in shown, text


@pytest.mark.sweep  # the default run writes one on the command line
def test_each_part_is_exported_and_verified(tmp_path: Path) -> None:
    result = gs.optimize_parts(loop().float(), picture(2, 3, 6, 6).float(), keep=["body", "head"])
    done = result.export_onnx(tmp_path / "parts")
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["stem.onnx"]
    verdict = done["stem"].verdict
    assert verdict is not None
    assert verdict.ok
    record = next(part.report for part in result.report.parts if part.path == "stem")
    assert record is not None
    assert record.onnx is not None


def test_a_part_that_cannot_be_exported_is_said_so(result: gs.PartsResult, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(gs.ExportError, match="cannot be made"):
        result.export_onnx(tmp_path / "file")


# -- what is refused at once


def test_optimize_names_the_way_out(model: nn.Module) -> None:
    with pytest.raises(gs.CaptureError, match=r"gs\.optimize_parts"):
        gs.optimize(model, picture(2, 3, 8, 8))


def test_wrong_arguments_are_said_at_once(model: nn.Module) -> None:
    x = picture(2, 3, 8, 8)
    with pytest.raises(ValueError, match="no module of Loop"):
        gs.optimize_parts(model, x, keep=["stam"])
    with pytest.raises(ValueError, match="'final', 'each-pass' or 'off'"):
        gs.optimize_parts(model, x, verify="never")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give it once"):
        gs.optimize_parts(model, {"x": x}, {"x": x})
    with pytest.raises(gs.PassError, match="no pass named"):
        gs.optimize_parts(model, x, passes=["fold-nothing"])
    with pytest.raises(gs.CaptureError, match="fails on the arguments"):
        gs.optimize_parts(model, x[0, 0])
    with pytest.raises(gs.CaptureError, match=r"expected an nn\.Module"):
        gs.optimize_parts(torch.relu, x)  # type: ignore[arg-type]


# -- what a module keeps or is told besides its arguments


class Block(nn.Module):
    """Convolution and norm; `told`, `first` and `size` are what the tests below do with it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = block(3, 3)
        self.scale, self.size = 1.0, (0, 0)
        self.first: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x) * self.scale
        return found


class Caching(Block):
    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = x.mean((2, 3), keepdim=True)
        return super().forward(x - self.first)


class Sizing(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.size = (x.shape[2], x.shape[3])
        return super().forward(x)


class Around(nn.Module):
    """A loop that depends on values, so that only the block in it can be captured."""

    def __init__(self, inner: Block, *, tells: bool = False, reads: str = "") -> None:
        super().__init__()
        self.block, self.tells, self.reads = inner, tells, reads

    def forward(self, x: Tensor) -> Tensor:
        if self.tells:
            self.block.scale = 1.0 / x.shape[-1]
        y: Tensor = self.block(x)
        while y.abs().max() > 10.0:
            y = y / 2
        if self.reads == "size":
            return y * self.block.size[1]
        return y * self.block.scale if self.reads else y


def around(kind: type[Block] = Block, **options: Any) -> nn.Module:
    return seeded(lambda: Around(kind(), **options)).double().eval()


def test_what_is_set_from_outside_is_no_constant() -> None:
    """As Swin of some packages sets `block.H, block.W` before each call."""
    model = around(tells=True)
    result = gs.optimize_parts(model, picture(2, 3, 8, 16))
    assert statuses(result)["block"] == "keeps-state"
    assert statuses(result)["block.body"] == "folded"
    assert_close(result.module(picture(2, 3, 16, 8)), model(picture(2, 3, 16, 8)))


def test_what_the_first_input_filled_is_no_constant() -> None:
    model = around(Caching)
    result = gs.optimize_parts(model, picture(2, 3, 8, 8))
    assert statuses(result)["block"] == "keeps-state"
    assert statuses(result)["block.body"] == "folded"
    fresh, other = copy.deepcopy(model), copy.deepcopy(result.module)
    for seed in (3, 4):
        assert_close(other(picture(2, 3, 8, 8, seed=seed)), fresh(picture(2, 3, 8, 8, seed=seed)))


def test_what_each_call_sets_and_others_read_stays() -> None:
    model = around(Sizing, reads="size")
    result = gs.optimize_parts(model, picture(2, 3, 8, 16))
    assert statuses(result)["block"] in ("read", "keeps-state")
    assert_close(result.module(picture(2, 3, 16, 8)), model(picture(2, 3, 16, 8)))


def test_a_number_that_others_read_is_on_the_graph_and_its_copies() -> None:
    model = around(reads="scale")
    model.get_submodule("block").scale = 0.5  # type: ignore[assignment]
    result = gs.optimize_parts(model, picture(2, 3, 8, 8))
    assert statuses(result)["block"] == "folded"
    x = picture(1, 3, 6, 9)
    file = io.BytesIO()
    torch.save(result.module, file)
    file.seek(0)
    for module in (result.module, copy.deepcopy(result.module), torch.load(file, weights_only=False)):
        assert_close(module(x), model(x))


def test_an_array_of_numpy_is_compared_like_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    class ToNumpy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = block(3, 3)

        def forward(self, x: Tensor) -> Any:
            return self.body(x).numpy()

    model, x = seeded(ToNumpy).double().eval(), picture(2, 3, 8, 8)
    result = gs.optimize_parts(model, x)
    assert statuses(result)["body"] == "folded"
    with torch.no_grad():
        assert_close(torch.from_numpy(result.module(x)), torch.from_numpy(model(x)))
    spoil_after_its_check(monkeypatch, lambda module: True)
    assert statuses(gs.optimize_parts(model, x))["body"] == "whole-differs"


class Narrowing(nn.Module):
    """A backbone whose last map has one position, which is captured on larger pictures."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            (nn.Conv2d(3 if first else 8, 8, 3, 2, padding=1), nn.BatchNorm2d(8))
            for first in (True, False, False, False)
        ]
        self.backbone = nn.Sequential(*(layer for pair in layers for layer in pair))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.backbone(x)
        return y if y.sum() > 0 else -y


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("side", [16, 64])
def test_work_is_counted_at_the_sizes_of_the_call(side: int, batch: int) -> None:
    torch.manual_seed(0)
    result = gs.optimize_parts(Narrowing().eval(), torch.randn(batch, 3, side, side))
    found = part(result, "backbone")
    assert found.status == "folded", found.reason
    assert found.report is not None
    positions = [(side // 2**step) ** 2 for step in (1, 2, 3, 4)]
    by_hand = 8 * 27 * positions[0] + 8 * 72 * sum(positions[1:])
    assert found.report.before.macs == found.report.after.macs == by_hand
    assert found.report.after.flops < found.report.before.flops


def test_a_part_that_takes_more_work_in_the_calls_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever pays on the larger pictures of the capture."""

    def dearer(self: gs.OptimizeResult, shapes: object) -> None:
        more = dataclasses.replace(self.report.before, flops=self.report.before.flops + 1)
        self.report = dataclasses.replace(self.report, after=more)

    monkeypatch.setattr(gs.OptimizeResult, "count_at", dearer)
    found = part(gs.optimize_parts(Narrowing().eval(), torch.randn(2, 3, 16, 16)), "backbone")
    assert found.status == "unchanged"
    assert "take more work in the calls" in found.reason
