"""What the programs are run on: the example, and a seeded battery of inputs made after its likeness.

A battery holds, in order of importance (a dear model gets fewer, see `samples_for`):

1. `example`    the caller's own input
2. `normal`     normal noise with the mean and the deviation of the example
3. `impulses`   zero, but for seeded values at corners, borders and centre: paddings and border maps show here
4. `large`      normal noise, 2^10 times as large (2^3 in float16, whose range is short)
5. `zeros`      what remains is the shift, f(0)
6. `tiny`       normal noise, 2^-10 times as large
7. `constant`   the same value everywhere: normalisations amplify the rounding there
8. `example[1]` the second row of the example if it has one, else `normal[1]`

Integer and boolean inputs (token ids, masks) are drawn uniformly between the least and the greatest value of
the example for the cases of noise, and kept as they are elsewhere, so no id leaves the range that the caller
showed.

Where the batch is free, the rows of a run are its cases. Floating-point inputs without a batch dimension (a
temperature, a table) have their own values in the run of the example, and noise as in `normal` in each later
run; integers without one stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphsurgery.errors import VerificationError

__all__ = ["CASES", "Batch", "Inputs", "as_inputs", "batch_size", "battery", "filled", "samples_for"]

CASES = ("example", "normal", "impulses", "large", "zeros", "tiny", "constant", "example[1]")
"""The cases of a full battery, most important first."""

_FLOPS_PER_PASS = 40e9
"""Floating point operations that one pass over the battery may cost: some seconds on two cores in float64."""

_FEWEST = 3
_NOISE_CASES = frozenset({"normal", "large", "tiny", "example[1]"})


@dataclass(frozen=True)
class Inputs:
    """One call of a model: positional and keyword arguments, any nesting of tensors and plain values."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def leaves(self) -> list[Any]:
        """Return the flat arguments, positional first, in the order in which ONNX export names them."""
        return pytree.tree_leaves((self.args, dict(self.kwargs or {})))

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the leaves."""
        return [leaf for leaf in self.leaves() if isinstance(leaf, Tensor)]

    def names(self) -> list[str | None]:
        """Return, for each tensor leaf, the keyword it was given by; None if positional or nested."""
        flat, _ = pytree.tree_flatten_with_path((self.args, dict(self.kwargs or {})))
        found: list[str | None] = []
        for path, leaf in flat:
            if isinstance(leaf, Tensor):
                keyword = len(path) == 2 and getattr(path[0], "idx", None) == 1
                found.append(str(getattr(path[1], "key", "")) if keyword else None)
        return found

    def replace(self, leaves: list[Any]) -> Inputs:
        """Return the same structure around other leaves."""
        spec = pytree.tree_structure((self.args, dict(self.kwargs or {})))
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return Inputs(args, kwargs)


@dataclass(frozen=True)
class Batch:
    """Inputs of one run.

    Attributes:
        inputs: The arguments.
        cases: Names of the cases in it: one per row if `stacked`, else one for the whole run.
        stacked: Whether the rows are cases of their own (dynamic batch).
        kind: "battery", "sizes" (the battery's noise at other sizes) or "data" (the caller's own).
        samples: Of the caller's data, how many samples it holds.
    """

    inputs: Inputs
    cases: tuple[str, ...]
    stacked: bool
    kind: str = "battery"
    samples: int = 0


def as_inputs(inputs: object) -> Inputs:
    """Return example inputs in one form: a tensor, a tuple or list of arguments, or a mapping of keywords.

    Raises:
        VerificationError: There is no tensor among them.
    """
    if isinstance(inputs, Inputs):
        found = inputs
    elif isinstance(inputs, Mapping):
        found = Inputs((), dict(inputs))
    elif isinstance(inputs, tuple | list):
        found = Inputs(tuple(inputs))
    else:
        found = Inputs((inputs,))
    leaves = [_as_tensor(leaf) for leaf in found.leaves()]
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise VerificationError(
            "verify needs at least one example tensor to run on, got none; "
            "pass a tensor, a tuple of arguments or a mapping of keyword arguments"
        )
    return found.replace(leaves)


def _as_tensor(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return torch.from_numpy(leaf.copy())
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def samples_for(flops: float) -> int:
    """Return how many cases to run when one of them costs `flops` floating point operations: 3 to 8."""
    return int(max(_FEWEST, min(len(CASES), _FLOPS_PER_PASS // max(flops, 1.0))))


def battery(
    example: Inputs,
    *,
    dynamic_batch: bool,
    samples: int = len(CASES),
    seed: int = 0,
    refused: Collection[int] = (),
    axes: Sequence[tuple[int, int, int, int]] | None = None,
) -> tuple[Batch, ...]:
    """Return the runs of a battery.

    Args:
        example: The caller's inputs.
        dynamic_batch: Whether the leading dimension is free. Then the cases are rows of runs at
            different batch sizes, the example alone at batch 1. Else each case is one run with the example's
            shapes.
        samples: Number of cases, at least 1; the first ones of `CASES`.
        seed: Seed of the generator; the global one is not touched.
        refused: Of the batch sizes 1 to 16 those not to run. If 1 is among them, each case is one run with
            the example's shapes, but for the third, which has another batch size where there is one.
        axes: The sizes that change with the batch: leaf, axis (-1 for a leaf that is a number), factor and
            offset of `size = factor * batch + offset`. Where one of them is not the batch as it stands on
            axis 0 (twice the batch, a square mask), rows cannot be cut, and it is as if 1 were refused. None
            stands for axis 0 of all tensors whose leading size is that of the first one.
    """
    cases = CASES[: max(1, samples)]
    generator = torch.Generator().manual_seed(seed)
    if axes is None:
        axes = _equal_axes(example)
    size = _batch_of(example, axes) if dynamic_batch else None
    if size is None or 1 in refused or any(place[1:] != (0, 1, 0) for place in axes):
        made = [_whole(example, case, generator) for case in cases]
        if size is not None and len(made) > 2:
            made[2] = _whole(_other_batch(example, axes, size, refused), cases[2], generator)
        return tuple(Batch(inputs, (case,), False) for case, inputs in zip(cases, made, strict=True))
    chosen = {leaf for leaf, *_ in axes}
    batched = [index in chosen for index in range(len(example.leaves()))]
    rows = [_row(example, case, size, batched, generator) for case in cases]
    return tuple(Batch(_stack(rows[a:b], batched), cases[a:b], True) for a, b in _splits(len(rows), refused))


def _splits(rows: int, refused: Collection[int] = ()) -> list[tuple[int, int]]:
    """Return the bounds of runs of different batch sizes, one of them 1: 8 cases are runs of 1, 2 and 5."""
    ends = [[0, 1, middle, rows] for middle in (3, *range(4, rows)) if rows >= 6] + [[0, 1, rows]]
    for choice in [*ends, list(range(rows + 1))]:
        found = [(a, b) for a, b in itertools.pairwise(choice) if a < b]
        if not any(b - a in refused for a, b in found):
            return found
    return []


def _other_batch(
    example: Inputs, axes: Sequence[tuple[int, int, int, int]], size: int, refused: Collection[int]
) -> Inputs:
    """Return the example at another batch size from 2 to 16, if there is one that is not refused."""
    others = [other for other in range(2, 17) if other != size and other not in refused]
    if not others:
        return example
    leaves = example.leaves()
    for index, axis, factor, offset in axes:
        leaf, wanted = leaves[index], factor * others[0] + offset
        if wanted < 0:
            return example
        if axis >= 0:
            leaves[index] = leaf.index_select(
                axis, torch.arange(wanted, device=leaf.device) % max(leaf.shape[axis], 1)
            )
        else:
            leaves[index] = wanted
    return example.replace(leaves)


def batch_size(inputs: Inputs) -> int | None:
    """Return the leading size of the first tensor that has one."""
    return next(
        (int(tensor.shape[0]) for tensor in inputs.tensors() if tensor.ndim and tensor.shape[0]), None
    )


def _equal_axes(inputs: Inputs) -> list[tuple[int, int, int, int]]:
    """Return axis 0 of each tensor whose leading size is that of the first one that has one."""
    size = batch_size(inputs)
    return [
        (index, 0, 1, 0)
        for index, leaf in enumerate(inputs.leaves())
        if isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == size
    ]


def _batch_of(inputs: Inputs, axes: Sequence[tuple[int, int, int, int]]) -> int | None:
    """Return the batch that the sizes tell; None where there is none, or no sample."""
    leaves = inputs.leaves()
    for index, axis, factor, offset in axes:
        size = leaves[index].shape[axis] if axis >= 0 else leaves[index]
        return (int(size) - offset) // factor or None
    return None


def _stack(rows: list[Inputs], batched: list[bool]) -> Inputs:
    columns = zip(*(row.leaves() for row in rows), strict=True)
    leaves = [torch.cat(column) if free else column[0] for column, free in zip(columns, batched, strict=True)]
    return rows[0].replace(leaves)


def _row(example: Inputs, case: str, size: int, batched: list[bool], generator: torch.Generator) -> Inputs:
    leaves = []
    for leaf, free in zip(example.leaves(), batched, strict=True):
        if not free:
            varies = case != "example" and isinstance(leaf, Tensor) and leaf.is_floating_point()
            leaves.append(_fill(leaf, leaf, "normal", generator) if varies else leaf)
            continue
        second = case == "example[1]" and size > 1
        row = leaf[1:2] if second else leaf[:1]
        leaves.append(row if second or case == "example" else _fill(row, leaf, case, generator))
    return example.replace(leaves)


def _whole(example: Inputs, case: str, generator: torch.Generator) -> Inputs:
    if case == "example":
        return example
    leaves = example.leaves()
    return example.replace([_fill(x, x, case, generator) if isinstance(x, Tensor) else x for x in leaves])


def filled(like: Tensor, example: Tensor, generator: torch.Generator) -> Tensor:
    """Return noise of the shape of `like` with the statistics of `example`; integers as in `like`."""
    return _fill(like, example, "normal", generator) if like.is_floating_point() else like


def _fill(like: Tensor, example: Tensor, case: str, generator: torch.Generator) -> Tensor:
    """Return a tensor of the shape and dtype of `like`, with the statistics of `example`, for one case."""
    if like.is_complex() or like.is_quantized or like.layout != torch.strided:
        return like
    if not like.is_floating_point():
        return _fill_integers(like, example, case, generator)
    mean, deviation = _statistics(example)
    level = max(abs(mean), deviation)
    if case == "zeros":
        values = torch.zeros(like.shape, dtype=torch.float64)
    elif case == "constant":
        values = torch.full(like.shape, level, dtype=torch.float64)
    elif case == "impulses":
        values = _impulses(like.shape, level, generator)
    else:
        noise = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        values = (noise * deviation + mean) * _magnitude(case, like.dtype)
    return values.to(device=like.device, dtype=like.dtype)


def _fill_integers(like: Tensor, example: Tensor, case: str, generator: torch.Generator) -> Tensor:
    if case not in _NOISE_CASES or example.numel() == 0:
        return like
    low = int(example.min())
    high = min(int(example.max()), torch.iinfo(torch.int64).max - 1)  # the bound of randint is one more
    drawn = torch.randint(min(low, high), high + 1, like.shape, generator=generator, dtype=torch.int64)
    return drawn.to(device=like.device, dtype=like.dtype)


def _magnitude(case: str, dtype: torch.dtype) -> float:
    exponent = 3 if dtype == torch.float16 else 10
    return {"large": 2.0**exponent, "tiny": 2.0**-exponent}.get(case, 1.0)


def _statistics(example: Tensor) -> tuple[float, float]:
    """Return mean and deviation of the finite values; 0 and 1 where they say nothing."""
    values = example.detach().to("cpu", torch.float64).flatten()
    values = values[values.isfinite()]
    if values.numel() == 0:
        return 0.0, 1.0
    mean, deviation = float(values.mean()), float(values.std(correction=0))
    if deviation == 0.0:
        return mean, abs(mean) or 1.0
    return mean, deviation


def _impulses(shape: torch.Size, level: float, generator: torch.Generator) -> Tensor:
    """Return zeros with values of about `level` at corners, mid-borders and centre of the last three axes."""
    values = torch.zeros(shape, dtype=torch.float64)
    spots = [sorted({0, size // 2, size - 1}) for size in shape[1:][-3:] if size]
    if values.numel() == 0 or not spots:
        return values
    grid = torch.cartesian_prod(*(torch.tensor(spot) for spot in spots)).reshape(-1, len(spots))
    drawn = torch.randn((*values.shape[: values.ndim - len(spots)], len(grid)), generator=generator)
    index: Any = (Ellipsis, *grid.unbind(1))
    values[index] = (drawn.sign() * (0.5 + drawn.abs())).to(torch.float64) * level
    return values
