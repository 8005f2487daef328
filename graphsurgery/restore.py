"""GraphModule -> nn.Module made of `nn.Conv2d`, `nn.Linear`, `nn.BatchNorm2d`, ... under the paths they had.

A call whose weight is the attribute `P.weight` becomes the module `P`; its other tensors have to be `P.bias`,
`P.running_mean` and so on. A bare parameter (`F.linear(x, self.w1)`) becomes `w1_linear`. What does not fit
stays a functional call that reads its parameter: a computed weight, a bias of another module, a second
configuration of a weight that has a module already.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch._ops import OpOverload

from graphsurgery.graph import copy_graph_module, fresh_attr, get_attr_value, has_attr, module_path, set_attr
from graphsurgery.layers import Layer, read_layer

__all__ = ["restore"]


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
    result = copy_graph_module(gm, _Restored)
    _own_parameters(result)
    made: dict[str, tuple[Any, ...]] = {}
    for node in list(result.graph.nodes):
        layer = read_layer(node)
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
    return result


_GM = TypeVar("_GM", bound=nn.Module)


class _Restored(fx.GraphModule):
    """A graph module that keeps, copied and pickled, what `fx.GraphModule` forgets.

    That is the mode of its modules, which buffers do not belong to the state dict, and what `carry` has set.
    """

    _carried: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        found = _put_right(super().__deepcopy__(memo), self.state_dict(keep_vars=True), self.training)
        return carry(found, {name: copy.deepcopy(getattr(self, name), memo) for name in self._carried})

    def __reduce__(self) -> tuple[Any, ...]:
        carried = {name: getattr(self, name) for name in self._carried}
        return _load, (*super().__reduce__(), tuple(self.state_dict(keep_vars=True)), self.training, carried)


def carry(gm: _GM, values: Mapping[str, Any]) -> _GM:
    """Set attributes on a restored graph module that its calls do not read; copies of it have them too."""
    for name, value in values.items():
        setattr(gm, name, value)
    gm._carried = tuple(values)  # type: ignore[assignment]
    return gm


def _load(
    make: Callable[..., fx.GraphModule],
    arguments: tuple[Any, ...],
    saved: tuple[str, ...],
    training: bool,
    carried: Mapping[str, Any],
) -> fx.GraphModule:
    """Return what was pickled, of the class that it had: loaded, it is a plain graph module."""
    return carry(_put_right(copy_graph_module(make(*arguments), _Restored), saved, training), carried)


def _put_right(gm: fx.GraphModule, saved: Collection[str], training: bool) -> fx.GraphModule:
    """Set on a copy which buffers belong to its state dict, and the mode of modules made for it.

    A pickled graph is traced again when it is loaded, which makes buffers of what it computes of constants.
    """
    for name in [name for name, _ in gm.named_buffers() if name not in saved]:
        path, _, leaf = name.rpartition(".")
        gm.get_submodule(path)._non_persistent_buffers_set.add(leaf)
    for module in gm.modules():
        if type(module) is nn.Module or module is gm:
            module.training = training
    return gm


def _own_parameters(gm: fx.GraphModule) -> None:
    """Give `gm` parameter objects of its own, tied where they were."""
    own: dict[int, nn.Parameter] = {}
    for module in gm.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                twin = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
                module._parameters[name] = own.setdefault(id(parameter), twin)


# -- where a layer goes


def _place(gm: fx.GraphModule, node: fx.Node, layer: Layer, made: dict[str, tuple[Any, ...]]) -> str | None:
    """Return the path of the module for this call, made now if need be; None when it does not fit."""
    if not layer.tensors:
        return _place_bare(gm, node, layer, made)
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


def _place_bare(
    gm: fx.GraphModule, node: fx.Node, layer: Layer, made: dict[str, tuple[Any, ...]]
) -> str | None:
    """The path of a layer without tensors: that of the module it came from, if nothing else lives there."""
    path = module_path(node)
    if path in made:
        return path if made[path] == layer.key else None
    if not path:
        return None
    if has_attr(gm, path):
        try:
            old = gm.get_submodule(path)
        except AttributeError:  # a tensor
            return None
        if type(old) is not nn.Module or old._parameters or old._buffers or old._modules:
            return None
    return path if _install(gm, path, layer, rename=False) else None


def _word(node: fx.Node) -> str:
    return node.target._schema.name.partition("::")[2] if isinstance(node.target, OpOverload) else "layer"


def _all_bare(gm: fx.GraphModule, node: fx.Node, layer: Layer) -> bool:
    """Return whether this call alone reads its tensors, so that they can move into a new module."""
    targets = {target for _, target in layer.tensors}
    readers = {user for n in gm.graph.nodes if n.op == "get_attr" and n.target in targets for user in n.users}
    names: dict[int, int] = {}
    for _, parameter in gm.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    tied = any(names.get(id(get_attr_value(gm, target)), 0) != 1 for target in targets)
    return readers == {node} and not tied


def _install(gm: fx.GraphModule, path: str, layer: Layer, *, rename: bool) -> bool:
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
    if values:
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
