"""From a chosen fold to a changed graph: fill, certify, write. What fails on the way changes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from graphsurgery.affine.atoms import NoFold
from graphsurgery.affine.certify import LIMIT, residual
from graphsurgery.affine.coefficients import Coefficients, fill
from graphsurgery.affine.emit import Emitted, emit
from graphsurgery.affine.forms import Form
from graphsurgery.affine.region import Region
from graphsurgery.affine.rows import gather, parts
from graphsurgery.affine.search import Fold
from graphsurgery.values import tensor_meta


@dataclass(frozen=True)
class Written:
    """A fold that was written.

    Attributes:
        emitted: the new calls and attributes.
        residual: of its certificate.
        detail: the kind of layer and how its coefficients were found.
    """

    emitted: Emitted
    residual: float
    detail: str


@dataclass(frozen=True)
class Ready:
    """A fold that is filled and certified; nothing of it is in the graph yet.

    Attributes:
        region: what it replaces.
        filled: its form with the coefficients, in the dtype and on the device of the exit.
        residual: of its certificate.
    """

    region: Region
    filled: Coefficients
    residual: float

    def write(self) -> Written:
        """Write it into the graph of its region; of several folds, the one whose exit comes last first."""
        detail = f"to {self.filled.form.kind}, coefficients by {self.filled.method}"
        return Written(emit(self.region, self.filled), self.residual, detail)


def prepare(fold: Fold, memory_budget: int) -> Ready:
    """Fill and certify one fold; the graph stays as it is.

    Args:
        fold: the fold.
        memory_budget: bytes that one chunk of probes may take.

    Raises:
        NoFold: the coefficients are not finite, do not fit the dtype, or fail the certificate; a bug of the
            engine is refused in the same way (code `internal`).
    """
    region, form = fold.region, fold.option.form
    try:
        split = parts(region, form)
        if split is None:
            return Ready(region, *_certified(region, form, memory_budget))
        slots: dict[str, torch.Tensor] = {}
        deviation, method = 0.0, ""
        for rows in split:
            filled, found = _certified(rows.region, rows.form, memory_budget)
            gather(slots, rows, filled.slots, form)
            deviation, method = max(deviation, found), filled.method
        return Ready(region, Coefficients(form, slots, method), deviation)
    except NoFold:
        raise
    except Exception as error:  # nothing is written yet: a bug costs one fold, not all
        reason = f"the fold could not be computed ({type(error).__name__}: {error}); please report this"
        raise NoFold("internal", reason) from error


def _certified(region: Region, form: Form, memory_budget: int) -> tuple[Coefficients, float]:
    """The coefficients of a form as the model will hold them, and the residual of their certificate."""
    with region.scope.holding_constants():
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller has switched off
            filled = fill(region, form, memory_budget)
        deviation = residual(region, filled.form, filled.slots)
    stored = _stored(region, filled)
    if not deviation <= LIMIT:
        raise NoFold(
            "certificate",
            f"the folded form deviates from the original by {deviation:.1e} in float64, expected at most "
            f"{LIMIT:.0e}; please report this",
        )
    return stored, deviation


def _stored(region: Region, filled: Coefficients) -> Coefficients:
    """The coefficients as the model will hold them: in the dtype and on the device of the region's exit.

    Raises:
        NoFold: one of them is not finite, or too large for the dtype.
    """
    like = tensor_meta(region.exit)
    slots = {}
    for slot, value in filled.slots.items():
        narrow = value.to(
            dtype=like.dtype, device=like.device, memory_format=torch.contiguous_format, copy=True
        )
        if not math.isfinite(_largest(narrow)):  # half the bytes of a float64 slot, of which few are wrong
            if not math.isfinite(_largest(value)):
                raise NoFold(
                    "not-finite", f"the folded {slot} holds NaN or infinity, as the weights it comes from do"
                )
            reached = f"the folded {slot} reaches {_largest(value):.1e}"
            raise NoFold("overflow", f"{reached}, which does not fit {like.dtype}")
        slots[slot] = narrow
    return replace(filled, slots=slots)


def _largest(value: torch.Tensor) -> float:
    """The largest size of an element; not finite where any is not."""
    if not value.numel():
        return 0.0
    return max(abs(float(bound)) for bound in torch.aminmax(value))  # a NaN makes both NaN
