"""Checks of what a pass declares, on what it handed back.

Each check returns None or a pair (code, sentence). Codes:
`not-a-result`, `lint`, `meta`, `signature`, `shapes`, `dtypes`, `false-no-change`, `false-change`, `raised`,
`values`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphsurgery.graph import CaptureInfo
from graphsurgery.rewrite.contracts import Change, NodeRef, Pass, PassResult, Refusal
from graphsurgery.rewrite.fingerprint import same_bits

__all__ = ["Finding", "broken", "check_graph", "check_values", "run_graph", "wrong_result"]

Finding = tuple[str, str]


def wrong_result(result: Any) -> Finding | None:
    """Whether `result` is not what a pass has to hand back."""
    if not isinstance(result, PassResult):
        return "not-a-result", f"returned {type(result).__name__} where a PassResult was expected"
    graph_module: Any = result.graph_module
    if not isinstance(graph_module, fx.GraphModule):
        kind = type(graph_module).__name__
        return "not-a-result", f"returned a PassResult with a {kind} where a GraphModule was expected"
    for change in result.changes:
        if not isinstance(change, Change) or not _refs(change.before) or not _refs(change.after):
            return "not-a-result", f"reported {change!r} where a Change with NodeRefs was expected"
    for refusal in result.refusals:
        if not isinstance(refusal, Refusal) or not _refs(refusal.nodes):
            return "not-a-result", f"reported {refusal!r} where a Refusal with NodeRefs was expected"
    return None


def _refs(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(ref, NodeRef) for ref in value)


def check_graph(before: fx.GraphModule, after: fx.GraphModule, declared: Pass) -> Finding | None:
    """Check that `after` is a sound graph and keeps signature, shapes and dtypes as `declared` says."""
    checks: list[Callable[[], Finding | None]] = [lambda: _lint(after), lambda: _meta(before, after)]
    if declared.preserves.signature:
        checks.append(lambda: _signature(before, after))
    if declared.preserves.shapes:
        checks.append(lambda: _outputs(before, after, "shapes", _shape))
    if declared.preserves.dtypes:
        checks.append(lambda: _outputs(before, after, "dtypes", _dtype))
    for check in checks:
        finding = check()
        if finding is not None:
            return finding
    return None


def run_graph(gm: fx.GraphModule, inputs: Any) -> list[Any]:
    """Flat outputs of `gm` for `inputs`: a tensor, positional or keyword inputs, or a `CaptureInfo`."""
    with torch.no_grad():
        if isinstance(inputs, CaptureInfo):
            return pytree.tree_leaves(gm(*inputs.args, **inputs.kwargs))
        if isinstance(inputs, Mapping):
            out = gm(**inputs)
        elif isinstance(inputs, (tuple, list)):
            out = gm(*inputs)
        else:
            out = gm(inputs)
    return pytree.tree_leaves(out)


def check_values(before: Sequence[Any], after: Sequence[Any], declared: Pass) -> Finding | None:
    """Compare the outputs of a run: shapes, dtypes, and bits where the pass declares exact values."""
    if len(before) != len(after):
        if not declared.preserves.signature:
            return None  # it may add outputs; what they hold is for the `check` callback to judge
        return "signature", f"gave {len(after)} outputs where there were {len(before)}"
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
            if type(old) is not type(new) or (declared.preserves.values == "exact" and old != new):
                return "values", f"output {i} became {new!r} where it was {old!r}"
            continue
        if declared.preserves.shapes and old.shape != new.shape:
            return (
                "shapes",
                f"output {i} had shape {tuple(old.shape)} and now has {tuple(new.shape)} when run",
            )
        if declared.preserves.dtypes and old.dtype != new.dtype:
            return "dtypes", f"output {i} had dtype {old.dtype} and now has {new.dtype} when run"
        if declared.preserves.values == "exact" and not same_bits(old, new):
            return "values", f"output {i} differs though the pass declares exact values"
    return None


def _lint(gm: fx.GraphModule) -> Finding | None:
    with warnings.catch_warnings():
        # a get_attr that points at nothing is only a warning in lint
        warnings.simplefilter("error")
        try:
            gm.graph.lint()
            gm.recompile()
        except Exception as error:  # noqa: BLE001 (lint and recompile raise all kinds)
            return broken(error)
    return None


def broken(error: Exception) -> Finding:
    """What is said of a graph that cannot be read."""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "lint", f"left a broken graph: {said}"


def _meta(before: fx.GraphModule, after: fx.GraphModule) -> Finding | None:
    if before.meta.get("graphsurgery") is not None and after.meta.get("graphsurgery") is None:
        return "meta", "lost gm.meta['graphsurgery']"
    if not any("val" in node.meta for node in before.graph.nodes):
        return None
    for node in after.graph.nodes:
        if node.op not in ("output",) and "val" not in node.meta:
            return "meta", f"left node {node.name!r} without meta['val']; annotate() sets it"
    return None


def _output_args(gm: fx.GraphModule) -> Any:
    return gm.graph.output_node().args[0]


def _signature(before: fx.GraphModule, after: fx.GraphModule) -> Finding | None:
    old, new = ([str(n.target) for n in gm.graph.nodes if n.op == "placeholder"] for gm in (before, after))
    if old != new:
        return "signature", f"changed the inputs from {old} to {new}"
    specs = [pytree.tree_flatten(_output_args(gm), is_leaf=lambda x: x is None)[1] for gm in (before, after)]
    if specs[0] != specs[1]:
        return "signature", f"changed the structure of the output from {specs[0]} to {specs[1]}"
    infos = [getattr(gm.graph._codegen, "pytree_info", None) for gm in (before, after)]
    if infos[0] != infos[1]:
        return "signature", "changed how the graph takes its arguments (graph._codegen)"
    rules = [getattr(gm.graph._codegen, "rules", None) for gm in (before, after)]
    if repr(rules[0]) != repr(_as_strict(*rules)):  # as text, since NaN is fixed at NaN
        return "signature", "changed what the graph checks its arguments for (graph._codegen.rules)"
    return None


def _as_strict(old: Any, new: Any) -> Any:
    """New rules with the sizes fixed again that they let grow from the old ones on."""
    if old is None or new is None or len(old.inputs) != len(new.inputs):
        return new
    freed = set()
    inputs = []
    for (*_, was), (name, kind, now) in zip(old.inputs, new.inputs, strict=True):
        if isinstance(was, tuple) and isinstance(now, tuple) and len(was) == len(now):
            grown = {(b, a, None) for a, b in zip(was, now, strict=True)} & set(new.sizes)
            freed |= grown
            now = tuple(a if (b, a, None) in grown else b for a, b in zip(was, now, strict=True))
        inputs.append((name, kind, now))
    bounds = tuple(bound for bound in new.sizes if bound not in freed or bound in old.sizes)
    return new._replace(inputs=tuple(inputs), sizes=bounds)


def _outputs(
    before: fx.GraphModule, after: fx.GraphModule, code: str, figure: Callable[[Any], Any]
) -> Finding | None:
    old, new = (pytree.tree_leaves(_output_args(gm)) for gm in (before, after))
    if len(old) != len(new):
        return code, f"gave {len(new)} outputs where there were {len(old)}"
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        was, now = figure(a), figure(b)
        if was != now:
            return code, f"changed the {code[:-1]} of output {i} from {was} to {now}"
    return None


def _value(leaf: Any) -> Any:
    return leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf


def _shape(leaf: Any) -> Any:
    value = _value(leaf)
    return (
        "[" + ", ".join(str(s) for s in value.shape) + "]" if isinstance(value, torch.Tensor) else str(value)
    )


def _dtype(leaf: Any) -> Any:
    value = _value(leaf)
    return value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
