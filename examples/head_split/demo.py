"""Split the 20 -> 5 head of a network by a QR decomposition, as a Linear and as a 1x1 convolution.

One module holds both, with the same parameters. The features with the constant appended have 21 dimensions:
5 of them reach the logits, 16 cannot. Ends with an error when a check fails.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphsurgery as gs

CHANNELS, CLASSES = 20, 5


class TwoHeads(nn.Module):
    """A 1x1 convolution and a Linear of the same parameters, on maps (n, 20, h, w) and on their means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CLASSES, 1)
        self.fc = nn.Linear(CHANNELS, CLASSES)
        with torch.no_grad():
            self.fc.weight.copy_(self.conv.weight.flatten(1))
            self.fc.bias.copy_(self.conv.bias)

    def forward(self, maps: Tensor) -> dict[str, Tensor]:
        """Return scores per pixel (n, 5, h, w) and of the whole (n, 5)."""
        return {"pixels": self.conv(maps), "whole": self.fc(maps.mean((2, 3)))}


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/head_split"), help="where the ONNX files go")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    console = Console()

    torch.manual_seed(0)
    model = TwoHeads().eval()
    maps = torch.randn(4, CHANNELS, 2, 2)
    with torch.no_grad():
        wanted = model(maps)

    checks: dict[str, bool] = {}
    subspaces = []
    table = Table(title="The two heads, split", title_justify="left")
    for heading in ("head", "output", "shape", "squared norm"):
        table.add_column(heading, justify="right" if heading == "squared norm" else "left")
    for head, own in (("fc", "whole"), ("conv", "pixels")):
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
        checks[f"{head}: Q is orthonormal to {off:.0e}"] = off <= 1e-12
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
    for text, right in checks.items():
        console.print(f"{'[green]ok[/]   ' if right else '[bold red]WRONG[/]'} {text}", highlight=False)
    console.print("all checks hold" if all(checks.values()) else "[bold red]a check failed", highlight=False)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
