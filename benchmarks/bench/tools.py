"""The tools: those that work on ONNX files, those that work on modules, and the plain export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir
import onnxscript.optimizer
import onnxscript.rewriter
import onnxsim
import onnxslim
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from bench.networks import Made

__all__ = [
    "FILE_TOOLS",
    "MODULE_TOOLS",
    "OURS",
    "OWN",
    "PLAIN",
    "TOOLS",
    "NotOffered",
    "by_onnxscript",
    "by_onnxsim",
    "by_onnxslim",
    "export",
]

PLAIN, OWN, OURS = "plain export", "timm / peft", "graphsurgery"


class NotOffered(Exception):
    """A tool has nothing for a network."""


def export(model: nn.Module, inputs: Any) -> onnx.ModelProto:
    """The network as `torch.onnx.export` writes it, with a free batch.

    Args:
        model: The network.
        inputs: At least two samples, as one tensor, a tuple or a mapping of keyword inputs: one sample is a
            special case to torch.export.
    """
    shapes = torch.utils._pytree.tree_map(lambda _: {0: torch.export.Dim.DYNAMIC}, inputs)
    keywords = isinstance(inputs, dict)
    positional = () if keywords else inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        program = torch.onnx.export(
            model,
            positional,
            kwargs=inputs if keywords else None,
            dynamo=True,
            dynamic_shapes=shapes if isinstance(inputs, (dict, tuple)) else (shapes,),
            opset_version=20,
            verbose=False,
        )
    if program is None:
        raise TypeError("torch.onnx.export returned nothing")
    return onnx_ir.to_proto(program.model)


def by_onnxscript(model: onnx.ModelProto) -> onnx.ModelProto:
    """The optimizer of onnxscript and its default rewrite rules."""
    return onnxscript.rewriter.rewrite(onnxscript.optimizer.optimize(model))


def by_onnxsim(model: onnx.ModelProto) -> onnx.ModelProto:
    """The defaults of onnxsim."""
    simplified: onnx.ModelProto = onnxsim.simplify(model)[0]
    return simplified


def by_onnxslim(model: onnx.ModelProto) -> onnx.ModelProto:
    """The defaults of OnnxSlim."""
    slim: onnx.ModelProto = onnxslim.slim(model)
    return slim


FILE_TOOLS: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "onnxscript": by_onnxscript,
    "onnxsim": by_onnxsim,
    "OnnxSlim": by_onnxslim,
}
"""What is applied to the plain export."""


def by_fx_fuse(made: Made) -> nn.Module:
    """torch.fx.experimental.optimization: remove_dropout and fuse."""
    fused: nn.Module = fuse(made.model)
    return fused


def by_authors(made: Made) -> nn.Module:
    """`timm.utils.reparameterize_model`, or peft's `merge_and_unload`."""
    if made.own is None:
        raise NotOffered
    return made.own()


MODULE_TOOLS: dict[str, Callable[[Made], nn.Module]] = {"fx.fuse": by_fx_fuse, OWN: by_authors}
"""What is applied to the module, which is exported the same way afterwards."""

TOOLS = (PLAIN, *FILE_TOOLS, *MODULE_TOOLS, OURS)
