"""The document of a sweep, made of its lines of results."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ["SLOW", "document", "summary"]

Line = dict[str, Any]

SLOW = 1.03
"""Ratio of latencies above which a network counts as slower."""
FAST = 0.97
"""And below which it counts as faster."""

INTRODUCTION = """\
Made by `make architectures` (`benchmarks/architectures.py`), as is all that follows. Every network is made
by code, with random weights that look trained (no zero heads, no layer scales of 1e-6, statistics of random
inputs in the batch norms), on the smallest picture of at least 64 x 64 that it takes, and with a batch of
two. "Equal" is the verdict of [the verification](verification.md): in torch with both programs cast to
float64 besides, and of the ONNX file on onnxruntime without and with its optimisations. Nodes,
multiplications (MACs) and FLOPs are counted per sample. Tool time is `gs.optimize` with its verification;
export time is `torch.onnx.export(dynamo=True)` of the same network; both are processor time, in one warm
process. Latency is onnxruntime's on one thread, in milliseconds: the file that
`torch.onnx.export(dynamo=True)` makes of the network, and the result's, run by run in turn; where torch's
export fails, or onnxruntime does not run its file, graphsurgery's exporter writes the first file too, of the
network as it is (marked \\*). A ratio of latencies is the time after by that before, so 0.9 saves a tenth;
it is the median over blocks of runs, with the least and greatest block behind it, and need not be the
quotient of the two medians beside it. Figures of a family are medians, after by before for nodes, MACs and
latency. Nodes are calls of the graph, not of the ONNX file; networks on pictures of their full size are in
[the benchmark](benchmark.md). A result is handed out, and a file written, only where verification finds it
equal, so "wrong" should be none; what verification declined, a captured graph, a change or a file, is
counted beside it."""

COLUMNS = (
    "family",
    "networks",
    "captured",
    "free batch",
    "equal in torch",
    "equal on onnxruntime",
    "nodes",
    "MACs",
    "tool / export",
    "latency",
)


def document(lines: Sequence[Line]) -> str:
    """The whole document.

    Args:
        lines: Results, of kind `survey` and `latency`, one of each network.
    """
    surveys = [line for line in lines if line["kind"] == "survey"]
    every = {
        line["name"]: line["latency"] for line in lines if line["kind"] == "latency" and "latency" in line
    }
    # What is timed is not verified once more: without an equal result here it may be another function.
    sound = {line["name"] for line in surveys if _built(line) and _sound(line)}
    timed = {name: found for name, found in every.items() if name in sound}
    listed = _listed(surveys)
    coverage = f"{len(surveys)} of the {listed} networks of the list have been run. " * (
        listed > len(surveys)
    )
    if len(timed) < len(every):
        coverage += (
            f"Latencies of {len(every) - len(timed)} networks are left out, as their results were not "
            "verified whole. "
        )
    coverage += _untimed(lines, sound)
    parts = ["# Architectures", summary(surveys, timed), INTRODUCTION, coverage + _versions(lines)]
    parts.append(_families(surveys, timed))
    parts += _slow(timed)
    parts += _troubles(surveys)
    parts += ["## Every network", _every(surveys, timed)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _untimed(lines: Sequence[Line], sound: set[str]) -> str:
    """A sentence about networks that should have a latency and have none; nothing before any was taken."""
    tried = {line["name"]: line for line in lines if line["kind"] == "latency"}
    why = {
        name: line["ended"] or line.get("errors", {}).get(line.get("stage"), {}).get("class", "no result")
        for name, line in tried.items()
        if name in sound and "latency" not in line
    }
    found = ", ".join(f"{name} ({reason})" for name, reason in sorted(why.items()))
    text = f"Without a latency, since the network as it is has no file that runs or none in time: {found}. "
    families = Counter(line["family"] for line in lines if line["name"] in sound - set(tried))
    rest = ", ".join(f"{count} of {family}" for family, count in sorted(families.items()))
    return (text if found else "") + (f"Not timed: {rest}. " if tried and rest else "")


def summary(surveys: Sequence[Line], timed: dict[str, Line]) -> str:
    """The line that says it all."""
    built = [line for line in surveys if _built(line)]
    captured = [line for line in built if _captured(line)]
    wrong = [line for line in captured if _wrong(line)]
    crashed = [line for line in built if _crashed(line)]
    ended = [line for line in built if line["ended"]]
    unwritten = [line for line in built if "onnx" in line.get("errors", {})]
    ratios = [ratio for line in built if (ratio := _tool_ratio(line)) is not None]
    declined = [line for line in built if _declined(line)]
    count = f"{len(built)} of {listed}" if (listed := _listed(surveys)) > len(surveys) else str(len(built))
    text = (
        f"**{count} networks: {_percent(len(captured), len(built))} captured "
        f"({len(built) - len(captured)} not), {len(wrong)} wrong, {len(declined)} declined by verification "
        f"in part or whole, {len(crashed)} crashed with anything but a "
        f"named error, {len(ended)} over a limit, {len(unwritten)} without an ONNX file; "
        f"tool time / export time {_number(ratios)} in the median"
    )
    if not timed:
        return text + "; latency not measured.**"
    latencies = [found["ratio"] for found in timed.values()]
    slow = sum(ratio > SLOW for ratio in latencies)
    fast = sum(ratio < FAST for ratio in latencies)
    mean = statistics.geometric_mean(latencies)
    text += f"; latency of {len(timed)}: {mean:.2f} of the time in the geometric mean, "
    return text + f"{slow} slower than {SLOW}, {fast} faster than {FAST}.**"


# -- what a line says ---------------------------------------------------------------------------------------


def _built(line: Line) -> bool:
    return "make" not in line.get("errors", {})


def _captured(line: Line) -> bool:
    return "captured" in line


def _wrong(line: Line) -> bool:
    """A result that was handed out and differs; what was undone or not written is none."""
    return not line["torch"]["ok"] or not line.get("onnx", {"ok": True})["ok"]


def _declined(line: Line) -> bool:
    """Whether verification found a graph, a change or a file of ours wrong, or could not run it."""
    errors = [line.get("errors", {}).get(stage, {}) for stage in ("optimise", "onnx")]
    return bool(line.get("failures")) or any(error.get("class") == "VerificationError" for error in errors)


def _sound(line: Line) -> bool:
    """Whether all that was made of a network was found equal, on onnxruntime too."""
    equal = _captured(line) and not _wrong(line) and not _declined(line)
    return equal and bool(line.get("onnx", {}).get("ok"))


def _listed(lines: Sequence[Line]) -> int:
    return max((line.get("listed", 0) for line in lines), default=0)


def _crashed(line: Line) -> bool:
    ours = {stage: error for stage, error in line.get("errors", {}).items() if stage in ("optimise", "onnx")}
    return any(not error["named"] for error in ours.values()) or "the process" in line["ended"]


def _tool_ratio(line: Line) -> float | None:
    seconds = line.get("seconds", {})
    if "tool_cpu" not in seconds or "export_cpu" not in seconds:
        return None
    ratio: float = seconds["tool_cpu"] / seconds["export_cpu"]
    return ratio


# -- tables -------------------------------------------------------------------------------------------------


def _families(surveys: Sequence[Line], timed: dict[str, Line]) -> str:
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in surveys:
        groups[line["family"]].append(line)
    rows = [_family(name, members, timed) for name, members in sorted(groups.items())]
    rows.append(_family("**all**", surveys, timed))
    return _table(COLUMNS, rows)


def _family(name: str, lines: Sequence[Line], timed: dict[str, Line]) -> list[str]:
    built = [line for line in lines if _built(line)]
    captured = [line for line in built if _captured(line)]
    shrunk = [_relative(line, "nodes") for line in captured]
    cheaper = [_relative(line, "macs") for line in captured if line["before"]["macs"]]
    ratios = [ratio for line in built if (ratio := _tool_ratio(line)) is not None]
    latencies = [timed[line["name"]]["ratio"] for line in lines if line["name"] in timed]
    return [
        name,
        str(len(built)),
        str(len(captured)),
        str(sum(line["captured"] == "dynamic batch" for line in captured)),
        str(sum(line["torch"]["ok"] for line in captured)),
        str(sum(line.get("onnx", {}).get("ok", False) for line in captured)),
        _number(shrunk),
        _number(cheaper),
        _number(ratios),
        _number(latencies),
    ]


def _relative(line: Line, key: str) -> float:
    ratio: float = line["after"][key] / max(1, line["before"][key])
    return ratio


def _troubles(surveys: Sequence[Line]) -> list[str]:
    """What does not work, by stage and reason."""
    parts = []
    titles = {
        "make": "Not built",
        "optimise": "Not captured, or not optimised",
        "onnx": "No ONNX file",
        "plain export": "The plain export fails",
    }
    for stage, title in titles.items():
        rows = [
            [
                line["name"],
                error["class"] + ("" if error["named"] else " (not named)"),
                _cell(error["message"]),
            ]
            for line in surveys
            if (error := line.get("errors", {}).get(stage)) is not None
        ]
        if rows:
            parts += [f"## {title}: {len(rows)}", _table(("network", "error", "first line"), rows)]
    ended = [[line["name"], str(line.get("stage", "")), line["ended"]] for line in surveys if line["ended"]]
    if ended:
        parts += [f"## Over a limit: {len(ended)}", _table(("network", "stage", "limit"), ended)]
    undone = [[line["name"], _cell(text)] for line in surveys for text in line.get("failures", ())]
    if undone:
        parts += [
            f"## Passes that were undone: {len(undone)}",
            _table(("network", "pass, code, reason"), undone),
        ]
    static = [
        [line["name"], _cell(" ".join(line["notes"]))] for line in surveys if line.get("captured") == "static"
    ]
    if static:
        parts += [f"## Captured with a static batch: {len(static)}", _table(("network", "notes"), static)]
    return parts


def _every(surveys: Sequence[Line], timed: dict[str, Line]) -> str:
    rows = []
    for line in surveys:
        latency = timed.get(line["name"])
        rows.append([line["name"], line["note"], *_figures(line), *_timing(latency)])
    columns = (
        "network",
        "size or kind",
        "batch",
        "torch",
        "onnxruntime",
        "nodes",
        "MMACs",
        "layers fewer",
        "tool / export",
    )
    table = _table((*columns, "ms before, after", "ratio (spread)"), rows)
    return f"<details><summary>{len(rows)} networks</summary>\n\n{table}\n\n</details>"


def _timing(latency: Line | None) -> list[str]:
    """Milliseconds before and after, and their ratio with its spread."""
    if latency is None:
        return ["", ""]
    mark = "\\*" if latency["exporter"] != "torch" else ""
    return [
        f"{latency['before_ms']:.2f}{mark}, {latency['after_ms']:.2f}",
        f"{latency['ratio']:.2f} ({latency['least']:.2f} to {latency['most']:.2f})",
    ]


def _slow(timed: dict[str, Line]) -> list[str]:
    """The networks whose result takes longer, the slowest first."""
    found = sorted((-found["ratio"], name) for name, found in timed.items() if found["ratio"] > SLOW)
    if not found:
        return []
    rows = [[name, *_timing(timed[name])] for _, name in found]
    return [
        f"## Slower than {SLOW}: {len(rows)}",
        _table(("network", "ms before, after", "ratio (spread)"), rows),
    ]


def _figures(line: Line) -> list[str]:
    ratio = _tool_ratio(line)
    tool = "" if ratio is None else f"{ratio:.2f}"
    if not _captured(line):
        return ["", "", "", "", "", "", tool]
    before, after = line["before"], line["after"]
    fewer = {kind: count - after["layers"].get(kind, 0) for kind, count in sorted(before["layers"].items())}
    kinds = ", ".join(f"{count} {kind}" for kind, count in fewer.items() if count > 0)
    onnx = line.get("onnx", {}).get("ok")
    return [
        "free" if line["captured"] == "dynamic batch" else "static",
        "equal" if line["torch"]["ok"] else "**different**",
        "equal" if onnx else "",
        f"{before['nodes']} → {after['nodes']}",
        f"{before['macs'] / 1e6:.2f} → {after['macs'] / 1e6:.2f}",
        kinds,
        tool,
    ]


def _versions(lines: Sequence[Line]) -> str:
    """The versions, where one package had several all of them."""
    found: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        for name, number in line["versions"].items():
            found[name].add(number)
    return ", ".join(f"{name} {' and '.join(sorted(numbers))}" for name, numbers in found.items()) + "."


def _table(columns: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cell(text: str) -> str:
    """Text that fits a cell of a table, without the paths of one machine."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # colours of a terminal
    text = re.sub(r"(?:/[\w.+-]+)+/(?=[\w.+-]+)", "", text)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none"


def _number(values: Sequence[float], of: Callable[[Sequence[float]], float] = statistics.median) -> str:
    return f"{of(values):.2f}" if values else ""
