"""The report of an operation: dataclasses, JSON, text."""

from graphsurgery.report.model import (
    SCHEMA_VERSION,
    Captured,
    Figures,
    OnnxFile,
    PassCheck,
    Report,
    TensorSpec,
)

__all__ = ["SCHEMA_VERSION", "Captured", "Figures", "OnnxFile", "PassCheck", "Report", "TensorSpec"]
