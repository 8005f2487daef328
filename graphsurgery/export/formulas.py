"""Operators for the reference evaluator as the ONNX standard writes them, where it computes them better.

`Elu`, `Celu` and `Selu` are defined by `exp(x) - 1`, which cancels near zero. The evaluator takes `expm1` for
it; onnxruntime computes what is written (https://onnx.ai/onnx/operators/).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

__all__ = ["FORMULAS"]


class Elu(OpRun):
    def _run(self, x: Any, alpha: float) -> tuple[Any]:
        return (np.where(x < 0, alpha * (np.exp(x) - 1), x).astype(x.dtype),)


class Celu(OpRun):
    def _run(self, x: Any, alpha: float) -> tuple[Any]:
        return (np.where(x < 0, alpha * (np.exp(x / alpha) - 1), x).astype(x.dtype),)


class Selu(OpRun):
    def _run(self, x: Any, alpha: float, gamma: float) -> tuple[Any]:
        return ((gamma * np.where(x < 0, alpha * np.exp(x) - alpha, x)).astype(x.dtype),)


FORMULAS: tuple[type[OpRun], ...] = (Elu, Celu, Selu)
