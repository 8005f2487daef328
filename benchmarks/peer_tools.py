"""Each tool as one function from a network to what is left of it.

A tool that works on ONNX files gets `torch.onnx.export(dynamo=True)` of the network, which has been through
onnxscript's constant folding already; a tool that works on modules is exported the same way afterwards. All
files have a free batch and go through onnxruntime's optimiser at the end, as they would in use: what counts
is the least of the file itself and onnxruntime's graph at any of its levels.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxoptimizer
import torch
from bench.tools import by_onnxscript, by_onnxsim, by_onnxslim, export
from onnx_count import Left, fewest, run
from torch import Tensor, fx, nn
from torch._inductor import compile_fx
from torch._inductor import config as inductor
from torch.fx.experimental.optimization import fuse
from torch.onnx._internal.exporter._registration import ONNXRegistry

import graphsurgery as gs

# torch reads the sources of all its translations anew in every export: half of the time of 200 exports.
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))

TOLERANCE = 1e-4
"""Largest deviation from the float64 network, as a part of the largest value, that is rounding in float32."""


@dataclass(frozen=True)
class Outcome:
    """What a tool left of a network.

    Attributes:
        left: Heavy and all nodes; None where the tool failed. All nodes are 0 where they cannot be compared.
        macs: Heavy multiplications per sample, None where they cannot be counted.
        error: Deviation from the network in float64, relative to its largest value.
        failure: The exception of a tool that failed.
    """

    left: Left | None = None
    macs: int | None = None
    error: float = 0.0
    failure: str = ""

    @property
    def right(self) -> bool:
        """Whether the tool gave something, and it computes the same."""
        return self.left is not None and self.error <= TOLERANCE


class Network:
    """A network with its export, and its outputs in float64 at two batches."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x
        self.inputs = [x, torch.cat([x.flip(0), x])]
        if x.is_floating_point():
            generator = torch.Generator().manual_seed(1)
            self.inputs[1] = torch.randn(self.inputs[1].shape, generator=generator)
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            values = [exact(y.double() if y.is_floating_point() else y) for y in self.inputs]
        self.expected = [[v.numpy() for v in _tuple(value)] for value in values]
        self._exported: onnx.ModelProto | None = None

    @property
    def exported(self) -> onnx.ModelProto:
        """A copy of the plain export."""
        if self._exported is None:
            self._exported = export(self.model, self.x)
        made = onnx.ModelProto()
        made.CopyFrom(self._exported)
        return made

    def error(self, outputs: Callable[[Tensor], list[np.ndarray]], batches: int = 2) -> float:
        """Largest deviation over the batches, each output relative to its largest value."""
        worst = 0.0
        for y, wanted in list(zip(self.inputs, self.expected, strict=True))[:batches]:
            for value, right in zip(outputs(y), wanted, strict=True):
                if value.shape != right.shape or not np.isfinite(value).all():
                    return float("inf")
                worst = max(worst, float(np.abs(value - right).max() / np.abs(right).max()))
        return worst

    def judge(self, model: onnx.ModelProto) -> Outcome:
        """What is left in a file, and whether it is right."""
        count, macs = fewest(model)
        return Outcome(count, macs, self.error(lambda y: run(model, [y.numpy()])))


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def on_file(tool: Callable[[onnx.ModelProto], onnx.ModelProto]) -> Callable[[Network], Outcome]:
    """What a tool that works on files leaves of the plain export."""
    return lambda network: network.judge(tool(network.exported))


def by_onnxruntime(network: Network) -> Outcome:
    """The plain export, on onnxruntime."""
    return network.judge(network.exported)


def by_onnxoptimizer(network: Network) -> Outcome:
    """All of onnxoptimizer: its fuse and eliminate passes, to a fixed point."""
    return network.judge(onnxoptimizer.optimize(network.exported, fixed_point=True))


def by_fx_fuse(network: Network) -> Outcome:
    """torch.fx.experimental.optimization: remove_dropout and fuse."""
    return network.judge(export(fuse(network.model), network.x))


def by_inductor(network: Network) -> Outcome:
    """Inductor's frozen graph before code generation, where layers and weights are as they will be.

    It is run as it is, in eager, at one batch. Not all nodes are counted: Inductor puts elementwise ones into
    its kernels.
    """
    graphs: list[fx.GraphModule] = []

    def record(gm: fx.GraphModule, _: Any, **__: Any) -> Callable[[list[Any]], Any]:
        graphs.append(gm)
        return lambda arguments: gm(*arguments)

    torch._dynamo.reset()
    backend = functools.partial(compile_fx.compile_fx, inner_compile=record)
    with torch.no_grad(), inductor.patch(freezing=True):
        compiled = torch.compile(network.model, backend=backend, dynamic=False)
        error = network.error(lambda y: [v.numpy() for v in _tuple(compiled(y))], batches=1)
    heavy = sum(_heavy_call(node) for gm in graphs for node in gm.graph.nodes)
    return Outcome(Left(heavy, 0), None, error)


def _heavy_call(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    names = str(node.target).split(".")  # aten.addmm.default, mkldnn._convolution_pointwise.default
    if any(name in ("mm", "addmm", "bmm", "baddbmm") for name in names):
        return True
    return any("convolution" in name or "linear" in name for name in names)


def by_graphsurgery(network: Network, passes: tuple[str, ...] | None = None) -> Outcome:
    """Our default passes and export."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        result = gs.optimize(network.model, (network.x,), passes=passes, verify="off")
        result.export_onnx(path, verify=False)
        return network.judge(onnx.load(path))


def by_merging(network: Network) -> Outcome:
    """The default passes, and the one that runs when named: layers on one value into one."""
    names = tuple(item.name for item in gs.passes.default_passes())
    return by_graphsurgery(network, (*names, gs.passes.MergeSiblings.name))


TOOLS: dict[str, Callable[[Network], Outcome]] = {
    "onnxruntime": by_onnxruntime,
    "onnxscript": on_file(by_onnxscript),
    "onnxoptimizer": by_onnxoptimizer,
    "onnxsim": on_file(by_onnxsim),
    "OnnxSlim": on_file(by_onnxslim),
    "fx.fuse": by_fx_fuse,
    "Inductor": by_inductor,
    "graphsurgery": by_graphsurgery,
    "graphsurgery with merge-siblings": by_merging,
}


def outcome(tool: str, network: Network) -> Outcome:
    """What a tool leaves of a network; whatever it raises is an outcome too."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return TOOLS[tool](network)
        except Exception as error:  # noqa: BLE001 - a tool that fails on one case must not end the run
            return Outcome(failure=f"{type(error).__name__}: {error}".splitlines()[0][:200])
