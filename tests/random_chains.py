"""Random straight chains of affine layers, for tests that compare every form with the chain itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection

import torch
from torch import nn


class Constant(nn.Module):
    """One elementwise op with a constant operand."""

    def __init__(self, op: str, value: torch.Tensor) -> None:
        super().__init__()
        self.op = op
        self.register_buffer("value", value)

    def extra_repr(self) -> str:
        return f"{self.op}, {tuple(self.value.shape)}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self.op:
            case "mul":
                return x * self.value
            case "rmul":
                return self.value * x
            case "add":
                return torch.add(x, self.value, alpha=2)
            case "sub":
                return x - self.value
            case "rsub":
                return self.value - x
            case "neg":
                return -x
            case _:
                return x / self.value


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], text: str = "") -> None:
        super().__init__()
        self.function, self.text = function, text

    def extra_repr(self) -> str:
        return self.text

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class MatMul(nn.Module):
    """A product with a constant matrix on either side, with or without an added matrix."""

    def __init__(self, size: int, out: int, left: bool) -> None:
        super().__init__()
        self.left = left
        self.matrix = nn.Parameter(torch.randn(*((out, size) if left else (size, out))) / size**0.5)

    def extra_repr(self) -> str:
        return f"{tuple(self.matrix.shape)}, left={self.left}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.matrix @ x if self.left else x @ self.matrix


class With(nn.Module):
    """A function of a value and constants."""

    def __init__(self, function: Callable[..., torch.Tensor], *constants: torch.Tensor) -> None:
        super().__init__()
        self.function, self.count = function, len(constants)
        for i, constant in enumerate(constants):
            self.register_buffer(f"constant{i}", constant)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, *(getattr(self, f"constant{i}") for i in range(self.count)))


def warmed(norm: nn.Module) -> nn.Module:
    """A batch norm with statistics that are not trivial, some scales negative."""
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(-2, 2)
        norm.bias.normal_()
    return norm


def random_chain(
    seed: int, length: int = 4, kinds: Collection[str] | None = None
) -> tuple[nn.Module, torch.Tensor]:
    """A chain of affine layers in evaluation mode, float64, and an input of batch 2.

    Args:
        seed: of the layers and their weights.
        length: number of layers.
        kinds: draw only layers of these kinds, where the rank has some of them.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rank = rng.choice([0, 1, 1, 2, 2, 2, 3])
    sizes = {0: [6], 1: [4, 9], 2: [4, 6, 7], 3: [2, 4, 5, 4]}[rank]
    if rng.random() < 0.3:
        sizes = [4] * len(sizes)  # sizes that coincide
    x = torch.randn(2, *sizes, dtype=torch.float64)
    layers: list[nn.Module] = []
    shape = x.shape
    while len(layers) < length:
        layer = random_layer(rng, tuple(shape), kinds)
        if layer is None:
            continue
        layer = layer.double().eval()
        try:
            with torch.no_grad():
                value = layer(torch.zeros(shape, dtype=torch.float64))
        except RuntimeError:  # a window larger than what there is
            continue
        if value.numel() > 4000 or 0 in value.shape or value.shape[0] != 2 or value.dim() < 2:
            continue
        shape = value.shape
        layers.append(layer)
    return nn.Sequential(*layers).eval(), x


def random_layer(
    rng: random.Random, shape: tuple[int, ...], only: Collection[str] | None = None
) -> nn.Module | None:
    """An affine layer for values of the given shape (batch first), or None where the draw does not fit."""
    rank = len(shape) - 2
    kinds = ["constant", "linear", "matmul", "norm", "view", "permute", "dropout", "unit", "zeros"]
    kinds += ["part", "copy", "product"]
    kinds += ["conv", "conv", "conv", "conv", "pool", "resample"] if 1 <= rank <= 3 else []
    kinds += ["conv-transpose", "conv-transpose"] if 1 <= rank <= 3 else []
    if only is not None:
        kinds = [kind for kind in kinds if kind in only] or kinds
    kind = rng.choice(kinds)
    match kind:
        case "part":
            return _part(rng, shape)
        case "copy":
            return _copy(rng, shape)
        case "product":
            return _product(rng, shape)
        case "resample":
            return _resample(rng, shape)
        case "constant":
            op = rng.choice(["mul", "rmul", "add", "sub", "rsub", "div", "neg"])
            trailing = shape[rng.randint(1, len(shape)) :]
            value = torch.rand([n if rng.random() < 0.5 else 1 for n in trailing], dtype=torch.float64) + 0.5
            return Constant(op, value)
        case "linear":
            return nn.Linear(shape[-1], rng.choice([1, 3, 4, 6]), bias=rng.random() < 0.7)
        case "matmul":
            left = rank >= 1 and rng.random() < 0.5
            return MatMul(shape[-2] if left else shape[-1], rng.choice([2, 4, 5]), left)
        case "norm":
            if not 0 <= rank <= 3:
                return None
            return warmed((nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank](shape[1]))
        case "view":
            if rng.random() < 0.5:
                start = rng.randint(1, len(shape) - 1)
                return nn.Flatten(start)
            return _regroup(rng, shape[1:])
        case "permute":
            order = [0, *rng.sample(range(1, len(shape)), len(shape) - 1)]
            return Call(lambda x: x.permute(order), f"permute {order}")
        case "zeros":
            pads = [rng.choice([-1, 0, 0, 1, 2]) for _ in range(2 * (len(shape) - 1))]
            return Call(lambda x: nn.functional.pad(x, pads), f"pad {pads}")
        case "unit":
            axis = rng.randint(1, len(shape))
            if axis < len(shape) and shape[axis] == 1:
                return Call(lambda x: x.squeeze(axis), f"squeeze {axis}")
            return Call(lambda x: x.unsqueeze(axis), f"unsqueeze {axis}") if len(shape) < 5 else None
        case "dropout":
            return nn.Dropout(0.5)
        case "pool":
            return _pool(rng, shape)
        case "conv-transpose":
            return _conv_transpose(rng, shape)
    return _conv(rng, shape)


def _regroup(rng: random.Random, sizes: tuple[int, ...]) -> nn.Module:
    total = 1
    for n in sizes:
        total *= n
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    first = rng.choice(divisors)
    return Call(
        lambda x: x.reshape(x.shape[0], first, total // first), f"reshape (N, {first}, {total // first})"
    )


def _conv(rng: random.Random, shape: tuple[int, ...]) -> nn.Module | None:
    rank, channels = len(shape) - 2, shape[1]
    kernel = [rng.choice([1, 1, 2, 3]) for _ in range(rank)]
    groups = rng.choice([1, 1, 1, 2, channels])
    out = groups * rng.choice([1, 2, 3])
    if channels % groups or out > 12:
        return None
    stride = [rng.choice([1, 1, 2]) for _ in range(rank)]
    dilation = [rng.choice([1, 1, 2]) for _ in range(rank)]
    padding: str | list[int] = [rng.choice([0, 0, 1]) for _ in range(rank)]
    if rng.random() < 0.15:
        padding, stride = "same", [1] * rank
    for i, (d, k, n) in enumerate(zip(dilation, kernel, shape[2:], strict=True)):
        pads = 0 if isinstance(padding, str) else 2 * padding[i]
        if d * (k - 1) + 1 > n + pads:
            return None
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    return make(channels, out, kernel, stride, padding, dilation, groups, bias=rng.random() < 0.6)


def _conv_transpose(rng: random.Random, shape: tuple[int, ...]) -> nn.Module | None:
    rank, channels = len(shape) - 2, shape[1]
    kernel = [rng.choice([1, 2, 2, 3, 4]) for _ in range(rank)]
    groups = rng.choice([1, 1, 1, 2, channels])
    out = groups * rng.choice([1, 2, 3])
    if channels % groups or out > 12:
        return None
    stride = [rng.choice([1, 1, 2, 3]) for _ in range(rank)]
    dilation = [rng.choice([1, 1, 1, 2]) for _ in range(rank)]
    padding = [rng.choice([0, 0, 1, 2]) for _ in range(rank)]
    extra = [rng.choice([0, 0, max(s, d) - 1]) for s, d in zip(stride, dilation, strict=True)]
    make = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
    bias = rng.random() < 0.6
    return make(channels, out, kernel, stride, padding, extra, groups, bias, dilation)


def _part(rng: random.Random, shape: tuple[int, ...]) -> nn.Module:
    """A slice, one position, or positions by an index."""
    axis = rng.randint(1, len(shape) - 1)
    size = shape[axis]
    start = rng.randrange(size)
    stop = rng.randint(start + 1, size)
    match rng.choice(["slice", "slice", "step", "narrow", "select", "index", "indices"]):
        case "slice":
            end = rng.choice([stop, stop - size if stop < size else None])
            return Call(lambda x: x[(slice(None),) * axis + (slice(start, end),)])
        case "step":
            step = rng.choice([2, 3])
            return Call(lambda x: x[(slice(None),) * axis + (slice(start, None, step),)])
        case "narrow":
            return Call(lambda x: x.narrow(axis, start, stop - start))
        case "select":
            return Call(lambda x: x.select(axis, start if stop < size else -1))
        case "index":
            return With(lambda x, i: x.index_select(axis, i), torch.randint(size, (rng.choice([1, 3]),)))
    index = torch.randint(-size, size, rng.choice([(3,), (2, 2)]) if len(shape) < 5 else (2,))
    return With(lambda x, i: x[(slice(None),) * axis + (i,)], index)


def _copy(rng: random.Random, shape: tuple[int, ...]) -> nn.Module | None:
    """Repeats and shuffles of positions and channels."""
    axis = rng.randint(1, len(shape) - 1)
    match rng.choice(["expand", "repeat", "interleave", "flip", "roll", "pixels", "unpixels", "channels"]):
        case "expand" if 1 in shape[1:]:
            sizes = [-1, *(rng.choice([1, 3]) if n == 1 else n for n in shape[1:])]
            return Call(lambda x: x.expand(sizes))
        case "repeat":
            times = [1] * len(shape)
            times[axis] = 2
            return Call(lambda x: x.repeat(times))
        case "interleave":
            return Call(lambda x: x.repeat_interleave(2, axis))
        case "flip":
            return Call(lambda x: x.flip(axis))
        case "roll":
            places = rng.choice([1, -2])
            return Call(lambda x: x.roll(places, axis))
        case "pixels" if len(shape) >= 4 and shape[-3] % 4 == 0:
            return nn.PixelShuffle(2)
        case "unpixels" if len(shape) >= 4 and shape[-2] % 2 == shape[-1] % 2 == 0:
            return nn.PixelUnshuffle(2)
        case "channels" if len(shape) >= 3 and shape[1] % 2 == 0:
            return nn.ChannelShuffle(2)
    return None


def _product(rng: random.Random, shape: tuple[int, ...]) -> nn.Module:
    """An einsum with a constant, or a product with a vector; the batch comes first."""
    if rng.random() < 0.3:
        left = len(shape) > 2 and rng.random() < 0.5
        vector = torch.randn(shape[-2] if left else shape[-1], dtype=torch.float64)
        return With((lambda x, v: v @ x) if left else (lambda x, v: x @ v), vector)
    labels = "abcd"[: len(shape) - 1]
    met = [label for label in labels if rng.random() < 0.5]
    kept = [label for label in labels if rng.random() < 0.6]
    sizes = {**dict(zip(labels, shape[1:], strict=True)), "z": 3}
    if rng.random() < 0.6:
        met, kept = [*met, "z"], [*kept, "z"]
    met, kept = rng.sample(met, len(met)), rng.sample(kept, len(kept))
    equation = f"n{labels},{''.join(met)}->n{''.join(kept)}"
    constant = torch.randn([sizes[label] for label in met], dtype=torch.float64)
    return With(lambda x, c: torch.einsum(equation, x, c), constant)


def _resample(rng: random.Random, shape: tuple[int, ...]) -> nn.Module | None:
    """Interpolation, pads that repeat positions, and running sums."""
    rank = len(shape) - 2
    match rng.choice(["nearest", "smooth", "pad", "cumsum"]):
        case "nearest":
            factor = rng.choice([2, 1, 3, 0.5])
            return nn.Upsample(scale_factor=factor, mode=rng.choice(["nearest", "nearest-exact"]))
        case "smooth":
            mode = [["linear"], ["bilinear", "bicubic"], ["trilinear"]][rank - 1]
            sizes = [rng.choice([n, n + 1, 2]) for n in shape[2:]]
            return nn.Upsample(sizes, mode=rng.choice(mode), align_corners=rng.random() < 0.3)
        case "pad":
            pads = [rng.choice([0, 1]) for _ in range(2 * rank)]
            mode = rng.choice(["reflect", "replicate", "circular"])
            return Call(lambda x: nn.functional.pad(x, pads, mode))
    axis = rng.randint(1, len(shape) - 1)
    return Call(lambda x: x.cumsum(axis))


def _pool(rng: random.Random, shape: tuple[int, ...]) -> nn.Module | None:
    rank = len(shape) - 2
    if rng.random() < 0.3:
        return (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[rank - 1](
            rng.choice([1, 2])
        )
    kernel = rng.choice([2, 3])
    padding = rng.choice([0, 0, 1])
    if min(shape[2:]) + 2 * padding < kernel:
        return None
    ceil = rng.random() < 0.3
    stride = rng.choice([1, 2])
    make = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[rank - 1]
    return make(kernel, stride, padding, ceil, rng.random() < 0.6)
