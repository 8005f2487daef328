"""Convolutions as forms: windows are their kernel, varied digits their groups, features their channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

from graphsurgery.affine.atoms import NoFold, Window
from graphsurgery.affine.program import Conv, ConvTranspose, Layout, Pad, Shape
from graphsurgery.affine.roles import Form, Roles, finish, has_bias
from graphsurgery.affine.windows import fits

Built = tuple[Pad | None, Conv | ConvTranspose, dict[str, Shape], tuple[int | None, ...]]
"""A pad, the layer, the shapes of its slots, and which window each kernel axis is."""


def grouped(roles: Roles) -> list[Form]:
    """A convolution: varied digits are its groups, windows its kernel, other positions stay as they are."""
    forms: list[Form] = []
    reason: NoFold | None = None
    for batch, spatial in _places(roles):
        positions = spatial or [()]
        if len(positions) > 3:
            reason = NoFold("rank", f"a convolution over {len(positions)} axes does not exist")
            continue
        into: Layout = (batch, roles.varied + roles.gone, *positions)
        out: Layout = (batch, roles.varied + roles.fresh, *positions)
        for name, build in _builders(roles):
            try:
                pad, conv, slots, which = build(roles, into, out)
            except NoFold as refusal:
                reason = refusal
                continue
            form = finish(roles, f"{name}{len(positions)}d", into, out, (conv, slots))
            steps = form.steps
            if pad is not None:
                index = steps.index(conv)
                steps = (*steps[:index], pad, *steps[index:])
            forms.append(replace(form, steps=steps, spatial=which))
    if not forms and reason is not None:
        raise reason
    return forms


def _places(roles: Roles) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """Which labels may be the layer's batch and which its positions."""
    shared, windowed = set(roles.shared), set(roles.windowed)
    lead = tuple(a for a in (roles.entry[0] if roles.entry else ()) if a in shared)
    channels = [i for i, dim in enumerate(roles.entry) if i and set(dim) & {*roles.gone, *roles.varied}]
    rest = [tuple(a for a in dim if a in shared or a in windowed) for dim in roles.entry]
    natural = [dim for dim in rest[1:] if dim]
    own: list[tuple[int, ...]] = [(label,) for label in roles.windowed]
    options = [(roles.shared, own)]
    leads = bool(roles.entry) and bool(windowed & set(roles.entry[0]))  # no convolution runs over its batch
    if not leads and all(len(dim) == 1 or not set(dim) & windowed for dim in natural):
        options.insert(0, (lead, natural))
        if len(channels) == 1 and not rest[channels[0]]:  # an axis of one stays where it is
            options.insert(0, (lead, [dim for i, dim in enumerate(rest) if i and i != channels[0]]))
    return [option for i, option in enumerate(options) if option not in options[:i]]


def _builders(roles: Roles) -> list[tuple[str, Callable[[Roles, Layout, Layout], Built]]]:
    """What the windows allow: transposed ones of stride 1 may also be read as ordinary ones."""
    transposed = any(w.transposed for w in _windows(roles))
    ordinary = all(w.ordinary() is not None for w in _windows(roles))
    builders: list[tuple[str, Callable[[Roles, Layout, Layout], Built]]] = []
    if transposed:
        builders.append(("conv_transpose", _conv_transpose))
    if ordinary or not transposed:
        builders.append(("conv", _conv))
    return builders


def _windows(roles: Roles) -> list[Window]:
    found = [roles.atoms[label].window for label in roles.windowed]
    return [window for window in found if window is not None]


def _conv(roles: Roles, into: Layout, out: Layout) -> Built:
    options: list[tuple[int, int, int, int]] = []  # kernel, stride, padding, dilation
    explicit: list[tuple[int, int]] = []
    which: list[int | None] = []
    symmetric = True
    for dim in into[2:]:
        atom = roles.atoms[dim[0]] if dim else None
        w = atom.window.ordinary() if atom is not None and atom.window is not None else None
        if atom is None or w is None:
            options.append((1, 1, 0, 1))
            explicit.append((0, 0))
            which.append(None)
            continue
        size, symbolic = atom.size, roles.symbolic(dim)
        if symbolic and (w.lo > 0 or not _even(atom.window)):
            raise NoFold("dynamic-shape", "padding that is not symmetric runs over an axis of symbolic size")
        low, high = -w.lo, w.s * (size - 1) + w.hi - (w.base - 1)
        if not symbolic and max(0, -low) + max(0, -high) > w.base:
            raise NoFold("border", "it reads nothing but padding")
        options.append((w.taps, w.s, low, max(w.step, 1)))
        explicit.append((low, high if high > 0 or fits(w.base + low, w) != size else 0))
        if not symbolic:  # over symbolic sizes only symmetric windows are made, so they agree
            symmetric &= low >= 0 and fits(w.base + 2 * low, w) == size
        which.append(roles.windowed.index(dim[0]))
    kernel, stride, _, dilation = (tuple(column) for column in zip(*options, strict=True))
    shape_in = [prod(roles.entry_sizes[a] for a in dim) for dim in into]
    pad, zeros = None, _zeros(options, explicit, symmetric)
    if zeros is None:
        padded = [n + a + b for n, (a, b) in zip(shape_in[2:], explicit, strict=True)]
        pad = Pad(tuple(explicit), (*shape_in[:2], *padded))
        zeros = (0,) * len(kernel)
    groups, features = roles.sizes(roles.varied), prod(roles.entry_sizes[a] for a in roles.gone)
    channels = roles.sizes(out[1])
    bias = has_bias(roles)
    slots: dict[str, Shape] = {"weight": (channels, features, *kernel)}
    slots |= {"bias": (channels,)} if bias else {}
    shape = tuple(roles.sizes(dim) for dim in out)
    return pad, Conv(bias, kernel, stride, zeros, dilation, groups, features, shape), slots, tuple(which)


def _even(window: Window | None) -> bool:
    """Whether a window adds as many positions on one side as on the other; ordinary ones are made so."""
    return window is None or not window.transposed or window.tail == window.lo + window.hi


def _zeros(
    options: list[tuple[int, int, int, int]], explicit: list[tuple[int, int]], symmetric: bool
) -> Shape | str | None:
    """The padding option of a convolution, or None where only a pad of its own can give these zeros."""
    if symmetric:
        return tuple(low for _, _, low, _ in options)
    spans = [dilation * (kernel - 1) for kernel, _, _, dilation in options]
    same = [(span // 2, span - span // 2) for span in spans]
    return "same" if same == explicit and all(stride == 1 for _, stride, _, _ in options) else None


def _conv_transpose(roles: Roles, into: Layout, out: Layout) -> Built:
    options: list[tuple[int, int, int, int, int]] = []  # kernel, stride, padding, output padding, dilation
    which: list[int | None] = []
    for dim in into[2:]:
        atom = roles.atoms[dim[0]] if dim else None
        if atom is None or atom.window is None:
            options.append((1, 1, 0, 0, 1))
            which.append(None)
            continue
        if roles.symbolic(dim) and not atom.window.transposed and atom.size != atom.window.base:
            raise NoFold("dynamic-shape", "the window's positions are known only when it runs")
        w = atom.window.reverse(atom.size)
        if w is None:
            raise NoFold("structure", "it both reads windows with strides and writes transposed ones")
        dilation, extra = max(w.step, 1), w.tail - w.hi - w.lo
        if w.lo > 0 or not 0 <= extra < max(w.s, dilation):
            raise NoFold("border", "no padding of a transposed convolution gives these borders")
        options.append((w.taps, w.s, -w.lo, extra, dilation))
        which.append(roles.windowed.index(dim[0]))
    kernel, stride, padding, extras, dilations = (tuple(column) for column in zip(*options, strict=True))
    shape_in = tuple(prod(roles.entry_sizes[a] for a in dim) for dim in into)
    groups, features = roles.sizes(roles.varied), roles.sizes(roles.fresh)
    bias = has_bias(roles)
    slots: dict[str, Shape] = {"weight": (shape_in[1], features, *kernel)}
    slots |= {"bias": (groups * features,)} if bias else {}
    shape = tuple(roles.sizes(dim) for dim in out)
    layer = ConvTranspose(bias, kernel, stride, padding, extras, dilations, groups, features, shape_in, shape)
    return None, layer, slots, tuple(which)
