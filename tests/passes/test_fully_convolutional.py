"""fully-convolutional: heads as convolutions, window by window and crop by crop, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torchvision
from folding import Of, codes, ops, seeded
from torch import Tensor, fx, nn

import graphsurgery as gs
import graphsurgery.passes.fully_convolutional as module
from graphsurgery.affine.certify import LIMIT
from graphsurgery.affine.spread import Spread
from graphsurgery.cost import graph_cost
from graphsurgery.errors import PassError
from graphsurgery.graph import capture_info, structural_hash
from graphsurgery.layout.flattened import FlattenedMap, HeadSearch
from graphsurgery.passes import FullyConvolutional
from graphsurgery.rewrite.contracts import PassResult

NAME = "fully-convolutional"


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def features(channels: int = 3) -> nn.Sequential:
    """Unpadded, one position for every two of the input: 14 x 16 gives 6 x 7."""
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))


def _view(x: Tensor) -> Tensor:
    return x.view(x.size(0), -1)


def _worked(x: Tensor, s: Tensor) -> Tensor:
    """Features split, joined, compared, made of length one, less their mean, and sliced."""
    gate, value = torch.where(x > 0, x, 0.3 * x).chunk(2, -1)
    x = nn.functional.normalize(torch.cat([gate.sigmoid() * value, nn.functional.hardswish(gate)], 1))
    x = torch.where(s > 0, x - x.mean(1, keepdim=True), 0.5)
    return torch.cat([x[:, 1::2], x[:, -5:]], 1)


class Classifier(nn.Module):
    """Features, something between, the flatten, and a head."""

    def __init__(
        self, head: nn.Module, between: nn.Module | None = None, front: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.features = front or features()
        self.between, self.head = between or nn.Identity(), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.between(self.features(x)), 1))


def mlp() -> nn.Sequential:
    """What stands behind a flatten in networks that people have, and a little more."""
    return nn.Sequential(
        *(nn.Dropout(), nn.Linear(4 * 6 * 7, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(10, 8, bias=False), nn.LayerNorm(8), nn.PReLU(8), nn.Linear(8, 5), nn.Softmax(dim=1)),
    )


def convert(model: nn.Module, x: Tensor, **options: Any) -> PassResult:
    """Rewrite in float64; the input graph stays, a second run finds nothing, and the costs add up."""
    model = copy.deepcopy(model).double()
    gm = gs.capture(model, (x.double(),))
    before = structural_hash(gm)
    result = FullyConvolutional(**options).run(gm)
    assert structural_hash(gm) == before, "the pass changed the graph that it was given"
    assert result.changes or structural_hash(result.graph_module) == before
    again = FullyConvolutional(**options).run(result.graph_module)
    assert not result.changes or not again.changes, "a second run found something"
    spent = graph_cost(result.graph_module) - graph_cost(gm)
    for change in result.changes:
        assert change.residual is not None
        assert change.residual <= LIMIT
        assert spent == change.cost_after - change.cost_before
    return result


def assert_close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert wanted.max() - wanted.min() > 1e-3 * wanted.abs().max(), "nearly constant"
    assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def assert_equal_on_crops(
    model: nn.Module, got: Callable[[Tensor], Tensor], window: tuple[int, ...], stride: int = 2
) -> None:
    """At every position of a larger input, what the network itself makes of the crop."""
    model = copy.deepcopy(model).double()
    for more in ((0,) * len(window), (4, 2, 2)[: len(window)], (1, 5, 3)[: len(window)]):
        x = noise(3, 3, *(size + added for size, added in zip(window, more, strict=True)))
        with torch.no_grad():
            scores = got(x)
            assert tuple(scores.shape[2:]) == tuple(added // stride + 1 for added in more)
            for position in product(*(range(size) for size in scores.shape[2:])):
                crop = x
                for axis, (at, size) in enumerate(zip(position, window, strict=True)):
                    crop = crop.narrow(axis + 2, stride * at, size)
                assert_close(scores[(slice(None), slice(None), *position)], model(crop))


# -- 1. what becomes convolutions --------------------------------------------------------------------------


def test_a_head_becomes_convolutions_crop_by_crop() -> None:
    model = seeded(lambda: Classifier(mlp()))
    result = convert(model, noise(2, 3, 14, 16))
    restored = gs.restore(result.graph_module)
    assert_equal_on_crops(model, restored, (14, 16))
    kinds = {name: type(part).__name__ for name, part in restored.named_modules() if name.startswith("head.")}
    assert kinds == {
        **{"head.1": "Conv2d", "head.2": "BatchNorm2d", "head.5": "Conv2d", "head.6": "LayerNorm"},
        **{"head.8": "Conv2d"},
    } | {name: kind for name, kind in kinds.items() if name == "head.7"}
    (change,) = result.changes
    assert change.kind == "flatten+linear"
    assert change.parameters == ("head.1.weight", "head.5.weight", "head.8.weight")
    assert "6 x 7" in change.detail
    assert "axes 2, 3 of input 'x'" in change.detail


def test_weights_keep_their_names_and_bits() -> None:
    model = seeded(lambda: Classifier(mlp())).double()
    old, new = model.state_dict(), gs.restore(convert(model, noise(2, 3, 14, 16)).graph_module).state_dict()
    assert set(new) == set(old)
    assert tuple(new["head.1.weight"].shape) == (10, 4, 6, 7)
    assert tuple(new["head.8.weight"].shape) == (5, 8, 1, 1)
    for name, value in old.items():
        assert torch.equal(new[name].reshape(value.shape), value)


def test_dynamic_sizes_are_recorded() -> None:
    result = convert(seeded(lambda: Classifier(mlp())), noise(2, 3, 14, 16))
    (x,) = result.graph_module.graph.find_nodes(op="placeholder")
    assert [isinstance(size, int) for size in x.meta["val"].shape] == [False, True, False, False]
    value = result.graph_module.graph.output_node().args[0][0].meta["val"]
    assert [isinstance(size, int) for size in value.shape] == [False, True, False, False]
    assert capture_info(result.graph_module).trailing_axes == (2,)


@pytest.mark.parametrize("rank", [1, 3])
def test_maps_of_other_ranks(rank: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    window = (7, 6, 5)[:rank]
    inside = 4 * torch.tensor([size - 2 for size in window]).prod().item()
    model = seeded(
        lambda: Classifier(
            nn.Sequential(nn.Linear(inside, 6), nn.Tanh(), nn.Linear(6, 3)),
            front=nn.Sequential(conv(3, 4, 3), nn.Sigmoid()),
        )
    )
    assert_equal_on_crops(model, convert(model, noise(2, 3, *window)).graph_module, window, stride=1)


def test_a_map_of_one_position() -> None:
    """LeNet-5 ends in a convolution that leaves 1 x 1 of 32 x 32."""
    front = nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(16, 20, 5), nn.Tanh()),
    )
    model = seeded(
        lambda: Classifier(nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 5)), front=front)
    )
    result = convert(model, noise(2, 3, 32, 32))
    assert_equal_on_crops(model, result.graph_module, (32, 32), stride=4)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("flatten twice", lambda m, x: m.b(torch.relu(m.a(torch.relu(m.f(x)).flatten(2).flatten(1))))),
        ("flatten channels last", lambda m, x: m.b(m.a(m.f(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1)))),
        ("activation behind the flatten", lambda m, x: m.b(m.a(m.f(x).flatten(1).tanh() * 2))),
        ("matmul and addmm", lambda m, x: torch.addmm(m.b.bias, m.f(x).flatten(1) @ m.w, m.b.weight.t())),
        ("scale of features", lambda m, x: m.b(m.a(m.f(x).flatten(1)) * m.s + m.s[None])),
        ("residual in the head", lambda m, x: m.b((h := m.a(m.f(x).flatten(1))) + torch.relu(h))),
        ("features joined", lambda m, x: m.c(torch.cat([h := m.a(m.f(x).flatten(1)), h.relu()], 1))),
        ("a copy in between", lambda m, x: m.b(m.a(_view(m.f(x).permute(0, 2, 3, 1).contiguous())))),
        ("norm on channels last", lambda m, x: m.b(m.a(m.n(m.f(x).permute(0, 2, 3, 1)).tanh().flatten(1)))),
        ("and back", lambda m, x: m.b(m.a(m.n(m.f(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).flatten(1)))),
        ("tokens", lambda m, x: m.b(m.a(m.f(x).flatten(2).transpose(1, 2).flatten(1)))),
        (
            "maximum pool",
            lambda m, x: m.b(m.a(m.p(nn.functional.adaptive_max_pool2d(m.f(x), (6, 7)).flatten(1)))),
        ),
        ("much with features", lambda m, x: m.b(_worked(m.a(m.f(x).flatten(1)), m.s))),
        ("gated", lambda m, x: m.g(nn.functional.glu(m.a(m.f(x).flatten(1)), dim=-1))),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_ways_to_write_a_head(name: str, function: Callable[..., Tensor]) -> None:
    size = 4 * 6 * 7
    model = seeded(
        lambda: Of(
            function,
            **{"f": features(), "a": nn.Linear(size, 10), "b": nn.Linear(10, 5), "c": nn.Linear(20, 5)},
            **{"n": nn.LayerNorm(4), "p": nn.PReLU(), "g": nn.Linear(5, 4)},
            **{"w": nn.Parameter(torch.randn(size, 10) / 13), "s": torch.randn(10)},
        )
    )
    result = convert(model, noise(2, 3, 14, 16))
    assert result.changes, result.refusals
    assert_equal_on_crops(model, result.graph_module, (14, 16))


def test_pictures_with_channels_last() -> None:
    model = seeded(
        lambda: Of(lambda m, x: m.a(m.f(x.permute(0, 3, 1, 2)).flatten(1)), f=features(), a=nn.Linear(168, 5))
    ).double()
    result = convert(model, noise(2, 14, 16, 3))
    assert "axes 1, 2 of input 'x'" in result.changes[0].detail
    first = Of(lambda m, x: m.inner(x.permute(0, 2, 3, 1)), inner=model)
    assert_equal_on_crops(first, lambda x: result.graph_module(x.permute(0, 2, 3, 1)), (14, 16))


def test_a_batch_that_is_fixed() -> None:
    model = seeded(lambda: Of(lambda m, x: m.a(m.f(x).reshape(3, -1)), f=features(), a=nn.Linear(168, 5)))
    result = convert(model, noise(3, 3, 14, 16))
    assert not capture_info(result.graph_module).dynamic_batch
    assert_equal_on_crops(model, result.graph_module, (14, 16))


def test_two_heads_on_one_map() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.a, self.b = features(), nn.Linear(168, 5), nn.Linear(168, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.f(x).flatten(1)
            return {"a": self.a(x), "b": self.b(x).sigmoid()}

    model = seeded(Two).double()
    result = convert(model, noise(2, 3, 14, 16))
    for key in ("a", "b"):
        single = Of(lambda m, x, key=key: m.inner(x)[key], inner=model)
        assert_equal_on_crops(single, lambda x, key=key: result.graph_module(x)[key], (14, 16))


def test_the_mean_of_the_scores_keeps_the_shape() -> None:
    model = seeded(lambda: Classifier(mlp())).double()
    scores = convert(model, noise(2, 3, 14, 16)).graph_module
    mean = convert(model, noise(2, 3, 14, 16), scores="mean").graph_module
    with torch.no_grad():
        x = noise(3, 3, 14, 16)
        assert_close(mean(x), model(x))
        larger = noise(3, 3, 20, 18)
        assert_close(mean(larger), scores(larger).mean((2, 3)))
    assert capture_info(mean).trailing_axes == (0,)


def test_a_tied_weight_stays_tied() -> None:
    """Two calls of one Linear: its weight keeps its two dimensions; both convolutions read a view of it."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.a = features(), nn.Linear(168, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.f(x).flatten(1)
            return self.a(x) + self.a(x.tanh())

    model = seeded(Tied)
    result = convert(model, noise(2, 3, 14, 16))
    assert tuple(dict(result.graph_module.named_parameters())["a.weight"].shape) == (5, 168)
    assert ops(result).count("conv2d") == 3
    assert_equal_on_crops(model, gs.restore(result.graph_module), (14, 16))


def test_an_identity_pool_is_dropped() -> None:
    model = seeded(lambda: Classifier(mlp(), nn.AdaptiveAvgPool2d((6, 7))))
    result = convert(model, noise(2, 3, 14, 16))
    assert "adaptive_avg_pool2d" not in ops(result)
    assert_equal_on_crops(model, result.graph_module, (14, 16))


def test_a_mean_along_one_axis_is_no_global_pool() -> None:
    """What is left is a map of one axis, which the head lists."""
    model = seeded(lambda: Of(lambda m, x: m.a(m.f(x).mean(3).flatten(1)), f=features(), a=nn.Linear(24, 5)))
    result = convert(model, noise(2, 3, 14, 16))
    assert "a kernel of 6; axes 2 of input 'x'" in result.changes[0].detail
    x = noise(2, 3, 20, 16)
    with torch.no_grad():
        scores = result.graph_module(x)
        assert tuple(scores.shape) == (2, 5, 4)
        for at in range(4):
            assert_close(scores[:, :, at], model.double()(x[:, :, 2 * at : 2 * at + 14]))


def test_a_cropped_shortcut() -> None:
    """A valid convolution beside what it reads, cut to the same size: alike at every position."""
    model = seeded(
        lambda: Of(
            lambda m, x: m.a((m.g(y := m.f(x)) + y[:, :, 1:-1, 1:-1]).flatten(1)),
            **{"f": features(), "g": nn.Conv2d(4, 4, 3), "a": nn.Linear(80, 5)},
        )
    )
    assert_equal_on_crops(model, convert(model, noise(2, 3, 14, 16)).graph_module, (14, 16))


def test_a_pool_that_something_else_reads_stays_for_it() -> None:
    """The head's is dropped; the output beside it has the pool's size at every size, as in the original."""
    model = seeded(
        lambda: Of(
            lambda m, x: (m.a((y := nn.functional.adaptive_avg_pool2d(m.f(x), (6, 7))).flatten(1)), y.tanh()),
            **{"f": features(), "a": nn.Linear(168, 5)},
        )
    ).double()
    got = convert(model, noise(2, 3, 14, 16)).graph_module
    single = Of(lambda m, x: m.inner(x)[0], inner=model)
    assert_equal_on_crops(single, lambda x: got(x)[0], (14, 16))
    larger = noise(2, 3, 20, 18)
    with torch.no_grad():
        assert_close(got(larger)[1], nn.functional.adaptive_avg_pool2d(model.f(larger), (6, 7)).tanh())


def test_smaller_inputs_are_turned_away_by_name() -> None:
    restored = gs.restore(convert(seeded(lambda: Classifier(mlp())), noise(2, 3, 14, 16)).graph_module)
    with pytest.raises(
        ValueError, match="input 'x' has the size 13 on axis 2, expected at least 14 for 'x_dim2'"
    ):
        restored(noise(2, 3, 13, 16))


def test_padded_features_are_those_of_the_window() -> None:
    """At each position the original head on that window of the map; the crop itself differs at its edges."""
    front = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    model = seeded(lambda: Classifier(nn.Linear(4 * 6 * 7, 5), front=front)).double()
    got = convert(model, noise(2, 3, 12, 14)).graph_module
    x = noise(2, 3, 18, 16)
    with torch.no_grad():
        scores, seen = got(x), model.features(x)
        assert tuple(scores.shape[2:]) == (4, 2)
        for i, j in product(range(4), range(2)):
            assert_close(scores[:, :, i, j], model.head(seen[:, :, i : i + 6, j : j + 7].flatten(1)))
        crop = model(x[:, :, 2:14, 0:14])
        assert (scores[:, :, 1, 0] - crop).abs().max() > 1e-3


# -- 2. what is left alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.conv(x),
        lambda m, x: m.a(x),
        lambda m, x: m.conv(x).flatten(1),
        lambda m, x: m.a(m.conv(x)).sum(1),
    ],
    ids=["no-linear", "linear-over-the-last-axis", "no-linear-behind-the-flatten", "linear-over-rows"],
)
def test_noop_on_what_has_no_flattened_map(function: Callable[..., Tensor]) -> None:
    model = seeded(lambda: Of(function, conv=nn.Conv2d(3, 4, 3, padding=1), a=nn.Linear(8, 5)))
    result = convert(model, noise(2, 3, 8, 8))
    assert not result.changes
    assert not result.refusals


# -- 3. what is refused ------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[str, Callable[..., Any]]] = {
    "pool of maxima": (
        "pool-not-identity",
        lambda m, x: m.l(nn.functional.adaptive_max_pool2d(m.f(x), 3).flatten(1)),
    ),
    "global maximum": (
        "global-pool",
        lambda m, x: m.t(nn.functional.adaptive_max_pool2d(m.f(x), 1).flatten(1)),
    ),
    "largest": ("global-pool", lambda m, x: m.t(m.f(x).amax((2, 3)))),
    "slopes of the list": ("position-weights", lambda m, x: m.a(nn.functional.prelu(m.f(x).flatten(1), m.s))),
    "a channel flattened": ("fixed-size", lambda m, x: m.c(m.f(x)[:, 0].flatten(1))),
    "norm of tokens": ("fixed-size", lambda m, x: m.a(m.q(m.f(x).flatten(2).transpose(1, 2)).flatten(1))),
    "list in pieces": ("not-per-position", lambda m, x: m.k(m.f(x).flatten(1).chunk(2, 1)[0])),
    "best class": ("no-map-form", lambda m, x: m.a(m.f(x).flatten(1)).argmax(1)),
    "another pool": (
        "pool-not-identity",
        lambda m, x: m.l(nn.functional.adaptive_avg_pool2d(m.f(x), 3).flatten(1)),
    ),
    "global pool": ("global-pool", lambda m, x: m.t(nn.functional.adaptive_avg_pool2d(m.f(x), 1).flatten(1))),
    "mean": ("global-pool", lambda m, x: m.t(m.f(x).mean((2, 3)))),
    "mean of kept rank": ("global-pool", lambda m, x: m.t(m.f(x).mean((2, 3), keepdim=True).flatten(1))),
    "samples mixed": ("mixed-axes", lambda m, x: m.k(m.f(x).reshape(2 * len(x), -1))),
    "softmax of the list": ("not-per-position", lambda m, x: m.a(m.f(x).flatten(1).softmax(1))),
    "softmax over positions": ("not-per-position", lambda m, x: m.a(m.f(x).softmax(-1).flatten(1))),
    "norm of the map": ("not-per-position", lambda m, x: m.a(nn.functional.group_norm(m.f(x), 2).flatten(1))),
    "gate of the map": (
        "not-per-position",
        lambda m, x: m.a(((y := m.f(x)) * y.mean((2, 3), True)).flatten(1)),
    ),
    "mirrored": ("not-per-position", lambda m, x: m.a(m.f(x).flip(3).flatten(1))),
    "norm of the list": ("position-weights", lambda m, x: m.a(m.n(m.f(x).flatten(1)))),
    "scale of the list": ("position-weights", lambda m, x: m.a(m.f(x).flatten(1) * m.s)),
    "list returned": ("flat-output", lambda m, x: (m.a(y := m.f(x).flatten(1)), y)),
    "features made a map": ("no-map-form", lambda m, x: m.a(m.f(x).flatten(1)).reshape(-1, 5, 2)),
    "other readers": ("no-map-form", lambda m, x: m.a(m.f(x).flatten(1)) * x.mean((1, 2))[:, :10]),
    "positions embedded": ("fixed-size", lambda m, x: m.a((m.f(x) + m.p).flatten(1))),
    "not finite": ("not-finite", lambda m, x: m.a(m.f(x).flatten(1)) @ m.inf),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    code, function = REFUSED[name]
    infinite = torch.randn(10, 3)
    infinite[2, 1] = float("inf")
    parts = {"f": features(), "a": nn.Linear(168, 10), "l": nn.Linear(36, 5), "t": nn.Linear(4, 5)}
    parts |= {"k": nn.Linear(84, 5), "n": nn.BatchNorm1d(168), "q": nn.LayerNorm(4), "c": nn.Linear(42, 5)}
    model = seeded(
        lambda: Of(function, **parts, s=torch.randn(168), p=torch.randn(4, 6, 7), inf=infinite)  # type: ignore[arg-type]
    )
    result = convert(model, noise(2, 3, 14, 16))
    assert not result.changes
    assert codes(result) == [code]
    assert result.refusals[0].nodes[0].source


def test_refuses_attention_over_positions() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.a = features(), nn.Linear(168, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.f(x)
            rows = x.flatten(2).transpose(1, 2)
            seen = nn.functional.scaled_dot_product_attention(rows, rows, rows).transpose(1, 2)
            return self.a((x + seen.unflatten(2, x.shape[2:])).flatten(1))

    result = convert(seeded(Attention), noise(2, 3, 14, 16))
    assert not result.changes
    assert set(codes(result)) <= {"not-per-position", "fixed-size"}
    assert result.refusals


def test_refuses_a_pool_of_a_map_of_free_size() -> None:
    model = seeded(lambda: Classifier(nn.Linear(36, 5), nn.AdaptiveAvgPool2d(3))).double()
    height, width = torch.export.Dim("h", min=14, max=99), torch.export.Dim("w", min=16, max=99)
    gm = gs.capture(model, noise(2, 3, 14, 16), dynamic_shapes={"x": {2: height, 3: width}})
    result = FullyConvolutional().run(gm)
    assert codes(result) == ["pool-not-identity"]
    assert "makes (3, 3) of a map of any size" in result.refusals[0].reason


@pytest.mark.parametrize("function", [lambda y: y > 0, lambda y: y.argmax(1, keepdim=True)])
def test_outputs_that_are_no_floating_point_numbers(function: Callable[[Tensor], Tensor]) -> None:
    model = seeded(
        lambda: Of(lambda m, x: function(m.a(m.f(x).flatten(1))), f=features(), a=nn.Linear(168, 5))
    )
    got, x = convert(model, noise(2, 3, 14, 16)).graph_module, noise(3, 3, 18, 18)
    model = model.double()
    with torch.no_grad():
        found = got(x)
        assert found.unique().numel() > 1
        for i, j in product(range(3), range(2)):
            crop = x[:, :, 2 * i : 2 * i + 14, 2 * j : 2 * j + 16]
            assert torch.equal(found[:, :, i, j], model(crop))


def test_refuses_the_mean_of_what_has_none() -> None:
    model = seeded(lambda: Of(lambda m, x: m.a(m.f(x).flatten(1)) > 0, f=features(), a=nn.Linear(168, 5)))
    result = convert(model, noise(2, 3, 14, 16), scores="mean")
    assert codes(result) == ["no-mean"]
    assert "torch.bool" in result.refusals[0].reason


def test_refuses_an_unknown_option() -> None:
    with pytest.raises(PassError, match=r"'map' or 'mean', got 'max'"):
        FullyConvolutional(scores="max")  # type: ignore[arg-type]


# -- 4. the pipeline ---------------------------------------------------------------------------------------


def test_it_runs_by_name_only() -> None:
    assert NAME not in [item.name for item in gs.passes.default_passes()]


@pytest.mark.parametrize("scores", ["map", pytest.param("mean", marks=pytest.mark.sweep)])
def test_optimize_verifies_exports_and_saves(scores: Any, tmp_path: Path) -> None:
    model = seeded(lambda: Classifier(mlp()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = noise(1, 3, 14, 16).float()
    passes = [FullyConvolutional(scores=scores), *gs.passes.default_passes()]
    result = gs.optimize(model, x, passes=passes)
    assert not result.report.failures
    assert result.report.verification is not None
    assert result.report.verification.ok
    assert result.report.changes[0].pass_name == NAME
    assert result.report.after.macs <= result.report.before.macs, "counted at the example's size"

    exported = result.export_onnx(tmp_path / "net.onnx")
    assert exported.verdict is not None
    assert exported.verdict.ok
    result.save(tmp_path / "net.pt2")
    saved = torch.export.load(tmp_path / "net.pt2").module()
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (given,) = session.get_inputs()
    assert given.shape == ["batch", 3, f"{given.name}_dim2", f"{given.name}_dim3"]
    exact = convert(model, x, scores=scores).graph_module
    for shape in ((1, 3, 14, 16), (3, 3, 15, 17), (2, 3, 14, 22), (2, 3, 30, 27)):
        y = noise(*shape)
        with torch.no_grad():
            wanted = exact(y)
            candidates = (result.module(y.float()), saved(y.float()))
        (on_onnx,) = session.run(None, {given.name: y.float().numpy()})
        for got in (*candidates, torch.from_numpy(on_onnx)):
            assert got.shape == wanted.shape
            assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_wrong_map_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline compares the map at the example's size with the logits, whatever the pass says of it."""
    monkeypatch.setattr(module, "residual", lambda *_: 0.0)
    _perturb(monkeypatch, 1.001)
    result = gs.optimize(seeded(lambda: Classifier(mlp())), noise(2, 3, 14, 16).float(), passes=[NAME])
    assert [failure.pass_name for failure in result.report.failures] == [NAME]
    assert not result.report.changes


# -- 5. wrong rewrites -------------------------------------------------------------------------------------


def _perturb(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Let one coefficient of every kernel come out wrong."""
    kernel = Spread._kernel

    def wrong(self: Spread, node: fx.Node, *args: Any) -> fx.Node:
        found = kernel(self, node, *args)
        *path, leaf = str(found.target).split(".")
        owner = self.gm.get_submodule(".".join(path))
        value = getattr(owner, leaf).detach().clone()
        value[1, 2, -1, -1] *= factor
        setattr(owner, leaf, nn.Parameter(value))
        return found

    monkeypatch.setattr(Spread, "_kernel", wrong)


def test_detects_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    _perturb(monkeypatch, 1.001)
    result = FullyConvolutional().run(
        gs.capture(seeded(lambda: Classifier(mlp())).double(), noise(2, 3, 14, 16))
    )
    assert codes(result) == ["certificate"]


def test_detects_axes_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels-last flattening read as channels-first: the shapes fit, the numbers are others."""
    head = HeadSearch._head

    def wrong(self: HeadSearch, node: fx.Node) -> FlattenedMap:
        found = head(self, node)
        return replace(found, flat=replace(found.flat, order=(1, 2, 3)))

    monkeypatch.setattr(HeadSearch, "_head", wrong)
    model = seeded(
        lambda: Of(lambda m, x: m.a(m.f(x).permute(0, 2, 3, 1).flatten(1)), f=features(), a=nn.Linear(168, 5))
    )
    result = FullyConvolutional().run(gs.capture(model.double(), noise(2, 3, 14, 16)))
    assert codes(result) == ["certificate"]


# -- 6. networks that people have --------------------------------------------------------------------------


def torchvision_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
    return model


def narrow_alexnet() -> nn.Module:
    """AlexNet as torchvision builds it, with layers of the classifier a sixteenth as wide."""
    model = torchvision_network("alexnet")
    model.classifier[1], model.classifier[4] = nn.Linear(256 * 36, 256), nn.Linear(256, 256)
    model.classifier[6] = nn.Linear(256, 50)
    return model.eval()


def check_network(model: nn.Module, larger: int, path: Path) -> None:
    """224 by example; at a larger size, head by head on windows of the features, in torch and onnxruntime."""
    result = gs.optimize(model, noise(1, 3, 224, 224).float(), passes=[NAME])
    assert result.report.verification is not None
    assert result.report.verification.ok
    assert [change.kind for change in result.report.changes] == ["flatten+linear"]
    exported = result.export_onnx(path / "net.onnx")
    assert exported.verdict is not None
    assert exported.verdict.ok
    x = noise(1, 3, larger, larger - 32).float()
    kernel = model.avgpool.output_size
    with torch.no_grad():
        seen, scores = model.features(x), result.module(x)
        (on_onnx,) = onnxruntime.InferenceSession(path / "net.onnx").run(None, {"x": x.numpy()})
        rows, columns = (seen.shape[2 + i] - kernel[i] + 1 for i in range(2))
        assert tuple(scores.shape) == (1, model.classifier[-1].out_features, rows, columns)
        assert rows > 1
        assert columns > 1
        for i, j in {(0, 0), (rows - 1, columns - 1), (rows // 2, 0), (1, columns - 1)}:
            window = seen[:, :, i : i + kernel[0], j : j + kernel[1]]
            wanted = model.classifier(window.flatten(1))
            for got in (scores, torch.from_numpy(on_onnx)):
                assert (got[:, :, i, j] - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    old, new = model.state_dict(), result.module.state_dict()
    assert set(old) == set(new)
    assert all(torch.equal(new[name].reshape(value.shape), value) for name, value in old.items())


@pytest.mark.slow
def test_alexnet_with_a_narrow_head(tmp_path: Path) -> None:
    check_network(narrow_alexnet(), 320, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_torchvision_networks(name: str, tmp_path: Path) -> None:
    check_network(torchvision_network(name), 384, tmp_path)
