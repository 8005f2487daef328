"""Run passes to a fixed point, check what each declares, keep or roll back.

A pass gets a private copy of the graph (tensors shared), so whatever it does to nodes can be thrown away.
After each run:

1. the copy it was given must be as it was; a tensor that was written in place cannot be rolled back and
   raises;
2. "no change" must mean an equal fingerprint, and a change a different one;
3. the graph must be sound (lint, recompile, `meta["val"]` everywhere) and keep signature, shapes, dtypes as
   declared;
4. with example inputs, it is run: the real shapes and dtypes must agree, and the bits where values are
   declared exact;
5. the `check` callback, which the pipeline gives, compares numbers.

A result that fails one of 3 to 5 is taken apart: the changes that make it wrong are found by halving, undone
alone (`graphsurgery.rewrite.sealing`) and reported as a `PassFailure` that names them. Where that does not
help, and where a pass fails 1 or 2, it is rolled back whole and not run again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphsurgery.errors import GraphSurgeryError, PassError
from graphsurgery.graph import copy_graph_module
from graphsurgery.rewrite.checks import Finding, broken, check_graph, check_values, run_graph, wrong_result
from graphsurgery.rewrite.contracts import Pass, PassResult, Refusal, require_declared
from graphsurgery.rewrite.examples import ExampleGuard
from graphsurgery.rewrite.fingerprint import Ledger, fingerprint, held_tensors
from graphsurgery.rewrite.records import CheckResult, Event, EventKind, ManagerResult, PassFailure, Step
from graphsurgery.rewrite.sealing import Attempt, seal, separate, unseal

__all__ = ["MAX_ROUNDS", "PassManager"]

MAX_ROUNDS = 8
"""Rounds that passes may take unless more are allowed; those at hand settle in two or three."""

Check = Callable[[fx.GraphModule, fx.GraphModule, Pass], CheckResult]


class PassManager:
    """Runs passes in order, again and again until none of them changes the graph.

    Args:
        passes: Pass instances, in the order they run.
        check: Called as `check(before, after, pass)` for every run that changed the graph; a result that is
            not `ok` rolls the pass back.
        on_event: Called before and after every run.
        max_rounds: Rounds after which to stop although passes still change the graph; reported as a failure
            of the last pass that did. The graph stays valid.
        strict: Raise instead of rolling back.
        sealed: By the name of a pass, names of the calls that it must leave as they are.

    Raises:
        PassError: `passes` holds something that is not a `Pass` instance, or `max_rounds` is below 1.
    """

    def __init__(
        self,
        passes: Iterable[Pass],
        *,
        check: Check | None = None,
        on_event: Callable[[Event], None] | None = None,
        max_rounds: int = MAX_ROUNDS,
        strict: bool = False,
        sealed: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        """See the class."""
        self.passes = tuple(passes)
        for item in self.passes:
            if isinstance(item, type) and issubclass(item, Pass):
                raise PassError(
                    f"expected an instance of a pass, got the class {item.__name__}; write {item.__name__}()"
                )
            if not isinstance(item, Pass):
                raise PassError(
                    f"expected an instance of graphsurgery.Pass, got {type(item).__name__} {item!r}"
                )
            require_declared(item)
        for one, other in itertools.combinations(self.passes, 2):
            if one.name == other.name and type(one) is not type(other):
                raise PassError(
                    f"two passes are called {one.name!r}, of {type(one).__module__} and of "
                    f"{type(other).__module__}; expected a name for each, so that failures can be told apart"
                )
        if max_rounds < 1:
            raise PassError(f"max_rounds must be at least 1, got {max_rounds}")
        self.check = check
        self.on_event = on_event
        self.max_rounds = max_rounds
        self.strict = strict
        self.sealed = {name: frozenset(calls) for name, calls in (sealed or {}).items()}

    def __call__(self, gm: fx.GraphModule, example_inputs: Any = None) -> ManagerResult:
        """Run the passes on `gm`, which is left as it is.

        Args:
            gm: A captured graph.
            example_inputs: A tensor, a tuple, a mapping of keyword inputs, or the graph's `CaptureInfo`; if
                given, every changed graph is run on them and compared with what the pass declares.

        Raises:
            PassError: A pass wrote into a tensor in place, or (`strict`) broke what it declares.
        """
        return _Run(self, gm, example_inputs).to_fixed_point()


@dataclass(frozen=True)
class _Snapshot:
    """A graph and its fingerprint."""

    gm: fx.GraphModule
    print: str


@dataclass(frozen=True)
class _Tried:
    """One run of a pass: its result (None if it gave none), the graph, what is wrong, the outputs."""

    result: PassResult | None
    after: _Snapshot
    finding: Finding | None
    outputs: list[Any] | None


class _Run:
    """One call of the manager: the current graph and the records so far."""

    def __init__(self, manager: PassManager, gm: fx.GraphModule, example_inputs: Any) -> None:
        self.manager = manager
        self.inputs = example_inputs
        self.ledger = Ledger()
        self.given = gm
        self.examples = ExampleGuard(gm, example_inputs)
        self.current = self._snapshot(gm)
        self.outputs: list[Any] | None = None if example_inputs is None else run_graph(gm, example_inputs)
        self.steps: list[Step] = []
        self.failures: list[PassFailure] = []
        self.refusals: dict[int, tuple[Refusal, ...]] = {}
        self.sealed = dict(manager.sealed)
        self.settled: dict[int, str] = {}  # pass -> fingerprint of the graph in which it found nothing to do
        self.disabled: set[int] = set()
        self.seconds: dict[str, float] = {}
        self.round = 0

    def _snapshot(self, gm: fx.GraphModule) -> _Snapshot:
        return _Snapshot(gm, fingerprint(gm, self.ledger.digest))

    def to_fixed_point(self) -> ManagerResult:
        changed = True
        while changed and self.round < self.manager.max_rounds:
            self.round += 1
            changed = False
            for index in range(len(self.manager.passes)):
                if changed and self.manager.passes[index].waits:
                    continue  # its turn comes in the round in which those before it change nothing
                if index not in self.disabled and self.settled.get(index) != self.current.print:
                    changed |= self._run_pass(index)
                    self.ledger.keep(self._graphs())
        self._refuse_written_tensors([item.name for item in self.manager.passes], contents=True)
        if changed:
            reason = f"the graph still changed in round {self.round}; the passes may undo each other"
            self.failures.append(PassFailure(self.steps[-1].pass_name, "no-fixed-point", reason, self.round))
            if self.manager.strict:
                raise PassError(f"pass {self.steps[-1].pass_name!r}: {reason}")
        return ManagerResult(
            graph_module=self.current.gm,
            changes=tuple(change for step in self.steps for change in step.changes),
            refusals=tuple(refusal for index in sorted(self.refusals) for refusal in self.refusals[index]),
            failures=tuple(self.failures),
            steps=tuple(self.steps),
            rounds=self.round,
            seconds=self.seconds,
        )

    def _run_pass(self, index: int) -> bool:
        """Run one pass; return whether it changed the graph and was kept."""
        declared = self.manager.passes[index]
        self._tell("pass-start", index)
        start = time.perf_counter()
        tried = self._try(declared, self.sealed.get(declared.name, frozenset()))
        if tried.finding is not None and tried.result is not None and not self.manager.strict:
            tried = self._without_wrong_changes(declared, tried) or tried
        result, finding = tried.result, tried.finding
        self.seconds[declared.name] = self.seconds.get(declared.name, 0.0) + time.perf_counter() - start
        if result is not None:
            self.refusals[index] = (
                result.refusals
            )  # a pass that is rolled back has still said what it declines
        if finding is not None or result is None:
            self._fail(index, finding or ("raised", "gave no result"))
            return False
        if result.modified:
            self.current, self.outputs = tried.after, tried.outputs
            self.steps.append(Step(declared.name, self.round, self.current.gm, result.changes, index))
        else:
            self.settled[index] = self.current.print
        self._tell("pass-done", index, changes=len(result.changes))
        return result.modified

    def _without_wrong_changes(self, declared: Pass, failed: _Tried) -> _Tried | None:
        """The pass without the changes that make it wrong; None where it cannot be had."""
        known = self.sealed.get(declared.name, frozenset())
        last = failed

        def attempt(names: frozenset[str]) -> Attempt:
            nonlocal last
            last = self._try(declared, known | names)
            changes = last.result.changes if last.result is not None else ()
            return Attempt(changes, last.finding[1] if last.finding is not None else None)

        if failed.result is None or failed.finding is None:
            return None
        found = separate(Attempt(failed.result.changes, failed.finding[1]), attempt)
        if found is None:
            return None
        self.sealed[declared.name] = known | found.sealed
        for changes, reason in found.wrong:
            failure = PassFailure(declared.name, failed.finding[0], reason, self.round, changes)
            self.failures.append(failure)
        return last

    def _try(self, declared: Pass, sealed: frozenset[str]) -> _Tried:
        """One run of a pass on the current graph, checked."""
        result, after, finding = self._attempt(declared, sealed)
        outputs = self.outputs
        if finding is None and result is not None and result.modified:
            finding, outputs = self._check(declared, after)
        return _Tried(result, after, finding, outputs)

    def _attempt(
        self, declared: Pass, sealed: frozenset[str]
    ) -> tuple[PassResult | None, _Snapshot, Finding | None]:
        """Cases 1 and 2 of the module docstring."""
        before = self.current
        given = copy_graph_module(before.gm)
        if sealed:
            seal(given, sealed)
        untouched = self._snapshot(given).print if sealed else before.print
        result: PassResult | None = None
        finding: Finding | None = None
        try:
            result = declared.run(given)
        except GraphSurgeryError as error:
            finding = "raised", str(error)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (a pass is foreign code)
            finding = "raised", f"raised {type(error).__name__}: {str(error).strip() or 'no message'}"
        self._refuse_written_tensors([declared.name], contents=False)
        if self.examples.restore():
            finding = "input-modified", "wrote into the example inputs, which all comparisons are made on"
        finding = finding or wrong_result(result)
        after = before
        try:
            if finding is None and self._snapshot(given).print != untouched:
                finding = "input-modified", "modified the graph it was given instead of a copy"
            if finding is None and result is not None:
                if sealed:
                    unseal(result.graph_module)
                after = self._snapshot(result.graph_module)
        except Exception as error:  # noqa: BLE001 (a graph without output, a node without its arguments)
            finding = broken(error)
        if finding is not None or result is None:
            return None, before, finding
        if not result.changes and after.print != before.print:
            finding = "false-no-change", "reports no change but handed back another graph"
        elif result.changes and after.print == before.print:
            finding = "false-change", f"reports {len(result.changes)} changes but handed back the same graph"
        return result, after, finding

    def _refuse_written_tensors(self, suspects: list[str], *, contents: bool) -> None:
        """A tensor written in place is lost for every graph that shares it."""
        written = self.ledger.written(contents=contents)
        if written:
            names = sorted(
                {name for gm in self._graphs() for name, t in held_tensors(gm) if id(t) in written}
            )
            who = (
                f"pass {suspects[0]!r}" if len(suspects) == 1 else f"one of the passes {', '.join(suspects)}"
            )
            raise PassError(
                f"{who} wrote into {', '.join(names)} in place, which all graphs share: "
                "expected a new tensor under a new attribute; capture the model again and leave the pass out"
            )

    def _graphs(self) -> list[fx.GraphModule]:
        return [self.given, self.current.gm, *(step.graph_module for step in self.steps)]

    def _check(self, declared: Pass, after: _Snapshot) -> tuple[Finding | None, list[Any] | None]:
        """Cases 3 to 5 of the module docstring; and the outputs for the example inputs, if there are any."""
        before, outputs = self.current.gm, self.outputs
        try:
            finding = check_graph(before, after.gm, declared)
        except Exception as error:  # noqa: BLE001 (as above)
            finding = broken(error)
        if finding is not None:
            return finding, None
        if self.outputs is not None:
            try:
                outputs = run_graph(after.gm, self.inputs)
            except Exception as error:  # noqa: BLE001 (a foreign graph may raise anything)
                reason = f"left a graph that does not run: {type(error).__name__}: {error}"
                return ("raised", reason), None
            finding = check_values(self.outputs, outputs, declared)
            if finding is not None:
                return finding, None
        if self.manager.check is not None:
            verdict = self.manager.check(before, after.gm, declared)
            if not verdict.ok:
                return ("check", verdict.reason), None
        return None, outputs

    def _fail(self, index: int, finding: Finding) -> None:
        code, reason = finding
        name = self.manager.passes[index].name
        self.disabled.add(index)
        self.failures.append(PassFailure(name, code, reason, self.round))
        self._tell("pass-failed", index, reason=reason)
        if self.manager.strict:
            raise PassError(
                f"pass {name!r} {reason} (round {self.round}, {code}); fix the pass or leave it out"
            )

    def _tell(self, kind: EventKind, index: int, *, changes: int = 0, reason: str = "") -> None:
        if self.manager.on_event is not None:
            passes = self.manager.passes
            self.manager.on_event(
                Event(kind, passes[index].name, index, len(passes), self.round, changes, reason)
            )
