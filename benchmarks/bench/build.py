"""One tool on one network, in a process of its own: its file, whether it is right, and what it cost."""

from __future__ import annotations

import copy
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx_count import left, optimised

import graphsurgery as gs
from bench.networks import BATCHES, Made, Network, first
from bench.tools import FILE_TOOLS, MODULE_TOOLS, OURS, PLAIN, NotOffered, export

__all__ = ["TOLERANCE", "Tell", "build", "deviation", "feeds", "file_of", "reference", "session", "warm_up"]

Tell = Callable[[dict[str, Any]], None]
"""Hands a part of the record to the parent, which keeps it whatever happens next."""

TOLERANCE = 1e-4
"""Largest deviation from the float64 network, as a part of the largest value, that is rounding in float32.

It is raised to three times the deviation of the network itself in float32, where that is more.
"""


def file_of(folder: Path, tool: str) -> Path:
    """Where the file of a tool lies."""
    return folder / f"{tool.replace(' / ', '_').replace(' ', '_')}.onnx"


def build(network: Network, tool: str, folder: Path, tell: Tell) -> None:
    """Apply a tool, write its ONNX file, and hold that against the network in float64.

    The plain export comes first: it leaves the reference in the folder, and the file that others work on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = file_of(folder, tool)
    path.unlink(missing_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _apply(network, tool, path, tell)
            tell(judge(path, folder))
    except NotOffered:
        tell({"offered": False})
    except Exception as error:  # noqa: BLE001 - whatever a tool raises is its outcome
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        tell({"failure": f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]})


def _apply(network: Network, tool: str, path: Path, tell: Tell) -> None:
    if tool in FILE_TOOLS:
        with measured("work", tell):
            onnx.save(FILE_TOOLS[tool](onnx.load(file_of(path.parent, PLAIN))), path)
        return
    made = network.make()
    example = first(made.inputs, 2)
    if tool == OURS:
        with measured("work", tell):
            result = gs.optimize(made.model, example)
        tell({"undone": [f"{f.pass_name}: {f.reason}" for f in result.report.failures]})
        with measured("export", tell):
            result.export_onnx(path)
        torch.save(result.module, path.with_suffix(".pt"))
        return
    model = made.model
    if tool in MODULE_TOOLS:
        with measured("work", tell):
            model = MODULE_TOOLS[tool](made)
    else:
        store_reference(made, path.parent)
    with measured("export", tell):
        onnx.save(export(model, example), path)


@contextmanager
def measured(stage: str, tell: Tell) -> Iterator[None]:
    """Tell the seconds of a stage and how far memory rose above what was held when it began."""
    base = _reset_peak()
    wall, processor = time.perf_counter(), time.process_time()
    yield
    spent = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    tell({stage: {**{key: round(value, 3) for key, value in spent.items()}, "peak_mb": _peak_mb() - base}})


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _reset_peak() -> int:
    """Begin a new peak where Linux allows it (else the peak of the making counts), and return it in MB."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak_mb()


# -- right or wrong -----------------------------------------------------------------------------------------


def store_reference(made: Made, folder: Path) -> None:
    """Write inputs at each batch, the outputs in float64, and how far float32 is from them."""
    exact = copy.deepcopy(made.model).double()
    stored: dict[str, Any] = {}
    worst = 0.0
    for batch in BATCHES:
        inputs = first(made.inputs, batch)
        with torch.no_grad():
            right = _call(exact, torch.utils._pytree.tree_map(_double, inputs))
            own = _call(made.model, inputs)
        for name, value in _named(inputs).items():
            stored[f"in/{batch}/{name}"] = value.numpy()
        stored |= {f"out/{batch}/{index}": value for index, value in enumerate(right)}
        worst = max(worst, deviation(own, right))
    np.savez(folder / "reference.npz", float32=worst, **stored)


def reference(folder: Path, batch: int) -> tuple[dict[str, np.ndarray], list[np.ndarray], float]:
    """The inputs by name, the right outputs, and the deviation that counts as rounding.

    A network with one tensor as input has it under the name of "".
    """
    with np.load(folder / "reference.npz") as stored:
        inputs = {key.split("/", 2)[2]: stored[key] for key in stored if key.startswith(f"in/{batch}/")}
        count = sum(key.startswith(f"out/{batch}/") for key in stored)
        outputs = [stored[f"out/{batch}/{index}"] for index in range(count)]
        return inputs, outputs, max(TOLERANCE, 3 * float(stored["float32"]))


def deviation(found: list[np.ndarray], right: list[np.ndarray]) -> float:
    """Largest deviation, each output relative to its largest value; infinite where shapes differ."""
    if len(found) != len(right):
        return float("inf")
    worst = 0.0
    for value, wanted in zip(found, right, strict=True):
        if value.shape != wanted.shape or not np.isfinite(value).all():
            return float("inf")
        scale = max(float(np.abs(wanted).max()), float(np.finfo(np.float32).tiny))
        worst = max(worst, float(np.abs(value - wanted).max()) / scale)
    return worst


def judge(path: Path, folder: Path) -> dict[str, Any]:
    """Whether a file computes the network, and what it holds."""
    worst, right = 0.0, True
    made = session(path, threads=1)
    for batch in BATCHES:
        inputs, outputs, tolerance = reference(folder, batch)
        error = deviation(made.run(None, feeds(made, inputs)), outputs)
        worst, right = max(worst, error), right and error <= tolerance
    del made
    model = onnx.load(path)
    written, ran = left(model), left(optimised(model, "all"))
    constants = list(model.graph.initializer)
    for node in model.graph.node:
        constants += [item.t for item in node.attribute if node.op_type == "Constant" and item.HasField("t")]
    floating = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)
    return {
        "right": right,
        "error": worst,
        "limit": tolerance,
        "nodes": written.nodes,
        "nodes_run": ran.nodes,
        "heavy_run": ran.heavy,
        "parameters": sum(prod(tensor.dims) for tensor in constants if tensor.data_type in floating),
        "size_bytes": path.stat().st_size,
    }


def session(path: Path, threads: int) -> ort.InferenceSession:
    """A file on onnxruntime, all optimisations on."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else they slow the next file down
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feeds(made: ort.InferenceSession, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs under the names of a file; the only one fits whatever its name is."""
    names = [value.name for value in made.get_inputs()]
    return {names[0]: inputs[""]} if "" in inputs else {name: inputs[name] for name in names}


def _named(inputs: Any) -> dict[str, torch.Tensor]:
    return inputs if isinstance(inputs, dict) else {"": inputs}


def _double(value: Any) -> Any:
    return value.double() if value.is_floating_point() else value


def _call(model: torch.nn.Module, inputs: Any) -> list[np.ndarray]:
    found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return [leaf.numpy() for leaf in torch.utils._pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]


def warm_up(folder: Path) -> None:
    """Run all tools once on a small network, for what is done once in a process; forks inherit it.

    There is nothing to fold in it: some coefficients come from autograd, which then would not work in forks.
    """
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten()).eval()
    network = Network("", "", lambda: Made(model, torch.randn(8, 3, 8, 8), lambda: model))
    for tool in (PLAIN, *FILE_TOOLS, *MODULE_TOOLS, OURS):
        build(network, tool, folder, lambda _: None)
