"""What permutes take on onnxruntime beside what `graphsurgery.cost.copied` counts, in rounds that alternate.

Both are in elements: the time of a value is divided by that of the first case, a permute of long rows, per
element. The last two lines are one rearrangement, by two permutes that copy rows or transpose matrices and by
one that copies elements.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from math import prod

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from graphsurgery.cost import copied

Permutes = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Sizes and order of permutes that run one after another."""

CASES: dict[str, Permutes] = {
    "rows of 64": [((8, 64, 96, 64), (0, 2, 1, 3))],
    "rows of 32": [((8, 64, 96, 32), (0, 2, 1, 3))],
    "rows of 16": [((8, 64, 96, 16), (0, 2, 1, 3))],
    "rows of 8": [((8, 64, 96, 8), (0, 2, 1, 3))],
    "rows of 4": [((8, 64, 96, 4), (0, 2, 1, 3))],
    "channels to the end": [((8, 64, 28, 28), (0, 2, 3, 1))],
    "channels to the front": [((8, 28, 28, 64), (0, 3, 1, 2))],
    "two blocks of axes change places": [((8, 16, 4, 28, 28), (0, 3, 4, 1, 2))],
    "axes in reverse": [((8, 28, 28, 64), (0, 3, 2, 1))],
    "blocks to a map, two permutes": [
        ((8, 4, 4, 4, 4, 96), (0, 1, 3, 2, 4, 5)),
        ((8, 16, 16, 96), (0, 3, 1, 2)),
    ],
    "blocks to a map, one permute": [((8, 4, 4, 4, 4, 96), (0, 5, 1, 3, 2, 4))],
}


def session(permutes: Permutes) -> ort.InferenceSession:
    """Permutes with a view between them, on one thread."""
    nodes, sizes, value = [], [], "x"
    for i, (shape, order) in enumerate(permutes):
        if i:
            sizes.append(helper.make_tensor(f"sizes{i}", TensorProto.INT64, [len(shape)], shape))
            nodes.append(helper.make_node("Reshape", [value, f"sizes{i}"], [f"view{i}"]))
            value = f"view{i}"
        nodes.append(helper.make_node("Transpose", [value], [f"y{i}"], perm=order))
        value = f"y{i}"
    graph = helper.make_graph(
        nodes,
        "permutes",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, permutes[0][0])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, None)],
        sizes,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    rounds = parser.parse_args().rounds
    cases = {name: (session(permutes), permutes) for name, permutes in CASES.items()}
    data = {name: np.random.rand(*permutes[0][0]).astype(np.float32) for name, permutes in CASES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(rounds + 1):
        for name, (run, _) in cases.items():
            start = time.perf_counter()
            run.run(None, {"x": data[name]})
            seconds[name].append(time.perf_counter() - start)
    each = {name: statistics.median(times[1:]) / data[name].size for name, times in seconds.items()}
    table = Table(title=f"Permutes on onnxruntime {ort.__version__}, one thread, median of {rounds} rounds")
    for column in ("permute", "ns per element", "of the first", "counted"):
        table.add_column(column, justify="left" if column == "permute" else "right")
    least = next(iter(each.values()))
    for name, taken in each.items():
        counted = sum(copied(prod(shape), order, shape) for shape, order in CASES[name]) / data[name].size
        table.add_row(name, f"{taken * 1e9:.2f}", f"{taken / least:.1f}", f"{counted:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
