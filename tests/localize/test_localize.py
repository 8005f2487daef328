"""The first value that differs, between torch graphs, ONNX files and runtimes; and what is to blame."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock

import graphsurgery as gs
from graphsurgery.export import OnnxSession
from graphsurgery.report.codec import to_plain
from graphsurgery.verify import Inputs


class Net(nn.Module):
    """A convolution with a norm, a residual branch, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.side = nn.Conv2d(8, 8, 3, padding=1)
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
        with torch.no_grad():
            self.norm.running_mean.normal_()  # type: ignore[union-attr]
            self.norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(image)))
        x = x + torch.relu(self.side(x))
        y: Tensor = self.head(torch.relu(self.first(x.mean((2, 3)))))
        return y


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 9, 9)), generator=torch.Generator().manual_seed(1))


def off(model: nn.Module, parameter: str, share: float = 1e-2) -> nn.Module:
    """A copy in which one coefficient, of those that matter most, is off by that share."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        flat = copied.get_parameter(parameter).view(-1)
        flat[int(flat.abs().argmax())] *= 1 + share
    return copied


def warmed(model: nn.Module, x: Tensor) -> nn.Module:
    """Statistics as training gives them, and scales that are not zero, as timm leaves some at first."""
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
        for _ in range(3):
            model(torch.randn(8, *x.shape[1:]))
    return model.eval()


def exported(model: nn.Module, x: Tensor, path: Path, **options: Any) -> Path:
    gs.optimize(model, x, verify="off", **options).export_onnx(path, verify=False)
    return path


def weights_of(path: Path) -> list[str]:
    """Initializers of several dimensions that one node reads, as first of their users."""
    graph = onnx.load(path).graph
    used = [name for node in graph.node for name in node.input]
    return [
        t.name for t in graph.initializer if t.data_type == 1 and len(t.dims) > 1 and used.count(t.name) == 1
    ]


def broken(path: Path, name: str, share: float = 0.05) -> tuple[Path, str]:
    """A copy with one initializer changed, and the node that reads it."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[np.abs(array).argmax()] *= 1 + share
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    target = path.with_name(f"broken-{name}.onnx")
    onnx.save(model, target)
    return target, next(node.name for node in model.graph.node if name in node.input)


@pytest.fixture(scope="module")
def net() -> Net:
    return Net().eval()


@pytest.fixture(scope="module")
def file(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(net, image(), tmp_path_factory.mktemp("localize") / "net.onnx")


@pytest.mark.parametrize("layer", ["conv", "norm", "side", "first", "head"])
@pytest.mark.parametrize("share", [1e-2, 1e-3])
def test_names_the_layer_of_a_torch_module_and_its_line(net: Net, layer: str, share: float) -> None:
    found = gs.localize(net, off(net, f"{layer}.weight", share), image())
    assert found.found, str(found)
    assert found.module == layer
    assert f"self.{layer}(" in found.source
    assert found.first is not None
    assert found.first.parameters[0] == f"{layer}.weight"
    assert found.error is not None
    assert not found.error.ok
    assert all(item.ok for item in found.before)
    assert found.among == ()
    assert found.blame == "torch Net: the program itself, not a runtime"
    assert f"in {layer}" in found.reason


def test_equal_programs_have_no_place(net: Net, file: Path) -> None:
    for other in (net, file):
        found = gs.localize(net, other, image())
        assert not found.found
        assert found.first is None
        assert found.places == ()
        assert found.blame == ""
        assert {stage.status for stage in found.stages} == {"equal"}
        assert "nothing differs" in found.reason


def test_a_folded_module_is_matched_by_what_it_computes(net: Net) -> None:
    """Conv and norm became one layer under the conv's name; the value it stands for is the norm's."""
    result = gs.optimize(net, image())
    wrong = off(result.module, "conv.weight")
    found = gs.localize(net, wrong, image())
    assert found.first is not None
    assert found.stands_for is not None
    assert (found.first.op, found.first.name) == ("Conv2d", "conv")
    assert found.stands_for.op == "batch_norm"
    later = gs.localize(net, off(result.module, "head.weight"), image())
    assert later.module == "head"
    graph = gs.localize(net, off(result.graph_module, "side.weight"), image())
    assert graph.module == "side"


def test_a_changed_initializer_is_found_at_its_node(net: Net, file: Path) -> None:
    names = weights_of(file)
    assert len(names) == 4
    for name in names:
        bad, node = broken(file, name)
        found = gs.localize(net, bad, image())
        assert found.first is not None
        assert found.first.node == node, str(found)
        assert found.first.parameters[0] == name
        assert found.blame.endswith("the file itself, not a runtime")
        assert [stage.status for stage in found.stages] == ["different"] * 3
        other = gs.localize(file, bad, image())
        assert other.first is not None
        assert other.first.node == node
        assert other.stands_for is not None
        assert other.stands_for.node == node


def test_two_files_whose_values_have_other_names(file: Path, tmp_path: Path) -> None:
    """Names of values say nothing across exporters; what they are made of does."""
    bad, node = broken(file, "side.weight")
    model = onnx.load(bad)
    kept = {v.name for v in (*model.graph.input, *model.graph.output)}
    kept |= {t.name for t in model.graph.initializer}
    inner = [name for n in model.graph.node for name in n.output if name not in kept]
    new = {name: f"t{i * 7 % 101}" for i, name in enumerate(inner)}
    del model.graph.value_info[:]
    for n in model.graph.node:
        n.input[:] = [new.get(name, name) for name in n.input]
        n.output[:] = [new.get(name, name) for name in n.output]
    renamed = tmp_path / "renamed.onnx"
    onnx.save(model, renamed)
    found = gs.localize(file, renamed, image())
    assert found.first is not None
    assert found.first.node == node
    assert found.stands_for is not None
    assert found.stands_for.name != found.first.name
    assert found.stands_for.node == node


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "test_efficientnet.r160_in1k"])
def test_a_small_cnn_exported_and_broken(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = image(1, 3, 64, 64)
    model = warmed(timm.create_model(name, pretrained=False), x)
    path = exported(model, x, tmp_path / "cnn.onnx")
    names = weights_of(path)
    for weight in names[:: max(1, len(names) // 3)]:
        bad, node = broken(path, weight)
        found = gs.localize(model, bad, x)
        assert found.first is not None
        assert found.first.node == node, str(found)
        assert found.module
        assert found.source


def test_a_transformer_block_exported_and_broken(tmp_path: Path) -> None:
    """A Linear is two nodes in the file, and the value between them has no counterpart: both are named."""
    torch.manual_seed(0)
    block = EncoderBlock(2, 16, 32, 0.0, 0.0).eval()
    x = image(2, 7, 16)
    path = exported(block, x, tmp_path / "block.onnx")
    names = weights_of(path)
    assert len(names) >= 4
    for weight in names:
        bad, node = broken(path, weight)
        found = gs.localize(block, bad, x)
        assert node in {place.node for place in found.places}, str(found)
        assert len(found.places) <= 4  # MatMul, Add, Reshape, Transpose: the file keeps another layout inside
        assert found.module
        exact = gs.localize(path, bad, x)
        assert exact.first is not None
        assert exact.first.node == node


def test_a_gross_error_is_found_where_it_enters(net: Net, file: Path) -> None:
    """Far from any value of the reference, so the pair comes from what the value is made of."""
    bad, node = broken(file, "side.weight", 1e4)
    found = gs.localize(net, bad, image())
    assert found.first is not None
    assert found.first.node == node
    assert found.module == "side"
    wrong = off(net, "side.weight", -40.0)
    assert gs.localize(net, wrong, image()).module == "side"


def test_the_optimisations_of_a_runtime_are_told_from_the_file(
    net: Net, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime whose optimiser spoils the weights of one layer."""
    made = OnnxSession.__init__

    def spoilt(self: OnnxSession, source: Any, *, optimised: bool = True, threads: int = 0) -> None:
        if optimised:
            model = onnx.load(source)
            for tensor in model.graph.initializer:
                if tensor.name == "side.weight":
                    array = numpy_helper.to_array(tensor) * np.float32(1.01)
                    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            source = model.SerializeToString()
        made(self, source, optimised=False, threads=threads)

    monkeypatch.setattr(OnnxSession, "__init__", spoilt)
    found = gs.localize(net, file, image())
    assert [stage.status for stage in found.stages] == ["equal", "equal", "different"]
    assert "the optimisations of onnxruntime; onnxruntime net.onnx (not optimised) agrees" in found.blame
    assert found.module == "side"
    assert found.first is not None
    assert found.first.op == "Conv"
    assert found.before
    assert all(item.ok for item in found.before)


def test_the_kernels_of_a_runtime_are_told_from_the_file(
    net: Net, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = OnnxSession.run

    def spoilt(self: OnnxSession, feeds: Any) -> dict[str, Tensor]:
        return {name: value * 1.001 for name, value in made(self, feeds).items()}

    monkeypatch.setattr(OnnxSession, "run", spoilt)
    found = gs.localize(net, file, image())
    assert [stage.status for stage in found.stages] == ["equal", "different", "different"]
    assert "the kernels of onnxruntime; ONNX reference evaluator net.onnx agrees" in found.blame


def test_a_step_between_is_blamed_before_the_file(net: Net) -> None:
    wrong = off(net, "first.weight")
    found = gs.localize(net, wrong, image(), between=[net, wrong])
    assert [stage.status for stage in found.stages] == ["equal", "different", "different"]
    assert found.module == "first"
    with pytest.raises(ValueError, match="no runtime 'tensorrt'"):
        gs.localize(net, wrong, image(), runtimes=["tensorrt"])


class Limit(nn.Module):
    """Counts, or logarithms, that hang on a limit which only large inputs come near."""

    def __init__(self, limit: float, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.limit, self.kind = nn.Linear(6, 5), limit, kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return (y.abs() > self.limit).long() if self.kind == "long" else (self.limit - y.abs()).log()


@pytest.mark.parametrize(("kind", "op"), [("long", "gt"), ("float", "rsub")])
def test_a_difference_in_another_case_than_the_example_is_found_there(kind: str, op: str) -> None:
    """Integers, NaN and infinity have no error to compare, but a case in which they differ."""
    right, wrong = (Limit(limit, kind).eval() for limit in (1e9, 200.0))
    x = image(2, 6)
    verdict = gs.verify(right, wrong, x)
    assert not verdict.ok
    assert verdict.outputs[0].differs_on == "large"
    found = gs.localize(right, wrong, x)
    assert found.case == "large"
    assert found.first is not None
    assert found.first.op == op, str(found)
    assert "'large'" in found.reason


def test_weights_of_one_and_elu() -> None:
    """Correct networks whose outputs differ by over 100 are equal; with one weight off the layer is named."""
    layers = []
    for _ in range(6):
        conv = nn.Conv1d(8, 8, 5, padding=2)
        nn.init.ones_(conv.weight)
        nn.init.constant_(conv.bias, 0.1)  # type: ignore[arg-type]
        layers.append(conv)
    scale = 0.5 + torch.rand(8, generator=torch.Generator().manual_seed(0))

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * scale.view(-1, 1)

    first = nn.Sequential(*(m for conv in layers for m in (conv, Scaled(), nn.ELU()))).eval()
    result = gs.optimize(first, image(2, 8, 48) * 10)
    x = image(2, 8, 48) * 10
    verdict = gs.verify(first, result.module, x)
    assert verdict.ok
    assert verdict.outputs[0].max_error > 100.0
    assert "needs factor" in verdict.reason
    for share in (1e-2, 1e-3):
        wrong = off(result.module, "9.weight", share)
        assert not gs.verify(first, wrong, x).ok
        found = gs.localize(first, wrong, x)
        assert found.first is not None
        assert found.first.module == "9", str(found)


def test_integer_tokens_and_keyword_inputs() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.mix, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor, scale: Tensor) -> dict[str, Tensor]:
            hidden = torch.tanh(self.mix(self.table(ids) * scale))
            return {"logits": self.head(hidden), "best": self.head(hidden).argmax(-1)}

    model = Tokens().eval()
    given = {"ids": torch.randint(0, 20, (2, 6)), "scale": torch.randn(2, 6, 8)}
    found = gs.localize(model, off(model, "mix.weight"), given)
    assert found.module == "mix"
    both = type("Both", (nn.Module,), {"forward": lambda self, x, *, y: x + y})()
    wrong = type("Wrong", (nn.Module,), {"forward": lambda self, x, *, y: x - y})()
    with pytest.raises(gs.VerificationError, match="positional and keyword inputs at once"):
        gs.localize(both, wrong, Inputs((torch.ones(2),), {"y": torch.ones(2)}))


def test_in_place_calls_of_an_exported_program_are_seen_before_they_write(net: Net) -> None:
    class Inplace(nn.Sequential):
        pass

    torch.manual_seed(0)
    model = Inplace(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True)
    ).eval()
    x = image()
    program = torch.export.export(off(model, "2.weight"), (x,)).module()
    assert any(str(node.target) == "aten.relu_.default" for node in program.graph.nodes)  # type: ignore[union-attr]
    found = gs.localize(model, program, x, samples=3)
    assert found.module == "2"
    assert found.first is not None
    assert found.first.op == "conv2d"


def test_the_caller_is_untouched_and_the_result_is_plain(net: Net) -> None:
    wrong = off(net, "side.weight")
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (net, wrong)]
    found = gs.localize(net, wrong, image())
    for module, state in zip((net, wrong), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    plain = to_plain(found)
    assert plain["first"]["module"] == "side"
    assert plain["error"]["ok"] is False
    text = str(found)
    for word in (
        "departs from torch Net",
        "first difference: conv2d",
        "stands for",
        "before, relu",
        "test_localize.py",
    ):
        assert word in text


def test_the_case_is_the_one_that_differs() -> None:
    """A bias behind a ReLU that only loud inputs open."""

    class Shy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.gate, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            nn.init.constant_(self.gate.bias, -100.0)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(x + torch.relu(self.gate(x)))
            return y

    model = Shy().eval()
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.gate.weight[0] *= 1.5
    found = gs.localize(model, wrong, image(3, 4))
    assert found.case == "large"
    assert found.module == "gate"
    assert found.error is not None
    assert found.error.native is not None
    assert found.error.native.worst_case == "large"
    assert "on 'large'" in found.reason
    several = gs.localize(model, wrong, image(3, 4), dynamic_batch=True)
    assert several.case.split(", ") == ["large", "zeros", "tiny", "constant", "example[1]"]
    assert several.module == "gate"


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_a_runtime_named_besides_is_searched_by_halving(
    net: Net, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphsurgery.export.openvino import OpenVinoSession

    made = OpenVinoSession.__init__

    def spoilt(self: OpenVinoSession, path: Any) -> None:
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            if tensor.name == "first.weight":
                array = numpy_helper.to_array(tensor) * np.float32(1.01)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        onnx.save(model, tmp_path / "spoilt.onnx")
        made(self, tmp_path / "spoilt.onnx")

    monkeypatch.setattr(OpenVinoSession, "__init__", spoilt)
    found = gs.localize(net, file, image(), runtimes=["openvino"])
    assert [stage.status for stage in found.stages] == ["equal", "equal", "equal", "different"]
    assert found.blame.endswith("OpenVINO; onnxruntime net.onnx (optimised) agrees")
    assert found.module == "first"
    assert gs.localize(net, file, image()).found is False


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["resnet50", "vit_tiny_patch16_224"])
def test_sweep_over_broken_files(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = image(1, 3, 64, 64)
    size = {} if name == "resnet50" else {"img_size": 64}
    model = timm.create_model(name, pretrained=False, **size)
    model = warmed(model, x) if name == "resnet50" else model.eval()
    path = exported(model, x, tmp_path / "model.onnx")
    names = weights_of(path)
    for weight in names[1 :: len(names) // 4]:
        bad, node = broken(path, weight)
        found = gs.localize(model, bad, x)
        assert node in {place.node for place in found.places}, str(found)
        assert len(found.places) <= 4
        exact = gs.localize(path, bad, x)
        assert exact.first is not None
        assert exact.first.node == node
        bad.unlink()
