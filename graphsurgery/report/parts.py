"""The report of partial surgery: which submodules were rewritten, which were not, and why."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

from graphsurgery.report.codec import from_plain, parsed, to_plain
from graphsurgery.report.model import Report
from graphsurgery.verify.verdict import Verdict

__all__ = ["PARTS_SCHEMA_VERSION", "PartReport", "PartStatus", "PartsReport", "WholeCheck"]

PARTS_SCHEMA_VERSION = 1

PartStatus = Literal["folded", "unchanged", "refused"]


@dataclass(frozen=True)
class PartReport:
    """What became of one submodule.

    Attributes:
        path: Its path in the model, `""` for the model itself.
        also: Its other paths, where one module stands at several.
        kind: Its class.
        status: `"folded"` (a graph stands in its place), `"unchanged"` (nothing to fold: the original stays)
            or `"refused"` (the original stays, and what is inside of it was looked at).
        code: Stable code of a refusal, `""` otherwise.
        reason: One sentence.
        calls: How often it was called in the recorded runs.
        report: Its own report; None where it was not captured.
    """

    path: str
    also: tuple[str, ...]
    kind: str
    status: PartStatus
    code: str
    reason: str
    calls: int
    report: Report | None = None


@dataclass(frozen=True)
class WholeCheck:
    """The comparison of the whole result with the original, on one call.

    Attributes:
        ok: Whether nothing was found that rounding does not explain.
        decided: Whether the outputs could be compared value by value; where not, only the parts were.
        reason: One sentence with the figures.
        verdict: The verdict on the outputs; None where they could not be compared value by value.
    """

    ok: bool
    decided: bool
    reason: str
    verdict: Verdict | None = None


@dataclass(frozen=True)
class PartsReport:
    """What was done to the parts of a model, and how the whole compares with the original.

    Attributes:
        schema_version: Version of this tree; grows when a field changes.
        model: Class name of the model.
        method: What was called on it, `"forward"` for a call of the model itself.
        parts: Each submodule that was looked at, those that hold others before them.
        checks: One comparison of the whole with the original per call that was given; empty when off.
        notes: What a reader should know besides.
        seconds: Wall time of each stage.
        torch_version: Version of torch it was made with.
    """

    schema_version: int
    model: str
    method: str
    parts: tuple[PartReport, ...]
    checks: tuple[WholeCheck, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    torch_version: str = ""

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report as JSON text; non-finite floats as `"NaN"`, `"Infinity"`, `"-Infinity"`.

        Args:
            indent: As for `json.dumps`.
        """
        return json.dumps(to_plain(self), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> PartsReport:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The text is no JSON, of another schema version, or a field is missing, unknown or of
                the wrong type.
        """
        value = parsed(text)
        version = value.get("schema_version") if isinstance(value, dict) else None
        if version != PARTS_SCHEMA_VERSION or "parts" not in value:
            raise ValueError(
                f"expected a report of parts of schema version {PARTS_SCHEMA_VERSION}, got {version!r}"
            )
        return from_plain(cls, value)

    def __str__(self) -> str:
        """The report as plain text, 100 columns wide."""
        from graphsurgery.report.parts_text import plain_text  # rich is loaded only to show a report

        return plain_text(self)

    def __rich__(self) -> object:
        """What `rich.print(report)` shows."""
        from graphsurgery.report.parts_text import render  # as above

        return render(self)
