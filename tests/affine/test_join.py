"""Where branches meet: which axes of the entry the sum, concatenation or stack of two values still has."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from math import prod

import pytest
import torch
from folding import Of, seeded
from one_region import region_of
from torch import Tensor, nn

from graphsurgery.affine.atoms import Atom, Axes, NoFold, Window, size_of
from graphsurgery.affine.certify import LIMIT, residual
from graphsurgery.affine.coefficients import fill
from graphsurgery.affine.forms import candidates
from graphsurgery.affine.join import join
from graphsurgery.affine.region import Region

BATCH = 1000003
IMAGE = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(1)).double()
SQUARE = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(2)).double()
TOKENS = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(3)).double()


def summed(*branches: nn.Module) -> Callable[[], nn.Module]:
    """The sum of branches of one value."""

    def forward(self: Of, x: Tensor) -> Tensor:
        return reduce(torch.add, [branch(x) for branch in self.branches])

    return lambda: Of(forward, branches=many(*branches))


def many(*modules: nn.Module) -> nn.ModuleList:
    return nn.ModuleList(modules)


def whole(build: Callable[[], nn.Module], x: Tensor) -> Region:
    """A model as one region; whatever form it has is right."""
    region = region_of(seeded(build).double(), x)
    shape = region.scope.shape(region.exit)
    assert tuple(size_of(dim) for dim in region.axes.dims) == shape
    partition(region.axes, region.scope.shape(region.entry))
    deviations = [deviation for _, deviation in certificates(region)]
    assert deviations, "no form at all"
    assert max(deviations) <= LIMIT
    return region


def certificates(region: Region) -> list[tuple[str, float]]:
    """Every form that the axes allow, were a layer to come of it, and its residual."""
    found = []
    for form in candidates(region.axes, region.scope.shape(region.entry), True):
        done = fill(region, form)
        found.append((form.kind, residual(region, done.form, done.slots)))
    return found


def partition(axes: Axes, shape: tuple[int, ...]) -> None:
    """The digits of each entry axis multiply to its size: none is lost, none counted twice."""
    sizes = dict.fromkeys(range(len(shape)), 1)
    for digit in set(axes.entry_digits()):
        sizes[digit.axis] *= digit.size
    assert [sizes[axis] for axis in range(len(shape))] == list(shape)


def windows(region: Region) -> list[tuple[int, int, int, int] | None]:
    """(stride, lo, hi, step) of each dimension behind the channels."""
    found = [atom.window for dim in region.axes.dims[2:] for atom in dim]
    return [w and (w.s, w.lo, w.hi, w.step) for w in found]


# -- sums of windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("branches", "expected"),
    [
        ([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)], (1, -1, 1, 1)),
        ([nn.Conv2d(4, 4, 3, padding=1), nn.Identity()], (1, -1, 1, 1)),
        ([nn.Conv2d(4, 4, 5, padding=2), nn.Conv2d(4, 4, 3, padding=1)], (1, -2, 2, 1)),
        ([nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, 1)], (1, -2, 2, 2)),
        ([nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, 3, padding=1)], (1, -2, 2, 1)),
        ([nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 1, 2)], (2, -1, 1, 1)),
        ([nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(3, 1, 1)], (1, -1, 1, 1)),
    ],
    ids=["3-1", "3-identity", "5-3", "dilated-1", "dilated-3", "strided", "pool"],
)
def test_windows_join_by_union(branches: list[nn.Module], expected: tuple[int, ...]) -> None:
    region = whole(summed(*branches), IMAGE)
    assert windows(region) == [expected, expected]
    assert [digit.axis for digit in region.axes.gone] == [1]


def test_each_axis_has_the_window_of_its_own_branch() -> None:
    across, down = nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), nn.Conv2d(4, 4, (5, 1), padding=(2, 0))
    assert windows(whole(summed(across, down), IMAGE)) == [(1, -2, 2, 1), (1, -1, 1, 1)]


def test_windows_of_another_stride_do_not_join() -> None:
    small, large = nn.Conv1d(2, 3, 3, 2, 1), nn.Sequential(nn.Conv1d(2, 3, 1, 3), nn.ConstantPad1d((0, 1), 0))
    axes = whole(summed(small, large), torch.randn(2, 2, 5).double()).axes
    assert {digit.axis for digit in axes.gone} == {1, 2}
    assert all(atom.fresh for atom in axes.dims[2])


# -- what is carried, varied and mixed -------------------------------------------------------------------


def test_channels_that_both_scale_stay_varied() -> None:
    depthwise, norm = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4)
    axes = whole(summed(depthwise, norm, nn.Identity()), IMAGE).axes
    assert [atom.varied for atom in axes.dims[1]] == [True]
    assert not axes.gone


def test_a_branch_that_mixes_them_mixes_them_for_all() -> None:
    axes = whole(summed(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), IMAGE).axes
    assert [(atom.fresh, atom.size) for atom in axes.dims[1]] == [(True, 4)]
    assert [digit.axis for digit in axes.gone] == [1]


def test_a_shift_of_one_branch_is_a_shift() -> None:
    plain = summed(nn.Conv2d(4, 4, 1, bias=False), nn.Identity())
    assert not whole(plain, IMAGE).axes.shifted
    assert whole(summed(nn.Conv2d(4, 4, 1), nn.Identity()), IMAGE).axes.shifted


def test_equal_sizes_are_not_equal_axes() -> None:
    """H and W of a square: their sum mixes both, though every shape agrees."""
    axes = whole(lambda: Of(lambda self, x: x + x.transpose(2, 3) * 2), SQUARE).axes
    assert {digit.axis for digit in axes.gone} == {2, 3}
    assert [atom.axis for atom in axes.dims[1]] == [1]
    axes = whole(lambda: Of(lambda self, x: x - x.permute(0, 2, 3, 1)), SQUARE).axes
    assert {digit.axis for digit in axes.gone} == {1, 2, 3}


def test_a_mean_that_is_broadcast_mixes_its_axis() -> None:
    for axis in (1, 2, 3):
        model = lambda axis=axis: Of(lambda self, x: x - x.mean(axis, keepdim=True))  # noqa: E731
        axes = whole(model, IMAGE).axes
        assert [digit.axis for digit in axes.gone] == [axis]
        assert all(atom.fresh for atom in axes.dims[axis])
        assert all(atom.shared for i, dim in enumerate(axes.dims) if i != axis for atom in dim)


def test_views_that_cut_an_axis_in_parts_keep_the_parts() -> None:
    """A scale along the minor part of the features, added to the features as they are."""

    def forward(self: Of, x: Tensor) -> Tensor:
        return x + (x.reshape(-1, 5, 3, 4) * self.scale).flatten(2)

    axes = whole(lambda: Of(forward, scale=torch.rand(4) + 0.5), TOKENS).axes
    parts = [(atom.size, atom.stride, atom.varied) for atom in axes.dims[2]]
    assert parts == [(3, 4, False), (4, 1, True)]
    assert not axes.gone


def test_parts_cut_in_other_places_are_mixed() -> None:
    def forward(self: Of, x: Tensor) -> Tensor:
        one = (x.reshape(-1, 5, 3, 4) * self.scale).flatten(2)
        return one + x.reshape(-1, 5, 4, 3).transpose(2, 3).flatten(2)

    axes = whole(lambda: Of(forward, scale=torch.rand(4) + 0.5), TOKENS).axes
    assert prod(digit.size for digit in axes.gone) == 12
    assert {digit.axis for digit in axes.gone} == {2}


# -- side by side ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_concatenation_mixes_its_own_axis_only(axis: int) -> None:
    def forward(self: Of, x: Tensor) -> Tensor:
        return torch.cat([x * 2, self.norm(x)], axis)

    axes = whole(lambda: Of(forward, norm=nn.BatchNorm2d(4)), IMAGE).axes
    assert axis in {digit.axis for digit in axes.gone}
    assert size_of(axes.dims[axis]) == 2 * IMAGE.shape[axis]
    assert all(atom.fresh for atom in axes.dims[axis])
    others = [atom for i, dim in enumerate(axes.dims) if i not in (axis, 1) for atom in dim]
    assert all(atom.shared for atom in others)


def test_convolutions_side_by_side_share_their_windows() -> None:
    def forward(self: Of, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], 1)

    layers = [nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 2, 1), nn.Identity()]
    region = whole(lambda: Of(forward, layers=many(*layers)), IMAGE)
    assert windows(region) == [(1, -1, 1, 1)] * 2
    assert [(atom.fresh, atom.size) for atom in region.axes.dims[1]] == [(True, 9)]


def test_constants_side_by_side_are_a_shift() -> None:
    """A token in front of others, at a batch that is no longer free."""

    def forward(self: Of, x: Tensor) -> Tensor:
        return torch.cat([self.token, x], 1)

    axes = whole(lambda: Of(forward, token=torch.randn(3, 1, 12)), TOKENS).axes
    assert axes.shifted
    assert [digit.axis for digit in axes.gone] == [1]
    assert all(atom.uneven for atom in axes.dims[2])


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_stack_has_a_new_axis(axis: int) -> None:
    def forward(self: Of, x: Tensor) -> Tensor:
        return torch.stack([x, x * self.scale, x], axis)

    axes = whole(lambda: Of(forward, scale=torch.rand(12) + 0.5), TOKENS).axes
    assert [(atom.fresh, atom.size) for atom in axes.dims[axis]] == [(True, 3)]
    assert not axes.gone
    assert [atom.varied for atom in axes.dims[2 if axis == 3 else 3]] == [True]


# -- symbols, by hand ------------------------------------------------------------------------------------


def entry(*shape: int) -> Axes:
    return Axes.entry(shape, (BATCH,))


def test_the_batch_is_never_mixed() -> None:
    """One operand broadcast along the batch, as `x - x[:1]` would be."""
    x = entry(BATCH, 4)
    first = x.with_dim(0, ())
    with pytest.raises(NoFold) as refusal:
        join(x, first, (BATCH, 4))
    assert refusal.value.code == "batch-mixed"


def test_a_batch_in_two_places_is_refused() -> None:
    x = entry(BATCH, BATCH)
    with pytest.raises(NoFold) as refusal:
        join(x, x.with_dims(x.dims[::-1]), (BATCH, BATCH))
    assert refusal.value.code == "batch-mixed"


def test_a_merged_batch_is_cut_as_the_other_side_has_it() -> None:
    merged = entry(BATCH, 5, 4).reshape((BATCH * 5, 4))
    joined = join(merged, merged, (BATCH * 5, 4))
    assert joined.dims == merged.dims
    assert not joined.gone


def test_windows_that_read_other_positions_join_and_others_do_not() -> None:
    def reading(s: int, lo: int, hi: int) -> Axes:
        x = entry(BATCH, 9)
        return x.with_dim(1, (Atom(4, 1, window=Window(9, s, lo, hi, 1)),))

    joined = join(reading(2, 0, 2), reading(2, -1, 0), (BATCH, 4))
    assert joined.dims[1][0].window == Window(9, 2, -1, 2, 1)
    assert joined.pinned, "where a stride rounds down, windows may part at another size"
    parted = join(reading(2, 0, 1), reading(1, 0, 1), (BATCH, 4))
    assert parted.dims[1] == (Atom(4),)
    assert parted.gone == (Atom(9, 1),)


def test_gone_digits_that_overlap_become_one() -> None:
    x = entry(BATCH, 12)
    cut = x.reshape((BATCH, 3, 4))
    minor = cut.consume(cut.dims[2]).with_dim(2, (Atom(4),)).reshape((BATCH, 12))
    everything = x.consume(x.dims[1]).with_dim(1, (Atom(12),))
    joined = join(minor, everything, (BATCH, 12))
    assert joined.gone == (Atom(12, 1),)
    assert size_of(joined.dims[1]) == 12
    assert all(atom.fresh for atom in joined.dims[1])
