"""`AvgPool2d(2, divisor_override=3)`, whose divisor torch's exporter leaves out: the file would be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from graphsurgery.graph import annotate

__all__ = ["write_divisors"]

_POOLS = {torch.ops.aten.avg_pool2d.default: 2, torch.ops.aten.avg_pool3d.default: 3}


def write_divisors(program: ExportedProgram) -> int:
    """Write the divisor of an average as a product behind it, in place, before translation.

    The sum of a window over `d` is its mean, padding counted, times `window / d`. A window that reaches over
    the padding (`ceil_mode`) has a mean of fewer positions; such pools stay, and verification refuses the
    file.

    Args:
        program: The program; its nodes carry fake values.

    Returns:
        How many pools were written anew.
    """
    gm, count = program.graph_module, 0
    for target, axes in _POOLS.items():
        for node in gm.graph.find_nodes(op="call_function", target=target):
            given = _arguments(node, axes)
            x, kernel, stride, padding, ceil, _, divisor = given
            if divisor is None or (ceil and _overhangs(x.meta["val"].shape[-axes:], kernel, stride, padding)):
                continue
            with gm.graph.inserting_before(node):
                mean = gm.graph.call_function(target, (x, kernel, stride, padding, ceil, True, None))
                total = gm.graph.call_function(
                    torch.ops.aten.mul.Tensor, (mean, prod(kernel) / float(divisor))
                )
            annotate(gm, mean)
            annotate(gm, total)
            node.replace_all_uses_with(total)
            gm.graph.erase_node(node)
            count += 1
    if count:
        gm.recompile()
    return count


def _arguments(node: fx.Node, axes: int) -> list[Any]:
    """Return the arguments of a pool, defaults filled in, sizes one for each axis."""
    names = (
        "input",
        "kernel_size",
        "stride",
        "padding",
        "ceil_mode",
        "count_include_pad",
        "divisor_override",
    )
    found: dict[str, Any] = dict(zip(names, (None, None, [], 0, False, True, None), strict=True))
    found |= dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    for name in ("kernel_size", "stride", "padding"):
        sizes = found[name] or (found["kernel_size"] if name == "stride" else 0)
        sizes = [sizes] if isinstance(sizes, int) else list(sizes)
        found[name] = sizes * axes if len(sizes) == 1 else sizes
    return list(found.values())


def _overhangs(
    shape: Sequence[int | torch.SymInt], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> bool:
    """Whether a last window may reach over the padding; of free sizes it may."""
    return any(
        not isinstance(size, int) or (size + 2 * p - k) % s != 0
        for size, k, s, p in zip(shape, kernel, stride, padding, strict=True)
    )
