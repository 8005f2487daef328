"""Time of `gs.verify` beside that of the forward passes that it must run, on a torchvision model.

The judgement of a float32 torch module against its ONNX file needs, on every run of the battery: the module
in its own dtype, the module in float64 (the anchor), the module with its data moved by a unit in the last
place (as often as noise is drawn), and the file on onnxruntime. These passes are counted while `verify` runs,
then timed bare: no dispatch mode, no copies, no comparison, in rounds that alternate with those of `verify`.
What else `verify` does (loading the file, moving data, judging) is the rest.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import graphsurgery as gs
from graphsurgery.export import OnnxSession
from graphsurgery.verify import Baseline, Inputs, runners


def warmed(model: nn.Module, size: int) -> nn.Module:
    """Give every batch norm statistics that are its own, as training would."""
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, size, size))
    return model.eval()


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the forward passes of `verify`, by kind."""
    counts: Counter[str] = Counter()
    returned, run = runners._returned, OnnxSession.run

    def torch_pass(module: nn.Module, inputs: Inputs, state: Any = None) -> Any:
        double = state is not None and any(t.dtype == torch.float64 for t in state.values())
        counts["torch float64" if double else "torch native" if state is None else "torch moved"] += 1
        return returned(module, inputs, state)

    def onnx_pass(self: OnnxSession, feeds: Any) -> Any:
        counts["onnxruntime"] += 1
        return run(self, feeds)

    runners._returned, OnnxSession.run = torch_pass, onnx_pass  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        runners._returned, OnnxSession.run = returned, run  # type: ignore[method-assign]


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50", help="a name of torchvision.models")
    parser.add_argument(
        "--size", type=int, default=224, help="height and width of the picture (default: 224)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: 3)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    torch.manual_seed(0)
    picture = torch.randn(1, 3, options.size, options.size)
    model = warmed(torchvision.models.get_model(options.model, weights=None), min(options.size, 96))
    double = copy.deepcopy(model).double()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        gs.optimize(model, picture, verify="off").export_onnx(path, verify=False)
        with counted() as counts:
            verdict = gs.verify(model, path, picture)
        session = OnnxSession(path)
        batches = [batch.inputs.tensors()[0] for batch in Baseline(model, picture).batches]
        passes: dict[str, Callable[[torch.Tensor], object]] = {
            "torch native": model,
            "torch moved": model,
            "torch float64": lambda x: double(x.double()),
            "onnxruntime": lambda x: session.run({session.input_names[0]: x}),
        }
        whole: list[float] = []
        needed: list[dict[str, float]] = []
        with torch.no_grad():
            for _ in range(options.rounds):
                whole.append(seconds(lambda: gs.verify(model, path, picture)))
                needed.append(
                    {
                        kind: sum(seconds(lambda x=x, run=run: run(x)) for x in batches)  # type: ignore[misc]
                        * counts[kind]
                        / len(batches)
                        for kind, run in passes.items()
                    }
                )
    print(f"{options.model} at {options.size}: {verdict.reason}")
    for kind in passes:
        times = statistics.median(part[kind] for part in needed)
        print(f"{kind:15} {counts[kind]:3} passes {times:8.2f} s")
    bare = statistics.median(sum(part.values()) for part in needed)
    ratios = [a / sum(part.values()) for a, part in zip(whole, needed, strict=True)]
    print(f"needed passes   {sum(counts.values()):3}        {bare:8.2f} s")
    print(f"verify                     {statistics.median(whole):8.2f} s")
    spread = f"({min(ratios):.2f} to {max(ratios):.2f} over {options.rounds} rounds)"
    print(f"ratio                      {statistics.median(ratios):8.2f}   {spread}")


if __name__ == "__main__":
    main()
