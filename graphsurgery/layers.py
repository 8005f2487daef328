"""Read a functional call as the `nn.Module` that would make it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from graphsurgery.calls import arguments

__all__ = ["Layer", "read_layer"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Layer:
    """One call as a module: the class, its arguments, and where its tensors are.

    Attributes:
        kind: The module class.
        config: Keyword arguments of the class, hashable.
        tensors: Pairs of the module's tensor name and the `get_attr` target it has now.
        operand: The live input.
    """

    kind: type[nn.Module]
    config: tuple[tuple[str, Any], ...]
    tensors: tuple[tuple[str, str], ...]
    operand: fx.Node

    @property
    def key(self) -> tuple[Any, ...]:
        """What two calls must share to be calls of one module."""
        return (self.kind, self.config, self.tensors)


def read_layer(node: fx.Node) -> Layer | None:
    """Return what `node` is as a module, or None when it is no layer, or one whose weight is computed."""
    reader = _READERS.get(node.target) if node.op == "call_function" else None
    return reader(node, arguments(node)) if reader is not None else None


def _layer(
    kind: type[nn.Module], operand: Any, tensors: dict[str, Any], config: dict[str, Any], bare: bool = False
) -> Layer | None:
    """Return the layer, or None when a tensor is computed, a number is symbolic, or it has no tensor.

    A norm without weight may be bare of tensors.
    """
    targets = []
    for name, value in tensors.items():
        if value is None:
            continue
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        targets.append((name, str(value.target)))
    plain = all(
        not isinstance(item, (fx.Node, torch.SymInt)) for value in config.values() for item in _items(value)
    )
    if not plain or not (targets or bare) or not isinstance(operand, fx.Node) or operand.op == "get_attr":
        return None
    items = tuple((key, tuple(v) if isinstance(v, (list, tuple)) else v) for key, v in config.items())
    return Layer(kind, items, tuple(targets), operand)


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.meta["val"].shape) if isinstance(value, fx.Node) else ()


def _full(value: Any, rank: int) -> Any:
    """Return one number per spatial axis; the words `same` and `valid` stay."""
    if isinstance(value, str):
        return value
    items = _items(value)
    return tuple(items * rank if len(items) == 1 else items)


def _conv(node: fx.Node, a: dict[str, Any], *, kind: type[nn.Module], rank: int) -> Layer | None:
    shape = _shape(a["weight"])
    config = {
        "in_channels": shape[1] * a["groups"],
        "out_channels": shape[0],
        "kernel_size": shape[2:],
        "stride": _full(a["stride"], rank),
        "padding": _full(a["padding"], rank),
        "dilation": _full(a["dilation"], rank),
        "groups": a["groups"],
        "bias": a["bias"] is not None,
    }
    return _layer(kind, a["input"], {"weight": a["weight"], "bias": a["bias"]}, config)


def _conv_transpose(node: fx.Node, a: dict[str, Any], *, kind: type[nn.Module], rank: int) -> Layer | None:
    shape = _shape(a["weight"])
    config = {
        "in_channels": shape[0],
        "out_channels": shape[1] * a["groups"],
        "kernel_size": shape[2:],
        "stride": _full(a["stride"], rank),
        "padding": _full(a["padding"], rank),
        "output_padding": _full(a["output_padding"], rank),
        "dilation": _full(a["dilation"], rank),
        "groups": a["groups"],
        "bias": a["bias"] is not None,
    }
    return _layer(kind, a["input"], {"weight": a["weight"], "bias": a["bias"]}, config)


def _linear(node: fx.Node, a: dict[str, Any]) -> Layer | None:
    shape = _shape(a["weight"])
    if len(shape) != 2:
        return None
    config = {"in_features": shape[1], "out_features": shape[0], "bias": a["bias"] is not None}
    return _layer(nn.Linear, a["input"], {"weight": a["weight"], "bias": a["bias"]}, config)


_NORMS: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


def _batch_norm(node: fx.Node, a: dict[str, Any]) -> Layer | None:
    shape = _shape(a["input"])
    tensors = {name: a[name] for name in ("weight", "bias", "running_mean", "running_var")}
    affine, tracked = a["weight"] is not None, a["running_mean"] is not None
    if len(shape) not in _NORMS or affine is not (a["bias"] is not None):
        return None
    if tracked is not (a["running_var"] is not None) or a["training"] is tracked:
        return None
    config = {
        "num_features": shape[1],
        "eps": a["eps"],
        "momentum": a["momentum"] or None,  # the evaluation of momentum=None is recorded as 0.0
        "affine": affine,
        "track_running_stats": tracked,
    }
    return _layer(_NORMS[len(shape)], a["input"], tensors, config)


def _layer_norm(node: fx.Node, a: dict[str, Any]) -> Layer | None:
    config = {
        "normalized_shape": a["normalized_shape"],
        "eps": a["eps"],
        "elementwise_affine": a["weight"] is not None,
        "bias": a["bias"] is not None,
    }
    tensors = {"weight": a["weight"], "bias": a["bias"]}
    return _layer(nn.LayerNorm, a["input"], tensors, config, bare=a["weight"] is None)


def _rms_norm(node: fx.Node, a: dict[str, Any]) -> Layer | None:
    bare = a["weight"] is None
    config = {"normalized_shape": a["normalized_shape"], "eps": a["eps"], "elementwise_affine": not bare}
    return _layer(nn.RMSNorm, a["input"], {"weight": a["weight"]}, config, bare)


def _group_norm(node: fx.Node, a: dict[str, Any]) -> Layer | None:
    if (a["weight"] is None) is not (a["bias"] is None):
        return None
    bare = a["weight"] is None
    config = {"num_groups": a["num_groups"], "num_channels": _shape(a["input"])[1], "eps": a["eps"]}
    tensors = {"weight": a["weight"], "bias": a["bias"]}
    return _layer(nn.GroupNorm, a["input"], tensors, {**config, "affine": not bare}, bare)


def _embedding(node: fx.Node, a: dict[str, Any]) -> Layer | None:
    rows, width = _shape(a["weight"])
    config = {
        "num_embeddings": rows,
        "embedding_dim": width,
        "padding_idx": a["padding_idx"] if a["padding_idx"] >= 0 else None,
        "scale_grad_by_freq": a["scale_grad_by_freq"],
        "sparse": a["sparse"],
    }
    return _layer(nn.Embedding, a["indices"], {"weight": a["weight"]}, config)


def _conv_readers() -> dict[Any, Callable[..., Layer | None]]:
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    readers: dict[Any, Callable[..., Layer | None]] = {}
    for rank in (1, 2, 3):
        packet = getattr(aten, f"conv{rank}d")
        for overload in (packet.default, packet.padding):
            readers[overload] = functools.partial(_conv, kind=plain[rank - 1], rank=rank)
        packet = getattr(aten, f"conv_transpose{rank}d")
        overload = packet.default if rank == 1 else packet.input
        readers[overload] = functools.partial(_conv_transpose, kind=transposed[rank - 1], rank=rank)
    return readers


_READERS: dict[Any, Callable[..., Layer | None]] = {
    **_conv_readers(),
    aten.linear.default: _linear,
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.embedding.default: _embedding,
}
