"""The names in an ONNX file: of its outputs, and of the sizes that are free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import onnx_ir

from graphsurgery.errors import ExportError

__all__ = ["file_outputs", "name_sizes"]

_SYMBOL = re.compile(r"^[A-Za-z_]\w*$")


def file_outputs(
    inputs: Sequence[str], outputs: Sequence[str], returned: Sequence[object]
) -> tuple[str, ...]:
    """Return the names of the outputs in the file: the model's, with `_out` behind that of an input.

    `{"x": f(x)}` is a usual module, but a name stands for one value in an ONNX graph. A None is no output of
    the file, and its name goes with it.

    Args:
        inputs: Names of the model's flat inputs.
        outputs: Names of its flat outputs; none where they are not known.
        returned: What stands at each of these: the name of a value, or a constant.

    Raises:
        ExportError: A number is among the outputs, or there are more or fewer names than outputs.
    """
    if outputs and len(outputs) != len(returned):
        raise ExportError(f"{len(outputs)} names ({', '.join(outputs)}) for {len(returned)} outputs")
    taken, names = {*inputs, *outputs}, []
    for name, value in zip(outputs, returned, strict=False):
        if value is None:
            continue
        if not isinstance(value, str):
            raise ExportError(f"its output {name!r} is the number {value}, and a file returns tensors alone")
        fresh = name
        while name in inputs and fresh in taken:
            fresh += "_out"
        taken.add(fresh)
        names.append(fresh)
    return tuple(names)


def name_sizes(model: onnx_ir.Model, given: Mapping[tuple[str, int], str], *, batched: bool) -> bool:
    """Name the free sizes, everywhere.

    Args:
        model: The model.
        given: What sizes are called, by the input's name and the axis: `height`, or `4*height`.
        batched: Whether the leading one of the first input is the batch. Without a name of its own it is
            called `batch`, others by their input and axis (`image_dim2`).

    Returns:
        Whether there is a batch: a free leading dimension.
    """
    names: dict[str, str] = {}
    symbols = [
        (value.name or "", axis, dim.value)
        for value in model.graph.inputs
        for axis, dim in enumerate(value.shape or ())
        if isinstance(dim, onnx_ir.SymbolicDim) and dim.value and _SYMBOL.match(dim.value)
    ]
    batch = next((symbol for _, axis, symbol in symbols if axis == 0), None) if batched else None
    for name, axis, symbol in symbols:
        if (name, axis) in given:
            names.setdefault(symbol, given[name, axis])
    if batch is not None:
        names.setdefault(batch, "batch")
    for name, axis, symbol in symbols:
        names.setdefault(symbol, f"{name}_dim{axis}")
    if names:
        pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
        values = [*model.graph.inputs, *model.graph.outputs]
        values += [out for node in model.graph.all_nodes() for out in node.outputs]
        for value in {id(value): value for value in values}.values():
            shape = None if value.shape is None else value.shape.copy()  # some are frozen: of unbind's pieces
            for axis, dim in enumerate(shape or ()):
                if isinstance(dim, onnx_ir.SymbolicDim) and dim.value and pattern.search(dim.value):
                    shape[axis] = _renamed(dim.value, pattern, names)  # type: ignore[index]
            value.shape = shape
    return batch is not None


def _renamed(size: str, pattern: re.Pattern[str], names: Mapping[str, str]) -> str:
    """Write a size with other names; `n//4` of `n = 4*height` is `height`."""
    if size in names:
        return names[size]
    if all(_SYMBOL.match(names[symbol]) for symbol in pattern.findall(size)):
        return pattern.sub(lambda found: names[found[0]], size)
    text = pattern.sub(lambda found: f"({names[found[0]]})", size)
    return onnx_ir.SymbolicDim(text).simplify().value or text
