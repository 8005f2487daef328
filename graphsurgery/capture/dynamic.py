"""The caller's `dynamic_shapes`: the names in it, and what is wrong with it, in one sentence."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from graphsurgery.capture.inputs import Inputs

__all__ = ["named_sizes"]


def named_sizes(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> dict[tuple[int, int], str]:
    """Return the names that the caller gave to sizes (`Dim("height")`), by flat input and axis."""
    numbers: dict[int, int] = {}
    for index, leaf in enumerate(pytree.tree_leaves((inputs.args, inputs.kwargs))):
        numbers.setdefault(id(leaf), index)
    return {
        (numbers[id(tensor)], axis): size.__name__
        for tensor, axes in _pairs(_arguments(model, inputs), dynamic_shapes)
        for axis, size in axes.items()
        if isinstance(size, Dim) and id(tensor) in numbers
    }


def _arguments(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    return dict(inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments)


def _pairs(value: Any, spec: Any) -> Iterator[tuple[torch.Tensor, Mapping[int, Any]]]:
    """Each tensor with what `dynamic_shapes` says of its axes."""
    if isinstance(value, torch.Tensor):
        if isinstance(spec, Mapping):
            yield value, spec
        elif isinstance(spec, Sequence):
            yield value, dict(enumerate(spec))
    elif isinstance(value, Mapping):
        specs = spec if isinstance(spec, Mapping) else dict(zip(value, spec or (), strict=False))
        for key, item in value.items():
            yield from _pairs(item, specs.get(key))
    elif isinstance(value, (tuple, list)) and isinstance(spec, (tuple, list)):
        for item, part in zip(value, spec, strict=False):
            yield from _pairs(item, part)
