"""Each rule of ops that take parts, repeat, shuffle, resample or multiply: every form equals the calls."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
import torch.nn.functional as F
from one_region import filled, region_of
from random_chains import Call, With
from torch import Tensor, fx, nn

from graphsurgery.affine.atoms import Atom, Axes, NoFold
from graphsurgery.affine.certify import LIMIT
from graphsurgery.affine.choice import options
from graphsurgery.affine.program import Conv
from graphsurgery.affine.region import Region
from graphsurgery.affine.rules import Step, apply, has_rule
from graphsurgery.affine.rules_einsum import labels
from graphsurgery.affine.windows import Window

Build = Callable[[], nn.Module]


def numbers(*shape: int) -> Tensor:
    torch.manual_seed(prod(shape))
    return torch.randn(shape, dtype=torch.float64)


def index(*positions: int) -> Tensor:
    return torch.tensor(positions)


# On maps of (N, 4, 6, 8), and of (N, 4, 4, 4), where the sizes coincide.
PARTS: dict[str, Build] = {
    "slice": lambda: Call(lambda x: x[:, 1:3, ::2, :-1]),
    "slice-leading": lambda: Call(lambda x: x[:, :, :3]),
    "slice-trailing": lambda: Call(lambda x: x[..., -3:]),
    "slice-step": lambda: Call(lambda x: x[:, :, 1::2, ::3]),
    "slice-whole": lambda: Call(lambda x: x[:, 0:100, 0:]),
    "slice-of-several": lambda: Call(lambda x: x.flatten(2)[:, :, x.shape[3] : -x.shape[3]]),
    "slice-across-several": lambda: Call(lambda x: x.flatten(2)[:, :, 3:-2]),
    "select": lambda: Call(lambda x: x[:, :, -1]),
    "select-twice": lambda: Call(lambda x: x[:, :, 2, 1]),
    "narrow": lambda: Call(lambda x: x.narrow(3, -3, 2)),
    "split": lambda: Call(lambda x: x.split(3, 1)[1]),
    "split-sizes": lambda: Call(lambda x: x.split([1, 3], 1)[1]),
    "chunk": lambda: Call(lambda x: x.chunk(2, -1)[1]),
    "tensor-split": lambda: Call(lambda x: x.tensor_split(3, 1)[1]),
    "tensor-split-at": lambda: Call(lambda x: x.tensor_split([1, 3], 2)[1]),
    "unbind": lambda: Call(lambda x: x.unbind(2)[-1]),
    "heads": lambda: Call(lambda x: x.reshape(-1, 2, 2, *x.shape[2:]).permute(2, 0, 3, 1, 4).unbind(0)[1]),
    "index-select": lambda: With(lambda x, i: x.index_select(-1, i), index(0, 3, 1, 1)),
    "index": lambda: With(lambda x, i: x[:, i], index(0, -1, 1)),
    "index-two": lambda: With(lambda x, i: x[:, :, i, i], index(0, 3, 1)),
    "index-matrix": lambda: With(lambda x, i: x[:, :, i.reshape(2, 2)].flatten(2, 3), index(0, 3, 1, 2)),
}
COPIES: dict[str, Build] = {
    "expand": lambda: Call(lambda x: x[:, :, 1:2].expand(-1, -1, 3, -1)),
    "expand-as-it-is": lambda: Call(lambda x: x.expand(x.shape)),
    "expand-new": lambda: Call(lambda x: x.mean((1, 2)).unsqueeze(1).expand(-1, 3, -1)),
    "repeat": lambda: Call(lambda x: x.repeat(1, 2, 1, 2)),
    "tile": lambda: Call(lambda x: x.tile(2, 1)),
    "repeat-interleave": lambda: Call(lambda x: x.repeat_interleave(2, dim=-1)),
    "flip": lambda: Call(lambda x: x.flip(1, 3)),
    "roll": lambda: Call(lambda x: x.roll((1, -2), (2, 3))),
    "pixel-shuffle": lambda: nn.PixelShuffle(2),
    "pixel-unshuffle": lambda: nn.PixelUnshuffle(2),
    "channel-shuffle": lambda: nn.ChannelShuffle(2),
}
RESAMPLED: dict[str, Build] = {
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "nearest-uneven": lambda: nn.Upsample(scale_factor=(3, 2)),
    "nearest-size": lambda: nn.Upsample((12, 7)),
    "nearest-down": lambda: nn.Upsample(scale_factor=0.5),
    "nearest-exact": lambda: nn.Upsample(scale_factor=(4.0, 1.0), mode="nearest-exact"),
    "nearest-1d": lambda: Call(lambda x: F.interpolate(x[:, :, 0], scale_factor=2)),
    "nearest-3d": lambda: Call(lambda x: F.interpolate(x.unsqueeze(2), (2, 4, 4)).flatten(1, 2)),
    "bilinear": lambda: nn.Upsample(scale_factor=1.5, mode="bilinear"),
    "bilinear-corners": lambda: nn.Upsample((4, 7), mode="bilinear", align_corners=True),
    "bilinear-antialiased": lambda: Call(lambda x: F.interpolate(x, (3, 3), mode="bilinear", antialias=True)),
    "bicubic": lambda: nn.Upsample((5, 8), mode="bicubic"),
    "linear": lambda: Call(lambda x: F.interpolate(x[:, 1], 5, mode="linear")),
    "trilinear": lambda: Call(lambda x: F.interpolate(x[:, None], (3, 3, 4), mode="trilinear").flatten(1, 2)),
    "reflect": lambda: Call(lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect")),
    "replicate": lambda: Call(lambda x: F.pad(x[:, 1], (1, 2), mode="replicate")),
    "circular": lambda: Call(lambda x: F.pad(x, (1, 0, 0, 0), mode="circular")),
    "cumsum": lambda: Call(lambda x: x.cumsum(2)),
}
PRODUCTS: dict[str, Build] = {
    "einsum": lambda: With(lambda x, c: torch.einsum("bchw,cd->bdhw", x, c), numbers(4, 3)),
    "einsum-ellipsis": lambda: With(lambda x, c: torch.einsum("...chw, dc -> ...hwd", x, c), numbers(3, 4)),
    "einsum-implicit": lambda: With(lambda x, c: torch.einsum("nchw,gck", x, c), numbers(2, 4, 3)),
    "einsum-varied": lambda: With(lambda x, c: torch.einsum("bchw,cd->bhwcd", x, c), numbers(4, 2)),
    "einsum-two": lambda: With(
        lambda x, c, d: torch.einsum("cd,bchw,de->bewh", c, x, d), numbers(4, 3), numbers(3, 2)
    ),
    "einsum-grown": lambda: With(lambda x, c: torch.einsum("bchw,hk->bckhw", x[:, :, :1], c), numbers(5, 2)),
    "einsum-permute": lambda: Call(lambda x: torch.einsum("bchw->bwch", x)),
    "vector-last": lambda: With(lambda x, v: x.transpose(1, 3) @ v, numbers(4)),
    "vector-first": lambda: With(lambda x, v: v @ x.flatten(2), numbers(4)),
    "matrix-with-units": lambda: With(lambda x, w: x.transpose(1, 3) @ w, numbers(1, 1, 4, 3)),
    "matrices-of-heads": lambda: With(lambda x, w: x[:, :1].transpose(1, 3) @ w, numbers(3, 1, 1, 2)),
    "matrix-deeper": lambda: With(lambda x, w: x[:, :, 0, :4] @ w, numbers(1, 1, 4, 3)),
    "addcmul": lambda: With(lambda x, a, b: torch.addcmul(a, x, b, value=2), numbers(4, 1, 1), numbers(1)),
    "addcmul-added": lambda: With(lambda x, a, b: torch.addcmul(x, a, b), numbers(4, 1, 1), numbers(4, 1, 1)),
    "addcdiv": lambda: With(lambda x, a, b: torch.addcdiv(a, x, b), numbers(1), numbers(4, 1, 1)),
}
RULES = {**PARTS, **COPIES, **RESAMPLED, **PRODUCTS}
BEFORE: dict[str, Build] = {
    "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=4),
    "pointwise": lambda: nn.Conv2d(4, 4, 1),
}


def last_layer(shape: tuple[int, ...]) -> nn.Module:
    """A layer that reads what a rule made: a convolution over positions, or a Linear."""
    convs = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    if len(shape) in convs:
        return convs[len(shape)](shape[1], 3, [min(2, n) for n in shape[2:]])
    return nn.Linear(shape[-1], 3)


def models(name: str, before: str, size: tuple[int, int]) -> list[tuple[nn.Module, Tensor]]:
    """A layer and the op, alone and with another layer after it, and an input."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    head = nn.Sequential(BEFORE[before](), RULES[name]()).double().eval()
    return [(head, x), (nn.Sequential(*head, last_layer(tuple(head(x).shape))).double().eval(), x)]


def certified(region: Region) -> set[str]:
    """The kinds of a region's forms, all of them right."""
    kinds = set()
    for found, deviation in filled(region):
        assert deviation <= LIMIT, ([str(node) for node in region.nodes], found.form.kind, deviation)
        kinds.add(found.form.kind)
    return kinds


@pytest.mark.parametrize("name", RULES)
def test_every_form_of_an_op_between_layers_is_right(name: str) -> None:
    assert certified(region_of(*models(name, "conv", (4, 4))[1]))


@pytest.mark.slow
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("name", RULES)
def test_every_form_of_an_op_behind_any_layer_is_right(name: str, before: str) -> None:
    for model, x in models(name, before, (6, 8)):
        assert certified(region_of(model, x))


def test_a_part_of_a_batch_of_fixed_size_is_a_window_too() -> None:
    """No dynamic batch: the model names its size."""
    torch.manual_seed(0)
    model = nn.Sequential(Call(lambda x: x.reshape(3, 4, 5)), nn.Linear(5, 2), Call(lambda x: x[1:])).double()
    region = region_of(model, numbers(3, 4, 5))
    assert not region.axes.symbols
    assert certified(region) >= {"conv1d", "linear"}


VECTORS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "mv": (lambda x, v: torch.mv(x, v), (3, 5), (5,)),
    "addmv": (lambda x, v: torch.addmv(v[:1], x, v, beta=2, alpha=3), (3, 5), (5,)),
    "mv-of-a-vector": (lambda x, m: torch.mv(m, x), (5,), (4, 5)),
    "dot": (lambda x, v: torch.dot(x, v), (5,), (5,)),
    "matrices-of-a-vector": (lambda x, m: x @ m, (5,), (2, 5, 3)),
}


@pytest.mark.parametrize("name", VECTORS)
def test_every_form_of_a_product_with_a_vector_is_right(name: str) -> None:
    function, entry, constant = VECTORS[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(entry[-1], 5), With(function, numbers(*constant))).double()
    assert "linear" in certified(region_of(model, numbers(*entry)))


# -- what is known of the axes


def axes_of(function: Callable[[Tensor], Tensor], *shape: int) -> Axes:
    return region_of(Call(function), numbers(3, *shape)).axes


def test_a_slice_is_a_window_of_one_tap() -> None:
    (atom,) = axes_of(lambda x: x[:, 1:6:2], 8, 5).dims[1]
    assert atom.size == 3
    assert atom.window == Window(8, 2, 1, 1, 0)


def test_a_whole_slice_changes_nothing_even_on_the_batch() -> None:
    axes = axes_of(lambda x: x[:, 0:9], 8, 5)
    assert [dim[0].size for dim in axes.dims[1:]] == [8, 5]
    assert all(atom.shared for atom in axes.atoms())


def test_a_slice_of_features_are_features() -> None:
    torch.manual_seed(0)
    region = region_of(nn.Sequential(nn.Linear(5, 6), Call(lambda x: x[..., 2:5])).double(), numbers(3, 4, 5))
    assert region.axes.dims[2] == (Atom(3),)
    assert region.axes.gone == (Atom(5, 2),)


def test_a_slice_of_whole_leading_coordinates_keeps_the_others() -> None:
    axes = axes_of(lambda x: x.permute(0, 2, 1).flatten(1)[:, 4:12], 4, 6)
    window, kept = axes.dims[1]
    assert (window.size, window.axis, window.window) == (2, 2, Window(6, 1, 1, 1, 0))
    assert kept == Atom(4, 1)


def test_a_slice_of_an_axis_that_was_split_and_merged_again_is_a_window() -> None:
    (atom,) = axes_of(lambda x: x.unflatten(1, (2, 4)).flatten(1, 2)[:, 1:6], 8, 5).dims[1]
    assert atom.window == Window(8, 1, 1, 1, 0)


def test_a_slice_across_several_atoms_mixes_them() -> None:
    axes = axes_of(lambda x: x.permute(0, 2, 1).flatten(1)[:, 3:12], 4, 6)
    assert axes.dims[1] == (Atom(9),)
    assert axes.causes[-1][0] == "structure"


def test_pieces_of_a_split_lie_one_behind_the_other() -> None:
    for i, (size, start) in enumerate([(2, 0), (5, 2), (1, 7)]):
        (atom,) = axes_of(lambda x, i=i: x.split([2, 5, 1], 1)[i], 8, 5).dims[1]
        assert (atom.size, atom.window) == (size, Window(8, 1, start, start, 0))


def test_a_tuple_has_the_axes_of_the_operand() -> None:
    scope = region_of(Call(lambda x: x.chunk(2, 1)[1]), numbers(3, 8)).scope
    chunk = next(node for node in scope.gm.graph.nodes if node.name == "chunk")
    axes = Axes.entry(scope.shape(chunk.args[0]), scope.primes)
    assert apply(Step(chunk, chunk.args[0], axes, scope.sizes)) == axes


def test_parts_of_other_tuples_are_refused() -> None:
    def largest(x: Tensor) -> Tensor:
        return x.max(1)[0]

    assert refusal(largest) == "not-affine"


def test_one_position_of_a_layer_is_computed_alone() -> None:
    """The layer moves to the position that is read: a convolution on a crop, as wide as one position."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), Call(lambda x: x[:, 2])).double()
    assert min(option.cost.macs for option in options(region_of(model, numbers(3, 6, 5)))) == 5 * 7


def test_a_crop_of_a_padded_convolution_is_one_without_padding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), Call(lambda x: x[:, :, 1:-1, 1:-1])).double()
    region = region_of(model, numbers(2, 2, 6, 7))
    form = next(option.form for option in options(region) if option.form.kind == "conv2d")
    (step,) = form.steps
    assert isinstance(step, Conv)
    assert step.padding == (0, 0)


def test_a_convolution_over_all_positions_still_folds_with_the_linear_behind_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, (4, 3)), nn.Flatten(), nn.Linear(5, 2)).double()
    region = region_of(model, numbers(2, 3, 4, 3))
    assert certified(region) == {"conv2d"}


def test_nearest_neighbours_by_a_power_of_two_keep_the_positions() -> None:
    axes = axes_of(lambda x: F.interpolate(x, scale_factor=(4, 1)), 2, 3, 5)
    assert axes.dims[2] == (Atom(3, 2), Atom(4))
    assert axes.dims[3] == (Atom(5, 3),)
    assert axes_of(lambda x: F.interpolate(x, scale_factor=(3, 1)), 2, 3, 5).dims[2] == (Atom(9),)


def test_repeats_lead_and_interleaved_repeats_follow() -> None:
    assert axes_of(lambda x: x.repeat(1, 3), 4).dims[1] == (Atom(3), Atom(4, 1))
    assert axes_of(lambda x: x.repeat_interleave(3, 1), 4).dims[1] == (Atom(4, 1), Atom(3))


def test_features_do_not_mind_being_shuffled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), Call(lambda x: x.flip(-1).roll(2, -1))).double()
    axes = region_of(model, numbers(3, 4, 5)).axes
    assert axes.dims[2] == (Atom(6),)
    assert not axes.pinned


def test_pixel_shuffle_and_back_is_the_identity() -> None:
    axes = axes_of(lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), 8, 3, 5)
    assert [[(a.axis, a.stride, a.size) for a in dim] for dim in axes.dims[1:]] == [
        [(1, 4, 2), (1, 2, 2), (1, 1, 2)],
        [(2, 1, 3)],
        [(3, 1, 5)],
    ]


def test_einsum_varies_what_a_constant_has_too_and_consumes_what_the_output_lacks() -> None:
    constant = numbers(4, 2)
    region = region_of(With(lambda x, c: torch.einsum("bchw,cd->bwdc", x, c), constant), numbers(3, 4, 5, 6))
    assert region.axes.dims[1:] == ((Atom(6, 3),), (Atom(2),), (Atom(4, 1, varied=True),))
    assert region.axes.gone == (Atom(5, 2),)


@pytest.mark.parametrize(
    ("equation", "ranks", "expected"),
    [
        ("ij,jk->ik", (2, 2), ([("i", "j"), ("j", "k")], ("i", "k"))),
        ("b i , i c", (2, 2), ([("b", "i"), ("i", "c")], ("b", "c"))),
        ("ba", (2,), ([("b", "a")], ("a", "b"))),
        ("bA", (2,), ([("b", "A")], ("A", "b"))),
        ("...i,i", (3, 1), ([(-2, -1, "i"), ("i",)], (-2, -1))),
        ("i...,...ij->...j", (3, 3), ([("i", -2, -1), (-1, "i", "j")], (-2, -1, "j"))),
    ],
)
def test_labels_of_an_equation(equation: str, ranks: tuple[int, ...], expected: object) -> None:
    assert labels(equation, ranks) == expected


def test_calls_of_tensors_alone_have_rules() -> None:
    graph = fx.Graph()
    x = graph.placeholder("mul")  # the name of an op
    y = graph.call_function(torch.ops.aten.mul.Tensor, (x, 2.0))
    for node, value, known in ((x, numbers(2), False), (y, numbers(2), True), (y, 3, False)):
        node.meta["val"] = value
        assert has_rule(node) == known
    assert not has_rule(y, 0)


# -- refusals


def refusal(function: Callable[[Tensor], Tensor], *shape: int) -> str:
    """Why an op is refused, after a layer."""
    with pytest.raises(NoFold) as refused:
        region_of(Call(function), numbers(3, *(shape or (4, 6, 8))))
    return refused.value.code


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "slice": (lambda x: x[:1], "dynamic-shape"),
    "select": (lambda x: x[0], "dynamic-shape"),
    "narrow": (lambda x: x.narrow(0, 0, 1), "dynamic-shape"),
    "repeat": (lambda x: x.repeat(2, 1, 1, 1), "dynamic-shape"),
    "flip": (lambda x: x.flip(0), "batch-mixed"),
    "roll": (lambda x: x.roll(1, 0), "batch-mixed"),
    "roll-all": (lambda x: x.roll(1), "batch-mixed"),
    "index-select": (lambda x: x.index_select(0, torch.tensor([0, 1])), "batch-mixed"),
    "index": (lambda x: x[torch.tensor([1, 0])], "batch-mixed"),
    "index-apart": (lambda x: x[:, torch.tensor([1, 0]), :, torch.tensor([1, 0])], "unsupported"),
    "mask": (lambda x: x[:, torch.tensor([True, False, True, False])], "unsupported"),
    "cumsum": (lambda x: x.cumsum(0), "batch-mixed"),
    "einsum": (lambda x: torch.einsum("bchw->chw", x), "batch-mixed"),
    "einsum-diagonal": (lambda x: torch.einsum("bchh->bch", x[:, :, :, :6]), "unsupported"),
    "addcdiv": (lambda x: torch.addcdiv(torch.ones(1).double(), torch.ones(1).double(), x), "not-affine"),
    "pad": (lambda x: F.pad(x.permute(1, 2, 3, 0), (1, 0, 0, 0), mode="replicate"), "batch-mixed"),
    "bilinear": (lambda x: F.interpolate(x.permute(1, 2, 3, 0), (6, 5), mode="bilinear"), "batch-mixed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    function, code = REFUSED[name]
    assert refusal(function) == code
