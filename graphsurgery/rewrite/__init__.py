"""The contract of a pass and the manager that runs passes."""

from graphsurgery.rewrite.contracts import Change, NodeRef, Pass, PassResult, Preserves, Refusal
from graphsurgery.rewrite.manager import PassManager
from graphsurgery.rewrite.records import CheckResult, Event, ManagerResult, PassFailure, Step

__all__ = [
    "Change",
    "CheckResult",
    "Event",
    "ManagerResult",
    "NodeRef",
    "Pass",
    "PassFailure",
    "PassManager",
    "PassResult",
    "Preserves",
    "Refusal",
    "Step",
]
