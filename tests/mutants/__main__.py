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
import hashlib
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

from tests.mutants.sites import Site, sites

WALL_S = 400.0
MEMORY_BYTES = 12 << 30
Lines = set[tuple[str, int]]


def functions(code: CodeType) -> Iterator[CodeType]:
    """Yield the functions and methods of a compiled file, not those inside of others."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            # CO_OPTIMIZED: a function; a class body has no fast locals
            yield from [inner] if inner.co_flags & 0x01 else functions(inner)


def put_in(path: Path, place: int) -> bool:
    """Replace the code of the functions that a change touches; return whether there were any."""
    right, tree = ast.parse(path.read_text()), ast.parse(path.read_text())
    sites(tree)[place].make()
    old, new = (
        {(code.co_name, code.co_firstlineno): code for code in functions(compile(found, str(path), "exec"))}
        for found in (right, ast.fix_missing_locations(tree))
    )
    put = False
    for function in gc.get_objects():
        if type(function) is types.FunctionType and function.__code__.co_filename == str(path):
            key = (function.__code__.co_name, function.__code__.co_firstlineno)
            if key in new and new[key] != old[key]:
                with contextlib.suppress(ValueError):  # other free variables: a call of super() was dropped
                    function.__code__ = new[key]
                    put = True
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
                answer: tuple[Any, str] = work(), ""
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
    found, raised = pickle.loads(data) if data else (None, "")
    if raised:
        raise RuntimeError(raised)
    return found


class Run:
    """A pytest plugin: takes the place of the loop over the tests."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember that a test failed."""
        self.failed |= report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Look at the tests, then run the mutants."""
        files: list[Path] = self.options.files
        for path in files:
            importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
        self.items = {item.nodeid: item for item in session.items}
        code = hashlib.sha1(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]
        known = Path(f"{self.options.out}.{code}")
        seen: dict[str, tuple[Lines, float]] = pickle.loads(known.read_bytes()) if known.exists() else {}
        new = [test for test in self.items if test not in seen]
        seen |= in_child(lambda: self.look(new), 7200, 7200)
        known.write_bytes(pickle.dumps(seen))
        self.seconds = {test: seconds for test, (_, seconds) in seen.items()}
        self.tests: dict[tuple[str, int], set[str]] = collections.defaultdict(set)
        for test in seen.keys() & self.items.keys():
            for line in seen[test][0]:
                self.tests[line].add(test)
        print(f"{len(seen)} tests that pass, {sum(self.seconds.values()):.0f} s of processor")
        self.mutants([path.resolve() for path in files])
        return True

    def passes(self, test: str) -> bool:
        """Run one test with its fixtures."""
        self.failed, item = False, self.items[test]
        item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        return not self.failed

    def look(self, tests: list[str]) -> dict[str, tuple[Lines, float]]:
        """Return the lines that each test reaches, and its seconds of processor; none of tests that fail."""
        mine = {str(path.resolve()) for path in self.options.files}
        lines: Lines = set()

        def call(frame: FrameType, event: str, arg: object) -> Any:
            return line(frame, event, arg) if frame.f_code.co_filename in mine else None

        def line(frame: FrameType, event: str, arg: object) -> Any:
            lines.add((frame.f_code.co_filename, frame.f_lineno))
            return line

        found = {}
        for test in tests:
            lines.clear()
            begin = time.process_time()
            sys.settrace(call)
            passed = self.passes(test)
            sys.settrace(None)
            if passed:
                found[test] = set(lines), time.process_time() - begin
        return found

    def mutants(self, paths: list[Path]) -> None:
        """Run what is asked for, file by file in turns, and append the results."""
        options = self.options
        done = results(options.out)
        queue: list[tuple[int, Path, int, Site]] = []
        for path in paths:
            found = list(enumerate(sites(ast.parse(path.read_text()))))
            random.Random(f"{options.seed} {path.stem}").shuffle(found)
            part = found if options.survivors else found[: options.per_file]
            queue += [(turn, path, place, site) for turn, (place, site) in enumerate(part)]
        for _, path, place, site in sorted(queue, key=lambda entry: entry[:3]):
            text = path.read_text().splitlines()[site.first - 1].strip()
            record: dict[str, Any] = {"file": str(path.relative_to(Path.cwd())), "line": site.first}
            record |= {"column": site.column, "change": site.change, "text": text}
            old = done.get(key(record))
            if old is None if not options.survivors else old is not None and old["result"] != "killed":
                record |= self.mutant(path, place, site)
                with options.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(record["result"], *(record[name] for name in ("file", "line", "change", "text")))

    def mutant(self, path: Path, place: int, site: Site) -> dict[str, Any]:
        """Run the quickest tests that reach one change; of each function one case before the second."""
        reach = set().union(*(self.tests[str(path), line] for line in range(site.first, site.last + 1)))
        turn: collections.Counter[str] = collections.Counter()
        order: list[tuple[int, float, str]] = []
        for seconds, test in sorted((self.seconds[test], test) for test in reach):
            order.append((turn[test.partition("[")[0]], seconds, test))
            turn[test.partition("[")[0]] += 1
        chosen: list[str] = []
        cpu_s = 0.0
        for _, seconds, test in sorted(order)[: self.options.most]:
            if chosen and cpu_s + seconds > self.options.seconds:
                break
            chosen.append(test)
            cpu_s += seconds

        def work() -> tuple[str, str]:
            if not put_in(path, place):
                return "not put in", ""
            return next((("killed", test) for test in chosen if not self.passes(test)), ("survived", ""))

        result, by = "not reached", ""
        if chosen:
            result, by = in_child(work, 15 + 5 * cpu_s, WALL_S) or ("killed", "time or memory")
        return {"result": result, "by": by, "tests": len(chosen), "of": len(reach)}


def key(record: dict[str, Any]) -> tuple[str, ...]:
    """What tells a mutant from others, also when lines have moved."""
    return record["file"], record["text"], str(record["column"]), record["change"]


def results(out: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Return the last result of each mutant."""
    lines = out.read_text().splitlines() if out.exists() else []
    return {key(record): record for record in map(json.loads, lines)}


def main() -> int:
    """Read the command line; what it does not know goes to pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="files to change")
    parser.add_argument("--tests", required=True, nargs="+", help="test files or folders")
    parser.add_argument("--per-file", type=int, default=20, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0, help="draws the mutants")
    parser.add_argument("--most", type=int, default=30, help="tests run on one mutant")
    parser.add_argument("--seconds", type=float, default=4.0, help="of processor that these take without it")
    parser.add_argument("--survivors", action="store_true", help="run those again that lived")
    parser.add_argument("--out", type=Path, default=Path("out/mutants.jsonl"))
    options, more = parser.parse_known_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    quiet = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not sweep"]
    code = pytest.main([*quiet, *more, *options.tests], plugins=[Run(options)])
    count: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for record in results(options.out).values():
        count[record["file"]][record["result"]] += 1
    for file, found in sorted(count.items()):
        print(f"{file}: {sum(found.values())} mutants, {dict(found)}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
