"""The contract of a pass and the manager that runs passes."""

from graphsurgery.rewrite.contracts import Change, NodeRef, Pass, PassResult, Preserves, Refusal

__all__ = ["Change", "NodeRef", "Pass", "PassResult", "Preserves", "Refusal"]
