"""GraphModule -> nn.Module made of `nn.Conv2d`, `nn.Linear`, `nn.BatchNorm2d`, ... under the paths they had.

A call whose weight is the attribute `P.weight` becomes the module `P`; its other tensors have to be `P.bias`,
`P.running_mean` and so on. A bare parameter (`F.linear(x, self.w1)`) becomes `w1_linear`. What does not fit
stays a functional call that reads its parameter: a computed weight, a bias of another module, a second
configuration of a weight that has a module already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

from graphsurgery.graph import copy_graph_module, fresh_attr, get_attr_value, has_attr, set_attr

__all__ = ["restore"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Layer:
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


def restore(gm: fx.GraphModule) -> fx.GraphModule:
    """Return `gm` as a network of layers, with the same signature and the same outputs.

    The result has parameters of its own that share memory with those of `gm`; it may be moved, cast, saved,
    deep-copied and exported like any module. It is in evaluation mode.

    Args:
        gm: A graph in the captured dialect; it is not changed.

    Returns:
        A graph module that calls `nn.Conv*`, `nn.ConvTranspose*`, `nn.Linear`, `nn.BatchNorm*`,
        `nn.LayerNorm`, `nn.RMSNorm`, `nn.GroupNorm` and `nn.Embedding` modules.
    """
    result = copy_graph_module(gm)
    _own_parameters(result)
    made: dict[str, tuple[Any, ...]] = {}
    for node in list(result.graph.nodes):
        layer = _read(node)
        if layer is None:
            continue
        path = _place(result, node, layer, made)
        if path is None:
            continue
        made[path] = layer.key
        with result.graph.inserting_before(node):
            call = result.graph.call_module(path, (layer.operand,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call, propagate_meta=False)
        result.graph.erase_node(node)
    for node in list(result.graph.nodes):
        if node.op == "get_attr" and not node.users:
            result.graph.erase_node(node)
    result.graph.lint()
    result.recompile()
    for module in result.modules():
        module.training = False
    saved = result.state_dict().keys()
    loose = tuple(name for name, _ in result.named_buffers() if name not in saved)
    result._register_deepcopy_hook(functools.partial(_after_deepcopy, loose=loose))
    return result


def _own_parameters(gm: fx.GraphModule) -> None:
    """Give `gm` parameter objects of its own, tied where they were."""
    own: dict[int, nn.Parameter] = {}
    for module in gm.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                twin = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
                module._parameters[name] = own.setdefault(id(parameter), twin)


def _after_deepcopy(gm: fx.GraphModule, *, loose: tuple[str, ...]) -> None:
    """Put right what `GraphModule.__deepcopy__` forgets: non-persistent buffers, the mode of plain modules."""
    for name in loose:
        path, _, leaf = name.rpartition(".")
        if has_attr(gm, name):
            gm.get_submodule(path)._non_persistent_buffers_set.add(leaf)
    for module in gm.modules():
        if type(module) is nn.Module:
            module.training = gm.training


# -- where a layer goes


def _place(gm: fx.GraphModule, node: fx.Node, layer: _Layer, made: dict[str, tuple[Any, ...]]) -> str | None:
    """Return the path of the module for this call, made now if need be; None when it does not fit."""
    for path, key in made.items():
        if key == layer.key:
            return path
    names = dict(layer.tensors)
    main = names.get("weight") or names["running_mean"]
    path, _, leaf = main.rpartition(".")
    if leaf in ("weight", "running_mean") and path:
        if path in made or any(target != f"{path}.{name}" for name, target in layer.tensors):
            return None
        return path if _install(gm, path, layer, rename=False) else None
    if not _all_bare(gm, node, layer):
        return None
    path = fresh_attr(gm, f"{main}_{_word(node)}")
    return path if _install(gm, path, layer, rename=True) else None


def _word(node: fx.Node) -> str:
    return node.target._schema.name.partition("::")[2] if isinstance(node.target, OpOverload) else "layer"


def _all_bare(gm: fx.GraphModule, node: fx.Node, layer: _Layer) -> bool:
    """Return whether this call alone reads its tensors, so that they can move into a new module."""
    targets = {target for _, target in layer.tensors}
    readers = {user for n in gm.graph.nodes if n.op == "get_attr" and n.target in targets for user in n.users}
    names: dict[int, int] = {}
    for _, parameter in gm.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    tied = any(names.get(id(get_attr_value(gm, target)), 0) != 1 for target in targets)
    return readers == {node} and not tied


def _install(gm: fx.GraphModule, path: str, layer: _Layer, *, rename: bool) -> bool:
    """Make the module at `path`; return False, with nothing changed, when it would not be the same layer."""
    module = layer.kind(**dict(layer.config), device="meta")
    values = {name: get_attr_value(gm, target) for name, target in layer.tensors}
    for name, value in values.items():
        expected = getattr(module, name, None)
        is_parameter = name in module._parameters
        if (
            expected is None
            or expected.shape != value.shape
            or is_parameter is not isinstance(value, nn.Parameter)
        ):
            return False
    old = gm.get_submodule(path) if has_attr(gm, path) else None
    if old is not None:
        if type(old) is not nn.Module:
            return False
        own = {*module._parameters, *module._buffers} - set(values) - {"num_batches_tracked"}
        if any(getattr(old, name, None) is not None for name in own):
            return False  # e.g. a bias that this call leaves out
    for name, value in values.items():
        if name in module._parameters:
            module._parameters[name] = value  # type: ignore[assignment]
        else:
            module._buffers[name] = value
    _fill_counter(module, old, next(iter(values.values())).device)
    if old is not None:
        _move_rest(old, module)
    if rename:
        for _, target in layer.tensors:
            owner, _, leaf = target.rpartition(".")
            delattr(gm.get_submodule(owner), leaf)
    _set_module(gm, path, module)
    return True


def _fill_counter(module: nn.Module, old: nn.Module | None, device: torch.device) -> None:
    if module._buffers.get("num_batches_tracked") is not None:
        counter = getattr(old, "num_batches_tracked", None)
        zero = torch.zeros((), dtype=torch.long, device=device)
        module._buffers["num_batches_tracked"] = counter if isinstance(counter, torch.Tensor) else zero


def _move_rest(old: nn.Module, module: nn.Module) -> None:
    """Carry over what else lived at the path: further tensors and child modules."""
    for name, parameter in old._parameters.items():
        if name not in module._parameters:
            module.register_parameter(name, parameter)
    for name, buffer in old._buffers.items():
        if name not in module._buffers:
            module.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
    for name, child in old._modules.items():
        module.add_module(name, child)


def _set_module(gm: fx.GraphModule, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    if owner and not has_attr(gm, owner):
        set_attr(gm, f"{owner}.{name}", torch.empty(0), parameter=False)  # makes the modules on the way
        delattr(gm.get_submodule(owner), name)
    setattr(gm.get_submodule(owner), name, module)


# -- what a call is as a module


def _arguments(node: fx.Node) -> dict[str, Any]:
    target = node.target
    if not isinstance(target, OpOverload):
        raise TypeError(f"{node.name} calls {target}, expected an operator")
    values: dict[str, Any] = {}
    for index, parameter in enumerate(target._schema.arguments):
        given = (
            node.args[index]
            if index < len(node.args)
            else node.kwargs.get(parameter.name, parameter.default_value)
        )
        values[parameter.name] = given
    return values


def _read(node: fx.Node) -> _Layer | None:
    reader = _READERS.get(node.target) if node.op == "call_function" else None
    return reader(node, _arguments(node)) if reader is not None else None


def _layer(
    kind: type[nn.Module], operand: Any, tensors: dict[str, Any], config: dict[str, Any]
) -> _Layer | None:
    """Return the layer, or None when a tensor is computed or a number is symbolic."""
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
    if not plain or not targets or not isinstance(operand, fx.Node) or operand.op == "get_attr":
        return None
    items = tuple((key, tuple(v) if isinstance(v, (list, tuple)) else v) for key, v in config.items())
    return _Layer(kind, items, tuple(targets), operand)


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


def _conv(node: fx.Node, a: dict[str, Any], *, kind: type[nn.Module], rank: int) -> _Layer | None:
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


def _conv_transpose(node: fx.Node, a: dict[str, Any], *, kind: type[nn.Module], rank: int) -> _Layer | None:
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


def _linear(node: fx.Node, a: dict[str, Any]) -> _Layer | None:
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


def _batch_norm(node: fx.Node, a: dict[str, Any]) -> _Layer | None:
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


def _layer_norm(node: fx.Node, a: dict[str, Any]) -> _Layer | None:
    config = {
        "normalized_shape": a["normalized_shape"],
        "eps": a["eps"],
        "elementwise_affine": a["weight"] is not None,
        "bias": a["bias"] is not None,
    }
    return _layer(nn.LayerNorm, a["input"], {"weight": a["weight"], "bias": a["bias"]}, config)


def _rms_norm(node: fx.Node, a: dict[str, Any]) -> _Layer | None:
    config = {"normalized_shape": a["normalized_shape"], "eps": a["eps"]}
    return _layer(nn.RMSNorm, a["input"], {"weight": a["weight"]}, config)


def _group_norm(node: fx.Node, a: dict[str, Any]) -> _Layer | None:
    if (a["weight"] is None) is not (a["bias"] is None):
        return None
    config = {"num_groups": a["num_groups"], "num_channels": _shape(a["input"])[1], "eps": a["eps"]}
    return _layer(nn.GroupNorm, a["input"], {"weight": a["weight"], "bias": a["bias"]}, config)


def _embedding(node: fx.Node, a: dict[str, Any]) -> _Layer | None:
    rows, width = _shape(a["weight"])
    config = {
        "num_embeddings": rows,
        "embedding_dim": width,
        "padding_idx": a["padding_idx"] if a["padding_idx"] >= 0 else None,
        "scale_grad_by_freq": a["scale_grad_by_freq"],
        "sparse": a["sparse"],
    }
    return _layer(nn.Embedding, a["indices"], {"weight": a["weight"]}, config)


def _conv_readers() -> dict[Any, Callable[..., _Layer | None]]:
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    readers: dict[Any, Callable[..., _Layer | None]] = {}
    for rank in (1, 2, 3):
        packet = getattr(aten, f"conv{rank}d")
        for overload in (packet.default, packet.padding):
            readers[overload] = functools.partial(_conv, kind=plain[rank - 1], rank=rank)
        packet = getattr(aten, f"conv_transpose{rank}d")
        overload = packet.default if rank == 1 else packet.input
        readers[overload] = functools.partial(_conv_transpose, kind=transposed[rank - 1], rank=rank)
    return readers


_READERS: dict[Any, Callable[..., _Layer | None]] = {
    **_conv_readers(),
    aten.linear.default: _linear,
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.embedding.default: _embedding,
}
