"""What public tools and graphsurgery leave of the fold cases, as a table.

Each cell holds heavy nodes / all nodes. A wrong output, a crash and added multiplications are shown as such.
A case is reached, and bold, where the output is right, no more nodes are left than the least (where a case
states it; else heavy ones alone count), and no more multiplications than before (or than the least, where a
case states it). Inductor has no nodes to count but heavy ones, so those alone are held against it.
"""

from __future__ import annotations

import argparse
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path

from fold_cases import CASES, Case
from peer_tools import TOOLS, Network, Outcome, outcome

README = Path(__file__).parent.parent / "README.md"
HEAVY_ONLY = "Inductor"
START, END = "<!-- peers -->", "<!-- /peers -->"


def limit(case: Case, plain: int) -> int:
    """Most multiplications that count as reached."""
    return plain if case.macs is None else case.macs


def reached_heavy(case: Case, found: Outcome, plain: int) -> bool:
    """Whether the least number of heavy nodes was reached, rightly and at no cost."""
    if found.left is None or not found.right or found.left.heavy > case.heavy:
        return False
    if found.macs is None:  # not countable: a case that is about multiplications cannot be said to be reached
        return case.macs is None
    return found.macs <= limit(case, plain)


def reached(case: Case, found: Outcome, plain: int) -> bool:
    """Whether also the least number of all nodes was reached, where the case states it."""
    if found.left is None or not reached_heavy(case, found, plain):
        return False
    return case.nodes is None or found.left.nodes <= case.nodes


def cell(case: Case, found: Outcome, plain: int) -> str:
    """One tool on one case."""
    if found.left is None:
        return "crash"
    text = f"{found.left.heavy}" + (f" / {found.left.nodes}" if found.left.nodes else "")
    if not found.right:
        return f"**wrong by {found.error:.1g}**"
    if found.macs is not None and found.macs > limit(case, plain):
        text += f" ({found.macs / limit(case, plain):.1f}x)"
    return f"**{text}**" if reached(case, found, plain) else text


def table(cases: Sequence[Case], rows: Sequence[dict[str, Outcome]]) -> str:
    """The cases, the counts of each tool, and how many cases each reached."""
    tools = list(rows[0])
    lines = [
        "| case | least | " + " | ".join(tools) + " |",
        "|---|---|" + "---|" * len(tools),
    ]
    for case, row in zip(cases, rows, strict=True):
        least = f"{case.heavy}" + (f" / {case.nodes}" if case.nodes is not None else "")
        cells = [cell(case, found, plain_macs(row)) for found in row.values()]
        lines.append(f"| {case.name} | {least} | " + " | ".join(cells) + " |")
    for title, test in (("least heavy nodes", reached_heavy), ("least of all nodes", reached)):
        total = [
            sum(test(case, row[tool], plain_macs(row)) for case, row in zip(cases, rows, strict=True))
            for tool in tools
        ]
        counted = [
            "" if tool == HEAVY_ONLY and test is reached else f"**{n}**"
            for tool, n in zip(tools, total, strict=True)
        ]
        lines.append(f"| **{title}, of {len(cases)}** | | " + " | ".join(counted) + " |")
    return "\n".join(lines)


def plain_macs(row: dict[str, Outcome]) -> int:
    """Multiplications of the network as it is exported."""
    return row["onnxruntime"].macs or 0


def summary(cases: Sequence[Case], rows: Sequence[dict[str, Outcome]]) -> str:
    """One line for each tool: cases reached, reached with all nodes, wrong, crashed."""
    lines = []
    for tool in rows[0]:
        found = [row[tool] for row in rows]
        plain = [plain_macs(row) for row in rows]
        heavy = sum(map(reached_heavy, cases, found, plain))
        nodes = sum(map(reached, cases, found, plain))
        wrong = sum(item.left is not None and not item.right for item in found)
        crashed = sum(item.left is None for item in found)
        least = f"reach the least on {nodes} of {len(cases)}, of heavy nodes alone on {heavy}"
        if tool == HEAVY_ONLY:
            least = f"reach the least heavy nodes on {heavy} of {len(cases)}"
        lines.append(f"{tool}: {least}; {wrong} wrong, {crashed} crashed")
    return "\n".join(lines)


def write_readme(text: str) -> None:
    """Put the table between its markers, which must be there.

    Raises:
        SystemExit: README.md has no markers.
    """
    old = README.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", flags=re.DOTALL)
    if not pattern.search(old):
        raise SystemExit(f"{README.name} lacks the markers {START} and {END}")
    new = pattern.sub(lambda _: f"{START}\n{text}\n{END}", old)
    README.write_text(new, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the cases whose name or group holds this")
    parser.add_argument("--tools", nargs="+", choices=[*TOOLS], default=[*TOOLS], help="run these tools")
    parser.add_argument("--write-readme", action="store_true", help="put the table into README.md")
    options = parser.parse_args()

    for name in ("torch", "onnxscript", "onnx_ir", "root"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    cases = [case for case in CASES if options.only in case.name or options.only in case.group]
    tools = [tool for tool in TOOLS if tool in {"onnxruntime", *options.tools}]
    rows: list[dict[str, Outcome]] = []
    spent = dict.fromkeys(tools, 0.0)
    for case in cases:
        network = Network(*case.make())
        row = {}
        for tool in tools:
            start = time.perf_counter()
            row[tool] = outcome(tool, network)
            spent[tool] += time.perf_counter() - start
        rows.append(row)
    text = f"{table(cases, rows)}\n\n{summary(cases, rows)}"
    print(text)
    for tool in tools:
        failures: dict[str, list[str]] = {}
        for case, row in zip(cases, rows, strict=True):
            if row[tool].failure:
                failures.setdefault(row[tool].failure, []).append(case.name)
        for failure, names in failures.items():
            print(f"{tool} crashed on {len(names)}, first {names[0]}: {failure}")
    print("seconds:", ", ".join(f"{tool} {seconds:.0f}" for tool, seconds in spent.items()))
    if options.write_readme:
        write_readme(text.replace("\n\n", "\n\n```text\n") + "\n```")


if __name__ == "__main__":
    main()
