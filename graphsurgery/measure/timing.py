"""Two cuts timed side by side, and when one of them is faster for certain."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from graphsurgery.errors import GraphSurgeryError
from graphsurgery.export import export_onnx, latency_ms
from graphsurgery.measure.cut import Cut
from graphsurgery.measure.errors import NotMeasured

__all__ = ["MARGIN", "OnnxTimer", "Timer", "Timing", "clearly_faster", "not_undone"]

_BLOCK_MS = 60.0
"""Time of one file in one block, about."""

_LARGEST = 2**31 - 2**24
"""Bytes of weights of a cut; above that a file needs a second one for them, and the disk is what is timed."""


@dataclass(frozen=True)
class Timing:
    """Times of two cuts in blocks of interleaved runs.

    Attributes:
        before_ms: Median time of a run of the first cut in each block.
        after_ms: The same of the second.
    """

    before_ms: tuple[float, ...]
    after_ms: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Second by first, block by block."""
        return tuple(b / a for a, b in zip(self.before_ms, self.after_ms, strict=True))

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)

    def reversed(self) -> Timing:
        """The same with the cuts exchanged."""
        return Timing(self.after_ms, self.before_ms)


class Timer(Protocol):
    """What times two cuts."""

    def __call__(self, before: Cut, after: Cut, threads: int, blocks: int) -> Timing:
        """Time both in `blocks` blocks, with so many threads in an operator (0: onnxruntime's default).

        Raises:
            NotMeasured: One of them cannot be run.
        """


MARGIN = 0.02
"""Least gain of a candidate that is worth a change of the network."""


def clearly_faster(timing: Timing) -> bool:
    """Whether a candidate, the second cut, is faster than the first beyond the chances of a coin.

    A sign test: all blocks but one of every nine are faster (of nine blocks so many are by chance in 10 of
    512 cases, 2 %), and the median gains `MARGIN`. A machine that slows down in one block slows both cuts,
    and an outlier weighs no more than any other block. What is not clear stays as it was.
    """
    slower = sum(ratio >= 1 for ratio in timing.ratios)
    return timing.ratio < 1 - MARGIN and slower <= len(timing.ratios) // 9


def not_undone(timing: Timing) -> bool:
    """Whether the network with all winners is faster than the one without.

    Each of them has passed the sign test by itself; asked is only whether they lose together what they won
    apart. So the median has to be below 1 and two thirds of the blocks.
    """
    slower = sum(ratio >= 1 for ratio in timing.ratios)
    return timing.ratio < 1 and slower <= len(timing.ratios) // 3


@dataclass(frozen=True)
class _Info:
    """A cut as export takes it: static."""

    input_names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output_names: tuple[str, ...] = ()
    dynamic_batch: bool = False


class OnnxTimer:
    """Times cuts on onnxruntime; every block opens both files anew, as memory lies otherwise each time."""

    def __init__(self) -> None:
        """Make a folder for the files, which is removed with this object."""
        self._folder = Path(tempfile.mkdtemp(prefix="graphsurgery-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._failed: dict[str, str] = {}

    def __call__(self, before: Cut, after: Cut, threads: int, blocks: int) -> Timing:
        """See `Timer`."""
        files = [self._file(before), self._file(after)]
        feeds: dict[str, Any] = {}
        for made in (before, after):
            feeds |= {self._input(made, i): x for i, x in enumerate(made.inputs)}
        try:
            first = latency_ms(files, feeds, 3, threads=threads)
            repeats = max(3, min(50, int(_BLOCK_MS / max(*first, 1e-3))))
            pairs = [latency_ms(files, feeds, repeats, threads=threads) for _ in range(blocks)]
        except GraphSurgeryError as error:
            raise NotMeasured(str(error).splitlines()[0]) from error
        found_before, found_after = zip(*pairs, strict=True)
        return Timing(tuple(found_before), tuple(found_after))

    @staticmethod
    def _input(made: Cut, index: int) -> str:
        return f"x{made.key}_{index}"  # both files get all tensors and take their own by name

    def _file(self, made: Cut) -> Path:
        """The ONNX file of a cut, written once."""
        path = self._folder / f"{made.key}.onnx"
        if made.key in self._failed:
            raise NotMeasured(self._failed[made.key])
        if not path.exists():
            try:
                if made.size_bytes > _LARGEST:
                    raise NotMeasured(
                        f"its weights take {made.size_bytes:,} bytes, which is too much to time"
                    )
                names = tuple(self._input(made, i) for i in range(len(made.inputs)))
                export_onnx(made.gm, _Info(names, made.inputs, {}), path, verify=False)
            except (GraphSurgeryError, NotMeasured, OSError) as error:
                self._failed[made.key] = str(error).splitlines()[0]
                raise NotMeasured(self._failed[made.key]) from error
        return path
