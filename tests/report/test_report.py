"""The report: JSON there and back, strictness, text."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from graphsurgery.cost import Cost
from graphsurgery.report import (
    SCHEMA_VERSION,
    Captured,
    Figures,
    Measurement,
    OnnxFile,
    PassCheck,
    Report,
    TensorSpec,
)
from graphsurgery.report.codec import from_plain, to_plain
from graphsurgery.report.text import plain_text
from graphsurgery.rewrite import Change, NodeRef, PassFailure, Refusal
from graphsurgery.verify.verdict import Comparison, OutputVerdict, Verdict

CONV = NodeRef("conv2d", "conv2d", "stem.conv", "net.py:12, in forward: return self.norm(self.conv(x))")
NORM = NodeRef("batch_norm", "batch_norm", "stem.norm", CONV.source)


def verdict(ok: bool = True) -> Verdict:
    given: dict[str, Any] = {"precision": "native", "worst_case": "normal", "worst_index": (0, 3)}
    odd = {"reference_max_error": None, "reference_mean_error": math.nan, "rounding_ratio": math.inf}
    given |= odd | {"worst_got": -math.inf}
    numbers = {field.name: 1.5 for field in dataclasses.fields(Comparison) if field.name not in given}
    comparison = Comparison(**given, **numbers)
    output = OutputVerdict("logits", (2, 10), "float32", 20, ok, "max error 1e-06", native=comparison, nan=1)
    return Verdict(
        ok, "max error 1e-06", "torch Net", "torch Net", "float64", (output,), ("normal",), (1, 2), 7, ("n",)
    )


@pytest.fixture
def report() -> Report:
    change = Change(
        "fold-affine", "conv+norm", (CONV, NORM), (CONV,), ("stem.conv.weight",), Cost(9), Cost(8), 3e-16
    )
    dead = Change(
        "eliminate-identity", "dead-parameter", (), (), ("old.weight",), Cost(), Cost(), detail="unread"
    )
    refusals = tuple(
        Refusal(
            "fold-affine",
            "costs-more",
            (replace(NORM, module=f"block{i}.norm"),),
            f"{i + 9} > 8",
            Cost(8),
            Cost(9),
        )
        for i in range(3)
    )
    return Report(
        schema_version=SCHEMA_VERSION,
        model="Net",
        captured=Captured(
            True,
            (TensorSpec("image", ("s77", "3", "8", "8"), "float32"),),
            (TensorSpec("logits", ("s77", "10"), "float32"),),
            ("captured as eval",),
        ),
        passes=("eliminate-identity", "fold-affine"),
        rounds=2,
        before=Figures({"conv": 2, "norm": 1}, 4, 1000, 10_000, 20_500, 4400, 1.25),
        after=Figures({"conv": 2}, 3, 900, 10_000, 20_000, 4000, 1.0),
        changes=(change, dead),
        refusals=(*refusals, Refusal("fold-affine", "border", (CONV,), "padded 3x3 before padded 3x3")),
        failures=(PassFailure("third-party", "shapes", "changed the shape of output 0", 1),),
        verify_mode="each-pass",
        verification=verdict(),
        pass_checks=(
            PassCheck("fold-affine", False, verdict(), verdict(False)),
            PassCheck("other", True, verdict()),
        ),
        onnx=OnnxFile("out.onnx", 4000, 20, False, verdict()),
        seconds={"capture": 0.5, "pass:fold-affine": 0.25},
        torch_version="2.14",
        measured=(
            Measurement(
                "measured-merge-siblings", "linear+linear", ("q", "k"), 0.25, 0.2, 0.8, 0.7, 0.9, 9, 9, True
            ),
            Measurement("measured-fold-affine", "linear+linear", ("a", "b"), reason="no kernel for Gemm"),
        ),
    )


# -- JSON


def test_json_round_trip_keeps_everything(report: Report) -> None:
    text = report.to_json()
    again = Report.from_json(text)
    assert again.to_json() == text
    assert str(again) == str(report)
    assert replace(again, verification=None, pass_checks=(), onnx=None) == replace(
        report, verification=None, pass_checks=(), onnx=None
    )
    assert isinstance(again.changes[0].before[0], NodeRef)
    assert again.changes[0].cost_before.flops == 18
    assert again.verification is not None


def test_non_finite_floats_are_strings(report: Report) -> None:
    value = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    native = value["verification"]["outputs"][0]["native"]
    assert (native["reference_mean_error"], native["rounding_ratio"], native["worst_got"]) == (
        *("NaN", "Infinity"),
        "-Infinity",
    )
    again = Report.from_json(report.to_json()).verification
    assert again is not None
    comparison = again.outputs[0].native
    assert comparison is not None
    assert comparison.reference_mean_error is not None
    assert math.isnan(comparison.reference_mean_error)
    assert comparison.worst_got == -math.inf


def test_the_schema_is_stable(report: Report) -> None:
    assert list(json.loads(report.to_json())) == [
        *(
            "schema_version",
            "model",
            "captured",
            "passes",
            "rounds",
            "before",
            "after",
            "changes",
            "refusals",
        ),
        *("failures", "verify_mode", "verification", "pass_checks", "onnx", "seconds", "torch_version"),
        "measured",
    ]


def edited(report: Report, *path: str | int, value: Any) -> str:
    tree = json.loads(report.to_json())
    spot = tree
    for key in path[:-1]:
        spot = spot[key]
    spot[path[-1]] = value
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema_version",), 1, "schema version 3, got version 1"),
        (("model",), 3, r"report\.model: expected str, got 3"),
        (("rounds",), True, r"report\.rounds: expected int"),
        (("rounds",), 2.0, r"report\.rounds: expected int"),
        (("seconds", "capture"), "fast", r"report\.seconds\.capture: expected float"),
        (("captured", "dynamic_batch"), 1, r"report\.captured\.dynamic_batch: expected bool"),
        (("changes", 0, "before", 1, "op"), None, r"report\.changes\[0\]\.before\[1\]\.op: expected str"),
        (("changes",), {}, r"report\.changes: expected tuple"),
        (("verify_mode",), "sometimes", r"report\.verify_mode: expected"),
        (("before", "layers"), [], r"report\.before\.layers: expected dict"),
        (("surprise",), 1, "unknown fields .'surprise'"),
        (("captured", "notes"), "text", r"report\.captured\.notes: expected tuple"),
    ],
)
def test_a_wrong_field_is_named(
    report: Report, path: tuple[str | int, ...], value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Report.from_json(edited(report, *path, value=value))


def test_a_missing_field_is_named(report: Report) -> None:
    tree = json.loads(report.to_json())
    del tree["after"]["flops"]
    with pytest.raises(ValueError, match=r"report\.after: missing fields .'flops'"):
        Report.from_json(json.dumps(tree))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", b"\xff"])
def test_what_is_no_report_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"not JSON|got version None|utf-8"):
        Report.from_json(text)


def test_only_plain_values_are_written() -> None:
    with pytest.raises(TypeError, match="got set"):
        to_plain({"a": {1}})


def test_unions_and_fixed_tuples_are_read() -> None:
    assert from_plain(tuple[int, str], [1, "a"]) == (1, "a")
    assert from_plain(int | str | None, "a") == "a"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 items"):
        from_plain(tuple[int, str], [1])


# -- text


def test_text_shows_figures_changes_refusals_failures_and_verdicts(report: Report) -> None:
    text = str(report)
    for words in [
        "Net (image Nx3x8x8 float32), 2 changes in 0.5 s",
        "captured as eval",
        "fold-affine, conv+norm (1)",
        "stem.conv, stem.norm: conv2d + batch_norm -> conv2d (certificate 3.0e-16)",
        "old.weight -> nothing unread",
        "fold-affine, costs-more (3)",
        "block2.norm: 11 > 8",
        "net.py:12, in forward",
        "rolled back: third-party (shapes, round 1)",
        "after fold-affine: DIFFERENT",
        "out.onnx (4,000 bytes, opset 20)",
    ]:
        assert words in " ".join(text.split()), words
    rows = {line.split("│")[0].strip(): line for line in text.splitlines() if "│" in line}
    assert [part.strip() for part in rows["norm layers"].split("│")[1:]] == ["1", "0", "-100.0 %"]
    assert [part.strip() for part in rows["parameters"].split("│")[1:]] == ["1,000", "900", "-10.0 %"]
    assert [part.strip() for part in rows["conv layers"].split("│")[1:]] == ["2", "2", ""]
    assert [part.strip() for part in rows["onnxruntime, ms"].split("│")[1:]] == ["1.25", "1", "-20.0 %"]


def test_text_without_findings_says_so(report: Report) -> None:
    bare = replace(report, changes=(), refusals=(), failures=(), verification=None, pass_checks=(), onnx=None)
    text = str(bare)
    assert "no changes" in text
    assert "no refusals" in text
    assert "not verified" in text


def test_text_can_be_cut(report: Report) -> None:
    text = plain_text(report, limit=1)
    assert "... and 2 more" in text
    assert "block2.norm" not in text


def test_text_of_a_change_of_many_calls_counts_them(report: Report) -> None:
    refs = tuple(replace(report.changes[0].before[0], op=f"op{i % 2}", module=f"block{i}") for i in range(21))
    text = " ".join(str(replace(report, changes=(replace(report.changes[0], before=refs),))).split())
    assert "block10, block11 and 9 more: 11 op0 + 10 op1 -> conv2d" in text
    assert "1 change in 0.5 s" in text


def test_text_takes_brackets_as_text(report: Report) -> None:
    odd = replace(
        report, model="Net[bold]", refusals=(replace(report.refusals[0], reason="sizes [3, 4] [/red]"),)
    )
    assert "Net[bold]" in str(odd)
    assert "sizes [3, 4] [/red]" in str(odd)


def test_rich_shows_a_report_as_it_is(report: Report) -> None:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(report)
    assert [line.rstrip() for line in capture.get().splitlines()] == str(report).splitlines()


def test_text_is_plain(report: Report) -> None:
    assert "\x1b" not in str(report)
    assert all(len(line) <= 100 for line in str(report).splitlines())
