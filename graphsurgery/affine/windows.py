"""Windows: which positions of an axis a convolution, a pool or a transposed convolution joins."""

from __future__ import annotations

from math import ceil, gcd
from typing import NamedTuple


class Window(NamedTuple):
    """Which positions of an entry digit of `base` positions belong to an output position, or the reverse.

    An ordinary window: output position p reads the entry positions `s*p + lo ... s*p + hi` every `step`. A
    *transposed* one: entry position p writes the output positions `s*p + lo ... s*p + hi` every `step`. What
    is read outside of the entry is zero; what is written outside of the output is lost.
    """

    base: int
    s: int
    lo: int
    hi: int
    step: int  # distance between taps; 0 for a single tap
    outside: bool = False  # whether some output positions miss taps
    transposed: bool = False
    tail: int = 0  # transposed: output positions behind `s * (base - 1)`

    @property
    def taps(self) -> int:
        """Number of taps, holes included."""
        return 1 if self.hi == self.lo else (self.hi - self.lo) // self.step + 1

    def offset(self, tap: int) -> int:
        """Where a tap lies beside `s*p`."""
        return self.lo + tap * self.step

    def then(self, s: int, lo: int, hi: int, step: int, outside: bool) -> Window:
        """The ordinary window of a second ordinary window read through this one."""
        return Window(
            self.base,
            self.s * s,
            self.s * lo + self.lo,
            self.s * hi + self.hi,
            gcd(self.s * step, self.step),
            self.outside or outside,
        )

    @property
    def complete(self) -> bool:
        """Whether every tap of a transposed window is written: none is lost at the borders."""
        return self.lo >= 0 and self.hi <= self.tail

    def spread(self, s: int, lo: int, hi: int, step: int, tail: int) -> Window:
        """The transposed window of a second transposed one behind this one, which has to be complete."""
        return Window(
            self.base,
            self.s * s,
            s * self.lo + lo,
            s * self.hi + hi,
            gcd(s * self.step, step),
            True,
            True,
            s * self.tail + tail,
        )

    def ordinary(self) -> Window | None:
        """The same as an ordinary window; None where a transposed one takes strides.

        Entry position p writes `p + t` exactly where output position q reads `q - t`.
        """
        if not self.transposed:
            return self
        if self.s != 1 and self.base != 1:
            return None
        return Window(self.base, 1, -self.hi, -self.lo, self.step, self.outside)

    def reverse(self, positions: int) -> Window | None:
        """The same as a transposed window, onto so many positions; None where it reads with strides."""
        if self.transposed:
            return self
        if self.s != 1:
            return None
        return Window(self.base, 1, -self.hi, -self.lo, self.step, self.outside, True, positions - self.base)

    def union(self, other: Window) -> Window | None:
        """The window that holds the taps of both, for sums of two branches; None where they do not join."""
        first, second = self, other
        if first.transposed != second.transposed:
            one, two = first.ordinary(), second.ordinary()
            if one is None or two is None:
                return None
            first, second = one, two
        if (first.base, first.s, first.tail) != (second.base, second.s, second.tail):
            return None
        return first._replace(
            lo=min(first.lo, second.lo),
            hi=max(first.hi, second.hi),
            step=gcd(first.step, second.step, first.lo - second.lo),
            outside=first.outside or second.outside,
        )

    def probe_size(self) -> int:
        """Positions of the smallest entry in which one position meets all taps."""
        if not self.transposed:
            return self.s * interior(self) + self.hi + 1
        return interior(self) + 1 + max(0, ceil((self.hi - self.tail) / self.s))

    def sightings(self, entry: int, positions: int) -> list[tuple[int, list[int]]]:
        """At which positions one has to look, and for which taps, to see every tap that counts.

        Args:
            entry: positions of the entry.
            positions: positions of the output.

        Returns:
            Output positions of an ordinary window, entry positions of a transposed one, each with taps that
            it meets; every tap once, and none that no position meets.
        """
        looks, seen = (entry, positions) if self.transposed else (positions, entry)
        found: dict[int, list[int]] = {}
        first = min(interior(self), looks - 1)
        for tap in range(self.taps):
            at = self.offset(tap)
            if not 0 <= self.s * first + at < seen:
                look = max(0, ceil(-at / self.s))
                if look >= looks or self.s * look + at >= seen:
                    continue
            else:
                look = first
            found.setdefault(look, []).append(tap)
        return list(found.items())


def interior(window: Window) -> int:
    """The first position whose taps do not reach before the other side."""
    return max(0, ceil(-window.lo / window.s))


def fits(padded: int, window: Window) -> int:
    """Number of output positions of an ordinary window over `padded` positions."""
    return (padded - (window.hi - window.lo) - 1) // window.s + 1
