"""optimize and inspect, end to end: results, verification modes, culprits, files, bad input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import graphsurgery as gs
from graphsurgery import pipeline
from graphsurgery.cost import Cost, op_name
from graphsurgery.graph import copy_graph_module, get_attr_value, set_attr

DEFAULT = (
    *("eliminate-identity", "eliminate-common-subexpressions", "commute-pointwise", "fold-norm-affine"),
    *("fold-affine", "fold-embedding"),
)
CHANGING = ("eliminate-identity", "fold-affine")  # those that find something in the network below


class Net(nn.Module):
    """conv + norm, ReLU, pool, dropout, two Linears with nothing between them; a mapping comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.4)
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 4)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.uniform_(0.5, 1.5)
            self.norm.bias.normal_()

    def forward(self, image: Tensor, *, scale: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.norm(self.conv(image)).relu()
        if scale is not None:
            hidden = hidden * scale[:, None, None, None]
        pooled = self.drop(hidden.mean((2, 3)))
        return {"pooled": pooled, "logits": self.second(self.first(pooled))}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def assert_same(a: Any, b: Any, **tolerance: float) -> None:
    leaves = [torch.utils._pytree.tree_flatten(value) for value in (a, b)]
    assert leaves[0][1] == leaves[1][1]
    for x, y in zip(leaves[0][0], leaves[1][0], strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def assert_agrees(reference: nn.Module, candidate: nn.Module, inputs: Any) -> None:
    """Equal up to what rounding explains, anchored in float64."""
    verdict = gs.verify(reference, candidate, inputs, dynamic_batch=True)
    assert verdict.ok, str(verdict)


# -- what comes out


def test_a_network_is_folded_verified_and_keeps_its_names(net: nn.Module, image: Tensor) -> None:
    result = gs.optimize(net, image)
    names = {name: type(module).__name__ for name, module in result.module.named_children()}
    assert names["conv"] == "Conv2d"
    assert "norm" not in names
    assert [kind for kind in names.values() if kind == "Linear"] == ["Linear"]
    report = result.report
    assert {change.kind for change in report.changes} == {"dropout", "conv2d+batch_norm", "linear+linear"}
    assert report.verification is not None
    assert report.verification.ok
    assert report.passes == DEFAULT
    assert not report.failures
    assert result.original is net
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 5, 5, generator=torch.Generator().manual_seed(batch))
        assert_agrees(net, result.module, x)


def test_a_float64_network_agrees_to_1e_10(net: nn.Module, image: Tensor) -> None:
    net, image = net.double(), image.double()
    # what every fold has to keep in float64; wrong ones are off by 1e-2 and more
    assert_same(gs.optimize(net, (image,)).module(image), net(image), rtol=1e-10, atol=1e-10)


def test_keyword_inputs_keep_the_signature(net: nn.Module, image: Tensor) -> None:
    inputs = {"image": image, "scale": torch.tensor([0.5, 2.0])}
    result = gs.optimize(net, inputs)
    assert_agrees(net, result.module, inputs)
    assert [spec.name for spec in result.report.captured.inputs] == ["image", "scale"]
    assert [spec.shape[1:] for spec in result.report.captured.outputs] == [("6",), ("4",)]


def test_strided_conv_flatten_linear_becomes_one_linear(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 50, 5, stride=2), nn.Flatten(), nn.Linear(1250, 100)).double().eval()
    x = torch.randn(3, 5, 13, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    result = gs.optimize(model, x)
    (linear,) = (module for module in result.module.modules() if isinstance(module, nn.Linear))
    assert (linear.in_features, linear.out_features) == (845, 100)
    assert_same(result.module(x), model(x), rtol=1e-10, atol=1e-10)  # as above
    assert result.report.before.macs == 5 * 5 * 5 * 50 * 5 * 5 + 1250 * 100
    assert result.report.after.macs == 845 * 100


def test_the_callers_model_is_untouched(image: Tensor) -> None:
    torch.manual_seed(0)
    net = Net().train()
    net.drop.eval()
    calls: list[int] = []
    net.conv.register_forward_hook(lambda *_: calls.append(1))
    net.first.weight.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = {name: module.training for name, module in net.named_modules()}
    seed = torch.get_rng_state()
    result = gs.optimize(net, image)
    assert torch.equal(torch.get_rng_state(), seed)
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert not net.first.weight.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert any("training mode" in note for note in result.report.captured.notes)
    assert_agrees(net, result.module, image)


def test_an_exported_program_is_taken_with_its_own_inputs(net: nn.Module, image: Tensor) -> None:
    shapes = {"image": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(net, (image,), dynamic_shapes=shapes)
    result = gs.optimize(program)
    assert result.report.verification is not None
    assert result.report.verification.ok
    assert_agrees(net, result.module, image)


def test_the_report_makes_the_round_trip(net: nn.Module, image: Tensor) -> None:
    report = gs.optimize(net, image).report
    assert gs.Report.from_json(report.to_json()) == report
    assert {"capture", "passes", "restore", "verify", "pass:fold-affine"} <= set(report.seconds)
    assert report.before.layers["norm"] == 1
    assert "norm" not in report.after.layers
    assert report.after.parameters == 6 * 3 * 9 + 6 + 6 * 4 + 4
    assert "conv2d + batch_norm -> conv2d" in str(report)


# -- which passes


def test_named_passes_run_in_the_order_given(net: nn.Module, image: Tensor) -> None:
    only = gs.optimize(net, image, passes=["eliminate-identity"]).report
    assert (only.passes, {change.pass_name for change in only.changes}) == (DEFAULT[:1], {DEFAULT[0]})
    both = gs.optimize(net, image, passes=[gs.passes.FoldAffine(), "eliminate-identity"]).report
    assert both.passes == ("fold-affine", "eliminate-identity")
    none = gs.optimize(net, image, passes=[])
    assert not none.report.changes
    assert_same(none.module(image), net(image))


def test_an_unknown_pass_is_named_before_any_work(net: nn.Module) -> None:
    with pytest.raises(gs.PassError, match="did you mean 'fold-affine'"):
        gs.optimize(net, None, passes=["fold-afine"])


def test_max_param_growth_reaches_the_passes(net: nn.Module, image: Tensor) -> None:
    chosen = pipeline._with_option(gs.passes.default_passes(), "max_param_growth", 1.5)
    growth = {item.name: getattr(item, "max_param_growth", None) for item in chosen}
    assert growth == {**dict.fromkeys(DEFAULT), "fold-affine": 1.5}
    assert gs.optimize(net, image, max_param_growth=1.5).report.changes


def test_events_tell_stages_and_passes(net: nn.Module, image: Tensor) -> None:
    events: list[gs.Event] = []
    gs.optimize(net, image, on_event=events.append)
    stages = [(e.kind, e.pass_name) for e in events if e.round == 0]
    names = ("capture", "passes", "restore", "verify")
    assert stages == [(f"stage-{kind}", name) for name in names for kind in ("start", "done")]
    assert all(e.total == 4 for e in events if e.round == 0)
    assert [e.pass_name for e in events if e.kind == "pass-done" and e.round == 1] == list(DEFAULT)


# -- verification modes


def test_off_verifies_nothing_and_says_so(net: nn.Module, image: Tensor) -> None:
    report = gs.optimize(net, image, verify="off").report
    assert report.verification is None
    assert report.verify_mode == "off"
    assert "not verified" in str(report)


def test_each_pass_is_checked_in_torch_and_on_onnxruntime(net: nn.Module, image: Tensor) -> None:
    report = gs.optimize(net, image, verify="each-pass").report
    assert [check.pass_name for check in report.pass_checks] == list(CHANGING)
    assert all(check.ok and check.onnx is not None and check.onnx.ok for check in report.pass_checks)
    assert "onnxruntime" in str(report)


def test_another_mode_is_refused(net: nn.Module, image: Tensor) -> None:
    with pytest.raises(ValueError, match="got 'sometimes'"):
        gs.optimize(net, image, verify="sometimes")  # type: ignore[arg-type]


# -- culprits


def change(name: str, node: fx.Node) -> gs.Change:
    return gs.Change(name, "test", (gs.NodeRef.of(node),), (), (), Cost(), Cost())


@dataclass(frozen=True)
class WrongWeight(gs.Pass):
    """Multiplies one coefficient of the conv by 1.01, once; keeps everything it declares but the values."""

    name: ClassVar[str] = "wrong-weight"
    summary: ClassVar[str] = "a mistake"

    def run(self, gm: fx.GraphModule) -> gs.PassResult:
        out = copy_graph_module(gm)
        node = next(node for node in out.graph.nodes if op_name(node) == "conv2d")
        if str(node.args[1].target) == "wrong.weight":
            return gs.PassResult(gm)
        weight = get_attr_value(out, str(node.args[1].target)).detach().clone()
        weight[0, 0, 1, 1] *= 1.01
        set_attr(out, "wrong.weight", weight, parameter=False)
        with out.graph.inserting_before(node):
            new = out.graph.get_attr("wrong.weight")
        new.meta = dict(node.args[1].meta)
        node.args = (node.args[0], new, *node.args[2:])
        out.recompile()
        return gs.PassResult(out, (change(self.name, node),))


ORDERS = [("wrong", "identity", "fold"), ("identity", "wrong", "fold"), ("identity", "fold", "wrong")]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_the_final_check_names_the_culprit_and_leaves_it_out(
    net: nn.Module, image: Tensor, order: tuple[str, ...]
) -> None:
    by_name: Mapping[str, Any] = {"wrong": WrongWeight(), "identity": DEFAULT[0], "fold": CHANGING[1]}
    events: list[gs.Event] = []
    result = gs.optimize(net, image, passes=[by_name[name] for name in order], on_event=events.append)
    (failure,) = result.report.failures
    assert (failure.pass_name, failure.code) == ("wrong-weight", "verification")
    assert {change.pass_name for change in result.report.changes} == set(CHANGING)
    assert result.report.verification is not None
    assert result.report.verification.ok
    assert_agrees(net, result.module, image)
    assert [e.pass_name for e in events if e.kind == "pass-failed"] == ["wrong-weight"]
    assert "rolled back: wrong-weight (verification" in str(result.report)


def test_each_pass_rolls_the_culprit_back_at_once(net: nn.Module, image: Tensor) -> None:
    report = gs.optimize(net, image, passes=[WrongWeight(), *DEFAULT], verify="each-pass").report
    assert [(f.pass_name, f.code) for f in report.failures] == [("wrong-weight", "check")]
    assert (report.pass_checks[0].pass_name, report.pass_checks[0].ok) == ("wrong-weight", False)
    assert report.pass_checks[0].onnx is None
    assert {change.pass_name for change in report.changes} == set(CHANGING)


def test_a_wrong_restore_is_no_passs_fault(
    net: nn.Module, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(gm: fx.GraphModule) -> fx.GraphModule:
        module = gs.restore(gm)
        with torch.no_grad():
            module.conv.weight = nn.Parameter(module.conv.weight * 1.01)
        return module

    monkeypatch.setattr(pipeline.proof, "restore", wrong)
    with pytest.raises(gs.VerificationError, match="restored from the graph differs"):
        gs.optimize(net, image)


@pytest.mark.parametrize("verify", ["final", "each-pass"])
def test_a_wrong_capture_is_no_passs_fault(
    net: nn.Module, image: Tensor, monkeypatch: pytest.MonkeyPatch, verify: Any
) -> None:
    def wrong(model: Any, inputs: Any, *, dynamic_shapes: Any, copy: bool) -> fx.GraphModule:
        return WrongWeight().run(gs.capture(model, inputs)).graph_module

    monkeypatch.setattr(pipeline, "capture", wrong)
    with pytest.raises(gs.VerificationError, match="differs"):
        gs.optimize(net, image, verify=verify)


# -- files


def test_export_writes_a_verified_file(net: nn.Module, image: Tensor, tmp_path: Path) -> None:
    result = gs.optimize(net, image)
    done = result.export_onnx(tmp_path / "net.onnx", measure=True)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    assert done.verdict is not None
    assert done.verdict.ok
    report = result.report
    assert report.onnx is not None
    assert report.onnx.size_bytes == (tmp_path / "net.onnx").stat().st_size == report.after.size_bytes
    assert report.before.size_bytes is not None
    assert report.before.size_bytes > 0
    assert report.before.latency_ms is not None
    assert report.after.latency_ms is not None
    assert gs.Report.from_json(report.to_json()) == report
    assert gs.verify(net, tmp_path / "net.onnx", image, dynamic_batch=True).ok


def test_what_cannot_be_measured_is_a_note(
    net: nn.Module, image: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gm: fx.GraphModule) -> nn.Module:
        raise gs.ExportError("Net cannot be translated to ONNX")

    result = gs.optimize(net, image)
    monkeypatch.setattr(pipeline.result, "restore", fail)
    done = result.export_onnx(tmp_path / "net.onnx", measure=True)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    assert result.report.onnx is not None
    assert result.report.after.size_bytes == done.size_bytes
    assert (result.report.before.latency_ms, result.report.after.latency_ms) == (None, None)
    assert "not compared with the original's: Net cannot" in result.report.captured.notes[-1]
    assert "note: size and latency were not compared" in str(result.report)


def test_a_file_that_differs_is_not_left_behind(net: nn.Module, image: Tensor, tmp_path: Path) -> None:
    result = gs.optimize(net, image)
    with torch.no_grad():
        result.module.conv.weight[0, 0, 1, 1] += 0.01
    with pytest.raises(gs.VerificationError):
        result.export_onnx(tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
    assert result.report.onnx is None


def test_an_unverified_result_can_still_be_exported_verified(
    net: nn.Module, image: Tensor, tmp_path: Path
) -> None:
    result = gs.optimize(net, image, verify="off")
    done = result.export_onnx(tmp_path / "net.onnx")
    assert done.verdict is not None
    assert done.verdict.ok


def test_save_writes_a_program_with_a_free_batch(net: nn.Module, image: Tensor, tmp_path: Path) -> None:
    result = gs.optimize(net, image[:1])
    path = result.save(tmp_path / "net.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt2"]
    loaded = torch.export.load(path).module()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 5, 5, generator=torch.Generator().manual_seed(batch))
        assert_agrees(net, loaded, x)


def test_a_saved_program_that_differs_is_not_kept(
    net: nn.Module, image: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = gs.optimize(net, image)
    write = torch.export.save

    def spoilt(program: Any, file: Any) -> None:
        with torch.no_grad():
            next(value for value in program.state_dict.values() if value.is_floating_point()).mul_(1.01)
        write(program, file)

    monkeypatch.setattr(torch.export, "save", spoilt)
    with pytest.raises(
        gs.VerificationError, match=r"net\.pt2 is not kept, as what is loaded from it differs"
    ):
        result.save(tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())
    result.save(tmp_path / "net.pt2", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt2"]


def test_save_to_nowhere_is_one_clear_error(net: nn.Module, image: Tensor, tmp_path: Path) -> None:
    with pytest.raises(
        gs.ExportError,
        match=r"^cannot write .*/missing/net\.pt2: the directory .*/missing does not exist; create",
    ):
        gs.optimize(net, image).save(tmp_path / "missing" / "net.pt2")
    assert not list(tmp_path.iterdir())


# -- inspect


def test_inspect_finds_the_same_and_changes_nothing(net: nn.Module, image: Tensor) -> None:
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = gs.inspect(net, image)
    assert found.changes == gs.optimize(net, image).report.changes
    assert found.verification is None
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_inspect_names_what_refuses(image: Tensor) -> None:
    torch.manual_seed(0)
    bottleneck = nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 5)).eval()
    (refusal,) = gs.inspect(bottleneck, image).refusals
    assert refusal.code == "costs-more"
    assert refusal.cost_before is not None
    assert refusal.cost_after is not None
    assert [ref.module for ref in refusal.nodes] == ["0", "1"]


# -- bad input


@pytest.mark.parametrize("name", ["conv.weight", "norm.running_var", "second.bias"])
def test_nan_weights_are_named(net: nn.Module, image: Tensor, name: str) -> None:
    with torch.no_grad():
        net.state_dict()[name].view(-1)[1] = torch.nan
    with pytest.raises(gs.CaptureError, match=rf"'{name}' of Net holds NaN in 1 of \d+ values"):
        gs.optimize(net, image)


def test_no_inputs_is_one_clear_error(net: nn.Module) -> None:
    with pytest.raises(gs.CaptureError, match="no example inputs"):
        gs.optimize(net)


def test_a_wrong_shape_is_one_clear_error(net: nn.Module, image: Tensor) -> None:
    with pytest.raises(gs.CaptureError, match=r"2x2x5x5 float32.*test_pipeline\.py"):
        gs.optimize(net, image[:, :2])
