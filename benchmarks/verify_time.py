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
from graphsurgery.verify import Inputs, runners


def warmed(model: nn.Module, size: int) -> nn.Module:
    """Give every batch norm statistics that are its own, as training would."""
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, size, size))
    return model.eval()


@contextmanager
def counted() -> Iterator[tuple[Counter[str], list[torch.Tensor]]]:
    """Count the forward passes of `verify`, by kind, and keep the inputs of the native ones."""
    counts: Counter[str] = Counter()
    seen: list[torch.Tensor] = []
    returned, run = runners._returned, OnnxSession.run

    def torch_pass(module: nn.Module, inputs: Inputs, state: Any = None) -> Any:
        double = state is not None and any(t.dtype == torch.float64 for t in state.values())
        counts["torch float64" if double else "torch native" if state is None else "torch moved"] += 1
        if state is None:
            seen.append(inputs.tensors()[0])
        return returned(module, inputs, state)

    def onnx_pass(self: OnnxSession, feeds: Any) -> Any:
        counts["onnxruntime"] += 1
        return run(self, feeds)

    runners._returned, OnnxSession.run = torch_pass, onnx_pass  # type: ignore[method-assign]
    try:
        yield counts, seen
    finally:
        runners._returned, OnnxSession.run = returned, run  # type: ignore[method-assign]


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Wall time of a run, and processor time of all its threads, which other work leaves nearly alone."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


def total(times: list[tuple[float, float]], share: float = 1.0) -> tuple[float, float]:
    return share * sum(wall for wall, _ in times), share * sum(processor for _, processor in times)


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
        session = OnnxSession(path)
        passes: dict[str, Callable[[torch.Tensor], object]] = {
            "torch native": model,
            "torch moved": model,
            "torch float64": lambda x: double(x.double()),
            "onnxruntime": lambda x: session.run({session.input_names[0]: x}),
        }
        rounds: list[tuple[tuple[float, float], dict[str, tuple[float, float]]]] = []
        verdicts: list[gs.Verdict] = []
        with torch.no_grad():
            for _ in range(options.rounds):
                with counted() as (counts, batches):
                    whole = seconds(lambda: verdicts.append(gs.verify(model, path, picture)))
                needed = {}
                for kind, run in passes.items():
                    times = [seconds(lambda x=x, run=run: run(x)) for x in batches]  # type: ignore[misc]
                    needed[kind] = total(times, counts[kind] / len(batches))
                rounds.append((whole, needed))
    print(f"{options.model} at {options.size}: {verdicts[-1].reason}")
    for kind in passes:
        wall, processor = (statistics.median(part[kind][i] for _, part in rounds) for i in (0, 1))
        print(f"{kind:15} {counts[kind]:3} passes {wall:8.2f} s {processor:8.2f} s of processor")
    bare = [total(list(part.values())) for _, part in rounds]
    for name, each in (("needed passes", bare), ("verify", [whole for whole, _ in rounds])):
        wall, processor = (statistics.median(times[i] for times in each) for i in (0, 1))
        print(f"{name:15} {'':10} {wall:8.2f} s {processor:8.2f} s of processor")
    for i, kind in ((0, "wall time"), (1, "processor time")):
        ratios = [whole[i] / times[i] for (whole, _), times in zip(rounds, bare, strict=True)]
        spread = f"({min(ratios):.2f} to {max(ratios):.2f} over {options.rounds} rounds)"
        print(f"ratio of {kind:14} {statistics.median(ratios):8.2f} {spread}")


if __name__ == "__main__":
    main()
