"""One program judged on several runtimes; one that cannot be run is "not run", and never counts as passed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from graphsurgery.errors import GraphSurgeryError, RuntimeUnavailableError, VerificationError
from graphsurgery.verify.baseline import Baseline
from graphsurgery.verify.inputs import Inputs
from graphsurgery.verify.outputs import Outputs
from graphsurgery.verify.runners import CompiledRunner, OnnxRunner, OnnxVariant, Runner, TorchRunner
from graphsurgery.verify.verdict import RuntimesVerdict, RuntimeVerdict, Verdict

__all__ = ["RUNTIMES", "check_names", "program_of", "runtime_runner", "verdict_on"]

Program = nn.Module | Path


class _FirstRun:
    """Tells a runtime that cannot run a program at all from one that fails on some input of it."""

    def __init__(self, runner: Runner) -> None:
        self.name = runner.name
        self._runner = runner
        self._ran = False

    def run(self, inputs: Inputs) -> Outputs:
        try:
            found = self._runner.run(inputs)
        except Exception as error:
            if self._ran:
                raise
            text = str(error) if isinstance(error, GraphSurgeryError) else f"{type(error).__name__}: {error}"
            raise RuntimeUnavailableError(f"it failed on the example: {_first_line(text)}") from error
        self._ran = True
        return found


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), text)[:300]


def _reference(path: Path) -> Runner:
    from graphsurgery.export.evaluator import Evaluator

    evaluator = Evaluator.of_file(path, double=False)
    return _FirstRun(OnnxVariant(f"ONNX reference evaluator {path.name}", evaluator))


def _openvino(path: Path) -> Runner:
    from graphsurgery.export.openvino import OpenVinoSession

    return _FirstRun(OnnxVariant(f"OpenVINO {path.name}", OpenVinoSession(path)))


def _onnxruntime(path: Path) -> Runner:
    return OnnxRunner(path, name=f"onnxruntime {path.name} (optimised)")


def _unoptimised(path: Path) -> Runner:
    return OnnxRunner(path, optimised=False, name=f"onnxruntime {path.name} (not optimised)")


def _compiled(module: nn.Module) -> Runner:
    return _FirstRun(CompiledRunner(module))


_OF_MODULES: dict[str, Callable[[nn.Module], Runner]] = {"torch": TorchRunner, "torch-compile": _compiled}
_OF_FILES: dict[str, Callable[[Path], Runner]] = {
    "reference": _reference,
    "onnxruntime-unoptimised": _unoptimised,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
RUNTIMES = (*_OF_MODULES, *_OF_FILES)
"""Names of the runtimes: those of torch modules, then those of ONNX files."""


def program_of(program: object) -> Program:
    """Return the module or the file behind what `verify` takes for a side.

    Raises:
        VerificationError: There is none, as behind a runner of the caller's own.
    """
    if isinstance(program, nn.Module):
        return program
    if isinstance(program, str | os.PathLike):
        return Path(program)
    if isinstance(program, TorchRunner):
        return program.module
    if isinstance(program, OnnxRunner):
        return program.path
    raise VerificationError(
        f"a {type(program).__name__} cannot be put on other runtimes; expected an nn.Module or the path of "
        "an .onnx file"
    )


def runtime_runner(name: str, program: Program) -> Runner:
    """Return the runner of a program on the runtime of that name.

    Raises:
        ValueError: There is no such runtime.
        RuntimeUnavailableError: It is not installed, or not for this program.
        VerificationError: The program cannot be loaded.
    """
    check_names([name])
    if isinstance(program, nn.Module):
        if name not in _OF_MODULES:
            raise RuntimeUnavailableError(
                "it runs ONNX files, and this is a torch module: export it, and verify the file"
            )
        return _OF_MODULES[name](program)
    if name not in _OF_FILES:
        raise RuntimeUnavailableError("it runs torch modules, and this is an ONNX file")
    return _OF_FILES[name](program)


def check_names(names: Sequence[str]) -> None:
    """Make sure that there is a name, and that all are known.

    Raises:
        ValueError: There is none, or one is unknown.
    """
    unknown = [name for name in names if name not in RUNTIMES]
    if unknown or not names:
        what = f"there is no runtime {unknown[0]!r}" if unknown else "no runtime is named"
        raise ValueError(f"{what}; expected one or more of {', '.join(RUNTIMES)}")


def verdict_on(baseline: Baseline, program: Program, names: Sequence[str]) -> RuntimesVerdict:
    """Judge one program on several runtimes against one baseline.

    Args:
        baseline: The reference side.
        program: The program that is judged.
        names: Of `RUNTIMES`; one named twice is run once.

    Raises:
        ValueError: A name is unknown, or there is none.
        RuntimeUnavailableError: None of the runtimes could be run, so nothing was compared.
        VerificationError: The program cannot be loaded.
    """
    check_names(names)
    found: list[RuntimeVerdict] = []
    for name in dict.fromkeys(names):
        try:
            verdict = baseline.compare(runtime_runner(name, program))
        except RuntimeUnavailableError as error:
            found.append(RuntimeVerdict(name, "not run", f"not run: {error}"))
            continue
        found.append(RuntimeVerdict(name, "equal" if verdict.ok else "different", verdict.reason, verdict))
    return _together(found)


def _together(found: list[RuntimeVerdict]) -> RuntimesVerdict:
    ran = [(item, item.verdict) for item in found if item.verdict is not None]
    if not ran:
        reasons = "; ".join(f"{item.runtime} {item.reason}" for item in found)
        raise RuntimeUnavailableError(f"nothing was compared, no runtime could be run: {reasons}")
    left = [item.runtime for item in found if item.verdict is None]
    failed = [(item, verdict) for item, verdict in ran if not verdict.ok]
    item, verdict = failed[0] if failed else max(ran, key=lambda pair: _share(pair[1]))
    if failed:
        more = f"; {len(failed)} of the {len(ran)} runtimes that ran differ" if len(ran) > 1 else ""
        reason = f"on {item.runtime}: {verdict.reason}{more}"
    else:
        reason = f"equal on {', '.join(item.runtime for item, _ in ran)}, worst on {item.runtime}: "
        reason += verdict.reason
    if left:
        reason += f" (not run: {', '.join(left)})"
    return RuntimesVerdict(
        ok=not failed,
        reason=reason,
        reference=verdict.reference,
        candidate=verdict.candidate,
        anchor=verdict.anchor,
        outputs=verdict.outputs,
        cases=verdict.cases,
        batch_sizes=verdict.batch_sizes,
        seed=verdict.seed,
        notes=verdict.notes,
        sizes=verdict.sizes,
        data_samples=verdict.data_samples,
        runtimes=tuple(found),
    )


def _share(verdict: Verdict) -> float:
    """Return the greatest share of what is allowed that any output needs."""
    return max((o.native.factor_needed / o.native.factor for o in verdict.outputs if o.native), default=0.0)
