"""The criterion: how far a correct program may lie from the exact values of the function.

Two float32 programs of one function differ, and by how much depends on the network and the input. So nothing
here is a fixed tolerance. Notation, for one output:

- `y`       anchor: the reference in float64
- `d_0`     the reference in its own dtype
- `d_1..k`  the reference in its own dtype with every parameter and every input moved by about one unit in the
last
            place, at random. A backward-stable program is one that answers exactly for data moved that
            little, so the spread of the draws is what rounding can do to *this* function on *this* input: it
            holds the depth, the cancellation, and the amplification by normalisations, without a model of any
            of them.
- `s`       a case (a row of the batch); `g` a channel: a slice along axis 1, and again along the last axis.

Per case and channel, with maxima over the elements of the slice (a wrong border is a few elements):

    noise[s,g] = max over draws of max |d - y|          scale[s,g] = max |y|          error[s,g] = max
    |candidate - y|

One channel of a row of logits is a single number, and a few draws of one number may be small by chance. So
the noise is smoothed by what the other cases and channels say, never by a larger channel's absolute size:

    T[s,g] = max( noise[s,g],                            measured there
                  max_g noise[s,:] * p[g],               the channel's usual share of the case's noise
                  max_g scale[s,:] * q[g] * r )          the output's usual noise relative to a channel's
                  scale
    p[g] = rms_s( noise[s,g] / max_g noise[s,:] ),  q[g] likewise from scale
    r    = median( noise / usual scale )

(where float64 is run on fewer cases, p and q also count what the reference's own dtype showed on all of them)

A case whose noise is as great as its values is nothing but rounding (a normalisation of a constant map, whose
exact value is zero): there channels mean nothing, and T is the case's greatest noise. An output of which
every case is such is inconclusive, which is not a pass.

The candidate passes when, for every s and g,

    error[s,g] <= factor * T[s,g] + floor[s,g]
    floor[s,g] = 4 eps * scale[s,g] + smallest normal number
    factor     = c * sqrt( ln(2 N m / a) / ln(2 n[s,g] k) )

The square root is the ratio of two extremes of normal noise: the greatest of all N m values that the
candidate is judged on (m in each of N slices), exceeded with probability `a` = 1e-6, over the greatest of the
n k values that one entry of the table was made from. `n` counts the values of the slice that moved in any
draw, at least 1: what a ReLU holds at zero measures nothing, and a channel that is open at one position is
one number, whatever the size of its map. `c` = 4 is for programs that add in another order: the
error of a sum of n terms grows between sqrt(log n) (pairwise) and sqrt(n / 2) (one after the other) for terms
of random sign [Higham, Mary 2019], and between the blocked sums of the kernels in use that ratio stays below
4. In float64, where the sums are
exact by comparison and only the storage of weights and constants is left, `c` = 2 and `eps` is that of
float64. The floor covers the last operation alone: elementary functions of the runtimes in use are good to 4
units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphsurgery.verify.verdict import Comparison

__all__ = [
    "ELEMENTARY_ULPS",
    "FLOAT64_EPS",
    "ORDER_OF_SUMMATION",
    "STORED_WEIGHTS",
    "Yardstick",
    "allowed_factor",
    "canonical",
]

ORDER_OF_SUMMATION = 4.0
"""`c` of the module's docstring where both programs round their sums."""

STORED_WEIGHTS = 2.0
"""`c` in float64, where only the weights were rounded."""

FALSE_ALARM = 1e-6
"""Probability with which correct programs of equal quality may fail one output."""

ELEMENTARY_ULPS = 4.0
"""Units in the last place by which elementary functions may be off: the floor where programs round."""

FLOAT64_EPS = 2.0**-52
"""Unit of the floor where both programs are run in float64."""


def allowed_factor(slices: int, elements: int, moved: Tensor, draws: int, program: float) -> Tensor:
    """Return the factor of the module's docstring.

    Args:
        slices: N, number of slices judged.
        elements: m, elements in one slice.
        moved: n, how many of them moved: (case, slice), integers.
        draws: k, runs that the noise was measured on.
        program: c, ratio of rounding errors between programs of one function.

    Returns:
        (case, slice), float64.
    """
    many = math.log(2.0 * max(1, slices) * max(1, elements) / FALSE_ALARM)
    few = (2.0 * max(1, draws) * moved.clamp_min(1).to(torch.float64)).log()
    return program * (many / few).sqrt()


def canonical(value: Tensor, rows: int, stacked: bool) -> Tensor:
    """Return `value` in float64 as (case, ..., at least one more axis), without moving an element."""
    value = torch.view_as_real(value) if value.is_complex() else value
    value = value.detach().to(torch.float64)
    if not (stacked and value.ndim and value.shape[0] == rows):
        value = value.unsqueeze(0)
    return value.unsqueeze(1) if value.ndim == 1 else value


@dataclass
class Yardstick:
    """Anchor and rounding noise of one float output over all runs.

    Attributes:
        anchors: One tensor (case, ...) in float64 per run.
        cases: Names of the cases of each run, one per row.
        shapes: The output's own shape in each run, a last axis of 2 added if it is complex.
        eps: Distance from 1 to the next number of the dtype that the programs are run in.
        smallest: Smallest normal number of that dtype.
        program: `c` of the module's docstring.
        axes: Axes along which slices are taken; those that an output does not have are left out.
        kin: The same output in its own dtype, perhaps on more runs: it knows the channels' usual shares where
            one case and a few draws do not.
    """

    anchors: list[Tensor]
    cases: list[tuple[str, ...]]
    shapes: list[tuple[int, ...]]
    eps: float
    smallest: float
    program: float
    axes: tuple[int, ...] = (1, -1)
    draws: int = 0
    kin: Yardstick | None = None
    reference: _Spread | None = None
    noise: dict[int, list[Tensor]] = field(default_factory=dict)
    moved: list[Tensor] = field(default_factory=list)

    def add_draw(self, outputs: list[Tensor], *, reference: bool = False) -> None:
        """Take one run of the reference (`reference`: as it is, not nudged) into the noise."""
        errors = [_errors(value, anchor) for value, anchor in zip(outputs, self.anchors, strict=True)]
        self._add_moved([error > 0 for error in errors])
        for axis in self._axes():
            found = [_slice_max(error, axis) for error in errors]
            old = self.noise.get(axis)
            self.noise[axis] = (
                [torch.maximum(a, b) for a, b in zip(old, found, strict=True)] if old else found
            )
        self.draws += 1
        if reference:
            self.reference = _spread(errors, self.anchors)

    def add_noise_of(self, other: Yardstick, share: float) -> None:
        """Take `share` of the noise that was measured in another precision; no draw of its own."""
        for axis, noise in self.noise.items():
            pairs = zip(noise, other.noise.get(axis, []), strict=False)
            self.noise[axis] = [torch.maximum(own, share * there) for own, there in pairs] or noise
        self._add_moved(other.moved)

    def _add_moved(self, found: list[Tensor]) -> None:
        old = self.moved
        self.moved = [a | b for a, b in zip(old, found, strict=False)] if old else found

    def _axes(self) -> tuple[int, ...]:
        ndim = min(anchor.ndim for anchor in self.anchors)
        return tuple(sorted({axis % ndim for axis in self.axes if axis < ndim}))

    def judge(self, outputs: list[Tensor], precision: str) -> Comparison:
        """Compare a candidate's outputs, one (case, ...) float64 tensor per run; only finite values count."""
        errors = [_errors(value, anchor) for value, anchor in zip(outputs, self.anchors, strict=True)]
        parts = [self._judge_axis(errors, axis) for axis in self._axes()]
        worst = max(parts, key=lambda part: part.share)
        run, case, flat = worst.place
        spread, reference = _spread(errors, self.anchors), self.reference
        ratio = None
        if reference is not None and reference.relative > 0:
            ratio = spread.relative / reference.relative
        return Comparison(
            precision=precision,
            max_error=spread.greatest,
            mean_error=spread.mean,
            reference_max_error=reference.greatest if reference else None,
            reference_mean_error=reference.mean if reference else None,
            rounding_ratio=ratio,
            factor=worst.factor,
            factor_needed=worst.factor * max(part.needed for part in parts),
            resolution=min(part.resolution for part in parts),
            best_resolution=min(part.best for part in parts),
            worst_case=self.cases[run][min(case, len(self.cases[run]) - 1)],
            worst_index=_unravel(flat, self.shapes[run]),
            worst_expected=float(self.anchors[run].flatten()[flat]),
            worst_got=float(outputs[run].flatten()[flat]),
        )

    def allowed(self) -> list[Tensor]:
        """Return, per run, the allowed error of each element along axis 1, as (case, channel)."""
        return [floor + factor * level for factor, level, floor in self._levels(1)]

    def _levels(self, axis: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return factor, T and floor of each run, each as (case, slice)."""
        scales = [_slice_max(_finite(anchor).abs(), axis) for anchor in self.anchors]
        noises = self.noise.get(axis) or [torch.zeros_like(scale) for scale in scales]
        slices = sum(scale.numel() for scale in scales)
        moved = self.moved or [torch.zeros_like(anchor, dtype=torch.bool) for anchor in self.anchors]
        levels: list[tuple[Tensor, Tensor, Tensor]] = []
        for anchor, scale, noise, mask in zip(self.anchors, scales, noises, moved, strict=True):
            alike = [i for i, other in enumerate(scales) if other.shape[1] == scale.shape[1]]
            level = _level(
                noise,
                scale,
                [noises[i] for i in alike],
                [scales[i] for i in alike],
                self._shares_of_kin(axis, scale.shape[1]),
            )
            elements = anchor.numel() // max(1, scale.numel())
            factor = allowed_factor(slices, elements, _slice_count(mask, axis), self.draws, self.program)
            levels.append((factor, level, ELEMENTARY_ULPS * self.eps * scale + self.smallest))
        return levels

    def _shares_of_kin(self, axis: int, slices: int) -> tuple[Tensor, Tensor] | None:
        """Usual shares of noise and of scale, as the other precision measured them."""
        if self.kin is None or axis not in self.kin.noise:
            return None
        noises = [noise for noise in self.kin.noise[axis] if noise.shape[1] == slices]
        scales = [_slice_max(_finite(anchor).abs(), axis) for anchor in self.kin.anchors]
        scales = [scale for scale in scales if scale.shape[1] == slices]
        return (_profile(noises), _profile(scales)) if noises and scales else None

    def _judge_axis(self, errors: list[Tensor], axis: int) -> _Part:
        best = _Part(-1.0, 0.0, 1.0, 0.0, 0.0, (0, 0, 0))
        needed, resolutions = 0.0, []
        for run, (factor, level, floor) in enumerate(self._levels(axis)):
            if errors[run].numel() == 0:
                continue
            error = _slice_max(errors[run], axis)
            excess = (error - floor).clamp_min(0.0)
            used = torch.where(excess > 0, excess / (factor * level), torch.zeros_like(excess))
            needed = max(needed, float(used.max()))
            bound = factor * level + floor
            scale = _slice_max(_finite(self.anchors[run]).abs(), axis)
            # Below that rounding is no longer relative; `smallest` is of the own dtype, in float64 too.
            normal = self.smallest / (self.kin or self).eps
            resolutions.append((bound / scale)[scale > normal])
            share = error / bound
            if float(share.max()) > best.share:
                case, channel = divmod(int(share.argmax()), share.shape[1])
                flat = _flat_index(errors[run], axis, case, channel)
                best = _Part(
                    float(share.max()), 0.0, float(factor[case, channel]), 0.0, 0.0, (run, case, flat)
                )
        known = torch.cat(resolutions) if resolutions else torch.empty(0)
        middle, least = (float(known.median()), float(known.min())) if known.numel() else (0.0, 0.0)
        return _Part(best.share, needed, best.factor, middle, least, best.place)


@dataclass(frozen=True)
class _Part:
    """Result along one axis: greatest share of what is allowed, share of the factor needed, where."""

    share: float
    needed: float
    factor: float
    resolution: float
    best: float
    place: tuple[int, int, int]


@dataclass(frozen=True)
class _Spread:
    greatest: float
    mean: float
    relative: float
    """Root mean square over the cases of the greatest error relative to the case's greatest value."""


def _spread(errors: list[Tensor], anchors: list[Tensor]) -> _Spread:
    count = sum(error.numel() for error in errors)
    greatest = max((float(error.max()) for error in errors if error.numel()), default=0.0)
    shares = []
    for error, anchor in zip(errors, anchors, strict=True):
        if error.numel():
            scale = _finite(anchor).abs().flatten(1).amax(1)
            shares.append((error.flatten(1).amax(1) / scale)[scale > 0])
    known = torch.cat(shares) if shares else torch.empty(0)
    relative = float(known.square().mean().sqrt()) if known.numel() else 0.0
    return _Spread(greatest, sum(float(error.sum()) for error in errors) / max(1, count), relative)


def _unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        flat, rest = divmod(flat, max(1, size))
        index.insert(0, rest)
    return tuple(index)


def _finite(value: Tensor) -> Tensor:
    return torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)


def _errors(value: Tensor, anchor: Tensor) -> Tensor:
    """Return absolute differences; 0 where either is not finite, which is judged apart."""
    both = value.isfinite() & anchor.isfinite()
    return torch.where(both, (value - anchor).abs(), torch.zeros_like(anchor))


def _slices(value: Tensor, axis: int) -> Tensor:
    """Return (case, slice, element) of (case, ...)."""
    return value.movedim(axis, 1).flatten(2) if value.ndim > 2 else value.unsqueeze(-1)


def _slice_max(value: Tensor, axis: int) -> Tensor:
    """Return (case, slice): the greatest value of each slice along `axis`."""
    slices = _slices(value, axis)
    return slices.amax(2) if slices.numel() else value.new_zeros(slices.shape[:2])


def _slice_count(mask: Tensor, axis: int) -> Tensor:
    """Return (case, slice): how many of each slice along `axis` are True."""
    return _slices(mask, axis).sum(2)


def _flat_index(error: Tensor, axis: int, case: int, channel: int) -> int:
    mask = torch.zeros_like(error, dtype=torch.bool)
    mask[case].select(axis - 1, channel).fill_(True)
    return int(torch.where(mask, error, torch.full_like(error, -1.0)).argmax())


def _profile(values: list[Tensor]) -> Tensor:
    """Return each slice's usual share of the greatest value of its case: (slice,)."""
    stacked = torch.cat(values)
    if stacked.numel() == 0:
        return stacked.new_zeros(stacked.shape[1])
    greatest = stacked.amax(1, keepdim=True)
    known = greatest[:, 0] > 0
    if not bool(known.any()):
        return stacked.new_zeros(stacked.shape[1])
    return (stacked[known] / greatest[known]).square().mean(0).sqrt()


def _level(
    noise: Tensor,
    scale: Tensor,
    noises: list[Tensor],
    scales: list[Tensor],
    kin: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Return T of the module's docstring for one run.

    Args:
        noise: (case, slice).
        scale: (case, slice).
        noises: those of all runs.
        scales: those of all runs.
        kin: usual shares of noise and scale (slice,) measured in another precision.
    """
    if noise.numel() == 0:
        return noise
    shares, usual = _profile(noises), _profile(scales)
    if kin is not None:
        shares, usual = torch.maximum(shares, kin[0]), torch.maximum(usual, kin[1])
    expected = torch.cat(scales).amax(1, keepdim=True) * usual
    relative = (torch.cat(noises) / expected)[expected > 0]
    typical = float(relative.median()) if relative.numel() else 0.0
    greatest, size = noise.amax(1, keepdim=True), scale.amax(1, keepdim=True)
    smoothed = torch.maximum(noise, torch.maximum(greatest * shares, size * usual * typical))
    return torch.where(greatest >= size, greatest, smoothed)
