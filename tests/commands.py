"""The command line run in this process: its exit code, and the folder and the width that it sees."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from graphsurgery.cli.app import OUT, main


def run(*argv: str) -> int:
    """The exit code of ``graphsurgery ARGV``."""
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert isinstance(caught.value.code, int)
    return caught.value.code


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``folder`` the current one for a test, and lines too wide to be broken whatever the terminal."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", list(sys.path))  # the command adds the folder of a model's file
    monkeypatch.setattr(OUT, "_width", 250)
