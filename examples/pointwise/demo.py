"""A 1x1 convolution is a Linear on every pixel: by numpy, for single layers, and for a whole network.

1. On a 1 x 1 map a convolution is a Linear, and both are y = W x + b.
2. Pointwise convolutions 64 -> 128 and 256 -> 64 on 32 x 32: y[n, f, h, w] = b[f] + sum over c of
   W[f, c] x[n, c, h, w], in numpy, in torch, and as the Linears that the library makes of them.
3. A Network in Network for CIFAR-10 with its six 1x1 convolutions turned to Linears, and back.

Ends with an error when a check fails.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphsurgery as gs

LIMIT = 1e-12  # relative, in float64
Array = NDArray[np.float64]


def network_in_network() -> nn.Sequential:
    """Lin, Chen and Yan, "Network In Network", 2014, for CIFAR-10: (n, 3, 32, 32) to logits (n, 10)."""

    def part(channels: tuple[int, int, int, int], kernel: int) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for i in range(3):
            size = kernel if i == 0 else 1
            layers += [nn.Conv2d(channels[i], channels[i + 1], size, padding=size // 2), nn.ReLU()]
        return layers

    first = [*part((3, 192, 160, 96), 5), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Dropout()]
    second = [*part((96, 192, 192, 192), 5), nn.AvgPool2d(3, 2, ceil_mode=True), nn.Dropout()]
    third = [*part((192, 192, 192, 10), 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*first, *second, *third).eval()


def formula(conv: nn.Conv2d, x: Tensor) -> Array:
    """The 1x1 convolution in numpy: (n, c, h, w) to (n, f, h, w)."""
    weight, bias = (value.detach().numpy() for value in (conv.weight, conv.bias))
    return np.einsum("fc,nchw->nfhw", weight[:, :, 0, 0], x.numpy()) + bias[:, None, None]


def off(found: Array | Tensor, right: Array) -> float:
    """Largest difference relative to the largest value."""
    return float(np.abs(np.asarray(found) - right).max() / np.abs(right).max())


@torch.no_grad()
def single_layers(console: Console) -> dict[str, bool]:
    """Pointwise convolutions in float64, beside numpy, a Linear by hand, and the library's Linear."""
    table = Table(title="Single layers, in float64, beside numpy's W x + b", title_justify="left")
    for heading in ("conv", "on", "in torch", "Linear", "conv1x1-to-linear", "it reads"):
        table.add_column(heading)
    checks = {}
    for inputs, outputs, size in ((64, 128, 1), (64, 128, 32), (256, 64, 32)):
        conv = nn.Conv2d(inputs, outputs, 1).double().eval()
        x = torch.randn(4, inputs, size, size, dtype=torch.float64)
        right = formula(conv, x)
        linear = nn.Linear(inputs, outputs).double()
        linear.load_state_dict({"weight": conv.weight[:, :, 0, 0], "bias": conv.bias})
        by_hand = linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        result = gs.optimize(nn.Sequential(conv), x, passes=["conv1x1-to-linear"])
        errors = (off(conv(x), right), off(by_hand, right), off(result.module(x), right))
        permutes = sum(
            node.target is torch.ops.aten.permute.default for node in result.graph_module.graph.nodes
        )
        reads = "(n, c)" if size == 1 else "(n, h, w, c)"
        name, where = f"{inputs} -> {outputs}", f"{size} x {size}"
        table.add_row(name, where, *(f"{error:.0e}" for error in errors), reads)
        layers = [type(layer).__name__ for layer in result.module.modules()]
        checks[f"{name} on {where}: convolution, Linear and numpy are equal"] = max(errors) <= LIMIT
        checks[f"{name} on {where}: the library's is a Linear, with {permutes} permutes"] = (
            "Linear" in layers and "Conv2d" not in layers and permutes == (0 if size == 1 else 2)
        )
    console.print(table)
    return checks


def calls(gm: torch.fx.GraphModule) -> Counter[str]:
    """How often each kind of call occurs."""
    names = (str(node.target) for node in gm.graph.nodes if node.op == "call_function")
    return Counter(name.removeprefix("aten.").split(".")[0] for name in names)


def onnx_layers(path: Path) -> Counter[str]:
    """Convolutions by the size of their kernel, products and transposes of an ONNX file."""
    graph = onnx.load(path).graph
    shapes = {value.name: tuple(value.dims) for value in graph.initializer}
    found: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type == "Conv":
            kernel = shapes[node.input[1]][2:]
            found["1x1 Conv" if set(kernel) == {1} else "k x k Conv"] += 1
        elif node.op_type in ("Gemm", "MatMul"):
            found["product"] += 1
        elif node.op_type == "Transpose":
            found["Transpose"] += 1
    return found


def whole_network(out: Path, console: Console) -> dict[str, bool]:
    """The Network in Network, its Linears, and the way back; both results as ONNX files on onnxruntime."""
    model, x = network_in_network(), torch.randn(2, 3, 32, 32)
    there = gs.optimize(model, x, passes=["conv1x1-to-linear"])
    back = gs.optimize(there.module, x, passes=["linear-to-conv1x1"], verify="off")  # its file is verified
    kinds = ("k x k Conv", "1x1 Conv", "product", "Transpose")
    table = Table(title="Network in Network, the ONNX files", title_justify="left")
    for heading in ("after", *kinds, "verdict"):
        table.add_column(heading, justify="right" if heading in kinds else "left")
    layers, verified = {}, {}
    for (name, result), stem in zip(
        {"conv1x1-to-linear": there, "linear-to-conv1x1": back}.items(), ("linear", "back"), strict=True
    ):
        done = result.export_onnx(out / f"{stem}.onnx")
        verified[name] = done.verdict is not None and done.verdict.ok
        layers[name] = onnx_layers(out / f"{stem}.onnx")
        counts = (str(layers[name][kind]) for kind in kinds)
        table.add_row(name, *counts, "equal" if verified[name] else "DIFFERS")
    console.print(table)
    found = [counted["1x1 Conv"] for counted in layers.values()]
    weights, again = model.state_dict(), back.module.state_dict()
    swapped = layers["conv1x1-to-linear"]
    return {
        "network: the same on onnxruntime, there and back": all(verified.values()),
        "network: no 1x1 convolution left but six products, then six again": (
            found == [0, 6] and swapped["product"] == 6
        ),
        "network: two permutes for each of its three stretches at most": swapped["Transpose"] <= 6,
        "network: back, the same calls as at first": calls(back.graph_module) == calls(gs.capture(model, x)),
        "network: back, the same weights bit for bit": (
            weights.keys() == again.keys()
            and all(torch.equal(value, again[name]) for name, value in weights.items())
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/pointwise"), help="where the ONNX files go")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    console = Console()

    torch.manual_seed(0)
    checks = single_layers(console) | whole_network(out, console)
    for text, right in checks.items():
        console.print(f"{'[green]ok[/]   ' if right else '[bold red]WRONG[/]'} {text}", highlight=False)
    console.print("all checks hold" if all(checks.values()) else "[bold red]a check failed", highlight=False)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
