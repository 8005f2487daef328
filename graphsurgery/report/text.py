"""The report as text: rich renderables for the terminal, and plain text."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from graphsurgery.report.model import Measurement, Report
from graphsurgery.rewrite.contracts import Change, NodeRef, Refusal

__all__ = [
    "changes_text",
    "figures_table",
    "measured_table",
    "plain_text",
    "refusals_text",
    "render",
    "verification_text",
]


_FEW = 3
_LONG = 40
"""Modules and characters of a candidate that a line of the table of times shows."""

_NAMED = 12
"""Modules, and operations, of one change that are named one by one; the JSON report has them all."""


def plain_text(report: Report, *, width: int = 100, limit: int | None = None) -> str:
    """The whole report without colours.

    Args:
        report: The report.
        width: Columns.
        limit: As for `render`.
    """
    console = Console(
        file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False
    )
    with console.capture() as capture:
        console.print(render(report, limit=limit))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def render(report: Report, *, limit: int | None = None) -> RenderableType:
    """Everything a reader wants to see, in order: figures, changes, refusals, failures, verification.

    Args:
        report: The report.
        limit: Most lines per group of changes or refusals; None for all.
    """
    parts: list[RenderableType] = [_headline(report), figures_table(report)]
    parts += [Text(f"note: {note}") for note in report.captured.notes]
    if report.measured:
        parts.append(measured_table(report.measured))
    parts.append(changes_text(report.changes, limit=limit))
    parts.append(refusals_text(report.refusals, limit=limit))
    for failure in report.failures:
        where = f"{failure.pass_name} ({failure.code}, round {failure.round})"
        line = f"rolled back: {where}: {_plain(failure.reason)}"
        if failure.code == "no-fixed-point":
            line = f"kept, but not settled: {where}: {_plain(failure.reason)}"
        if failure.changes:
            replaced = tuple(ref for change in failure.changes for ref in change.before)
            what = f"{_place(replaced)}{_ops(replaced)}"
            line = f"undone, all else of the pass kept: {where}: {what}: {_plain(failure.reason)}"
        parts.append(Text(line, style="bold red"))
    parts.append(verification_text(report))
    return Group(*parts)


def _headline(report: Report) -> Text:
    inputs = ", ".join(f"{i.name} {_shape(i.shape)} {i.dtype}" for i in report.captured.inputs)
    total = sum(seconds for name, seconds in report.seconds.items() if not name.startswith("pass:"))
    count = len(report.changes)
    return Text.assemble(
        (report.model, "bold"), f" ({inputs}), {count} change{'' if count == 1 else 's'} in {total:.1f} s"
    )


def _shape(sizes: tuple[str, ...]) -> str:
    """The sizes, a free leading one as N and not by torch's symbol for it."""
    if sizes and re.fullmatch(r"s\d+", sizes[0]):
        sizes = ("N", *sizes[1:])
    return "x".join(sizes) or "scalar"


def figures_table(report: Report) -> Table:
    """Before and after, side by side; figures per sample."""
    table = Table(show_edge=False, pad_edge=False)
    for name, justify in (("", "left"), ("before", "right"), ("after", "right"), ("", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    before, after = report.before, report.after
    for kind in sorted({*before.layers, *after.layers}):
        _row(table, f"{kind} layers", before.layers.get(kind, 0), after.layers.get(kind, 0))
    table.add_section()
    for label, name in (
        ("nodes", "nodes"),
        ("parameters", "parameters"),
        ("MACs", "macs"),
        ("FLOPs", "flops"),
    ):
        _row(table, label, getattr(before, name), getattr(after, name))
    if before.size_bytes is not None or after.size_bytes is not None:
        _row(table, "file, bytes", before.size_bytes, after.size_bytes)
    if before.latency_ms is not None or after.latency_ms is not None:
        _row(table, "onnxruntime, ms", before.latency_ms, after.latency_ms)
    return table


def _row(table: Table, label: str, before: float | None, after: float | None) -> None:
    change = ""
    if before and after is not None and after != before:
        change = f"{100 * (after - before) / before:+.1f} %"
    table.add_row(label, _number(before), _number(after), change)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def measured_table(measured: Iterable[Measurement]) -> Table:
    """What was timed to decide, equal candidates as one line."""
    table = Table(show_edge=False, pad_edge=False, title="timed on onnxruntime", title_justify="left")
    for name in ("candidate", "where"):
        table.add_column(name, overflow="fold")
    for name in ("before, ms", "after, ms", "ratio", "faster in", ""):
        table.add_column(name, justify="right")
    groups: dict[Measurement, list[Measurement]] = {}
    for found in measured:
        groups.setdefault(replace(found, modules=(), cached=False), []).append(found)
    for found, members in groups.items():
        modules = members[0].modules
        where = ", ".join(modules[:_FEW]) + (", ..." if len(modules) > _FEW else "")
        where += f" and {len(members) - 1} alike" if len(members) > 1 else ""
        what = found.kind if len(found.kind) <= _LONG else found.kind[: _LONG - 3] + "..."
        if found.ratio is None:
            table.add_row(what, where, "", "", "", "", f"not timed: {found.reason}")
            continue
        spread = f"{found.ratio:.3f} ({found.least:.3f}-{found.most:.3f})"
        blocks = f"{found.faster_blocks} of {found.blocks}"
        times = _number(found.before_ms), _number(found.after_ms)
        said = "kept" if found.kept else "left"
        said += ", known" if all(member.cached for member in members) else ""
        table.add_row(what, where, *times, spread, blocks, said)
    return table


def changes_text(changes: Iterable[Change], *, limit: int | None = None) -> RenderableType:
    """The changes, grouped by pass and kind."""
    groups: dict[tuple[str, str], list[Text]] = {}
    for change in changes:
        before = _ops(change.before) or ", ".join(change.parameters)
        after = _ops(change.after) or "nothing"
        line = Text(f"{_place(change.before or change.after)}{before} -> {after}")
        if change.residual is not None:
            line.append(f"  (certificate {change.residual:.1e})")
        if change.detail:
            line.append(f"  {_plain(change.detail)}")
        groups.setdefault((change.pass_name, change.kind), []).append(line)
    return _groups("changes", groups, limit, "green")


def refusals_text(refusals: Iterable[Refusal], *, limit: int | None = None) -> RenderableType:
    """The refusals, grouped by pass and reason code, each with its place in the user's model."""
    groups: dict[tuple[str, str], list[Text]] = {}
    for refusal in refusals:
        line = Text(f"{_place(refusal.nodes)}{_plain(refusal.reason)}")
        source = next((ref.source for ref in refusal.nodes if ref.source), "")
        if source:
            line.append(f"  [{source}]", style="dim")
        groups.setdefault((refusal.pass_name, refusal.code), []).append(line)
    return _groups("refusals", groups, limit, "yellow")


def _plain(text: str) -> str:
    """What foreign code said, on one line and without codes that a terminal obeys."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _place(refs: tuple[NodeRef, ...]) -> str:
    modules = list(dict.fromkeys(ref.module for ref in refs if ref.module))
    more = f" and {len(modules) - _NAMED} more" if len(modules) > _NAMED else ""
    return f"{', '.join(modules[:_NAMED])}{more}: " if modules else ""


def _ops(refs: tuple[NodeRef, ...]) -> str:
    """The operations in order; of many, how often each."""
    ops = [ref.op for ref in refs]
    if len(ops) > _NAMED:
        ops = [f"{count} {op}" for op, count in Counter(ops).most_common()]
    return " + ".join(ops)


def _groups(
    title: str, groups: dict[tuple[str, str], list[Text]], limit: int | None, style: str
) -> RenderableType:
    if not groups:
        return Text(f"no {title}")
    parts: list[RenderableType] = []
    for (pass_name, code), lines in groups.items():
        parts.append(Text.assemble((f"{title}: {pass_name}, {code}", style), f" ({len(lines)})"))
        shown = lines if limit is None else lines[:limit]
        parts += [Padding(line, (0, 0, 0, 2)) for line in shown]
        if len(shown) < len(lines):
            parts.append(Text(f"  ... and {len(lines) - len(shown)} more"))
    return Group(*parts)


def verification_text(report: Report) -> RenderableType:
    """The verdicts; says so where nothing was verified."""
    if report.verification is None:
        lines = [Text("not verified", style="yellow")]
    else:
        lines = [Text(str(report.verification), style="green" if report.verification.ok else "bold red")]
    for check in report.pass_checks:
        verdict = check.onnx or check.torch
        word = "ok" if check.ok else "DIFFERENT"
        lines.append(Text(f"after {check.pass_name}: {word}: {verdict.candidate}: {verdict.reason}"))
    if report.onnx is not None:
        said = str(report.onnx.verdict) if report.onnx.verdict is not None else "not verified"
        lines.append(
            Text(f"{report.onnx.path} ({report.onnx.size_bytes:,} bytes, opset {report.onnx.opset}): {said}")
        )
    return Group(*lines)
