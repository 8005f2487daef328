"""Fold the trained digits network, export it, and hold it against the original on the 500 test pictures.

Shows the accuracy in torch before, in torch after and in onnxruntime after, what was folded, what was refused
and why. Ends with an error when any of the three disagree.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import onnxruntime
import torch
from data import load_split
from network import trained
from rich.console import Console
from rich.table import Table
from torch import Tensor

import graphsurgery as gs
from graphsurgery.report.text import render


@torch.no_grad()
def torch_logits(model: torch.nn.Module, pictures: Tensor) -> Tensor:
    """Logits (n, 10) of pictures (n, 1, 8, 8)."""
    return model(pictures)


def onnx_logits(path: Path, pictures: Tensor) -> Tensor:
    """The same from an ONNX file in onnxruntime, the batch as it comes."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    (logits,) = session.run(None, {name: pictures.numpy()})
    return torch.from_numpy(logits)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/digits.onnx"), help="where the ONNX file goes")
    out: Path = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    console = Console()

    _, (pictures, labels) = load_split()
    model = trained()
    start = time.perf_counter()
    result = gs.optimize(model, pictures[:4])
    folded = time.perf_counter()
    result.export_onnx(out, measure=True)
    exported = time.perf_counter()

    logits = {
        "torch, before": torch_logits(model, pictures),
        "torch, after": torch_logits(result.module, pictures),
        "onnxruntime, after": onnx_logits(out, pictures),
    }
    console.print(render(result.report))
    table = Table(title=f"The {len(labels)} test pictures")
    for heading in ("run by", "accuracy", "same answers", "largest difference of a logit"):
        table.add_column(heading, justify="left" if heading == "run by" else "right")
    before = logits["torch, before"]
    for name, values in logits.items():
        right = int((values.argmax(1) == labels).sum())
        same = int((values.argmax(1) == before.argmax(1)).sum())
        table.add_row(
            name, f"{right / len(labels):.2%}", f"{same}", f"{(values - before).abs().max().item():.1e}"
        )
    console.print(table)
    console.print(
        f"folded and verified in {folded - start:.1f} s; "
        f"exported, verified and timed in {exported - folded:.1f} s: {out}",
        highlight=False,
    )

    answers = [values.argmax(1) for values in logits.values()]
    equal = all(torch.equal(answers[0], other) for other in answers[1:])
    accurate = (answers[0] == labels).double().mean().item() >= 0.975
    console.print(
        "all three give the same answers" if equal else "[bold red]the answers differ",
        "" if accurate else "[bold red]and the network is worse than it was trained to be",
    )
    return 0 if equal and accurate else 1


if __name__ == "__main__":
    sys.exit(main())
