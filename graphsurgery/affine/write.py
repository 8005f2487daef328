"""From a chosen fold to a changed graph: fill, certify, write. What fails on the way changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphsurgery.affine.atoms import NoFold
from graphsurgery.affine.certify import LIMIT, residual
from graphsurgery.affine.coefficients import Coefficients, fill
from graphsurgery.affine.emit import Emitted, emit
from graphsurgery.affine.region import Region
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
        filled: its form with the coefficients.
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
    region = fold.region
    try:
        with region.scope.holding_constants():
            with torch.inference_mode(False), torch.enable_grad():  # whatever the caller has switched off
                filled = fill(region, fold.option.form, memory_budget)
            deviation = residual(region, filled.form, filled.slots)
        _check(fold, filled, deviation)
    except NoFold:
        raise
    except Exception as error:  # nothing is written yet: a bug costs one fold, not all
        reason = f"the fold could not be computed ({type(error).__name__}: {error}); please report this"
        raise NoFold("internal", reason) from error
    return Ready(region, filled, deviation)


def _check(fold: Fold, filled: Coefficients, deviation: float) -> None:
    dtype = tensor_meta(fold.region.exit).dtype
    for slot, value in filled.slots.items():
        low, high = torch.aminmax(value) if value.numel() else (torch.zeros(()), torch.zeros(()))
        largest = max(abs(float(low)), abs(float(high)))  # a NaN makes both NaN
        if not largest < float("inf"):
            raise NoFold(
                "not-finite", f"the folded {slot} holds NaN or infinity, as the weights it comes from do"
            )
        if largest > torch.finfo(dtype).max:
            raise NoFold("overflow", f"the folded {slot} reaches {largest:.1e}, which does not fit {dtype}")
    if not deviation <= LIMIT:
        raise NoFold(
            "certificate",
            f"the folded form deviates from the original by {deviation:.1e} in float64, expected at most "
            f"{LIMIT:.0e}; please report this",
        )
