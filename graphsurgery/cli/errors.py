"""What the command line says when it is used wrongly."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["UsageError", "first_line", "nearest"]


class UsageError(Exception):
    """The command or the model cannot be used as given: one sentence, exit code 2."""


def first_line(error: BaseException, limit: int = 240) -> str:
    """Return `"TypeName: first sentence of the message"`, of its first line, cut to `limit` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0].split('. ')[0]}" if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the name in `known` most like `name`, `""` where none is alike."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
