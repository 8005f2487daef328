"""Other sizes than the example's, where heights, widths or lengths are free.

Up to three runs: all free sizes smaller, all larger, and, where there are two or more, some smaller and some
larger (a swap of height and width shows there). Odd sizes come first, as rounding of halves shows there;
where they are refused, half and twice the example's size are tried, which networks take that halve their maps
again and again, and each one less by one, which may be all that a range allows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphsurgery.errors import VerificationError
from graphsurgery.verify.inputs import Batch, Inputs, filled

__all__ = ["SizeAxes", "merged_axes", "resized", "size_axes_of", "size_runs"]

_LINEAR = re.compile(r"(?:(?P<factor>\d+)\*)?(?P<name>[A-Za-z_]\w*)(?: ?\+ ?(?P<offset>\d+))?")

SizeAxes = Mapping[str, Sequence[tuple[int, int, int, int]]]
"""Free sizes by name: the axes that each one sets, as leaf, axis (-1 for a number), factor and offset."""


def size_axes_of(example: Inputs, free: Mapping[Any, Mapping[int, Any]]) -> SizeAxes:
    """Return free sizes that a caller names, `{0: {2: "height", 3: "width"}}` or `{"ids": {1: "length"}}`.

    Args:
        example: The example inputs.
        free: By position among the tensors or by keyword: axis and name (anything with a `__name__`, as
            `torch.export.Dim`, or text). Equal names are equal sizes.

    Raises:
        VerificationError: There is no such input or axis, or sizes of one name differ in the example.
    """
    leaves, names = example.leaves(), example.names()
    tensors = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    found: dict[str, list[tuple[int, int, int, int]]] = {}
    for which, axes in free.items():
        position = names.index(which) if which in names else which
        if not isinstance(position, int) or not 0 <= position < len(tensors):
            known = ", ".join(repr(name) for name in names if name) or f"0 to {len(tensors) - 1}"
            raise VerificationError(f"free_sizes names the input {which!r}, expected one of {known}")
        leaf = leaves[tensors[position]]
        for axis, name in axes.items():
            if not isinstance(axis, int) or not 0 <= axis < leaf.ndim:
                raise VerificationError(
                    f"free_sizes names axis {axis!r} of input {which!r}, which has {leaf.ndim} axes in the "
                    f"example ({list(leaf.shape)}); axes are counted from 0"
                )
            found.setdefault(str(getattr(name, "__name__", name)), []).append((tensors[position], axis, 1, 0))
    for name, places in found.items():
        sizes = sorted({int(leaves[leaf].shape[axis]) for leaf, axis, *_ in places})
        if len(sizes) > 1:
            raise VerificationError(
                f"free_sizes gives the name {name!r} to axes of the sizes {sizes} in the example; equal "
                "names are equal sizes"
            )
    return found


def merged_axes(example: Inputs, declared: Sequence[Sequence[tuple[int | str | None, ...]]]) -> SizeAxes:
    """Return the sizes that are free in every program that declares its inputs' shapes, but for axis 0.

    Args:
        example: The example inputs.
        declared: For each program the shapes of its inputs: numbers, names of free sizes (`height`, or
            `4*height + 1` of a size that is made of one), or None for a free size without a name. One that
            has other inputs than the example is left aside.
    """
    leaves = example.leaves()
    tensors = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    ranks = [leaves[index].ndim for index in tensors]
    shapes = [shapes for shapes in declared if [len(shape) for shape in shapes] == ranks]
    batches = {shape[0] for program in shapes for shape in program if shape and isinstance(shape[0], str)}
    found: dict[str, list[tuple[int, int, int, int]]] = {}
    for position, index in enumerate(tensors):
        for axis in range(1, leaves[index].ndim):
            names = [program[position][axis] for program in shapes]
            if not names or any(isinstance(name, int) or name in batches for name in names):
                continue
            # Without names, sizes that are equal in the example may have to be.
            size = leaves[index].shape[axis]
            own = [_made_of(name) for name in names if isinstance(name, str)] or [(f"size {size}", 1, 0)]
            name, factor, offset = max(own, key=lambda made: made[1:])  # what the strictest program takes
            found.setdefault(name, []).append((index, axis, factor, offset))
    # One name for axes that differ in the example is another program's word for something else.
    return {
        name: places
        for name, places in found.items()
        if len({_base(leaves[leaf].shape[axis], *made) for leaf, axis, *made in places}) == 1
    }


def _made_of(text: str) -> tuple[str, int, int]:
    """Return name, factor and offset of `4*height + 1`; any other text is a name."""
    made = _LINEAR.fullmatch(text)
    return (
        (text, 1, 0) if made is None else (made["name"], int(made["factor"] or 1), int(made["offset"] or 0))
    )


def _base(size: int, factor: int, offset: int) -> float:
    return (size - offset) / factor


def resized(
    example: Inputs, axes: SizeAxes, sizes: Mapping[str, int], generator: torch.Generator
) -> Inputs | None:
    """Return noise like the example with other sizes, integers cut or repeated; None where a size is none."""
    leaves = example.leaves()
    touched: set[int] = set()
    for name, size in sizes.items():
        for index, axis, factor, offset in axes[name]:
            wanted = factor * size + offset
            if wanted < 1:
                return None
            if axis < 0:
                leaves[index] = wanted
                continue
            leaf = leaves[index]
            order = torch.arange(wanted, device=leaf.device) % max(leaf.shape[axis], 1)
            leaves[index] = leaf.index_select(axis, order)
            touched.add(index)
    for index in sorted(touched):
        leaves[index] = filled(leaves[index], leaves[index], generator)
    return example.replace(leaves)


def size_runs(example: Inputs, axes: SizeAxes, seed: int = 0) -> list[list[Batch]]:
    """Return the runs at other sizes: for each, what to try, the first that the reference takes.

    Args:
        example: The example inputs.
        axes: The free sizes.
        seed: Seed of the noise.
    """
    known = {name: _size_in(example, places) for name, places in axes.items()}
    base = {name: size for name, size in known.items() if size}
    if not base:
        return []
    small = [{name: _odd_below(size) for name, size in base.items()}]
    small += [{name: max(1, size // 2) for name, size in base.items()}]
    small += [base | {name: size - 1} for name, size in base.items() if size > 1]
    large = [{name: (size + max(2, size // 4)) | 1 for name, size in base.items()}]
    large += [{name: 2 * size for name, size in base.items()}]
    mixed = [
        {name: (a if i % 2 else b)[name] for i, name in enumerate(base)}
        for a, b in ((small[0], large[0]), (small[1], large[1]), (base, large[1]))
    ]
    generator = torch.Generator().manual_seed(seed + 1)
    seen: list[dict[str, int]] = [base]
    slots: list[list[Batch]] = []
    for wanted in (small, large, mixed if len(base) > 1 else []):
        tried: list[Batch] = []
        for sizes in wanted:
            inputs = None if sizes in seen else resized(example, axes, sizes, generator)
            if inputs is not None:
                seen.append(sizes)
                text = ", ".join(f"{name}={size}" for name, size in sizes.items())
                tried.append(Batch(inputs, (text,), False, "sizes"))
        slots += [tried] if tried else []
    return slots


def _odd_below(size: int) -> int:
    """Return an odd size near three fifths of another; the size itself where there is none."""
    return max(1, (3 * size // 5) | 1) if size > 2 else size


def _size_in(example: Inputs, places: Sequence[tuple[int, int, int, int]]) -> int | None:
    leaves = example.leaves()
    for index, axis, factor, offset in places:
        found = leaves[index].shape[axis] if axis >= 0 else leaves[index]
        return (int(found) - offset) // factor
    return None
