"""The certificate of a head over a map: each of its calls against its twin, at several positions, in float64.

Every call is compared by itself, on random dense inputs of its own, so that no activation hides an error of
the layer before it: a map is drawn that has more positions than one, the twin runs on all of it, and the
original call runs on each window of it, flattened by the graph's own calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import fx

from graphsurgery.affine.certify import SAMPLES, deviation
from graphsurgery.affine.region import Scope
from graphsurgery.affine.runner import call
from graphsurgery.affine.spread import Flat, Twin
from graphsurgery.values import is_tensor, tensor_meta

__all__ = ["residual"]

_MORE = {1: 3, 2: 1, 3: 1}
"""How many positions more than one a drawn map has along each axis, by the number of axes."""


def residual(
    old: Scope, new: Scope, twins: Mapping[fx.Node, Twin], original: Mapping[fx.Node, fx.Node], seed: int = 0
) -> float:
    """Largest deviation of a twin from its call, in the unit of `certify.residual`.

    Args:
        old: the graph with the head.
        new: the graph with the maps.
        twins: what stands for each value of the head.
        original: for the calls that `Flat.moves` names, those of the old graph.
        seed: of the random inputs.
    """
    worst = 0.0
    for node, twin in twins.items():
        # what flattens reads no twin, and a split is compared with each of its pieces
        if twin.made and is_tensor(node) and not twins.keys().isdisjoint(node.all_input_nodes):
            found = _compare(old, new, node, twins, original, seed)
            worst = max(worst, found)
    return worst


def _compare(
    old: Scope,
    new: Scope,
    node: fx.Node,
    twins: Mapping[fx.Node, Twin],
    original: Mapping[fx.Node, fx.Node],
    seed: int,
) -> float:
    twin = twins[node]
    calls: tuple[fx.Node, ...] = (node,)
    while not all(is_tensor(read) for read in calls[0].all_input_nodes):
        calls = (calls[0].all_input_nodes[0], *calls)
    made = [new_call for old_call in calls for new_call in twins[old_call].made]
    reads = {read: twins[read] for read in calls[0].all_input_nodes if read in twins}
    rank = tensor_meta(twin.node).dim() - 2
    more = _MORE[rank]
    positions = list(product(range(more + 1), repeat=rank))
    batch = max(2, -(-SAMPLES // len(positions)))
    rows = old.sizes.at(tensor_meta(node).shape[0], batch)
    generator = torch.Generator().manual_seed(seed)
    maps: dict[fx.Node, torch.Tensor] = {}
    for read, stands in reads.items():
        sizes = _window(read, stands.flat, rank)
        shape = (rows, sizes[0], *(size + more for size in sizes[1:]))
        maps[read] = _as_kind(torch.randn(shape, generator=generator).double(), tensor_meta(read))
    with torch.no_grad():
        got = _run(new, made, {reads[read].node: value for read, value in maps.items()}, batch)
        window = _window(node, twin.flat, rank)
        wanted, found = [], []
        for corner in positions:
            values = {
                read: _listed(
                    old,
                    _crop(value, corner, _window(read, reads[read].flat, rank)),
                    reads[read].flat,
                    original,
                    batch,
                )
                for read, value in maps.items()
            }
            wanted.append(_run(old, calls, values, batch))
            found.append(_listed(old, _crop(got, corner, window), twin.flat, original, batch))
    return deviation(torch.stack(wanted).double(), torch.stack(found).double(), [0, 1])


def _as_kind(drawn: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Random numbers on the device of a value, as truth values or whole numbers where it has such."""
    drawn = drawn.to(value.device)
    if value.dtype == torch.bool:
        return drawn > 0
    return drawn if value.dtype.is_floating_point else (8 * drawn).round().to(value.dtype)


def _window(node: fx.Node, flat: Flat | None, rank: int) -> tuple[int, ...]:
    """Channels and positions of the map that one value of the head lists."""
    return (int(tensor_meta(node).shape[1]), *[1] * rank) if flat is None else flat.sizes


def _crop(value: torch.Tensor, corner: tuple[int, ...], window: tuple[int, ...]) -> torch.Tensor:
    for axis, (start, size) in enumerate(zip(corner, window[1:], strict=True)):
        value = value.narrow(axis + 2, start, size)
    return value


def _listed(
    old: Scope, value: torch.Tensor, flat: Flat | None, original: Mapping[fx.Node, fx.Node], batch: int
) -> torch.Tensor:
    """A window as the list of numbers that the original head reads."""
    if flat is None:
        return value.flatten(1)
    moves = [original[move] for move in flat.moves]
    entry: Any = moves[0].args[0]
    return _run(old, moves, {entry: value.movedim(1, flat.channels)}, batch)


def _run(scope: Scope, nodes: Any, given: Mapping[fx.Node, torch.Tensor], batch: int) -> torch.Tensor:
    """The value of the last of some calls, in float64."""
    values: dict[fx.Node, Any] = dict(given)
    needed = [read for node in nodes for read in node.all_input_nodes if read in scope.constant]
    constants = scope.constant_values(needed)

    def operand(node: fx.Node) -> Any:
        if node in values:
            return values[node]
        return constants[node] if node in constants else scope.sizes.at(node.meta["val"], batch)

    for node in nodes:
        if node not in scope.constant and node.op == "call_function":
            values[node] = call(node, operand)
    result: torch.Tensor = values[nodes[-1]]
    return result
