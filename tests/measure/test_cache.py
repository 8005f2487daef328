"""Times kept: in memory, in a file, by machine and version; a bad file is as good as none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from measuring import FakeTimer, blocks, by_nodes, measured

import graphsurgery as gs
from graphsurgery.measure import Timing, cache
from graphsurgery.measure.cache import VARIABLE, Timings, cache_file

X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
TIMES = Timing((2.0, 2.5), (1.0, 1.25))


def test_another_process_reads_the_times(tmp_path: Path) -> None:
    file = tmp_path / "new" / "timings.json"
    Timings(file, 1, 2).put("a", "b", TIMES)
    Timings(file, 1, 2).put("c", "d", TIMES)
    again = Timings(file, 1, 2)
    assert again.get("a", "b") == again.get("c", "d") == TIMES
    assert again.get("b", "a") == Timing(TIMES.after_ms, TIMES.before_ms)
    assert again.get("a", "d") is None
    assert [path.name for path in file.parent.iterdir()] == ["timings.json"]


def test_times_hold_for_one_machine_version_and_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "timings.json"
    Timings(file, 1, 2).put("a", "b", TIMES)
    assert Timings(file, 2, 2).get("a", "b") is None
    assert Timings(file, 1, 9).get("a", "b") is None
    monkeypatch.setattr(cache, "machine", lambda: "another processor, 64 cores")
    assert Timings(file, 1, 2).get("a", "b") is None
    monkeypatch.undo()
    monkeypatch.setattr(cache, "runtime_version", lambda: "0.1")
    assert Timings(file, 1, 2).get("a", "b") is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1, 2]",
        '{"version": 0, "timings": {}}',
        '{"version": 1, "timings": [1]}',
        '{"version": 1, "timings": {"KEY": [[1.0], [1.0, 2.0]]}}',
        '{"version": 1, "timings": {"KEY": [["x"], [1.0]]}}',
        '{"version": 1, "timings": {"KEY": [[NaN], [1.0]]}}',
        '{"version": 1, "timings": {"KEY": [[0.0], [1.0]]}}',
        b"\xff\xfe\x00",
    ],
)
def test_a_broken_or_foreign_file_is_ignored_and_replaced(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "timings.json"
    key = Timings(None, 1, 2)._key("a", "b")
    file.write_bytes(content if isinstance(content, bytes) else content.replace("KEY", key).encode())
    timings = Timings(file, 1, 2)
    assert timings.get("a", "b") is None
    timings.put("a", "b", TIMES)
    assert Timings(file, 1, 2).get("a", "b") == TIMES


def test_a_file_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    timings = Timings(tmp_path / "file" / "timings.json", 1, 2)
    timings.put("a", "b", TIMES)
    assert timings.get("a", "b") == TIMES
    folder = Timings(tmp_path, 1, 2)
    folder.put("a", "b", TIMES)
    assert folder.get("a", "b") == TIMES


def test_the_file_keeps_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_MOST", 3)
    file = tmp_path / "timings.json"
    for name in "abcde":
        Timings(file, 1, 2).put(name, "x", TIMES)
    assert len(json.loads(file.read_text())["timings"]) == 3
    assert Timings(file, 1, 2).get("e", "x") == TIMES
    assert Timings(file, 1, 2).get("a", "x") is None


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "graphsurgery" / "timings.json"
    assert cache_file(False) is None
    assert cache_file("here.json") == Path("here.json")
    monkeypatch.setenv(VARIABLE, "off")
    assert cache_file() is None
    monkeypatch.setenv(VARIABLE, os.fspath(tmp_path / "own.json"))
    assert cache_file() == tmp_path / "own.json"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file() == Path.home() / ".cache" / "graphsurgery" / "timings.json"


def test_a_second_run_reads_the_times_and_decides_alike(tmp_path: Path) -> None:
    timer = FakeTimer(by_nodes)
    runs = [
        gs.optimize(
            blocks(1), X, passes=["merge-siblings"], verify="off", cost=measured(t, cache=tmp_path / "t")
        )
        for t in (timer, FakeTimer(lambda cost: 100.0 - cost.nodes))
    ]
    first, second = (run.report.measured for run in runs)
    assert [found.kept for found in first] == [found.kept for found in second] == [True, True]
    assert [found.cached for found in first] == [False, False]
    assert [found.cached for found in second] == [True, True]
