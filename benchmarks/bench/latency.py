"""Times of runs: the files of all tools on onnxruntime, and torch's own compiler; each in turns."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.build import Tell, deviation, feeds, file_of, reference, session
from bench.networks import Network, first
from bench.tools import OURS

__all__ = ["EAGER", "INDUCTOR", "on_onnxruntime", "on_torch"]

EAGER, INDUCTOR, FOLDED = "torch eager", "Inductor", "graphsurgery, torch eager"

BLOCK_MS = 1000.0
"""About as long is one block of runs of all programs; the median of a block gives one ratio."""

MOST_RUNS = 40


def on_onnxruntime(folder: Path, tools: list[str], threads: int, batch: int, blocks: int, tell: Tell) -> None:
    """Tell the median milliseconds of each tool's file, one number a block."""
    inputs, _, _ = reference(folder, batch)
    runs: dict[str, Callable[[], Any]] = {}
    for tool in tools:
        made = session(file_of(folder, tool), threads)
        runs[tool] = _runner(made, feeds(made, inputs))
    tell({"ms": interleaved(runs, blocks), "load": os.getloadavg()[0]})


def _runner(made: Any, arguments: dict[str, Any]) -> Callable[[], Any]:
    return lambda: made.run(None, arguments)


def on_torch(network: Network, folder: Path, threads: int, batch: int, blocks: int, tell: Tell) -> None:
    """Tell the same of the network in torch: as it is, compiled with frozen weights, and folded by us.

    What is compiled wrongly is told, and not timed. What we folded is loaded from the folder.
    """
    torch.set_num_threads(threads)
    made = network.make()
    inputs = first(made.inputs, batch)
    _, outputs, limit = reference(folder, batch)
    from torch._inductor import config  # slow to import, and only needed here

    runs: dict[str, Callable[[], Any]] = {}
    with torch.no_grad(), config.patch(freezing=True, compile_threads=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        compiled = torch.compile(made.model, dynamic=False)
        programs = {EAGER: made.model, INDUCTOR: compiled}
        if (saved := file_of(folder, OURS).with_suffix(".pt")).exists():
            programs[FOLDED] = torch.load(saved, weights_only=False)  # written by the stage before
        for name, program in programs.items():
            run = _call(program, inputs)
            try:
                leaves = torch.utils._pytree.tree_leaves(run())
                found = [leaf.numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]
            except Exception as error:  # noqa: BLE001 - whatever a compiler raises is its outcome
                tell({"failures": {name: f"{type(error).__name__}: {error}".splitlines()[0][:300]}})
                continue
            off = deviation(found, outputs)
            if off > limit:
                tell({"wrong": {name: off}})
                continue
            runs[name] = run
        tell({"compile_seconds": round(time.perf_counter() - start, 1)})
        tell({"ms": interleaved(runs, blocks), "load": os.getloadavg()[0]})


def _call(program: Any, inputs: Any) -> Callable[[], Any]:
    return (lambda: program(**inputs)) if isinstance(inputs, dict) else (lambda: program(inputs))


def interleaved(runs: dict[str, Callable[[], Any]], blocks: int) -> dict[str, list[float]]:
    """Run all in turn, in blocks; the order moves on with every turn, as what runs before leaves its caches.

    Returns:
        For each, the median milliseconds of each block.
    """
    order = list(runs)
    for run in runs.values():
        run()
    once = sum(_timed(run) for run in runs.values())
    repeats = max(1, min(MOST_RUNS, int(BLOCK_MS / once)))
    found: dict[str, list[float]] = {name: [] for name in order}
    turn = 0
    for _ in range(blocks):
        times: dict[str, list[float]] = {name: [] for name in order}
        for _ in range(repeats):
            turn += 1
            for index in range(len(order)):
                name = order[(index + turn) % len(order)]
                times[name].append(_timed(runs[name]))
        for name, values in times.items():
            found[name].append(round(statistics.median(values), 4))
    return found


def _timed(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return 1000.0 * (time.perf_counter() - begin)
