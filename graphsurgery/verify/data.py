"""The caller's own data as runs of a verification: read from any iterable, held against the example.

An item of the iterable is what the model is called with, as the example is: a tensor, a tuple or list of
arguments, or a mapping of keywords, all with a batch dimension where the example has one. A DataLoader is
such an iterable. Where the example tells fewer inputs than an item holds, what comes behind them (labels) is
left out, and a note says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphsurgery.errors import VerificationError
from graphsurgery.verify.inputs import Batch, Inputs

__all__ = ["Data", "DataRuns", "data_limit_for", "leading_rows"]

_FLOPS_OF_DATA = 80e9
"""Floating point operations that one pass over the data may cost: some seconds on two cores in float64."""

_FEWEST, _MOST = 8, 256
_ROWS_PER_RUN = 32
"""Samples run at once where the batch is free; more would only take more memory."""


def data_limit_for(flops: float) -> int:
    """Return how many samples to run when one of them costs `flops` operations: 8 to 256."""
    return int(max(_FEWEST, min(_MOST, _FLOPS_OF_DATA // max(flops, 1.0))))


@dataclass(frozen=True)
class DataRuns:
    """What was taken of the data.

    Attributes:
        batches: The runs; cases are called `data[0]`, `data[1]` and so on.
        samples: Rows of the data in them; runs, where inputs have no common leading dimension.
        notes: Sentences for the verdict.
    """

    batches: tuple[Batch, ...]
    samples: int
    notes: tuple[str, ...]


class Data:
    """An iterable of inputs that can be read more than once: what was read of an iterator is kept.

    Args:
        items: Inputs, batch by batch: a list, a generator, a DataLoader.
        limit: The greatest number of samples that are run; None chooses by the cost of one.

    Raises:
        ValueError: The limit is below 1.
        VerificationError: `items` is no iterable of inputs: a tensor, a mapping, a path.
    """

    def __init__(self, items: Iterable[Any], limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"data_limit must be at least 1, got {limit}; leave data out to run none")
        if isinstance(items, Tensor | np.ndarray | Mapping | str | bytes) or not isinstance(items, Iterable):
            raise VerificationError(
                f"data is a {type(items).__name__}, expected an iterable of inputs, each as the example is "
                "(a list of tensors, a DataLoader); put a single batch in a list"
            )
        self.limit = limit
        self._items = items
        self._source: Iterator[Any] | None = None
        self._read: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        if self._source is None:
            self._source = iter(self._items)
        position = 0
        while True:
            if position == len(self._read):
                try:
                    self._read.append(next(self._source))
                except StopIteration:
                    return
            yield self._read[position]
            position += 1

    def check(self, example: Inputs) -> None:
        """Hold the first item against the example, before any work is done.

        Raises:
            VerificationError: There is none, or it does not fit.
        """
        every = [(i, axis) for i, x in enumerate(example.leaves()) for axis in range(getattr(x, "ndim", 0))]
        _like(example, self._first(), 0, {*every}, (), {})

    def _first(self) -> Any:
        for item in self:
            return item
        raise VerificationError(_NONE)

    def runs(
        self,
        example: Inputs,
        *,
        limit: int,
        rows: Sequence[int] | None = None,
        free_axes: Collection[tuple[int, int]] = (),
        batch: int | None = None,
    ) -> DataRuns:
        """Return the first samples as runs.

        Args:
            example: The caller's example inputs, which the items must be like.
            limit: The greatest number of samples, unless `self.limit` gives one.
            rows: Leaves whose axis 0 is the batch; None for those of the leading size of the first tensor.
                Without any, an item is a run and counts as one sample.
            free_axes: Leaf and axis of other sizes that may differ from the example's.
            batch: Rows of each run, the last one filled up with its own first rows; None where any number
                will do, and each row is a case of its own.

        Raises:
            VerificationError: There are no items, or one does not fit: structure, shape, dtype, NaN.
        """
        limit = self.limit or limit
        rows = leading_rows(example) if rows is None else tuple(rows)
        allowed = {*free_axes, *((leaf, 0) for leaf in rows)}
        notes: dict[str, None] = {}
        taken: list[Inputs] = []
        count, whole = 0, True
        for number, item in enumerate(self):
            if count >= limit:
                whole = False
                break
            found = _like(example, item, number, allowed, rows, notes)
            size = _rows_of(found, rows)
            if size > limit - count:
                found, size, whole = _cut(found, rows, 0, limit - count), limit - count, False
            taken += [found] if size else []
            count += size
        if count == 0:
            raise VerificationError(_NONE)
        batches = _grouped(_joined(taken, rows), rows, batch)
        left = "" if whole else ", the first of them: data_limit sets how many"
        what = "sample" if rows else "input"
        notes[f"ran on {count} {what}{'s' * (count != 1)} of the caller's data beside the battery{left}"] = (
            None
        )
        return DataRuns(tuple(batches), count, tuple(notes))


_NONE = (
    "the data hold no samples: expected an iterable of at least one batch of inputs; an iterator that was "
    "read to its end before gives no more"
)


def leading_rows(example: Inputs) -> tuple[int, ...]:
    """Return the leaves whose leading size is that of the first tensor that has one: rows are samples."""
    leaves = example.leaves()
    size = next((x.shape[0] for x in leaves if isinstance(x, Tensor) and x.ndim and x.shape[0]), None)
    return tuple(
        index
        for index, x in enumerate(leaves)
        if isinstance(x, Tensor) and x.ndim and size is not None and x.shape[0] == size
    )


# -- one item beside the example


def _like(
    example: Inputs,
    item: Any,
    number: int,
    allowed: set[tuple[int, int]],
    rows: Sequence[int],
    notes: dict[str, None],
) -> Inputs:
    """Return an item in the structure of the example.

    Raises:
        VerificationError: It does not fit.
    """
    found = _call(example, item, number, notes)
    wanted, given = example.leaves(), [_tensor(leaf) for leaf in found.leaves()]
    plain = example.replace([0] * len(wanted)), found.replace([0] * len(given))
    if (plain[0].args, plain[0].kwargs) != (plain[1].args, plain[1].kwargs):
        raise VerificationError(
            f"item {number} of the data is nested in another way than the example: got {_words(found)}, "
            f"expected {_words(example)}"
        )
    sizes: dict[str, int] = {}
    for index, (like, leaf) in enumerate(zip(wanted, given, strict=True)):
        if isinstance(like, Tensor):
            given[index] = _fitting(like, leaf, f"input {index} of item {number} of the data", index, allowed)
            if index in rows:
                sizes[f"input {index}"] = int(given[index].shape[0])
    if len(set(sizes.values())) > 1:
        text = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise VerificationError(
            f"the inputs of item {number} of the data have different numbers of rows ({text}), expected one "
            "batch size, as in the example"
        )
    return example.replace(given)


def _call(example: Inputs, item: Any, number: int, notes: dict[str, None]) -> Inputs:
    if isinstance(item, Inputs):
        return item
    keywords, count = dict(example.kwargs or {}), len(example.args)
    where = f"item {number} of the data"
    if isinstance(item, Mapping) and not (
        count == 1 and not keywords and isinstance(example.args[0], Mapping)
    ):
        if not keywords or count:
            raise VerificationError(
                f"{where} is a mapping of {_listed(item)}, but the example has {count} positional inputs; "
                "give items as tuples, or the example as a mapping"
            )
        missing = [name for name in keywords if name not in item]
        if missing:
            raise VerificationError(
                f"{where} lacks {', '.join(map(repr, missing))}: got {_listed(item)}, the example has "
                f"{_listed(keywords)}"
            )
        extra = [str(name) for name in item if name not in keywords]
        if extra:
            notes[f"of the data {', '.join(extra)} was left out, as the example has {_listed(keywords)}"] = (
                None
            )
        return Inputs((), {name: item[name] for name in keywords})
    if keywords:
        if count == 0 and len(keywords) == 1 and isinstance(item, Tensor | np.ndarray):
            return Inputs((), {next(iter(keywords)): item})
        raise VerificationError(
            f"{where} is a {type(item).__name__}, expected a mapping of {_listed(keywords)} as the example is"
        )
    if count == 1 and (not isinstance(item, tuple | list) or _same_kind(example.args[0], item)):
        return Inputs((item,))
    if not isinstance(item, tuple | list):
        raise VerificationError(
            f"{where} is a {type(item).__name__}, expected a tuple of {count} inputs as the example is"
        )
    if len(item) < count:
        raise VerificationError(f"{where} has {len(item)} inputs, expected {count} as the example has")
    if len(item) > count:
        last = "the last" if len(item) == count + 1 else f"the last {len(item) - count}"
        notes[
            f"{last} of the {len(item)} values of each item of the data was left out as a label, as the "
            f"example has {count} input{'s' if count != 1 else ''}"
        ] = None
    return Inputs(tuple(item[:count]))


def _same_kind(like: Any, item: Any) -> bool:
    """Whether an only argument that is a list itself is what an item is."""
    return isinstance(like, tuple | list) and len(like) == len(item)


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(repr(str(name)) for name in names) or "nothing"


def _words(inputs: Inputs) -> str:
    def shape(leaf: Any) -> str:
        return str(list(leaf.shape)) if isinstance(leaf, Tensor | np.ndarray) else type(leaf).__name__

    return f"{len(inputs.leaves())} values ({', '.join(shape(leaf) for leaf in inputs.leaves())})"


def _tensor(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        if leaf.dtype.hasobject or leaf.dtype.kind in "USVmM":
            raise VerificationError(f"the data hold an array of dtype {leaf.dtype}, expected numbers")
        return torch.from_numpy(np.ascontiguousarray(leaf).copy())
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _fitting(like: Tensor, leaf: Any, where: str, index: int, allowed: set[tuple[int, int]]) -> Tensor:
    if not isinstance(leaf, Tensor):
        raise VerificationError(
            f"{where} is a {type(leaf).__name__}, expected a tensor of shape {list(like.shape)}"
        )
    if leaf.dtype != like.dtype:
        raise VerificationError(
            f"{where} is {_dtype(leaf)}, expected {_dtype(like)} as in the example; cast the data as the "
            "model's callers do"
        )
    sizes: list[Any] = list(like.shape)
    if leaf.ndim == like.ndim:
        sizes = ["any" if (index, axis) in allowed else size for axis, size in enumerate(sizes)]
    if leaf.ndim != like.ndim or any(
        wanted not in ("any", size) for wanted, size in zip(sizes, leaf.shape, strict=True)
    ):
        advice = ""
        if leaf.ndim == like.ndim - 1:
            advice = "; items are batches: use a DataLoader, or unsqueeze(0)"
        text = ", ".join(map(str, sizes))
        raise VerificationError(
            f"{where} has shape {list(leaf.shape)}, expected [{text}] as in the example{advice}"
        )
    if leaf.is_floating_point() or leaf.is_complex():
        count = int(leaf.isnan().sum())
        if count:
            raise VerificationError(
                f"{where} holds {count} NaN among {leaf.numel()} values, on which nothing can be compared; "
                "clean the data, or leave that item out"
            )
    return leaf.to(like.device)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# -- rows


def _rows_of(inputs: Inputs, rows: Sequence[int]) -> int:
    return int(inputs.leaves()[rows[0]].shape[0]) if rows else 1


def _cut(inputs: Inputs, rows: Sequence[int], start: int, stop: int) -> Inputs:
    leaves = inputs.leaves()
    for index in rows:
        leaves[index] = leaves[index][start:stop]
    return inputs.replace(leaves)


def _joined(taken: list[Inputs], rows: Sequence[int]) -> list[Inputs]:
    """Return items of one kind as one, where all that they hold is rows."""
    alike: dict[tuple[Any, ...], list[Inputs]] = {}
    for number, item in enumerate(taken):
        leaves = item.leaves()
        whole = bool(rows) and all(i in rows for i, x in enumerate(leaves) if isinstance(x, Tensor))
        parts = [tuple(x.shape[1:]) if isinstance(x, Tensor) else repr(x) for x in leaves]
        alike.setdefault(tuple(parts) if whole else (number,), []).append(item)
    found = []
    for items in alike.values():
        if len(items) == 1:  # it may hold a scalar, which cannot be joined
            found += items
            continue
        columns = zip(*(item.leaves() for item in items), strict=True)
        leaves = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
        found.append(items[0].replace(leaves))
    return found


def _grouped(taken: list[Inputs], rows: Sequence[int], size: int | None) -> list[Batch]:
    """Return runs: items as they come in parts, or, with `size`, of that many rows each."""
    runs: list[Batch] = []
    first = 0
    for item in taken:
        whole = _rows_of(item, rows)
        step = (size or _ROWS_PER_RUN) if rows else 1
        for start in range(0, whole, step):
            stop = min(start + step, whole)
            part = _cut(item, rows, start, stop) if rows else item
            names = tuple(f"data[{first + row}]" for row in range(start, stop))
            if size is not None and stop - start < size:
                part = _filled(part, rows, size)
                names += tuple(names[row % len(names)] for row in range(size - len(names)))
            # Only where the batch is free is a row known to be a case of its own.
            stacked = bool(rows) and size is None
            runs.append(
                Batch(
                    part, names if stacked else (_span(names),), stacked, "data", stop - start if rows else 1
                )
            )
        first += whole
    return runs


def _span(names: Sequence[str]) -> str:
    return names[0] if len(set(names)) == 1 else f"{names[0]}..{list(dict.fromkeys(names))[-1]}"


def _filled(inputs: Inputs, rows: Sequence[int], size: int) -> Inputs:
    leaves = inputs.leaves()
    for index in rows:
        leaves[index] = leaves[index][torch.arange(size) % leaves[index].shape[0]]
    return inputs.replace(leaves)
