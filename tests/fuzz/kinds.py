"""What a random network is made of: layers over maps of positions, and what does not care about axes.

Each kind writes one operation as expressions over its operands, `{0}`, `{1}`, ...; see `program.Draft`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fuzz.program import Draft, Misfit, kind

POOLS = (1, 2, 3)


def positions(x: Tensor) -> int:
    """How many axes of positions a map has."""
    if not (x.is_floating_point() and 3 <= x.dim() <= 5):
        raise Misfit("no map")
    return x.dim() - 2


def floating(x: Tensor, least: int = 2) -> None:
    if not x.is_floating_point() or x.dim() < least:
        raise Misfit("no numbers")


def axis_of(d: Draft, x: Tensor, key: str = "axis") -> int:
    """An axis that is not the batch."""
    floating(x)
    return 1 + int(d.choice(key, range(4))) % (x.dim() - 1)


# -- layers over positions ----------------------------------------------------------------------------------


@kind
def conv(d: Draft, x: Tensor) -> str:
    rank, channels = positions(x), x.shape[1]
    out = d.choice("out", [1, 2, 3, 4, 6, channels, channels])
    groups = math.gcd(d.choice("groups", [1, 1, 1, 1, 2, 3]), math.gcd(channels, out))
    kernel = [d.choice(f"kernel{i}", [1, 1, 2, 3, 3, 5]) for i in range(rank)]
    if d.choice("square", [True, True, False]):
        kernel = kernel[:1] * rank
    stride = d.choice("stride", [1, 1, 1, 2, 3])
    dilation = d.choice("dilation", [1, 1, 1, 2])
    padding = d.choice("padding", [0, 1, "half", "half", "same", 2])
    if padding == "same" and stride > 1:
        padding = 1
    padding = [k // 2 * dilation for k in kernel] if padding == "half" else padding
    mode = d.choice("mode", ["zeros"] * 6 + ["reflect", "replicate", "circular"])
    layer = d.layer(
        f"nn.Conv{rank}d({channels}, {out}, {tuple(kernel)}, stride={stride}, padding={padding!r}, "
        f"dilation={dilation}, groups={groups}, bias={d.choice('bias', [True, True, False])}, "
        f"padding_mode={mode!r})"
    )
    return f"{layer}({{0}})"


@kind
def pointwise(d: Draft, x: Tensor) -> str:
    rank, channels = positions(x), x.shape[1]
    out = d.choice("out", [2, 3, 4, 5, 8, channels])
    return (
        d.layer(f"nn.Conv{rank}d({channels}, {out}, 1, bias={d.choice('bias', [True, True, False])})")
        + "({0})"
    )


@kind
def depthwise(d: Draft, x: Tensor) -> str:
    rank, channels = positions(x), x.shape[1]
    times, kernel = d.choice("times", [1, 1, 1, 2]), d.choice("kernel", [1, 3, 3, 2])
    text = f"nn.Conv{rank}d({channels}, {channels * times}, {kernel}, stride={d.choice('stride', [1, 1, 2])}"
    return d.layer(f"{text}, padding={d.choice('padding', [0, 1, 1])}, groups={channels})") + "({0})"


@kind
def transposed(d: Draft, x: Tensor) -> str:
    rank, channels = positions(x), x.shape[1]
    out, stride = d.choice("out", [2, 3, 4, channels]), d.choice("stride", [1, 2, 2, 3])
    groups = math.gcd(d.choice("groups", [1, 1, 2, 3, channels]), math.gcd(channels, out))
    extra = d.choice("output_padding", [0, 0, 1])
    return (
        d.layer(
            f"nn.ConvTranspose{rank}d({channels}, {out}, {d.choice('kernel', [1, 2, 3, 3])}, "
            f"stride={stride}, padding={d.choice('padding', [0, 0, 1])}, "
            f"output_padding={min(extra, stride - 1)}, groups={groups}, "
            f"dilation={d.choice('dilation', [1, 1, 2])}, bias={d.choice('bias', [True, False])})"
        )
        + "({0})"
    )


@kind
def batchnorm(d: Draft, x: Tensor) -> str:
    floating(x)
    if x.dim() > 5:
        raise Misfit("rank")
    rank = max(1, x.dim() - 2)
    eps = d.choice("eps", [1e-5, 1e-5, 1e-3, 0.5])
    affine = d.choice("affine", [True, True, True, False])
    return d.layer(f"nn.BatchNorm{rank}d({x.shape[1]}, eps={eps}, affine={affine})") + "({0})"


@kind
def functional_norm(d: Draft, x: Tensor) -> str:
    """A batch norm without a module, some of its tensors left out."""
    floating(x)
    kept = d.layer(f"nn.BatchNorm1d({x.shape[1]})")  # it is never called
    mean, variance = f"{kept}.running_mean", f"{kept}.running_var"
    weight = f"{kept}.weight" if d.choice("weight", [True, False]) else "None"
    bias = f"{kept}.bias" if d.choice("bias", [True, False]) else "None"
    return f"F.batch_norm({{0}}, {mean}, {variance}, {weight}, {bias}, False, 0.1, 1e-4)"


@kind
def groupnorm(d: Draft, x: Tensor) -> str:
    floating(x)
    groups = math.gcd(d.choice("groups", [1, 2, 3, 4]), x.shape[1])
    return (
        d.layer(f"nn.GroupNorm({groups}, {x.shape[1]}, affine={d.choice('affine', [True, True, False])})")
        + "({0})"
    )


@kind
def instancenorm(d: Draft, x: Tensor) -> str:
    rank = positions(x)
    tracked = d.choice("tracked", [False, True])
    return (
        d.layer(f"nn.InstanceNorm{rank}d({x.shape[1]}, affine=True, track_running_stats={tracked})") + "({0})"
    )


@kind
def pool(d: Draft, x: Tensor) -> str:
    rank = positions(x)
    which, kernel = d.choice("which", ["Avg", "Avg", "Max"]), d.choice("kernel", [2, 2, 3])
    padding, ceil = d.choice("padding", [0, 0, 1]), d.choice("ceil", [False, False, True])
    text = f"nn.{which}Pool{rank}d({kernel}, {d.choice('stride', [1, 2, 2, 3])}, {padding}, ceil_mode={ceil}"
    if which == "Avg":
        text += f", count_include_pad={d.choice('include', [True, False])}"
        if rank > 1 and d.choice("divisor", [False] * 5 + [True]):
            text += ", divisor_override=3"
    return d.layer(text + ")") + "({0})"


@kind
def adaptive(d: Draft, x: Tensor) -> str:
    rank = positions(x)
    which = d.choice("which", ["avg", "avg", "max"])
    return f"F.adaptive_{which}_pool{rank}d({{0}}, {d.choice('size', [1, 1, 2, 3])})"


@kind
def interpolate(d: Draft, x: Tensor) -> str:
    rank = positions(x)
    smooth = ["linear", "bilinear", "trilinear"][rank - 1]
    mode = d.choice("mode", ["nearest", "nearest-exact", "smooth", "smooth", "bicubic"])
    mode = smooth if mode == "smooth" or (mode == "bicubic" and rank != 2) else mode
    corners = d.choice("corners", [False, False, True])
    text = f"F.interpolate({{0}}, mode={mode!r}"
    if "nearest" not in mode:
        text += f", align_corners={corners}"
    if d.choice("by_size", [True, False]):
        return text + f", size={[n + d.choice('more', [0, 1, 2, -1]) for n in x.shape[2:]]})"
    return text + f", scale_factor={d.choice('factor', [2, 2, 3, 0.5, 1.5])})"


@kind
def pad(d: Draft, x: Tensor) -> str:
    rank = positions(x)
    pads = [d.choice(f"pad{i}", [0, 1, 1, 2]) for i in range(2 * rank)]
    mode = d.choice("mode", ["constant"] * 3 + ["reflect", "replicate", "circular"])
    if mode == "constant":
        pads = [n - 1 if d.choice("crop", [False, False, True]) else n for n in pads]
        return f"F.pad({{0}}, {pads}, value={d.choice('value', [0.0, 0.0, 0.5, -1.0])})"
    return f"F.pad({{0}}, {pads}, mode={mode!r})"


@kind
def shuffle(d: Draft, x: Tensor) -> str:
    positions(x)
    which = d.choice("which", ["pixel", "unpixel", "channel"])
    if which == "channel":
        return f"nn.functional.channel_shuffle({{0}}, {d.choice('groups', [2, 3])})"
    return f"F.pixel_{'' if which == 'pixel' else 'un'}shuffle({{0}}, 2)"


@kind
def to_tokens(d: Draft, x: Tensor) -> str:
    positions(x)
    return "{0}.flatten(2).transpose(1, 2)"


@kind
def to_map(d: Draft, x: Tensor) -> str:
    floating(x, 3)
    if x.dim() != 3:
        raise Misfit("no tokens")
    size = d.choice("height", [1, 2, 3, 4])
    return f"{{0}}.transpose(1, 2).reshape({{0}}.shape[0], {x.shape[2]}, {size}, -1)"


@kind
def norm_last(d: Draft, x: Tensor) -> str:
    """A layer norm over the channels of a map, as ConvNeXt has it."""
    rank = positions(x)
    there, back = [0, *range(2, rank + 2), 1], [0, rank + 1, *range(1, rank + 1)]
    return f"{d.layer(f'nn.LayerNorm({x.shape[1]})')}({{0}}.permute({there})).permute({back})"


@kind
def squeeze_excite(d: Draft, x: Tensor) -> str:
    rank, channels = positions(x), x.shape[1]
    axes = list(range(2, rank + 2))
    down = d.layer(f"nn.Conv{rank}d({channels}, 2, 1)", "down")
    up = d.layer(f"nn.Conv{rank}d(2, {channels}, 1)", "up")
    gate = d.choice("gate", ["torch.sigmoid", "F.hardsigmoid"])
    d.before.append(f"gate = {{0}}.mean({axes}, keepdim=True)".format(*d.names))
    return f"{{0}} * {gate}({up}(F.relu({down}(gate))))"


@kind
def branches(d: Draft, x: Tensor) -> str:
    """Convolutions of one value, with their norms, summed or side by side."""
    rank, channels = positions(x), x.shape[1]
    parts = []
    for i in range(d.choice("count", [2, 2, 3])):
        kernel = d.choice(f"kernel{i}", [1, 3, 3, 0])
        if kernel:
            conv = (
                f"nn.Conv{rank}d({channels}, {channels}, {kernel}, padding={kernel // 2}, bias={i % 2 == 0})"
            )
            text = d.layer(conv, f"branch{i}_") + "({0})"
        else:
            text = "{0}"
        if d.choice(f"norm{i}", [True, False]):
            text = d.layer(f"nn.BatchNorm{rank}d({channels})", f"norm{i}_") + f"({text})"
        parts.append(text)
    if d.choice("join", ["sum", "sum", "cat"]) == "sum":
        return " + ".join(parts)
    return f"torch.cat([{', '.join(parts)}], 1)"


# -- elementwise --------------------------------------------------------------------------------------------

SMOOTH = ["F.gelu", "F.silu", "F.elu", "F.leaky_relu", "F.hardswish", "torch.sigmoid", "torch.tanh"]
SMOOTH += ["F.softplus", "F.mish", "F.relu6", "torch.relu", "torch.abs", "F.selu", "F.hardtanh"]


@kind
def activation(d: Draft, x: Tensor) -> str:
    floating(x)
    return d.choice("which", SMOOTH + ["F.relu"] * 5) + "({0})"


@kind
def activation_module(d: Draft, x: Tensor) -> str:
    floating(x)
    text = d.choice("which", ["nn.ReLU()", "nn.GELU(approximate='tanh')", "nn.PReLU()", "nn.PReLU(C)"])
    return d.layer(text.replace("(C)", f"({x.shape[1]})")) + "({0})"


@kind
def in_place(d: Draft, x: Tensor) -> tuple[str, ...] | str:
    floating(x)
    d.writes_into(x)
    which = d.choice("which", ["relu", "module", "add", "mul", "clamp", "slice", "sub"])
    constant = d.constant([x.shape[-1]]) if which in ("add", "mul", "sub") else ""
    if which == "slice":
        d.before.append(f"{d.names[0]}[:, :1] *= 2")
        return "{0}"
    if which == "module":
        return d.layer("nn.ReLU(inplace=True)") + "({0})"
    call = {"relu": "relu_()", "clamp": "clamp_(-0.5, 2)"}.get(which, f"{which}_({constant})")
    return "{0}." + call


@kind
def constant(d: Draft, x: Tensor) -> str:
    """An elementwise operation with a constant of any shape that broadcasts."""
    floating(x)
    which = d.choice("which", ["{0} * C", "C * {0}", "{0} + C", "{0} - C", "C - {0}", "{0} / C", "alpha"])
    start = 1 + d.choice("start", range(5)) % x.dim()
    shape = [n if d.choice(f"whole{i}", [True, False]) else 1 for i, n in enumerate(x.shape[start:])]
    value = d.choice("value", ["buffer"] * 5 + ["0.5", "-2", "3", "int"])
    if value == "int":
        text = d.constant(shape, dtype="torch.int64")
    else:
        text = d.constant(shape) if value == "buffer" else value
    return f"torch.add({{0}}, {text}, alpha=2)" if which == "alpha" else which.replace("C", text)


@kind
def layer_scale(d: Draft, x: Tensor) -> str:
    """A residual scaled by channel, some of it by zero."""
    floating(x)
    channels = x.dim() in (4, 5)
    shape = [x.shape[1], *[1] * (x.dim() - 2)] if channels else [x.shape[-1]]
    scale = d.parameter(shape, "gamma")
    if channels:
        inner = d.layer(f"nn.Conv{x.dim() - 2}d({x.shape[1]}, {x.shape[1]}, 1)")
    else:
        inner = d.layer(f"nn.Linear({x.shape[-1]}, {x.shape[-1]})")
    return f"{{0}} + {inner}({{0}}) * {scale}"


@kind
def nothing(d: Draft, x: Tensor) -> str:
    floating(x)
    text = ["nn.Dropout(0.3)", "nn.Identity()", ".contiguous()", ".clone()", ".detach()", " * 1", " + 0"]
    which = d.choice("which", [*text, " - 0", " / 1"])
    return d.layer(which) + "({0})" if which.startswith("nn") else "{0}" + which


@kind
def gate(d: Draft, x: Tensor, y: Tensor) -> str:
    """A product of two live values, or a choice between them."""
    floating(x)
    floating(y)
    return str(d.choice("which", ["{0} * torch.sigmoid({1})", "{0} * {1}", "torch.maximum({0}, {1})"]))


@kind
def masked(d: Draft, x: Tensor, y: Tensor) -> str:
    """Where the mask is false, another value; the mask is the first value."""
    if y.is_floating_point() is False or x.dtype is not torch.bool or y.dim() < 2:
        raise Misfit("no mask")
    if x.shape[1] != y.shape[1]:
        raise Misfit("sizes")
    mask = f"{{0}}.reshape({', '.join(['-1', str(x.shape[1]), *['1'] * (y.dim() - 2)])})"
    return str(d.choice("which", [f"{{1}}.masked_fill(~{mask}, 0.0)", f"{{1}} * {mask}"]))


# -- joins and pieces ---------------------------------------------------------------------------------------


@kind
def total(d: Draft, x: Tensor, y: Tensor) -> str:
    floating(x)
    floating(y)
    if x.shape != y.shape and d.choice("broadcast", [False, False, True]) is False:
        raise Misfit("sizes")
    return str(d.choice("which", ["{0} + {1}"] * 4 + ["{0} - {1}", "torch.add({0}, {1}, alpha=0.5)"]))


@kind
def cat(d: Draft, x: Tensor, y: Tensor) -> str:
    floating(y)
    return f"torch.cat([{{0}}, {{1}}], {axis_of(d, x)})"


@kind
def stack(d: Draft, x: Tensor, y: Tensor) -> str:
    floating(y)
    return f"torch.stack([{{0}}, {{1}}], {axis_of(d, x)})"


@kind
def pieces(d: Draft, x: Tensor) -> tuple[str, ...]:
    axis = axis_of(d, x)
    size = x.shape[axis]
    if size < 2:
        raise Misfit("size")
    at = 1 + d.choice("at", range(5)) % (size - 1)
    match d.choice("which", ["chunk", "split", "narrow", "unbind"]):
        case "chunk":
            made = f"{{0}}.chunk(2, {axis})"
        case "split":
            made = f"torch.split({{0}}, [{at}, {size - at}], {axis})"
        case "unbind":
            made = f"{{0}}.unbind({axis})"
        case _:
            return f"{{0}}.narrow({axis}, 0, {at})", f"{{0}}.narrow({axis}, {at}, {size - at})"
    d.before.append(f"cut = {made}".format(*d.names))
    return "cut[0]", "cut[-1]"


@kind
def slice_(d: Draft, x: Tensor) -> str:
    axis = axis_of(d, x)
    lead = ":, " * axis
    which = d.choice("which", ["::2", "1::2", "1:", ":-1", "-2:", "0", "index", "flip", "roll"])
    if which == "index":
        order = [i for i in (1, 0, 0) if i < x.shape[axis]]
        return f"{{0}}[{lead}{order}]"
    if which in ("flip", "roll"):
        return f"{{0}}.{which}({axis})" if which == "flip" else f"{{0}}.roll(1, {axis})"
    if which == "0" and x.dim() < 3:
        raise Misfit("rank")
    return f"{{0}}[{lead}{which}]"


@kind
def again(d: Draft, x: Tensor) -> str:
    """A module of an earlier operation, called once more."""
    return f"self.layer{d.choice('of', [])}({{0}})"


@kind
def tied(d: Draft, x: Tensor) -> str:
    """A layer of the same weight as an earlier one, but a bias of its own."""
    of = d.choice("of", [])
    layer = d.layer(f"__import__('copy').deepcopy(self.layer{of})")
    d.init.append(f"{layer}.weight = self.layer{of}.weight")
    return f"{layer}({{0}})"
