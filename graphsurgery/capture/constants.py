"""Tensors that a forward makes of plain numbers keep their values while it is traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._subclasses import fake_tensor

__all__ = ["known_constants"]

_MOST_VALUES = 1024


@contextmanager
def known_constants() -> Iterator[None]:
    """Let a choice that hangs on constants alone be made while torch.export traces.

    torch knows the value of a constant of one number only. `torchvision.transforms.Normalize` makes a tensor
    of its three deviations on each call and raises where one is zero; without their values that is a choice
    which depends on data. The values are written in the model, so what is traced holds for every input.
    """
    before = fake_tensor.CONSTANT_NUMEL_LIMIT  # torch has no option for it
    fake_tensor.CONSTANT_NUMEL_LIMIT = max(before, _MOST_VALUES)
    try:
        yield
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT = before
