"""What a random network is made of, continued: layers over the last axis, attention, views, reductions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fuzz.kinds import axis_of, floating
from fuzz.program import Draft, Misfit, kind


def tokens(x: Tensor) -> tuple[int, int]:
    """Number and width of the tokens of a value (batch, tokens, features)."""
    if not x.is_floating_point() or x.dim() != 3:
        raise Misfit("no tokens")
    return x.shape[1], x.shape[2]


@kind
def linear(d: Draft, x: Tensor) -> str:
    floating(x)
    size = x.shape[-1]
    out, bias = d.choice("out", [1, 2, 3, 4, 6, size, size]), d.choice("bias", [True, True, False])
    return d.layer(f"nn.Linear({size}, {out}, bias={bias})") + "({0})"


@kind
def functional_linear(d: Draft, x: Tensor) -> str:
    """A product with a bare parameter, written in one of the ways that people write it."""
    floating(x)
    size, out = x.shape[-1], d.choice("out", [2, 3, 4, x.shape[-1]])
    match d.choice("which", ["linear", "matmul", "scaled", "einsum", "transposed", "left"]):
        case "linear":
            return f"F.linear({{0}}, {d.parameter([out, size])}, {d.parameter([out], 'offset')})"
        case "matmul":
            return f"{{0}} @ {d.parameter([size, out])} + {d.parameter([out], 'offset')}"
        case "scaled":
            return f"F.linear({{0}}, {d.parameter([out, size])} * {d.parameter([out, 1], 'scale')})"
        case "einsum":
            return f"torch.einsum('...i,oi->...o', {{0}}, {d.parameter([out, size])})"
        case "left":
            return f"{d.parameter([out, x.shape[-2]])} @ {{0}}"
    return f"{{0}} @ {d.parameter([out, size])}.t()"


@kind
def low_rank(d: Draft, x: Tensor) -> str:
    """A layer with an adapter of low rank beside it."""
    floating(x)
    size = x.shape[-1]
    base = d.layer(f"nn.Linear({size}, {size})", "base")
    down, up = d.layer(f"nn.Linear({size}, 1, bias=False)", "down"), d.layer(f"nn.Linear(1, {size})", "up")
    return f"{base}({{0}}) + 2.0 * {up}({down}({{0}}))"


@kind
def embedding(d: Draft, x: Tensor) -> str:
    if x.dtype is not torch.int64:
        raise Misfit("no ids")
    padding = d.choice("padding", ["", "", ", padding_idx=0"])
    return d.layer(f"nn.Embedding(7, {d.choice('out', [2, 3, 4, 6, x.shape[-1]])}{padding})") + "({0})"


@kind
def position(d: Draft, x: Tensor) -> str:
    count, width = tokens(x)
    return f"{{0}} + {d.parameter([d.choice('lead', [1, 1]), count, width], 'place')}"


@kind
def layernorm(d: Draft, x: Tensor) -> str:
    floating(x)
    last = 1 + d.choice("axes", [0, 0, 0, 1]) % (x.dim() - 1)
    shape = list(x.shape[-last:])
    kinds = [f"nn.LayerNorm({shape})"] * 3 + [f"nn.LayerNorm({shape}, elementwise_affine=False)"]
    kinds += [f"nn.LayerNorm({shape}, bias=False)", f"nn.RMSNorm({shape}, eps=1e-5)"]
    return d.layer(kinds[d.choice("which", range(len(kinds)))]) + "({0})"


@kind
def attention(d: Draft, x: Tensor) -> str:
    """Self-attention of two heads or one, in one of four ways; q, k and v apart or one layer."""
    count, width = tokens(x)
    heads = 2 if width % 2 == 0 and d.choice("heads", [True, False]) else 1
    match d.choice("which", ["sdpa", "sdpa", "by-hand", "packed", "module"]):
        case "module":
            made = d.layer(f"nn.MultiheadAttention({width}, {heads}, batch_first=True)")
            return f"{made}({{0}}, {{0}}, {{0}}, need_weights=False)[0]"
        case "packed":
            packed = d.layer(f"nn.Linear({width}, {3 * width})", "qkv")
            d.before.append(f"q, k, v = {packed}({{0}}).chunk(3, -1)".format(*d.names))
            text = "F.scaled_dot_product_attention(q, k, v)"
        case other:
            for name in "qkv":
                made = d.layer(f"nn.Linear({width}, {width}, bias={d.choice('bias', [True, False])})", name)
                d.before.append(f"{name} = {made}({{0}})".format(*d.names))
            if other == "by-hand":
                text = f"((q @ k.transpose(1, 2)) * {width}**-0.5).softmax(-1) @ v"
            else:
                for name in "qkv":
                    shape = f"{count}, {heads}, {width // heads}"
                    line = f"{name} = {name}.reshape({{0}}.shape[0], {shape}).transpose(1, 2)"
                    d.before.append(line.format(*d.names))
                causal = d.choice("causal", [False, True])
                text = f"F.scaled_dot_product_attention(q, k, v, is_causal={causal}).transpose(1, 2)"
                text += ".flatten(2)"
    return d.layer(f"nn.Linear({width}, {width})") + f"({text})"


@kind
def feed_forward(d: Draft, x: Tensor) -> str:
    floating(x)
    size, middle = x.shape[-1], 2 * x.shape[-1]
    act = d.choice("act", ["F.gelu", "F.relu", "gated", "none"])
    norm = d.layer(f"nn.LayerNorm({size})", "norm")
    up, down = d.layer(f"nn.Linear({size}, {middle})", "up"), d.layer(f"nn.Linear({middle}, {size})")
    d.before.append(f"inner = {norm}({{0}})".format(*d.names))
    if act == "gated":
        gate = d.layer(f"nn.Linear({size}, {middle}, bias=False)", "gate")
        return f"{{0}} + {down}(F.silu({gate}(inner)) * {up}(inner))"
    return f"{{0}} + {down}({up}(inner))" if act == "none" else f"{{0}} + {down}({act}({up}(inner)))"


@kind
def mixer(d: Draft, x: Tensor) -> str:
    """A layer along the tokens, between two transposes."""
    count, _ = tokens(x)
    return d.layer(f"nn.Linear({count}, {count})") + "({0}.transpose(1, 2)).transpose(1, 2)"


@kind
def batch_second(d: Draft, x: Tensor) -> str:
    """A layer over (tokens, batch, features)."""
    _, width = tokens(x)
    return (
        d.layer(f"nn.Linear({width}, {d.choice('out', [2, width])})")
        + "({0}.transpose(0, 1)).transpose(0, 1)"
    )


@kind
def merged_batch(d: Draft, x: Tensor) -> str:
    """A layer over all tokens of the batch in one list."""
    count, width = tokens(x)
    out = d.choice("out", [2, 3, width])
    inner = d.layer(f"nn.Linear({width}, {out})") + f"({{0}}.reshape(-1, {width}))"
    if d.choice("norm", [True, False]):
        inner = d.layer(f"nn.BatchNorm1d({out})", "norm") + f"({inner})"
    return f"{inner}.reshape(-1, {count}, {out})"


# -- views and reductions -----------------------------------------------------------------------------------


@kind
def permute(d: Draft, x: Tensor) -> str:
    floating(x, 3)
    axes = list(range(1, x.dim()))
    turn = 1 + d.choice("turn", range(4)) % (len(axes) - 1)
    return f"{{0}}.permute({[0, *axes[turn:], *axes[:turn]]})"


@kind
def flatten(d: Draft, x: Tensor) -> str:
    floating(x, 3)
    return f"{{0}}.flatten({1 + d.choice('start', [0, 0, 1, 2]) % (x.dim() - 2)})"


@kind
def split_axis(d: Draft, x: Tensor) -> str:
    axis = axis_of(d, x)
    size = d.choice("size", [2, 2, 3])
    if x.shape[axis] % size or x.dim() > 4:
        raise Misfit("size")
    return f"{{0}}.unflatten({axis}, ({d.choice('first', [f'{size}, -1', f'-1, {size}'])}))"


@kind
def regroup(d: Draft, x: Tensor) -> str:
    floating(x)
    size = d.choice("size", [2, 3, 4, 5])
    if math.prod(x.shape[1:]) % size:
        raise Misfit("size")
    return f"{{0}}.reshape({{0}}.shape[0], {d.choice('order', [f'{size}, -1', f'-1, {size}'])})"


@kind
def unit(d: Draft, x: Tensor) -> str:
    axis = axis_of(d, x)
    if x.shape[axis] == 1 and x.dim() > 2:
        return f"{{0}}.squeeze({axis})"
    if x.dim() > 4:
        raise Misfit("rank")
    return f"{{0}}.unsqueeze({axis})"


@kind
def reduce(d: Draft, x: Tensor) -> str:
    axis = axis_of(d, x)
    keep = x.dim() < 3 or d.choice("keep", [True, False])
    which = d.choice("which", ["mean", "mean", "sum", "amax", "logsumexp", "var"])
    if which == "var":
        return f"{{0}}.var({axis}, correction=0, keepdim={keep})"
    return f"{{0}}.{which}({axis}, keepdim={keep})"


@kind
def centred(d: Draft, x: Tensor) -> str:
    axis = axis_of(d, x)
    return str(d.choice("which", [f"{{0}} {sign} {{0}}.mean({axis}, keepdim=True)" for sign in "-+"]))


@kind
def along(d: Draft, x: Tensor) -> str:
    """A softmax, running sum or normalisation along an axis."""
    axis = axis_of(d, x)
    calls = [f"{{0}}.softmax({axis})", f"F.log_softmax({{0}}, {axis})", f"{{0}}.cumsum({axis})"]
    return calls[d.choice("which", range(3))]


@kind
def expand(d: Draft, x: Tensor) -> str:
    axis = axis_of(d, x)
    if x.shape[axis] != 1:
        raise Misfit("size")
    sizes = [-1] * x.dim()
    sizes[axis] = d.choice("size", [2, 3])
    return f"{{0}}.expand({sizes})"


@kind
def live_matrix(d: Draft, x: Tensor, y: Tensor) -> str:
    """A product of two live matrices."""
    tokens(x)
    tokens(y)
    return str(
        d.choice("which", ["{0} @ {1}", "{0} @ {1}.transpose(1, 2)", "torch.bmm({0}.transpose(1, 2), {1})"])
    )


@kind
def weight_norm(d: Draft, x: Tensor) -> str:
    """A layer whose weight is computed from others on every call."""
    floating(x)
    text = f"nn.Linear({x.shape[-1]}, {d.choice('out', [2, 3])})"
    return d.layer(f"nn.utils.parametrizations.weight_norm({text})", "normed") + "({0})"
