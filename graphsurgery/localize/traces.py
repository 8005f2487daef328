"""The values inside of a program, whatever it is written in: what makes each, and how to look at some."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from graphsurgery.capture import capture
from graphsurgery.errors import VerificationError
from graphsurgery.export.probe import values_of, write_probe
from graphsurgery.graph import copy_graph_module, module_path, source_line
from graphsurgery.localize.result import Place
from graphsurgery.verify import Inputs, OnnxRunner, Runner, runtime_runner

__all__ = ["OnnxTrace", "TorchTrace", "Trace", "trace_of"]

Shapes = dict[str, tuple[int, ...]]


class Trace(Protocol):
    """A program whose inner values can be looked at.

    Attributes:
        places: Its values in the order in which they are made; not all need be tensors.
        outputs: Names of those that it returns.
    """

    places: tuple[Place, ...]
    outputs: tuple[str, ...]

    def exposed(self, names: Sequence[str], called: Sequence[str], shapes: Shapes) -> Runner:
        """Return a runner of the same program that returns inner values.

        Args:
            names: The values.
            called: What each is called in the outputs.
            shapes: By these names, the shapes that they are brought to.
        """
        ...  # pragma: no cover - a protocol


def trace_of(program: nn.Module | Path, inputs: Inputs, folder: Path, runtime: str = "") -> Trace:
    """Return the trace of a torch module or an ONNX file.

    Args:
        program: A graph module is looked at as it is, if no call of it writes into a value; any other module
            is captured.
        inputs: What it will be run on.
        folder: For temporary files.
        runtime: Where it is run, as in `graphsurgery.verify.RUNTIMES`; "" is torch's eager mode, and
            onnxruntime without its optimisations.

    Raises:
        CaptureError: The module cannot be captured.
        VerificationError: The file cannot be read, or the inputs are positional and keyword ones at once.
    """
    if isinstance(program, Path):
        return OnnxTrace(program, folder, runtime or "onnxruntime-unoptimised")
    if isinstance(program, fx.GraphModule) and not any(map(_writes, program.graph.nodes)):
        return TorchTrace(program, runtime=runtime)
    kwargs = dict(inputs.kwargs or {})
    if inputs.args and kwargs:
        raise VerificationError(
            f"the values inside of {type(program).__name__} cannot be looked at, because it is called with "
            "positional and keyword inputs at once; capture it and pass the graph module"
        )
    return TorchTrace(capture(program, kwargs or inputs.args), type(program).__name__, runtime)


class TorchTrace:
    """The nodes of a graph module.

    Args:
        gm: The graph module; it is not changed.
        name: What a report calls the program; "" for the name of its class.
        runtime: Where it is run; "" for torch's eager mode.
    """

    def __init__(self, gm: fx.GraphModule, name: str = "", runtime: str = "") -> None:
        self._gm, self._runtime = gm, runtime or "torch"
        self._name = name or type(gm).__name__
        parameters: dict[fx.Node, tuple[str, ...]] = {}
        values: dict[fx.Node, tuple[str, ...]] = {}
        places: list[Place] = []
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                parameters[node] = (str(node.target),)
                continue
            if node.op == "output":
                continue
            own = tuple(dict.fromkeys(n for i in node.all_input_nodes for n in parameters.get(i, ())))
            live = tuple(dict.fromkeys(n for i in node.all_input_nodes for n in values.get(i, ())))
            if not live and node.op != "placeholder":
                parameters[node] = own
                continue
            module = str(node.target) if node.op == "call_module" else module_path(node)
            named = own if node.op != "call_module" else tuple(self._inside(module))
            place = Place(node.name, _op(node, gm), module, source_line(node), node.name, live, named)
            # A tuple of tensors is no value to look at: those that pick from it read what it was made of.
            several = isinstance(node.meta.get("val"), tuple | list)
            values[node] = live if several else (node.name,)
            if not several:
                places.append(place)
        self.places = tuple(places)
        leaves = pytree.tree_leaves(gm.graph.output_node().args[0])
        self.outputs = tuple(leaf.name for leaf in leaves if isinstance(leaf, fx.Node))

    def _inside(self, module: str) -> list[str]:
        return [f"{module}.{name}" for name, _ in self._gm.get_submodule(module).named_parameters()]

    def exposed(self, names: Sequence[str], called: Sequence[str], shapes: Shapes) -> Runner:
        """Return a runner of the graph module that returns inner values."""
        gm = copy_graph_module(self._gm)
        nodes = {node.name: node for node in gm.graph.nodes}
        _set_outputs(gm, tuple(nodes[name] for name in names))
        gm.graph.eliminate_dead_code()
        gm.recompile()
        runner = runtime_runner(self._runtime, _Exposed(gm, tuple(called), shapes))
        runner.name = f"torch {self._name}"
        return runner


class _Exposed(nn.Module):
    """A graph module whose outputs are given names and shapes."""

    def __init__(self, gm: fx.GraphModule, names: tuple[str, ...], shapes: Shapes) -> None:
        super().__init__()
        self.gm, self.names, self.shapes = gm, names, shapes

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = self.gm(*args, **kwargs)
        return {
            name: value.reshape(self.shapes[name]) if name in self.shapes else value
            for name, value in zip(self.names, found, strict=True)
            if isinstance(value, Tensor)
        }


def _writes(node: fx.Node) -> bool:
    """Return whether a call writes into a value, which would then be seen as it is afterwards."""
    schema = getattr(node.target, "_schema", None)
    inplace = node.op == "call_method" and str(node.target).endswith("_")
    return inplace or bool(schema is not None and schema.is_mutable)


def _op(node: fx.Node, gm: fx.GraphModule) -> str:
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__
    if node.op == "placeholder":
        return "input"
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def _set_outputs(gm: fx.GraphModule, outputs: tuple[fx.Node, ...]) -> None:
    """Make a graph return other values; how it takes its arguments stays."""
    node = gm.graph.output_node()
    node.meta.pop("val", None)
    node.args = (outputs,)
    codegen = gm.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        own = copy.copy(codegen)  # other graphs share the one that was there
        own.pytree_info = codegen.pytree_info._replace(out_spec=pytree.tree_structure(outputs))
        gm.graph._codegen = own


class OnnxTrace:
    """The values of an ONNX file's main graph.

    Args:
        path: The file.
        folder: For the copies that return inner values.
        runtime: Where these are run.
    """

    def __init__(self, path: Path, folder: Path, runtime: str) -> None:
        self._path, self._folder, self._runtime = path, folder, runtime
        found, self.outputs = values_of(path)
        self.places = tuple(
            Place(v.name, v.op, _module(v.initializers), "", v.node, v.inputs, v.initializers) for v in found
        )
        self._copy: Path | None = None

    def exposed(self, names: Sequence[str], called: Sequence[str], shapes: Shapes) -> Runner:
        """Return a runner of a copy of the file that returns inner values."""
        copied = Path(tempfile.mkdtemp(dir=self._folder)) / self._path.name
        write_probe(self._path, names, copied)
        if self._copy is not None:
            shutil.rmtree(self._copy.parent, ignore_errors=True)  # a model each: not all of them at once
        self._copy = copied
        runner = runtime_runner(self._runtime, copied)
        return (
            runner
            if tuple(names) == tuple(called) and not shapes
            else _Renamed(runner, called, shapes, copied)
        )


class _Renamed:
    """A runner of a file whose outputs are given other names and shapes."""

    def __init__(self, runner: Runner, names: Sequence[str], shapes: Shapes, path: Path) -> None:
        self.name = runner.name
        self._runner, self._names, self._shapes, self._path = runner, tuple(names), shapes, path

    def float64(self) -> Runner | None:
        """Return the file in float64, whatever it is run on here; None where it is too large for that."""
        runner = OnnxRunner(self._path, optimised=False).float64()
        return None if runner is None else _Renamed(runner, self._names, self._shapes, self._path)

    def run(self, inputs: Inputs) -> dict[str, Tensor]:
        found = self._runner.run(inputs).values()
        return {
            name: value.reshape(self._shapes.get(name, value.shape))
            for name, value in zip(self._names, found, strict=True)
        }


def _module(initializers: tuple[str, ...]) -> str:
    """Return the path of the module that an exporter named an initializer after: "layer1.0.conv1.weight"."""
    owners = [name.rpartition(".")[0] for name in initializers if name.endswith((".weight", ".bias"))]
    return owners[0] if owners else ""
