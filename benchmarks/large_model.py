"""Memory and time of merging LoRA into a large bfloat16 network and exporting it with external data.

The network is a decoder's Linears in bfloat16 (per block q, k, v, o, gate, up, down, and norms), every one
with a LoRA branch. It is made, optimised and exported in a process of its own, whose peak resident set
(`getrusage`) is given in bytes and in sizes of the network's parameters; what Python and the libraries hold
before the network is made is counted too. Of the original no second copy is asked for.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphsurgery as gs

MB = 2.0**20
RANK = 8


class LoraLinear(nn.Module):
    """`W x + s B A x`, as peft writes it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs, bias=False)
        self.lora_A, self.lora_B = nn.Linear(inputs, RANK, bias=False), nn.Linear(RANK, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) * 2.0


class Block(nn.Module):
    """A decoder block: causal attention and a gated MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        hidden = 4 * width
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        nn.init.uniform_(self.norm1.weight, 0.5, 1.5)
        nn.init.uniform_(self.norm2.weight, 0.5, 1.5)
        self.q, self.k, self.v, self.o = (LoraLinear(width, width) for _ in range(4))
        self.gate, self.up, self.down = (
            LoraLinear(width, hidden),
            LoraLinear(width, hidden),
            LoraLinear(hidden, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        y = self.norm1(x)
        q, k, v = (
            layer(y).reshape(rows, tokens, self.heads, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(rows, tokens, width))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def network(parameters: float, width: int) -> nn.Module:
    """Return blocks of about that many parameters, in bfloat16, made one by one."""
    torch.manual_seed(0)
    blocks = max(1, round(parameters / (16 * width * width)))
    torch.set_default_dtype(torch.bfloat16)  # never in float32
    try:
        return nn.Sequential(*(Block(width, width // 64) for _ in range(blocks))).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def peak() -> float:
    """Return the most that this process has held, in bytes (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def measure(parameters: float, width: int, verify: str, export: str) -> dict[str, float | str]:
    """Merge and export once in this process; sizes in bytes."""
    warnings.simplefilter("ignore")
    model = network(parameters, width)
    size = float(sum(p.numel() * p.element_size() for p in model.parameters()))
    found: dict[str, float | str] = {"parameters": sum(p.numel() for p in model.parameters()), "model": size}
    found["peak_model"] = peak()
    start = time.perf_counter()
    result = gs.optimize(model, torch.randn(2, 4, width, dtype=torch.bfloat16), verify=verify)
    found["optimize_seconds"], found["peak_optimize"] = time.perf_counter() - start, peak()
    found["changes"] = len(result.report.changes)
    found["linears_left"] = sum(isinstance(part, nn.Linear) for part in result.module.modules())
    verdict = result.report.verification
    found["verified"] = "not asked for" if verdict is None else verdict.reason
    if export != "none":
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            done = result.export_onnx(
                Path(folder) / "model.onnx", verify=export == "verify", external_data=True
            )
            found["file"], found["external"] = float(done.size_bytes), str(done.external_data)
        found["file_verified"] = "not asked for" if done.verdict is None else done.verdict.reason
        found["export_seconds"], found["peak_export"] = time.perf_counter() - start, peak()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=1e8, help="about how many (default: 1e8)")
    parser.add_argument("--width", type=int, default=1024, help="features of a token (default: 1024)")
    parser.add_argument("--verify", choices=("final", "off"), default="final", help="comparison in torch")
    parser.add_argument(
        "--export", choices=("verify", "write", "none"), default="verify", help="the ONNX file"
    )
    parser.add_argument("--child", action="store_true", help="measure in this process, as JSON")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.parameters, options.width, options.verify, options.export)))
        return
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--child"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    size = found["model"]
    print(f"{found['parameters']:,} parameters in bfloat16, {size / MB:.0f} MB; {found['changes']} changes")
    print(f"{found['linears_left']} Linears left; in torch: {found['verified']}")
    for stage in ("model", "optimize", "export"):
        if f"peak_{stage}" in found:
            most, seconds = found[f"peak_{stage}"], found.get(f"{stage}_seconds", 0.0)
            print(f"peak until {stage}: {most / MB:.0f} MB, {most / size:.2f} models; {seconds:.0f} s")
    if "file" in found:
        print(
            f"file {found['file'] / MB:.0f} MB, external data: {found['external']}; {found['file_verified']}"
        )


if __name__ == "__main__":
    main()
