"""Latency on onnxruntime of networks with branches: as trained, reparameterised by timm, and folded by us.

All three are exported the same way and run in turn in one process, one thread each; what is printed are the
medians and their ratios. Ours needs no code for the network; timm's does what the authors of each wrote.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import onnx
import timm
import torch
from fold_blocks import as_trained
from onnx_count import fewest
from timm.utils import reparameterize_model
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery.export import export_onnx, latency_ms
from graphsurgery.graph import capture_info

NETWORKS = ("repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9", "repghostnet_100")


def network(name: str, size: int) -> tuple[nn.Module, Tensor]:
    """A network with random weights, and the statistics of random pictures in its norms."""
    torch.manual_seed(0)
    model = as_trained(timm.create_model(name))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, size, size))
    return model.eval(), torch.randn(1, 3, size, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--size", type=int, default=224, help="height and width of the picture (default: 224)"
    )
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of each file (default: 30)")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=NETWORKS, help="networks")
    options = parser.parse_args()

    print("| network | ms as trained | timm | ours | ours / timm | ours / trained | nodes of all three |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            model, x = network(name, options.size)
            files = [Path(folder) / f"{name}-{which}.onnx" for which in ("trained", "timm", "ours")]
            result = gs.optimize(model, (x,))
            info = capture_info(result.graph_module)
            export_onnx(model, info, files[0], verify=False)
            export_onnx(reparameterize_model(copy.deepcopy(model)), info, files[1], verify=False)
            result.export_onnx(files[2])
            trained, theirs, ours = latency_ms(files, x, options.repeats, threads=1)
            counts = [fewest(onnx.load(file))[0].nodes for file in files]
            print(
                f"| {name} | {trained:.2f} | {theirs:.2f} | {ours:.2f} | {ours / theirs:.2f} "
                f"| {ours / trained:.2f} | {', '.join(map(str, counts))} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
