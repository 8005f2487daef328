"""Closed forms against probing: two ways to the same coefficients, which share no code."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from folding import Of, seeded
from one_region import region_of
from random_chains import Constant, warmed
from torch import Tensor, nn

from graphsurgery.affine.atoms import NoFold
from graphsurgery.affine.certify import LIMIT as CERTIFIED
from graphsurgery.affine.certify import residual
from graphsurgery.affine.closed import Kernel, closed_form
from graphsurgery.affine.coefficients import DEFAULT_BUDGET, Probe, _shift, _weight
from graphsurgery.affine.forms import Roles, candidates
from graphsurgery.affine.region import Region

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
LIMIT = 1e-12  # of the largest coefficient

Move = Callable[[Tensor], Tensor]


def compare(region: Region) -> int:
    """How many forms of a region have a closed form; each is what probing finds."""
    shape = region.scope.shape(region.entry)
    count = 0
    for form in candidates(region.axes, shape, True):
        closed = closed_form(region, form)
        if closed is None:
            continue
        roles = Roles(form.axes, len(shape))
        kernel, _ = Probe(region, roles, form.transposed).linear_part(DEFAULT_BUDGET)
        probed = {"weight": _weight(kernel, form)}
        if "bias" in form.slots:
            probed.update(_shift(region, roles, form, None))
        assert "weight" in closed
        for slot in closed:
            value = probed[slot]
            assert closed[slot].shape == value.shape == form.slots[slot]
            assert closed[slot].dtype == torch.float64
            largest = value.abs().max()
            seen = torch.ones_like(value, dtype=torch.bool)
            if slot == "weight":  # a tap that no position reads is anything: probing has zeros there
                seen = seen & (value != 0).any(0, keepdim=True).any(1, keepdim=True)
            assert ((closed[slot] - value).abs() * seen).max() <= LIMIT * largest, (form.kind, slot)
        shift = _shift(region, roles, form, None)
        assert residual(region, form, {**shift, **closed}) <= CERTIFIED
        count += bool(probed["weight"].any())  # branches may cancel
    return count


# -- random regions --------------------------------------------------------------------------------------


class Program(nn.Module):
    """A chain of steps, some of which part and meet again."""

    def __init__(self, rng: random.Random, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.rng, self.rank = rng, len(shape) - 2
        self.parts, self.words = nn.ModuleList(), Counter[str]()
        value = torch.randn(shape)
        for _ in range(rng.randint(1, 4)):
            step, word = self.step(value.shape[1])
            try:
                following = step(value)
            except (RuntimeError, IndexError):
                continue
            if min(following.shape) < 1 or following.dim() != value.dim():
                continue
            value = following
            self.parts.append(step)
            self.words[word] += 1
        if rng.random() < 0.3:
            self.parts.append(Of(lambda _, x: x.select(2, -1)))
            self.words["select"] += 1

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x

    def conv(self, into: int, out: int, **options: int) -> nn.Module:
        groups = self.rng.choice([g for g in range(1, into + 1) if into % g == out % g == 0])
        return CONVS[self.rank](into, out, groups=groups, bias=self.rng.random() < 0.5, **options)

    def scale(self, channels: int) -> nn.Module:
        size = self.rng.choice([1, channels])
        word = self.rng.choice(["mul", "div", "add", "sub", "rsub"])
        return Constant(word, torch.rand(size, *[1] * self.rank) + 0.5)

    def branch(self, channels: int) -> nn.Module:
        """A step that keeps the shape."""
        rng = self.rng
        match rng.choice(["3", "dilated", "1", "norm", "scale", "identity", "3-1"]):
            case "3":
                return self.conv(channels, channels, kernel_size=3, padding=1)
            case "dilated":
                return self.conv(channels, channels, kernel_size=3, padding=2, dilation=2)
            case "1":
                return self.conv(channels, channels, kernel_size=1)
            case "norm":
                return warmed(NORMS[self.rank](channels))
            case "scale":
                return self.scale(channels)
            case "3-1":
                first = self.conv(channels, 6, kernel_size=3, padding=1)
                return nn.Sequential(first, self.conv(6, channels, kernel_size=1))
        return nn.Identity()

    def step(self, channels: int) -> tuple[nn.Module, str]:
        rng, rank = self.rng, self.rank
        word = rng.choice(["conv", "conv", "linear", "norm", "scale", "sum", "sum", "slice", "across"])
        match word:
            case "conv":
                options = {
                    "kernel_size": rng.choice([1, 1, 2, 3]),
                    "stride": rng.choice([1, 1, 2]),
                    "padding": rng.choice([0, 0, 1]),
                    "dilation": rng.choice([1, 1, 2]),
                }
                return self.conv(channels, rng.choice([2, 4, 6]), **options), word
            case "linear":
                last, back = [0, *range(2, rank + 2), 1], [0, rank + 1, *range(1, rank + 1)]
                layer = nn.Linear(channels, rng.choice([2, 4, 6]))
                return Of(lambda m, x: m.layer(x.permute(last)).permute(back), layer=layer), word
            case "norm":
                return warmed(NORMS[rank](channels)), word
            case "scale":
                return self.scale(channels), word
            case "slice":
                axis, start, by = rng.randint(2, rank + 1), rng.choice([0, 1]), rng.choice([1, 2])
                index = (*[slice(None)] * axis, slice(start, None, by))
                return Of(lambda _, x: x[index]), word
            case "across":  # a convolution that sees the axes in another order
                order = [0, 1, *range(rank + 1, 1, -1)]
                kernel = rng.choice([(1, 3, 2), (2, 1, 1)])[:rank]
                layer = CONVS[rank](channels, 4, kernel)
                return Of(lambda m, x: m.layer(x.permute(order)).permute(order), layer=layer), word
        left, right, sign = self.branch(channels), self.branch(channels), rng.choice([1, -1, 2])
        return Of(lambda m, x: torch.add(m.left(x), m.right(x), alpha=sign), left=left, right=right), word


def run(seeds: range) -> Counter[str]:
    """Compare many; how many programs had a closed form, and of what they consist."""
    seen = Counter[str]()
    for seed in seeds:
        torch.manual_seed(seed)
        rng = random.Random(seed)
        rank = rng.choice([1, 2, 2, 3])
        shape = (2, rng.choice([2, 4, 6]), *rng.sample([4, 5, 6, 7], rank))
        program = Program(rng, shape).double().eval()
        if not program.parts:
            continue
        try:
            region = region_of(program, torch.randn(shape).double())
            count = compare(region)
        except NoFold:
            continue
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {program}") from error
        seen["programs"] += 1
        seen["forms"] += count
        if count:
            seen["closed"] += 1
            seen.update(program.words)
    return seen


def test_random_regions_have_the_coefficients_that_probing_finds() -> None:
    seen = run(range(120))
    assert seen["closed"] >= 50, seen
    assert all(seen[word] >= 5 for word in ("conv", "linear", "norm", "scale", "sum", "slice", "select")), (
        seen
    )


@pytest.mark.sweep
def test_many_random_regions_have_the_coefficients_that_probing_finds() -> None:
    seen = run(range(1000, 4000))
    assert seen["closed"] >= 1000, seen


# -- cases that must have one ----------------------------------------------------------------------------

IMAGE = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6)),
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)),
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1)),
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 6, 2, groups=2)),
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 12, 2, groups=4)),
        lambda: nn.Sequential(nn.Conv2d(4, 6, 2), nn.Conv2d(6, 5, 2, 2)),
        lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 5, 3, dilation=2)),
        lambda: Of(lambda m, x: x - m.a(x) + m.b(x), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 3, padding=1)),
        lambda: Of(
            lambda m, x: m.a(x) - m.b(x),
            a=nn.Conv2d(4, 4, 3, padding=1, groups=2),
            b=nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4),
        ),
    ],
    ids=["norm", "norm-first", "depthwise", "grouped", "regrouped", "strided", "dilated", "sum", "groups"],
)
def test_has_a_closed_form(build: Callable[[], nn.Module]) -> None:
    assert compare(region_of(seeded(build).double(), IMAGE)) >= 1


def test_a_bias_that_meets_the_border_at_one_position() -> None:
    """Behind a selection the shift is one number for each feature, but not that of the interior."""
    border = lambda: Of(  # noqa: E731
        lambda m, x: m.conv(m.norm(x)).select(2, 0).select(2, 0),
        norm=nn.BatchNorm2d(4),
        conv=nn.Conv2d(4, 6, 3, padding=1),
    )
    assert compare(region_of(seeded(border).double(), IMAGE)) >= 1


def test_a_linear_after_a_linear_on_any_axis() -> None:
    x = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(2)).double()
    chain = lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))  # noqa: E731
    assert compare(region_of(seeded(chain).double(), x)) >= 1

    def forward(self: Of, x: Tensor) -> Tensor:
        return self.second(self.first(x.permute(0, 3, 2, 1))).permute(0, 3, 1, 2)

    moved = lambda: Of(forward, first=nn.Linear(5, 8), second=nn.Linear(8, 3))  # noqa: E731
    assert compare(region_of(seeded(moved).double(), x)) >= 1


# -- the algebra by itself -------------------------------------------------------------------------------


def kernel(seed: int, shape: tuple[int, ...], groups: int, reads: tuple[tuple[int, int, int], ...]) -> Kernel:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).double()
    return Kernel(weight, torch.randn(shape[0], generator=generator).double(), groups, reads)


def apply(k: Kernel, x: Tensor) -> Tensor:
    """A kernel as the convolution that it says it is, away from borders."""
    (s, _, step) = k.reads[0]
    return nn.functional.conv1d(x, k.weight, k.bias, s, 0, max(step, 1), k.groups)


def test_fewer_groups_are_the_same_map() -> None:
    k = kernel(0, (8, 2, 3), 4, ((1, 0, 1),))
    x = torch.randn(2, 8, 9, generator=torch.Generator().manual_seed(1)).double()
    for groups in (2, 1):
        wide = k.regrouped(groups)
        assert wide.weight.shape == (8, 8 // groups, 3)
        # 24 products of numbers about one, added in another order: at most 24 roundings of 1.1e-16 each
        torch.testing.assert_close(apply(wide, x), apply(k, x), rtol=1e-13, atol=1e-13)


def test_one_layer_after_another_is_the_same_map() -> None:
    x = torch.randn(2, 4, 21, generator=torch.Generator().manual_seed(1)).double()
    for s, step in ((1, 1), (2, 1), (1, 2), (2, 3)):
        first = kernel(0, (6, 2, 3), 2, ((s, 0, step),))
        second = kernel(1, (9, 2, 2), 3, ((2, 0, 2),))
        both = first.then(second.weight, second.bias, second.groups, second.reads)
        assert both.groups == 1
        # as above, through two layers whose values reach some ten
        torch.testing.assert_close(apply(both, x), apply(second, apply(first, x)), rtol=1e-12, atol=1e-12)


def test_a_sum_reads_where_either_reads() -> None:
    x = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(1)).double()
    left, right = kernel(0, (4, 2, 3), 2, ((1, 0, 2),)), kernel(1, (4, 1, 2), 4, ((1, 1, 1),))
    both = left.plus(right, 2.0, -1.0)
    assert both is not None
    assert (both.groups, both.reads, both.taps) == (2, ((1, 0, 1),), (5,))
    expected = 2 * apply(left, x) - apply(right, x[..., 1:])[..., :8]
    # float64 sums of a few dozen products in another order
    torch.testing.assert_close(apply(both, x), expected, rtol=1e-13, atol=1e-13)
    assert left.plus(kernel(1, (4, 1, 2), 4, ((2, 1, 1),)), 1.0, 1.0) is None, "another stride"


def test_a_scale_and_shift_of_each_channel() -> None:
    x = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(1)).double()
    k = kernel(0, (4, 2, 3), 2, ((1, 0, 1),))
    scale, shift = torch.tensor([2.0, -1, 0, 3]).double(), torch.arange(4).double()
    expected = apply(k, x) * scale.reshape(4, 1) + shift.reshape(4, 1)
    # float64 sums of a few dozen products, scaled before or after
    torch.testing.assert_close(apply(k.diagonal(scale, shift), x), expected, rtol=1e-13, atol=1e-13)
