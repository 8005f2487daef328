"""Windows against sets of (output position, entry position) pairs, counted one by one."""

from __future__ import annotations

import itertools
import random

import pytest

from graphsurgery.affine.windows import Window, fits, interior

Pairs = set[tuple[int, int]]


def pairs(window: Window, positions: int) -> Pairs:
    """Which output positions meet which entry positions."""
    offsets = [window.offset(tap) for tap in range(window.taps)]
    if window.transposed:
        met = {(window.s * p + offset, p) for p in range(window.base) for offset in offsets}
    else:
        met = {(p, window.s * p + offset) for p in range(positions) for offset in offsets}
    return {(out, read) for out, read in met if 0 <= out < positions and 0 <= read < window.base}


def transposed(rng: random.Random, base: int, s: int | None = None) -> tuple[Window, int]:
    """A transposed convolution's window and its number of output positions."""
    s, d, k, padding = s or rng.randint(1, 3), rng.randint(1, 2), rng.randint(1, 4), rng.randint(0, 2)
    extra = rng.randrange(max(s, d))
    hi = d * (k - 1) - padding
    tail = hi - padding + extra
    return Window(base, s, -padding, hi, d if k > 1 else 0, True, True, tail), s * (base - 1) + tail + 1


@pytest.mark.parametrize("seed", range(20))
def test_a_transposed_window_of_stride_1_is_an_ordinary_one_and_back(seed: int) -> None:
    rng = random.Random(seed)
    window, positions = transposed(rng, rng.randint(1, 6), 1)
    if positions < 1:
        return
    ordinary = window.ordinary()
    assert ordinary is not None
    assert not ordinary.transposed
    assert pairs(ordinary, positions) == pairs(window, positions)
    assert ordinary.reverse(positions) == window


def test_strides_keep_a_window_on_its_side() -> None:
    assert Window(5, 2, 0, 1, 1, True, True, 1).ordinary() is None
    assert Window(5, 2, 0, 1, 1).reverse(2) is None


def test_one_position_is_written_like_any_other_whatever_the_stride() -> None:
    window = Window(1, 2, -1, 2, 1, True, True, 1)
    ordinary = window.ordinary()
    assert ordinary is not None
    assert pairs(ordinary, 2) == pairs(window, 2) == {(0, 0), (1, 0)}


@pytest.mark.parametrize("seed", range(20))
def test_transposed_windows_compose_where_the_first_loses_nothing(seed: int) -> None:
    rng = random.Random(seed)
    first, middle = transposed(rng, rng.randint(1, 5))
    first = first._replace(lo=0, hi=first.hi - first.lo, tail=first.hi - first.lo + 1)
    middle = first.s * (first.base - 1) + first.tail + 1
    second, positions = transposed(rng, middle)
    if positions < 1:
        return
    assert first.complete
    both = first.spread(second.s, second.lo, second.hi, second.step, second.tail)
    assert both.s * (both.base - 1) + both.tail + 1 == positions
    through = {
        (out, read) for out, q in pairs(second, positions) for q2, read in pairs(first, middle) if q == q2
    }
    assert through <= pairs(both, positions)
    assert min(both.s * 0 + both.offset(tap) for tap in range(both.taps)) == both.lo
    assert both.hi == second.s * first.hi + second.hi


@pytest.mark.parametrize("flip", [False, True], ids=["ordinary", "transposed"])
@pytest.mark.parametrize("seed", range(20))
def test_a_union_holds_the_taps_of_both_and_no_farther_ones(seed: int, flip: bool) -> None:
    rng = random.Random(seed)
    s, tail = rng.randint(1, 3), 7

    def window() -> Window:
        taps, step, lo = rng.randint(1, 4), rng.randint(1, 4), rng.randint(-4, 2)
        step = step if taps > 1 else 0
        outside = rng.random() < 0.5
        return Window(9, s, lo, lo + step * (taps - 1), step, outside, flip, tail if flip else 0)

    a, b = window(), window()
    union = a.union(b)
    assert union is not None
    assert union == b.union(a)
    offsets = [{w.offset(tap) for tap in range(w.taps)} for w in (a, b, union)]
    assert offsets[0] | offsets[1] <= offsets[2]
    assert (union.lo, union.hi) == (min(a.lo, b.lo), max(a.hi, b.hi))
    assert union.outside is (a.outside or b.outside)
    assert (union.transposed, union.tail) == (flip, a.tail)
    assert (union.step == 0) is (union.taps == 1)


def test_a_window_in_union_with_itself_is_itself() -> None:
    for window in (Window(8, 2, -1, 3, 2), Window(8, 1, 0, 0, 0), Window(8, 2, -1, 2, 1, True, True, 1)):
        assert window.union(window) == window


def test_windows_of_other_strides_entries_or_sizes_do_not_join() -> None:
    window = Window(8, 2, -1, 2, 1, True, True, 1)
    assert window.union(window._replace(s=3)) is None
    assert window.union(window._replace(base=9)) is None
    assert window.union(window._replace(tail=2)) is None
    assert window.union(Window(8, 2, -1, 2, 1)) is None


def test_a_transposed_window_of_stride_1_joins_an_ordinary_one() -> None:
    """conv_transpose(x, 3 taps, padding 1) + x: the identity reads its own position."""
    identity, spread = Window(8, 1, 0, 0, 0), Window(8, 1, -1, 1, 1, True, True, 0)
    assert identity.union(spread) == spread.union(identity) == Window(8, 1, -1, 1, 1, True)


@pytest.mark.parametrize("flip", [False, True], ids=["ordinary", "transposed"])
@pytest.mark.parametrize("seed", range(30))
def test_sightings_see_every_tap_that_counts_once(seed: int, flip: bool) -> None:
    rng = random.Random(seed)
    base = rng.randint(1, 6)
    if flip:
        window, positions = transposed(rng, base)
    else:
        taps, step, lo = rng.randint(1, 4), rng.randint(1, 3), rng.randint(-4, 2)
        window = Window(base, rng.randint(1, 3), lo, lo + step * (taps - 1), step if taps > 1 else 0)
        positions = rng.randint(1, 5)
    if positions < 1:
        return
    assert_all_seen(window, base, positions)


def test_sightings_in_maps_smaller_than_the_window() -> None:
    """Taps that the first interior position does not meet, as the map ends before: strides and holes."""
    sizes = itertools.product(range(1, 5), range(1, 4), (2, 3), range(-6, 1), range(2, 5), (1, 2))
    for base, positions, s, lo, taps, step in sizes:
        assert_all_seen(Window(base, s, lo, lo + step * (taps - 1), step), base, positions)


def assert_all_seen(window: Window, base: int, positions: int) -> None:
    flip = window.transposed
    met = {
        tap
        for tap in range(window.taps)
        for out, read in pairs(window, positions)
        if (out - window.s * read if flip else read - window.s * out) == window.offset(tap)
    }
    found = [tap for _, taps in window.sightings(base, positions) for tap in taps]
    assert sorted(found) == sorted(met)
    for look, taps in window.sightings(base, positions):
        looks, seen = (base, positions) if flip else (positions, base)
        assert 0 <= look < looks
        assert all(0 <= window.s * look + window.offset(tap) < seen for tap in taps)


@pytest.mark.parametrize("seed", range(20))
def test_the_probe_size_shows_all_taps_at_one_position(seed: int) -> None:
    rng = random.Random(seed)
    window, _ = transposed(rng, 50)
    size = window.probe_size()
    positions = window.s * (size - 1) + window.tail + 1
    assert window.sightings(size, positions) == [(interior(window), list(range(window.taps)))]


def test_how_many_positions_fit_is_how_many_can_be_counted() -> None:
    for padded, s, lo, taps in itertools.product(range(1, 9), (1, 2, 3), (-2, 0, 1), (1, 2, 3)):
        window = Window(padded, s, lo, lo + taps - 1, 1 if taps > 1 else 0)
        counted = sum(s * p + taps <= padded for p in range(padded))
        assert max(0, fits(padded, window)) == counted


def test_the_probe_of_an_ordinary_window_ends_with_its_last_tap() -> None:
    for s, lo, taps, step in itertools.product((1, 2, 3), (-3, -1, 0, 2), (1, 2, 4), (1, 2)):
        window = Window(50, s, lo, lo + step * (taps - 1), step if taps > 1 else 0)
        assert s * interior(window) + window.offset(window.taps - 1) == window.probe_size() - 1
