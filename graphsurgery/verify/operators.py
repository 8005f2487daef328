"""What other runtimes round by the way they compute operators, where that is more than moved data show.

torch adds up a map pairwise, so that the rounding of a sum hardly grows with its length; onnxruntime adds
one element after the other in a few lanes of a vector register, and then it grows in proportion: 1e-4 of a
mean over 224 x 224 equal values. ONNX defines `Elu` by `exp(x) - 1`, which for an `x` of 1e-3 has three
digits less than torch's `expm1`, and a sigmoid that is computed as a shifted tanh has no digits left far to
the left. Nothing of that is wrong in a file, and no nudge of the weights shows it. So a reference in torch is
run again in its own dtype with these operators computed so: another correct program, whose rounding is noise
too.

Sources: https://onnx.ai/onnx/operators for the formulas; N. Higham, "Accuracy and Stability of Numerical
Algorithms", 2nd ed., section 4.2, for sums: an error of up to (n - 1) u one by one, log2(n) u pairwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode

from graphsurgery.verify.runners import Runner, TorchRunner

if TYPE_CHECKING:
    from graphsurgery.verify.baseline import Baseline

__all__ = ["OPERATORS_NOTE", "AsOtherRuntimes", "add_rounding_of_operators", "as_before"]

OPERATORS_NOTE = (
    "by the noise of moved data alone the candidate differed, so the rounding of its operators was measured "
    "too: sums one by one, functions as ONNX defines them"
)
"""What a verdict says where that was needed."""

_RUNS = ((1, 1.0), (4, -1.0), (8, 1.0), (16, -1.0))
"""Partial sums that are kept side by side (of plain code and of registers of 128, 256 and 512 bits), and by
how many units in the last place the tanh of a sigmoid is off, which runtimes approximate by a quotient."""

aten = torch.ops.aten


class AsOtherRuntimes(TorchDispatchMode):  # type: ignore[no-untyped-call] # its __init__ has no types
    """Computes sums one by one, and functions as ONNX writes them, in the dtype of the program.

    float16 and bfloat16 are added up in float32, as runtimes do.

    Args:
        lanes: Number of partial sums that are kept side by side.
        units: Units in the last place by which the tanh of a sigmoid and the erf of a GELU are off.

    Attributes:
        used: Whether an operator was met that is computed otherwise.
    """

    supports_higher_order_operators = True  # what a torch.cond holds is computed as ever

    def __init__(self, lanes: int, units: float = 0.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's has no types
        self.lanes = lanes
        self.units = units
        self.used = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not (args and _plain(args[0])):
            return func(*args, **kwargs)
        if func in _MADE_OF_SUMS:
            with self:
                return decomposition_table[func](*args, **kwargs)
        if func in _SUMS:
            self.used = True
            return _SUMS[func](self.lanes, *args, **kwargs)
        if func in _FUNCTIONS:
            self.used = True
            low = args[0]
            wide = low.float() if low.dtype.itemsize < 4 else low
            return _FUNCTIONS[func](self.units, wide, *args[1:], **kwargs).to(low.dtype)
        if func in _IN_PLACE:
            with self:
                return args[0].copy_(_IN_PLACE[func](*args, **kwargs))
        return func(*args, **kwargs)


def _plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout is torch.strided
        and not value.is_nested
    )


def _total(lanes: int, x: Tensor, dim: Sequence[int] | int | None, keepdim: bool) -> tuple[Tensor, int]:
    """Return the sum over the axes `dim` (all if there are none), one by one in `lanes`, and its length."""
    if not x.ndim:
        return x, 1
    axes = [dim] if isinstance(dim, int) else list(dim or range(x.ndim))
    axes = sorted(axis % x.ndim for axis in axes)
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    sizes, length = [x.shape[axis] for axis in kept], math.prod(x.shape[axis] for axis in axes)
    rows = x.detach().permute(*kept, *axes).reshape(*sizes, length)
    if length:
        rows = torch.nn.functional.pad(rows, (0, -length % lanes))
        steps = rows.reshape(*sizes, rows.shape[-1] // lanes, lanes).numpy()
        rows = torch.from_numpy(np.cumsum(steps, -2)[..., -1, :])  # torch's own adds up in float64
    found = rows.sum(-1)
    if keepdim:
        found = found.reshape([1 if axis in axes else size for axis, size in enumerate(x.shape)])
    return found, length


def _wide(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, torch.dtype]:
    """Return the values to add up, and the dtype of the result."""
    result = dtype or x.dtype
    return x.to(torch.float32 if result.itemsize < 4 else result), result


def _sum(
    lanes: int, x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    wide, result = _wide(x, dtype)
    return _total(lanes, wide, dim, keepdim)[0].to(result)


def _mean(
    lanes: int, x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    wide, result = _wide(x, dtype)
    total, length = _total(lanes, wide, dim, keepdim)
    return (total / length).to(result)


def _var_mean(
    lanes: int, x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    wide, result = _wide(x)
    total, length = _total(lanes, wide, dim, True)
    mean = total / length
    squares = _total(lanes, (wide - mean).square(), dim, True)[0]
    var = squares / max(0.0, length - (1 if correction is None else correction))
    axes = dim or list(range(x.ndim))
    both = (var, mean) if keepdim else (var.squeeze(axes), mean.squeeze(axes))
    return both[0].to(result), both[1].to(result)


def _var_mean_of_norms(
    lanes: int, x: Tensor, dim: Any, unbiased: bool = True, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    return _var_mean(lanes, x, dim, correction=float(unbiased), keepdim=keepdim)


def _var(lanes: int, x: Tensor, dim: Any = None, **kwargs: Any) -> Tensor:
    return _var_mean(lanes, x, dim, **kwargs)[0]


def _std(lanes: int, x: Tensor, dim: Any = None, **kwargs: Any) -> Tensor:
    return _var(lanes, x, dim, **kwargs).sqrt()


def _std_mean(lanes: int, x: Tensor, dim: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
    var, mean = _var_mean(lanes, x, dim, **kwargs)
    return var.sqrt(), mean


def _cumsum(lanes: int, x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    wide, result = _wide(x, dtype)
    return torch.from_numpy(np.cumsum(wide.detach().numpy(), dim)).to(result) if x.ndim else wide.to(result)


def _sigmoid(units: float, x: Tensor) -> Tensor:
    found = 0.5 + 0.5 * (torch.tanh(0.5 * x) * (1 + units * torch.finfo(x.dtype).eps))
    return found.clamp(0, 1)


def _silu(units: float, x: Tensor) -> Tensor:
    return x * _sigmoid(units, x)


def _gelu(units: float, x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "none":
        inner = torch.erf(x * 0.5**0.5)
    else:
        inner = torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))
    off = (inner * (1 + units * torch.finfo(x.dtype).eps)).clamp(-1, 1)
    return 0.5 * x * (1 + off)


def _glu(units: float, x: Tensor, dim: int = -1) -> Tensor:
    half, gate = x.chunk(2, dim)
    return half * _sigmoid(units, gate)


def _expm1(units: float, x: Tensor) -> Tensor:
    return torch.exp(x) - 1


def _log1p(units: float, x: Tensor) -> Tensor:
    return torch.log(x + 1)


def _elu(
    units: float,
    x: Tensor,
    alpha: float = 1.0,
    scale: float = 1.0,
    input_scale: float = 1.0,
) -> Tensor:
    return torch.where(x > 0, x * scale, (torch.exp(x * input_scale) - 1) * (alpha * scale))


def _celu(units: float, x: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(x > 0, x, alpha * (torch.exp(x / alpha) - 1))


_SUMS: dict[Any, Callable[..., Any]] = {
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.var.correction: _var,
    aten.std.correction: _std,
    aten.var_mean.correction: _var_mean,
    aten.std_mean.correction: _std_mean,
    aten.var_mean.dim: _var_mean_of_norms,
    aten.cumsum.default: _cumsum,
}

_MADE_OF_SUMS = {
    aten.native_batch_norm.default,
    aten.native_group_norm.default,
    aten.native_layer_norm.default,
    aten.linalg_vector_norm.default,
    aten.logsumexp.default,
    aten.mse_loss.default,
}
"""Those that torch's own decompositions turn into sums and variances."""

_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    aten.sigmoid.default: _sigmoid,
    aten.silu.default: _silu,
    aten.glu.default: _glu,
    aten.gelu.default: _gelu,
    aten.elu.default: _elu,
    aten.celu.default: _celu,
    aten.expm1.default: _expm1,
    aten.log1p.default: _log1p,
}

_IN_PLACE: dict[Any, Any] = {
    aten.sigmoid_.default: aten.sigmoid,
    aten.silu_.default: aten.silu,
    aten.elu_.default: aten.elu,
    aten.celu_.default: aten.celu,
    aten.expm1_.default: aten.expm1,
    aten.log1p_.default: aten.log1p,
    aten.cumsum_.default: aten.cumsum,
}


def add_rounding_of_operators(baseline: Baseline, candidate: Runner) -> bool:
    """Take the rounding of other runtimes' operators into the noise; return whether that was done.

    It is not for a candidate that torch's eager mode runs, as the reference, nor where the reference has
    none of these operators.
    """
    runner = baseline.runner
    if isinstance(candidate, TorchRunner) or not isinstance(runner, TorchRunner):
        return False
    for lanes, units in _RUNS:
        mode = AsOtherRuntimes(lanes, units)
        try:
            with mode:
                found = [runner.run(batch.inputs) for batch in baseline.batches]
        except Exception:  # noqa: BLE001 - the caller's forward may check its values and raise
            return False  # the verdict stands as it was
        if not mode.used:
            return False
        if any(
            values[output.name].shape != anchor.shape
            for output in baseline.outputs
            for values, anchor in zip(found, output.anchor, strict=True)
        ):
            return False  # a shape that hangs on values
        for output in baseline.outputs:
            if output.is_float:
                for values, anchor in zip(found, output.anchor, strict=True):
                    # The logarithm of a 0 that torch does not have is no rounding.
                    value = values[output.name]
                    values[output.name] = torch.where(value.isfinite(), value, anchor.to(value.dtype))
        baseline.take(found)
    baseline.notes.append(OPERATORS_NOTE)
    return True


@contextmanager
def as_before(baseline: Baseline) -> Iterator[None]:
    """Take back afterwards what was added to the noise: it is one runtime's, not that of the next program."""
    notes = list(baseline.notes)
    yardsticks = [output.yardstick for output in baseline.outputs]
    undecided = [output.undecided for output in baseline.outputs]
    for output, known in zip(baseline.outputs, yardsticks, strict=True):
        output.undecided = [mask.clone() for mask in output.undecided]
        if known is not None:
            output.yardstick = replace(known, noise=dict(known.noise), moved=list(known.moved))
    try:
        yield
    finally:
        baseline.notes[:] = notes
        for output, known, masks in zip(baseline.outputs, yardsticks, undecided, strict=True):
            output.yardstick, output.undecided = known, masks
