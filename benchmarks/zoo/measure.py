"""What is found out about one network, in the process that was forked for it."""

from __future__ import annotations

import importlib
import os
import re
import resource
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphsurgery as gs
from graphsurgery.export import export_onnx, free_call, latency_ms
from graphsurgery.graph import capture_info
from zoo.entry import Entry, as_trained

__all__ = ["Tell", "latency", "survey", "warm_up"]

Tell = Callable[[dict[str, Any]], None]
"""Hands a part of the record to the parent, which keeps it whatever happens next."""

BLOCKS = 7
"""Blocks of interleaved runs; each gives one ratio, so that there is a spread."""


def survey(entry: Entry, tell: Tell, *, export: bool = True) -> None:
    """Capture, optimise, verify; then export, the plain export beside it for its time."""
    made = _made(entry, tell)
    if made is None:
        return
    model, inputs = made
    with _stage("optimise", tell) as spent:
        result = gs.optimize(model, inputs)
    if not spent:
        return
    tell(_of_report(result.report))
    tell({"seconds": {"tool": spent["wall"], "tool_cpu": spent["cpu"]}})
    if not export:
        return
    with tempfile.TemporaryDirectory() as folder:
        with _stage("onnx", tell) as spent:
            written = result.export_onnx(Path(folder) / "ours.onnx")
        if spent and written.verdict is not None:
            tell({"onnx": {"ok": written.verdict.ok, "reason": written.verdict.reason}})
            tell({"seconds": {"onnx": spent["wall"], "onnx_cpu": spent["cpu"]}})
        with _stage("plain export", tell) as spent:
            _plain_export(model, result, Path(folder) / "plain.onnx")
        if spent:
            tell({"seconds": {"export": spent["wall"], "export_cpu": spent["cpu"]}})
    tell({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024})


def latency(entry: Entry, tell: Tell) -> None:
    """Milliseconds on onnxruntime of the plain export and of the result, one thread, interleaved.

    The file that is timed is compared with the model first: it is made anew, not the one that `survey` saw.
    Where `torch.onnx.export` makes no file of the network as it is, or none that onnxruntime runs,
    graphsurgery's exporter writes it.
    """
    made = _made(entry, tell)
    if made is None:
        return
    model, inputs = made
    with _stage("optimise", tell) as spent:
        result = gs.optimize(model, inputs, verify="off")
    if not spent:
        return
    with tempfile.TemporaryDirectory() as folder, _stage("latency", tell):
        info = capture_info(result.graph_module)
        files = [Path(folder) / "plain.onnx", Path(folder) / "ours.onnx"]
        leaves = torch.utils._pytree.tree_leaves((info.args, info.kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        try:
            _plain_export(model, result, files[0])
            latency_ms(files[:1], tensors, 1)
            exporter = "torch"
        except Exception:  # noqa: BLE001 - torch's own, or that of a file which onnxruntime does not take
            export_onnx(model, info, files[0], verify=False)
            exporter = "graphsurgery"
        result.export_onnx(files[1])
        repeats = _repeats(latency_ms(files, tensors, 3, threads=1))
        pairs = [latency_ms(files, tensors, repeats, threads=1) for _ in range(BLOCKS)]
        before, after = zip(*pairs, strict=True)
        ratios = sorted(ours / plain for plain, ours in pairs)
        found = {
            "exporter": exporter,
            "before_ms": statistics.median(before),
            "after_ms": statistics.median(after),
            "ratio": statistics.median(ratios),
            "least": ratios[0],
            "most": ratios[-1],
            "runs": repeats * BLOCKS,
            "load": os.getloadavg()[0],
        }
        tell({"latency": found})


def warm_up() -> None:
    """Run all of it once on a small network, for what torch does once in a process, and load what is slow.

    There is nothing to fold in it: some coefficients come from autograd, which then would not work in forks.
    """
    for package in ("transformers.modeling_utils", "peft"):
        importlib.import_module(package)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    survey(Entry("", "", lambda: (model.eval(), torch.randn(2, 3, 8, 8))), lambda _: None)


def _made(entry: Entry, tell: Tell) -> tuple[nn.Module, Any] | None:
    with _stage("make", tell) as spent:
        model, inputs = entry.make()
        torch.manual_seed(0)
        model = as_trained(model, inputs)
    if not spent:
        return None
    tell({"seconds": {"make": spent["wall"]}, "class": type(model).__name__})
    return model, inputs


@contextmanager
def _stage(name: str, tell: Tell) -> Iterator[dict[str, float]]:
    """Tell what a stage raises and go on; the seconds are filled in where it did not."""
    tell({"stage": name})
    spent: dict[str, float] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield spent
    except Exception as error:  # noqa: BLE001 - any error is a finding
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch's exporter colours its advice
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        tell(
            {
                "errors": {
                    name: {
                        "class": type(error).__name__,
                        "named": isinstance(error, gs.GraphSurgeryError),
                        "message": (lines[0] if lines else "")[:400],
                        "where": _where(error),
                    }
                }
            }
        )
    else:
        spent["wall"] = round(time.perf_counter() - wall, 3)
        spent["cpu"] = round(time.process_time() - cpu, 3)


def _where(error: BaseException) -> str:
    """The innermost line of graphsurgery that an error passed through."""
    found, trace = "", error.__traceback__
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if "graphsurgery" in file.parts:
            found = f"{'/'.join(file.parts[-2:])}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _of_report(report: gs.Report) -> dict[str, Any]:
    verdict = report.verification
    outputs = verdict.outputs if verdict else ()
    ratios = [output.rounding_ratio for output in outputs if output.rounding_ratio is not None]
    return {
        "captured": "dynamic batch" if report.captured.dynamic_batch else "static",
        "notes": list(report.captured.notes),
        "torch": {
            "ok": verdict is not None and verdict.ok,
            "reason": verdict.reason if verdict else "not run",
            "float64": any(output.float64 is not None for output in outputs),
            "batches": list(verdict.batch_sizes) if verdict else [],
            "rounding": max(ratios, default=None),
        },
        "before": asdict(report.before),
        "after": asdict(report.after),
        "changes": dict(Counter(f"{c.pass_name}: {c.kind}" for c in report.changes).most_common()),
        "refusals": dict(Counter(f"{r.pass_name}: {r.code}" for r in report.refusals).most_common()),
        "failures": [f"{f.pass_name}: {f.code}: {f.reason}" for f in report.failures],
        "stages": {name: round(seconds, 3) for name, seconds in report.seconds.items()},
    }


def _plain_export(model: nn.Module, result: gs.OptimizeResult, path: Path) -> None:
    info = capture_info(result.graph_module)
    call, shapes = free_call(model, info)
    torch.onnx.export(
        model,
        call.args,
        path,
        kwargs=dict(call.kwargs or {}),
        dynamo=True,
        verbose=False,
        dynamic_shapes=shapes if info.dynamic_batch else None,
    )


def _repeats(first: tuple[float, ...]) -> int:
    """Runs in one block: about half a second of each file, 3 to 50."""
    return max(3, min(50, int(500 / max(first))))
