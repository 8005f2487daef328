"""Files are written whole or not at all, whatever ends the process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graphsurgery.errors import ExportError, VerificationError
from graphsurgery.export.files import _host, staged, staging

DRIVER = Path(__file__).parents[1] / "killed.py"


def test_a_staged_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    with staged(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"

    def interrupted() -> None:
        with staged(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [item.read_text() for item in tmp_path.iterdir()] == ["whole"]


def test_what_a_dead_process_left_behind_is_removed_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out[1].json"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = tmp_path / f".{path.name}.{_host()}-{dead.pid}.x1.tmp"
    others = [
        tmp_path / f".{path.name}.{_host()}-{os.getppid()}.x1.tmp",  # alive
        tmp_path / f".{path.name}.another-host-{dead.pid}.x1.tmp",
        tmp_path / f".other.json.{_host()}-{dead.pid}.x1.tmp",
    ]
    for folder in (stale, *others):
        folder.mkdir()
        (folder / path.name).write_text("half")
    with staged(path) as temporary:
        temporary.write_text("whole")
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_a_file_that_was_never_written_is_one_sentence(tmp_path: Path) -> None:
    def nothing() -> None:
        with staged(tmp_path / "out.json"):
            pass

    with pytest.raises(ExportError, match=r"cannot write .*out\.json: No such file"):
        nothing()
    assert not list(tmp_path.iterdir())


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    folders = []

    def failing() -> None:
        with staging(tmp_path / "out.onnx") as folder:
            folders.append(str(folder))
            raise VerificationError(f"{folder}/out.onnx is no valid ONNX model")

    with pytest.raises(VerificationError) as caught:
        failing()
    assert str(caught.value) == f"{tmp_path}/out.onnx is no valid ONNX model"
    assert not os.path.exists(folders[0])


@pytest.mark.parametrize("kills", [9, pytest.param(200, marks=pytest.mark.sweep)])
def test_killed_at_any_moment_leaves_the_old_file_or_the_new_one(kills: int, tmp_path: Path) -> None:
    command = [sys.executable, str(DRIVER), str(tmp_path), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["killed"] >= kills // 2  # the others had ended before
    assert found["left behind after a whole run"] == []


def test_an_interrupt_while_tidying_up_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree
    calls: list[str] = []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        calls.append("rmtree")
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(*args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "r.json") as file:
        file.write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
