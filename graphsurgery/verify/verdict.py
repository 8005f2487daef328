"""The result of a verification: plain frozen dataclasses that turn into JSON as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graphsurgery.errors import VerificationError

__all__ = ["Comparison", "OutputVerdict", "RuntimeVerdict", "RuntimesVerdict", "Verdict"]


@dataclass(frozen=True)
class Comparison:
    """One float output compared in one precision; every error is absolute and against the anchor.

    Attributes:
        precision: "native" (each program in its own dtype) or "float64" (both cast to float64).
        max_error: Greatest error of the candidate.
        mean_error: Mean error of the candidate.
        reference_max_error: Greatest error of the reference in its own dtype; None where it was not measured.
        reference_mean_error: Mean error of the reference; None where it was not measured.
        rounding_ratio: Error of the candidate over that of the reference, root mean square over the cases,
            each relative to the case's magnitude; None where the reference's was not measured or is zero.
        factor: How many times the rounding noise the candidate may be off.
        factor_needed: The smallest factor that would pass.
        resolution: Smallest error that this comparison can see, as a share of a channel's largest value
            (median).
        best_resolution: The same where it is sharpest; 1 or more means that the comparison sees nothing.
        worst_case: Case with the greatest error relative to what is allowed.
        worst_index: Index of that value in the output of its run, the row of the batch first where cases are
            rows.
        worst_expected: Value of the anchor there.
        worst_got: Value of the candidate there.
    """

    precision: str
    max_error: float
    mean_error: float
    reference_max_error: float | None
    reference_mean_error: float | None
    rounding_ratio: float | None
    factor: float
    factor_needed: float
    resolution: float
    best_resolution: float
    worst_case: str
    worst_index: tuple[int, ...]
    worst_expected: float
    worst_got: float

    @property
    def ok(self) -> bool:
        """Whether the candidate lies within what rounding explains."""
        return self.factor_needed <= self.factor


@dataclass(frozen=True)
class OutputVerdict:
    """The verdict on one output.

    Attributes:
        name: Name of the output.
        shape: Its shape in the first run.
        dtype: Its dtype, as "float32".
        elements: Values compared over all cases.
        ok: Whether it passed.
        reason: Why, with the figures.
        native: Comparison of a float output in its own dtype; None for integers and booleans.
        float64: The same with both programs cast to float64; None where one side is no torch module.
        mismatches: Unequal values of an integer or boolean output that rounding does not explain.
        undecided: Integer or boolean values that the reference itself changes under rounding; not compared.
        nan: NaN values in the candidate's output.
        inf: Infinite values in the candidate's output.
        top1_checked: Rows of a (batch, classes) output whose margin exceeds the allowed error.
        top1_agreed: Rows of these in which both have the same greatest class.
        differs_on: Case of the first value that differs in kind (NaN, infinity), or of the first integer or
            boolean that does; "" where there is none, as floats say it in `worst_case`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    ok: bool
    reason: str
    native: Comparison | None = None
    float64: Comparison | None = None
    mismatches: int = 0
    undecided: int = 0
    nan: int = 0
    inf: int = 0
    top1_checked: int = 0
    top1_agreed: int = 0
    differs_on: str = ""

    @property
    def within_noise(self) -> bool:
        """Whether no comparison of its floats found more than the factor allows."""
        return all(comparison.ok for comparison in (self.native, self.float64) if comparison is not None)

    @property
    def max_error(self) -> float:
        """Greatest error in the output's own dtype; 0 for integers."""
        return self.native.max_error if self.native else 0.0

    @property
    def mean_error(self) -> float:
        """Mean error in the output's own dtype; 0 for integers."""
        return self.native.mean_error if self.native else 0.0

    @property
    def rounding_ratio(self) -> float | None:
        """Error of the candidate over that of the reference; None where not measured."""
        return self.native.rounding_ratio if self.native else None


@dataclass(frozen=True)
class Verdict:
    """Whether two programs compute one function, as far as their runs can tell.

    Attributes:
        ok: Whether every output passed.
        reason: One sentence with the figures of the worst output.
        reference: Name of the runner that gave the reference, as "torch ResNet".
        candidate: Name of the runner that was judged.
        anchor: What the errors were measured against.
        outputs: One verdict per output.
        cases: Names of the cases of the battery that were run.
        batch_sizes: Leading sizes of the runs.
        seed: Seed of the battery.
        notes: What a reader should know besides (NaN outputs, cases that the reference refused, weak
            comparisons).
        sizes: Other sizes that were run, where some are free, as "height=21, width=19".
        data_samples: Samples of the caller's own data that were run; None where none were given.
    """

    ok: bool
    reason: str
    reference: str
    candidate: str
    anchor: str
    outputs: tuple[OutputVerdict, ...] = ()
    cases: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    seed: int = 0
    notes: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    data_samples: int | None = None

    def raise_if_failed(self) -> Verdict:
        """Return the verdict itself if it passed.

        Raises:
            VerificationError: It did not; the message is the reason.
        """
        if not self.ok:
            raise VerificationError(f"{self.candidate} differs from {self.reference}: {self.reason}")
        return self

    def __str__(self) -> str:
        head = "equal up to rounding" if self.ok else "DIFFERENT"
        lines = [f"{self.candidate} vs {self.reference}: {head}: {self.reason}"]
        lines += [f"  {output.name}: {output.reason}" for output in self.outputs]
        lines.append(f"  {len(self.cases)} cases ({', '.join(self.cases)}), anchor: {self.anchor}")
        lines += [f"  other sizes: {'; '.join(self.sizes)}"] if self.sizes else []
        if self.data_samples is not None:
            lines.append(f"  {self.data_samples} samples of the caller's data")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass(frozen=True)
class RuntimeVerdict:
    """What one runtime said of a program.

    Attributes:
        runtime: Its name, as in `graphsurgery.verify.RUNTIMES`.
        status: "equal", "different", or "not run", which is neither.
        reason: Why, with the figures; what keeps the runtime from being run.
        verdict: The whole verdict; None where it was not run.
    """

    runtime: str
    status: Literal["equal", "different", "not run"]
    reason: str
    verdict: Verdict | None = None


@dataclass(frozen=True)
class RuntimesVerdict(Verdict):
    """The verdict on one program on several runtimes.

    It passes when at least one runtime ran it and none that did differs. The figures are those of the first
    runtime that differs, else of the one that comes nearest to what is allowed.

    Attributes:
        runtimes: Each runtime that was named, in order.
    """

    runtimes: tuple[RuntimeVerdict, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every runtime that was named ran."""
        return all(item.status != "not run" for item in self.runtimes)

    def __str__(self) -> str:
        lines = [super().__str__()]
        lines += [f"  on {item.runtime}: {item.status}" for item in self.runtimes if item.verdict]
        lines += [f"  on {item.runtime}: {item.reason}" for item in self.runtimes if not item.verdict]
        return "\n".join(lines)
