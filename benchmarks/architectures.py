"""Sweep over the networks of torchvision, timm, transformers and peft; writes `docs/architectures.md`.

Each network is made by code, given weights that look trained, and in a process of its own captured,
optimised, verified in torch (anchored in float64) and on onnxruntime, beside the plain `torch.onnx.export`.
One line of JSON each goes to a file of results as soon as it is there; a network that has one is skipped next
time.
Latency is a stage of its own, for a quiet machine:

    python benchmarks/architectures.py --only timm/
    python benchmarks/architectures.py --latency
    python benchmarks/architectures.py --render
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zoo.table import document

PACKAGES = ("torch", "torchvision", "timm", "transformers", "peft", "onnxruntime", "onnxscript")
TREE = Path(__file__).parent.parent
DOCUMENT = TREE / "docs" / "architectures.md"
RECORD = TREE / "docs" / "architectures.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression that names must match")
    parser.add_argument("--part", default="1/1", help="i/n: the i-th of n parts of the list")
    parser.add_argument("--again", action="store_true", help="run what has a result too")
    parser.add_argument("--failed", action="store_true", help="run again what has an error")
    parser.add_argument("--latency", action="store_true", help="measure latencies instead")
    parser.add_argument("--quick", action="store_true", help="without any export: only torch")
    parser.add_argument(
        "--render", action="store_true", help="only write the document, and the record beside it"
    )
    parser.add_argument("--list", action="store_true", help="only print the names")
    parser.add_argument(
        "--seconds", type=float, default=180, help="processor time of one network (default: 180)"
    )
    parser.add_argument("--memory", type=float, default=6, help="GiB of one network (default: 6)")
    parser.add_argument("--results", type=Path, default=TREE / "out" / "architectures.jsonl")
    options = parser.parse_args()
    if not options.render:
        run(options)
    if not options.list:
        render(options.results)


def run(options: argparse.Namespace) -> None:
    from zoo.listing import entries  # torch and the rest take seconds

    index, parts = (int(number) for number in options.part.split("/"))
    listed = entries()
    chosen = [entry for entry in listed if re.search(options.only, entry.name)][index - 1 :: parts]
    if options.list:
        print(*(entry.name for entry in chosen), sep="\n")
        return

    from zoo.forked import run_forked
    from zoo.measure import latency, survey, warm_up

    kind = "latency" if options.latency else "survey"
    old = {line["name"]: line for line in read(options.results) if line["kind"] == kind}
    versions = {name: version(name) for name in PACKAGES}
    changed = sorted(
        {name for line in old.values() for name in PACKAGES if line["versions"].get(name) != versions[name]}
    )
    if changed:
        print(f"some results were made with other versions of {', '.join(changed)}; --again renews them")
    if not options.again:
        chosen = [e for e in chosen if e.name not in old or (options.failed and not fine(old[e.name]))]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    warm_up()
    for number, entry in enumerate(chosen, 1):
        start = time.monotonic()
        work = (
            partial(latency, entry) if options.latency else partial(survey, entry, export=not options.quick)
        )
        found = run_forked(work, seconds=options.seconds, gibibytes=options.memory)
        line = {
            "name": entry.name,
            "kind": kind,
            "family": entry.family,
            "note": entry.note,
            "versions": versions,
        }
        line |= {"listed": len(listed), "machine": platform.machine(), **found}
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        says = "ok" if fine(line) else "; ".join([*troubles(line), line["ended"]])
        print(f"{number}/{len(chosen)} {entry.name} {time.monotonic() - start:.0f} s: {says}", flush=True)


def fine(line: dict[str, Any]) -> bool:
    return not line.get("errors") and not line["ended"] and not line.get("failures")


def troubles(line: dict[str, Any]) -> list[str]:
    """Errors and passes that were undone, a sentence each."""
    errors: dict[str, dict[str, Any]] = line.get("errors", {})
    found = [f"{stage}: {error['class']}: {error['message']}" for stage, error in errors.items()]
    return [*found, *line.get("failures", ())]


def read(path: Path) -> list[dict[str, Any]]:
    """The last line of each network and kind, in the order of the names."""
    if not path.exists():
        return []
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        found[line["name"], line["kind"]] = line
    return [found[key] for key in sorted(found)]


def render(results: Path) -> None:
    """Write the document, and its lines beside it."""
    lines = read(results)
    if not lines:
        print(f"{results} holds no results")
        return
    DOCUMENT.write_text(document(lines), encoding="utf-8")
    RECORD.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(document(lines).split("\n\n")[1])


if __name__ == "__main__":
    main()
