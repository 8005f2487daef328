"""How long a fold takes and what memory: beside the recipe that people post, and against the graph's size.

The recipe feeds the rows of an identity matrix, as pictures, through both layers in float32 and reads the
folded Linear off the outputs. Ours is `FoldAffine` on the captured graph: search, coefficients in float64 and
the certificate. Times are medians of rounds in turn, in one process with one thread. Memory is the growth of
the resident set from the start of the work to its peak, each in a process of its own. Times against the size
are of the processor, so that they can be told from what else the machine does.
"""

from __future__ import annotations

import argparse
import gc
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

import graphsurgery as gs
from graphsurgery.affine import write
from graphsurgery.cost import layer_counts
from graphsurgery.graph import copy_graph_module, fresh_attr, get_attr_value, set_attr
from graphsurgery.passes import FoldAffine, fold_affine


@dataclass(frozen=True)
class Layers:
    """A convolution, flattened into a Linear."""

    channels: int
    features: int
    size: int
    outputs: int
    kernel: int = 5
    stride: int = 2

    def __str__(self) -> str:
        """One line for the tables."""
        conv = f"{self.channels} -> {self.features}, {self.kernel}x{self.kernel} / {self.stride}"
        return f"conv {conv} on {self.size}x{self.size}, Linear -> {self.outputs}"

    def make(self) -> nn.Sequential:
        torch.manual_seed(0)
        conv = nn.Conv2d(self.channels, self.features, self.kernel, self.stride)
        side = (self.size - self.kernel) // self.stride + 1
        return nn.Sequential(conv, nn.Flatten(), nn.Linear(self.features * side**2, self.outputs)).eval()

    @property
    def result_bytes(self) -> int:
        """Bytes of the folded Linear in float64, in which it is computed."""
        return 8 * self.outputs * (self.channels * self.size**2 + 1)

    def picture(self, batch: int) -> Tensor:
        torch.manual_seed(1)
        return torch.randn(batch, self.channels, self.size, self.size)


CASES = (Layers(5, 50, 13, 100), Layers(5, 50, 13, 50), Layers(32, 64, 28, 128))


def recipe(model: nn.Module, layers: Layers) -> nn.Module:
    """One Linear from the outputs of one-hot pictures."""
    shape = (layers.channels, layers.size, layers.size)
    inputs = layers.channels * layers.size**2
    linear = nn.Linear(inputs, layers.outputs)
    with torch.no_grad():
        bias = model(torch.zeros(1, *shape))
        rows = model(torch.eye(inputs).reshape(inputs, *shape)) - bias
        linear.weight.copy_(rows.T)
        linear.bias.copy_(bias[0])
    return nn.Sequential(nn.Flatten(), linear)


def ours(graph: fx.GraphModule) -> nn.Module:
    """The same by `FoldAffine`, which by itself would decline to trade parameters for multiplications so far.

    Raises:
        RuntimeError: Something else came out than one Linear.
    """
    folded = FoldAffine(max_param_growth=math.inf).run(graph).graph_module
    if layer_counts(folded).get("linear") != 1 or "conv" in layer_counts(folded):
        raise RuntimeError(f"expected one Linear, got {layer_counts(folded)}")
    return folded


def contenders(layers: Layers) -> dict[str, Callable[[], nn.Module]]:
    """Both ways to fold, ready to run."""
    model = layers.make()
    graph = gs.capture(model, (layers.picture(2),))
    return {
        "recipe": lambda: recipe(model, layers),
        "graphsurgery": lambda: ours(graph),
    }


def deviation(folded: nn.Module, layers: Layers) -> float:
    """Largest deviation from the float64 network, relative to its largest value."""
    x = layers.picture(3)
    with torch.no_grad():
        exact = layers.make().double()(x.double())
        return float((folded(x) - exact).abs().max() / exact.abs().max())


# -- memory -----------------------------------------------------------------------------------------------


def status(key: str) -> int:
    """A figure in kB of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def peak_growth(run: Callable[[], Any]) -> int:
    """Bytes by which the resident set grew at its peak."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def peak_in_a_process(index: int, name: str) -> int | None:
    """The peak growth of one contender on one case; None where the system does not tell."""
    command = [sys.executable, __file__, "--peak", str(index), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def side_by_side(rounds: int) -> None:
    print(
        "| layers | seconds, recipe | ours | ratio | ours but for copying and writing the graph "
        "| ratio | peak MB, recipe | ours | ratio | ours / float64 result "
        "| error, recipe | ours |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for index, layers in enumerate(CASES):
        runs = contenders(layers)
        times: dict[str, list[float]] = {name: [] for name in (*runs, "bare")}
        errors = {}
        for turn in range(rounds + 1):
            for name, run in runs.items():
                clock = time.perf_counter
                with (
                    timed(fold_affine, ("copy_graph_module",), clock) as copying,
                    timed(write, ("emit",), clock) as writing,
                ):
                    start = clock()
                    folded = run()
                    taken = clock() - start
                errors[name] = deviation(folded, layers)
                del folded
                if turn:  # the first round warms up
                    times[name].append(taken)
                    if name == "graphsurgery":
                        times["bare"].append(taken - copying[0] - writing[0])
        seconds = [statistics.median(times[name]) for name in (*runs, "bare")]
        peaks = [peak_in_a_process(index, name) for name in runs]
        cells = [f"{seconds[0]:.3f}"]
        for own in seconds[1:]:
            cells += [f"{own:.3f}", f"{seconds[0] / own:.1f}"]
        if peaks[0] is not None and peaks[1] is not None:
            cells += [f"{value / 1e6:.0f}" for value in peaks] + [f"{peaks[0] / max(peaks[1], 1):.1f}"]
            cells.append(f"{peaks[1] / layers.result_bytes:.1f}")
        else:
            cells += ["not told by this system", "", "", ""]
        cells += [f"{errors[name]:.0e}" for name in runs]
        print(f"| {layers} | " + " | ".join(cells) + " |", flush=True)


# -- time against size --------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block, seven calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(y)))


def repeated(block: fx.GraphModule, times: int) -> fx.GraphModule:
    """A captured graph, one input and an output of the same shape, `times` times in a row.

    `torch.export` takes minutes for tens of thousands of nodes; copies of one block's nodes take none.
    """
    gm = copy_graph_module(block)
    graph = gm.graph
    (entry,), output = graph.find_nodes(op="placeholder"), graph.output_node()
    first = [node for node in graph.nodes if node.op in ("get_attr", "call_function")]
    value = output.args[0][0]  # type: ignore[index]
    for _ in range(times - 1):
        copies: dict[fx.Node, fx.Node] = {entry: value}
        with graph.inserting_before(output):
            for node in first:
                copies[node] = graph.node_copy(node, copies.__getitem__)
                if node.op == "get_attr":
                    tensor = get_attr_value(gm, str(node.target))
                    name = fresh_attr(gm, f"block{len(graph.nodes)}.{node.target!s}")
                    set_attr(gm, name, tensor.clone(), parameter=isinstance(tensor, nn.Parameter))
                    copies[node].target = name
        value = copies[output.args[0][0]]  # type: ignore[index]
    output.args = ((value,),)
    gm.recompile()
    return gm


def networks(sizes: list[int]) -> Iterator[tuple[str, fx.GraphModule]]:
    """Deep residual networks of about the given numbers of calls, then a chain of Linear layers."""
    torch.manual_seed(0)
    block = gs.capture(Block().eval(), (torch.randn(2, 4, 8, 8),))
    for size in sizes:
        yield "residual blocks", repeated(block, max(1, round(size / 7)))
    linear = gs.capture(nn.Sequential(nn.Linear(16, 16)).eval(), (torch.randn(2, 16),))
    for size in (10, 100, 1000):
        yield "Linear after Linear", repeated(linear, size)


@contextmanager
def timed(
    room: ModuleType, names: tuple[str, ...], clock: Callable[[], float] = time.process_time
) -> Iterator[list[float]]:
    """Sums the seconds that go into some functions of a module, none of which calls another."""
    spent = [0.0]
    kept = {name: vars(room)[name] for name in names}

    def summed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                spent[0] += clock() - start

        return call

    for name, function in kept.items():
        setattr(room, name, summed(function))
    try:
        yield spent
    finally:
        for name, function in kept.items():
            setattr(room, name, function)


class Stopped(BaseException):
    """The time is up; no `Exception`, so that nothing on the way takes it for a failure of its own."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise `Stopped` after so many seconds of the processor."""

    def stop(*_: object) -> None:
        raise Stopped

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def against_size(sizes: list[int], seconds: float) -> None:
    print("| network | calls | folds | total, s | search, s | total, ms a call | search, ms a call |")
    print("|---|---|---|---|---|---|---|")
    for name, gm in networks(sizes):
        gc.collect()  # graphs are cycles; those of the last size would be walked through again and again
        calls = len([node for node in gm.graph.nodes if node.op == "call_function"])
        with timed(write, ("fill", "residual", "emit")) as filling:
            start = time.process_time()
            try:
                with limit(seconds):
                    result = FoldAffine().run(gm)
            except Stopped:
                print(f"| {name} | {calls:,} | stopped after {seconds:.0f} s |||||", flush=True)
                continue
            total, folds = time.process_time() - start, len(result.changes)
        del result
        search = total - filling[0]
        print(
            f"| {name} | {calls:,} | {folds:,} | {total:.2f} | {search:.2f} "
            f"| {1000 * total / calls:.2f} | {1000 * search / calls:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: 3)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[100, 1000, 5000, 20000], help="numbers of calls"
    )
    parser.add_argument(
        "--limit", type=float, default=120, help="stop an analysis after these seconds of the processor"
    )
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        index, name = options.peak
        run = contenders(CASES[int(index)])[name]
        print(peak_growth(run))
        return
    side_by_side(options.rounds)
    print()
    against_size(options.sizes, options.limit)


if __name__ == "__main__":
    main()
