"""A strided convolution and a Linear behind it as one Linear: by a recipe, by the library, in a network.

1. Conv2d(5 -> 50, 5x5, stride 2), flattened into Linear(1250 -> 100), on 13 x 13: one Linear(845 -> 100).
   The recipe of the forums feeds all 845 unit vectors; the library does it from the weights.
2. The same in its network, conv1 - ReLU - conv2 - flatten - fc1 - ReLU - fc2 on 1 x 28 x 28, through ONNX.
3. With 4 channels in place of 50 one layer would cost more, and is refused.

Ends with an error when a check fails.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphsurgery as gs

CLASSES = 10


class Network(nn.Module):
    """The network that the pair is part of, for pictures (n, 1, 28, 28)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 5, 5, stride=2, padding=1)
        self.conv2 = nn.Conv2d(5, 50, 5, stride=2)
        self.fc1 = nn.Linear(1250, 100)
        self.fc2 = nn.Linear(100, CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return logits (n, 10)."""
        maps = torch.relu(self.conv1(pictures))
        return self.fc2(torch.relu(self.fc1(self.conv2(maps).flatten(1))))


def pair(inputs: int, size: int, channels: int) -> nn.Sequential:
    """Convolution and Linear for maps (n, inputs, size, size)."""
    positions = ((size - 5) // 2 + 1) ** 2
    conv = nn.Conv2d(inputs, channels, 5, stride=2)
    return nn.Sequential(conv, nn.Flatten(), nn.Linear(channels * positions, 100)).eval()


@torch.no_grad()
def recipe(model: nn.Module, shape: tuple[int, ...]) -> nn.Sequential:
    """The recipe: what the model makes of zeros is the bias, of unit vectors the columns of the weight."""
    dtype = next(model.parameters()).dtype
    units = torch.eye(math.prod(shape), dtype=dtype).reshape(-1, *shape)
    bias = model(torch.zeros_like(units[:1]))
    weight = (model(units) - bias).T
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=dtype)
    linear.weight.copy_(weight)
    linear.bias.copy_(bias[0])
    return nn.Sequential(nn.Flatten(), linear).eval()


@torch.no_grad()
def milliseconds(model: nn.Module, x: Tensor, repeats: int = 30) -> float:
    """Least time of a call, after two that do not count."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        model(x)
        times.append(time.perf_counter() - start)
    return 1000 * min(times[2:])


def parameters(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


def weight_of(model: nn.Module) -> Tensor:
    """The weight of the one Linear that is left."""
    (linear,) = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    return linear.weight.detach().double()


def collapsed(inputs: int, size: int, console: Console) -> dict[str, bool]:
    """The pair by itself: the recipe beside the library."""
    model, shape = pair(inputs, size, 50), (inputs, size, size)
    x = torch.randn(16, *shape)
    start = time.perf_counter()
    by_recipe = recipe(model, shape)
    seconds = time.perf_counter() - start
    result = gs.optimize(model, x)
    fold_seconds = result.report.seconds["pass:fold-affine"]
    exact = weight_of(recipe(copy.deepcopy(model).double(), shape))

    name = f"conv({inputs} -> 50, 5x5, stride 2) + fc(-> 100) on {size} x {size}"
    table = Table(title=name, title_justify="left")
    for heading in ("", "parameters", "ms for 16", "made in s", "weights off by", "verdict"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("as it was", f"{parameters(model):,}", f"{milliseconds(model, x):.3f}")
    rows = (("recipe", by_recipe, seconds), ("fold-affine", result.module, fold_seconds))
    off, verdicts = {}, {}
    for how, network, made in rows:
        off[how] = float((weight_of(network) - exact).abs().max() / exact.abs().max())
        verdicts[how] = gs.verify(model, network, x)
        figures = (f"{parameters(network):,}", f"{milliseconds(network, x):.3f}", f"{made:.3f}")
        table.add_row(how, *figures, f"{off[how]:.0e}", "equal" if verdicts[how].ok else "differs")
    console.print(table)
    (change,) = result.report.changes
    macs = (result.report.before.macs, result.report.after.macs)
    print(f"multiplications {macs[0]:,} -> {macs[1]:,}; certificate {change.residual:.0e}; {change.detail}")
    if not verdicts["recipe"].ok:
        print(f"the recipe, in float32: {verdicts['recipe'].reason}")
        print(
            "(it takes a weight as the difference of two rounded numbers, which are larger than most weights)"
        )
    short = f"{inputs} x {size} x {size}"
    return {
        f"{short}: recipe and fold are one Linear of {math.prod(shape)} x 100": (
            parameters(result.module) == parameters(by_recipe) == (math.prod(shape) + 1) * 100
        ),
        f"{short}: the fold is the same function": verdicts["fold-affine"].ok,
        f"{short}: its weights are as right as float32 can be": off["fold-affine"] <= 2**-24,
        f"{short}: fewer multiplications": macs[1] < macs[0],
    }


def in_its_network(file: Path, console: Console) -> dict[str, bool]:
    """The pair between two activations, and the ONNX files of both networks."""
    model = Network().eval()
    result = gs.optimize(model, torch.randn(4, 1, 28, 28))
    verdict = result.export_onnx(file, measure=True).verdict
    before, after = result.report.before, result.report.after
    table = Table(title="Inside its network, on 1 x 28 x 28", title_justify="left")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, values in {
        "parameters": (before.parameters, after.parameters),
        "multiplications": (before.macs, after.macs),
        "nodes": (before.nodes, after.nodes),
        "ONNX file, bytes": (before.size_bytes, after.size_bytes),
    }.items():
        table.add_row(name, *("" if value is None else f"{value:,}" for value in values))
    times = ("" if ms is None else f"{ms:.4f}" for ms in (before.latency_ms, after.latency_ms))
    table.add_row("onnxruntime, ms", *times)
    console.print(table)
    layers = [str(layer) for layer in result.module.children()]
    for layer in layers:
        print(f"  {layer}")
    return {
        "network: conv2 and fc1 are one Linear(845 -> 100), the rest is left": (
            len(layers) == 3
            and layers[1] == str(nn.Linear(845, 100))
            and parameters(model) > after.parameters
        ),
        "network: verified in torch": result.report.verification is not None
        and result.report.verification.ok,
        f"network: {file.name} on onnxruntime gives the same": verdict is not None and verdict.ok,
    }


def refused() -> dict[str, bool]:
    """The pair with 4 channels: one layer is possible and costs more."""
    model = pair(5, 13, 4)
    report = gs.optimize(model, torch.randn(2, 5, 13, 13)).report
    apart, together = 25 * 4 * 5 * 25 + 100 * 100, 845 * 100  # convolution and Linear, and one Linear
    for refusal in report.refusals:
        print(f"with 4 channels: {refusal.code}: {refusal.reason}")
    right = [
        refusal.code == "costs-more"
        and f"{apart:,} MACs" in refusal.reason
        and f"{together:,} MACs" in refusal.reason
        for refusal in report.refusals
    ]
    text = f"4 channels: refused, as {together:,} multiplications are more than {apart:,}"
    return {text: right == [True] and not report.changes and report.after.macs == apart}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/collapse"), help="where the ONNX file goes")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    console = Console()

    torch.manual_seed(0)
    checks = collapsed(5, 13, console)
    checks |= collapsed(12, 20, console)  # the recipe's time and memory grow with the square of the inputs
    checks |= in_its_network(out / "network.onnx", console)
    checks |= refused()
    for text, right in checks.items():
        console.print(f"{'[green]ok[/]   ' if right else '[bold red]WRONG[/]'} {text}", highlight=False)
    console.print("all checks hold" if all(checks.values()) else "[bold red]a check failed", highlight=False)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
