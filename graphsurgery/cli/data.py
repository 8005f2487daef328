"""The user's own data from `--data file.npz` or `--data folder` of `.npy` files; no pickle is ever loaded."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphsurgery.cli.errors import UsageError, first_line
from graphsurgery.cli.inputs import positional_names
from graphsurgery.cli.loading import LoadedModel

__all__ = ["Batches", "read_data"]

_ROWS = 32  # read at once; of a folder no more is read than is run


def read_data(path: Path, examples: Any, side: LoadedModel | Path | None) -> Batches:
    """Return batches of inputs in the structure of the example.

    Args:
        path: An `.npz` file of arrays called as the model's inputs, or a folder of `.npy` files called so;
            axis 0 of each counts the samples. An only array may have any name; `arr_0`, `arr_1` and `0`, `1`
            stand for positions. Arrays of other names (labels) come behind the inputs.
        examples: The example inputs: a tensor, a tuple or a mapping.
        side: Where the names of positional inputs come from; None where nothing tells.

    Raises:
        UsageError: The file cannot be read, or its arrays do not fit the inputs.
    """
    arrays = _arrays(path)
    named = isinstance(examples, Mapping)
    several = list(examples) if isinstance(examples, tuple | list) else [examples]
    given = list(examples.values()) if named else several
    if not all(isinstance(value, torch.Tensor) for value in given):
        raise UsageError("--data needs inputs that are tensors, one array for each; this model has others.")
    names = list(examples) if named else positional_names(side, len(given))
    keys = [_key(arrays, name, position, len(given)) for position, name in enumerate(names)]
    missing = [name for name, key in zip(names, keys, strict=True) if key is None]
    if missing:
        raise UsageError(
            f"--data {path} has no array for the input {missing[0]!r}: found {', '.join(arrays)}, expected "
            f"{', '.join(names)}."
        )
    chosen = {key: arrays[key] for key in keys if key is not None}
    counts = {key: len(array) if array.ndim else 0 for key, array in chosen.items()}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        told = ", ".join(f"{key} {count}" for key, count in counts.items())
        raise UsageError(
            f"--data {path} has different numbers of samples, or none, on axis 0 of its arrays ({told}); "
            "expected the same number, at least 1."
        )
    for key, array, like in zip(chosen, chosen.values(), given, strict=True):
        _fits(path, key, array, like)
    rest = {key: array for key, array in arrays.items() if key not in chosen}
    whole = next(iter(chosen.values())).ndim > given[0].ndim
    columns = {**dict(zip(names if named else chosen, chosen.values(), strict=True)), **rest}
    return Batches(columns, next(iter(counts.values())), named, whole)


@dataclass(frozen=True)
class Batches:
    """Rows of arrays as inputs, each time from the start.

    Attributes:
        columns: The arrays.
        count: Samples.
        named: Whether inputs are keywords.
        whole: Whether a sample is a whole input, as the example has no batch dimension.
    """

    columns: dict[str, Any]
    count: int
    named: bool
    whole: bool

    def __iter__(self) -> Iterator[Any]:
        step = 1 if self.whole else _ROWS
        for start in range(0, self.count, step):
            where: Any = start if self.whole else slice(start, start + step)
            parts = {
                name: np.array(array[where]) for name, array in self.columns.items() if len(array) > start
            }
            yield parts if self.named else tuple(parts.values())


def _arrays(path: Path) -> dict[str, Any]:
    try:
        if path.is_dir():
            files = sorted(path.glob("*.npy"))
            found = {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in files}
        elif path.suffix == ".npz" and path.is_file():
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                found = {name: archive[name] for name in archive.files}
        else:
            raise UsageError(
                f"--data {path} is no folder and no .npz file; expected an .npz file with an array for each "
                "input, or a folder of .npy files called as the inputs."
            )
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        pickled = "allow_pickle" in str(error)
        what = "pickled objects are not loaded" if pickled else first_line(error)
        raise UsageError(f"--data {path} cannot be read: {what}; save plain arrays of numbers.") from error
    if not found:
        raise UsageError(f"--data {path} holds no arrays; expected one for each input.")
    return found


def _key(arrays: Mapping[str, Any], name: str, position: int, count: int) -> str | None:
    if count == 1 and len(arrays) == 1:
        return next(iter(arrays))
    return next((key for key in (name, f"arr_{position}", str(position)) if key in arrays), None)


def _fits(path: Path, key: str, array: Any, like: torch.Tensor) -> None:
    where = f"the array {key!r} of --data {path}"
    if array.dtype.kind not in "biufc":
        raise UsageError(f"{where} is {array.dtype}, expected numbers.")
    wanted = str(like.dtype).removeprefix("torch.")
    if str(array.dtype) != wanted:
        raise UsageError(f"{where} is {array.dtype}, expected {wanted} as the example; save it so.")
    if array.ndim not in (like.ndim, like.ndim + 1):
        raise UsageError(
            f"{where} has shape {list(array.shape)}, expected (samples, ...) around inputs of shape "
            f"{list(like.shape)}."
        )
    if array.dtype.kind in "fc":
        count = int(np.isnan(array).sum())
        if count:
            raise UsageError(f"{where} holds {count} NaN, on which nothing can be compared; clean the data.")
