"""The rule of einsum: a product of one value with constants, axis by axis as the equation says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from graphsurgery.affine.atoms import Atom, Axes, NoFold
from graphsurgery.affine.rules import Step, pinned, rule
from graphsurgery.affine.rules_linear import fresh

Label = str | int  # a letter, or an axis of the ellipsis counted from the end: -1 is its last


@rule("einsum")
def einsum(step: Step) -> Axes:
    """A product with constants.

    Labels of the value that the output lacks are consumed; those that a constant has too are varied; labels
    of constants alone are new features.
    """
    operands: Any = step.argument(1, "tensors")
    shapes = [step.shape(operand) for operand in operands]
    terms, output = labels(str(step.argument(0, "equation")), [len(shape) for shape in shapes])
    if any(len(set(term)) != len(term) for term in terms):
        raise NoFold("unsupported", "an einsum that reads a diagonal is not followed")
    which = next(i for i, operand in enumerate(operands) if operand is step.live)
    others: dict[Label, int] = {}
    for i, (term, shape) in enumerate(zip(terms, shapes, strict=True)):
        if i != which:
            for label, size in zip(term, shape, strict=True):
                others[label] = max(size, others.get(label, 1))
    axes = replace(step.axes, scaled=True)
    index = {label: i for i, label in enumerate(terms[which])}
    for label, i in index.items():
        if label not in output:
            axes = axes.consume(axes.dims[i])
        elif others.get(label, 1) != 1 and shapes[which][i] != 1:
            axes = pinned(axes.vary(i))
    dims: list[tuple[Atom, ...]] = []
    for label in output:
        dim = axes.dims[index[label]] if label in index else ()
        # A dimension of size one meets all coordinates of a constant.
        grown = label not in index or shapes[which][index[label]] == 1
        dims.append(dim + fresh(others.get(label, 1)) if grown else dim)
    return axes.with_dims(dims)


def labels(equation: str, ranks: Sequence[int]) -> tuple[list[tuple[Label, ...]], tuple[Label, ...]]:
    """The labels of each operand of an einsum, and those of its output.

    Args:
        equation: such as `...ij,jk->...ik`; without an arrow the output has all labels that occur once.
        ranks: the number of dimensions of each operand.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    free = [
        rank - len(term.replace("...", "")) if "..." in term else 0
        for term, rank in zip(terms, ranks, strict=True)
    ]
    read = [_expand(term, n) for term, n in zip(terms, free, strict=True)]
    if not arrow:
        counts = Counter(letter for term in terms for letter in term if letter != ".")
        right = "..." + "".join(sorted(letter for letter, n in counts.items() if n == 1))
    return read, _expand(right, max(free))


def _expand(term: str, free: int) -> tuple[Label, ...]:
    if "..." not in term:
        return tuple(term)
    before, after = term.split("...")
    return (*before, *range(-free, 0), *after)
