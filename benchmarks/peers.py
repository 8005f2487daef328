"""What public tools and graphsurgery leave of the fold cases, as a table.

Each cell holds heavy nodes / all nodes. A case is reached, and bold, where the output is right, the nodes
left are no more than the least (heavy ones first, then all, where the case states it), and the
multiplications no more than before (or than the least, where a case states it). A wrong output, a crash and
the factor of multiplications that could have been saved are shown as such. Inductor has no nodes to count but
heavy ones, so those alone are held against it.
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
    return case.nodes is None or (found.left.heavy, found.left.nodes) <= (case.heavy, case.nodes)


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


def header(first: str, second: str, tools: Sequence[str]) -> str:
    """The first two lines of a table."""
    names = [f"{tool} (heavy)" if tool == HEAVY_ONLY else tool for tool in tools]
    return f"| {first} | {second} | {' | '.join(names)} |\n|---|---|" + "---|" * len(tools)


def line(case: Case, row: dict[str, Outcome]) -> str:
    """One case and the counts of each tool."""
    least = f"{case.heavy}" + (f" / {case.nodes}" if case.nodes is not None else "")
    cells = [cell(case, found, plain_macs(row)) for found in row.values()]
    return f"| {case.name} | {least} | {' | '.join(cells)} |"


def groups(cases: Sequence[Case], rows: Sequence[dict[str, Outcome]]) -> str:
    """How many cases of each group each tool brought to the least, and how many of its results are wrong."""
    tools = list(rows[0])
    lines = [header("group", "cases", tools)]
    for group in (*dict.fromkeys(case.group for case in cases), None):
        inside = [(c, row) for c, row in zip(cases, rows, strict=True) if group in (c.group, None)]
        cells = []
        for tool in tools:
            least = sum(reached(case, row[tool], plain_macs(row)) for case, row in inside)
            wrong = sum(row[tool].left is not None and not row[tool].right for _, row in inside)
            cells.append(f"{least}" + (f", {wrong} wrong" if wrong else ""))
        lines.append(f"| {group or '**all**'} | {len(inside)} | {' | '.join(cells)} |")
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


def write_readme(counts: str, totals: str, whole: str) -> None:
    """Put the tables between their markers; the section is made where there is none."""
    old = README.read_text(encoding="utf-8")
    if START not in old:
        old = old.replace("\n## Documents", f"\n## Beside other tools\n\n{START}\n{END}\n\n## Documents")
    details = f"<details><summary>All cases</summary>\n\n{whole}\n\n</details>"
    text = f"{START}\n{counts}\n\n```text\n{totals}\n```\n\n{details}\n{END}"
    pattern = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", flags=re.DOTALL)
    README.write_text(pattern.sub(lambda _: text, old), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the cases whose name or group holds this")
    parser.add_argument("--tools", nargs="+", choices=[*TOOLS], default=[*TOOLS], help="run these tools")
    parser.add_argument("--write-readme", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    if options.write_readme and (options.only or len(options.tools) < len(TOOLS)):
        parser.error("--write-readme takes all cases and tools")

    for name in ("torch", "onnxscript", "onnx_ir", "root"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    cases = [case for case in CASES if options.only in case.name or options.only in case.group]
    tools = [tool for tool in TOOLS if tool in {"onnxruntime", *options.tools}]
    rows: list[dict[str, Outcome]] = []
    lines = [header("case", "least", tools)]
    print(lines[0])
    spent = dict.fromkeys(tools, 0.0)
    for case in cases:
        network = Network(*case.make())
        row = {}
        for tool in tools:
            start = time.perf_counter()
            row[tool] = outcome(tool, network)
            spent[tool] += time.perf_counter() - start
        rows.append(row)
        lines.append(line(case, row))
        print(lines[-1], flush=True)
    counts, totals = groups(cases, rows), summary(cases, rows)
    print(f"\n{counts}\n\n{totals}")
    for tool in tools:
        failures: dict[str, list[str]] = {}
        for case, row in zip(cases, rows, strict=True):
            if row[tool].failure:
                failures.setdefault(row[tool].failure, []).append(case.name)
        for failure, names in failures.items():
            print(f"{tool} crashed on {len(names)}, first {names[0]}: {failure}")
    print("seconds:", ", ".join(f"{tool} {seconds:.0f}" for tool, seconds in spent.items()))
    if options.write_readme:
        write_readme(counts, totals, "\n".join(lines))


if __name__ == "__main__":
    main()
