"""Time of a verified fold of torchvision's resnet50 beside that of its ONNX export, in one process.

Left: capture, passes, restore and the verification in torch. Right: `torch.onnx.export(dynamo=True)` of the
same model, which anyone who deploys it pays anyway. Both are run alternately, each first once to warm up
what torch does once per process; the medians and their ratio are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torchvision.models import resnet50

import graphsurgery as gs


def warmed(model: nn.Module, picture: torch.Tensor) -> nn.Module:
    """Give every batch norm statistics that are its own, as training would."""
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn_like(picture.expand(4, -1, -1, -1)))
    return model.eval()


def seconds(run: Callable[[], dict[str, float]]) -> tuple[float, dict[str, float]]:
    """Wall time of one run, its prints swallowed, and what the run says of its own stages."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stages = run()
    return time.perf_counter() - start, stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: 3)")
    parser.add_argument(
        "--size", type=int, default=224, help="height and width of the picture (default: 224)"
    )
    options = parser.parse_args()

    torch.manual_seed(0)
    picture = torch.randn(1, 3, options.size, options.size)
    model = warmed(resnet50(), picture)
    batch = torch.export.Dim.DYNAMIC
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet50.onnx"

        def fold() -> dict[str, float]:
            return gs.optimize(model, (picture,)).report.seconds

        def export() -> dict[str, float]:
            pair = (picture.expand(2, -1, -1, -1),)
            torch.onnx.export(model, pair, path, dynamo=True, dynamic_shapes=({0: batch},))
            return {}

        runs = {"graphsurgery.optimize": fold, "torch.onnx.export": export}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(options.rounds + 1):
            for name, run in runs.items():
                taken, stages = seconds(run)
                label = "warm-up" if turn == 0 else f"round {turn}"
                parts = ", ".join(f"{stage} {part:.2f}" for stage, part in stages.items())
                print(f"{label:9s} {name:22s} {taken:6.2f} s  {parts}", flush=True)
                if turn:
                    times[name].append(taken)

    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"median    {name:22s} {median:6.2f} s")
    print(f"ratio     {medians['graphsurgery.optimize'] / medians['torch.onnx.export']:.2f}")


if __name__ == "__main__":
    main()
