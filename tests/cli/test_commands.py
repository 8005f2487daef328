"""The four commands, run in this process: output, files and exit codes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import enter, run

import graphsurgery as gs
from graphsurgery.measure import Timing, bench

MODELS = '''
import torch
from torch import nn

torch.manual_seed(0)

class Net(nn.Module):
    """conv + norm + ReLU, then two linear layers with nothing between them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2.0)
            self.norm.weight.uniform_(0.5, 1.5)
            self.norm.bias.normal_()

    def forward(self, picture):
        hidden = torch.relu(self.norm(self.conv(picture))).mean((2, 3))
        return self.second(self.first(hidden))

class Branching(Net):
    def forward(self, picture):
        if picture.sum() > 0:
            return super().forward(picture)
        return picture

def net():
    torch.manual_seed(1)
    return Net().eval()

def with_inputs():
    return net(), torch.randn(2, 3, 6, 6)

def training():
    return net().train()

def other():
    model = net()
    with torch.no_grad():
        model.second.weight[0, 0] += 0.5
    return model

def branching():
    return Branching().eval()

def nan():
    model = net()
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = float("nan")
    return model

def raising():
    raise FileNotFoundError("weights.bin")

def leaving():
    raise SystemExit(0)

class Leaving(Net):
    def forward(self, picture):
        raise SystemExit

def leaving_later():
    return Leaving().eval()
'''

INPUT = ("--input", "2x3x6x6")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "command_models.py"
    path.write_text(MODELS)
    return str(path)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch)


def files() -> set[str]:
    return {path.name for path in Path().iterdir()}


def test_optimize_writes_what_was_asked_for(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = run("optimize", f"{models}:net", "-o", "n.onnx", *INPUT, "--save", "n.pt2", "--report", "n.json")
    out = capsys.readouterr().out
    assert code == 0, out
    assert files() == {"n.onnx", "n.pt2", "n.json"}
    report = gs.Report.from_json(Path("n.json").read_text())
    assert report.verification is not None
    assert report.verification.ok
    assert report.onnx is not None
    assert report.onnx.path == "n.onnx"
    assert report.after.layers.get("norm", 0) == 0
    assert report.after.flops < report.before.flops
    for word in ("parameters", "FLOPs", "file, bytes", "onnxruntime, ms", "n.onnx", "n.pt2", "n.json"):
        assert word in out
    # the files agree with the original, found by the other command
    assert run("verify", f"{models}:net", "n.onnx", *INPUT) == 0
    assert run("verify", f"{models}:net", "n.pt2", *INPUT) == 0


def test_the_opset_is_that_asked_for(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("optimize", f"{models}:with_inputs", "-o", "out.onnx", "--opset", "18", "--json") == 0
    assert json.loads(capsys.readouterr().out)["onnx"]["opset"] == 18
    assert run("optimize", f"{models}:with_inputs", "-o", "out.onnx", "--opset", "99") == 2
    assert "expected a number from 18" in capsys.readouterr().err
    assert run("split-head", f"{models}:with_inputs", "--opset", "20") == 2
    assert "name the file by -o" in capsys.readouterr().err


def test_the_report_is_put_in_place_last(models: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sees the new report sees the files that it speaks of."""
    order: list[str] = []
    replace = os.replace

    def watched(source: str | Path, target: str | Path) -> None:
        if Path(target).resolve().parent == Path.cwd():  # not within a hidden folder
            order.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    options = ("-o", "n.onnx", "--save", "n.pt2", "--report", "r.json")
    assert run("optimize", f"{models}:net", *INPUT, *options) == 0
    assert order == ["n.onnx", "n.pt2", "r.json"]


def test_optimize_takes_its_own_output(models: str) -> None:
    assert run("optimize", f"{models}:net", *INPUT, "--save", "n.pt2") == 0
    assert run("optimize", "n.pt2", "-o", "again.onnx") == 0
    assert files() == {"n.pt2", "again.onnx"}


def test_optimize_prints_one_json_document(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run("optimize", f"{models}:with_inputs", "--json", "--passes", "fold-affine,eliminate-identity") == 0
    )
    report = gs.Report.from_json(capsys.readouterr().out)
    assert report.passes == ("fold-affine", "eliminate-identity")
    assert files() == set()


def test_optimize_checks_each_pass(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("optimize", f"{models}:with_inputs", "--json", "--verify", "each-pass") == 0
    report = gs.Report.from_json(capsys.readouterr().out)
    assert report.pass_checks
    assert all(check.ok and check.onnx is not None for check in report.pass_checks)


def test_training_mode_is_said(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("optimize", f"{models}:training", *INPUT) == 0
    assert "training mode" in capsys.readouterr().out


def test_split_head_writes_the_parts(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("split-head", f"{models}:net", "-o", "n.onnx", *INPUT) == 0
    out = capsys.readouterr().out
    assert "rank 4 of 17 x 4: 4 class-specific and 13 residual features" in " ".join(out.split())
    assert "wrote n.onnx" in out
    assert files() == {"n.onnx"}
    assert run("split-head", f"{models}:with_inputs", "--head", "first", "--through-r", "--json") == 0
    report = gs.Report.from_json(capsys.readouterr().out)
    assert report.verification is not None
    assert [output.name for output in report.verification.outputs] == [
        *("output", "logits", "class_features"),
    ]
    assert report.changes[0].parameters[-1] == "first_logits.weight"


def test_inspect_names_places_and_changes_nothing(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", f"{models}:net", *INPUT) == 0
    out = capsys.readouterr().out
    assert "norm" in out
    assert "first" in out
    assert files() == set()
    assert run("inspect", f"{models}:net", *INPUT, "--json") == 0
    assert gs.Report.from_json(capsys.readouterr().out).changes


def test_verify_finds_a_difference(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", f"{models}:net", f"{models}:net", *INPUT) == 0
    assert run("verify", f"{models}:with_inputs", f"{models}:other") == 1
    assert "different" in capsys.readouterr().out
    assert run("verify", f"{models}:net", f"{models}:other", *INPUT, "--json") == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_passes_lists_every_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("passes") == 0
    out = capsys.readouterr().out
    assert run("passes", "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert [item["name"] for item in described] == list(gs.passes.available())
    assert all(item["name"] in out for item in described)


def test_a_pass_of_another_package_runs_when_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Foreign(gs.passes.EliminateIdentity):
        name = "foreign-fold"

    monkeypatch.setattr("graphsurgery.passes.registered_passes", lambda: {"foreign-fold": Foreign})
    assert run("passes") == 0
    after = capsys.readouterr().out.partition("foreign-fold")[2]
    assert "runs when named" in after
    assert "runs by default" not in after
    assert run("passes", "--json") == 0
    described = {item["name"]: item["default"] for item in json.loads(capsys.readouterr().out)}
    own = {item.name: item.default for item in gs.passes.ALL_PASSES}
    assert described == {**own, "foreign-fold": False}
    assert own["fold-affine"]
    assert not own["merge-siblings"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("optimize", "{m}:nt", "-o", "n.onnx", *INPUT), "did you mean 'net'?"),
        (("optimize", "{m}:raising", "-o", "n.onnx", *INPUT), "raised FileNotFoundError: weights.bin"),
        (("optimize", "gone.py:net", "-o", "n.onnx", *INPUT), "gone.py, which does not exist"),
        (("optimize", "gone.pt2", "-o", "n.onnx", *INPUT), "gone.pt2 does not exist"),
        (("optimize", "{m}:net", "-o", "gone/n.onnx", *INPUT), "the folder gone does not exist"),
        (("optimize", "{m}:net", "-o", "n.onnx"), "brings no example inputs"),
        (("optimize", "{m}:net", "-o", "n.onnx", "--input", "1,3"), "--input '1,3' is not understood"),
        (("optimize", "{m}:net", "--input", "2x3x9999999x9999999"), "more than fit into memory"),
        (("optimize", "{m}:net", "--input", "99999999999999999999x3"), "more than fit into memory"),
        (("optimize", "{m}:leaving", "-o", "n.onnx", *INPUT), "ended the program by sys.exit(0)"),
        (("verify", "{m}:leaving", "{m}:net", *INPUT), "ended the program by sys.exit(0)"),
        (("verify", "{m}:net", "{m}:leaving_later", *INPUT), "ended the program by sys.exit(None)"),
        (("optimize", "{m}:net", "-o", "{m}", *INPUT), "MODEL and -o name the same file"),
        (("optimize", "command_models:net", "-o", "{m}", *INPUT), "MODEL and -o name the same file"),
        (("optimize", "{m}:net", "-o", "{m}", "--data", "{m}", *INPUT), "-o name the same file"),
        (("split-head", "{m}:net", "-o", "{m}", *INPUT), "MODEL and -o name the same file"),
        (("optimize", "{m}:net", *INPUT, "--passes", ","), "--passes names no pass"),
        (("optimize", "{m}:net", *INPUT, "--data-limit", "3"), "--data-limit is for --data"),
        (("verify", "{m}:net", "{m}:net", *INPUT, "--data-limit", "3"), "--data-limit is for --data"),
        (("optimize", ".:net", "-o", "n.onnx", *INPUT), "names a relative module"),
        (("optimize", "./:net", "-o", "n.onnx", *INPUT), "which is no file"),
        (("optimize", "{m}:net", "-o", "n.onnx", "--input", "1x5x6x6"), "5"),
        (("optimize", "{m}:net", "-o", "n.onnx", "--input", "1x3x6x6:int64"), ""),
        (("optimize", "{m}:net", "-o", "n.onnx", "--input", "image=1x3x6x6"), "image"),
        (("optimize", "{m}:nan", "-o", "n.onnx", *INPUT), "'conv.weight'"),
        (("optimize", "{m}:branching", "-o", "n.onnx", *INPUT), "if picture.sum() > 0"),
        (
            ("optimize", "{m}:net", "-o", "n.onnx", *INPUT, "--passes", "fold-afine"),
            "did you mean 'fold-affine'?",
        ),
        (("optimize", "{m}:net", "-o", "n.onnx", *INPUT, "--verify", "maybe"), "maybe"),
        (("optimize", "{m}:net", "-o", "n.onnx", *INPUT, "--passes", "split-head"), "(`split_head` does)"),
        (
            ("split-head", "{m}:net", "-o", "n.onnx", *INPUT, "--head", "secnd"),
            "did you mean 'second'",
        ),
        (("split-head", "{m}:net", "-o", "gone/n.onnx", *INPUT), "the folder gone does not exist"),
        (("inspect", "{m}:net"), "brings no example inputs"),
        (("verify", "{m}:net", "gone.onnx", *INPUT), "gone.onnx does not exist"),
        (("verify", "gone.onnx", "gone2.onnx"), "gone.onnx does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_usage_is_one_sentence(
    models: str,
    argv: tuple[str, ...],
    said: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(Path(models).parent)
    assert run(*(part.replace("{m}", models) for part in argv)) == 2
    err = capfd.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert files() == set()


def test_a_corrupt_program_is_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    Path("bad.pt2").write_bytes(b"not an archive")
    assert run("optimize", "bad.pt2", "-o", "n.onnx") == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "bad.pt2 is no readable .pt2 file" in err
    assert files() == {"bad.pt2"}


def test_a_corrupt_onnx_file_is_one_sentence(models: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("bad.onnx").write_bytes(b"not a model")
    assert run("verify", f"{models}:net", "bad.onnx", *INPUT) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "bad.onnx" in err


def test_errors_are_json_where_json_was_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("optimize", "gone.pt2", "--json") == 2
    document = json.loads(capfd.readouterr().out)
    assert document["exit_code"] == 2
    assert document["error"]["kind"] == "UsageError"


def test_a_failed_export_leaves_no_file(
    models: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(self: gs.OptimizeResult, path: Path, **options: bool) -> None:
        raise gs.VerificationError("the file differs")

    monkeypatch.setattr(gs.OptimizeResult, "export_onnx", fail)
    argv = ("optimize", f"{models}:net", *INPUT, "-o", "n.onnx", "--save", "n.pt2", "--report", "n.json")
    assert run(*argv) == 1
    assert "the file differs" in capfd.readouterr().err
    assert files() == set()


@pytest.mark.parametrize("name", ["to_json", "latency_ms"])
def test_what_fails_after_the_export(name: str, models: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the report no file appears; without a measurement all of them do."""

    def fail(*args: object, **options: object) -> None:
        raise gs.ExportError("no")

    owner = gs.Report if name == "to_json" else importlib.import_module("graphsurgery.pipeline.result")
    monkeypatch.setattr(owner, name, fail)
    argv = ("optimize", f"{models}:net", *INPUT, "-o", "n.onnx", "--save", "n.pt2", "--report", "n.json")
    assert run(*argv) == (2 if name == "to_json" else 0)
    assert files() == (set() if name == "to_json" else {"n.onnx", "n.pt2", "n.json"})


def test_a_bug_is_not_called_a_failed_verification(
    models: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(gs, "optimize", fail)
    assert run("optimize", f"{models}:net", *INPUT) == 3
    err = capfd.readouterr().err
    assert "Traceback" in err
    assert "a bug of graphsurgery" in err


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "graphsurgery", "passes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=None)
    assert done.returncode == 0, done.stderr
    assert "fold-affine" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"graphsurgery {gs.__version__}\n"


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    said = capsys.readouterr()
    assert "optimize" in said.out + said.err
    assert torch.is_grad_enabled()


def test_optimize_takes_measured_cost(
    models: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def timer() -> object:
        return lambda before, after, threads, blocks: Timing((1.0,) * blocks, (2.0,) * blocks)

    monkeypatch.setattr(bench, "OnnxTimer", timer)
    monkeypatch.setenv("GRAPHSURGERY_TIMINGS", "off")
    code = run("optimize", f"{models}:net", *INPUT, "--cost", "measured", "--verify", "off", "--json")
    report = gs.Report.from_json(capsys.readouterr().out)
    assert code == 0
    assert {"measured-fold-affine", "measured-merge-siblings"} < set(report.passes)
    assert [(found.pass_name, found.kept) for found in report.measured] == [
        ("measured-linear-to-conv1x1", False)
    ]
    options = ("--passes", "merge-siblings", "--cost", "measured", "--verify", "off", "--json")
    assert run("optimize", f"{models}:net", *INPUT, *options) == 0
    assert gs.Report.from_json(capsys.readouterr().out).passes == ("measured-merge-siblings",)
