"""Free sizes from `--dynamic x.2=height`, `--dynamic ids.1=sequence:2..512`, `--dynamic 0.3=32*w`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.export import Dim, ExportedProgram

from graphsurgery.cli.errors import UsageError, nearest
from graphsurgery.cli.inputs import positional_names
from graphsurgery.cli.loading import LoadedModel

__all__ = ["free_sizes"]

SYNTAX = re.compile(
    r"(?P<input>\w+)\.(?P<axis>\d+)=(?:(?P<factor>\d+)\*)?(?P<name>[A-Za-z_]\w*)"
    r"(?::(?P<low>\d*)\.\.(?P<high>\d*))?"
)
FORM = "INPUT.AXIS=NAME, as 0.2=height, ids.1=sequence:2..512 or 0.2=32*h"


def free_sizes(texts: Sequence[str], inputs: Any, loaded: LoadedModel, spec: str) -> Any:
    """Read the `--dynamic` options.

    Args:
        texts: `INPUT.AXIS=NAME`, each: an input's name, or its place from 0 where inputs are positional; its
            axis; the name of the size in the ONNX file. Equal names are equal sizes; `32*NAME` are multiples,
            and `:LOW..HIGH` is the range of NAME, of which either end may be left out.
        inputs: The example inputs.
        loaded: The model.
        spec: How the user named the model, for messages.

    Returns:
        `dynamic_shapes` as for `torch.export.export`; None where no option was given.

    Raises:
        UsageError: An option is not of that form, names no input that is a tensor or gives a size again; or
            the model is an exported program, which has its free sizes already.
    """
    if not texts:
        return None
    if isinstance(loaded.model, ExportedProgram):
        raise UsageError(
            f"{spec} has the free sizes with which it was exported; leave out --dynamic, or give the model "
            "that it was made from."
        )
    places = (inputs,) if isinstance(inputs, Tensor) else inputs
    named = inputs if isinstance(inputs, Mapping) else {str(place): x for place, x in enumerate(places)}
    also = {} if named is inputs else dict(zip(positional_names(loaded, len(named)), named, strict=True))
    wanted: dict[str, dict[int, tuple[int, str]]] = {name: {} for name in named}
    sizes: dict[str, Any] = {}
    for text in texts:
        match = _match(text)
        name, axis, size, factor = (
            str(also.get(match["input"], match["input"])),
            int(match["axis"]),
            match["name"],
            int(match["factor"] or 1),
        )
        if not isinstance(named.get(name), Tensor):
            tensors = [key for key, value in named.items() if isinstance(value, Tensor)]
            tensors += [key for key, place in also.items() if place in tensors and key != place]
            raise UsageError(
                f"--dynamic '{text}': {name} is no input that is a tensor{nearest(name, tensors)}; expected "
                f"one of {', '.join(tensors) or 'none, as the inputs are nested'}."
            )
        if axis in wanted[name]:
            raise UsageError(f"--dynamic '{text}': axis {axis} of input {name} has a size already.")
        if not factor:
            raise UsageError(f"--dynamic '{text}': a multiple of 0 is no size.")
        wanted[name][axis] = (factor, size)
        if size not in sizes or match["low"] is not None:
            sizes[size] = _dim(match, text, sizes.get(size))
    shapes = {
        name: {axis: _times(factor, sizes[size]) for axis, (factor, size) in axes.items()} or None
        for name, axes in wanted.items()
    }
    return shapes if isinstance(inputs, Mapping) else tuple(shapes.values())


def _times(factor: int, size: Any) -> Any:
    return size if factor == 1 else factor * size  # a multiple by one is another size to torch.export


def _match(text: str) -> re.Match[str]:
    match = SYNTAX.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"--dynamic '{text}' is not understood; expected {FORM}.")
    return match


def _dim(match: re.Match[str], text: str, other: Any) -> Any:
    """The size that an option names, with its range."""
    low, high = (int(match[end]) if match[end] else None for end in ("low", "high"))
    if low is not None and high is not None and low >= high:
        raise UsageError(f"--dynamic '{text}': the range holds less than two sizes, so that none is free.")
    size = Dim(match["name"], min=low, max=high)
    if other is not None and (other.min, other.max) != (size.min, size.max):
        raise UsageError(f"--dynamic '{text}': {match['name']} has another range already; give it once.")
    return size
