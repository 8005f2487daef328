"""ExportedProgram -> GraphModule that reads its parameters by `get_attr`, under the user's own names."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from graphsurgery.capture.bodies import inline_bodies
from graphsurgery.errors import CaptureError
from graphsurgery.graph import has_attr, module_path, set_attr, source_line

__all__ = ["input_names", "output_names", "unlift"]

_LIFTED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class _Tensors:
    """The graph's own tensors, one for each of the program's; what shares memory exactly becomes one object.

    Args:
        program: The program.
        copy: Whether they are copies; else they share the memory of the program's.
    """

    def __init__(self, program: ExportedProgram, *, copy: bool) -> None:
        self._program = program
        self._copy = copy
        self._made: dict[Any, torch.Tensor] = {}

    def __call__(self, name: str, *, parameter: bool) -> torch.Tensor:
        state, constants = self._program.state_dict, self._program.constants
        value = state[name] if name in state else constants[name]
        if type(value) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            raise CaptureError(
                f"{name!r} is a {type(value).__name__}, expected a plain tensor; "
                "capture the model before it is quantised or sharded."
            )
        if value.layout is not torch.strided or value.is_quantized:
            raise CaptureError(
                f"{name!r} is a sparse or quantised tensor, expected a dense one; densify it first."
            )
        where = (value.untyped_storage().data_ptr(), value.storage_offset())
        key = (*where, value.shape, value.stride(), value.dtype, parameter) if where[0] else id(value)
        if key not in self._made:
            own = value.detach().clone() if self._copy else value.detach()
            self._made[key] = nn.Parameter(own, requires_grad=value.requires_grad) if parameter else own
        return self._made[key]


def unlift(
    program: ExportedProgram, model_name: str, *, copy: bool = True
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Build the graph module of an exported program.

    Args:
        program: The program.
        model_name: Name of the class of the graph module.
        copy: Whether the graph holds copies of the tensors; else nothing is shared but their memory and fake
            values.

    Returns:
        The graph module, and the names of the buffers and inputs that the program writes at its end.

    Raises:
        CaptureError: The program holds script objects, or tensors that are not plain and dense.
    """
    gm = fx.GraphModule(nn.Module(), fx.Graph(), class_name=model_name)
    graph = fx.Graph()
    tensors = _Tensors(program, copy=copy)
    values: dict[fx.Node, fx.Node] = {}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    written: tuple[str, ...] = ()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind is InputKind.USER_INPUT:
                values[node] = graph.node_copy(node)
            elif spec.kind in _LIFTED and spec.target is not None:
                _register(gm, spec, tensors)
                values[node] = graph.create_node("get_attr", spec.target)
                values[node].meta = dict(node.meta)
            else:
                raise CaptureError(
                    f"the model holds {spec.target!r}, a script object, which cannot be captured."
                )
        elif node.op == "output":
            outputs, written = _user_outputs(program, node)
            graph.output(fx.map_arg(outputs, values.__getitem__)).meta = dict(node.meta)
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
            if node.op == "get_attr":  # the body of a control-flow operator
                setattr(gm, str(node.target), getattr(program.graph_module, str(node.target)))
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    graph._codegen = _PyTreeCodeGen(_PyTreeInfo(_argument_names(program), in_spec, out_spec))
    gm.graph = graph
    inline_bodies(gm)
    _read_under_own_name(gm)
    return gm, written


def _register(gm: fx.GraphModule, spec: Any, tensors: _Tensors) -> None:
    parameter = spec.kind is InputKind.PARAMETER
    persistent = spec.kind is InputKind.BUFFER and bool(spec.persistent)
    tensor = tensors(spec.target, parameter=parameter)
    set_attr(gm, spec.target, tensor, parameter=parameter, persistent=persistent)


def _user_outputs(program: ExportedProgram, node: fx.Node) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    user: list[Any] = []
    written: list[str] = []
    results = node.args[0]
    if not isinstance(results, (tuple, list)):
        raise CaptureError(
            "the exported program has no flat tuple of outputs; export it again with this torch."
        )
    for value, spec in zip(results, program.graph_signature.output_specs, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            user.append(value)
        else:
            written.append(str(spec.target))
    return tuple(user), tuple(written)


def _read_under_own_name(gm: fx.GraphModule) -> None:
    """Let each call read a tied parameter under the name in its own module (export keeps one of them)."""
    names: dict[int, list[str]] = {}
    for name, parameter in gm.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = {name: group for group in names.values() if len(group) > 1 for name in group}
    readers = {str(node.target): node for node in gm.graph.nodes if node.op == "get_attr"}
    for node in [node for name, node in readers.items() if name in tied]:
        for user in list(node.users):
            own = [n for n in tied[str(node.target)] if n.rpartition(".")[0] == module_path(user)]
            if own and str(node.target) not in own and own[0] in readers:
                user.replace_input_with(node, readers[own[0]])


# -- names


def _argument_names(program: ExportedProgram) -> list[str]:
    signature = program.module_call_graph[0].signature if program.module_call_graph else None
    if signature is not None and signature.forward_arg_names:
        return list(signature.forward_arg_names)
    args, kwargs = program.call_spec.in_spec.children()
    return [f"arg_{i}" for i in range(args.num_children)] + [str(key) for key in kwargs.context]


def _join(parts: list[str]) -> str:
    return "_".join(part for part in parts if part)


def _key(entry: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(entry, field):
            return str(getattr(entry, field))
    return str(entry)


def _unique(names: list[str]) -> tuple[str, ...]:
    seen: set[str] = set()
    for index, name in enumerate(names):
        count, fresh = 0, name
        while fresh in seen:
            count += 1
            fresh = f"{name}_{count}"
        seen.add(fresh)
        names[index] = fresh
    return tuple(names)


def _leaf_paths(spec: Any) -> list[list[str]]:
    tree = pytree.tree_unflatten([0] * spec.num_leaves, spec)
    return [[_key(entry) for entry in path] for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def input_names(gm: fx.GraphModule) -> tuple[str, ...]:
    """Return a name for every flat input: the argument's, with the keys inside of it (`batch_image`)."""
    info = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]  # a captured graph has it
    args = info.in_spec.children()[0]
    keywords = list(info.in_spec.children()[1].context)
    names: list[str] = []
    for path in _leaf_paths(info.in_spec):
        position = int(path[1]) if path[0] == "0" else args.num_children + keywords.index(path[1])
        names.append(_join([info.orig_args[position], *path[2:]]))
    return _unique(names)


def output_names(gm: fx.GraphModule) -> tuple[str, ...]:
    """Return a name for every flat output: its keys, or `output` and a number where it has none."""
    spec = gm.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]  # as above
    names = []
    for path in _leaf_paths(spec):
        text = _join(path)
        names.append("output" if not text else f"output_{text}" if text[0].isdigit() else text)
    return _unique(names)


def describe_write(gm: fx.GraphModule, name: str) -> str:
    """Return ` (at file.py:12 ...)` for the line that makes the value written to `name`, "" if unknown."""
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target == name and has_attr(gm, name):
            for user in node.users:
                if source_line(user):
                    return f" (near {source_line(user)})"
    return ""
