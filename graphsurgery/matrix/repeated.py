"""Values that are the same for every sample: class tokens, grids of coordinates, zeros of the input's shape.

They are made of parameters and of the batch's size, so they are no constants of the graph; of a sample's map
they are a part of the bias.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from graphsurgery.affine import rules
from graphsurgery.affine.atoms import Atom, Axes, NoFold
from graphsurgery.affine.region import Scope
from graphsurgery.affine.runner import runner
from graphsurgery.cost import op_name
from graphsurgery.values import is_tensor

_BY_SHAPE = frozenset({"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"})


def values_read(node: fx.Node, constant: Collection[fx.Node]) -> list[fx.Node]:
    """The live operands of a call of which the numbers count, not the shape alone."""
    if op_name(node) in _BY_SHAPE:
        return []
    live = rules.live_operands(node, constant)
    return [o for o in live if o is node.args[0]] if op_name(node) == "expand_as" else live


def depending(scope: Scope, entry: fx.Node, nodes: Collection[fx.Node]) -> frozenset[fx.Node]:
    """An entry and those of some calls, given in graph order, whose numbers depend on it."""
    found = {entry}
    for node in nodes:
        if any(operand in found for operand in values_read(node, scope.constant)):
            found.add(node)
    return frozenset(found)


def repeated_axes(scope: Scope, entry: fx.Node, node: fx.Node) -> Axes:
    """The axes of a value that does not depend on the entry: the batch is carried, all else is a shift.

    Raises:
        NoFold: it is not the same for every sample and at every batch size.
    """
    if not is_tensor(node):  # such as the pieces of a split, which are looked at one by one
        return Axes((), symbols=scope.primes)
    shape, lead = scope.shape(node), scope.shape(entry)[0]
    prime = next((p for p in scope.primes if lead % p == 0), None)
    batch = Atom(prime or lead, 0, lead // prime if prime else 1)
    along = [i for i, n in enumerate(shape) if (n % prime == 0 if prime else i == 0 and n == lead)]
    single = scope.primes and any(
        shape[i] % p == 0 for i in range(len(shape)) for p in scope.primes if p != prime
    )
    if len(along) > 1 or single:
        raise NoFold("unsupported", "a value of symbolic sizes is made of parameters, which is not followed")
    if prime and not _same_for_all(scope, entry, node, along):
        raise NoFold("batch-varied", "a value made of the batch's size differs from sample to sample")
    dims = []
    for i, n in enumerate(shape):
        rest = n // batch.size if i in along else n
        dims.append((*((batch,) if i in along else ()), *((Atom(rest),) if rest != 1 else ())))
    return Axes(tuple(dims), shifted=True, scaled=True, pinned=True, symbols=scope.primes)


def _same_for_all(scope: Scope, entry: fx.Node, node: fx.Node, along: list[int]) -> bool:
    """Whether a value is that of one sample, repeated, at batch sizes of 1, 2 and 3."""
    nodes = scope.between(entry, node)
    first: torch.Tensor | None = None
    for batch in (1, 2, 3):
        shape = [scope.actual(n, batch) for n in scope.shape(entry)]
        with torch.no_grad():
            value = runner(scope, entry, nodes, batch)(torch.zeros(shape, dtype=torch.float64))
        value = value.movedim(along[0], 0).reshape(batch, -1) if along else value.reshape(1, -1)
        first = value[:1] if first is None else first
        if not torch.equal(value, first.expand_as(value)):
            return False
    return True
