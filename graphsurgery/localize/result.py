"""What a search for the first difference hands back: plain frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graphsurgery.verify import OutputVerdict

__all__ = ["Localization", "Place", "Stage"]


@dataclass(frozen=True)
class Place:
    """One value inside of a program, and what makes it.

    Attributes:
        name: Name of the value: of the `fx` node, or of the ONNX value.
        op: What makes it, as "conv2d" or "Conv".
        module: Dotted path of the user's module, "" for the root and where it is not known.
        source: The user's source line, "" where it is not known.
        node: Name of the ONNX node; of an `fx` node the same as `name`.
        inputs: Names of the values that it is made of.
        parameters: Names of the parameters or initializers that are read.
    """

    name: str
    op: str
    module: str = ""
    source: str = ""
    node: str = ""
    inputs: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    def __str__(self) -> str:
        node = f" (node {self.node})" if self.node and self.node != self.name else ""
        module = f" in {self.module}" if self.module else ""
        source = f", {self.source}" if self.source else ""
        return f"{self.op} {self.name}{node}{module}{source}"


@dataclass(frozen=True)
class Stage:
    """One step on the way from the reference to the candidate, judged as a whole.

    Attributes:
        name: What was run, as "torch Net" or "onnxruntime net.onnx (not optimised)".
        status: "equal", "different" or "not run".
        reason: Why, with the figures.
    """

    name: str
    status: Literal["equal", "different", "not run"]
    reason: str


@dataclass(frozen=True)
class Localization:
    """Where two programs begin to differ.

    Attributes:
        found: Whether they differ, and a first value that differs was found.
        reason: One sentence with the figures.
        blame: Which step departs first, and what that means, in words; "" where nothing differs.
        reference: Name of the reference.
        candidate: Name of the program that was searched.
        first: The first value of the candidate that differs.
        stands_for: The reference's value that it was held against.
        among: Values between `first` and the last ones that agree, which have no counterpart: the difference
            may have come in at any of them.
        error: The comparison at `first`.
        before: The comparisons of the values that `first` was made of, all of which agree.
        case: Which case of the battery was looked at; several where they are rows of one run.
        values: Values of the candidate.
        compared: Of these, those with a counterpart in the reference.
        agreed: Of these, those that agree.
        stages: The steps from the reference to the candidate, in order.
    """

    found: bool
    reason: str
    blame: str
    reference: str
    candidate: str
    first: Place | None = None
    stands_for: Place | None = None
    among: tuple[Place, ...] = ()
    error: OutputVerdict | None = None
    before: tuple[OutputVerdict, ...] = ()
    case: str = ""
    values: int = 0
    compared: int = 0
    agreed: int = 0
    stages: tuple[Stage, ...] = ()

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the difference may have come in, in the candidate's order: `among`, then `first`."""
        return (*self.among, *([self.first] if self.first else []))

    @property
    def module(self) -> str:
        """Dotted path of the user's module at the first difference; "" where it is not known."""
        sides = [place.module for place in (self.stands_for, self.first) if place]
        return next((module for module in sides if module), "")

    @property
    def source(self) -> str:
        """The user's source line at the first difference; "" where it is not known."""
        sides = [place.source for place in (self.stands_for, self.first) if place]
        return next((source for source in sides if source), "")

    def __str__(self) -> str:
        lines = [self.reason]
        if self.first is not None:
            lines.append(f"  first difference: {self.first}")
        if self.stands_for is not None:
            lines.append(f"  stands for: {self.stands_for}")
        if self.error is not None:
            lines.append(f"  error there: {self.error.reason}")
        lines += [f"  before, {item.name}: {item.reason}" for item in self.before]
        lines += [f"  or in between: {place}" for place in self.among]
        lines += [f"  {stage.name}: {stage.status}" for stage in self.stages]
        if self.blame:
            lines.append(f"  departs first: {self.blame}")
        return "\n".join(lines)
