"""What a module is called with: whether it is plain, its form without sizes, and calls of their own.

Plain are tensors, numbers, text, None, devices and dtypes in tuples, lists and dictionaries; a graph can be
called with these. Anything else (a cache that grows, a list class of the model's own) cannot be a graph's.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphsurgery.capture.inputs import Inputs

__all__ = [
    "NotPlainError",
    "comparable",
    "form_of",
    "free_of_history",
    "merged",
    "own_copy",
    "size",
    "tensors_in",
]

_FIXED = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


class NotPlainError(TypeError):
    """A value that no graph can take or return; the message is the name of its class."""


def form_of(value: Any) -> str:
    """Return a nested value in words, all but the sizes of its tensors: `(float32[4], scale=2)`.

    Two calls of one form can be calls of one graph, where their sizes may differ.

    Raises:
        NotPlainError: There is something in it that is no tensor, number, text or plain container.
    """
    if type(value) in (Tensor, nn.Parameter, nn.Buffer):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind}[{value.ndim}]" + ("" if value.device.type == "cpu" else f" on {value.device}")
    if type(value) in _FIXED:
        return repr(value)
    if isinstance(value, torch.Size):
        return f"Size{tuple(value)}"
    if type(value) in (tuple, list) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        inner = ", ".join(form_of(item) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"{type(value).__name__}({inner})"
    if isinstance(value, (dict, OrderedDict)):
        inner = ", ".join(f"{key!r}: {form_of(item)}" for key, item in value.items())
        return f"{type(value).__name__}{{{inner}}}"
    raise NotPlainError(type(value).__name__)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a nested value, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def size(inputs: Inputs) -> int:
    """Return how many numbers the tensors of a call hold."""
    return sum(tensor.numel() for tensor in inputs.tensors())


def merged(args: Inputs, kwargs: Mapping[str, Any] | None) -> Inputs:
    """Return a call with further keyword arguments, detached.

    Raises:
        ValueError: One of them is given twice.
    """
    twice = sorted(set(args.kwargs) & set(kwargs or {}))
    if twice:
        raise ValueError(f"the keyword argument {twice[0]!r} is given in args and in kwargs; give it once")
    given = Inputs(args.args, {**args.kwargs, **(kwargs or {})})
    return given.map_tensors(lambda tensor: tensor.detach())


def own_copy(inputs: Inputs) -> Inputs:
    """Return a copy of a call that the model may write into: tensors cloned, objects (a cache) copied."""

    def leaf(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)

    args, kwargs = pytree.tree_map(leaf, (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs)


def free_of_history(tensors: Iterable[Any]) -> dict[int, Any]:
    """Return a memo for `copy.deepcopy`, which declines tensors that autograd has made (`weight_norm`)."""
    made = [value for value in tensors if isinstance(value, Tensor) and value.grad_fn is not None]
    return {id(value): value.detach().clone() for value in made}


def comparable(value: Any, seen: frozenset[int] = frozenset()) -> Any:
    """Return what can be compared of a result: of objects (a cache) the tensors and numbers in them."""
    if isinstance(value, (Tensor, bool, int, float, complex)) or value is None:
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    if id(value) in seen:
        return None
    inside = seen | {id(value)}
    if isinstance(value, Mapping):
        return {str(key): comparable(item, inside) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [comparable(item, inside) for item in value]
    if isinstance(value, (str, type, nn.Module)) or not hasattr(value, "__dict__"):
        return None
    return {name: comparable(item, inside) for name, item in vars(value).items()}
