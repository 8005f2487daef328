"""Example inputs: their normal form, which of them carry the batch, and comparing outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphsurgery.errors import CaptureError

__all__ = ["Inputs", "difference", "normalize", "refuse_nan"]


@dataclass(frozen=True)
class Inputs:
    """Example inputs as a call: positional and keyword arguments, tensors detached."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map_tensors(self, change: Any) -> Inputs:
        """Return a copy with `change(tensor)` in place of every tensor."""

        def leaf(value: Any) -> Any:
            return change(value) if isinstance(value, torch.Tensor) else value

        args, kwargs = pytree.tree_map(leaf, (self.args, self.kwargs))
        return Inputs(args, kwargs)

    def fresh(self) -> Inputs:
        """Return a copy whose tensors the model may write into."""
        return self.map_tensors(lambda tensor: tensor.clone())

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors in flat order."""
        return [
            leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)
        ]

    def batch(self) -> int | None:
        """Return the leading size of the first tensor that has one, else None."""
        return next((tensor.shape[0] for tensor in self.tensors() if tensor.dim() > 0), None)

    def carriers(self) -> list[int]:
        """Return the positions (among `tensors()`) of those whose leading size is the batch."""
        batch = self.batch()
        return [i for i, tensor in enumerate(self.tensors()) if tensor.dim() > 0 and tensor.shape[0] == batch]

    def with_batch(self, size: int, carriers: list[int]) -> Inputs:
        """Return a copy in which the carriers have `size` samples: the first ones, repeated where too few."""
        chosen = {id(tensor) for i, tensor in enumerate(self.tensors()) if i in carriers}

        def resize(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in chosen:
                return tensor
            repeats = -(-size // max(tensor.shape[0], 1))
            return torch.cat([tensor] * repeats)[:size] if repeats > 1 else tensor[:size].clone()

        return self.map_tensors(resize)

    def describe(self) -> str:
        """Return the shapes and dtypes for a message, e.g. `2x3x224x224 float32`."""
        parts = []
        for tensor in self.tensors():
            shape = "x".join(str(size) for size in tensor.shape) or "scalar"
            parts.append(f"{shape} {str(tensor.dtype).removeprefix('torch.')}")
        return ", ".join(parts) or "no tensors"


def normalize(example_inputs: Any) -> Inputs:
    """Turn a tensor, a tuple or list of positional inputs, or a mapping of keyword inputs into a call.

    A call that is `Inputs` already, with both kinds of arguments, is taken as it is.

    Raises:
        CaptureError: It is none of these.
    """

    def detach(value: Any) -> Any:
        return value.detach() if isinstance(value, torch.Tensor) else value

    if isinstance(example_inputs, Inputs):
        return example_inputs.map_tensors(detach)
    if isinstance(example_inputs, torch.Tensor):
        return Inputs((example_inputs.detach(),), {})
    if isinstance(example_inputs, Mapping):
        wrong = [key for key in example_inputs if not isinstance(key, str)]
        if wrong:
            raise CaptureError(
                f"a mapping of example inputs is taken as keyword arguments, but has the key {wrong[0]!r}; "
                "wrap it in a tuple to pass it as one positional argument."
            )
        return Inputs((), {key: pytree.tree_map(detach, value) for key, value in example_inputs.items()})
    if isinstance(example_inputs, (tuple, list)):
        return Inputs(tuple(pytree.tree_map(detach, value) for value in example_inputs), {})
    raise CaptureError(
        "example inputs are a tensor, a tuple of positional inputs or a mapping of keyword inputs, "
        f"got {type(example_inputs).__name__}."
    )


def refuse_nan(inputs: Inputs) -> None:
    """Refuse example inputs on which nothing could be compared; infinities are let through, as in masks.

    Raises:
        CaptureError: A tensor holds NaN, or is sparse or quantised.
    """
    for tensor in inputs.tensors():
        if tensor.layout is not torch.strided or tensor.is_quantized:
            kind = tensor.dtype if tensor.is_quantized else tensor.layout
            raise CaptureError(
                f"an example input is a sparse or quantised tensor ({kind}), expected a dense one; "
                "densify it first, and let the model take it so."
            )
        if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        count = int(torch.isnan(tensor if tensor.is_complex() else tensor.float()).sum())
        if count:
            shape = "x".join(str(size) for size in tensor.shape) or "scalar"
            raise CaptureError(
                f"the example inputs hold NaN ({count} of {tensor.numel()} values of the {shape} one), on "
                "which no output can be compared; pass inputs that the model is meant for."
            )


def difference(expected: Any, actual: Any) -> str | None:
    """Return a clause that tells how `actual` differs from `expected`, of any structure; None if they agree.

    The same operations in the same order are compared, so the allowance is only for another memory layout or
    kernel: the square root of the dtype's epsilon, relative to the largest finite value.
    """
    left, left_spec = pytree.tree_flatten(expected)
    right, right_spec = pytree.tree_flatten(actual)
    if len(left) != len(right) or left_spec != right_spec:
        return f"its outputs have the structure {right_spec}, expected {left_spec}"
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            if isinstance(a, torch.Tensor) is not isinstance(b, torch.Tensor) or _unequal(a, b):
                return f"output {index} is {b!r}, expected {a!r}"
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {index} is {tuple(b.shape)} {b.dtype}, expected {tuple(a.shape)} {a.dtype}"
        if torch.equal(a, b) or a.numel() == 0:
            continue
        if not (a.is_floating_point() or a.is_complex()):
            return f"output {index} differs in {int((a != b).sum())} of {a.numel()} values"
        finite = torch.isfinite(a)
        if not torch.equal(torch.nan_to_num(a[~finite]), torch.nan_to_num(b[~finite])):
            return f"output {index} has NaN or infinity in other places"
        if not finite.any():
            continue
        error = (a[finite] - b[finite]).abs().max()
        scale = a[finite].abs().max()
        if not error <= torch.finfo(a.dtype).eps ** 0.5 * scale:
            return f"output {index} differs by {error.item():.3g} at a magnitude of {scale.item():.3g}"
    return None


def _unequal(a: Any, b: Any) -> bool:
    try:
        return bool(a != b) and not (a != a and b != b)
    except (TypeError, ValueError, RuntimeError):
        return False  # an object that cannot be compared is passed through by the graph, not computed
