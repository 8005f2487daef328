"""`torch.compile(model, backend="graphsurgery")`: fold for inference, then hand the graph to Inductor.

What Dynamo found is captured and folded by the default passes, verified, and given to an inner backend. Where
that cannot be done the inner backend gets Dynamo's graph as it was, with one warning that names the reason.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch._guards import tracing

from graphsurgery.calls import is_random
from graphsurgery.capture.checked import CheckedCodeGen, check_inputs
from graphsurgery.graph import copy_graph_module, fresh_attr, set_attr
from graphsurgery.passes import select
from graphsurgery.pipeline import optimize
from graphsurgery.rewrite import Pass

__all__ = ["graphsurgery"]

Run = Callable[..., Any]
_NAME = "graphsurgery"
_STATIC = "_dynamo_static_input_type"
"""The attribute by which Dynamo marks the tensors that belong to a module."""


class _NotFolded(Exception):
    """Why a graph is given to the inner backend as it is."""


def graphsurgery(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
) -> Run:
    """Compile one graph of Dynamo's: the function that `torch.compile(model, backend="graphsurgery")` calls.

    It is for inference: call the compiled model under `torch.no_grad()` or `torch.inference_mode()`.
    Parameters and buffers are folded as they are at the first call. At every call they are compared with what
    they were, by object, storage and version counter; once one has changed, the graph runs unfolded, with a
    warning. (What is written through `tensor.data` or `tensor.numpy()` moves no counter, and is not seen.)

    Args:
        gm: Dynamo's graph; parameters, buffers and inputs are its placeholders.
        example_inputs: Their values, in this order.
        options: `inner`, the backend that compiles the folded graph (`"inductor"`, `"eager"` or any name or
            function that `torch.compile` knows; `"inductor"` if left out); `passes` and `verify`
            (`"final"`, `"each-pass"` or `"off"`) as for `graphsurgery.optimize`.

    Returns:
        A function of the graph's inputs.

    Raises:
        ValueError: An option is unknown or has no such value.
        torch._dynamo.exc.InvalidBackend: There is no such inner backend.
    """
    chosen = _Options.read(options)
    try:
        folded = _Folding(gm, example_inputs, chosen).program()
    except _NotFolded as reason:
        _warn(f"the graph is compiled as it is: {reason}")
        folded = None
    if folded is None:
        plain: Run = chosen.compiler(gm, list(example_inputs))
        return plain
    return folded


# -- options ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Options:
    """What the caller chose; see `graphsurgery`."""

    inner: str | Callable[..., Any] = "inductor"
    passes: Iterable[str | Pass | type[Pass]] | str | Pass | None = None
    verify: Literal["final", "each-pass", "off"] = "final"

    @classmethod
    def read(cls, given: Mapping[str, Any] | None) -> _Options:
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(given or ()) - set(known))
        if unknown:
            raise ValueError(
                f"backend {_NAME!r} has no option {unknown[0]!r}, expected any of {', '.join(known)}"
            )
        options = cls(**dict(given or {}))
        if options.verify not in ("final", "each-pass", "off"):
            raise ValueError(
                f"the option 'verify' must be 'final', 'each-pass' or 'off', got {options.verify!r}"
            )
        if options.inner == _NAME or options.inner is graphsurgery:
            raise ValueError(f"the option 'inner' must name another backend than {_NAME!r} itself")
        select(options.passes)  # raises for a name that is none; later it would look like a graph that failed
        return options

    @property
    def compiler(self) -> Callable[..., Any]:
        found: Callable[..., Any] = torch._dynamo.lookup_backend(self.inner)
        return found


def _warn(text: str) -> None:
    warnings.warn(f"torch.compile backend {_NAME!r}: {text}", RuntimeWarning, stacklevel=2)


# -- one graph --------------------------------------------------------------------------------------------


class _Folding:
    """One graph of Dynamo's on its way to a folded one."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], options: _Options) -> None:
        self._gm, self._options = gm, options
        self._values = list(example_inputs)
        self._nodes = gm.graph.find_nodes(op="placeholder")
        self._state = [i for i, value in enumerate(self._values) if _belongs_to_a_module(value)]
        self._given = [
            i for i, value in enumerate(self._values) if isinstance(value, Tensor) and i not in self._state
        ]
        self._sizes = [i for i, value in enumerate(self._values) if isinstance(value, (int, torch.SymInt))]

    def program(self) -> Run | None:
        """Return what runs the folded graph; None where there is nothing to fold.

        Raises:
            _NotFolded: It cannot be folded.
        """
        if not self._state or not self._given:
            return None  # no constants, or nothing but constants
        self._refuse()
        try:
            # Dynamo's own context holds a fake mode, which torch.export would take for its own.
            with tracing(None), torch.no_grad():
                result = optimize(
                    self._module(),
                    tuple(self._values[i].detach() for i in self._given),
                    passes=self._options.passes,
                    verify=self._options.verify,
                    dynamic_shapes=self._dynamic_shapes(),
                )
        except _NotFolded:
            raise
        except Exception as error:  # whatever it is, the graph still compiles as it is
            raise _NotFolded(f"{type(error).__name__}: {error}") from error
        for failure in result.report.failures:
            _warn(f"pass {failure.pass_name!r} is left out: {failure.reason}")
        written = [note for note in result.report.captured.notes if "writes into its input" in note]
        if written:
            raise _NotFolded(written[0])
        random = next((node for node in result.graph_module.graph.nodes if is_random(node)), None)
        if random is not None:
            raise _NotFolded(f"{random.name!r} draws random numbers; call model.eval() if it trains")
        if not result.report.changes:
            return None
        codegen = result.graph_module.graph._codegen
        rules = codegen.rules[:3] if self._sizes and isinstance(codegen, CheckedCodeGen) else None
        run = self._options.compiler(_flat(result.module), [self._values[i] for i in self._given])
        return _Program(
            run,
            tuple(self._given),
            self._marks(),
            rules,
            functools.partial(_plain, self._gm, self._options.inner),
        )

    def _refuse(self) -> None:
        if torch.is_grad_enabled() and any(self._values[i].requires_grad for i in self._state + self._given):
            raise _NotFolded(
                "it needs gradients, and folding is for inference; call the model under torch.no_grad() or "
                "torch.inference_mode()"
            )
        if any(self._values[i].is_inference() for i in self._state):
            raise _NotFolded(
                "parameters were made under torch.inference_mode(), where a change of them cannot be seen; "
                "make the model outside of it"
            )
        if any(isinstance(value, (float, torch.SymFloat)) for value in self._values):
            raise _NotFolded("an input is a plain number, which would be fixed at its value")

    def _module(self) -> fx.GraphModule:
        """The graph with parameters as attributes and without sizes as inputs."""
        copy = copy_graph_module(self._gm)
        nodes = copy.graph.find_nodes(op="placeholder")
        for i in self._state:
            value, node = self._values[i], nodes[i]
            name = fresh_attr(copy, node.name)
            set_attr(copy, name, value, parameter=isinstance(value, nn.Parameter), persistent=False)
            with copy.graph.inserting_before(node):
                attribute = copy.graph.get_attr(name)
            node.replace_all_uses_with(attribute)
            copy.graph.erase_node(node)
        for i in self._sizes:
            self._replace_size(copy, nodes, i)
        copy.graph.lint()
        copy.recompile()
        return copy.eval()

    def _replace_size(self, copy: fx.GraphModule, nodes: Sequence[fx.Node], index: int) -> None:
        node, size = nodes[index], self._nodes[index].meta.get("example_value")
        if not node.users:
            copy.graph.erase_node(node)
            return
        for i in self._given:
            shape = self._nodes[i].meta["example_value"].shape
            for axis, found in enumerate(shape):
                if isinstance(size, torch.SymInt) and str(found) == str(size):
                    # Behind the inputs: a size may be listed before the tensor that has it.
                    with copy.graph.inserting_after(copy.graph.find_nodes(op="placeholder")[-1]):
                        read = copy.graph.call_method("size", (nodes[i], axis))
                    node.replace_all_uses_with(read)
                    copy.graph.erase_node(node)
                    return
        raise _NotFolded(f"the input {node.name!r} is a plain number, which would be fixed at its value")

    def _dynamic_shapes(self) -> tuple[dict[int, Any] | None, ...]:
        """Which axes are free: those that are so in Dynamo's graph."""
        shapes = [self._nodes[i].meta["example_value"].shape for i in self._given]
        return tuple(
            {axis: torch.export.Dim.AUTO for axis, size in enumerate(shape) if not isinstance(size, int)}
            or None
            for shape in shapes
        )

    def _marks(self) -> tuple[_Mark, ...]:
        return tuple(_Mark.of(i, self._values[i]) for i in self._state)


class _Mark(NamedTuple):
    """A tensor of the module as it was folded."""

    place: int
    tensor: weakref.ref[Tensor]
    version: int
    address: int

    @classmethod
    def of(cls, place: int, tensor: Tensor) -> _Mark:
        return cls(place, weakref.ref(tensor), tensor._version, tensor.data_ptr())

    def is_of(self, tensor: Tensor) -> bool:
        """Whether it is the same tensor with the same values, as far as its counter tells."""
        return (
            self.tensor() is tensor and tensor._version == self.version and tensor.data_ptr() == self.address
        )


def _plain(gm: fx.GraphModule, inner: str | Callable[..., Any]) -> Run:
    """Dynamo's graph unfolded, compiled at its first call, which may be long after Dynamo's."""
    return gm.forward if inner == "eager" else torch.compile(gm, backend=inner)


def _belongs_to_a_module(value: Any) -> bool:
    return isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and hasattr(value, _STATIC))


def _flat(module: nn.Module) -> fx.GraphModule:
    """The result as inner backends take a graph: flat inputs, a tuple of outputs, no gradients."""
    flat = copy_graph_module(cast(fx.GraphModule, module))
    flat.graph.set_codegen(fx.graph.CodeGen())
    output = flat.graph.output_node()
    (found,) = output.args
    output.args = (tuple(found) if isinstance(found, (tuple, list)) else (found,),)
    flat.recompile()
    for parameter in flat.parameters():
        parameter.requires_grad_(False)
    return flat


class _Program:
    """The folded graph, and the graph as it was for when it no longer holds.

    Args:
        run: Runs the folded graph.
        given: The places of its inputs among those of Dynamo's graph.
        marks: The tensors that were folded.
        rules: What its inputs are held against, where sizes are free.
        plain: Makes what runs the graph as it was; called once.
    """

    def __init__(
        self,
        run: Run,
        given: tuple[int, ...],
        marks: tuple[_Mark, ...],
        rules: tuple[Any, ...] | None,
        plain: Callable[[], Run],
    ) -> None:
        self._run: Run | None = run
        self._given, self._marks, self._rules = given, marks, rules
        self._make_plain = functools.cache(plain)

    def __call__(self, *args: Any) -> Any:
        if self._run is not None and not all(mark.is_of(args[mark.place]) for mark in self._marks):
            self._run = None  # what was folded is of no use any more
            _warn(
                "parameters have changed since they were folded, so the graph runs unfolded from here on; "
                "call torch.compiler.reset() to have them folded anew"
            )
        if self._run is not None:
            given = [args[i] for i in self._given]
            if self._rules is None or _holds(given, self._rules):
                return self._run(*given)
        return self._make_plain()(*args)


def _holds(values: Sequence[Tensor], rules: tuple[Any, ...]) -> bool:
    try:
        check_inputs(values, *rules)
    except ValueError:
        return False
    return True


# The entry point tells torch.compile of it too; installed and imported, it must not be there twice.
if _NAME not in torch._dynamo.list_backends(exclude_tags=()):
    torch._dynamo.register_backend(graphsurgery, name=_NAME)
