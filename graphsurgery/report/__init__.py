"""The report of an operation: dataclasses, JSON, text."""

from graphsurgery.report.model import (
    SCHEMA_VERSION,
    Captured,
    Figures,
    Measurement,
    OnnxFile,
    PassCheck,
    Report,
    TensorSpec,
)
from graphsurgery.report.parts import PARTS_SCHEMA_VERSION, PartReport, PartsReport, WholeCheck

__all__ = [
    "PARTS_SCHEMA_VERSION",
    "SCHEMA_VERSION",
    "Captured",
    "Figures",
    "Measurement",
    "OnnxFile",
    "PartReport",
    "PartsReport",
    "PassCheck",
    "Report",
    "TensorSpec",
    "WholeCheck",
]
