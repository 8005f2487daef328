"""What the pass manager records: events, kept runs, passes rolled back, the result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import fx

from graphsurgery.rewrite.contracts import Change, Refusal

__all__ = ["CheckResult", "Event", "EventKind", "ManagerResult", "PassFailure", "Step"]

EventKind = Literal["stage-start", "stage-done", "pass-start", "pass-done", "pass-failed"]


class CheckResult(Protocol):
    """What a numeric check hands back."""

    @property
    def ok(self) -> bool:
        """Whether the two graphs agree."""

    @property
    def reason(self) -> str:
        """One sentence with the numbers."""


@dataclass(frozen=True)
class Event:
    """Something that a progress bar may want to know.

    Attributes:
        kind: `"pass-start"`, `"pass-done"`, `"pass-failed"`; the pipeline adds `"stage-start"` and
            `"stage-done"`.
        pass_name: Name of the pass or stage.
        index: Position in this round, from 0.
        total: Passes in a round (stages, for a stage).
        round: Which round, from 1; 0 for a stage.
        changes: Rewrites the pass made.
        reason: Why it failed.
    """

    kind: EventKind
    pass_name: str
    index: int
    total: int
    round: int = 0
    changes: int = 0
    reason: str = ""


@dataclass(frozen=True)
class PassFailure:
    """A pass that was rolled back, or some of its changes alone.

    Attributes:
        pass_name: The culprit.
        code: Stable code: `raised`, `input-modified`, `not-a-result`, `false-no-change`, `false-change`,
            `lint`, `meta`,
            `signature`, `shapes`, `dtypes`, `values`, `check`, `no-fixed-point`; of the check at the end:
            `verification`.
        reason: One sentence.
        round: The round in which it happened, from 1.
        changes: The changes that were undone, all else of the pass being kept; empty where it was rolled back
            whole.
    """

    pass_name: str
    code: str
    reason: str
    round: int
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Step:
    """One run of one pass that changed the graph and was kept.

    Attributes:
        pass_name: Name of the pass.
        round: Which round, from 1.
        graph_module: The graph after it (tensors shared with its neighbours).
        changes: The rewrites it made.
        index: Position of the pass among those of the manager, where a name may stand twice.
    """

    pass_name: str
    round: int
    graph_module: fx.GraphModule
    changes: tuple[Change, ...]
    index: int


@dataclass(frozen=True)
class ManagerResult:
    """What the manager hands back.

    Attributes:
        graph_module: The final graph; the very input when nothing changed.
        changes: All rewrites kept, in order.
        refusals: What each pass declined in its last run: findings on the final graph.
        failures: Passes rolled back, whole or some of their changes.
        steps: The kept runs in order, with the graph after each.
        rounds: Rounds run.
        seconds: Time spent in each pass, checks included, by name.
    """

    graph_module: fx.GraphModule
    changes: tuple[Change, ...]
    refusals: tuple[Refusal, ...]
    failures: tuple[PassFailure, ...]
    steps: tuple[Step, ...] = ()
    rounds: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def modified(self) -> bool:
        """Whether any rewrite was kept; the name torch's own pass manager reads."""
        return bool(self.changes)
