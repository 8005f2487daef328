"""graphsurgery beside other tools on whole networks; writes `docs/benchmark.md` and the README's table.

Three stages, of which the last follows the others by itself. The first applies each tool to each network, in
a process of its own, and holds the ONNX file against the network in float64. The second times what is right
on onnxruntime, all files of a network in turns, and in torch; it wants a quiet machine. The third writes
tables and plots. Each result goes as a line of JSON to a file as soon as it is there, and what has one is
skipped next time:

    python benchmarks/side_by_side.py
    python benchmarks/side_by_side.py --latency
    python benchmarks/side_by_side.py --render
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.show import document, readme_part, with_part

PACKAGES = (
    *("torch", "torchvision", "timm", "transformers", "peft"),
    *("onnx", "onnxruntime", "onnxscript", "onnxsim", "onnxslim", "graphsurgery"),
)
TREE = Path(__file__).parent.parent
RECORD = TREE / "docs" / "benchmark.jsonl"

Key = tuple[str, ...]
Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression that names of networks must match")
    parser.add_argument("--tools", default="", help="regular expression that names of tools must match")
    parser.add_argument("--again", action="store_true", help="run what has a result too")
    parser.add_argument("--latency", action="store_true", help="measure latencies of what was built")
    parser.add_argument("--blocks", type=int, default=7, help="blocks of runs, each a ratio (default: 7)")
    parser.add_argument("--render", action="store_true", help="only write tables and plots")
    parser.add_argument("--list", action="store_true", help="only print the names")
    parser.add_argument(
        "--seconds", type=float, default=600, help="processor time of one step (default: 600)"
    )
    parser.add_argument("--memory", type=float, default=12, help="GiB of one step (default: 12)")
    parser.add_argument("--out", type=Path, default=TREE / "out" / "bench", help="files and results go here")
    options = parser.parse_args()
    results = options.out / "results.jsonl"
    if not options.render:
        run(options, results)
    if not options.list:
        render(results)


def run(options: argparse.Namespace, results: Path) -> None:
    from bench.networks import networks  # torch and the rest take seconds

    listed = networks()
    chosen = [network for network in listed if re.search(options.only, network.name)]
    if options.list:
        print(*(network.name for network in chosen), sep="\n")
        return

    from bench.build import warm_up
    from zoo.forked import run_forked

    options.out.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in PACKAGES}
    old = {key(line): line for line in read(results)}
    changed = sorted({n for line in old.values() for n in PACKAGES if line["versions"].get(n) != versions[n]})
    if changed:
        print(f"some results were made with other versions of {', '.join(changed)}; --again renews them")
    warm_up(options.out / "warm-up")
    for network in chosen:
        if options.latency:
            todo = timings(network, options, [line for line in old.values() if line["kind"] == "build"])
        else:
            todo = buildings(network, options)
        for line, work in todo:
            if key(line) in old and not options.again:
                continue
            start = time.monotonic()
            found = run_forked(work, seconds=options.seconds, gibibytes=options.memory)
            line |= {"group": network.group, "note": network.note, "machine": machine()}
            line |= {"versions": versions, "listed": len(listed), **found}
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{' '.join(key(line))} {time.monotonic() - start:.0f} s: {says(line)}", flush=True)


def buildings(network: Any, options: argparse.Namespace) -> list[tuple[Line, Callable[..., None]]]:
    """What is built for a network: the start of each line, and the work that fills it."""
    from bench.build import build
    from bench.tools import TOOLS

    return [
        (
            {"kind": "build", "network": network.name, "tool": tool},
            partial(build, network, tool, options.out / network.name),
        )
        for tool in TOOLS
        if re.search(options.tools, tool)
    ]


def timings(
    network: Any, options: argparse.Namespace, built: list[Line]
) -> list[tuple[Line, Callable[..., None]]]:
    """What is timed of a network."""
    from bench.latency import on_onnxruntime, on_torch
    from bench.networks import BATCHES

    right = [line["tool"] for line in built if line["network"] == network.name and line.get("right")]
    if not right:
        print(f"{network.name} has no right results; run without --latency first")
        return []
    folder, found = options.out / network.name, []
    for threads in (1, 2):
        for batch in BATCHES:
            setting = {"network": network.name, "threads": threads, "batch": batch}
            arguments = {"threads": threads, "batch": batch, "blocks": options.blocks}
            work: Callable[..., None] = partial(on_onnxruntime, folder, right)
            found.append(({"kind": "latency", **setting}, partial(_with, work, arguments)))
            if threads > 1:
                continue  # Inductor writes the number of threads into its code: each would be compiled anew
            work = partial(on_torch, network, folder)
            found.append(({"kind": "torch", **setting}, partial(_with, work, arguments)))
    return [(line, work) for line, work in found if re.search(options.tools, line["kind"])]


def _with(work: Callable[..., None], arguments: dict[str, Any], tell: Any) -> None:
    work(**arguments, tell=tell)


def key(line: Line) -> Key:
    """What a line is about."""
    return tuple(str(line[n]) for n in ("kind", "network", "tool", "threads", "batch") if n in line)


def says(line: Line) -> str:
    """A result in a few words."""
    if line["ended"] or "failure" in line:
        return str(line["ended"] or line["failure"])
    if line["kind"] == "build":
        if not line.get("offered", True):
            return "not offered"
        return f"{'right' if line['right'] else 'WRONG'} ({line['error']:.1e}), {line['nodes']} nodes"
    medians = {name: sorted(values)[len(values) // 2] for name, values in line["ms"].items()}
    return ", ".join(f"{name} {value:.2f} ms" for name, value in medians.items())


def machine() -> str:
    """The processor, and how many of its cores there are."""
    import os

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.*)$", info.read_text(encoding="ascii"), flags=re.MULTILINE)
        name = found[1] if found else name
    return f"{name}, {os.cpu_count()} cores"


def read(path: Path) -> list[Line]:
    """The last line of each result, in the order in which they came first."""
    found: dict[Key, Line] = {}
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            found[key(line)] = line
    return list(found.values())


def render(results: Path) -> None:
    """Write tables and plots, and the lines that they were made of beside them."""
    if results.exists():
        RECORD.write_text("".join(json.dumps(line) + "\n" for line in read(results)), encoding="utf-8")
    lines = read(RECORD)
    if not lines:
        print(f"neither {results} nor {RECORD} holds results")
        return
    from bench.plots import plot_cost, plot_latency

    docs, readme = TREE / "docs", TREE / "README.md"
    plot_latency(lines, docs / "benchmark_latency.png")
    plot_cost(lines, docs / "benchmark_cost.png")
    text = document(lines)
    (docs / "benchmark.md").write_text(text, encoding="utf-8")
    readme.write_text(with_part(readme.read_text(encoding="utf-8"), readme_part(lines)), encoding="utf-8")
    print(text.split("\n\n")[1])


if __name__ == "__main__":
    main()
