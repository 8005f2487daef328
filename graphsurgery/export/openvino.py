"""ONNX files on OpenVINO's CPU device (extra `openvino`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphsurgery.errors import RuntimeUnavailableError, VerificationError
from graphsurgery.export.sessions import read_model

__all__ = ["OpenVinoSession"]

_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
"""Without these the CPU device takes bfloat16 where the processor has it, which is another function."""


class OpenVinoSession:
    """An ONNX file on OpenVINO's CPU device, computing in float32 (see `_EXACT`).

    Args:
        path: The file.

    Attributes:
        inputs: Shape of each input by name, as in `OnnxSession`; the dtype is None, as OpenVINO converts.

    Raises:
        RuntimeUnavailableError: OpenVINO is not installed, does not know an operator, or would compute a
            float64 graph in float32.
        VerificationError: The file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        graph = read_model(path, weights=False).graph
        try:
            import openvino
        except ImportError as error:
            raise RuntimeUnavailableError(
                "OpenVINO is not installed: pip install 'graphsurgery[openvino]'"
            ) from error
        try:
            self._model: Any = openvino.compile_model(os.fspath(path), "CPU", _EXACT)
        except Exception as error:  # OpenVINO raises RuntimeError and its own kinds, a page long
            raise RuntimeUnavailableError(f"OpenVINO cannot load the graph: {_reason(error)}") from error
        ports = [*self._model.inputs, *self._model.outputs]
        if any(port.get_element_type() == openvino.Type.f64 for port in ports):
            raise RuntimeUnavailableError("OpenVINO's CPU device computes float64 graphs in float32")
        self._outputs = tuple(value.name for value in graph.output)
        self.inputs: dict[str, tuple[torch.dtype | None, tuple[int | str | None, ...]]] = {}
        for port in self._model.inputs:
            sizes = tuple(None if size.is_dynamic else size.get_length() for size in port.partial_shape)
            self.inputs[port.get_any_name()] = (None, sizes)

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs by name.

        Raises:
            VerificationError: OpenVINO declines the inputs or fails in the run.
        """
        try:
            found = self._model({name: value.cpu().contiguous().numpy() for name, value in feeds.items()})
            values = [np.array(found[port]) for port in self._model.outputs]
            return {name: torch.from_numpy(value) for name, value in zip(self._outputs, values, strict=True)}
        except Exception as error:  # OpenVINO raises RuntimeError and its own kinds
            raise VerificationError(f"OpenVINO failed: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return the line that says what is wrong: OpenVINO's messages begin with files and lines of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '", "While"))]
    return (telling or lines or [type(error).__name__])[0][:300]
