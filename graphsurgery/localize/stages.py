"""The steps on the way from the reference to the candidate, and which of them departs first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from graphsurgery.errors import RuntimeUnavailableError
from graphsurgery.localize.result import Stage
from graphsurgery.verify import Baseline, Verdict, runtime_runner

__all__ = ["Chain", "Step", "chain_of"]

_OF_FILES = ("reference", "onnxruntime-unoptimised", "onnxruntime")
_TO_BLAME = {
    "onnxruntime-unoptimised": "the kernels of onnxruntime",
    "onnxruntime": "the optimisations of onnxruntime",
    "openvino": "OpenVINO",
    "torch-compile": "torch.compile",
}
"""What is to blame where a simpler runtime of the same program agrees."""

_REWRITING = frozenset({"onnxruntime", "openvino", "torch-compile"})


@dataclass(frozen=True)
class Step:
    """A program on a runtime, judged as a whole.

    Attributes:
        program: The program.
        runtime: Name of the runtime, as in `graphsurgery.verify.RUNTIMES`.
        stage: What the report says of it.
        verdict: Its verdict; None where it was not run.
    """

    program: nn.Module | Path
    runtime: str
    stage: Stage
    verdict: Verdict | None

    @property
    def rewrites(self) -> bool:
        """Whether the runtime rewrites the graph, but for what is looked at."""
        return self.runtime in _REWRITING


@dataclass(frozen=True)
class Chain:
    """The steps in order."""

    steps: tuple[Step, ...]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What the report says of them."""
        return tuple(step.stage for step in self.steps)

    @property
    def departs(self) -> Step | None:
        """The first step that differs."""
        return next((step for step in self.steps if step.stage.status == "different"), None)

    @property
    def blame(self) -> str:
        """What it means that this step is the first to differ, in words."""
        step = self.departs
        if step is None:
            return ""
        same = [other for other in self.steps if other.program is step.program]
        before = [other.stage.name for other in same[: same.index(step)] if other.stage.status == "equal"]
        if before:
            return f"{step.stage.name}: {_TO_BLAME[step.runtime]}; {before[-1]} agrees"
        if step.rewrites:
            return f"{step.stage.name}: the program or the runtime; no simpler one could be run"
        what = "program" if isinstance(step.program, nn.Module) else "file"
        return f"{step.stage.name}: the {what} itself, not a runtime"


def chain_of(baseline: Baseline, programs: Sequence[nn.Module | Path], runtimes: Sequence[str]) -> Chain:
    """Judge each program, an ONNX file on several runtimes, against one baseline.

    Args:
        baseline: The reference side.
        programs: In the order in which they were made.
        runtimes: Runtimes of the last program besides the usual ones.

    Raises:
        VerificationError: A program cannot be loaded.
        RuntimeUnavailableError: The last program could not be run at all.
    """
    steps: list[Step] = []
    for program in programs:
        usual = ("torch",) if isinstance(program, nn.Module) else _OF_FILES
        more = runtimes if program is programs[-1] else ()
        steps += [_judged(baseline, program, runtime) for runtime in dict.fromkeys((*usual, *more))]
    if all(step.verdict is None for step in steps if step.program is programs[-1]):
        reasons = "; ".join(step.stage.reason for step in steps)
        raise RuntimeUnavailableError(f"the candidate could not be run: {reasons}")
    return Chain(tuple(steps))


def _judged(baseline: Baseline, program: nn.Module | Path, runtime: str) -> Step:
    name = f"{runtime} {program.name}" if isinstance(program, Path) else f"torch {type(program).__name__}"
    try:
        runner = runtime_runner(runtime, program)
        verdict = baseline.compare(runner)
    except RuntimeUnavailableError as error:
        return Step(program, runtime, Stage(name, "not run", str(error)), None)
    stage = Stage(runner.name, "equal" if verdict.ok else "different", verdict.reason)
    return Step(program, runtime, stage, verdict)
