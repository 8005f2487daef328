"""The matrix and bias of an affine module, or of any affine stretch of a network.

```python
found = gs.affine_matrix(nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 64, 64))
found.matrix, found.bias, found.density
```
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphsurgery.affine.certify import LIMIT, SAMPLES, deviation, draw, louder
from graphsurgery.capture import capture
from graphsurgery.errors import NotAffineError, VerificationError
from graphsurgery.graph import INFO_KEY
from graphsurgery.matrix.assemble import assembled
from graphsurgery.matrix.channels import channel_matrix
from graphsurgery.matrix.result import AffineMatrix
from graphsurgery.matrix.rows import DEFAULT_LIMIT
from graphsurgery.matrix.segments import Segment, batch_size, segments
from graphsurgery.matrix.stretch import Path, Stretch, find

__all__ = ["AffineMatrix", "affine_matrix", "residual"]

Form = Literal["auto", "dense", "sparse", "channels"]
_FORMS = ("auto", "dense", "sparse", "channels")


def affine_matrix(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    path: Path = None,
    form: Form = "auto",
    limit_bytes: int = DEFAULT_LIMIT,
) -> AffineMatrix:
    """Find the matrix `A` and the bias `b` of an affine stretch `y = A x + b`, per sample, in float64.

    The leading dimension of the stretch's input is the batch; all others, flattened in order, are `x`, and so
    it is with the output. Before it is returned the matrix is held against the stretch itself, in float64 on
    random inputs at the sizes of the example.

    Args:
        model: A network, an `ExportedProgram`, or a graph by `graphsurgery.capture`; it is not changed.
        example_inputs: As for `capture`; not needed for a captured graph.
        path: Dotted path of the submodule that is meant (`"layer1.0.conv1"`), or of the first and the last
            module of a stretch (`"layer1.0.conv1..layer1.0.bn1"`, or both as a tuple); None for the whole
            model.
        form: `"sparse"` gives the matrix as `torch.sparse_csr`, built without the dense one: a convolution
            becomes its doubly block-Toeplitz matrix. `"dense"` gives an ordinary tensor, `"auto"` whichever
            takes less memory. `"channels"` gives the small matrix that is applied at every position alike, of
            a 1x1 convolution or a Linear: (positions, C) x (C, F).
        limit_bytes: What the matrix, and each of those that it is multiplied of, may take.

    Returns:
        The matrix with its bias, shapes, rank, condition number and density.

    Raises:
        CaptureError: The model or its inputs cannot be captured.
        NotAffineError: The stretch is not affine, or not sample by sample; the message names the op, the
            module path and the source line.
        VerificationError: The matrix found differs from the stretch.
        ValueError: There is no such module or form, or the matrix takes more than the limit.
    """
    if form not in _FORMS:
        raise ValueError(f"form must be one of {', '.join(map(repr, _FORMS))}, got {form!r}")
    captured = isinstance(model, fx.GraphModule) and INFO_KEY in model.meta
    gm = model if isinstance(model, fx.GraphModule) and captured else capture(model, example_inputs)
    with torch.inference_mode(False), torch.enable_grad():  # coefficients are read off adjoints
        return _matrix(find(gm, path), form, limit_bytes)


def _matrix(stretch: Stretch, form: Form, limit_bytes: int) -> AffineMatrix:
    scope, batch = stretch.scope, batch_size(stretch.scope, stretch.entry)
    ends = [[scope.actual(n, 1) for n in scope.shape(node)] for node in (stretch.entry, stretch.exit)]
    # First of all: it is here that a stretch turns out not to be affine.
    parts = segments(stretch, form == "channels")
    into, out = (_per_sample(end, batch) for end in ends)
    bias = stretch.run(torch.zeros(ends[0], dtype=torch.float64), 1).reshape(batch or 1, -1)[0].clone()
    axes: tuple[int, int] | None = None
    if form == "channels":
        only = parts[0] if len(parts) == 1 else None
        matrix, bias, axes = channel_matrix(only if isinstance(only, Segment) else None, bias.reshape(out))
        into, out = (matrix.shape[1],), (matrix.shape[0],)
    else:
        matrix = assembled(parts, form, limit_bytes)
    kind = "channels" if axes else _layout(matrix)
    found = AffineMatrix(matrix, bias, into, out, kind, axes)
    error = residual(stretch, found)
    if not error <= LIMIT:
        _disagree(stretch, error)
    return replace(found, residual=error)


def _layout(matrix: torch.Tensor) -> Literal["dense", "sparse"]:
    return "dense" if matrix.layout == torch.strided else "sparse"


def _per_sample(shape: list[int], batch: int | None) -> tuple[int, ...]:
    """A shape at a free batch of one, or with a fixed batch, without the batch."""
    lead = shape[0] // (batch or 1)
    return (lead, *shape[1:]) if lead != 1 else tuple(shape[1:])


def residual(stretch: Stretch, found: AffineMatrix) -> float:
    """The certificate: a matrix against the stretch, in float64 on random dense inputs at the real sizes.

    Args:
        stretch: the calls.
        found: their matrix and bias.

    Returns:
        The largest deviation of an output relative to its variation over the samples; see `certify.residual`.
    """
    scope, fixed = stretch.scope, batch_size(stretch.scope, stretch.entry)
    batch, draws = (SAMPLES, 1) if fixed is None else (1, -(-SAMPLES // fixed))
    xs = [draw(scope, stretch.entry, batch, seed) for seed in range(draws)]
    wanted = [stretch.run(x, batch) for x in xs]
    gain = louder(torch.stack(wanted), [0, 1], lambda x: stretch.run(x, batch), xs[0])
    if gain > 1:
        xs = [x * gain for x in xs]
        wanted = [stretch.run(x, batch) for x in xs]
    got = [found.apply(x if found.axes else x.reshape(-1, *found.input_shape)) for x in xs]
    samples, lines = (torch.cat([y.reshape(fixed or SAMPLES, -1) for y in side]) for side in (wanted, got))
    return deviation(samples, lines, [0])


def _disagree(stretch: Stretch, error: float) -> None:
    """Raise for a matrix that differs from its stretch.

    Raises:
        NotAffineError: a weight of the stretch, or its value at zero, is not finite.
        VerificationError: else.
    """
    scope = stretch.scope
    constants = {o for node in stretch.nodes for o in node.all_input_nodes if o in scope.constant}
    values = scope.constant_values(constants).values()
    if not all(bool(torch.isfinite(v).all()) for v in values if isinstance(v, torch.Tensor)):
        raise NotAffineError(
            "the weights of the stretch hold NaN or infinity; load a checkpoint that is whole.", "not-finite"
        )
    raise VerificationError(
        f"the matrix differs from the stretch {stretch.entry.name!r} -> {stretch.exit.name!r} by {error:.1e} "
        f"in float64, expected at most {LIMIT:.0e}; please report this."
    )
