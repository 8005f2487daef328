"""Mutation testing: changes single places of the code, one at a time, and asks whether a test notices.

    python -m tests.mutants graphsurgery/verify/*.py --tests tests/verify --per-file 20 --out out/verify.jsonl

Tests are collected once and run once, to see which lines each of them reaches. Then every mutant lives in a
child of its own, where the code of the functions it changes is replaced in place; the quickest tests that
reach the changed line run until one fails. Results are appended as lines of JSON; a mutant that is in the
file already is not run again. With `--survivors` only those that lived are, under the (presumably greater)
budget now given, and by the tests that are there now.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import gc
import importlib
import json
import os
import pickle
import random
import resource
import select
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from tests.mutants.sites import Site, changed, sites

WALL_S = 400.0
MEMORY_BYTES = 12 << 30


def functions(code: CodeType) -> Iterator[CodeType]:
    """Yield the functions and methods of a compiled file, not those inside of others."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_flags & 0x01:  # CO_OPTIMIZED: a function; a class body has no fast locals
                yield inner
            else:
                yield from functions(inner)


def put_in(path: Path, place: int) -> int:
    """Replace the code of the functions that a change touches; return how many were."""
    right, wrong = (
        {(code.co_name, code.co_firstlineno): code for code in functions(compile(tree, str(path), "exec"))}
        for tree in (ast.parse(path.read_text()), changed(path, place))
    )
    put = 0
    for function in gc.get_objects():
        if type(function) is types.FunctionType and function.__code__.co_filename == str(path):
            key = (function.__code__.co_name, function.__code__.co_firstlineno)
            if key in wrong and wrong[key] != right[key]:
                with contextlib.suppress(ValueError):  # other free variables: a call of super() was dropped
                    function.__code__ = wrong[key]
                    put += 1
    return put


def in_child(work: Callable[[], Any], cpu_s: float, wall_s: float) -> Any:
    """Return what `work` returns in a forked child; None where that dies or takes too long.

    Raises:
        RuntimeError: `work` raised, with what.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_s) + 1, int(cpu_s) + 3))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            try:
                answer = work(), ""
            except Exception:  # noqa: BLE001 - raised again where it is read
                answer = None, traceback.format_exc()
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(answer, pipe)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read() if select.select([pipe], [], [], wall_s)[0] else b""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    answer, raised = pickle.loads(data) if data else (None, "")
    if raised:
        raise RuntimeError(raised)
    return answer


class Run:
    """A pytest plugin: takes the place of the loop over the tests."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.paths = [path.resolve() for path in options.files]
        self.failed = ""
        self.reached: set[tuple[str, int]] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember the first test that fails."""
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Look at the tests, then run the mutants."""
        for path in self.options.files:
            importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
        self.items = {item.nodeid: item for item in session.items}
        known = Path(f"{self.options.out}.tests")
        lines, self.seconds = pickle.loads(known.read_bytes()) if known.exists() else ({}, {})
        new = [test for test in self.items if test not in lines]
        for found, known_of in zip(
            in_child(lambda: self.look(new), 7200, 7200), (lines, self.seconds), strict=True
        ):
            known_of.update(found)
        known.write_bytes(pickle.dumps((lines, self.seconds)))
        self.tests = collections.defaultdict(set)
        for test in lines.keys() & self.items.keys():
            for line in lines[test]:
                self.tests[line].add(test)
        print(f"{len(lines)} tests that pass, {sum(self.seconds.values()):.0f} s of processor")
        self.mutants()
        return True

    def run(self, test: str) -> bool:
        """Run one test with its fixtures; return whether it passed."""
        self.failed = ""
        item = self.items[test]
        item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        return not self.failed

    def look(self, tests: list[str]) -> tuple[dict[str, set[tuple[str, int]]], dict[str, float]]:
        """Return the lines that each test reaches, and its seconds of processor; none of tests that fail."""
        mine = {str(path) for path in self.paths}

        def call(frame: FrameType, event: str, arg: object) -> Any:
            return line(frame, event, arg) if frame.f_code.co_filename in mine else None

        def line(frame: FrameType, event: str, arg: object) -> Any:
            self.reached.add((frame.f_code.co_filename, frame.f_lineno))
            return line

        reached, seconds = {}, {}
        for test in tests:
            self.reached = set()
            begin = time.process_time()
            sys.settrace(call)
            passed = self.run(test)
            sys.settrace(None)
            if passed:
                reached[test], seconds[test] = self.reached, time.process_time() - begin
        return reached, seconds

    def mutants(self) -> None:
        """Run what is asked for, file by file in turns, and append the results."""
        options = self.options
        done = (
            [json.loads(line) for line in options.out.read_text().splitlines()]
            if options.out.exists()
            else []
        )
        lived = [key(record) for record in done if record["result"] != "killed"]
        queue: list[tuple[int, Path, int, Site]] = []
        for path in self.paths:
            found = list(enumerate(sites(ast.parse(path.read_text()))))
            random.Random(f"{options.seed} {path.stem}").shuffle(found)
            if not options.survivors:
                found = found[: options.per_file]
            queue += [(turn, path, place, site) for turn, (place, site) in enumerate(found)]
        over = {key(record) for record in done}
        for _, path, place, site in sorted(queue, key=lambda entry: entry[0]):
            record = {
                "file": str(path.relative_to(Path.cwd())),
                "line": site.line,
                "column": site.column,
                "change": list(site.change),
                "text": path.read_text().splitlines()[site.line - 1].strip(),
            }
            if key(record) in lived if options.survivors else key(record) not in over:
                record |= self.mutant(path, place, site)
                with options.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(record["result"], *(record[name] for name in ("file", "line", "change", "text")))

    def in_turns(self, tests: set[str]) -> list[str]:
        """Return the quickest case of each test function, then the second of each; quick ones first."""
        turn: collections.Counter[str] = collections.Counter()
        order = []
        for test in sorted(tests, key=lambda test: (self.seconds[test], test)):
            function = test.partition("[")[0]
            order.append((turn[function], self.seconds[test], test))
            turn[function] += 1
        return [test for *_, test in sorted(order)]

    def mutant(self, path: Path, place: int, site: Site) -> dict[str, Any]:
        """Run the quickest tests that reach one change."""
        first, last = site.line, max(site.line, getattr(site.node, "end_lineno", 0) or 0)
        if isinstance(site.node, ast.stmt):
            last = site.line
        reach: set[str] = set()
        for lines in (range(first, last + 1), [site.statement.lineno]):
            reach = reach or set().union(*(self.tests[str(path), line] for line in lines))
        chosen: list[str] = []
        left = self.options.seconds
        for test in self.in_turns(reach)[: self.options.most]:
            left -= self.seconds[test]
            if left < 0 and chosen:
                break
            chosen.append(test)

        def work() -> tuple[str, str]:
            if not put_in(path, place):
                return "not put in", ""
            return next((("killed", test) for test in chosen if not self.run(test)), ("survived", ""))

        cpu_s = 15 + 5 * sum(self.seconds[test] for test in chosen)
        result, by = (
            in_child(work, cpu_s, WALL_S) or ("killed", "time or memory") if chosen else ("not reached", "")
        )
        return {"result": result, "by": by, "tests": len(chosen), "of": len(reach)}


def key(record: dict[str, Any]) -> tuple[str, ...]:
    """What tells a mutant from others, also when lines have moved."""
    return record["file"], record["text"], str(record["column"]), *record["change"]


def table(out: Path) -> None:
    """Print how many of each file were killed."""
    last = {key(record): record for record in map(json.loads, out.read_text().splitlines())}
    count: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for record in last.values():
        count[record["file"]][record["result"]] += 1
    for file, results in sorted(count.items()):
        print(f"{file}: {sum(results.values())} mutants, {dict(results)}")


def main() -> int:
    """Read the command line; what it does not know goes to pytest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", help="files to change")
    parser.add_argument(
        "--tests", required=True, nargs="+", help="test files, and options for pytest after --"
    )
    parser.add_argument("--per-file", type=int, default=20, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0, help="draws the mutants")
    parser.add_argument("--most", type=int, default=15, help="tests run on one mutant")
    parser.add_argument("--seconds", type=float, default=4.0, help="of processor that these take without it")
    parser.add_argument("--survivors", action="store_true", help="run those again that lived")
    parser.add_argument("--out", type=Path, default=Path("out/mutants.jsonl"))
    options, more = parser.parse_known_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.touch()
    quiet = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not sweep"]
    code = pytest.main([*quiet, *more, *options.tests], plugins=[Run(options)])
    table(options.out)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
