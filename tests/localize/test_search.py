"""Where a difference came in, from verdicts alone: the first wrong value, what may be to blame, halving."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphsurgery.errors import RuntimeUnavailableError
from graphsurgery.localize.pairing import Print
from graphsurgery.localize.result import Localization, Place, Stage
from graphsurgery.localize.search import Found
from graphsurgery.localize.stages import Chain, Step, chain_of
from graphsurgery.verify import Baseline, Comparison, OutputVerdict, Runner, TorchRunner, Verdict, runtimes

search: Any = importlib.import_module(
    "graphsurgery.localize.search"
)  # the package has a function of that name


@dataclass
class Graph:
    """A program as a search sees it: for each value what it is made of."""

    places: tuple[Place, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, made: dict[str, str], *outputs: str) -> Graph:
        return cls(tuple(Place(n, "op", inputs=tuple(i.split())) for n, i in made.items()), outputs)

    def exposed(self, names: Sequence[str], called: Sequence[str], shapes: object) -> Runner:
        raise AssertionError("verdicts are given")


def verdict(name: str, ok: bool) -> OutputVerdict:
    return OutputVerdict(name, (1,), "float32", 1, ok, "")


def upper(graph: Graph) -> Graph:
    """The reference: the same under other names."""
    return replace(graph, places=tuple(replace(p, name=p.name.upper()) for p in graph.places))


def first(graph: Graph, good: str, wrong: str) -> Found:
    verdicts = {n: verdict(n, True) for n in good.split()} | {n: verdict(n, False) for n in wrong.split()}
    return search._first(graph, upper(graph), {name: name.upper() for name in verdicts}, verdicts)


def told(found: Found) -> tuple[str, str, list[str], list[str]]:
    """First, what it stands for, among and before."""
    assert found.first is not None
    assert found.stands_for is not None
    assert found.error is not None
    assert found.error.name == found.first.name
    return (
        found.first.name,
        found.stands_for.name,
        [p.name for p in found.among],
        [v.name for v in found.before],
    )


CHAIN = Graph.of({"x": "", "a": "x", "b": "a", "c": "b", "d": "c"}, "d")


def test_the_first_wrong_value_behind_those_that_agree() -> None:
    assert told(first(CHAIN, "x a", "b c d")) == ("b", "B", [], ["a"])
    assert told(first(CHAIN, "x a", "c d")) == ("c", "C", ["b"], ["a"])
    assert told(first(CHAIN, "", "d")) == ("d", "D", ["x", "a", "b", "c"], [])
    found = first(CHAIN, "x a", "c d")
    assert (found.values, found.compared, found.agreed) == (5, 4, 2)


def test_a_wrong_value_that_a_right_one_cuts_off_from_the_output_is_not_to_blame() -> None:
    assert told(first(CHAIN, "x c", "a d")) == ("d", "D", [], ["c"])
    aside = Graph.of({"x": "", "dead": "x", "a": "x", "y": "a"}, "y")
    assert told(first(aside, "x a", "dead y")) == ("y", "Y", [], ["a"])


def test_nothing_wrong_on_a_way_to_an_output_is_no_place() -> None:
    found = first(CHAIN, "x a b c d", "")
    assert (found.first, found.stands_for, found.error, found.among, found.before) == (
        None,
        None,
        None,
        (),
        (),
    )
    assert (found.values, found.compared, found.agreed) == (5, 5, 5)
    assert first(CHAIN, "x a", "").first is None  # what was not compared says nothing


def test_of_several_ways_all_that_is_not_known_to_agree_is_named() -> None:
    graph = Graph.of({"x": "", "a": "x", "b": "x", "c": "a b", "y": "c a x"}, "y", "a")
    assert told(first(graph, "x b", "y")) == ("y", "Y", ["a", "c"], ["x", "b"])
    assert told(first(graph, "x a", "y")) == ("y", "Y", ["b", "c"], ["a", "x"])


def test_what_is_no_place_is_passed_over() -> None:
    """A size, or an input that a file takes its weights from."""
    graph = Graph.of({"x": "n", "a": "x n", "b": "x", "c": "a b n", "y": "c n"}, "y")
    assert told(first(graph, "", "y")) == ("y", "Y", ["x", "a", "b", "c"], [])
    assert told(first(graph, "x", "c y")) == ("c", "C", ["a", "b"], ["x"])


def test_what_rounding_alone_decides_agrees() -> None:
    near = Comparison("native", 0, 0, None, None, None, 4.0, 3.0, 2, 2, "example", (0,), 0, 0)
    far = replace(near, factor_needed=5.0)
    undecided = replace(verdict("a", False), native=near)
    assert search.agrees(undecided)  # inconclusive
    assert not search.agrees(replace(undecided, native=far))
    assert not search.agrees(replace(undecided, float64=far))
    assert search.agrees(replace(undecided, float64=near))
    assert not search.agrees(verdict("a", False))
    assert search.agrees(verdict("a", True))


def test_parts_hold_each_value_of_the_reference_once_and_no_more_than_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search, "_ELEMENTS_AT_ONCE", 10)
    prints = {name: Print.of(torch.ones(size)) for name, size in {"a": 6, "b": 4, "c": 1, "big": 50}.items()}
    pairs = {"1": "a", "2": "b", "3": "c", "4": "a", "5": "big", "6": "c"}
    parts = list(search._parts(pairs, prints))
    assert parts == [{"1": "a", "2": "b"}, {"3": "c", "4": "a"}, {"5": "big"}, {"6": "c"}]
    assert list(search._parts({"1": "a", "2": "a"}, prints)) == [{"1": "a"}, {"2": "a"}]
    assert list(search._parts({}, prints)) == []


def test_the_nearest_values_with_a_counterpart() -> None:
    graph = Graph.of({"x": "", "a": "x", "b": "a p", "c": "b a outside", "d": "c"}, "d")
    assert search._read_by(graph, "d", {"a": "A", "x": "X"}) == ["a"]
    assert sorted(search._read_by(graph, "b", {"x": "X", "b": "B"})) == ["x"]
    assert search._read_by(graph, "a", {}) == []


def halved(
    graph: Graph, wrong: set[str], pairs: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Found, list[str]]:
    looked: list[str] = []

    def judge(reference: object, sample: object, inputs: object, part: dict[str, str], prints: object):  # type: ignore[no-untyped-def]
        looked.extend(part)
        return {name: verdict(name, name not in wrong) for name in part}

    monkeypatch.setattr(search, "judge_pairs", judge)
    known = {name: name.upper() for name in pairs.split()}
    return search._halve(upper(graph), None, graph, None, known, {}), looked


@pytest.mark.parametrize("start", [0, 1, 9, 30, 31])
def test_halving_finds_the_first_wrong_value_of_a_chain(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"v{i}" for i in range(32)]
    chain = Graph.of({name: names[i - 1] if i else "" for i, name in enumerate(names)}, names[-1])
    found, looked = halved(chain, set(names[start:]), " ".join(names), monkeypatch)
    assert found.first is not None
    assert found.first.name == names[start]
    assert [v.name for v in found.before] == names[max(0, start - 1) : start]
    assert len(looked) == len(set(looked)) <= 8


def test_halving_goes_back_while_what_a_value_reads_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the calls is not one of wrong after right: the branch of `a` agrees."""
    graph = Graph.of({"x": "", "w": "x", "a": "x", "b": "a", "c": "b", "hidden": "w", "y": "c hidden"}, "y")
    found, _ = halved(graph, {"w", "y"}, "x w a b c y", monkeypatch)
    assert told(found)[0] == "w"
    right, looked = halved(graph, set(), "x w a b c y", monkeypatch)
    assert right.first is None
    assert looked == ["y"]


MODEL, FILE = nn.Identity(), Path("net.onnx")


def step(program: nn.Module | Path, runtime: str, status: str) -> Step:
    ran = None if status == "not run" else Verdict(status == "equal", "", "", "", "")
    return Step(program, runtime, Stage(f"on {runtime}", status, ""), ran)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "blame"),
    [
        ([(FILE, "reference", "equal"), (FILE, "onnxruntime", "equal")], ""),
        ([(FILE, "reference", "not run"), (FILE, "onnxruntime", "equal")], ""),
        (
            [(MODEL, "torch", "equal"), (FILE, "reference", "different"), (FILE, "onnxruntime", "different")],
            "on reference: the file itself, not a runtime",
        ),
        (
            [(FILE, "reference", "equal"), (FILE, "onnxruntime-unoptimised", "different")],
            "on onnxruntime-unoptimised: the kernels of onnxruntime; on reference agrees",
        ),
        (
            [
                (FILE, "reference", "equal"),
                (FILE, "onnxruntime-unoptimised", "equal"),
                (FILE, "onnxruntime", "different"),
            ],
            "on onnxruntime: the optimisations of onnxruntime; on onnxruntime-unoptimised agrees",
        ),
        (
            [(MODEL, "torch", "equal"), (FILE, "reference", "not run"), (FILE, "openvino", "different")],
            "on openvino: the program or the runtime; no simpler one could be run",
        ),
        ([(MODEL, "torch", "different")], "on torch: the program itself, not a runtime"),
    ],
)
def test_what_departs_first_is_to_blame(steps: list[tuple[nn.Module | Path, str, str]], blame: str) -> None:
    chain = Chain(tuple(step(*each) for each in steps))
    assert chain.blame == blame
    assert (chain.departs is None) == (blame == "")
    assert [stage.status for stage in chain.stages] == [status for *_, status in steps]


def test_a_result_in_words() -> None:
    there = Place("conv", "conv2d", "layer.0", 'net.py:3, in "self.conv(x)"', "conv")
    node = Place("v1", "Conv", "", "", "node_conv", (), ("w",))
    found = Localization(
        *(True, "it departs", "the file", "a", "b"),
        first=node,
        stands_for=there,
        among=(Place("v0", "Pad"),),
        error=replace(verdict("v1", False), reason="off by 3"),
        before=(replace(verdict("x", True), reason="fine"),),
        stages=(Stage("on torch", "equal", ""),),
    )
    assert (found.module, found.source) == (there.module, there.source)
    assert [p.name for p in found.places] == ["v0", "v1"]
    assert str(found).splitlines() == [
        "it departs",
        "  first difference: Conv v1 (node node_conv)",
        f"  stands for: conv2d conv in layer.0, {there.source}",
        "  error there: off by 3",
        "  before, x: fine",
        "  or in between: Pad v0",
        "  on torch: equal",
        "  departs first: the file",
    ]
    other = replace(found, stands_for=node, first=there)
    assert (other.module, other.source) == (there.module, there.source)
    bare = Localization(False, "nothing differs", "", "a", "b")
    assert (str(bare), bare.module, bare.source, bare.places) == ("nothing differs", "", "", ())


def small() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2).eval()


def test_each_program_is_judged_in_order_and_the_last_on_runtimes_that_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right, wrong, x = small(), small(), torch.ones(2, 3)
    with torch.no_grad():
        wrong.weight[0, 0] += 1

    def missing(module: nn.Module) -> None:
        raise RuntimeUnavailableError("no compiler")

    monkeypatch.setitem(runtimes._OF_MODULES, "torch-compile", missing)
    baseline = Baseline(right, x, samples=1)
    chain = chain_of(baseline, [right, wrong], ["torch", "torch-compile"])
    told = [(step.runtime, step.stage.name, step.stage.status) for step in chain.steps]
    assert told == [
        ("torch", "torch Linear", "equal"),
        ("torch", "torch Linear", "different"),
        ("torch-compile", "torch Linear", "not run"),
    ]
    assert chain.departs is chain.steps[1]
    assert [step.program for step in chain.steps] == [right, wrong, wrong]
    assert [step.rewrites for step in chain.steps] == [False, False, True]
    assert [step.verdict is None for step in chain.steps] == [False, False, True]
    assert "times the rounding noise" in chain.stages[1].reason
    assert chain.stages[2].reason == "no compiler"


def test_a_candidate_that_no_runtime_takes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right, other = small(), small()
    baseline = Baseline(right, torch.ones(2, 3), samples=1)

    def runner(module: nn.Module) -> Runner:
        if module is other:
            raise RuntimeUnavailableError("not here")
        return TorchRunner(module)

    monkeypatch.setitem(runtimes._OF_MODULES, "torch", runner)
    with pytest.raises(RuntimeUnavailableError, match=r"the candidate could not be run: .*not here"):
        chain_of(baseline, [right, other], ())
    assert chain_of(baseline, [other, right], ()).stages[0].status == "not run"
