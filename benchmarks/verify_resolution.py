"""The smallest error of one coefficient that each comparison of `gs.verify` sees, on four networks.

Coefficients of weights are drawn at random (seeded) and put off by a relative error, one at a time. Printed
is the share that is found different: by torch against torch in float32 alone, by torch against torch with
both cast to float64 too, and by torch against an ONNX file on onnxruntime. `resolution` is the report's own
figure: the smallest error of an output that the comparison can see, as a share of a channel's largest value
(median over the channels and cases).
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
import torchvision
from onnx import numpy_helper
from torch import nn
from torchvision.models.vision_transformer import EncoderBlock

import graphsurgery as gs
from graphsurgery.verify import Baseline

ERRORS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
COARSE = (1.0, 1e-1, 1e-2, 1e-3)
"""For models in float16 and bfloat16."""


def convolutions() -> tuple[nn.Module, torch.Tensor]:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, 10)), torch.randn(2, 3, 8, 8)


def weights_of_one() -> tuple[nn.Module, torch.Tensor]:
    layers: list[nn.Module] = []
    for _ in range(6):
        conv = nn.Conv1d(8, 8, 5, padding=2)
        nn.init.ones_(conv.weight)
        layers += [conv, nn.ELU()]
    return nn.Sequential(*layers), 10 * torch.randn(2, 8, 48)


def block() -> tuple[nn.Module, torch.Tensor]:
    return EncoderBlock(4, 64, 128, 0.0, 0.0), torch.randn(2, 17, 64)


def resnet18() -> tuple[nn.Module, torch.Tensor]:
    return torchvision.models.resnet18(weights=None), torch.randn(1, 3, 64, 64)


NETWORKS = {
    "4 conv + norm, linear": convolutions,
    "6 conv of ones, ELU": weights_of_one,
    "transformer block": block,
    "resnet18 at 64": resnet18,
}


def warmed(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Give every batch norm statistics that are its own."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, *x.shape[1:]))
    return model.eval()


Row = tuple[str, list[str], str]


def of_torch(model: nn.Module, baseline: Baseline, draws: int, errors: tuple[float, ...]) -> list[Row]:
    """Share found by torch against torch: in the model's own dtype, and with float64."""
    weights = [name for name, p in model.named_parameters() if p.ndim > 1]
    rng = np.random.default_rng(0)
    chosen = [(weights[rng.integers(len(weights))], float(rng.random())) for _ in range(draws)]
    native, double = [], []
    for error in errors:
        found = [0, 0]
        for name, where in chosen:
            wrong = copy.deepcopy(model)
            with torch.no_grad():
                flat = wrong.get_parameter(name).view(-1)
                flat[int(where * len(flat))] *= 1 + error
            output = baseline.compare(wrong).outputs[0]
            alone = output.native is not None and not output.native.ok
            found[0] += alone
            found[1] += not output.ok
        native.append(f"{found[0] / draws:.0%}")
        double.append(f"{found[1] / draws:.0%}")
    own = baseline.compare(model).outputs[0]
    low = f"{own.native.resolution:.0e}" if own.native else "-"
    high = f"{own.float64.resolution:.0e}" if own.float64 else "-"
    own_dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return [(f"torch, {own_dtype} alone", native, low), ("torch, with float64", double, high)]


def of_onnx(model: nn.Module, x: torch.Tensor, baseline: Baseline, draws: int) -> Row:
    """Share found by torch against the file on onnxruntime."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        gs.optimize(model, x, passes=[], verify="off").export_onnx(path, verify=False)
        graph = onnx.load(path)
        tensors = [t for t in graph.graph.initializer if t.data_type == 1 and len(t.dims) > 1]
        rng = np.random.default_rng(1)
        chosen = [(int(rng.integers(len(tensors))), float(rng.random())) for _ in range(draws)]
        shares = []
        for error in ERRORS:
            found = 0
            for index, where in chosen:
                kept = tensors[index].SerializeToString()
                array = numpy_helper.to_array(tensors[index]).copy()
                array.reshape(-1)[int(where * array.size)] *= np.float32(1 + error)
                tensors[index].CopyFrom(numpy_helper.from_array(array, tensors[index].name))
                bad = Path(folder) / "bad.onnx"
                onnx.save(graph, bad)
                found += not baseline.compare(bad).ok
                tensors[index].ParseFromString(kept)
            shares.append(f"{found / draws:.0%}")
        own = baseline.compare(path).outputs[0]
    return "onnxruntime", shares, f"{own.native.resolution:.0e}" if own.native else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=40, help="coefficients per network (default: 40)")
    parser.add_argument("--low", action="store_true", help="the networks in float16 and bfloat16")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    errors = COARSE if given.low else ERRORS
    print("| network | comparison | " + " | ".join(f"{error:.0e}" for error in errors) + " | resolution |")
    print("|---" * (len(errors) + 3) + "|")
    for name, make in NETWORKS.items():
        for dtype in (torch.float16, torch.bfloat16) if given.low else (torch.float32,):
            torch.manual_seed(0)
            model, x = make()
            model, x = warmed(model, x).to(dtype), x.to(dtype)
            baseline = Baseline(model, x)
            rows = of_torch(model, baseline, given.draws, errors)
            rows += [] if given.low else [of_onnx(model, x, baseline, given.draws)]
            for kind, shares, resolution in rows:
                print(f"| {name} | {kind} | " + " | ".join(shares) + f" | {resolution} |", flush=True)


if __name__ == "__main__":
    main()
