"""The report of partial surgery as text."""

from __future__ import annotations

import io

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from graphsurgery.report.parts import PartReport, PartsReport

__all__ = ["plain_text", "render"]

_STYLES = {"folded": "green", "unchanged": "dim", "refused": "yellow"}


def plain_text(report: PartsReport, *, width: int = 100) -> str:
    """The whole report without colours.

    Args:
        report: The report.
        width: Columns.
    """
    console = Console(
        file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False
    )
    with console.capture() as capture:
        console.print(render(report))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def render(report: PartsReport) -> RenderableType:
    """Which parts were folded, with figures; which were not, and why; how the whole compares."""
    counts = {status: sum(part.status == status for part in report.parts) for status in _STYLES}
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    seconds = sum(report.seconds.values())
    call = "" if report.method == "forward" else f", {report.method}"
    parts: list[RenderableType] = [
        Text.assemble((report.model, "bold"), f"{call}: {said} in {seconds:.1f} s")
    ]
    folded = [part for part in report.parts if part.status == "folded"]
    if folded:
        parts.append(_figures(folded))
    parts += [Text(f"note: {note}") for note in report.notes]
    for status in ("unchanged", "refused"):
        lines = [part for part in report.parts if part.status == status]
        if lines:
            parts.append(Text(f"{status} ({len(lines)})", style=_STYLES[status]))
        for part in lines:
            code = f"{part.code}: " if part.code else ""
            parts.append(Padding(Text(f"{_name(part)}: {code}{part.reason}"), (0, 0, 0, 2)))
    for check in report.checks:
        style = "bold red" if not check.ok else "green" if check.decided else "yellow"
        parts.append(Text(f"the whole: {check.reason}", style=style))
    if not report.checks:
        parts.append(Text("the whole was not verified", style="yellow"))
    return Group(*parts)


def _name(part: PartReport) -> str:
    more = f" (and {', '.join(part.also)})" if part.also else ""
    return f"{part.path or 'the model'}{more} [{part.kind}]"


def _figures(folded: list[PartReport]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("folded part", overflow="fold")
    for heading in ("calls", "sizes", "changes", "nodes", "MACs"):
        table.add_column(heading, justify="right")
    for part in folded:
        if part.report is None:
            continue
        before, after = part.report.before, part.report.after
        sizes = "; ".join("x".join(spec.shape) or "scalar" for spec in part.report.captured.inputs)
        table.add_row(
            Text(_name(part)),
            str(part.calls),
            Text(sizes),
            str(len(part.report.changes)),
            f"{before.nodes} -> {after.nodes}",
            f"{before.macs:,} -> {after.macs:,}",
        )
    return table
