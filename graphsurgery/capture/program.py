"""Run the model and export it, with one clear error where that fails."""

from __future__ import annotations

import contextlib
import inspect
import io
import linecache
import logging
import math
import os
import re
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo

from graphsurgery.capture.constants import known_constants
from graphsurgery.capture.dynamic import check_dynamic_shapes, explain, of_one
from graphsurgery.capture.frames import helper_frames
from graphsurgery.capture.inputs import Inputs
from graphsurgery.errors import CaptureError

__all__ = [
    "Exported",
    "depends_on_values",
    "export_again",
    "export_model",
    "export_static",
    "free_carriers",
    "free_sizes",
    "quiet",
    "run_model",
]

_TRIED_BATCHES = (2, 3, 4, 5, 7, 8, 16)
_STDLIB = os.path.dirname(os.__file__) + os.sep
_SKIPPED = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)


class Exported:
    """An exported program and how it was got."""

    def __init__(self, program: ExportedProgram, *, dynamic: bool, notes: tuple[str, ...]) -> None:
        self.program = program
        self.dynamic = dynamic
        self.notes = notes


def run_model(model: nn.Module, inputs: Inputs) -> Any:
    """Run `model` on a copy of the inputs, without gradients and without touching the caller's random state.

    Raises:
        CaptureError: The model raised; the message quotes its complaint and the user's line.
    """
    fresh = inputs.fresh()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model(*fresh.args, **fresh.kwargs)
    except Exception as error:  # the user's model can raise anything
        raise CaptureError(
            f"{type(model).__name__} fails on the example inputs ({inputs.describe()}): {_complaint(error)}"
            f"{_at(error)}; pass inputs that the model accepts."
        ) from error


def _complaint(error: BaseException) -> str:
    text = " ".join(line.strip() for line in str(error).strip().splitlines()[:2]) or "no message"
    return f"{type(error).__name__}: {text[:300].rstrip('.')}"


def _is_users(file: str) -> bool:
    if file.startswith((*_SKIPPED, "<")):
        return False
    return not file.startswith(_STDLIB) or "site-packages" in file


def _at(error: BaseException) -> str:
    """Return ` (at file.py:12, in forward: code)` for the last frame of the user's in the traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    if not frames:
        return ""
    frame = frames[-1]
    code = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
    return f" (at {os.path.basename(frame.filename)}:{frame.lineno}, in {frame.name}: {code})"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch.export prints, logs and warns about; errors are reported by exceptions."""
    handlers = logging.getLogger("torch").handlers

    def drop(record: logging.LogRecord) -> bool:
        return False

    for handler in handlers:
        handler.addFilter(drop)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(drop)


def _export(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> ExportedProgram:
    with quiet(), helper_frames(), known_constants(), torch.no_grad():
        return torch.export.export(
            model, inputs.args, inputs.kwargs, dynamic_shapes=dynamic_shapes, strict=False
        )


def depends_on_values(error: BaseException | None) -> bool:
    """Return whether a branch on values is why `torch.export` failed, which other sizes do not mend."""
    return "DataDependent" in type(error).__name__ or "data-dependent" in str(error)


_CACHE = re.compile(r"(\w*Cache)'> in output")


def _refuse(model: nn.Module, error: BaseException) -> CaptureError:
    found = explain(error)
    if found is not None:
        return CaptureError(f"{type(model).__name__} cannot be captured with these dynamic_shapes: {found}.")
    if depends_on_values(error):
        why = "its control flow depends on the values of a tensor"
        advice = "write the choice as torch.where, or let gs.optimize_parts work on the submodules around it"
    elif cache := _CACHE.search(str(error)):  # transformers gives one with the result by default
        why = f"it returns a {cache[1]} beside its outputs, which a graph cannot hold"
        advice = (
            "set model.config.use_cache = False (or pass use_cache=False, here and to the result); to keep "
            "generating with the cache, let gs.optimize_parts work on the submodules"
        )
    else:
        why = f"torch.export cannot trace it ({_complaint(error)})"
        advice = (
            "rewrite that line with traceable operations, or let gs.optimize_parts work on the submodules "
            "around it"
        )
    return CaptureError(f"{type(model).__name__} cannot be captured{_at(error)}: {why}; {advice}.")


def free_carriers(program: ExportedProgram, carriers: list[int]) -> list[int]:
    """Return the carriers whose leading size stayed symbolic."""
    names = [
        spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT
    ]
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    tensors = [values[name] for name in names if isinstance(values.get(name), torch.Tensor)]
    return [i for i in carriers if i < len(tensors) and _is_free(tensors[i].shape[0])]


def free_sizes(program: ExportedProgram) -> set[tuple[str, int]]:
    """Return the name and axis of each symbolic size of an input."""
    shapes = {
        node.name: getattr(node.meta.get("val"), "shape", ())
        for node in program.graph.find_nodes(op="placeholder")
    }
    return {
        (name, axis) for name, shape in shapes.items() for axis, size in enumerate(shape) if _is_free(size)
    }


def export_again(program: ExportedProgram, inputs: Inputs) -> ExportedProgram:
    """Export a program anew, with the same sizes free, so that what torch decides of sizes stays out of it.

    Sizes and their bounds live in an environment that a program shares with all that is derived from it.

    Raises:
        CaptureError: torch.export cannot trace the program.
    """
    names = [
        spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT
    ]
    values = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    own = inputs.fresh()  # a tensor that is passed twice has an entry for each place
    order = program.call_spec.in_spec.child(1).context
    if set(order) == set(own.kwargs):  # torch matches the keywords of a program's module by their order
        own = Inputs(own.args, {key: own.kwargs[key] for key in order})
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]  # torch types no __init__
    leaves = pytree.tree_leaves((own.args, own.kwargs))
    for name, given in zip(names, leaves, strict=False):  # a call of another form is refused by the export
        if isinstance(given, torch.Tensor):
            sizes = enumerate(getattr(values[name], "shape", ()))
            shapes[given] = {axis: _auto(program, size) for axis, size in sizes if _is_free(size)}
    with quiet():
        module = program.module(check_guards=False)
    return _export_or_refuse(module, own, shapes)


def _auto(program: ExportedProgram, size: torch.SymInt) -> Any:
    known = program.range_constraints.get(size.node.expr)
    if known is None:
        return Dim.AUTO
    low, high = (None if bound in (int_oo, -int_oo) else int(bound) for bound in (known.lower, known.upper))
    return Dim.AUTO(min=low, max=high)


def _is_free(size: int | torch.SymInt) -> bool:
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def _try_dynamic(model: nn.Module, inputs: Inputs, carriers: list[int]) -> ExportedProgram:
    # A size of 1 would be taken for a constant, so a single sample is repeated.
    wide = inputs.with_batch(2, carriers) if inputs.batch() == 1 else inputs
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]  # torch types no __init__
    tensors = wide.tensors()
    for index in carriers:
        shapes[tensors[index]] = {0: Dim.AUTO}
    return _export(model, wide, shapes)


def export_model(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> Exported:
    """Export `model`, with a free batch where it allows that.

    Raises:
        CaptureError: torch.export cannot trace the model.
    """
    if dynamic_shapes is not None:
        check_dynamic_shapes(model, inputs, dynamic_shapes)
        try:
            program = _export_or_refuse(model, inputs, dynamic_shapes)
        except CaptureError as error:
            one = of_one(model, inputs, dynamic_shapes)
            if one is None:
                raise
            raise CaptureError(f"{type(model).__name__} cannot be captured: {one}.") from error
        return Exported(program, dynamic=bool(free_carriers(program, inputs.carriers()[:1])), notes=())
    carriers = inputs.carriers()
    reason = "no input has a batch dimension"
    while carriers:
        try:
            program = _try_dynamic(model, inputs, carriers)
        except Exception as error:  # noqa: BLE001 - whatever it is, a static capture may still work
            reason = f"with a free batch it fails: {_complaint(error)}{_at(error)}"
            break
        free = free_carriers(program, carriers)
        if free == carriers:
            guard = _broken_guard(program, model, inputs, carriers)
            if guard is None:
                return Exported(program, dynamic=True, notes=())
            reason = f"the model does something else where not `{guard}`{_who_fixed_it(program)}"
            break
        reason = "the model fixes it" + _who_fixed_it(program)
        carriers = free  # inputs whose leading size only happened to equal the batch stay fixed
    return export_static(model, inputs, reason)


def export_static(model: nn.Module, inputs: Inputs, reason: str) -> Exported:
    """Export `model` for the sizes of the example alone; the note gives the reason.

    Raises:
        CaptureError: torch.export cannot trace the model.
    """
    program = _export_or_refuse(model, inputs, None)
    size = inputs.batch()
    batch = "" if size is None else f" of {size}"
    return Exported(program, dynamic=False, notes=(f"captured with a static batch{batch}: {reason}",))


def _export_or_refuse(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> ExportedProgram:
    try:
        return _export(model, inputs, dynamic_shapes)
    except Exception as error:  # torch.export lets through whatever the model or it raises
        raise _refuse(model, error) from error


def _broken_guard(
    program: ExportedProgram, model: nn.Module, inputs: Inputs, carriers: list[int]
) -> str | None:
    """Return a condition under which the graph was traced that some other batch does not meet, or None."""
    guards = list(program._guards_code or ())
    if not guards:
        return None
    meta = inputs.map_tensors(lambda tensor: tensor.to("meta"))
    signature = inspect.signature(model.forward)
    for size in _TRIED_BATCHES:
        other = meta.with_batch(size, carriers)
        names = {"L": signature.bind(*other.args, **other.kwargs).arguments, "math": math, "inf": math.inf}
        for guard in guards:
            try:
                holds = bool(
                    eval(guard, {**SYMPY_INTERP, **names})
                )  # torch evaluates this code of its own just so
            except (ArithmeticError, LookupError, NameError, TypeError):
                holds = False  # e.g. a division by batch - 2
            if not holds:
                return guard
    return None


def _who_fixed_it(program: ExportedProgram) -> str:
    """Return ` (at file.py:12, in forward: code)` where the batch was bound to a number, "" if unknown."""
    values = [node.meta.get("val") for node in program.graph.nodes]
    env = next((value.fake_mode.shape_env for value in values if isinstance(value, FakeTensor)), None)
    if env is None:
        return ""
    fixed = [where for symbol, where in env.replacements_slocs.items() if env.replacements[symbol].is_number]
    for location in [*fixed, *(guard.sloc for guard in env.guards)]:
        frame = location.maybe_user_loc or location.framework_loc
        if isinstance(frame, traceback.FrameSummary) and _is_users(frame.filename):
            where = f"{os.path.basename(frame.filename)}:{frame.lineno}, in {frame.name}"
            return f" (at {where}: {frame.line})"
    return ""
