"""Trained PyTorch networks folded into cheaper ones, each rewrite verified.

```python
import graphsurgery as gs

result = gs.optimize(model, (x,))
result.module, result.report
result.export_onnx("model.onnx")
```
"""

from graphsurgery import passes
from graphsurgery.capture import capture
from graphsurgery.errors import (
    CaptureError,
    ExportError,
    GraphSurgeryError,
    NotAffineError,
    PassError,
    RuntimeUnavailableError,
    VerificationError,
)
from graphsurgery.localize import Localization, Place, localize
from graphsurgery.matrix import AffineMatrix, affine_matrix
from graphsurgery.measure import MeasuredCost
from graphsurgery.partial import Part, PartsResult, optimize_parts
from graphsurgery.pipeline import (
    FeatureEnergy,
    HeadSubspace,
    OptimizeResult,
    SplitHeadResult,
    head_subspace,
    inspect,
    optimize,
    split_head,
)
from graphsurgery.report import PartsReport, Report
from graphsurgery.restore import restore
from graphsurgery.rewrite import (
    Change,
    Event,
    ManagerResult,
    NodeRef,
    Pass,
    PassFailure,
    PassManager,
    PassResult,
    Preserves,
    Refusal,
)
from graphsurgery.verify import RUNTIMES, RuntimesVerdict, RuntimeVerdict, Verdict, verify

__version__ = "0.1.0"

__all__ = [
    "RUNTIMES",
    "AffineMatrix",
    "CaptureError",
    "Change",
    "Event",
    "ExportError",
    "FeatureEnergy",
    "GraphSurgeryError",
    "HeadSubspace",
    "Localization",
    "ManagerResult",
    "MeasuredCost",
    "NodeRef",
    "NotAffineError",
    "OptimizeResult",
    "Part",
    "PartsReport",
    "PartsResult",
    "Pass",
    "PassError",
    "PassFailure",
    "PassManager",
    "PassResult",
    "Place",
    "Preserves",
    "Refusal",
    "Report",
    "RuntimeUnavailableError",
    "RuntimeVerdict",
    "RuntimesVerdict",
    "SplitHeadResult",
    "Verdict",
    "VerificationError",
    "__version__",
    "affine_matrix",
    "capture",
    "head_subspace",
    "inspect",
    "localize",
    "optimize",
    "optimize_parts",
    "passes",
    "restore",
    "split_head",
    "verify",
]
