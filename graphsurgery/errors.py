"""Exceptions of graphsurgery.

```
GraphSurgeryError
├── CaptureError             the model or its inputs cannot be turned into a graph
├── PassError                a pass is unknown, raised, or broke what it declares
├── VerificationError        two programs that should agree do not
├── ExportError              an ONNX file could not be written whole
├── NotAffineError           a stretch of a network has no matrix
└── RuntimeUnavailableError  a runtime or package that was asked for is not installed
```

Every message is one sentence: what, where (pass, node, source line), expected, got, what to do.
A refusal to rewrite something is no error: it is a `graphsurgery.Refusal` in the report.
"""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "ExportError",
    "GraphSurgeryError",
    "NotAffineError",
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


class NotAffineError(GraphSurgeryError):
    """A stretch of a network computes no `A x + b` of each sample; the message names the op and its line.

    Attributes:
        code: stable code of the reason: that of the engine's refusal (`not-affine`, `batch-mixed`, ...), or
            `several-inputs`, `several-outputs`, `constant`, `batch-order`, `structure`, `position-bias`,
            `not-finite`, `unsupported`.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class RuntimeUnavailableError(GraphSurgeryError):
    """A runtime, or the package behind an optional feature, that was asked for is not installed."""
