"""The whole result against the original, and the graft that makes it differ.

The outputs are compared as those of any network, anchored in float64 (`graphsurgery.verify`). A detector is
not always such a network: scores that rounding moves past a threshold change how many boxes come out. Then
the result may be as far from the original as the original is from itself when its weights move by units in
the last place, in the number, the mean and the spread of each output; and the report says so.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphsurgery.capture.inputs import Inputs
from graphsurgery.errors import VerificationError
from graphsurgery.partial.calls import comparable
from graphsurgery.partial.graft import Grafts
from graphsurgery.report.parts import WholeCheck
from graphsurgery.verify import Baseline, TorchRunner
from graphsurgery.verify import Inputs as Called

__all__ = ["Whole", "culprits"]

_ULPS = (1.0, 4.0, 16.0)
_DRAWS = 3  # for each of these
_SLACK = 2.0  # times as far as the original's own spread, which a few draws underestimate
_ROUNDING = 1e-6  # of the greatest of a kind: eight units of float32, for what no draw has moved


class _Method(nn.Module):
    """Calls a method of a model; what comes out is tensors, numbers and containers of these."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = copy.deepcopy((args, kwargs))  # a cache among them grows in the call
        call = self.model if self.method == "forward" else getattr(self.model, self.method)
        return comparable(call(*args, **kwargs))


class Whole:
    """The original as a whole, run on the calls that were given.

    Args:
        model: The original, in evaluation mode; copies of it are run.
        method: What is called on it.
        calls: The calls.
    """

    def __init__(self, model: nn.Module, method: str, calls: Sequence[Inputs]) -> None:
        self._method = method
        self._name = type(model).__name__
        self._reference = self._runner(model)
        self._calls = [Called(call.args, call.kwargs) for call in calls]
        self._baselines: list[Baseline | str] = [self._baseline(call) for call in self._calls]
        self._spreads: dict[int, list[Tensor] | None] = {}

    def _runner(self, model: nn.Module) -> TorchRunner:
        runner = TorchRunner(_Method(model, self._method))
        runner.name = f"torch {self._name}"
        return runner

    def _baseline(self, call: Called) -> Baseline | str:
        reason = ""
        for samples in (2, 1):  # noise drawn like the call too, where the outputs allow
            try:
                return Baseline(self._reference, call, samples=samples)
            except Exception as error:  # noqa: BLE001 - outputs of other shapes and names are no draws
                reason = str(error)
        return reason

    def checks(self, root: nn.Module) -> tuple[WholeCheck, ...]:
        """Compare a model with the original on each call."""
        candidate = self._runner(root)
        return tuple(self._check(candidate, index) for index in range(len(self._calls)))

    def _check(self, candidate: TorchRunner, index: int) -> WholeCheck:
        baseline = self._baselines[index]
        verdict = None
        if isinstance(baseline, Baseline):
            verdict = baseline.compare(candidate)
            if verdict.ok:
                return WholeCheck(True, True, verdict.reason, verdict)
        within = self._within_spread(candidate, index)
        if within is None:
            reason = verdict.reason if verdict else "its outputs are other ones than the original's"
            return WholeCheck(False, True, reason, verdict)
        return WholeCheck(within[0], False, within[1])

    # -- where outputs cannot be compared value by value

    def _within_spread(self, candidate: TorchRunner, index: int) -> tuple[bool, str] | None:
        """Whether a result lies in the spread of the original's own; None where that one has none."""
        call = self._calls[index]
        spread = self._spread(index)
        if spread is None:
            return None
        home = _summary(self._reference.run(call))
        try:
            found = _summary(candidate.run(call))
        except Exception as error:  # noqa: BLE001 - a candidate that raises is a finding, whatever it raises
            return False, f"it failed: {type(error).__name__}: {error}"
        if found.shape != home.shape:
            return False, f"it returns {len(found)} outputs, the original {len(home)}"
        far = torch.stack([(draw - home).abs() for draw in spread]).amax(0)
        bound = _SLACK * far + _ROUNDING * home.abs().amax(0)
        inside = ((found - home).abs() <= bound) | (found.isnan() & home.isnan())
        over = ~inside  # NaN, which is neither above nor below, is outside where the original has none
        moved = [float(draw[:, 0].sum()) for draw in spread]
        counts = f"{home[:, 0].sum():.0f} values, {min(moved):.0f} to {max(moved):.0f} when moved by rounding"
        said = f"the original gives {counts}, the result {found[:, 0].sum():.0f}"
        if bool(over.any()):
            row = int(over.any(1).nonzero()[0])
            return False, f"output {row} is further off than rounding moves the original: {said}"
        return True, (
            "discrete decisions (thresholds, sorting) hang on rounding, in the original itself, so outputs "
            f"were not compared value by value: {said}; each part was compared on its recorded calls"
        )

    def _spread(self, index: int) -> list[Tensor] | None:
        """Summaries of the original with its weights moved; None where no decision hangs on that."""
        if index not in self._spreads:
            call = self._calls[index]
            home = self._reference.run(call)
            # Seeds of their own: with the same three, a decision goes the same way in all draws too often.
            sizes = [ulps for ulps in _ULPS for _ in range(_DRAWS)]
            draws = [self._reference.nudged(seed, ulps).run(call) for seed, ulps in enumerate(sizes)]
            moved = any(_decisions_differ(home, draw) for draw in draws)
            same = all(len(draw) == len(home) for draw in draws)
            self._spreads[index] = [_summary(draw) for draw in draws] if moved and same else None
        return self._spreads[index]


def _decisions_differ(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> bool:
    if [value.shape for value in old.values()] != [value.shape for value in new.values()]:
        return True
    pairs = zip(old.values(), new.values(), strict=True)
    return any(not a.is_floating_point() and not torch.equal(a, b) for a, b in pairs)


def _summary(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return (output, 3): number of values, mean, root mean square."""
    rows = []
    for value in outputs.values():
        wide = value.double().flatten()
        own = [wide.mean(), wide.square().mean().sqrt()] if wide.numel() else [wide.new_zeros(())] * 2
        rows.append(torch.stack([torch.tensor(float(wide.numel()), dtype=torch.float64), *own]))
    return torch.stack(rows) if rows else torch.zeros(0, 3, dtype=torch.float64)


def culprits(
    whole: Whole, grafts: Grafts, modules: Sequence[nn.Module]
) -> tuple[tuple[WholeCheck, ...], dict[int, str]]:
    """Compare the result with the original; take out the grafts that make it differ, one by one.

    Args:
        whole: The original.
        grafts: The grafts, of which those of `modules` are to be used.
        modules: The modules that have one.

    Returns:
        The comparisons of what remains, and the reason of each that was taken out, by the module's id.

    Raises:
        VerificationError: The model differs from itself.
    """
    left = list(modules)
    undone: dict[int, str] = {}
    while True:
        checks = whole.checks(grafts.use(left))
        failed = _failure(checks)
        if failed is None:
            return checks, undone
        good, bad = 0, len(left)  # with this many grafts it agrees, and differs
        if not left or (found := _failure(whole.checks(grafts.use([])))) is not None:
            raise VerificationError(
                "the model differs from itself, so no result can be compared with it: "
                f"{failed if not left else found}; look for randomness or state in its forward"
            )
        while bad - good > 1:
            middle = (good + bad) // 2
            found = _failure(whole.checks(grafts.use(left[:middle])))
            if found is None:
                good = middle
            else:
                bad, failed = middle, found
        undone[id(left.pop(bad - 1))] = failed


def _failure(checks: Sequence[WholeCheck]) -> str | None:
    return next((check.reason for check in checks if not check.ok), None)
