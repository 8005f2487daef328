"""Example inputs from `--input 1x3x224x224`, `--input 1x16:int64`, `--input ids=1x16:int64`."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from graphsurgery.cli.errors import UsageError, nearest
from graphsurgery.cli.loading import LoadedModel

__all__ = ["InputSpec", "example_inputs", "parse_input", "positional_names"]

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "bool",
    )
}
SYNTAX = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
_NO_EMBEDDING = 8  # integers stay below this where no embedding tells how far they may go
FORM = "1x3x224x224, 1x16:int64 or name=1x16:int64"


@dataclass(frozen=True)
class InputSpec:
    """One `--input`.

    Attributes:
        name: The argument's name; `""` for a positional one.
        shape: Its shape.
        dtype: Its dtype; None where the model's own is meant.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None


def parse_input(text: str) -> InputSpec:
    """Read one `--input`.

    Raises:
        UsageError: It is malformed, a size is zero or the dtype is unknown.
    """
    match = SYNTAX.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"--input '{text}' is not understood; expected {FORM}.")
    shape = tuple(int(size) for size in match["shape"].split("x"))
    if 0 in shape:
        raise UsageError(f"--input '{text}' has a size of 0; every size must be at least 1.")
    dtype = match["dtype"]
    if dtype is not None and dtype not in DTYPES:
        hint = nearest(dtype, DTYPES) or f"; expected one of {', '.join(DTYPES)}."
        raise UsageError(f"--input '{text}' has the unknown dtype '{dtype}'{hint}")
    return InputSpec(match["name"] or "", shape, None if dtype is None else DTYPES[dtype])


def example_inputs(texts: list[str], loaded: LoadedModel | None, spec: str) -> Any:
    """Make the example inputs of a model.

    Args:
        texts: The `--input` options; they replace what the model brings.
        loaded: The model; its first floating parameter gives the default dtype. None for an `.onnx` file.
        spec: How the user named the model, for messages.

    Returns:
        A tuple of tensors, or a mapping where the inputs are named: seeded normal numbers, or for integers
        numbers that are valid indices into every embedding of the model. None where an exported program
        brings both positional and keyword inputs, which only it can hold.

    Raises:
        UsageError: There are none, or some are named and some are not.
    """
    specs = [parse_input(text) for text in texts]
    if not specs:
        if loaded is not None and loaded.program_brings_inputs:
            return None
        if loaded is None or loaded.example_inputs is None:
            raise UsageError(
                f"{spec} brings no example inputs: give --input once per input, e.g. --input 1x3x224x224, "
                "or let the factory return (module, example_inputs)."
            )
        return loaded.example_inputs
    names = [item.name for item in specs if item.name]
    if names and len(names) < len(specs):
        raise UsageError("some --input options have a name and some have none; name all of them or none.")
    if len(set(names)) < len(names):
        raise UsageError(f"--input names '{max(names, key=names.count)}' twice.")
    generator = torch.Generator().manual_seed(0)
    tensors = [_random(item, loaded, generator, text) for item, text in zip(specs, texts, strict=True)]
    return dict(zip(names, tensors, strict=True)) if names else tuple(tensors)


def _random(spec: InputSpec, loaded: LoadedModel | None, generator: torch.Generator, text: str) -> Tensor:
    dtype = spec.dtype or _default_dtype(loaded)
    try:
        if dtype.is_floating_point:
            return torch.randn(spec.shape, generator=generator, dtype=torch.float32).to(dtype)
        high = 2 if dtype is torch.bool else min(_index_limit(loaded), torch.iinfo(dtype).max)
        return torch.randint(0, high, spec.shape, generator=generator).to(dtype)
    except (RuntimeError, TypeError, MemoryError, OverflowError):  # of a size that no machine has
        raise UsageError(
            f"--input '{text}' has {math.prod(spec.shape):,} values, more than fit into memory; expected "
            f"{FORM}."
        ) from None


def positional_names(side: LoadedModel | Path | None, count: int) -> list[str]:
    """Names of the first positional inputs, as the model's `forward` or the ONNX file calls them.

    Their places from 0, where nothing tells.
    """
    found: list[str] = []
    if isinstance(side, Path):
        from graphsurgery.export import input_shapes

        found = list(input_shapes(side))
    elif side is not None and isinstance(side.model, ExportedProgram):
        found = list(side.model.graph_signature.user_inputs)
    elif side is not None and isinstance(side.model, nn.Module):
        found = list(inspect.signature(side.model.forward).parameters)
    return found[:count] if len(found) >= count else [str(position) for position in range(count)]


def _default_dtype(loaded: LoadedModel | None) -> torch.dtype:
    """Dtype of the model's first floating parameter."""
    parameters = loaded.parameters().values() if loaded is not None else ()
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)


def _index_limit(loaded: LoadedModel | None) -> int:
    """Integers below this index every embedding of the model."""
    if loaded is None or not isinstance(loaded.model, nn.Module):
        return _NO_EMBEDDING
    rows = [module.num_embeddings for module in loaded.model.modules() if isinstance(module, nn.Embedding)]
    return max(1, min(rows, default=_NO_EMBEDDING))
