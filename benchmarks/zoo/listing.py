"""All networks of the zoo, small ones first."""

from __future__ import annotations

from zoo import adapters, media, pictures, text
from zoo.entry import Entry

__all__ = ["entries"]


def entries() -> list[Entry]:
    """Every network of the sweep; names are unique."""
    return [*adapters.entries(), *text.entries(), *media.entries(), *pictures.entries()]
