"""Many networks: run, count, and shrink what fails."""

from __future__ import annotations

import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from fuzz.check import Failed, Plan, check, plan_of
from fuzz.generate import random_program
from fuzz.program import Network, Program
from fuzz.shrink import shrunk


@dataclass
class Summary:
    """What came of some seeds.

    Attributes:
        counts: networks, by what became of them.
        changed: networks in which a pass changed something, by the pass.
        kinds: how often each kind of operation occurred.
        reasons: why networks were not captured, or nothing could be said of them, by seed.
        failures: what failed, by seed; shrunk where that was asked for.
        worst: largest deviation, in parts of what rounding explains.
        seconds: time of the processor.
    """

    counts: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    reasons: dict[int, str] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    worst: float = 0.0
    seconds: float = 0.0

    def add(self, other: Summary) -> None:
        """Take in the summary of other seeds."""
        self.counts += other.counts
        self.changed += other.changed
        self.kinds += other.kinds
        self.reasons |= other.reasons
        self.failures |= other.failures
        self.worst = max(self.worst, other.worst)
        self.seconds += other.seconds

    @property
    def captured(self) -> float:
        """Share of the networks that could be captured."""
        return 1 - self.counts["not captured"] / max(1, self.counts["networks"])

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        lines = [f"{counts}; captured {self.captured:.1%}"]
        lines += ["changed by " + ", ".join(f"{name}: {count}" for name, count in self.changed.most_common())]
        lines += [f"largest deviation {self.worst:.2f} of what rounding explains; {self.seconds:.0f} s"]
        lines += [f"seed {seed}: {text[:200]}" for seed, text in sorted(self.reasons.items())]
        return "\n".join(lines)


def run(seeds: Iterable[int], *, onnx_every: int = 30, verify_every: int = 2, shrink: float = 0.0) -> Summary:
    """Check the networks of some seeds.

    Args:
        seeds: of the networks.
        onnx_every: one of so many is exported and run on onnxruntime.
        verify_every: one of so many is verified by the library too, which must not call it wrong.
        shrink: seconds that a failing one may be shrunk for.
    """
    done = Summary()
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in seeds:
            _one(done, seed, plan_of(seed, onnx_every, verify_every), shrink)
    done.seconds = time.process_time() - start
    return done


def some(task: tuple[range, int, float]) -> tuple[range, Summary]:
    """`run` for a pool of processes: seeds, `onnx_every` and `shrink`."""
    seeds, onnx_every, shrink = task
    return seeds, run(seeds, onnx_every=onnx_every, shrink=shrink)


def _one(done: Summary, seed: int, plan: Plan, shrink: float) -> None:
    program = random_program(seed)
    done.counts["networks"] += 1
    done.kinds.update(op.kind for op in program.ops)
    done.counts[program.dtype] += 1
    done.counts["badly scaled"] += program.numbers != "plain"
    try:
        outcome = check(program, plan)
    except Exception as error:  # noqa: BLE001 - whatever is raised is what is looked for
        done.counts["failed"] += 1
        done.failures[seed] = told(seed, program, plan, error, shrink)
        return
    if outcome.reason:
        done.counts["inconclusive" if outcome.captured else "not captured"] += 1
        done.reasons[seed] = outcome.reason
        return
    done.counts["changed"] += bool(outcome.changes)
    done.counts["changes"] += len(outcome.changes)
    done.counts["verified"] += plan.verify == "final"
    done.counts["on onnxruntime"] += outcome.onnx
    done.changed.update({name for name, _ in outcome.changes})
    done.worst = max(done.worst, outcome.worst)


def told(seed: int, program: Program, plan: Plan, error: Exception, shrink: float) -> str:
    """A failure as a program that shows it."""
    code = getattr(error, "code", type(error).__name__)
    if shrink:
        program = shrunk(program, lambda smaller: code_of(smaller, plan) == code, shrink)
    text = str(error) if isinstance(error, Failed) else "".join(traceback.format_exception(error)[-3:])
    said = "\n".join(f"# {line}" for line in f"seed {seed}, {plan}\n{text}".splitlines())
    options = f", passes={plan.passes!r}" if plan.passes else ""
    call = f"import graphsurgery as gs\n\nresult = gs.optimize(model, example{options})\n"
    return f"{said}\n\n{Network(program).source}\n{call}print(result.report)\n"


def code_of(program: Program, plan: Plan) -> str:
    """In which way a program fails; empty where it does not."""
    try:
        check(program, plan)
    except Exception as error:  # noqa: BLE001 - whatever is raised is what is looked for
        return str(getattr(error, "code", type(error).__name__))
    return ""
