"""The plots of the benchmark, made of its lines of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.show import OURS, PLAIN, SETTINGS, faster

__all__ = ["plot_cost", "plot_latency"]

Line = dict[str, Any]

COLOURS = {
    "onnxscript": "#9aa5b1",
    "onnxsim": "#c3b091",
    "OnnxSlim": "#8fb8ad",
    "fx.fuse": "#d9a5b3",
    "timm / peft": "#5b8cc9",
    OURS: "#d1495b",
    PLAIN: "#444444",
}


def plot_latency(lines: Sequence[Line], path: Path) -> None:
    """Bars: how many times faster each tool's file is than the plain export, with the spread over blocks."""
    pyplot = _pyplot()
    threads, batch = SETTINGS[0]
    timed = [
        line for line in lines if line["kind"] == "latency" and line["threads"] == threads and line.get("ms")
    ]
    timed = [line for line in timed if line["batch"] == batch]
    if not timed:
        return
    tools = [tool for tool in COLOURS if tool != PLAIN and any(tool in line["ms"] for line in timed)]
    height = 0.8 / len(tools)
    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(timed) + 1.2), dpi=90)
    for index, tool in enumerate(tools):
        found = [(row, ratio) for row, line in enumerate(timed) if (ratio := faster(line, tool, PLAIN))]
        rows = [row - 0.4 + height * (index + 0.5) for row, _ in found]
        middles = [ratio[0] for _, ratio in found]
        spread = [[r[0] - r[1] for _, r in found], [r[2] - r[0] for _, r in found]]
        axes.barh(rows, middles, height, label=tool, color=COLOURS[tool])
        axes.errorbar(middles, rows, xerr=spread, fmt="none", ecolor="#222222", elinewidth=0.7)
    axes.axvline(1, color="#222222", linewidth=0.8)
    axes.set_yticks(range(len(timed)), [line["network"] for line in timed])
    axes.invert_yaxis()
    axes.set_xlabel(f"times faster than the plain export, onnxruntime, {threads} thread, batch {batch}")
    axes.legend(
        fontsize="small", loc="lower center", bbox_to_anchor=(0.4, 1), ncols=len(tools), frameon=False
    )
    _save(figure, path)


def plot_cost(lines: Sequence[Line], path: Path) -> None:
    """Points: processor time and peak memory of each tool, one point a network."""
    pyplot = _pyplot()
    built = [line for line in lines if line["kind"] == "build" and "right" in line]
    tools = [tool for tool in (PLAIN, *COLOURS) if any(line["tool"] == tool for line in built)]
    tools = list(dict.fromkeys(tools))
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3), dpi=90, sharey=True)
    titles = {"processor": "processor time, s", "peak_mb": "peak memory above the start, MB"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for row, tool in enumerate(tools):
            stage = "export" if tool == PLAIN else "work"
            values = [line[stage][key] for line in built if line["tool"] == tool and stage in line]
            jitter = [row + 0.12 * (index % 3 - 1) for index in range(len(values))]
            axes.scatter([max(v, 0.1) for v in values], jitter, 14, color=COLOURS[tool], alpha=0.7)
        axes.set_xscale("log")
        axes.set_xlabel(title)
        axes.grid(axis="x", linewidth=0.3)
    panels[0].set_yticks(range(len(tools)), tools)
    panels[0].invert_yaxis()
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": ""})
    _pyplot().close(figure)
