"""Candidates timed on onnxruntime, where counts leave doubt: what `cost="measured"` does.

A proposer is a pass in a permissive form. What it would change is cut out of the graph as it was and as it
would be, both cuts are timed in turns, and only what is clearly faster is written.
"""

from __future__ import annotations

from graphsurgery.measure.bench import Bench
from graphsurgery.measure.cut import Cut, cut
from graphsurgery.measure.errors import NotMeasured
from graphsurgery.measure.proposals import Measured, Promising, parted
from graphsurgery.measure.settings import MeasuredCost, measured_cost
from graphsurgery.measure.timing import OnnxTimer, Timer, Timing, clearly_faster, not_undone

__all__ = [
    "Bench",
    "Cut",
    "Measured",
    "MeasuredCost",
    "NotMeasured",
    "OnnxTimer",
    "Promising",
    "Timer",
    "Timing",
    "clearly_faster",
    "cut",
    "measured_cost",
    "not_undone",
    "parted",
]
