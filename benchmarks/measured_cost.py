"""What `cost="measured"` keeps on real networks, and what it gains over counting alone.

For every network: what was timed, what was kept, the latency of the network that counts give and of the one
with what was kept (interleaved, as the last comparison of the run measured it), and what the decisions cost.
Times of earlier runs are not used.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zoo.entry import as_trained

import graphsurgery as gs
from graphsurgery.measure import MeasuredCost


class Bottleneck(nn.Module):
    """Residual blocks of two Linear layers through a width at which one has more multiplications."""

    def __init__(self, features: int, inner: int, count: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(features, inner) for _ in range(count))
        self.up = nn.ModuleList(nn.Linear(inner, features) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, features)."""
        for down, up in zip(self.down, self.up, strict=True):
            x = torch.relu(x + up(down(x)))
        return x


def bert() -> tuple[nn.Module, Any]:
    """Two layers of BERT base."""
    from transformers import BertConfig, BertModel

    config = BertConfig(num_hidden_layers=2, vocab_size=1000, attn_implementation="sdpa")
    return BertModel(config, add_pooling_layer=False), {"input_ids": torch.arange(32).reshape(1, 32)}


def small_bert() -> tuple[nn.Module, Any]:
    """BERT mini (four layers of width 256) on a short sentence."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        num_hidden_layers=4,
        hidden_size=256,
        num_attention_heads=4,
        intermediate_size=1024,
        vocab_size=1000,
        attn_implementation="sdpa",
    )
    return BertModel(config, add_pooling_layer=False), {"input_ids": torch.arange(8).reshape(1, 8)}


def picture(name: str, size: int) -> Callable[[], tuple[nn.Module, Any]]:
    """A network of timm on one picture."""

    def make() -> tuple[nn.Module, Any]:
        import timm

        fixed = {"img_size": size} if name.startswith("vit") else {}
        return timm.create_model(name, **fixed), torch.randn(1, 3, size, size)

    return make


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "bottleneck 256-100-256, 8 blocks": lambda: (Bottleneck(256, 100, 8), torch.randn(1, 256)),
    "bottleneck 512-230-512, 4 blocks": lambda: (Bottleneck(512, 230, 4), torch.randn(1, 512)),
    "BERT mini, 8 tokens": small_bert,
    "BERT base, 2 layers, 32 tokens": bert,
    "repvgg_a0, 64x64": picture("repvgg_a0", 64),
    "mobileone_s0, 64x64": picture("mobileone_s0", 64),
    "vit_tiny_patch16_224, 96x96": picture("vit_tiny_patch16_224", 96),
    "levit_128s, 224x224": picture("levit_128s", 224),
}


def run(name: str, threads: int, *, full: bool) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    model = as_trained(model.eval(), inputs)
    start = time.perf_counter()
    result = gs.optimize(model, inputs, cost=MeasuredCost(threads=threads, cache=False))
    spent = time.perf_counter() - start
    if full:
        print(result.report)
    timed = [found for found in result.report.measured if found.pass_name != "measured"]
    whole = [found for found in result.report.measured if found.pass_name == "measured"]
    kinds: dict[str, list[bool]] = {}
    for found in timed:
        kinds.setdefault(found.pass_name.removeprefix("measured-"), []).append(found.kept)
    kept = ", ".join(f"{sum(flags)} of {len(flags)} {kind}" for kind, flags in kinds.items()) or "none"
    gain = "unchanged | | "
    if whole and whole[-1].ratio is not None:
        last = whole[-1]
        gain = f"{last.before_ms:.3f} | {last.after_ms:.3f} | "
        gain += f"{last.ratio:.3f} ({last.least:.3f}-{last.most:.3f}){'' if last.kept else ', left'}"
    verified = result.report.verification is not None and result.report.verification.ok
    return f"| {name} | {kept} | {gain} | {'equal' if verified else 'DIFFERENT'} | {spent:.0f} |"


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of networks; all without")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="print each report")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| network | kept of what was timed | by counts, ms | measured, ms | ratio | verified | tool, s |")
    print("|---|---|---|---|---|---|---|")
    for name in NETWORKS:
        if not options.names or any(part in name for part in options.names):
            print(run(name, options.threads, full=options.full), flush=True)


if __name__ == "__main__":
    main()
