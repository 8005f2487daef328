"""Several runtimes behind one verdict; what cannot be run is said, and is not passed."""

from __future__ import annotations

import builtins
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery.errors import RuntimeUnavailableError, VerificationError
from graphsurgery.report.codec import to_plain
from graphsurgery.verify import RUNTIMES, Baseline, OnnxRunner, RuntimeVerdict, TorchRunner, verify

ON_FILES = ("reference", "onnxruntime-unoptimised", "onnxruntime")
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None


class Net(nn.Module):
    """A convolution with a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.norm.running_mean = torch.randn(8)
        self.norm.running_var = torch.rand(8) + 0.5

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.norm(self.conv(image))).mean((2, 3)))
        return y


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1)).to(dtype)


def statuses(verdict: gs.RuntimesVerdict) -> dict[str, str]:
    return {item.runtime: item.status for item in verdict.runtimes}


def broken(source: Path, target: Path, factor: float = 1.01) -> Path:
    """A copy with one coefficient of the head changed."""
    model = onnx.load(source)
    tensor = next(t for t in model.graph.initializer if list(t.dims) in ([5, 8], [8, 5]))
    array = numpy_helper.to_array(tensor).copy()
    array[1, 2] *= factor
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, target)
    return target


@pytest.fixture(scope="module")
def net() -> Net:
    return Net().eval()


@pytest.fixture(scope="module")
def file(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runtimes") / "net.onnx"
    gs.optimize(net, image(), passes=[]).export_onnx(path, verify=False)
    return path


def test_every_runtime_of_files_agrees_with_torch(net: Net, file: Path) -> None:
    verdict = verify(net, file, image(), runtimes=(*ON_FILES, "openvino"), dynamic_batch=True)
    assert verdict.ok, str(verdict)
    wanted = "equal" if HAS_OPENVINO else "not run"
    assert statuses(verdict) == dict.fromkeys(ON_FILES, "equal") | {"openvino": wanted}
    assert [item.runtime for item in verdict.runtimes] == [*ON_FILES, "openvino"]
    shares = {
        item.runtime: item.verdict.outputs[0].native.factor_needed  # type: ignore[union-attr]
        for item in verdict.runtimes
        if item.verdict is not None
    }
    worst = max(shares, key=lambda runtime: shares[runtime])
    assert f"worst on {worst}: " in verdict.reason
    assert verdict.outputs[0].native.factor_needed == shares[worst]  # type: ignore[union-attr]
    for item in verdict.runtimes[:3]:
        assert item.verdict is not None
        assert item.verdict.outputs[0].native is not None
        assert 0 < item.verdict.outputs[0].native.max_error < 1e-4
        assert item.verdict.batch_sizes == (1, 2, 5)


@pytest.mark.skipif(not HAS_OPENVINO, reason="OpenVINO is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_openvino_tells_equal_from_different(tmp_path: Path, dtype: torch.dtype) -> None:
    net = Net().eval().to(dtype)
    good = tmp_path / "good.onnx"
    gs.optimize(net, image(dtype), passes=[], verify="off").export_onnx(good, verify=False)
    bad = broken(good, tmp_path / "bad.onnx", 1.5)
    assert verify(net, good, image(dtype), runtimes=["openvino"]).ok
    assert statuses(verify(net, bad, image(dtype), runtimes=["openvino"])) == {"openvino": "different"}


@pytest.mark.skipif(not HAS_OPENVINO, reason="OpenVINO is not installed")
def test_openvino_is_not_run_on_float64(tmp_path: Path) -> None:
    net = Net().eval().double()
    path = tmp_path / "double.onnx"
    gs.optimize(net, image(torch.float64), passes=[], verify="off").export_onnx(path, verify=False)
    verdict = verify(net, path, image(torch.float64), runtimes=["reference", "openvino"])
    assert statuses(verdict) == {"reference": "equal", "openvino": "not run"}
    assert "float64 graphs in float32" in verdict.runtimes[1].reason


def test_a_wrong_file_differs_on_each_runtime(net: Net, file: Path, tmp_path: Path) -> None:
    bad = broken(file, tmp_path / "bad.onnx")
    verdict = verify(net, bad, image(), runtimes=ON_FILES)
    assert not verdict.ok
    assert set(statuses(verdict).values()) == {"different"}
    assert verdict.reason.startswith("on reference: output")
    assert "3 of the 3 runtimes that ran differ" in verdict.reason
    assert not verdict.outputs[0].ok
    # two files: the reference side is run as before
    assert verify(file, file, image(), runtimes=ON_FILES).ok
    alone = verify(file, bad, image(), runtimes=["reference"])
    assert not alone.ok
    assert "runtimes that ran" not in alone.reason


def test_the_roles_change_where_the_reference_is_a_file(net: Net, file: Path) -> None:
    verdict = verify(file, net, image(), runtimes=["reference"])
    assert verdict.ok
    assert verdict.anchor == "torch Net in float64"
    assert verdict.notes[0].startswith("judged the other way round")


def test_runners_are_taken_for_what_they_run(net: Net, file: Path) -> None:
    assert verify(TorchRunner(net), OnnxRunner(file), image(), runtimes=["reference"]).ok
    own = type("Own", (), {"name": "own", "run": lambda self, inputs: {}})()
    with pytest.raises(VerificationError, match="a Own cannot be put on other runtimes"):
        verify(net, own, image(), runtimes=["onnxruntime"])


def test_not_run_is_said_and_never_passed(net: Net, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphsurgery.export.evaluator._MAX_MACS", 1.0)
    names = ("reference", "onnxruntime", "torch", "torch-compile")
    verdict = verify(net, file, image(), runtimes=names)
    assert verdict.ok
    expected = {
        "reference": "not run",
        "onnxruntime": "equal",
        "torch": "not run",
        "torch-compile": "not run",
    }
    assert statuses(verdict) == expected
    assert "(not run: reference, torch, torch-compile)" in verdict.reason
    assert "plain numpy" in verdict.runtimes[0].reason
    assert "on reference: not run: the graph takes 1." in str(verdict)
    assert verdict.runtimes[0].verdict is None
    with pytest.raises(
        RuntimeUnavailableError, match=r"nothing was compared.*reference not run.*plain numpy"
    ):
        verify(net, file, image(), runtimes=["reference"])
    with pytest.raises(RuntimeUnavailableError, match=r"onnxruntime not run: it runs ONNX files"):
        verify(net, net, image(), runtimes=["onnxruntime"])


def test_a_runtime_that_is_not_installed_is_not_run(
    net: Net, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "openvino":
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    verdict = verify(net, file, image(), runtimes=["openvino", "onnxruntime"])
    assert statuses(verdict) == {"openvino": "not run", "onnxruntime": "equal"}
    assert "pip install 'graphsurgery[openvino]'" in verdict.runtimes[0].reason


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "no runtime is named"), (["onnxruntime", "tensorrt"], "there is no runtime 'tensorrt'")],
)
def test_unknown_names_and_none_are_declined_before_any_run(net: Net, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify(net, "missing.onnx", image(), runtimes=names)


def test_a_runtime_that_fails_on_the_example_is_not_run(net: Net, file: Path, tmp_path: Path) -> None:
    """An operator that the evaluator has no code for; onnxruntime has its own to say."""
    model = onnx.load(file)
    model.graph.node[-1].domain = "com.elsewhere"
    model.opset_import.append(onnx.helper.make_opsetid("com.elsewhere", 1))
    path = tmp_path / "other.onnx"
    onnx.save(model, path)
    with pytest.raises(RuntimeUnavailableError, match=r"cannot load the graph|failed on the example"):
        verify(net, path, image(), runtimes=["reference"])


def test_one_that_fails_later_is_a_finding(net: Net) -> None:
    """A file of one fixed batch, judged over several: it ran, so it is different, not "not run"."""

    class Fixed:
        name = "fixed"
        calls = 0

        def run(self, inputs: Any) -> dict[str, Tensor]:
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("shapes")
            return {"output": net(*inputs.args).detach()}

    from graphsurgery.verify.runtimes import _FirstRun

    baseline = Baseline(net, image(), dynamic_batch=True)
    verdict = baseline.compare(_FirstRun(Fixed()))
    assert not verdict.ok
    assert "it failed at batch 2" in verdict.reason

    class Never(Fixed):
        calls = 1

    with pytest.raises(RuntimeUnavailableError, match="it failed on the example: RuntimeError: shapes"):
        baseline.compare(_FirstRun(Never()))


def test_torch_eager_and_compiled(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler of torch itself is tried in the sweep; here its way is walked with one that traces."""
    seen: list[nn.Module] = []

    def compiled(module: nn.Module) -> Callable[..., Any]:
        seen.append(module)
        return module.__call__

    monkeypatch.setattr(torch, "compile", compiled)
    verdict = verify(net, net, image(), runtimes=["torch", "torch-compile"])
    assert statuses(verdict) == {"torch": "equal", "torch-compile": "equal"}
    assert seen[0] is not net
    wrong = Net().eval()
    with torch.no_grad():
        wrong.head.weight[0, 0] *= 1.1
    assert not verify(net, wrong, image(), runtimes=["torch-compile"]).ok

    def declines(module: nn.Module) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            raise RuntimeError("no compiler")

        return run

    monkeypatch.setattr(torch, "compile", declines)
    verdict = verify(net, net, image(), runtimes=["torch", "torch-compile"])
    assert statuses(verdict) == {"torch": "equal", "torch-compile": "not run"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own parts
def test_the_compiler_of_torch(net: Net) -> None:
    verdict = verify(net, net, image(), runtimes=["torch-compile"])
    assert verdict.ok, str(verdict)
    assert verdict.candidate == "torch.compile Net"
    torch._dynamo.reset()


def test_the_verdict_is_plain_data(net: Net, file: Path) -> None:
    verdict = verify(net, file, image(), runtimes=["onnxruntime", "torch"])
    plain = to_plain(verdict)
    assert [item["status"] for item in plain["runtimes"]] == ["equal", "not run"]
    assert plain["runtimes"][1]["verdict"] is None
    assert plain["runtimes"][0]["verdict"]["outputs"][0]["native"]["max_error"] > 0
    assert RUNTIMES == (
        "torch",
        "torch-compile",
        "reference",
        "onnxruntime-unoptimised",
        "onnxruntime",
        "openvino",
    )
    assert RuntimeVerdict("torch", "not run", "why").verdict is None


def test_the_reference_evaluator_keeps_the_dtypes_of_the_file(tmp_path: Path) -> None:
    from graphsurgery.export.evaluator import Evaluator

    net = Net().eval().half()
    path = tmp_path / "half.onnx"
    gs.optimize(net, image(torch.float16), passes=[], verify="off").export_onnx(path, verify=False)
    native = Evaluator.of_file(path, double=False).run({"image": image(torch.float16)})
    double = Evaluator.of_file(path, double=True).run({"image": image(torch.float16)})
    assert [value.dtype for value in (*native.values(), *double.values())] == [torch.float16, torch.float64]
    gap = np.abs(native["output"].double().numpy() - double["output"].numpy()).max()
    assert 0 < gap < 0.05
