"""Memory that `gs.verify` takes beyond the caller's models: peak of the resident set, in its own process.

The model is a chain of square Linears, whose weights are nearly all that a run holds. Each comparison is made
in a new process: what was resident before `verify` is taken off, and the rest is given in bytes and in copies
of the model (its parameters and buffers in their own dtype).
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import graphsurgery as gs

MB = 2.0**20
KINDS = ("module", "onnx")


def chain(layers: int, width: int) -> nn.Module:
    """Return Linears with ReLUs between them, `4 * layers * width**2` bytes."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*parts[:-1]).eval()


def resident() -> float:
    """Return what this process holds now, in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return float(pages * resource.getpagesize())


def peak() -> float:
    """Return the most that this process has held since `forget_peak`, in bytes (Linux)."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith("VmHWM"))) * 1024.0


def forget_peak() -> None:
    """Start the count of the peak anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measure(kind: str, layers: int, width: int) -> dict[str, float]:
    """Verify once in this process; sizes in bytes."""
    warnings.simplefilter("ignore")
    model = chain(layers, width)
    size = float(sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers())))
    x = torch.randn(2, width)
    small = chain(1, 8)
    gs.verify(small, small, torch.randn(2, 8))  # what is loaded at the first call is no copy
    with tempfile.TemporaryDirectory() as folder:
        candidate: object = copy.deepcopy(model)
        if kind == "onnx":
            candidate = Path(folder) / "model.onnx"
            program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
            program.save(str(candidate), external_data=True)  # type: ignore[union-attr]
            del program
        forget_peak()
        before, start = resident(), time.perf_counter()
        verdict = gs.verify(model, candidate, x, dynamic_batch=kind == "module")
        seconds = time.perf_counter() - start
    return {"ok": float(verdict.ok), "model": size, "extra": peak() - before, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6, help="Linears in the chain (default: 6)")
    parser.add_argument("--width", type=int, default=4096, help="their width (default: 4096, 64 MB each)")
    parser.add_argument("--kind", choices=KINDS, help="one comparison, in this process, as JSON")
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(measure(options.kind, options.layers, options.width)))
        return
    sizes = ["--layers", str(options.layers), "--width", str(options.width)]
    for kind in KINDS:
        command = [sys.executable, __file__, "--kind", kind, *sizes]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        size = found["model"]
        print(
            f"against {kind:7} model {size / MB:5.0f} MB, {'equal' if found['ok'] else 'DIFFERENT'}: "
            f"peak {found['extra'] / MB:5.0f} MB beyond the caller's models, "
            f"{found['extra'] / size:4.2f} copies, {found['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
