"""The tables of the benchmark, made of its lines of results; nothing is imported that takes time."""

from __future__ import annotations

import math
import re
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["document", "faster", "geometric_mean", "readme_part", "with_part"]

Line = dict[str, Any]
Ratio = tuple[float, float, float]
"""Median, least and most over the blocks of interleaved runs."""

PLAIN, OURS = "plain export", "graphsurgery"
EAGER, INDUCTOR, FOLDED = "torch eager", "Inductor", "graphsurgery, torch eager"
STAYS = "nothing to gain"
SETTINGS = ((1, 1), (1, 8), (2, 1), (2, 8))
"""Threads and batch; the README shows the first."""

WIDTH = 105

BEHIND = 1.03
"""Ratio of latencies above which we are behind another tool."""

SAME = "none: the graphs that onnxruntime makes of the two files are the same, operator by operator"

REASONS = {"mobilenet_v3_large": SAME, "resnet50": SAME}
"""Why another tool is faster on a network, as looked into by hand; shown beside its rows."""

CHANCE = 0.05
"""Where blocks as one-sided as those that were seen come more often by chance, nothing is looked into."""

SPREAD = "the machine's spread"

BEHIND_TEXT = f"""\
By the median of our time by its time in each block, which need not be the quotient of two medians above,
beside the fastest of the other tools in each row. Where the blocks disagree so much that a sign test calls it
chance (one-sided, {100 * CHANCE:.0f} %; that the best of several tools is picked makes chance likelier
still), the reason given is {SPREAD}."""

START, END = "<!-- benchmark -->", "<!-- /benchmark -->"

EXPLANATION = """\
Latency is the median of runs on onnxruntime, all optimisations on; all files of a network take turns run
by run, in blocks, and each block gives one ratio. Shown are the medians of these ratios, for
graphsurgery with the least and the most; the best of a row that gains over 3 %, and what is within 1 % of
it, is in bold. 2.00 is twice as fast as `torch.onnx.export(dynamo=True)` of
the network as it is, which is also what the tools that work on files were given. The threads of a
session stop with its run (`session.force_spinning_stop`), as they would slow down the file that is next.
Every file was held against the network in float64 at both batches before it was timed; one that differs
by more than rounding (1e-4 of the largest value of an output, or three times what the network itself in
float32 is off, where that is more) is shown as wrong, and one that a tool could not make as `fails`;
both count as 1.00 in the geometric means, as does a network for which a tool has nothing, since the
plain export is what is left then. A tool that was not run on a network is left out of its mean there.
`timm / peft` is `timm.utils.reparameterize_model` or `merge_and_unload`, where there is one. Inductor
(frozen weights) is timed in torch on one thread, beside torch eager, and its ratio is to that; where it
is wrong or fails it counts as 1.00 too."""

SHORT = """\
How many times faster than the plain export (`torch.onnx.export(dynamo=True)`) each tool's file is on
onnxruntime; files of a network take turns run by run, medians of blocks, for graphsurgery with the least
and the most. Every file was held against the network in float64 first. `timm / peft` is the authors' own
reparameterisation or merge; Inductor, with frozen weights, runs in torch and is beside torch eager. Made
by `make bench`; [the whole of it](docs/benchmark.md) has batches and threads, sizes, tool time and
memory."""

BUILDING = """\
Processor time and peak memory are those of the tool alone, in a process of its own that has made the
network already: for tools on files reading and writing the file, for graphsurgery `gs.optimize` with its
verification. The export that a tool on modules needs besides is a column of its own (for graphsurgery it
holds the verification of the file). Memory is what the tool's process held more at its peak than when
the tool began. Nodes are those of the file, and of the graph that onnxruntime makes of it; deviation is
the largest from the network in float64, as a part of the largest value."""


def document(lines: Sequence[Line]) -> str:
    """The whole of `docs/benchmark.md`.

    Args:
        lines: Results, of the kinds `build`, `latency` and `torch`, one of each key.
    """
    parts = [
        "# Benchmark",
        _summary(lines),
        _plots(lines),
        EXPLANATION,
        textwrap.fill(_versions(lines), WIDTH),
    ]
    parts.append("Made by `make bench` (`benchmarks/side_by_side.py`), as is all of this page.")
    for setting in SETTINGS:
        table = _latency_table(lines, setting)
        if table:
            parts += [f"## {_setting(setting)}", table]
    parts += _behind(lines)
    parts += _in_torch(lines)
    parts += ["## The files, and what it took to make them", BUILDING, _building(lines)]
    parts += _failures(lines)
    return "\n\n".join(part for part in parts if part) + "\n"


def readme_part(lines: Sequence[Line]) -> str:
    """What the README holds between its markers."""
    parts = [_summary(lines), SHORT, _plots(lines, "docs/"), _latency_table(lines, SETTINGS[0])]
    parts.append(textwrap.fill(f"{_setting(SETTINGS[0], short=True)}; {_versions(lines)}", WIDTH))
    return "\n\n".join(part for part in parts if part)


def with_part(text: str, part: str) -> str:
    """A text with the part between its markers; where there is none, a section before the documents."""
    if START not in text:
        section = f"## Whole networks\n\n{START}\n{END}\n\n"
        text = text.replace("## Documents\n", f"{section}## Documents\n")
    pattern = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", flags=re.DOTALL)
    return pattern.sub(lambda _: f"{START}\n{part}\n{END}", text)


# -- ratios -------------------------------------------------------------------------------------------------


def faster(line: Line, name: str, than: str) -> Ratio | None:
    """How many times faster one program is than another, by blocks; None where one was not timed."""
    times = line.get("ms", {})
    if name not in times or than not in times:
        return None
    ratios = sorted(b / a for a, b in zip(times[name], times[than], strict=True))
    return statistics.median(ratios), ratios[0], ratios[-1]


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers; 1 of none."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else 1.0


def _timed(lines: Sequence[Line], kind: str, setting: tuple[int, int]) -> dict[str, Line]:
    threads, batch = setting
    return {
        line["network"]: line
        for line in lines
        if line["kind"] == kind and (line["threads"], line["batch"]) == (threads, batch) and line.get("ms")
    }


def _built(lines: Sequence[Line]) -> dict[str, dict[str, Line]]:
    """Lines of building by network and tool."""
    found: dict[str, dict[str, Line]] = {}
    for line in lines:
        if line["kind"] == "build":
            found.setdefault(line["network"], {})[line["tool"]] = line
    return found


def _tools(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line["tool"] for line in lines if line["kind"] == "build"))


def _groups(lines: Sequence[Line], names: Iterable[str]) -> dict[str, list[str]]:
    """The networks among `names`, by group."""
    inside = set(names)
    found: dict[str, list[str]] = {}
    for network, tools in _built(lines).items():
        if network in inside:
            found.setdefault(next(iter(tools.values()))["group"], []).append(network)
    return found


# -- latency ------------------------------------------------------------------------------------------------


def _latency_table(lines: Sequence[Line], setting: tuple[int, int]) -> str:
    timed, torch = _timed(lines, "latency", setting), _timed(lines, "torch", setting)
    if not timed:
        return ""
    built, groups = _built(lines), _groups(lines, timed)
    tools = [tool for tool in _tools(lines) if tool != PLAIN]
    rows = [["network", "plain, ms", *tools, *([INDUCTOR] if torch else [])]]
    for names in groups.values():
        for name in names:
            line = timed[name]
            ratios = {tool: faster(line, tool, PLAIN) for tool in tools}
            best = max((r[0] for r in ratios.values() if r), default=1.0)
            cells = [_cell(built[name].get(tool), ratios[tool], best, tool == OURS) for tool in tools]
            rows.append([name, f"{statistics.median(line['ms'][PLAIN]):.2f}", *cells])
            rows[-1] += [_inductor(torch.get(name))] if torch else []
    foldable = [name for group, names in groups.items() if group != STAYS for name in names]
    means = {f"*{group}* ({len(names)})": names for group, names in groups.items()}
    means["**all that can be folded**"] = foldable
    if STAYS in groups:
        means["**all**"] = [*foldable, *groups[STAYS]]
    for title, names in means.items():
        found = [_mean(built, timed, names, tool) for tool in tools]
        cells = ["" if mean is None else f"{mean:.2f}" for mean in found]
        ratios_there = [faster(torch[name], INDUCTOR, EAGER) for name in names if name in torch]
        inductor = [ratio[0] if ratio else 1.0 for ratio in ratios_there]
        rows.append([title, "", *cells])
        rows[-1] += [f"{geometric_mean(inductor):.2f}" if inductor else ""] if torch else []
    return _table(rows)


def _mean(
    built: dict[str, dict[str, Line]], timed: dict[str, Line], names: Iterable[str], tool: str
) -> float | None:
    """The geometric mean over the networks that a tool was run on; None where there are none."""
    ratios = [faster(timed[name], tool, PLAIN) for name in names if tool in built[name]]
    return geometric_mean(ratio[0] if ratio else 1.0 for ratio in ratios) if ratios else None


def _cell(built: Line | None, ratio: Ratio | None, best: float, spread: bool) -> str:
    if built is None or not built.get("offered", True):
        return ""
    if ratio is None:
        return _wrong(built) or "fails"
    text = f"{ratio[0]:.2f}"
    text = f"**{text}**" if best > BEHIND and ratio[0] > best / 1.01 else text
    return f"{text} ({ratio[1]:.2f} to {ratio[2]:.2f})" if spread else text


def _wrong(built: Line) -> str:
    return f"wrong by {built['error']:.1g}" if built.get("right") is False else ""


def _inductor(line: Line | None) -> str:
    if line is None:
        return ""
    if INDUCTOR in line.get("wrong", {}):
        return f"wrong by {line['wrong'][INDUCTOR]:.1g}"
    ratio = faster(line, INDUCTOR, EAGER)
    return f"{ratio[0]:.2f}" if ratio else "fails"


def _in_torch(lines: Sequence[Line]) -> list[str]:
    rows = [["network", "threads", "batch", "eager, ms", INDUCTOR, "folded, eager"]]
    for setting in SETTINGS:
        for name, line in _timed(lines, "torch", setting).items():
            ours = faster(line, FOLDED, EAGER)
            milliseconds = f"{statistics.median(line['ms'][EAGER]):.2f}" if EAGER in line["ms"] else ""
            off = line.get("wrong", {}).get(FOLDED)
            folded = f"{ours[0]:.2f} ({ours[1]:.2f} to {ours[2]:.2f})" if ours else ""
            cells = [_inductor(line), f"wrong by {off:.1g}" if off else folded]
            rows.append([name, str(setting[0]), str(setting[1]), milliseconds, *cells])
    if len(rows) == 1:
        return []
    text = (
        "Times faster than torch eager: compiled by Inductor with frozen weights, and folded, run in eager."
    )
    return ["## In torch", text, _details(f"{len(rows) - 1} rows", _table(rows))]


def _behind(lines: Sequence[Line]) -> list[str]:
    """Where another tool's file is faster, and where what is to stay has moved."""
    rows = [["network", "threads", "batch", "best other tool", "our time / its time", "slower in", "why"]]
    moved = [["network", "threads", "batch", "our time / plain export's"]]
    for setting in SETTINGS:
        timed = _timed(lines, "latency", setting)
        for group, names in _groups(lines, timed).items():
            for name in names:
                line = timed[name]
                others = [
                    (r, tool) for tool in line["ms"] if tool != OURS and (r := faster(line, tool, OURS))
                ]
                ratio, tool = max(others, default=((0.0, 0.0, 0.0), ""))
                if ratio[0] > BEHIND:
                    found = f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"
                    slower = sum(a > b for a, b in zip(line["ms"][OURS], line["ms"][tool], strict=True))
                    blocks = len(line["ms"][tool])
                    why = REASONS.get(name, "") if _sign_test(slower, blocks) < CHANCE else SPREAD
                    cells = [tool, found, f"{slower} of {blocks} blocks", why]
                    rows.append([name, str(setting[0]), str(setting[1]), *cells])
                if group == STAYS and (own := faster(line, PLAIN, OURS)):
                    found = f"{own[0]:.3f} ({own[1]:.3f} to {own[2]:.3f})"
                    moved.append([name, str(setting[0]), str(setting[1]), found])
    parts = ["## Where nothing is to be gained", _table(moved)] if len(moved) > 1 else []
    if len(rows) > 1:
        title = f"## Behind another tool by more than {100 * (BEHIND - 1):.0f} %"
        parts += [title, BEHIND_TEXT, _table(rows)]
    return parts


def _sign_test(slower: int, blocks: int) -> float:
    """How likely two files of equal speed are to come out so: one slower in as many blocks, or in more."""
    return float(sum(math.comb(blocks, count) for count in range(slower, blocks + 1)) / 2**blocks)


def _summary(lines: Sequence[Line]) -> str:
    built = _built(lines)
    ours = [tools[OURS] for tools in built.values() if OURS in tools]
    wrong = sum(_result(line) == "wrong" for line in ours)
    failed = sum(_result(line) == "fails" for line in ours)
    listed = max(line.get("listed", 0) for line in lines)
    count = f"{len(built)} of {listed} networks" if listed > len(built) else f"{len(built)} networks"
    text = f"**{count}; of graphsurgery's results {wrong} are wrong and {failed} fail"
    means = []
    for setting in SETTINGS:
        timed = _timed(lines, "latency", setting)
        names = [n for group, some in _groups(lines, timed).items() if group != STAYS for n in some]
        mean = _mean(built, timed, names, OURS)
        if mean is not None:
            many = sum(OURS in built[name] for name in names)
            means.append(f"{mean:.2f} ({_setting(setting, short=True)}, {many} networks)")
    if not means:
        return f"{text}; latency was not measured.**"
    return (
        f"{text}; where there is something to fold, the geometric mean of the gain is {', '.join(means)}.**"
    )


def _setting(setting: tuple[int, int], *, short: bool = False) -> str:
    threads, batch = setting
    text = f"{'1 thread' if threads == 1 else f'{threads} threads'}, batch {batch}"
    return text if short else f"Times faster than the plain export: {text}"


def _setting_of(line: Line) -> str:
    return _setting((line["threads"], line["batch"]), short=True)


# -- building -----------------------------------------------------------------------------------------------


def _result(line: Line) -> str:
    if not line.get("offered", True):
        return "not offered"
    if "right" not in line:
        return "fails"
    return "right" if line["right"] else "wrong"


def _building(lines: Sequence[Line]) -> str:
    head = ["network", "tool", "nodes", "on onnxruntime", "heavy", "parameters", "file, MB", "deviation"]
    rows = [[*head, "tool, s", "tool, MB", "export, s", "export, MB"]]
    for network, tools in _built(lines).items():
        for tool, line in tools.items():
            if _result(line) in ("not offered", "fails"):
                continue
            deviation = f"{line['error']:.1e}"
            cells = [str(line[key]) for key in ("nodes", "nodes_run", "heavy_run")]
            cells += [f"{line['parameters']:,}", f"{line['size_bytes'] / 1e6:.2f}"]
            cells.append(deviation if line["right"] else f"**wrong, {deviation}**")
            for stage in ("work", "export"):
                spent = line.get(stage)
                cells += [f"{spent['processor']:.1f}", str(spent["peak_mb"])] if spent else ["", ""]
            rows.append([network, tool, *cells])
    return _details(f"{len(rows) - 1} files", _table(rows))


def _failures(lines: Sequence[Line]) -> list[str]:
    rows = [["network", "tool", "why"]]
    for line in lines:
        why = line.get("failure") or line["ended"]
        if why:
            what = line["tool"] if line["kind"] == "build" else f"{line['kind']}, {_setting_of(line)}"
            rows.append([line["network"], what, _plain_text(why)])
        for name, text in line.get("failures", {}).items() if line["kind"] == "torch" else ():
            rows.append([line["network"], f"{name}, batch {line['batch']}", _plain_text(text)])
    return ["## What fails", _table(rows)] if len(rows) > 1 else []


def _plain_text(text: str) -> str:
    """Without terminal colours, folders of a machine, and what a table would take for its own."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(r"(?:/[\w.+-]+)+/(?=[\w.+-]+)", "", text)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")[:200]


def _plots(lines: Sequence[Line], folder: str = "") -> str:
    found = [f"![Tool time and memory]({folder}benchmark_cost.png)"] if not folder else []
    if any(line["kind"] == "latency" for line in lines):
        found.insert(0, f"![Times faster than the plain export]({folder}benchmark_latency.png)")
    return "\n\n".join(found)


def _versions(lines: Sequence[Line]) -> str:
    versions = lines[-1]["versions"]
    machines = ", ".join(dict.fromkeys(line["machine"] for line in lines))
    return f"{machines}; {', '.join(f'{name} {number}' for name, number in versions.items())}."


def _details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
