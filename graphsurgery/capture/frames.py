"""Stack traces of captured calls down to the user's own line.

`torch.export` keeps the frames of functions called `forward` alone, so a call made in a helper
(`_forward_impl` of torchvision, an attention function of transformers) would be said to come from the line
that calls the helper.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from traceback import FrameSummary, StackSummary

import torch
from torch.fx.proxy import TracerBase

__all__ = ["helper_frames"]

_NOT_THE_USERS = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(os.path.dirname(__file__)) + os.sep,
    os.path.dirname(os.__file__) + os.sep + "contextlib.py",
    "<",
)


@contextlib.contextmanager
def helper_frames() -> Iterator[None]:
    """Let traces keep, below the first `forward`, all frames outside of torch and this package."""
    right = getattr(TracerBase, "_filter_traceback_frames", None)
    if right is None:  # a torch that filters otherwise; its own choice of frames is good enough
        yield
        return

    def wider(self: TracerBase, stack: StackSummary) -> StackSummary:
        kept: list[FrameSummary] = list(right(self, stack))
        if not kept:
            return StackSummary.from_list(kept)
        known = {id(frame) for frame in kept}
        first = next((at for at, frame in enumerate(stack) if id(frame) in known), len(stack))
        return StackSummary.from_list(
            [
                frame
                for at, frame in enumerate(stack)
                if id(frame) in known or (at > first and not frame.filename.startswith(_NOT_THE_USERS))
            ]
        )

    # torch.export takes no filter of the caller's, so its own is exchanged for the time of one capture; mypy
    # takes every exchange of a method for an error.
    TracerBase._filter_traceback_frames = wider  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        TracerBase._filter_traceback_frames = right  # type: ignore[method-assign]
