"""What the commands print: renderables, made from results."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

import graphsurgery as gs
from graphsurgery.cli.parts import PartsOutcome
from graphsurgery.cli.run import Compared, Outcome
from graphsurgery.report.parts_text import render as render_parts
from graphsurgery.report.text import render

__all__ = ["compared", "inspection", "outcome", "passes", "verdict"]

LINES_PER_GROUP = 12  # of changes or refusals; --json and --report hold them all


def outcome(done: Outcome | PartsOutcome) -> list[RenderableType]:
    """The report of `optimize` and the files it wrote."""
    report = done.report
    lines: list[RenderableType] = [
        render(report, limit=LINES_PER_GROUP) if isinstance(report, gs.Report) else render_parts(report)
    ]
    lines += [Text(f"wrote {path}") for path in done.written]
    if not done.ok:
        some = isinstance(done, PartsOutcome) and done.written
        said = "a part was not written, see the notes" if some else "nothing was written"
        lines.append(Text(f"verification failed: {said}", style="bold red"))
    return lines


def inspection(found: gs.Report) -> list[RenderableType]:
    """What could be folded and what refuses, in full."""
    return [render(found), Text("nothing was changed", style="dim")]


def verdict(result: gs.Verdict) -> list[RenderableType]:
    """The verdict in one sentence, and a table of the outputs."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("output")
    for heading in ("shape", "max error", "mean error", "rounding ratio", "top-1", "verdict"):
        table.add_column(heading, justify="right")
    for output in result.outputs:
        top1 = f"{output.top1_agreed}/{output.top1_checked}" if output.top1_checked else "-"
        ratio = "-" if output.rounding_ratio is None else f"{output.rounding_ratio:.2f}"
        table.add_row(
            output.name,
            "x".join(map(str, output.shape)) or "scalar",
            f"{output.max_error:.1e}",
            f"{output.mean_error:.1e}",
            ratio,
            top1,
            Text("ok", style="green") if output.ok else Text("different", style="bold red"),
        )
    lines: list[RenderableType] = [table]
    if isinstance(result, gs.RuntimesVerdict):
        lines += ["", _runtimes(result)]
    lines += [Text(f"other sizes: {'; '.join(result.sizes)}")] if result.sizes else []
    lines += [Text(f"note: {note}") for note in result.notes]
    sides = f"{result.candidate} against {result.reference}"
    lines.append(Text(f"{sides}: {result.reason}", style="green" if result.ok else "bold red"))
    return lines


def compared(found: Compared) -> list[RenderableType]:
    """The verdict, and where the programs begin to differ."""
    lines = verdict(found.verdict)
    if found.location is not None:
        lines += ["", Text(str(found.location))]
    if found.unlocated:
        lines.append(Text(f"the first difference could not be located: {found.unlocated}"))
    return lines


def _runtimes(result: gs.RuntimesVerdict) -> Table:
    """What each runtime said."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("runtime", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("why")
    styles = {"equal": "green", "different": "bold red", "not run": "yellow"}
    for item in result.runtimes:
        reason = item.reason.removeprefix("not run: ")
        table.add_row(item.runtime, Text(item.status, style=styles[item.status]), Text(reason))
    return table


def passes(described: list[dict[str, Any]]) -> Table:
    """The passes, in the order they run."""
    table = Table(show_edge=False, pad_edge=False, show_lines=True)
    table.add_column("pass", no_wrap=True)  # a name that is cut off cannot be typed again
    table.add_column("does")
    for item in described:
        runs = "runs by default" if item["default"] else "runs when named"
        facts = [runs, f"values {item['preserves']['values']}", *item["options"]]
        table.add_row(item["name"], Text(f"{item['summary']}\n").append("; ".join(facts), style="dim"))
    return table
