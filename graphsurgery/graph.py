"""Helpers on a captured graph: its record, its attributes, fake values, hashes and source lines.

Everything here works on the captured dialect: functional ATen calls in a `torch.fx.GraphModule`, every
parameter and constant read by a `get_attr` node whose dotted target is the user's own path
(`layer1.0.conv1.weight`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphsurgery.origin import module_path, origin, source_line

__all__ = [
    "INFO_KEY",
    "CaptureInfo",
    "annotate",
    "capture_info",
    "copy_graph_module",
    "delete_unused_attrs",
    "fake_mode",
    "fresh_attr",
    "get_attr_value",
    "has_attr",
    "module_path",
    "origin",
    "set_attr",
    "source_line",
    "structural_hash",
    "tensor_bytes",
]

INFO_KEY = "graphsurgery"
"""Key of the `CaptureInfo` in `gm.meta`."""

_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class CaptureInfo:
    """What is known of a captured graph besides its nodes.

    Attributes:
        input_names: The model's own names of the flat inputs, in the order of the placeholders.
        output_names: Names of the flat outputs.
        dynamic_batch: Whether the leading dimension of the inputs is free.
        notes: Sentences for the report ("captured with a static batch because ...").
        model_name: Class name of the captured model.
        args: Positional example inputs as given, detached.
        kwargs: Keyword example inputs as given, detached.
        refused_batches: Of the batch sizes 1 to 16 those that the graph does not hold for, where the batch is
            free.
        trailing_axes: For each flat output, how many axes of size one the graph's output has, on the example,
            behind those of the model's; empty where none has.
        batch_axes: The axes that change with a free batch: number of the flat argument (positional ones
            first, keywords as given), axis (-1 for a number passed as it is), factor and offset: the size is
            `factor * batch + offset`. None where that is not known.
        size_names: Name of each free size, by its symbol in the graph: `{"s77": "batch", "s53": "height"}`.
    """

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic_batch: bool
    notes: tuple[str, ...]
    model_name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    refused_batches: tuple[int, ...] = ()
    trailing_axes: tuple[int, ...] = ()
    batch_axes: tuple[tuple[int, int, int, int], ...] | None = None
    size_names: Mapping[str, str] = field(default_factory=dict)


def capture_info(gm: fx.GraphModule) -> CaptureInfo:
    """Return the record that capture left on `gm`.

    Raises:
        ValueError: `gm` was not made by `graphsurgery.capture`.
    """
    info = gm.meta.get(INFO_KEY)
    if not isinstance(info, CaptureInfo):
        raise ValueError("this graph module carries no CaptureInfo; make it with graphsurgery.capture")
    return info


# -- attributes


def _lookup(root: nn.Module, target: str) -> Any:
    value: Any = root
    for name in target.split("."):
        if not isinstance(value, nn.Module) or not hasattr(value, name):
            raise AttributeError(f"the graph module has no attribute {target!r} (missing at {name!r})")
        value = getattr(value, name)
    return value


def has_attr(gm: nn.Module, target: str) -> bool:
    """Return whether the dotted name `target` exists on `gm` (a tensor, a module, anything)."""
    try:
        _lookup(gm, target)
    except AttributeError:
        return False
    return True


def get_attr_value(gm: nn.Module, target: str) -> torch.Tensor:
    """Return the tensor that a `get_attr` node of that target reads.

    Raises:
        AttributeError: There is no such attribute.
        TypeError: The attribute is not a tensor.
    """
    value = _lookup(gm, target)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"attribute {target!r} is a {type(value).__name__}, expected a tensor")
    return value


def set_attr(
    gm: nn.Module, target: str, tensor: torch.Tensor, *, parameter: bool, persistent: bool = True
) -> None:
    """Register `tensor` under the dotted name `target`, in place of what was there.

    Missing modules on the way are made (plain `nn.Module`). An `nn.Parameter` is kept as the very object, so
    that tied weights stay tied.

    Args:
        gm: The module that is changed.
        target: Dotted name, e.g. `layer1.0.conv1.weight`.
        tensor: The value, of any shape and dtype.
        parameter: Register an `nn.Parameter` (its `requires_grad` is that of `tensor`), else a buffer.
        persistent: Whether a buffer belongs to the state dict.

    Raises:
        ValueError: A tensor stands where a module would have to be made.
    """
    *path, name = target.split(".")
    owner: nn.Module = gm
    for step in path:
        child = getattr(owner, step, None)
        if child is None:
            child = nn.Module()
            owner.add_module(step, child)
        if not isinstance(child, nn.Module):
            raise ValueError(
                f"cannot set {target!r}: {step!r} is a {type(child).__name__}, expected a module"
            )
        owner = child
    if hasattr(owner, name):
        delattr(owner, name)
    if parameter:
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
        owner.register_parameter(name, tensor)
    else:
        owner.register_buffer(name, tensor.detach(), persistent=persistent)


def _is_free(gm: nn.Module, target: str) -> bool:
    owner: Any = gm
    for name in target.split("."):
        if not isinstance(owner, nn.Module):
            return False  # a tensor stands on the way
        if not hasattr(owner, name):
            return True
        owner = getattr(owner, name)
    return False


def _tensor_on_the_way(gm: nn.Module, steps: list[str]) -> int | None:
    owner: Any = gm
    for index, name in enumerate(steps[:-1]):
        owner = getattr(owner, name, None)
        if owner is None or not isinstance(owner, nn.Module):
            return None if owner is None else index
    return None


def fresh_attr(gm: nn.Module, wanted: str) -> str:
    """Return the dotted name `wanted` when it is free on `gm`, else `wanted_1`, `wanted_2`, ...

    Where a tensor stands at the path of a module (`w1` for `w1.weight`), that step is numbered.
    """
    steps = wanted.split(".")
    blocked = _tensor_on_the_way(gm, steps)
    numbered = len(steps) - 1 if blocked is None else blocked
    name, count = wanted, 0
    while not _is_free(gm, name):
        count += 1
        name = ".".join([*steps[:numbered], f"{steps[numbered]}_{count}", *steps[numbered + 1 :]])
    return name


def _tensor_names(module: nn.Module) -> Iterator[str]:
    for table in (module._parameters, module._buffers):
        yield from (name for name, tensor in table.items() if tensor is not None)
    yield from (name for name, value in vars(module).items() if isinstance(value, torch.Tensor))


def delete_unused_attrs(gm: fx.GraphModule) -> tuple[str, ...]:
    """Delete the parameters, buffers and empty modules of `gm` that no node reads.

    What lies under the target of a `call_module` node stays; so does the `num_batches_tracked` of a batch
    norm whose statistics are read, for the sake of the state dict.

    Returns:
        The dotted names of the deleted tensors.
    """
    read = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    called = tuple(str(n.target) + "." for n in gm.graph.nodes if n.op == "call_module")
    deleted: list[str] = []

    def prune(module: nn.Module, prefix: str) -> bool:
        """Prune below `module`; return whether nothing is left of it."""
        for name, child in list(module._modules.items()):
            path = f"{prefix}{name}"
            if child is None or path in read or (path + ".").startswith(called):
                continue
            if prune(child, path + "."):
                del module._modules[name]
        names = list(_tensor_names(module))
        live = {name for name in names if f"{prefix}{name}" in read}
        if live & {"running_mean", "running_var"}:
            live.add(_COUNTER)
        for name in names:
            if name not in live:
                delattr(module, name)
                deleted.append(f"{prefix}{name}")
        return not live and not module._modules and type(module) is nn.Module

    prune(gm, "")
    return tuple(deleted)


# -- copies and hashes


def _share_table(source: nn.Module, memo: dict[int, nn.Module], into: nn.Module | None = None) -> nn.Module:
    """Return a twin of `source` with attribute tables of its own and the same tensors in them."""
    if id(source) in memo:
        return memo[id(source)]
    plain = into is not None or type(source) is nn.Module
    twin = (
        into if into is not None else (nn.Module() if plain else source.__class__.__new__(source.__class__))
    )
    memo[id(source)] = twin
    if not plain:
        twin.__dict__.update(source.__dict__)
    twin._modules = {}
    twin._parameters = dict(source._parameters)
    twin._buffers = dict(source._buffers)
    twin._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
    for name, value in vars(source).items():
        if isinstance(value, torch.Tensor):
            twin.__dict__[name] = value
    for name, child in source._modules.items():
        twin._modules[name] = None if child is None else _share_table(child, memo)
    twin.training = source.training
    return twin


def copy_graph_module(gm: fx.GraphModule, kind: type[fx.GraphModule] = fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm`, of class `kind`, with a graph and tables of its own; tensors are shared.

    Setting, adding and deleting attributes or nodes of the copy leaves `gm` as it is; writing into a tensor
    does not.
    """
    graph = fx.Graph(tracer_cls=gm.graph._tracer_cls)
    values: dict[fx.Node, Any] = {}
    output = graph.graph_copy(gm.graph, values, return_output_node=True)
    if output is not None:
        value, old = output if isinstance(output, tuple) else (output, None)
        node = graph.output(value)
        if isinstance(old, fx.Node):
            node.meta = dict(old.meta)
    graph._codegen = gm.graph._codegen
    twin = kind(gm, graph, class_name=gm.__class__.__name__)
    _share_table(gm, {}, into=twin)
    twin.meta = dict(gm.meta)
    return twin


def tensor_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the contents of a tensor as flat uint8, on its device; a view of its memory where one exists.

    Any strides, number of dimensions and dtype will do; a meta tensor has no contents, so no bytes.

    Args:
        tensor: Any tensor; one that is not strided is made dense first.
    """
    if tensor.device.type == "meta":
        return torch.empty(0, dtype=torch.uint8)
    dense = tensor.detach()
    if dense.is_quantized:
        dense = dense.int_repr()
    elif dense.layout != torch.strided:
        dense = dense.to_dense()
    flat = dense.resolve_conj().resolve_neg().reshape(-1).contiguous()
    # A single element counts as contiguous whatever its stride, but only stride 1 can be viewed as bytes.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)


def _feed_tensor(digest: Any, tensor: torch.Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}{tensor.device}".encode())
    digest.update(tensor_bytes(tensor).cpu().numpy().data)


def structural_hash(gm: fx.GraphModule) -> str:
    """Return a hash of `gm`: targets, arguments, wiring, signature, attribute names and tensor bytes.

    Names and metadata of nodes do not enter, nor the record of the capture. Equal hashes mean the same
    program; the time is that of reading all parameters once.
    """
    digest = hashlib.sha256()
    numbers = {node: index for index, node in enumerate(gm.graph.nodes)}

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{numbers[value]}"
        if isinstance(value, (list, tuple)):
            return "[" + ",".join(text(item) for item in value) + "]"
        if isinstance(value, dict):
            return "{" + ",".join(f"{key}:{text(item)}" for key, item in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({text(value.start)},{text(value.stop)},{text(value.step)})"
        return f"{type(value).__name__}:{value!r}"

    for node in gm.graph.nodes:
        target = node.target if isinstance(node.target, str) else _qualified_name(node.target)
        digest.update(f"{node.op}|{target}|{text(node.args)}|{text(node.kwargs)}\n".encode())
    info = getattr(gm.graph._codegen, "pytree_info", None)
    digest.update(repr(info).encode())

    first_name: dict[int, str] = {}
    tables = (gm.named_parameters(remove_duplicate=False), gm.named_buffers(remove_duplicate=False))
    for kind, table in zip("pb", tables, strict=True):
        for name, tensor in table:
            same_as = first_name.setdefault(id(tensor), name)
            digest.update(f"{kind}|{name}|{same_as}|{tensor.requires_grad}\n".encode())
            if same_as == name:
                _feed_tensor(digest, tensor)
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            value = _lookup(gm, str(node.target))
            if isinstance(value, torch.Tensor) and id(value) not in first_name:
                first_name[id(value)] = str(node.target)
                _feed_tensor(digest, value)
    return digest.hexdigest()


def _qualified_name(target: Any) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}.{target}"


# -- fake values


def fake_mode(gm: fx.GraphModule) -> FakeTensorMode:
    """Return the one `FakeTensorMode` of the values in `node.meta["val"]` (a new one where there is none)."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(shape_env=ShapeEnv())


def annotate(gm: fx.GraphModule, node: fx.Node) -> None:
    """Compute `node.meta["val"]` of a new `get_attr` or `call_function` node from its operands' fake values.

    No guard is recorded: a batch that was free stays free (of a pad in torch's Python kernels alone).

    Raises:
        ValueError: The node is of another kind, or an operand has no fake value yet.
    """
    mode = fake_mode(gm)
    if node.op == "get_attr":
        node.meta["val"] = mode.from_tensor(get_attr_value(gm, str(node.target)), static_shapes=True)
        return
    if node.op != "call_function" or not callable(node.target):
        raise ValueError(f"cannot annotate {node.name!r}, a {node.op}: expected get_attr or call_function")
    for operand in node.all_input_nodes:
        if "val" not in operand.meta:
            raise ValueError(
                f"cannot annotate node {node.name!r}: its operand {operand.name!r} has no value yet"
            )
    args = fx.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
    shape_env = mode.shape_env if mode.shape_env is not None else ShapeEnv()
    with mode, torch.no_grad(), shape_env.suppress_guards(), enable_python_dispatcher():
        node.meta["val"] = node.target(*args, **kwargs)
