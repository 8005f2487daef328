"""What must hold of every network: the same function, never dearer, nothing touched, nothing left to do.

The comparison here shares no code with `graphsurgery.verify`: both networks run in float64, and what a
difference may be follows from what rounding does to the original, whose parameters are moved by one rounding
of its dtype.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphsurgery as gs
from fuzz.program import DTYPES, Network, Program, examples
from graphsurgery import passes as gs_passes

EXTRA = ("merge-siblings", "linear-to-conv1x1", "conv1x1-to-linear", "fully-convolutional")
_DRAWS = 3
_ROUNDINGS = 100.0  # a fold rounds other sums than the original does, one for each layer that it takes in
_EXACT = 1e-10  # of an output's scale; right folds in float64 have 1e-15


class Failed(Exception):
    """Something that must hold does not; `code` says what."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


@dataclass(frozen=True)
class Plan:
    """How a case is run.

    Attributes:
        passes: names of passes in place of the default ones; None for these.
        verify: as for `graphsurgery.optimize`.
        static: whether the batch is fixed.
        onnx: whether the result is exported and run on onnxruntime.
        deep: whether the result is put through the whole library a second time.
    """

    passes: tuple[str, ...] | None = None
    verify: str = "final"
    static: bool = False
    onnx: bool = False
    deep: bool = False


@dataclass
class Outcome:
    """What was seen of a case that holds.

    Attributes:
        captured: whether it could be captured.
        reason: why it could not, or why nothing can be said of it.
        changes: kinds of the rewrites, by pass.
        worst: largest deviation in float64, in parts of what is allowed.
    """

    captured: bool = True
    reason: str = ""
    changes: list[tuple[str, str]] = field(default_factory=list)
    worst: float = 0.0
    onnx: bool = False


def plan_of(seed: int, onnx_every: int = 30, verify_every: int = 2) -> Plan:
    """Default passes for three of four seeds, a pass that runs by name for the others.

    The swaps run alone: fold-affine takes a 1x1 convolution for the better form of a Linear between permutes.
    """
    default = tuple(item.name for item in gs_passes.default_passes())
    named = EXTRA[seed // 4 % len(EXTRA)]
    extra = ((*default, named) if named == "merge-siblings" else (named,)) if seed % 4 == 3 else None
    return Plan(
        passes=extra,
        verify="off" if seed % verify_every else "final",
        static=seed % 7 == 5,
        onnx=seed % onnx_every == 8 % onnx_every,
        deep=seed % 5 == 1,
    )


def check(program: Program, plan: Plan) -> Outcome:
    """Put one network through the library.

    Raises:
        Failed: something does not hold.
    """
    model, example = Network(program).build()
    before = _state(model)
    model.train(False)
    flags = {name: module.training for name, module in model.named_modules()}
    arguments: dict[str, Any] = {"verify": plan.verify}
    if plan.passes is not None:
        arguments["passes"] = plan.passes
    if plan.static:
        arguments["dynamic_shapes"] = (
            dict.fromkeys(example) if isinstance(example, dict) else tuple(None for _ in example)
        )
    try:
        result = gs.optimize(model, _copied(example), **arguments)
    except gs.CaptureError as error:
        _sentence(error)
        return Outcome(False, str(error))
    except gs.VerificationError as error:
        if "inconclusive" not in str(error):
            raise Failed("verification", str(error)) from error
        return Outcome(reason=str(error))  # an output of nothing but rounding, as the argmax of equal numbers
    except Exception as error:
        raise Failed("raised", f"{type(error).__name__}: {error}") from error
    outcome = Outcome(changes=[(c.pass_name, c.kind) for c in result.report.changes])
    _untouched(model, before, flags)
    _report(result.report)
    outcome.worst = _same_function(program, model, example, result)
    _settled(program, plan, result, arguments, example)
    if plan.onnx:
        outcome.onnx = _on_onnxruntime(program, model, example, result)
    return outcome


def _sentence(error: Exception) -> None:
    text = str(error).strip()
    if len(text) < 15 or " " not in text:
        raise Failed("message", f"{type(error).__name__} says {text!r}")


# -- what the caller keeps ----------------------------------------------------------------------------------


def _state(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {
        name: (value.data_ptr(), value.detach().clone())
        for name, value in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    }


def _untouched(model: nn.Module, before: dict[str, tuple[int, Tensor]], flags: dict[str, bool]) -> None:
    after = _state(model)
    if list(after) != list(before):
        raise Failed("state", f"the caller's model has tensors {list(after)}, before {list(before)}")
    for name, (place, value) in before.items():
        if after[name][0] != place or not torch.equal(_bits(after[name][1]), _bits(value)):
            raise Failed("state", f"{name!r} of the caller's model has changed")
    now = {name: module.training for name, module in model.named_modules()}
    if now != flags:
        raise Failed("training", f"training flags are {now}, were {flags}")


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def _copied(example: Any) -> Any:
    return pytree.tree_map(lambda v: v.clone(), example)


# -- what the report says -----------------------------------------------------------------------------------


def _report(report: Any) -> None:
    if report.after.macs > report.before.macs:
        raise Failed("cost", f"{report.after.macs} multiplications, before {report.before.macs}")
    if report.failures:
        raise Failed(
            "rolled-back", "; ".join(f"{f.pass_name}, {f.code}: {f.reason}" for f in report.failures)
        )
    for refusal in report.refusals:
        if refusal.code in ("certificate", "internal"):
            raise Failed(refusal.code, f"{refusal.pass_name}: {refusal.reason}")
    for change in report.changes:
        if change.residual is not None and not change.residual <= 1e-11:
            raise Failed("certificate", f"{change.pass_name} wrote {change.kind} with {change.residual}")


def _settled(program: Program, plan: Plan, result: Any, arguments: dict[str, Any], example: Any) -> None:
    """A second run of the same passes finds nothing."""
    chosen = gs_passes.select(plan.passes)
    again = gs.PassManager(chosen)(result.graph_module)
    if again.changes:
        kinds = [f"{c.pass_name}: {c.kind}" for c in again.changes]
        raise Failed("second-run", f"after {[c.kind for c in result.report.changes]} it finds {kinds}")
    if plan.deep:
        try:
            once_more = gs.optimize(result.module, _copied(example), **{**arguments, "verify": "off"})
        except Exception as error:
            raise Failed("deep-raised", f"{type(error).__name__}: {error}") from error
        if once_more.report.changes:
            kinds = [f"{c.pass_name}: {c.kind}" for c in once_more.report.changes]
            raise Failed("second-capture", f"captured again, the result changes: {kinds}")


# -- the function -------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """What the original gives in float64, and what rounding of its own dtype does to that."""

    outputs: list[Any]
    allowed: list[Tensor | None]
    structure: Any

    def worst(self, got: Any, slack: Callable[[Tensor], float] = lambda _: 0.0) -> float:
        """Largest deviation in parts of what is allowed.

        Raises:
            Failed: it is more, or shapes or kinds differ.
        """
        leaves, structure = pytree.tree_flatten(got)
        if structure != self.structure:
            raise Failed("structure", f"got {structure}, expected {self.structure}")
        worst = 0.0
        for i, (wanted, allowed, value) in enumerate(zip(self.outputs, self.allowed, leaves, strict=True)):
            if not isinstance(wanted, Tensor):
                if value is not wanted:
                    raise Failed("value", f"output {i} is {value!r}, expected {wanted!r}")
                continue
            if value.shape != wanted.shape:
                raise Failed("shape", f"output {i} has shape {list(value.shape)}, not {list(wanted.shape)}")
            if allowed is None or not value.numel():
                continue
            error = (value.double() - wanted).abs()
            limit = allowed + slack(wanted)
            share = float((error / limit).max())
            if not share <= 1:
                at = int((error / limit).argmax())
                raise Failed(
                    "value",
                    f"output {i} is off by {float(error.flatten()[at]):.3e} where "
                    f"{float(limit.expand_as(error).flatten()[at]):.3e} is allowed; its scale is "
                    f"{float(wanted.abs().max()):.3e}",
                )
            worst = max(worst, share)
        return worst


def doubled(model: nn.Module) -> nn.Module:
    """A copy in float64."""
    return copy.deepcopy(model).double()


def call(model: Callable[..., Any], inputs: Any, dtype: torch.dtype | None = None) -> Any:
    def fit(value: Any) -> Any:
        return value.to(dtype or value.dtype) if value.is_floating_point() else value.clone()

    inputs = pytree.tree_map(fit, inputs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def reference(model: nn.Module, inputs: Any, eps: float) -> Reference:
    """Run the original, and again with every parameter and input moved by up to `eps` of itself."""
    outputs, structure = pytree.tree_flatten(call(doubled(model), inputs, torch.float64))
    noise = [torch.zeros_like(v) if _counts(v) else None for v in outputs]
    for draw in range(_DRAWS):
        generator = torch.Generator().manual_seed(draw)

        def moved(value: Tensor, generator: torch.Generator = generator) -> Tensor:
            factor = torch.rand(value.shape, generator=generator, dtype=torch.float64) * 2 - 1
            return value.double() * (1 + eps * factor)

        other = doubled(model)
        with torch.no_grad():
            for tensor in [*other.parameters(), *other.buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(moved(tensor))
        jittered = pytree.tree_map(lambda v: moved(v) if v.is_floating_point() else v, inputs)
        for kept, value, wanted in zip(
            noise, pytree.tree_leaves(call(other, jittered, torch.float64)), outputs, strict=True
        ):
            if kept is not None:
                torch.maximum(kept, (value - wanted).abs(), out=kept)
    allowed: list[Tensor | None] = []
    for kept, value in zip(noise, outputs, strict=True):
        if kept is None:
            allowed.append(None)
            continue
        unit = value.abs().max().clamp(min=1e-300)
        allowed.append(_ROUNDINGS * kept.max() + unit * _EXACT)
    return Reference(outputs, allowed, structure)


def _counts(value: Any) -> bool:
    """Integers follow a comparison that rounding may decide."""
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.isfinite().all())


def _batches(program: Program, result: Any) -> list[int]:
    info = result.graph_module.meta["graphsurgery"]
    if not info.dynamic_batch:
        return []
    refused = set(info.refused_batches)
    return [n for n in (program.batch + 3, 1) if n not in refused]


def _same_function(program: Program, model: nn.Module, example: Any, result: Any) -> float:
    eps = torch.finfo(DTYPES[program.dtype]).eps
    inputs = [example, *(examples(program, n, 7 + n) for n in _batches(program, result))]
    worst = 0.0
    double = doubled(result.module)
    for given in inputs:
        if _raises(model, given):
            continue
        expected = reference(model, given, eps)
        native = _squeezed(call(result.module, given), result)
        for wanted, got in zip(
            pytree.tree_leaves(call(model, given)), pytree.tree_leaves(native), strict=True
        ):
            if isinstance(wanted, Tensor) and (wanted.dtype != got.dtype or wanted.shape != got.shape):
                raise Failed(
                    "dtype", f"got {got.dtype} {list(got.shape)}, not {wanted.dtype} {list(wanted.shape)}"
                )
        worst = max(worst, expected.worst(_squeezed(call(double, given, torch.float64), result)))
    return worst


def _squeezed(outputs: Any, result: Any) -> Any:
    """Outputs without the axes of size one that `fully-convolutional` says it has added."""
    leaves, structure = pytree.tree_flatten(outputs)
    added = result.graph_module.meta["graphsurgery"].trailing_axes or (0,) * len(leaves)
    found = [
        leaf.reshape(leaf.shape[:-count]) if count and leaf.shape[-count:].numel() == 1 else leaf
        for leaf, count in zip(leaves, added, strict=True)
    ]
    return pytree.tree_unflatten(found, structure)


def _raises(model: nn.Module, given: Any) -> bool:
    """Whether the original itself does not take these sizes."""
    try:
        call(model, given)
    except Exception:  # noqa: BLE001 - a model may raise anything
        return True
    return False


def _on_onnxruntime(program: Program, model: nn.Module, example: Any, result: Any) -> bool:
    if program.dtype not in ("float32", "float64"):
        return False
    sizes = [n for n in _batches(program, result) if n != 1]
    given = examples(program, sizes[0], 99) if sizes else example
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        try:
            # ONNX holds attributes, as the eps of a norm, in float32: a float64 file is off by that
            result.export_onnx(path, verify=program.dtype == "float32")
        except gs.GraphSurgeryError as error:
            _sentence(error)
            if isinstance(error, gs.VerificationError) and "NOT_IMPLEMENTED" not in str(error):
                raise Failed("onnx-verdict", str(error)) from error
            return False  # no kernel for it, or no translation
        except Exception as error:
            raise Failed("export", f"{type(error).__name__}: {error}") from error
        try:
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # of a class of its own for each code
            if "NOT_IMPLEMENTED" in str(error):
                return False  # it has few kernels for float64
            raise Failed("onnx-load", str(error)) from error
        leaves = pytree.tree_leaves(given)
        feeds = {spec.name: v.numpy() for spec, v in zip(_inputs(session, given), leaves, strict=False)}
        got = _squeezed([torch.from_numpy(v) for v in session.run(None, feeds)], result)
    expected = reference(model, given, torch.finfo(DTYPES[program.dtype]).eps)
    kept = [i for i, v in enumerate(expected.outputs) if isinstance(v, Tensor)]
    flat = Reference([expected.outputs[i] for i in kept], [expected.allowed[i] for i in kept], None)
    flat.structure = pytree.tree_structure(got)
    # Where large numbers cancel within, rounding does what no moved parameter shows: the original is off too.
    native = [v.double() for v in pytree.tree_leaves(call(model, given)) if isinstance(v, Tensor)]
    flat.allowed = [
        None if allowed is None else allowed + 10 * (value - wanted).abs().max()
        for allowed, value, wanted in zip(flat.allowed, native, flat.outputs, strict=True)
    ]
    unit = torch.finfo(torch.float32).eps
    try:
        flat.worst(got, lambda value: 1e3 * unit * float(value.abs().max()))
    except Failed as error:
        raise Failed("onnx-" + error.code, str(error)) from error
    return True


def _inputs(session: Any, given: Any) -> list[Any]:
    """The inputs of a session in the order of the arguments; one that nothing reads may be missing."""
    found = session.get_inputs()
    if isinstance(given, dict):
        by_name = {spec.name: spec for spec in found}
        return [by_name[name] for name in given if name in by_name]
    return list(found)
