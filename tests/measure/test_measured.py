"""`cost="measured"`: what is proposed, kept, left, undone and reported. Times are made up but once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from measuring import FakeTimer, blocks, by_macs, by_nodes, measured, unable
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery.cost import layer_counts
from graphsurgery.errors import PassError
from graphsurgery.graph import structural_hash
from graphsurgery.measure import Cut, MeasuredCost, Timing
from graphsurgery.passes import MergeSiblings
from graphsurgery.report import Measurement
from graphsurgery.report.text import plain_text
from graphsurgery.rewrite import PassResult

X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))


def optimize(
    timer: Any, model: nn.Module | None = None, verify: Any = "off", **options: Any
) -> gs.OptimizeResult:
    model = blocks() if model is None else model
    return gs.optimize(model, X, cost=measured(timer), verify=verify, **options)


def entries(result: gs.OptimizeResult, part: str) -> list[Measurement]:
    return [found for found in result.report.measured if part in found.pass_name]


# -- what is kept


def test_keeps_what_is_faster_and_the_result_is_verified() -> None:
    timer = FakeTimer(by_nodes)
    model = blocks()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    result = optimize(timer, model, verify="final")
    assert result.report.verification is not None
    assert result.report.verification.ok
    # q, k and v are one layer each time; so is the bottleneck, with more multiplications than before
    assert layer_counts(result.graph_module)["linear"] == 6
    assert result.report.after.macs > result.report.before.macs
    assert {change.pass_name for change in result.report.changes} >= {
        "measured-merge-siblings",
        "measured-fold-affine",
    }
    assert not result.report.failures
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_keeps_nothing_that_is_slower_and_says_so_with_numbers() -> None:
    plain = gs.optimize(blocks(), X, verify="off")

    def timer(before: Cut, after: Cut, threads: int, blocks: int) -> Timing:
        return Timing((97.0,) * blocks, (98.0,) * blocks)

    result = optimize(timer)
    assert structural_hash(result.graph_module) == structural_hash(plain.graph_module)
    merges = [refusal for refusal in result.report.refusals if refusal.pass_name == "measured-merge-siblings"]
    assert {refusal.code for refusal in merges} == {"slower"}
    assert "97 ms as it is, 98 ms rewritten, ratio 1.010" in merges[0].reason
    assert "0 of 9 blocks" in merges[0].reason
    assert {ref.module for ref in merges[0].nodes} == {"0.q", "0.k", "0.v"}
    assert not any(found.kept for found in result.report.measured)


def test_a_tie_and_a_gain_within_the_noise_stay_as_they_are() -> None:
    for timer in (FakeTimer(lambda _: 1.0), FakeTimer(lambda _: 1.0, noise=(0.9, 0.9, 1.05))):
        result = optimize(timer, passes=["merge-siblings"])
        assert not result.report.changes
        assert [found.kept for found in entries(result, "merge")] == [False, False]


def test_losers_are_left_out_and_the_others_written() -> None:
    model = nn.Sequential(blocks(1), blocks(1, inner=13))

    def timer(before: Cut, after: Cut, threads: int, blocks: int) -> Timing:
        slower = before.cost.macs == 2 * 32 * 13 * 5 * 2  # the second bottleneck, for both samples
        return Timing((1.0,) * blocks, (1.5 if slower else 0.5,) * blocks)

    result = optimize(timer, model, passes=["fold-affine"])
    assert {found.modules[0]: found.kept for found in entries(result, "fold")} == {
        "0.0.down": True,
        "1.0.down": False,
    }
    assert layer_counts(result.graph_module)["linear"] == 11
    assert [refusal.code for refusal in result.report.refusals if "measured" in refusal.pass_name] == [
        "slower"
    ]


def test_what_cannot_be_timed_stays() -> None:
    plain = gs.optimize(blocks(), X, verify="off")
    result = optimize(unable)
    assert structural_hash(result.graph_module) == structural_hash(plain.graph_module)
    assert {refusal.code for refusal in result.report.refusals if "measured" in refusal.pass_name} == {
        "not-measured"
    }
    assert all(found.ratio is None and "no kernel" in found.reason for found in result.report.measured)


def test_the_whole_network_has_the_last_word() -> None:
    plain = gs.optimize(blocks(), X, verify="off")

    def timer(before: Cut, after: Cut, threads: int, blocks: int) -> Timing:
        whole = before.cost.nodes > 10
        return Timing((1.0,) * blocks, (1.1 if whole else 0.9,) * blocks)

    result = optimize(timer)
    assert structural_hash(result.graph_module) == structural_hash(plain.graph_module)
    assert not any(found.kept for found in result.report.measured)
    assert any("left out: the whole network with them" in note for note in result.report.captured.notes)
    slower = [refusal for refusal in result.report.refusals if refusal.pass_name == "measured-merge-siblings"]
    assert len(slower) == 2


def test_a_swap_is_timed_and_kept_as_a_whole() -> None:
    def timer(before: Cut, after: Cut, threads: int, blocks: int) -> Timing:
        faster = layer_counts(after.gm).get("linear", 0) < layer_counts(before.gm).get("linear", 0)
        return Timing((1.0,) * blocks, (0.5 if faster else 2.0,) * blocks)

    result = optimize(timer, blocks(1), verify="final", passes=["linear-to-conv1x1", "conv1x1-to-linear"])
    assert "linear" not in layer_counts(result.graph_module)
    assert [found.kept for found in result.report.measured] == [True, False, True]
    assert result.report.measured[-1].kind == "the whole network"
    assert result.report.verification is not None
    assert result.report.verification.ok


# -- the settings


def test_named_passes_are_proposed_and_no_others() -> None:
    result = optimize(FakeTimer(by_macs), blocks(1), passes=["eliminate-identity", MergeSiblings()])
    assert result.report.passes == ("eliminate-identity", "measured-merge-siblings")
    assert {found.pass_name for found in result.report.measured} == {"measured-merge-siblings"}


def test_a_limit_on_parameters_holds_for_proposals() -> None:
    tight = optimize(FakeTimer(by_nodes), blocks(1), passes=["fold-affine"], max_param_growth=1.0)
    assert not entries(tight, "fold")
    assert entries(optimize(FakeTimer(by_nodes), blocks(1), passes=["fold-affine"]), "fold")


@pytest.mark.parametrize(
    "options",
    [{"threads": -1}, {"blocks": 0}, {"threads": True}, {"cache": True}, {"cache": 3}, {"timer": 3}],
)
def test_refuses_settings_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(PassError, match=f"{next(iter(options))} of MeasuredCost"):
        MeasuredCost(**options)


def test_a_pass_by_itself_takes_no_measured_cost() -> None:
    with pytest.raises(PassError, match=r"give it to graphsurgery\.optimize"):
        gs.passes.FoldAffine(cost="measured")


# -- with the rest of the pipeline


def test_equal_stretches_are_timed_once() -> None:
    timer = FakeTimer(by_nodes)
    result = optimize(timer, blocks(3), passes=["merge-siblings"])
    assert [found.cached for found in entries(result, "merge")] == [False, True, True]
    assert len(timer.calls) == 2  # one family, and the whole network


def test_detects_a_wrong_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timer may be fooled, the verification not: the change is undone and named."""
    right = MergeSiblings.run

    def wrong(self: MergeSiblings, gm: Any) -> PassResult:
        result = right(self, gm)
        for change in result.changes[:1]:
            for name in change.parameters[:1]:
                weight = result.graph_module.get_parameter(name)
                changed = weight.detach().clone()
                changed[0, 0] += 1e-2
                gs.graph.set_attr(result.graph_module, name, changed, parameter=True)
        return result

    monkeypatch.setattr(MergeSiblings, "run", wrong)
    result = optimize(FakeTimer(by_nodes), verify="final", passes=["merge-siblings"])
    assert result.report.verification is not None
    assert result.report.verification.ok
    assert {failure.pass_name for failure in result.report.failures} == {"measured-merge-siblings"}
    modules = {ref.module for change in result.report.changes for ref in change.before}
    assert "0.q" not in modules
    undone = next(found for found in entries(result, "merge") if found.modules[0] == "0.q")
    assert not undone.kept


def test_parts_of_a_model_are_timed_too() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = blocks(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) if float(x.sum()) > -1e9 else x

    result = gs.optimize_parts(Loop().eval(), X, cost=measured(FakeTimer(by_nodes)))
    assert any(part.report is not None and part.report.measured for part in result.report.parts)


# -- the report


def test_the_report_keeps_the_times_in_json_and_shows_them() -> None:
    result = optimize(FakeTimer(by_nodes), passes=["merge-siblings"])
    again = gs.Report.from_json(result.report.to_json())
    assert again == result.report
    first = again.measured[0]
    assert dataclasses.asdict(first) | {"modules": ()} == {
        **{"pass_name": "measured-merge-siblings", "kind": "linear+linear+linear", "modules": ()},
        **{"before_ms": 3.0, "after_ms": 2.0, "ratio": 2 / 3, "least": 2 / 3, "most": 2 / 3},
        **{"blocks": 9, "faster_blocks": 9, "kept": True, "cached": False, "reason": ""},
    }
    text = plain_text(result.report, width=160)
    assert "timed on onnxruntime" in text
    assert "and 1 alike" in text
    said = "candidates on onnxruntime, its own choice of threads: 1 timed, 1 known from equal ones, 2 kept"
    assert said in " ".join(text.split())


def test_one_run_on_onnxruntime(tmp_path: Path) -> None:
    """Real files and clocks; what is faster is the machine's to say."""
    cache = tmp_path / "timings.json"
    settings = MeasuredCost(threads=1, blocks=5, cache=cache)
    result = gs.optimize(blocks(1), X, cost=settings, passes=["merge-siblings"])
    found = entries(result, "merge")
    assert [entry.reason for entry in found] == [""]
    assert all(entry.before_ms and entry.after_ms and entry.blocks == 5 for entry in found)
    assert result.report.verification is not None
    assert result.report.verification.ok
    assert cache.is_file()
