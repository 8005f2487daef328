"""The caller's `dynamic_shapes`: the names in it, and what is wrong with it, in one sentence."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from graphsurgery.capture.inputs import Inputs
from graphsurgery.errors import CaptureError

__all__ = ["check_dynamic_shapes", "explain", "given_sizes", "of_one"]

_SPECIALIZED = re.compile(
    r"You marked (.+?) as dynamic but your code specialized it to be a constant \((\d+)\)"
)
_UNSATISFIED = re.compile(
    r"Not all values of (.+?) in the specified range.*? satisfy the generated guard (.+)"
)
_EQUAL = re.compile(r"The values of (.+?) and (.+?) must always be equal")
_UNBOUNDED = re.compile(r" and \S+ <= IntInfinity\(\)")
_SIZE = re.compile(r"L\['(\w+)'\]((?:\[[^\]]+\])*)\.size\(\)\[(\d+)\]")


def check_dynamic_shapes(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> None:
    """Refuse `dynamic_shapes` that do not fit the example: other arguments, axes or sizes.

    Raises:
        CaptureError: They do not fit. What is nested otherwise than the inputs is left to torch.
    """
    arguments = _arguments(model, inputs)
    if isinstance(dynamic_shapes, Mapping):
        if dynamic_shapes and set(dynamic_shapes) != set(arguments):
            raise CaptureError(
                f"dynamic_shapes has the keys {list(dynamic_shapes)}, expected the names of all arguments, "
                f"{list(arguments)}; give an argument without free sizes None."
            )
    elif isinstance(dynamic_shapes, (tuple, list)):
        if len(dynamic_shapes) != len(arguments):
            raise CaptureError(
                f"dynamic_shapes has {len(dynamic_shapes)} entries, expected {len(arguments)}, one for each "
                f"of the arguments {list(arguments)}; give an argument without free sizes None."
            )
    elif not hasattr(
        dynamic_shapes, "dynamic_shapes"
    ):  # torch's ShapesCollection and AdditionalInputs have it
        raise CaptureError(
            f"dynamic_shapes is a {type(dynamic_shapes).__name__}, expected a mapping by argument or a tuple "
            "with an entry for each argument, as for torch.export.export."
        )
    known: dict[str, tuple[int, str]] = {}
    for name, value in arguments.items():
        part = _parts(arguments, dynamic_shapes).get(name)
        if isinstance(value, torch.Tensor) and part is not None and not isinstance(part, (Mapping, Sequence)):
            raise CaptureError(
                f"dynamic_shapes has {part!r} for {name!r}, expected a mapping from axes to sizes, such as "
                "{0: Dim.DYNAMIC}, or None."
            )
        for tensor, axes in _pairs(value, part):
            _check_axes(name, tensor, axes)
            for axis, size in axes.items():
                if isinstance(size, Dim):
                    _check_named(size, tensor.shape[axis], f"axis {axis} of {name!r}", known)


def _check_named(size: Any, found: int, what: str, known: dict[str, tuple[int, str]]) -> None:
    """Check that a `Dim` or a multiple of one is what the example has, here and where it stands else."""
    root, of_root = getattr(size, "root", size), getattr(size, "fn", int)
    offset = of_root(0)
    value, rest = divmod(found - offset, of_root(1) - offset)
    if rest:
        raise CaptureError(
            f"dynamic_shapes has {size.__name__!r} for {what}, which is {found} in the example; pass an "
            "example of such a size."
        )
    other, where = known.setdefault(root.__name__, (value, what))
    if other != value:
        raise CaptureError(
            f"dynamic_shapes gives {root.__name__!r} to {where} and to {what}, but in the example it is "
            f"{other} by the one and {value} by the other; sizes of one name are equal, so pass such an "
            "example or another name."
        )


def _check_axes(name: str, tensor: torch.Tensor, axes: Mapping[Any, Any]) -> None:
    rank = tensor.dim()
    for axis, size in axes.items():
        if not isinstance(axis, int) or not 0 <= axis < rank:
            raise CaptureError(
                f"dynamic_shapes names axis {axis!r} of {name!r}, which has {rank} axes in the example "
                f"({tuple(tensor.shape)}); axes are counted from 0."
            )
        found, what = tensor.shape[axis], f"axis {axis} of {name!r}"
        if isinstance(size, int) and size != found:
            raise CaptureError(
                f"dynamic_shapes fixes {what} at {size}, but it is {found} in the example; pass an example "
                "of that size, or a Dim."
            )
        if size is not None and not isinstance(size, (int, Dim, type(Dim.AUTO))):
            raise CaptureError(
                f"dynamic_shapes has {size!r} for {what}, expected a Dim, Dim.DYNAMIC, Dim.AUTO, a number or "
                "None."
            )
        low, high = getattr(size, "min", None), getattr(size, "max", None)
        if (low is not None and found < low) or (high is not None and found > high):
            called = f"{size.__name__!r}" if isinstance(size, Dim) else "the size"
            limit = f"at least {low}" if low is not None and found < low else f"at most {high}"
            raise CaptureError(
                f"dynamic_shapes has {called} of {limit} for {what}, which is {found} in the example; pass "
                "an example within the range, or widen it."
            )


def of_one(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> str | None:
    """Return, where sizes that should be free are 1 in the example, a clause that says so; or None.

    torch.export takes a size of 1 for a constant, whatever the model does with it.
    """
    leaves = pytree.tree_leaves((inputs.args, inputs.kwargs))
    ones = [
        f"{size.__name__!r}" if isinstance(size, Dim) else f"axis {axis} of input {index}"
        for (index, axis), size in given_sizes(model, inputs, dynamic_shapes).items()
        if isinstance(leaves[index], torch.Tensor) and leaves[index].shape[axis] == 1
    ]
    if not ones:
        return None
    return (
        f"{', '.join(dict.fromkeys(ones))} should be free and is 1 in the example, which torch.export takes "
        "for a constant; pass an example in which it is 2 or more"
    )


def explain(error: BaseException) -> str | None:
    """Return what torch.export found wrong with `dynamic_shapes`, and what to do, as two clauses; or None."""
    text = str(error)
    fixes = text.partition("Suggested fixes:")[2].strip().partition("\n\n")[0]
    suggested = f" (torch suggests {', '.join(line.strip() for line in fixes.splitlines())})" if fixes else ""
    for pattern, clause in (
        (_SPECIALIZED, "the model fixes {0} at {1}; leave it out of dynamic_shapes, or give it Dim.AUTO"),
        (_UNSATISFIED, "the model takes those values of {0} alone where {1}; narrow its Dim"),
        (_EQUAL, "the model needs that {0} and {1} are the same; give both the same Dim"),
    ):
        found = pattern.search(text)
        if found:
            return clause.format(*(_readable(group) for group in found.groups())) + suggested
    return None


def _readable(text: str) -> str:
    """Write `L['x'].size()[1]` as `x.shape[1]`, and leave out a bound that is none."""
    text = _UNBOUNDED.sub("", text)
    return _SIZE.sub(r"\1\2.shape[\3]", text).strip().rstrip(".")


def given_sizes(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> dict[tuple[int, int], Any]:
    """Return what the caller gave for sizes (`Dim("height")`), by flat argument and axis (0 of a number)."""
    if dynamic_shapes is None:
        return {}
    numbers: dict[int, int] = {}
    for index, leaf in enumerate(pytree.tree_leaves((inputs.args, inputs.kwargs))):
        numbers.setdefault(id(leaf), index)
    arguments = _arguments(model, inputs)
    return {
        (numbers[id(tensor)], axis): size
        for tensor, axes in _pairs(arguments, _parts(arguments, dynamic_shapes))
        for axis, size in axes.items()
        if isinstance(size, (Dim, type(Dim.AUTO))) and id(tensor) in numbers
    }


def _arguments(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return the arguments by name, as torch does.

    Raises:
        CaptureError: They are not those of `forward`; a hook in front of it may change them.
    """
    try:
        return dict(inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments)
    except (TypeError, ValueError) as error:
        raise CaptureError(
            f"dynamic_shapes cannot be matched with the arguments of {type(model).__name__}.forward "
            f"({error}); pass the inputs that forward itself names."
        ) from error


def _parts(arguments: Mapping[str, Any], dynamic_shapes: Any) -> Mapping[str, Any]:
    if isinstance(dynamic_shapes, Mapping):
        return dynamic_shapes
    given = dynamic_shapes if isinstance(dynamic_shapes, (tuple, list)) else ()
    return dict(zip(arguments, given, strict=False))


def _pairs(value: Any, spec: Any) -> Iterator[tuple[torch.Tensor, Mapping[int, Any]]]:
    """Each tensor with what `dynamic_shapes` says of its axes."""
    if isinstance(value, torch.Tensor):
        if isinstance(spec, Mapping):
            yield value, spec
        elif isinstance(spec, Sequence):
            yield value, dict(enumerate(spec))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _pairs(item, spec.get(key) if isinstance(spec, Mapping) else None)
    elif isinstance(value, (tuple, list)) and isinstance(spec, (tuple, list)):
        for item, part in zip(value, spec, strict=False):
            yield from _pairs(item, part)
