"""One module that holds a 1x1 convolution and a Linear of the same parameters: exchanged, and split.

1. Each becomes the other and both become themselves again; on (4, 20, 2, 2) all of them are equal.
2. A QR decomposition splits the 20 features of the 5 classes. With the constant that the bias stands beside
   they have 21 dimensions: 5 of them reach the logits, 16 cannot.

Ends with an error when a check fails.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphsurgery as gs

CHANNELS, CLASSES = 20, 5
LIMIT = 1e-12  # relative, in float64


class TwoHeads(nn.Module):
    """A 1x1 convolution and a Linear of the same parameters, for maps (n, 20, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CLASSES, 1)
        self.fc = nn.Linear(CHANNELS, CLASSES)
        with torch.no_grad():
            self.fc.weight.copy_(self.conv.weight.flatten(1))
            self.fc.bias.copy_(self.conv.bias)

    def forward(self, maps: Tensor) -> dict[str, Tensor]:
        """Return the scores of each pixel twice: as maps (n, 5, h, w) and as rows (n h w, 5)."""
        return {"pixels": self.conv(maps), "rows": self.fc(maps.permute(0, 2, 3, 1).flatten(0, 2))}


def kinds(model: nn.Module) -> dict[str, str]:
    """The kind of layer at each of the two paths."""
    return {path: type(model.get_submodule(path)).__name__ for path in ("conv", "fc")}


@torch.no_grad()
def difference(a: nn.Module, b: nn.Module, maps: Tensor) -> float:
    """Largest difference of two networks in float64, relative to the largest value."""
    first, second = (copy.deepcopy(model).double()(maps.double()) for model in (a, b))
    return max(float((first[key] - second[key]).abs().max() / first[key].abs().max()) for key in first)


def swapped(model: TwoHeads, maps: Tensor, console: Console) -> dict[str, bool]:
    """Exchange the Linear, the convolution, and each of them back again."""
    rows = model(maps)["pixels"].permute(0, 2, 3, 1).flatten(0, 2)
    apart = float((rows - model(maps)["rows"]).detach().abs().max())
    checks = {f"before: convolution and Linear are equal on {tuple(maps.shape)}": apart <= 1e-6}
    table = Table(title="Exchanged", title_justify="left")
    for heading in ("passes", "conv is a", "fc is a", "difference in float64"):
        table.add_column(heading)
    table.add_row("none", *kinds(model).values(), "")
    ways = (
        (gs.passes.LinearToConv1x1(), gs.passes.Conv1x1ToLinear(only=("fc",))),
        (gs.passes.Conv1x1ToLinear(), gs.passes.LinearToConv1x1(only=("conv",))),
    )
    for there, back in ways:
        first = gs.optimize(model, maps, passes=[there])
        second = gs.optimize(first.module, maps, passes=[back])
        for result, name in ((first, there.name), (second, f"{there.name}, {back.name}")):
            off = difference(model, result.module, maps)
            table.add_row(name, *kinds(result.module).values(), f"{off:.0e}")
            checks[f"{name}: verified, equal to {off:.0e} in float64"] = (
                result.report.verification is not None and result.report.verification.ok and off <= LIMIT
            )
        linear = {kind == "Linear" for kind in kinds(first.module).values()}
        checks[f"{there.name}: both layers are of one kind"] = linear == {there.name == "conv1x1-to-linear"}
        weights = second.module.state_dict()
        same = all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        checks[f"{there.name} and back: the first layers, their weights bit for bit"] = same and kinds(
            second.module
        ) == kinds(model)
    console.print(table)
    return checks


def residual_changes_nothing(split: gs.SplitHeadResult, model: TwoHeads) -> float:
    """Move features far along the residual directions that leave the constant alone; how far logits move."""
    residual = split.subspace.Q[:, split.subspace.rank :]
    # The last row is what a residual direction adds to the constant, which has to stay 1.
    free = torch.linalg.svd(residual[-1:]).Vh[1:]
    directions = (residual @ free.T)[:-1].T
    head = nn.Linear(CHANNELS, CLASSES, dtype=torch.float64)
    head.load_state_dict(model.fc.state_dict())
    features = torch.randn(8, CHANNELS, dtype=torch.float64)
    moved = features + 100 * torch.randn(8, len(directions), dtype=torch.float64) @ directions
    return float((head(moved) - head(features)).detach().abs().max())


def split_both(model: TwoHeads, maps: Tensor, out: Path, console: Console) -> dict[str, bool]:
    """Split each head, write both networks as ONNX files, and hold the parts against each other."""
    with torch.no_grad():
        wanted = model(maps)
    checks: dict[str, bool] = {}
    subspaces = []
    table = Table(title="Split", title_justify="left")
    for heading in ("head", "output", "shape", "squared norm"):
        table.add_column(heading, justify="right" if heading == "squared norm" else "left")
    for head, own in (("fc", "rows"), ("conv", "pixels")):
        split = gs.split_head(model, maps, head=head)
        file = out / f"{head}.onnx"
        split.export_onnx(file)
        with torch.no_grad():
            found = split.module(maps)
        for name, value in found.items():
            table.add_row(head, name, str(tuple(value.shape)), f"{float(value.double().square().sum()):.4f}")
        table.add_section()
        subspaces.append(split.subspace)

        sizes = (found["class_features"].shape[1], found["residual_features"].shape[1])
        checks[f"{head}: 21 dimensions in 5 class-specific and 16 residual ones"] = sizes == (5, 16)
        same = all(torch.equal(found[name], value) for name, value in wanted.items())
        checks[f"{head}: the logits are the original's, bit for bit"] = same and torch.equal(
            found["logits"], wanted[own]
        )
        identity = torch.eye(CHANNELS + 1, dtype=torch.float64)
        off = float((split.subspace.Q.T @ split.subspace.Q - identity).abs().max())
        checks[f"{head}: Q is orthonormal to {off:.0e}"] = off <= LIMIT
        features = split.subspace.features_of(maps).double()
        norm = float(features.square().sum()) + features.numel() / CHANNELS  # and the constants
        parts = sum(
            float(found[part].double().square().sum()) for part in ("class_features", "residual_features")
        )
        checks[f"{head}: the norms of the parts add up"] = abs(parts - norm) <= 1e-5 * norm
        moved = residual_changes_nothing(split, model)
        checks[f"{head}: residual features moved by hundreds move the logits by {moved:.0e}"] = moved <= 1e-11
        verdict = None if split.report.onnx is None else split.report.onnx.verdict
        checks[f"{head}: {file.name} on onnxruntime gives the same"] = verdict is not None and verdict.ok
    same_turn = torch.equal(subspaces[0].Q, subspaces[1].Q) and torch.equal(subspaces[0].R, subspaces[1].R)
    checks["the same parameters give the same Q and R"] = same_turn
    console.print(table)
    return checks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/two_heads"), help="where the ONNX files go")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    console = Console()

    torch.manual_seed(0)
    model = TwoHeads().eval()
    maps = torch.randn(4, CHANNELS, 2, 2)
    checks = swapped(model, maps, console) | split_both(model, maps, out, console)
    for text, right in checks.items():
        console.print(f"{'[green]ok[/]   ' if right else '[bold red]WRONG[/]'} {text}", highlight=False)
    console.print("all checks hold" if all(checks.values()) else "[bold red]a check failed", highlight=False)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
