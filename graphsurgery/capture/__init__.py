"""Turn a trained network into the functional ATen graph that passes work on.

`nn.Module`, traced `fx.GraphModule` or `ExportedProgram` -> `fx.GraphModule`, see `capture`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphsurgery.capture.checked import Rules, install
from graphsurgery.capture.dialect import canonicalize, refuse_foreign
from graphsurgery.capture.dynamic import given_sizes
from graphsurgery.capture.functional import NotSubstitutable, functionalize
from graphsurgery.capture.inputs import Inputs, difference, normalize, refuse_nan
from graphsurgery.capture.program import (
    export_again,
    export_model,
    export_static,
    free_carriers,
    free_sizes,
    quiet,
    run_model,
)
from graphsurgery.capture.rules import InputSizes
from graphsurgery.capture.state import check_supported, evaluated, unwrap
from graphsurgery.capture.unlift import describe_write, input_names, output_names, unlift
from graphsurgery.errors import CaptureError
from graphsurgery.graph import INFO_KEY, CaptureInfo, delete_unused_attrs

__all__ = ["capture"]


_FIXED = (
    "torch fixes the size where it writes a call anew that changes a part of a value in place; write it "
    "as one that returns a new value (torch.cat, torch.where)"
)


def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    copy: bool = True,
) -> fx.GraphModule:
    """Capture `model`, in evaluation mode, as a functional ATen graph.

    The graph is run on the example and compared with the model before it is returned. The batch (the leading
    dimension of the inputs) is free where the model allows it; where not, a note says why.

    Args:
        model: An `nn.Module` (a traced `fx.GraphModule` too) or an `ExportedProgram`. It is not changed.
        example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs. An
            `ExportedProgram` may bring its own.
        dynamic_shapes: As for `torch.export.export`, for full control of which sizes are free.
        copy: Whether the graph holds copies of the model's tensors. Without, it shares their memory: it takes
            none of its own, and what is written into the one is written into the other.

    Returns:
        A graph module with the model's signature, whose `meta["graphsurgery"]` is a `CaptureInfo`. It, and
        what is made of it, raises a `ValueError` on inputs of other sizes than those it was captured for.

    Raises:
        CaptureError: The inputs do not fit the model, or the model cannot be captured; the message quotes the
            user's source line and says what to do.
    """
    if not isinstance(copy, bool):
        raise CaptureError(f"copy is True or False, got {copy!r}.")
    with torch.inference_mode(False):
        if isinstance(model, ExportedProgram):
            return _capture_program(model, example_inputs, dynamic_shapes, copy)
        return _capture_module(model, example_inputs, dynamic_shapes, copy)


def _capture_module(model: nn.Module, example_inputs: Any, dynamic_shapes: Any, copy: bool) -> fx.GraphModule:
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"cannot capture a {type(model).__name__}, expected an nn.Module, an fx.GraphModule or an "
            "ExportedProgram."
        )
    if example_inputs is None:
        raise CaptureError(
            "no example inputs: pass a tensor, a tuple or a mapping of inputs that the model accepts."
        )
    model = unwrap(model)
    check_supported(model)
    inputs = normalize(example_inputs)
    refuse_nan(inputs)
    notes: tuple[str, ...] = ()
    if any(module.training for module in model.modules()):
        notes = ("the model was in training mode; captured as in evaluation mode",)
    with evaluated(model):
        expected = run_model(model, inputs)
    with evaluated(model):  # as found: a run may have left something behind that export would bake in
        exported = export_model(model, inputs, dynamic_shapes)
    name, free = type(model).__name__, free_sizes(exported.program)
    gm, more = _to_dialect(exported.program, name, copy)
    found = _differs(gm, inputs, expected)
    fixed = free - free_sizes(exported.program)
    if fixed and dynamic_shapes is not None:
        axes = ", ".join(f"axis {axis} of {given!r}" for given, axis in sorted(fixed))
        raise CaptureError(f"{name} cannot be captured with these dynamic_shapes: {_FIXED} ({axes}).")
    if (found is not None or fixed) and exported.dynamic and dynamic_shapes is None:
        # Of a difference: the example is a batch of one, the export was of two.
        reason = f"with a free batch {found}" if found is not None else _FIXED
        with evaluated(model):
            exported = export_static(model, inputs, reason)
        gm, more = _to_dialect(exported.program, name, copy)
        found = _differs(gm, inputs, expected)
    _require_same(name, inputs, found)
    names = input_names(gm)
    given = given_sizes(model, inputs, dynamic_shapes)
    sizes = InputSizes(exported.program, gm, names, inputs, batched=exported.dynamic, given=given)
    agreement = _Agreement(gm, model, sizes)
    with evaluated(model):
        rules, unchecked = sizes.rules(agreement)
    notes += exported.notes + more + agreement.notes(rules)
    return _record(gm, name, inputs, sizes, rules, dynamic=exported.dynamic, notes=notes, unchecked=unchecked)


def _capture_program(
    program: ExportedProgram, example_inputs: Any, dynamic_shapes: Any, copy: bool
) -> fx.GraphModule:
    if dynamic_shapes is not None:
        raise CaptureError(
            "dynamic_shapes cannot change an ExportedProgram; pass them to torch.export.export."
        )
    if example_inputs is None:
        if program.example_inputs is None:
            raise CaptureError("the ExportedProgram brings no example inputs; pass some.")
        args, kwargs = program.example_inputs
        inputs = Inputs(tuple(args), dict(kwargs))
    else:
        inputs = normalize(example_inputs)
    refuse_nan(inputs)
    stack: dict[str, Any] = next(
        (n.meta["nn_module_stack"] for n in program.graph.nodes if n.meta.get("nn_module_stack")), {}
    )
    kind = next(iter(stack.values()), ("", ""))[1]
    name = (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2] or "ExportedProgram"
    with quiet():
        reference = program.module(check_guards=False)
    free = free_sizes(program)
    try:
        gm, notes = _to_dialect(program, name, copy, decompose=False)
    except NotSubstitutable:
        program = export_again(program, inputs)
        gm, notes = _to_dialect(program, name, copy)
    if free - free_sizes(program):
        notes = (*notes, f"captured with fixed sizes: {_FIXED}")
    expected = run_model(reference, inputs)
    _require_same(name, inputs, _differs(gm, inputs, expected))
    dynamic = bool(free_carriers(program, inputs.carriers()[:1]))
    sizes = InputSizes(program, gm, input_names(gm), inputs, batched=dynamic, given={})
    rules, unchecked = sizes.rules(None)
    return _record(gm, name, inputs, sizes, rules, dynamic=dynamic, notes=notes, unchecked=unchecked)


def _to_dialect(
    program: ExportedProgram, name: str, copy: bool, *, decompose: bool = True
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Return the graph in the dialect, and notes.

    Raises:
        NotSubstitutable: Writes into parts of values are left, and torch may not `decompose` the program,
            which can fix sizes of it that are free.
    """
    gm, written = unlift(program, name, copy=copy)
    refuse_foreign(gm)
    try:
        inputs = functionalize(gm)
    except NotSubstitutable:
        if not decompose:
            raise
        with quiet(), torch.no_grad():
            gm, written = unlift(program.run_decompositions({}), name, copy=copy)
        refuse_foreign(gm)
        inputs = ()
    state = {**dict(gm.named_buffers()), **dict(gm.named_parameters())}
    for target in written:
        if target in state:
            raise CaptureError(
                f"the model writes {target!r} in forward{describe_write(gm, target)}, so its "
                "output depends on earlier calls; keep such state out of it, or update it in training only."
            )
    canonicalize(gm)
    delete_unused_attrs(gm)
    gm.graph.lint()
    gm.recompile()
    gm.training = False
    names = tuple(dict.fromkeys((*inputs, *written)))
    return gm, tuple(
        f"the model writes into its input {target!r}; the captured graph does not" for target in names
    )


def _differs(gm: fx.GraphModule, inputs: Inputs, expected: Any) -> str | None:
    """Return how the graph's outputs differ from the expected ones, or None."""
    try:
        return difference(expected, run_model(gm, inputs))
    except CaptureError as error:
        return f"it does not run: {type(error.__cause__).__name__}: {str(error.__cause__)[:200]}"


def _require_same(name: str, inputs: Inputs, found: str | None) -> None:
    if found is not None:
        raise CaptureError(
            f"the captured graph of {name} does not reproduce the model on the example inputs "
            f"({inputs.describe()}): {found}; look for state or randomness in forward, or let "
            "gs.optimize_parts work on its submodules."
        )


class _Agreement:
    """Whether model and graph agree on inputs of other sizes than the example's."""

    def __init__(self, gm: fx.GraphModule, model: nn.Module, sizes: InputSizes) -> None:
        self._gm, self._model, self._sizes = gm, model, sizes
        self._example = {symbol: sizes.example_size(symbol) for symbol in sizes.free}
        self._noted: dict[str, str] = {}

    def notes(self, rules: Rules) -> tuple[str, ...]:
        """Where they do not though the model runs, of sizes that are 1 and refused by the rules for it."""
        least = {name: low or 0 for name, low, _ in rules.sizes}
        return tuple(text for name, text in self._noted.items() if least.get(name, 0) > 1)

    def __call__(self, sizes: Mapping[Any, int], inputs: Inputs) -> bool:
        try:
            with quiet():
                expected = run_model(self._model, inputs)
        except CaptureError:
            return False  # the model does not take these sizes, so there is nothing that the graph can hold
        with quiet():
            found = _differs(self._gm, inputs, expected)
        changed = [symbol for symbol, size in sizes.items() if size != self._example[symbol]]
        if found is not None and len(changed) == 1 and sizes[changed[0]] == 1:
            name = self._sizes.free[changed[0]]
            what = "batches" if name == "batch" else f"sizes {name!r}"
            text = f"the captured graph holds for {what} of 2 or more, not of 1: {found}"
            self._noted.setdefault(name, text)
        return found is None


def _record(
    gm: fx.GraphModule,
    name: str,
    inputs: Inputs,
    sizes: InputSizes,
    rules: Rules,
    *,
    dynamic: bool,
    notes: tuple[str, ...],
    unchecked: tuple[str, ...],
) -> fx.GraphModule:
    notes += install(gm, rules) + unchecked
    gm.meta[INFO_KEY] = CaptureInfo(
        input_names=input_names(gm),
        output_names=output_names(gm),
        dynamic_batch=dynamic,
        notes=notes,
        model_name=name,
        args=inputs.args,
        kwargs=inputs.kwargs,
        refused_batches=sizes.refused_batches(rules, inputs),
        batch_axes=sizes.batch_axes(),
        size_names=sizes.names(),
    )
    return gm
