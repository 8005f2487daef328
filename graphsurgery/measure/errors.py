"""Why a candidate has no times."""

from __future__ import annotations

__all__ = ["NotMeasured"]


class NotMeasured(Exception):
    """A stretch that could not be cut out, written or run; the sentence says why. It stays as it is."""
