"""How candidates are timed: what `cost="measured"` stands for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphsurgery.cost import MEASURED
from graphsurgery.errors import PassError
from graphsurgery.measure.timing import Timer

__all__ = ["MeasuredCost", "measured_cost"]


@dataclass(frozen=True)
class MeasuredCost:
    """Settings of the measurement; give an instance as `cost` instead of `"measured"`.

    Attributes:
        threads: Threads inside of one operator of onnxruntime; 0 leaves it to onnxruntime, as a session
            without options does.
        blocks: Blocks of interleaved runs, at least five. Of five all must be faster, as two equal programs
            are once in 32 times; nine are enough for a sign test that lets one of them go.
        cache: File that keeps the times; None for `timings.json` in the user's cache directory (the
            environment variable `GRAPHSURGERY_TIMINGS` names another, or says `off`), False for none.
        timer: What times two cuts; None for onnxruntime.

    Raises:
        PassError: One of them makes no sense.
    """

    threads: int = 0
    blocks: int = 9
    cache: Path | str | bool | None = None
    timer: Timer | None = field(default=None, repr=False)

    name = MEASURED

    def __post_init__(self) -> None:
        """Check the settings."""
        for option, least in (("threads", 0), ("blocks", 5)):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise PassError(f"{option} of MeasuredCost is a number of at least {least}, got {value!r}")
        if self.cache is True or not isinstance(self.cache, (Path, str, bool, type(None))):
            raise PassError(f"cache of MeasuredCost is a path, None or False, got {self.cache!r}")
        if not (self.timer is None or callable(self.timer)):
            raise PassError(
                f"timer of MeasuredCost is None or what is called as graphsurgery.measure.Timer says, got "
                f"{self.timer!r}"
            )


def measured_cost(cost: Any) -> MeasuredCost | None:
    """The settings, where `cost` asks for measurement; None for all else."""
    if isinstance(cost, MeasuredCost):
        return cost
    return MeasuredCost() if isinstance(cost, str) and cost == MEASURED else None
