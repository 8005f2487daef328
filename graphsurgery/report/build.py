"""Make a report of a captured graph and of what the pass manager made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphsurgery.cost import graph_cost, layer_counts
from graphsurgery.graph import capture_info
from graphsurgery.report.model import SCHEMA_VERSION, Captured, Figures, Report, TensorSpec
from graphsurgery.rewrite.contracts import Pass
from graphsurgery.rewrite.records import ManagerResult
from graphsurgery.values import size_text

__all__ = ["build_report", "figures"]


def build_report(
    gm: fx.GraphModule, passes: Sequence[Pass], result: ManagerResult, seconds: Mapping[str, float]
) -> Report:
    """Describe what was done, unverified.

    Args:
        gm: The captured graph.
        passes: The passes that were asked for.
        result: What the manager made of it.
        seconds: Wall time of the stages.
    """
    info = capture_info(gm)
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    outputs = pytree.tree_leaves(gm.graph.output_node().args[0])
    return Report(
        schema_version=SCHEMA_VERSION,
        model=info.model_name,
        captured=Captured(
            dynamic_batch=info.dynamic_batch,
            inputs=_specs(info.input_names, inputs, info.size_names),
            outputs=_specs(info.output_names, outputs, info.size_names),
            notes=info.notes,
        ),
        passes=tuple(item.name for item in passes),
        rounds=result.rounds,
        before=figures(gm),
        after=figures(result.graph_module),
        changes=result.changes,
        refusals=result.refusals,
        failures=result.failures,
        seconds={**seconds, **{f"pass:{name}": spent for name, spent in result.seconds.items()}},
        torch_version=torch.__version__,
    )


def figures(gm: fx.GraphModule, shapes: Mapping[str, Sequence[int]] | None = None) -> Figures:
    """Layers and costs of a captured graph, per sample; `shapes` as for `graph_cost`."""
    cost = graph_cost(gm, shapes)
    return Figures(layer_counts(gm), cost.nodes, cost.params, cost.macs, cost.flops)


def _specs(
    names: Sequence[str], values: Sequence[Any], size_names: Mapping[str, str]
) -> tuple[TensorSpec, ...]:
    found = []
    for index, value in enumerate(values):
        name = names[index] if index < len(names) else str(index)
        val = value.meta.get("val") if isinstance(value, fx.Node) else value
        if isinstance(val, torch.Tensor):
            sizes = tuple(size_text(size, size_names) for size in val.shape)
            found.append(TensorSpec(name, sizes, str(val.dtype).removeprefix("torch.")))
        else:
            found.append(TensorSpec(name, (), type(val).__name__))
    return tuple(found)
