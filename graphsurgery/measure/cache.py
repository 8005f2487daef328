"""Times that were taken before, in memory and in a file of the user's.

A file that is broken, foreign or cannot be written is as good as none: times can be taken again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from graphsurgery.errors import ExportError
from graphsurgery.export.files import staged
from graphsurgery.export.sessions import runtime_version
from graphsurgery.measure.timing import Timing

__all__ = ["VARIABLE", "Timings", "cache_file", "machine"]

VARIABLE = "GRAPHSURGERY_TIMINGS"
"""Environment variable: the path of the file, or `off`."""

_VERSION = 1
_MOST = 4096
"""Entries that the file keeps, the newest."""


def cache_file(given: Path | str | bool | None = None) -> Path | None:
    """Where the times are kept; None where they are not.

    Args:
        given: A path, False for no file, None for what the environment says.
    """
    if given is None:
        given = os.environ.get(VARIABLE) or None
    if given is False or (isinstance(given, str) and given.lower() == "off"):
        return None
    if given is None:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(root) / "graphsurgery" / "timings.json"
    return Path(str(given))


def machine() -> str:
    """The processor and the number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


class Timings:
    """Times by pair of cuts, versions (torch writes the files), machine and threads."""

    def __init__(self, file: Path | None, threads: int, blocks: int) -> None:
        """Read the file, if there is one."""
        self.file = file
        self._where = (runtime_version(), torch.__version__, machine(), threads, blocks)
        self._known = _read(file)

    def get(self, before: str, after: str) -> Timing | None:
        """The times of two cuts, in whichever order they were taken."""
        found = self._known.get(self._key(before, after))
        if found is not None:
            return Timing(*found)
        found = self._known.get(self._key(after, before))
        return None if found is None else Timing(*found).reversed()

    def put(self, before: str, after: str, timing: Timing) -> None:
        """Keep times, in the file too; what others have written there meanwhile stays."""
        key, value = self._key(before, after), (timing.before_ms, timing.after_ms)
        self._known[key] = value
        if self.file is None:
            return
        entries = {**_read(self.file), key: value}
        entries = dict(list(entries.items())[-_MOST:])
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with staged(self.file) as temporary:
                text = json.dumps({"version": _VERSION, "timings": entries})
                temporary.write_text(text + "\n", encoding="utf-8")
        except (OSError, ExportError):
            self.file = None  # said once is enough; this process still has them

    def _key(self, before: str, after: str) -> str:
        text = repr((before, after, *self._where))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


_Times = tuple[tuple[float, ...], tuple[float, ...]]


def _read(file: Path | None) -> dict[str, _Times]:
    """The entries of a file that are sound."""
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        return {}
    entries = content.get("timings")
    if not isinstance(entries, dict):
        return {}
    return {key: times for key, value in entries.items() if (times := _times(value)) is not None}


def _times(value: Any) -> _Times | None:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(part, list) for part in value):
        return None
    before, after = value
    numbers = all(type(x) in (int, float) and 0 < x < float("inf") for x in before + after)
    return (tuple(before), tuple(after)) if numbers and len(before) == len(after) > 0 else None
