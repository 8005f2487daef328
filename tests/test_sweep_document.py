"""The document of the sweep over architectures: what it counts, and that its record makes it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

TREE = Path(__file__).parent.parent
RECORD = TREE / "docs" / "architectures.jsonl"


def table() -> Any:
    spec = importlib.util.spec_from_file_location("zoo_table", TREE / "benchmarks" / "zoo" / "table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line(name: str, **changed: Any) -> dict[str, Any]:
    figures = {"layers": {"conv": 2, "norm": 2}, "nodes": 8, "parameters": 10, "macs": 100, "flops": 250}
    return {
        "name": name,
        "kind": "survey",
        "family": "made up",
        "note": "",
        "versions": {"torch": "2.14"},
        "ended": "",
        "captured": "dynamic batch",
        "notes": [],
        "torch": {"ok": True},
        "onnx": {"ok": True},
        "before": figures,
        "after": {**figures, "layers": {"conv": 2}, "nodes": 6},
        "seconds": {"tool_cpu": 2.0, "export_cpu": 4.0},
        **changed,
    }


def timing(name: str, *, ratio: float, exporter: str = "torch") -> dict[str, Any]:
    spread = {"least": ratio - 0.01, "most": ratio + 0.01}
    found = {"exporter": exporter, "before_ms": 4, "after_ms": 4 * ratio, "ratio": ratio, **spread}
    return {**line(name, latency=found), "kind": "latency"}


def failed(name: str, stage: str, *, named: bool) -> dict[str, Any]:
    error = {
        "class": "SomeError",
        "named": named,
        "message": "\x1b[96mno\x1b[0m | such thing at /home/me/model.py:3",
    }
    made = line(name, errors={stage: error})
    for key in ("captured", "torch", "onnx", "before", "after", "seconds") if stage != "onnx" else ("onnx",):
        del made[key]
    return made


def test_the_summary_counts_what_is_wrong_crashed_over_a_limit_and_slow() -> None:
    lines = [
        line("good"),
        line("static", captured="static", notes=["why"], seconds={"tool_cpu": 6.0, "export_cpu": 2.0}),
        line("wrong", torch={"ok": False}),
        failed("not captured", "optimise", named=True),
        failed("crashed", "optimise", named=False),
        failed("no file", "onnx", named=True),
        failed("not built", "make", named=False),
        line("too long", ended="over 180 s of processor time", stage="plain export"),
        timing("good", ratio=1.05),
        timing("static", ratio=0.5, exporter="graphsurgery"),
    ]
    text = table().document(lines)
    summary = text.split("\n\n")[1]
    assert summary.startswith("**7 networks: 71.4 % captured (2 not), 1 wrong, 0 declined")
    assert "by verification in part or whole, 1 crashed with anything but a named error" in summary
    assert "1 over a limit, 1 without an ONNX file; tool time / export time 0.50 in the median" in summary
    assert (
        "; latency of 2: 0.72 of the time in the geometric mean, 1 slower than 1.03, 1 faster than 0.97.**"
        in summary
    )
    assert "| made up | 7 | 5 | 4 | 4 | 4 | 0.75 | 1.00 | 0.50 | 0.78 |" in text
    assert "## Slower than 1.03: 1\n" in text
    assert "| good | 4.00, 4.20 | 1.05 (1.04 to 1.06) |" in text
    assert "| 4.00\\*, 2.00 | 0.50 (0.49 to 0.51) |" in text
    assert "| crashed | SomeError (not named) | no \\| such thing at model.py:3 |" in text
    assert "| static | why |" in text
    assert "| wrong |  | free | **different** | equal | 8 → 6 |" in text
    assert "2 norm" in text
    assert "networks of the list" not in text
    lines[0]["listed"] = 9
    assert "7 of the 9" not in table().document(lines)
    assert "8 of the 9 networks of the list have been run." in table().document(lines)


@pytest.mark.skipif(not RECORD.exists(), reason="no sweep was run yet")
def test_what_verification_declined_is_counted_and_its_latency_left_out() -> None:
    """A wrong result is never handed out, so that count alone would be zero whatever happens."""
    other = failed("file differs", "onnx", named=True)
    other["errors"]["onnx"]["class"] = "VerificationError"
    lines = [
        line("good", listed=9),
        line("undone", failures=["fold-affine: verification: it differs"]),
        other,
        failed("no file", "onnx", named=True),
    ]
    lines += [timing(name, ratio=1.5) for name in ("undone", "file differs", "gone")]
    lines.append(timing("good", ratio=0.5))
    text = table().document(lines)
    assert "4 of 9 networks" in text.split("\n\n")[1]
    assert "0 wrong, 2 declined by verification in part or whole" in text.split("\n\n")[1]
    assert "latency of 1: 0.50 of the time in the geometric mean, 0 slower than 1.03" in text.split("\n\n")[1]
    assert "Latencies of 3 networks are left out" in text
    assert "1.50 (1.49 to 1.51)" not in text
    assert "## Slower" not in text


def test_networks_without_a_latency_are_named_or_counted() -> None:
    lines = [line("good"), line("long"), line("broken"), line("later")]
    assert "Not timed" not in table().document(lines)
    lines += [timing("good", ratio=1.0)]
    lines.append({**line("long", ended="over 180 s of processor time"), "kind": "latency"})
    error = {"class": "SomeError", "named": True, "message": "no"}
    lines.append({**line("broken", errors={"latency": error}, stage="latency"), "kind": "latency"})
    text = table().document(lines)
    assert (
        "none in time: broken (SomeError), long (over 180 s of processor time). Not timed: 1 of made" in text
    )


def test_the_document_is_made_of_its_record() -> None:
    lines = [json.loads(text) for text in RECORD.read_text(encoding="utf-8").splitlines()]
    document = (TREE / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert table().document(lines) == document, "run `python benchmarks/architectures.py --render`"
