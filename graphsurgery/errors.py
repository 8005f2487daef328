"""Exceptions of graphsurgery.

```
GraphSurgeryError
├── CaptureError             the model or its inputs cannot be turned into a graph
├── PassError                a pass is unknown, raised, or broke what it declares
├── VerificationError        two programs that should agree do not
├── ExportError              an ONNX file could not be written whole
└── RuntimeUnavailableError  a runtime that was asked for is not installed
```

Every message is one sentence: what, where (pass, node, source line), expected, got, what to do.
A refusal to rewrite something is no error: it is a `graphsurgery.Refusal` in the report.
"""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "ExportError",
    "GraphSurgeryError",
    "PassError",
    "RuntimeUnavailableError",
    "VerificationError",
]


class GraphSurgeryError(Exception):
    """Base of every exception that graphsurgery raises on purpose."""


class CaptureError(GraphSurgeryError):
    """The model or its example inputs cannot be turned into a graph."""


class PassError(GraphSurgeryError):
    """A pass is unknown, raised, or broke what it declares."""


class VerificationError(GraphSurgeryError):
    """Two programs that should compute the same function do not."""


class ExportError(GraphSurgeryError):
    """An ONNX file could not be written whole."""


class RuntimeUnavailableError(GraphSurgeryError):
    """A runtime that was asked for is not installed."""
