"""The benchmark beside other tools: what its tables say, and that a file that is slightly wrong is seen."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

TREE = Path(__file__).parent.parent
RECORD = TREE / "docs" / "benchmark.jsonl"
TOOLS = ("plain export", "onnxsim", "fx.fuse", "timm / peft", "graphsurgery")


@pytest.fixture(scope="module")
def show() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_show", TREE / "benchmarks" / "bench" / "show.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line(kind: str, network: str, group: str = "training form", **more: Any) -> dict[str, Any]:
    shared = {"note": "", "machine": "a machine", "versions": {"torch": "2.14"}, "ended": ""}
    return {"kind": kind, "network": network, "group": group, **shared, **more}


def built(network: str, tool: str, group: str = "training form", **more: Any) -> dict[str, Any]:
    counts = {"nodes": 9, "nodes_run": 7, "heavy_run": 3, "parameters": 1234, "size_bytes": 5_000_000}
    spent = {"wall": 9.0, "processor": 2.0, "peak_mb": 30}
    stages = {"export": spent} if tool == "plain export" else {"work": spent}
    found = {"right": True, "error": 1e-7, **counts, **stages, **more}
    return line("build", network, group, tool=tool, **{k: v for k, v in found.items() if v is not None})


def timed(network: str, group: str = "training form", **ms: list[float]) -> dict[str, Any]:
    times = {name.replace("_or_", " / ").replace("_", " "): values for name, values in ms.items()}
    return line("latency", network, group, threads=1, batch=1, ms=times)


def results() -> list[dict[str, Any]]:
    lines = [built(network, tool) for network in ("two", "wrong") for tool in TOOLS]
    lines += [built("same", tool, "nothing to gain") for tool in TOOLS]
    lines[1]["offered"] = False
    lines[2] = built("two", "fx.fuse", right=None, failure="ValueError: at /home/me/net.py: a | b")
    lines[9] = built("wrong", "graphsurgery", right=False, error=0.25)
    lines.append(
        timed("two", plain_export=[8.0, 6.0, 4.0], timm_or_peft=[2.0, 2.0, 2.0], graphsurgery=[4.0, 3.0, 2.0])
    )
    lines.append(timed("wrong", plain_export=[1.0, 1.0, 1.0], onnxsim=[0.5, 0.5, 0.5]))
    lines.append(timed("same", "nothing to gain", plain_export=[1.0, 1.0], graphsurgery=[1.0, 1.02]))
    return lines


def row(text: str, *begins: str) -> list[str]:
    """The first row of a table whose first cells are the given ones."""
    rows = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in text.splitlines()]
    return next(cells for cells in rows if tuple(cells[: len(begins)]) == begins)


def test_ratios_are_taken_block_by_block(show: ModuleType) -> None:
    assert show.faster(results()[-3], "timm / peft", "plain export") == (3.0, 2.0, 4.0)
    assert show.faster(results()[-3], "onnxsim", "plain export") is None
    assert show.geometric_mean([4.0, 1.0]) == pytest.approx(2.0)


def test_what_is_wrong_or_fails_says_so_and_gains_nothing_in_the_mean(show: ModuleType) -> None:
    text = show.document(results())
    assert row(text, "two") == ["two", "6.00", "", "fails", "**3.00**", "2.00 (2.00 to 2.00)"]
    assert row(text, "wrong")[-1] == "wrong by 0.2"
    assert row(text, "*training form* (2)")[-1] == "1.41"  # of 2 and 1
    assert row(text, "**all that can be folded**")[-1] == "1.41"
    assert "**3 networks; of graphsurgery's results 1 are wrong and 0 fail;" in text
    assert "**3 of 5 networks;" in show.document([*results(), built("two", "onnxsim", listed=5)])
    assert row(text, "two", "fx.fuse")[2] == "ValueError: at net.py: a \\| b"
    assert "**wrong, 2.5e-01**" in text


def test_a_tool_that_was_not_run_is_left_out_of_its_mean(show: ModuleType) -> None:
    """Else a tool would lose by what nobody has run yet; one that fails or has nothing gains nothing."""
    lines = [line for line in results() if (line["network"], line.get("tool")) != ("wrong", "timm / peft")]
    text = show.document(lines)
    assert row(text, "**all that can be folded**")[-2] == "3.00"  # of "two" alone
    assert row(text, "**all that can be folded**")[2] == "1.41"  # not offered, and twice as fast
    assert row(text, "**all**")[-1] == f"{(2 * 1 * 1 / 1.01) ** (1 / 3):.2f}"
    assert "is 1.41 (1 thread, batch 1, 2 networks).**" in text


def test_what_ended_while_it_was_timed_is_said(show: ModuleType) -> None:
    ended = line("latency", "two", threads=2, batch=8) | {"ended": "over 600 s of processor time"}
    text = show.document([*results(), ended])
    assert row(text, "two", "latency, 2 threads, batch 8")[2] == "over 600 s of processor time"


def test_the_tolerance_is_printed(show: ModuleType) -> None:
    source = (TREE / "benchmarks" / "bench" / "build.py").read_text(encoding="utf-8")
    limit = re.search(r"^TOLERANCE = (\S+)$", source, flags=re.MULTILINE)
    assert limit is not None
    assert f"rounding ({limit[1]} of the largest value of an output, or three times" in show.EXPLANATION
    assert "max(TOLERANCE, 3 * float(" in source


def test_inductor_is_beside_torch_eager(show: ModuleType) -> None:
    times = {"torch eager": [9.0, 9.0], "Inductor": [3.0, 3.0]}
    lines = [*results(), line("torch", "two", threads=1, batch=1, ms=times)]
    lines.append(
        line("torch", "same", threads=1, batch=1, ms={"torch eager": [1.0]}, wrong={"Inductor": 0.5})
    )
    text = show.document(lines)
    assert row(text, "two")[-1] == "3.00"
    assert row(text, "same")[-1] == "wrong by 0.5"
    assert row(text, "**all**")[-1] == f"{3**0.5:.2f}"  # what is wrong gains nothing here either


def test_where_another_tool_is_faster_is_listed(show: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(show.REASONS, "two", "a missing fold")
    lines = results()
    text = show.document(lines)
    assert row(text, "two", "1", "1", "timm / peft")[4:6] == ["1.50 (1.00 to 2.00)", "2 of 3 blocks"]
    assert row(text, "two", "1", "1", "timm / peft")[-1] == show.SPREAD
    again = {"plain_export": [6.0] * 5, "timm_or_peft": [2.0] * 5}
    lines.append(timed("two", **again, graphsurgery=[3.0] * 5))
    assert row(show.document(lines), "two", "1", "1", "timm / peft")[-1] == "a missing fold"
    lines.append(timed("two", **again, graphsurgery=[3.0] * 4 + [2.0]))  # 6 of 32 such rows come by chance
    assert row(show.document(lines), "two", "1", "1", "timm / peft")[5:] == ["4 of 5 blocks", show.SPREAD]
    assert row(text, "same", "1", "1")[-1] == "1.010 (1.000 to 1.020)"


def test_the_part_of_the_readme_is_put_between_its_markers(show: ModuleType) -> None:
    once = show.with_part("# A\n\n## Documents\n\nend\n", "old")
    assert once.index("old") < once.index("## Documents")
    assert show.with_part(once, "new") == once.replace("old", "new")


@pytest.mark.skipif(not RECORD.exists(), reason="no benchmark was run yet")
def test_document_and_readme_are_made_of_their_record(show: ModuleType) -> None:
    lines = [json.loads(text) for text in RECORD.read_text(encoding="utf-8").splitlines()]
    again = "run `python benchmarks/side_by_side.py --render`"
    assert show.document(lines) == (TREE / "docs" / "benchmark.md").read_text(encoding="utf-8"), again
    readme = (TREE / "README.md").read_text(encoding="utf-8")
    assert show.with_part(readme, show.readme_part(lines)) == readme, again


@pytest.mark.slow
def test_a_file_that_is_slightly_wrong_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxsim")
    pytest.importorskip("onnxslim")
    monkeypatch.syspath_prepend(TREE / "benchmarks")
    build, networks = importlib.import_module("bench.build"), importlib.import_module("bench.networks")
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)
    made = networks.Made(nn.Sequential(*layers).eval(), torch.randn(8, 3, 6, 6))
    told: dict[str, Any] = {}
    network = networks.Network("small", "", lambda: made)
    build.build(network, "plain export", tmp_path, told.update)
    assert told["right"]
    assert told["error"] < 1e-6
    assert told["export"]["peak_mb"] >= 0

    path = build.file_of(tmp_path, "plain export")
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[np.abs(values).argmax()] *= 1.01  # one of 1440 weights, by one in a hundred
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, path)
    assert not build.judge(path, tmp_path)["right"]
