"""The rule: what is clearly faster, and what is not."""

from __future__ import annotations

import pytest

from graphsurgery.measure import Timing, clearly_faster, not_undone


def timing(*ratios: float) -> Timing:
    return Timing((2.0,) * len(ratios), tuple(2.0 * ratio for ratio in ratios))


@pytest.mark.parametrize(
    ("ratios", "kept", "whole"),
    [
        ([0.9] * 9, True, True),
        ([0.9] * 8 + [3.0], True, True),  # one block may be disturbed
        ([0.9] * 7 + [1.01] * 2, False, True),  # two of nine happen by chance in 9 % of the cases
        ([0.9] * 5 + [1.01] * 4, False, False),
        ([0.99] * 9, False, True),  # certain, but not worth a change
        ([1.0] * 9, False, False),
        ([1.1] * 9, False, False),
        ([0.9] * 2, True, True),
        ([0.9, 1.0], False, False),
    ],
)
def test_the_rule(ratios: list[float], kept: bool, whole: bool) -> None:
    assert clearly_faster(timing(*ratios)) is kept
    assert not_undone(timing(*ratios)) is whole


def test_ratios_are_of_blocks_and_their_median_counts() -> None:
    found = Timing((1.0, 2.0, 4.0), (0.5, 2.0, 1.0))
    assert found.ratios == (0.5, 1.0, 0.25)
    assert found.ratio == 0.5
    assert found.reversed().ratio == 2.0
