"""What a program returns, as named tensors, and its containers in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphsurgery.errors import VerificationError

__all__ = ["Outputs", "flatten_outputs", "structure_text"]

Outputs = dict[str, Tensor]
"""Outputs by name, in order, on the CPU."""


def flatten_outputs(found: Any) -> Outputs:
    """Return the tensors of a nested output by name, in order, on the CPU.

    A lone tensor is called "output"; others by their path ("logits", "0", "features.1"), with "#2" and so on
    behind a name that another path has too (the keys 1 and "1"). None is left out, plain numbers become
    tensors without dimensions.

    Raises:
        VerificationError: A leaf is neither a tensor nor a number.
    """
    outputs: Outputs = {}
    for path, leaf in pytree.tree_flatten_with_path(found)[0]:
        name = known = ".".join(_key_text(key) for key in path) or "output"
        if leaf is None:
            continue
        if isinstance(leaf, bool | int | float | complex):
            leaf = torch.tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else None)
        if not isinstance(leaf, Tensor):
            raise VerificationError(
                f"output {name!r} is a {type(leaf).__name__}; verify compares tensors and numbers in tuples, "
                "lists, dictionaries and classes that torch.utils._pytree knows"
            )
        count = 1
        while name in outputs:  # else one of the two would be compared, and the other lost
            count += 1
            name = f"{known}#{count}"
        outputs[name] = leaf.detach().to("cpu")
    return outputs


def structure_text(found: Any) -> str:
    """Return a nested output in words: containers by class and key, None, and "value" for all else.

    The lists and dictionaries of a `torch.fx` graph count as plain ones.
    """
    level = pytree.tree_flatten_with_path(found, is_leaf=lambda part: part is not found)[0]
    if len(level) == 1 and not level[0][0]:
        return "None" if found is None else "value"
    kind = type(found).__name__.removeprefix("immutable_")
    keyed = not isinstance(found, list) and type(found) is not tuple
    parts = [f"{_key_text(path[0])}: " * keyed + structure_text(part) for path, part in level]
    return f"{kind}({', '.join(parts)})"


def _key_text(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
