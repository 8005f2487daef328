"""Where a node came from: the user's module and the user's source line."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch import fx

__all__ = ["module_path", "origin", "source_line", "user_frame"]

_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n(?P<code>[^\n]*)')


def origin(node: fx.Node) -> dict[str, Any]:
    """What a node's `meta` tells of where it came from, for a node that takes its place."""
    return {
        key: node.meta[key]
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack")
        if key in node.meta
    }


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the user's module that called `node`; "" for the model itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    entry = next(reversed(stack.values()))
    path = str(entry[0]) if isinstance(entry, tuple) else str(entry)
    if path.startswith("_empty_nn_module_stack"):
        return ""
    for prefix in ("L['self'].", "L['self']"):
        path = path.removeprefix(prefix)
    return re.sub(r"@\d+", "", path)


def source_line(node: fx.Node) -> str:
    """Return the user's line that made `node` (`file.py:12, in forward: x = self.conv(x)`), "" if unknown."""
    return user_frame(str(node.meta.get("stack_trace") or ""))


def user_frame(trace: str) -> str:
    """Return the last frame of a printed stack trace that lies outside of torch, like `source_line`."""
    for frame in reversed(list(_FRAME.finditer(trace))):
        file = frame["file"]
        if not file.startswith(_TORCH_DIR) and not file.startswith(("torch/", "<")):
            code = frame["code"].strip()
            return f"{os.path.basename(file)}:{frame['line']}, in {frame['function']}: {code}"
    return ""
