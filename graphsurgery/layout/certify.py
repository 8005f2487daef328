"""The certificate of calls that were written anew: both in float64 on random values at the real sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphsurgery.affine.certify import deviation
from graphsurgery.affine.runner import call, widened
from graphsurgery.graph import get_attr_value
from graphsurgery.layout.orders import Order, inverse, natural
from graphsurgery.layout.write import Writer
from graphsurgery.values import Sizes, is_tensor, tensor_meta

__all__ = ["apart", "certificate", "drawn", "evaluator"]

_BATCH = 2


def evaluator(
    gm: fx.GraphModule, sizes: Sizes, known: dict[fx.Node, Any], batch: int = _BATCH
) -> Callable[[fx.Node], Any]:
    """Values of nodes in float64, from those in `known` and the attributes of `gm`."""

    def value(node: fx.Node) -> Any:
        if node not in known:
            if node.op == "get_attr":
                known[node] = widened(get_attr_value(gm, str(node.target)).detach())
            elif node.op == "call_function" and _has_tensors(node):
                known[node] = call(node, value)
            else:
                known[node] = sizes.at(node.meta["val"], batch)
        return known[node]

    return value


def drawn(node: fx.Node, sizes: Sizes, seed: int, batch: int = _BATCH) -> torch.Tensor:
    """A random value of a node: float64 where it is floating point, else zeros and ones."""
    meta = tensor_meta(node)
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn([sizes.at(size, batch) for size in meta.shape], generator=generator).double()
    value = value if meta.is_floating_point() else (value > 0).to(meta.dtype)
    return value.to(meta.device)


def certificate(writer: Writer, old: fx.Node, makes: Order) -> float:
    """Deviation of a call in another order from the call as it was.

    Args:
        writer: What wrote it.
        old: The call as it was.
        makes: The order in which the axes of its value come now.

    Returns:
        The largest deviation, in the unit of `graphsurgery.affine.certify.deviation`; infinite where shapes
        differ.
    """
    wanted, got = _both(writer, old, within=False)
    if not all(bool(torch.isfinite(piece).all()) for piece in wanted):
        wanted, got = _both(writer, old, within=True)  # a root or logarithm of what is negative
    return max(apart(x.permute(makes), y) for x, y in zip(wanted, got, strict=True))


def _both(writer: Writer, old: fx.Node, *, within: bool) -> tuple[tuple[torch.Tensor, ...], ...]:
    """The pieces of a call's value as it was and as it is now, on operands anywhere or within 0 and 1."""
    before: dict[fx.Node, Any] = {}
    after: dict[fx.Node, Any] = {}
    for seed, operand in enumerate(old.all_input_nodes):
        if operand in writer.constants or not is_tensor(operand):
            continue
        value, alias = writer.aliases.get(operand) or (operand, natural(tensor_meta(operand).dim()))
        node, have = writer.made[value]
        if node not in after:
            x = drawn(value, writer.sizes, seed)
            after[node] = (x.sigmoid() if within and x.is_floating_point() else x).permute(have)
        before[operand] = after[node].permute(inverse(have)).permute(alias)
    with torch.no_grad():
        wanted = evaluator(writer.gm, writer.sizes, before)(old)
        got = evaluator(writer.gm, writer.sizes, after)(writer.made[old][0])
    return _pieces(wanted), _pieces(got)


def _pieces(value: Any) -> tuple[torch.Tensor, ...]:
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)


def apart(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """Largest deviation of two values, in units of how far the wanted one varies.

    Infinity and NaN (a mask of -inf) have to stand in the same places; the others are compared.
    """
    if wanted.shape != got.shape:
        return float("inf")
    wanted, got = wanted.double().reshape(1, -1), got.double().reshape(1, -1)
    finite = torch.isfinite(wanted)
    if not bool(finite.all()) and bool(finite.any()):
        odd = wanted[~finite], got[~finite]
        if not torch.allclose(*odd, rtol=0, atol=0, equal_nan=True):
            return float("inf")
        wanted, got = wanted[finite].reshape(1, -1), got[finite].reshape(1, -1)
    return deviation(wanted, got, [0, 1])


def _has_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (torch.Tensor, tuple, list))
