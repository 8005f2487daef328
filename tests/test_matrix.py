"""The matrix of a module or stretch: right, as sparse as it should be, or refused with the op's name."""

from __future__ import annotations

import builtins
import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_chains import random_chain
from torch import Tensor, nn
from torchvision.models import resnet18

import graphsurgery as gs
from graphsurgery.affine.certify import LIMIT
from graphsurgery.capture import capture
from graphsurgery.matrix import residual
from graphsurgery.matrix.branches import Branches, selection
from graphsurgery.matrix.plot import shrunk
from graphsurgery.matrix.rows import product
from graphsurgery.matrix.segments import segments
from graphsurgery.matrix.stretch import find

MAP = (4, 9, 8)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A module in evaluation with seeded weights and running statistics that are not trivial."""
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.weight, module.bias):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def error(model: nn.Module, found: gs.AffineMatrix, shape: tuple[int, ...]) -> float:
    """Largest difference of product and module in float64 on three samples, relative to the largest value."""
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(x).flatten(1)
    if found.axes is not None:
        got = found.apply(x).flatten(1)
    else:
        got = (found.matrix @ x.flatten(1).T).T + found.bias
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


class Call(nn.Module):
    """A function as a module, with a padded convolution of four channels."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv, x)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 10)),
    "conv2d-stride-dilation-groups": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
        MAP,
    ),
    "conv2d-depthwise-even-same": (lambda: nn.Conv2d(4, 8, (2, 3), padding="same", groups=4), MAP),
    "conv2d-reflect": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), MAP),
    "conv2d-circular": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular", bias=False), MAP),
    "conv3d": (lambda: nn.Conv3d(2, 3, (3, 2, 1), padding=(1, 1, 0), stride=(1, 2, 1)), (2, 5, 6, 4)),
    "transposed1d-dilated": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=3, padding=1, dilation=2), (4, 7)),
    "transposed2d-groups": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), MAP),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 2, 2, stride=2), (2, 3, 3, 2)),
    "linear-over-tokens": (lambda: nn.Linear(8, 5), (7, 8)),
    "norm": (lambda: nn.BatchNorm2d(4), MAP),
    "pool": (lambda: nn.AvgPool2d(3, 2, 1), MAP),
    "pool-clipped": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False, ceil_mode=True), MAP),
    "pool-uneven": (lambda: nn.AdaptiveAvgPool2d((4, 3)), MAP),
    "bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), MAP),
    "pad-with-a-value": (lambda: nn.ConstantPad2d((1, -1, 2, 0), 2.5), MAP),
    "padded-behind-padded": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3, padding=1)
        ),
        MAP,
    ),
    "strided-then-transposed": (
        lambda: nn.Sequential(nn.Conv2d(4, 3, 3, 2), nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 5, 3, 2)),
        MAP,
    ),
    "transposed-then-strided": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 3, 3, 2), nn.Conv2d(3, 5, 3, 2, padding=1)),
        MAP,
    ),
    "conv-flatten-linear": (
        lambda: nn.Sequential(nn.Conv2d(4, 5, 3, stride=2), nn.Flatten(), nn.Linear(60, 7)),
        MAP,
    ),
    "shuffles": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 1, groups=2),
            nn.ChannelShuffle(4),
            nn.Conv2d(8, 16, 1, groups=2),
            nn.PixelShuffle(2),
        ),
        MAP,
    ),
    "conv2d-replicate-strided": (
        lambda: nn.Conv2d(4, 3, 3, padding=(2, 1), stride=2, padding_mode="replicate"),
        MAP,
    ),
    "token": (
        lambda: Call(lambda conv, x: torch.cat([conv.weight[:1, 0, :1].expand(x.shape[0], 4, 9, 3), x], 3)),
        MAP,
    ),
    "token-between-layers": (
        lambda: Call(
            lambda conv, x: conv(torch.cat([conv.bias[0].expand(x.shape[0], 1, 9, 8), conv(x)[:, 1:]], 1))
        ),
        MAP,
    ),
    "grid-of-coordinates": (
        lambda: Call(
            lambda conv, x: conv(
                torch.cat([x[:, :3], torch.arange(8.0).to(x.dtype).expand(x.shape[0], 1, 9, 8)], 1)
            )
        ),
        MAP,
    ),
    "ones-of-its-shape": (lambda: Call(lambda conv, x: torch.cat([x, torch.ones_like(x[:, :1])], 1)), MAP),
    "residual-of-two-padded": (lambda: Call(lambda conv, x: x + conv(0.5 * conv(x) + 1)), MAP),
    "skip-over-a-resolution": (
        lambda: Call(
            lambda conv, x: conv(
                x[..., :8, :] - 2 * F.interpolate(F.avg_pool2d(conv(x), 2), scale_factor=2, mode="bilinear")
            )
        ),
        MAP,
    ),
    "context-beside-windows": (
        lambda: Call(lambda conv, x: torch.cat([conv(conv(x)), x.mean((2, 3), True).expand_as(x)], 1)),
        MAP,
    ),
    "branches": (lambda: Call(lambda conv, x: x + 0.5 * conv(conv(x)) - x.flip(2)), MAP),
    "channels-last": (lambda: Call(lambda conv, x: conv(x).permute(0, 2, 3, 1) * 2 + 1), MAP),
    "concatenation": (lambda: Call(lambda conv, x: torch.cat([conv(x), x[:, 1:3]], 1)), MAP),
    "identity": (nn.Identity, MAP),
}
every_case = pytest.mark.parametrize("name", CASES)


@every_case
@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_finds_the_matrix(name: str, form: Any) -> None:
    make, shape = CASES[name]
    model = seeded(make)
    found = gs.affine_matrix(model, torch.randn(2, *shape), form=form)
    assert found.form == form
    assert found.matrix.layout == (torch.sparse_csr if form == "sparse" else torch.strided)
    assert found.matrix.dtype == found.bias.dtype == torch.float64
    assert found.input_shape == shape
    assert found.residual <= 1e-13
    assert error(model, found, shape) <= 1e-13


@every_case
def test_the_sparse_matrix_holds_what_the_module_reads_and_no_more(name: str) -> None:
    make, shape = CASES[name]
    model = copy.deepcopy(seeded(make)).double()
    size = torch.zeros(1, *shape).numel()
    with torch.no_grad():
        shift = model(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
        columns = model(torch.eye(size, dtype=torch.float64).reshape(size, *shape)).flatten(1).T
    wanted = columns - shift[:, None]
    found = gs.affine_matrix(model, torch.randn(2, *shape, dtype=torch.float64), form="sparse")
    reads = wanted.abs() > 1e-12
    assert torch.equal(found.matrix.to_dense().abs() > 1e-12, reads)
    assert found.matrix.values().numel() <= 1.05 * int(reads.sum())  # sums that cancel may leave rounding
    assert found.density == pytest.approx(found.nonzeros / wanted.numel())


def check_a_random_chain(seed: int) -> None:
    model, x = random_chain(seed, 1 + seed % 5)
    size = x[0].numel()
    with torch.no_grad():
        shift = model(torch.zeros_like(x))[0].flatten()
        columns = model(torch.eye(size, dtype=torch.float64).reshape(size, *x.shape[1:])).reshape(size, -1).T
    wanted = columns - shift[:, None]
    found = gs.affine_matrix(model, x, form="sparse")
    scale = max(float(wanted.abs().max()), float(shift.abs().max()))
    # the wanted columns are differences of two float64 values: their rounding is relative to the largest
    torch.testing.assert_close(found.matrix.to_dense(), wanted, rtol=0, atol=1e-11 * scale)
    torch.testing.assert_close(found.bias, shift, rtol=0, atol=1e-11 * scale)
    reads = int((wanted.abs() > 1e-9 * wanted.abs().max()).sum())
    assert found.matrix.values().numel() <= 1.2 * reads + 2, model


@pytest.mark.parametrize("seed", range(12))
def test_random_chains(seed: int) -> None:
    check_a_random_chain(seed)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(1000, 1400))
def test_many_random_chains(seed: int) -> None:
    check_a_random_chain(seed)


def test_weights_of_low_precision_are_taken_as_they_are() -> None:
    model = seeded(lambda: nn.Conv2d(4, 6, 3, padding=1)).to(torch.bfloat16)
    found = gs.affine_matrix(model, torch.randn(2, *MAP, dtype=torch.bfloat16), form="sparse")
    assert error(model, found, MAP) <= 1e-13


def test_the_convolution_of_a_map_of_64() -> None:
    model = seeded(lambda: nn.Conv2d(3, 8, 3, padding=1)).double()
    found = gs.affine_matrix(model, torch.randn(2, 3, 64, 64, dtype=torch.float64), form="sparse")
    assert found.matrix.shape == (8 * 64 * 64, 3 * 64 * 64)
    assert error(model, found, (3, 64, 64)) <= 1e-12
    inside = 64 * 3 - 2  # taps of all positions of one axis that lie inside
    assert found.matrix.values().numel() == found.nonzeros == 8 * 3 * inside**2
    assert found.size_bytes == 12 * found.nonzeros + 4 * (8 * 64 * 64 + 1)
    assert gs.affine_matrix(model, torch.randn(2, 3, 8, 8, dtype=torch.float64)).form == "sparse"


PEAK = """
import resource, sys, torch
from torch import nn
import graphsurgery as gs
torch.manual_seed(0)
model = nn.Conv2d(3, 8, 3, padding=1)
if sys.argv[2] == "2":
    model = nn.Sequential(model, nn.Conv2d(8, 8, 3, padding=1))
gs.affine_matrix(model, torch.randn(2, 3, 8, 8), form="sparse")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = gs.affine_matrix(model, torch.randn(2, 3, int(sys.argv[1]), int(sys.argv[1])), form="sparse")
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024, found.size_bytes, found.matrix.shape[0] * found.matrix.shape[1] * 8)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "size"), [(1, 64), (1, 256), (2, 96)])
def test_the_dense_matrix_never_exists(layers: int, size: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(size), str(layers)], capture_output=True, text=True, check=True
    )
    peak, kept, dense = map(int, done.stdout.split())
    # Proportional to the non-zeros: a small multiple of what is kept, and room for one chunk of rows.
    assert peak <= 3 * kept + 64e6, f"{peak:,} bytes more for {kept:,}"
    assert 3 * kept + 64e6 < dense / 30


def test_a_convolution_is_doubly_block_toeplitz_of_its_weight_bit_for_bit() -> None:
    model = seeded(lambda: nn.Conv2d(3, 4, 3, padding=1))
    found = gs.affine_matrix(model, torch.randn(2, 3, 6, 5), form="sparse")
    blocks = found.matrix.to_dense().reshape(4, 6, 5, 3, 6, 5)
    weight = model.weight.detach().double()
    for row in range(6):
        for column in range(5):
            at = torch.zeros(4, 3, 8, 7, dtype=torch.float64)  # the padded map
            at[:, :, row : row + 3, column : column + 3] = weight
            assert torch.equal(blocks[:, row, column], at[:, :, 1:-1, 1:-1])
    assert torch.equal(found.bias.reshape(4, 6, 5)[:, 2, 3], model.bias.detach().double())


def test_auto_takes_what_is_smaller() -> None:
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 5)))
    full = gs.affine_matrix(model, torch.randn(2, 9, 8))
    assert (full.form, full.size_bytes) == ("dense", 5 * 72 * 8)
    with torch.no_grad():
        model[1].weight[:, ::2] = 0
    half = gs.affine_matrix(model, torch.randn(2, 9, 8))
    assert (half.form, half.nonzeros, half.sparsity) == ("sparse", 180, 0.5)
    assert error(model, half, (9, 8)) <= 1e-13


CHANNELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, int]]] = {
    "conv1x1": (lambda: nn.Conv2d(4, 6, 1), MAP, (1, 1)),
    "linear": (lambda: nn.Linear(8, 3), (7, 8), (2, 2)),
    "grouped": (lambda: nn.Conv1d(4, 6, 1, groups=2), (4, 7), (1, 1)),
    "one-of-one": (lambda: nn.Conv2d(1, 1, 1), (1, 9, 8), (1, 1)),
    "one-number": (lambda: nn.Linear(1, 1), (1,), (1, 1)),
    "one-feature": (lambda: nn.Conv2d(4, 1, 1), MAP, (1, 1)),
    "one-channel": (lambda: nn.Conv2d(1, 4, 1), (1, 9, 8), (1, 1)),
    "with-norms": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)),
        MAP,
        (1, 1),
    ),
    "to-channels-last": (
        lambda: Call(lambda conv, x: F.conv2d(x, conv.weight[..., :1, :1], conv.bias).permute(0, 2, 3, 1)),
        MAP,
        (1, 3),
    ),
    "shuffled": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.ChannelShuffle(4)),
        MAP,
        (1, 1),
    ),
}


@pytest.mark.parametrize("name", CHANNELS)
def test_finds_the_matrix_of_channels(name: str) -> None:
    make, shape, axes = CHANNELS[name]
    model = seeded(make)
    found = gs.affine_matrix(model, torch.randn(2, *shape), form="channels")
    assert (found.form, found.axes) == ("channels", axes)
    assert found.matrix.shape == (*found.output_shape, *found.input_shape)
    assert error(model, found, shape) <= 1e-13


def test_the_matrix_of_a_pointwise_convolution_is_its_weight() -> None:
    model = seeded(lambda: nn.Conv2d(4, 6, 1))
    found = gs.affine_matrix(model, torch.randn(2, *MAP), form="channels")
    assert torch.equal(found.matrix, model.weight.detach()[:, :, 0, 0].double())
    assert torch.equal(found.bias, model.bias.detach().double())


class Twice(nn.Module):
    """One module called twice, and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.conv(x)))


class Two(nn.Module):
    """Two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        made = self.first(x) + y
        return made, self.second(made)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str, str]] = {
    "relu": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), {}, "not-affine", "relu of '1'"),
    "layer-norm": (lambda: nn.LayerNorm(8), {}, "not-affine", "layer_norm"),
    "max-pool": (lambda: nn.MaxPool2d(2), {}, "not-affine", "max_pool2d"),
    "square": (lambda: Call(lambda conv, x: conv(x) * x), {}, "not-affine", "mul"),
    "line-of-the-user": (
        lambda: Call(lambda conv, x: conv(x).abs()),
        {},
        "not-affine",
        r"abs.*test_matrix\.py:\d+",
    ),
    "samples-in-a-row": (lambda: Call(lambda conv, x: x - x.mean(0)), {}, "batch-mixed", "samples together"),
    "token-that-counts-samples": (
        lambda: Call(
            lambda conv, x: torch.cat(
                [x, torch.arange(x.shape[0]).view(-1, 1, 1, 1) * x.new_ones(1, 4, 9, 1)], 3
            )
        ),
        {},
        "batch-varied",
        "differs from sample to sample",
    ),
    "token-by-the-batch": (
        lambda: Call(lambda conv, x: torch.cat([x, x.new_full((x.shape[0], 4, 9, 1), 1.0) / x.shape[0]], 3)),
        {},
        "batch-varied",
        "differs from sample to sample",
    ),
    "token-alone": (
        lambda: Call(lambda conv, x: conv.bias.expand(x.shape[0], 4)),
        {},
        "constant",
        "does not depend",
    ),
    "zeros-of-its-shape": (
        lambda: Call(lambda conv, x: torch.zeros_like(x)),
        {},
        "constant",
        "does not depend",
    ),
    "batch-second": (lambda: Call(lambda conv, x: conv(x).transpose(0, 1)), {}, "batch-order", "batch"),
    "constant": (lambda: Call(lambda conv, x: conv.bias * 2), {}, "constant", "does not depend"),
    "not-finite": (lambda: Call(lambda conv, x: conv(x) * float("inf")), {}, "not-finite", "finite"),
    "channels-of-windows": (lambda: nn.Conv2d(4, 4, 3), {"form": "channels"}, "structure", "windows"),
    "channels-of-two-segments": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)),
        {"form": "channels"},
        "structure",
        "windows",
    ),
    "channels-of-a-map-of-shifts": (
        lambda: Call(lambda conv, x: x + conv.weight.sum((0, 1, 2)).repeat(3)[:8]),
        {"form": "channels"},
        "structure",
        "alike",
    ),
    "called-twice": (Twice, {"path": "conv"}, "several-inputs", "more than once"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    make, options, code, said = REFUSED[name]
    with pytest.raises(gs.NotAffineError, match=said) as refusal:
        gs.affine_matrix(seeded(make), torch.randn(2, *MAP), **options)
    assert refusal.value.code == code


def test_refuses_a_bias_of_positions_for_channels() -> None:
    model = seeded(lambda: nn.Sequential(nn.ConstantPad2d(1, 0.5), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 6, 1)))
    biased = Call(lambda conv, x: F.conv2d(x, conv.weight[..., :1, :1]) + torch.arange(8.0))
    for module, path, code in (
        (model, "2", None),
        (model, None, "structure"),
        (biased, None, "position-bias"),
    ):
        if code is None:
            assert (
                gs.affine_matrix(module, torch.randn(2, *MAP), path=path, form="channels").form == "channels"
            )
            continue
        with pytest.raises(gs.NotAffineError) as refusal:
            gs.affine_matrix(module, torch.randn(2, *MAP), path=path, form="channels")
        assert refusal.value.code == code


def test_refuses_several_inputs_and_outputs() -> None:
    inputs = (torch.randn(2, 8), torch.randn(2, 8))
    model = seeded(Two)
    gm = capture(model, inputs)
    for path, code in ((None, "several-outputs"), (("first", "second"), "several-inputs")):
        with pytest.raises(gs.NotAffineError) as refusal:
            gs.affine_matrix(gm, path=path)
        assert refusal.value.code == code
    found = gs.affine_matrix(gm, path="second")
    assert torch.equal(found.matrix, model.second.weight.detach().double())


def test_unknown_paths_and_forms_are_named() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    with pytest.raises(ValueError, match=r"'2' \(.*leaves none\); there are 0, 1"):
        gs.affine_matrix(model, torch.randn(2, *MAP), path="2")
    for path in (0, ("0", "0", "1"), "0..0..1", ("0", 1)):
        with pytest.raises(ValueError, match="expected the path of a module"):
            gs.affine_matrix(model, torch.randn(2, *MAP), path=path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'csr'"):
        gs.affine_matrix(model, torch.randn(2, *MAP), form="csr")  # type: ignore[arg-type]


def test_a_stretch_of_a_network() -> None:
    model = seeded(lambda: resnet18(num_classes=10))
    gm = capture(model, torch.randn(2, 3, 32, 32))
    found = gs.affine_matrix(gm, path=("layer2.0.conv1", "layer2.0.bn1"))
    stretch = nn.Sequential(model.layer2[0].conv1, model.layer2[0].bn1)
    assert (found.input_shape, found.output_shape) == ((64, 8, 8), (128, 4, 4))
    assert error(stretch, found, (64, 8, 8)) <= 1e-13
    head = gs.affine_matrix(gm, path=("avgpool", "fc"))
    assert error(nn.Sequential(model.avgpool, nn.Flatten(), model.fc), head, head.input_shape) <= 1e-13
    assert head.rank == 10
    with pytest.raises(gs.NotAffineError, match=r"relu of 'layer2\.0\.relu' \(resnet\.py:\d+") as refusal:
        gs.affine_matrix(gm, path="layer2.0")
    assert refusal.value.code == "not-affine"
    with pytest.raises(gs.NotAffineError, match="also reads 'x'"):
        gs.affine_matrix(gm, path=("layer2.0.bn2", "layer2.1.conv1"))


def test_a_stretch_is_written_in_three_ways_and_not_backwards() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5), nn.ReLU()))
    gm = capture(model, torch.randn(2, 8))
    wanted = model[1].weight.detach().double() @ model[0].weight.detach().double()
    for path in ("0..1", ("0", "1"), ["0", "1"]):
        found = gs.affine_matrix(gm, path=path, form="dense")
        torch.testing.assert_close(found.matrix, wanted, rtol=0, atol=1e-14)
    # what the second layer reads is what the first one makes: no stretch, and no identity either
    with pytest.raises(gs.NotAffineError, match="'0' does not follow '1'") as refusal:
        gs.affine_matrix(gm, path="1..0")
    assert refusal.value.code == "order"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_values_without_elements_are_named() -> None:
    none = Call(lambda conv, x: x[:, :0])
    for model, x in ((none, torch.randn(2, *MAP)), (nn.Linear(0, 3), torch.randn(2, 0))):
        with pytest.raises(gs.NotAffineError, match="no elements") as refusal:
            gs.affine_matrix(model, x)
        assert refusal.value.code == "empty"


def test_a_matrix_above_the_limit_is_declined_before_it_is_made() -> None:
    model = seeded(lambda: nn.Conv2d(4, 4, 3, padding=1))
    gm = capture(model, torch.randn(2, *MAP))
    size = 8 * 288 * 288
    with pytest.raises(
        ValueError, match=f"288 x 288 takes {size:,} bytes, more than the limit of {size - 1:,}"
    ):
        gs.affine_matrix(gm, form="dense", limit_bytes=size - 1)
    assert gs.affine_matrix(gm, form="dense", limit_bytes=size).form == "dense"
    entries = gs.affine_matrix(gm, form="sparse").nonzeros
    with pytest.raises(
        ValueError, match=rf"288 x 288 has {entries:,} non-zeros and more.*limit_bytes=\.\.\."
    ):
        gs.affine_matrix(gm, form="sparse", limit_bytes=12 * entries - 1)
    found = gs.affine_matrix(gm, limit_bytes=12 * entries)
    assert (found.form, found.nonzeros) == ("sparse", entries)
    with pytest.raises(ValueError, match="limit"):  # a huge one is declined by its numbers alone
        gs.affine_matrix(nn.Conv2d(3, 64, 1), torch.randn(2, 3, 512, 512), form="dense")


def test_branches_are_no_denser_than_what_they_read() -> None:
    """Each was probed element by element as one dense block, minutes for a map of 48."""
    block = Call(lambda conv, x: x + conv(conv(x)))
    gm = capture(block.eval(), torch.randn(2, 4, 48, 48))
    (part,) = segments(find(gm, None))
    assert isinstance(part, Branches)
    found = gs.affine_matrix(gm, form="sparse")
    assert error(block, found, (4, 48, 48)) <= 1e-13
    assert found.nonzeros <= 4 * 25 * found.matrix.shape[0]
    reflected = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    assert len(segments(find(capture(reflected, torch.randn(2, 4, 48, 48)), None))) == 2


def test_a_sum_is_taken_apart_into_selections_only_where_it_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    picks, factors = torch.tensor([3, 0, 0, 2]), torch.randn(4, dtype=torch.float64, generator=generator)
    found = selection(lambda x: factors * x[picks], 5)
    assert found is not None
    assert torch.equal(found.columns, picks)
    assert torch.equal(found.factors, factors)
    empty = selection(lambda x: torch.stack([0 * x[1], x[4]]), 5)
    assert empty is not None
    assert empty.columns.tolist() == [-1, 4]
    # sums whose positions, or whose coefficients, look like those of a single element
    assert selection(lambda x: torch.stack([(x[0] + x[2]) / 2]), 5) is None
    assert selection(lambda x: torch.stack([x[0] - x[2]]), 5) is None


def test_products_hold_what_matrices_of_torch_hold() -> None:
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((40, 30, 50), (1, 7, 1), (5, 0, 4), (64, 64, 3)):
        pair = [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((m, k), (k, n))]
        for side in pair:
            side[torch.rand(side.shape, generator=generator) < 0.7] = 0
            side[: len(side) // 3] = 0  # rows without entries
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the layout is in beta
            left, right = (side.to_sparse_csr() for side in pair)
        found = product(left, right)
        torch.testing.assert_close(found.to_dense(), pair[0] @ pair[1], rtol=0, atol=1e-14)
        assert bool((found.values() != 0).all())


def test_a_fixed_batch_is_taken_apart() -> None:
    model = Call(lambda conv, x: (conv(x).reshape(3, 4, 72) * 2).reshape(3, 288))
    x = torch.randn(3, *MAP)
    gm = capture(model.eval(), x)
    assert not gm.meta["graphsurgery"].dynamic_batch
    found = gs.affine_matrix(gm)
    wanted = copy.deepcopy(model).double()(x.double()).detach()
    assert found.output_shape == (288,)
    # float64 sums of 27 products about one, in another order
    torch.testing.assert_close(found.apply(x), wanted, rtol=0, atol=1e-13)


def test_stretches_are_cut_only_where_windows_would_be_lost() -> None:
    def count(model: nn.Module) -> int:
        return len(segments(find(capture(model.eval(), torch.randn(2, *MAP)), None)))

    assert count(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten())) == 1
    assert count(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))) == 2
    assert count(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Upsample(scale_factor=2, mode="bilinear"))) == 2
    assert count(nn.Sequential(nn.Flatten(), nn.Linear(288, 99), nn.Linear(99, 5))) == 1


def test_the_model_is_untouched_also_without_gradients() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))).train()
    before = copy.deepcopy(model.state_dict())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = gs.affine_matrix(model, torch.randn(2, *MAP))
        assert not found.matrix.values().requires_grad
        assert not found.bias.requires_grad
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert error(copy.deepcopy(model).eval(), found, MAP) <= 1e-13


@pytest.mark.parametrize("form", ["sparse", "dense", "channels"])
def test_detects_a_wrong_matrix(form: Any) -> None:
    make: Callable[[], nn.Module] = lambda: nn.Conv2d(4, 4, 1 if form == "channels" else 3)  # noqa: E731
    gm = capture(seeded(make), torch.randn(2, *MAP))
    stretch = find(gm, None)
    found = gs.affine_matrix(gm, form=form)
    assert residual(stretch, found) <= 1e-13
    wrong = found.matrix.clone()
    (wrong.values() if form == "sparse" else wrong)[7 if form == "sparse" else (1, 2)] += 1e-3
    assert residual(stretch, replace(found, matrix=wrong)) > 1e3 * LIMIT
    shift = found.bias.clone()
    shift[-1] += 1e-3
    assert residual(stretch, replace(found, bias=shift)) > 1e3 * LIMIT


def test_detects_a_wrong_coefficient_beside_a_large_bias() -> None:
    model = seeded(lambda: nn.Conv2d(4, 4, 3))
    with torch.no_grad():
        model.bias.fill_(1e9)
    gm = capture(model, torch.randn(2, *MAP))
    found = gs.affine_matrix(gm, form="sparse")
    found.matrix.values()[7] += 1e-3
    assert residual(find(gm, None), found) > 1e3 * LIMIT


def test_a_wrong_matrix_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(parts: Any, form: Any, limit_bytes: int) -> Tensor:
        return torch.ones(parts[-1].shape[0], parts[0].shape[1], dtype=torch.float64)

    monkeypatch.setattr("graphsurgery.matrix.assembled", wrong)
    with pytest.raises(gs.VerificationError, match="differs from the stretch 'input_1' -> 'conv2d'"):
        gs.affine_matrix(nn.Conv2d(4, 4, 3), torch.randn(2, *MAP))


# -- what can be asked of a matrix


def test_rank_and_condition_number_are_those_of_the_dense_matrix() -> None:
    for make, shape in (CASES["pool"], CASES["transposed2d-groups"], CASES["conv2d-depthwise-even-same"]):
        found = gs.affine_matrix(seeded(make), torch.randn(2, *shape), form="sparse")
        dense = found.matrix.to_dense()
        wanted = torch.linalg.svdvals(dense)
        # blockwise and dense decompositions, each right to a few roundings of the largest value, about ten
        torch.testing.assert_close(found.singular_values(), wanted, rtol=0, atol=1e-12)
        assert found.rank == int(torch.linalg.matrix_rank(dense))
        if found.rank == min(dense.shape):
            assert found.condition_number == pytest.approx(float(wanted[0] / wanted[-1]), rel=1e-9)
        else:
            assert found.condition_number == float("inf")


def test_a_bottleneck_has_the_rank_of_its_middle() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 3), nn.Linear(3, 12)))
    found = gs.affine_matrix(model, torch.randn(2, 16))
    assert (found.rank, found.condition_number) == (3, float("inf"))
    tokens = gs.affine_matrix(model, torch.randn(2, 5, 16))
    assert (tokens.form, tokens.rank) == ("sparse", 15)  # a block for each token


def test_singular_values_of_large_blocks_are_refused_with_their_size() -> None:
    found = gs.affine_matrix(seeded(lambda: nn.Conv2d(4, 4, 3, padding=1)), torch.randn(2, *MAP))
    with pytest.raises(ValueError, match="288 x 288, 663,552 bytes"):
        found.singular_values(limit_bytes=1000)
    depthwise = gs.affine_matrix(seeded(lambda: nn.Conv2d(4, 4, 3, groups=4)), torch.randn(2, *MAP))
    assert len(depthwise.singular_values(limit_bytes=8 * 42 * 72)) == 4 * 42


def test_apply_says_what_it_expected() -> None:
    found = gs.affine_matrix(nn.Conv2d(4, 6, 1), torch.randn(2, *MAP), form="sparse")
    with pytest.raises(ValueError, match=r"expected \(batch, \*\(4, 9, 8\)\)"):
        found.apply(torch.randn(4, 9, 8))
    pointwise = gs.affine_matrix(nn.Conv2d(4, 6, 1), torch.randn(2, *MAP), form="channels")
    with pytest.raises(ValueError, match="expected 4 channels at axis 1"):
        pointwise.apply(torch.randn(2, 9, 8, 4))
    assert "channels" in repr(pointwise)
    assert "(4, 9, 8) -> (6, 9, 8)" in repr(found)


def test_a_picture_shows_the_largest_entry_of_each_cell() -> None:
    dense = torch.zeros(6, 9, dtype=torch.float64)
    dense[0, 0], dense[1, 1], dense[5, 8], dense[4, 8] = 1.0, -2.0, 3.0, -0.5
    wanted = torch.tensor([[-2.0, 0, 0], [0, 0, 0], [0, 0, 3.0]], dtype=torch.float64)
    assert torch.equal(shrunk(dense, 3), wanted)
    assert torch.equal(shrunk(dense, 100), dense)
    with pytest.raises(ValueError, match="at least one cell"):
        shrunk(dense, 0)


def test_plot_draws_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib  # here, for it takes a second

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = gs.affine_matrix(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8), form="sparse")
    ax = found.plot(cells=20)
    (image,) = ax.images
    assert image.get_array().shape == (20, 20)
    assert "192" in ax.get_xlabel()
    assert found.plot(ax=ax) is ax
    pyplot.close("all")


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    found = gs.affine_matrix(nn.Linear(3, 2), torch.randn(2, 3))
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(gs.RuntimeUnavailableError, match=r"graphsurgery\[plot\]"):
        found.plot()


def test_the_example_holds() -> None:
    demo = Path(__file__).parent.parent / "examples" / "matrix" / "demo.py"
    done = subprocess.run([sys.executable, str(demo)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all equal" in done.stdout
