"""The head of a network taken apart: its features split in a new module, or only looked at."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphsurgery.affine.heads import Head, NoHead, find_head
from graphsurgery.affine.region import Scope
from graphsurgery.affine.subspace import Subspace
from graphsurgery.capture import capture
from graphsurgery.capture.inputs import normalize
from graphsurgery.errors import PassError
from graphsurgery.export import ExportResult
from graphsurgery.graph import capture_info, copy_graph_module, delete_unused_attrs
from graphsurgery.passes.split_head import CLASS_FEATURES, LOGITS, RESIDUAL_FEATURES, SUBSPACE_KEY, SplitHead
from graphsurgery.pipeline.proof import Proof
from graphsurgery.pipeline.result import OptimizeResult
from graphsurgery.report import Report
from graphsurgery.report.build import build_report
from graphsurgery.restore import restore
from graphsurgery.rewrite import PassManager
from graphsurgery.rewrite.outputs import set_outputs
from graphsurgery.values import tensor_meta

__all__ = ["FeatureEnergy", "HeadSubspace", "SplitHeadResult", "head_subspace", "split_head"]


@dataclass(frozen=True)
class FeatureEnergy:
    """How much of the features a head sees lies in the space that reaches its outputs.

    Of a feature vector `f'` (with the constant 1 where the head has a bias) the energy is its squared norm,
    and the variance that of `f'` less the mean of all. Means over all vectors; per-pixel heads count each
    position.

    Attributes:
        vectors: Number of feature vectors.
        energy: Mean energy.
        class_energy: Mean energy of the class-specific part.
        variance: Mean squared distance from the mean.
        class_variance: The same of the class-specific part.
    """

    vectors: int
    energy: float
    class_energy: float
    variance: float
    class_variance: float

    @property
    def share(self) -> float:
        """Class-specific share of the energy, 0 to 1; NaN where there is none."""
        return self.class_energy / self.energy if self.energy else float("nan")

    @property
    def variance_share(self) -> float:
        """Class-specific share of the variance, 0 to 1; NaN where the features do not vary."""
        return self.class_variance / self.variance if self.variance else float("nan")

    def __str__(self) -> str:
        energy, variance = f"{self.share:.1%}", f"{self.variance_share:.1%}"
        parts = f"{energy} of the energy and {variance} of the variance"
        return f"{self.vectors} feature vectors: {parts} are class-specific"


@dataclass(frozen=True)
class HeadSubspace(Subspace):
    """What a head reads, split (see `Subspace` and `decompose` for `Q`, `R` and the rule of the rank).

    Attributes:
        head: Dotted path of the head's module, or the name of its parameter.
        feature_axis: Axis of the features, in the value that the head reads.
        feature_module: The network up to the head: its inputs to (features, logits).
    """

    head: str
    feature_axis: int
    feature_module: fx.GraphModule = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.head}: {super().__str__()}"

    def energy(self, batches: Iterable[Any]) -> FeatureEnergy:
        """Measure the share of the features that lies in the class-specific space, over a data loader.

        The network runs up to the head once per batch; no data are held, sums are in float64 and merged as in
        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
        (1979).

        Args:
            batches: Inputs of the network, each in a form that `example_inputs` has. Of a loader of (input,
                label) pairs: `(x for x, _ in loader)`.

        Raises:
            ValueError: There is no batch, or one does not fit the network's inputs.
        """
        count, squares = 0, torch.zeros(self.width, dtype=torch.float64)
        mean, spread = torch.zeros_like(squares), torch.zeros_like(squares)
        for batch in batches:
            values = self.coordinates(self.features_of(batch).movedim(self.feature_axis, -1))
            values = values.reshape(-1, self.width).cpu()
            size = len(values)
            if size == 0:
                continue
            there, count = count, count + size
            squares += values.square().sum(0)
            own = values.mean(0)
            spread += (values - own).square().sum(0) + (own - mean).square() * (there * size / count)
            mean += (own - mean) * (size / count)
        if count == 0:
            raise ValueError("no features were seen: expected an iterable of at least one batch of inputs")
        inside = slice(0, self.rank)
        sums = (squares.sum(), squares[inside].sum(), spread.sum(), spread[inside].sum())
        return FeatureEnergy(count, *(float(value) / count for value in sums))

    def features_of(self, inputs: Any) -> torch.Tensor:
        """The features that the head reads, for inputs of the network, in the network's dtype.

        Args:
            inputs: In a form that `example_inputs` has.

        Raises:
            ValueError: Their number is not that of the network's inputs.
        """
        call = normalize(inputs)
        names = capture_info(self.feature_module).input_names
        given = len(pytree.tree_leaves((call.args, call.kwargs)))
        if given != len(names):
            raise ValueError(
                f"a batch holds {given} inputs, the network takes {len(names)} ({', '.join(names)}); of "
                "pairs of input and label pass the inputs only, as in `(x for x, _ in loader)`"
            )
        with torch.no_grad():
            features: torch.Tensor = self.feature_module(*call.args, **call.kwargs)[0]
        return features


@dataclass
class SplitHeadResult:
    """A network whose head is split.

    Attributes:
        module: Takes what the network takes; returns a dictionary of `logits` (what the head computes),
            `class_features`, `residual_features` (left out where nothing is residual), and the network's
            other outputs under their own names.
        graph_module: The same as the graph that passes see.
        subspace: `Q`, `R`, the rank, and the energy of features.
        report: What was done, with the verdict.
    """

    module: nn.Module
    graph_module: fx.GraphModule
    subspace: HeadSubspace
    report: Report
    _result: OptimizeResult = field(repr=False)

    def export_onnx(
        self, path: str | os.PathLike[str], *, verify: bool = True, opset: int | None = None
    ) -> ExportResult:
        """Write the module as an ONNX file whose outputs on onnxruntime were compared with the original's.

        Args:
            path: The file; nothing is left there when it cannot be written or differs.
            verify: Whether to compare. The parts are compared with `f' Q` of the features of the original.
            opset: As for `OptimizeResult.export_onnx`.

        Raises:
            ExportError: It cannot be translated, or the file not written.
            VerificationError: What onnxruntime computes differs.
        """
        done = self._result.export_onnx(path, verify=verify, opset=opset)
        self.report = self._result.report
        return done

    def save(self, path: str | os.PathLike[str], *, verify: bool = True) -> Path:
        """Write the module as an exported program (`.pt2`); see `OptimizeResult.save`."""
        return self._result.save(path, verify=verify)


def split_head(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    head: str | None = None,
    keep_head: bool = True,
    dynamic_shapes: Any = None,
) -> SplitHeadResult:
    """Split the features that a head reads into those that reach its outputs and those that cannot.

    With `M = [weight | bias]^T = Q R` and `f' = [f, 1]` the class-specific features are `f' Q[:, :rank]`, the
    residual ones `f' Q[:, rank:]`; without a bias the constant is left out. A head is a Linear, or a 1x1
    convolution, whose features are split at every position.

    `Q` is found in float64 and stored in the dtype of the features, which rounds each entry: in float32 it is
    orthonormal to about 1e-7, and norms add up to as much. That does not touch the logits, which come from
    the head itself, bit for bit; the price is its multiplications beside those of `Q`.

    Args:
        model: The network; it is not changed.
        example_inputs: As for `optimize`.
        head: Dotted path of the head's module (`"fc"`, `"classifier.4"`), or the name of a bare parameter;
            None takes the last layer that multiplies before the first output.
        keep_head: Whether the head stays. Else the logits are `R` times the class-specific features, and are
            equal up to rounding; that is verified.
        dynamic_shapes: As for `optimize`.

    Returns:
        The module, the subspace and the report.

    Raises:
        CaptureError: The model or its inputs cannot be captured.
        PassError: There is no such head, or it cannot be split; the message names the code of the refusal.
        VerificationError: The outputs differ from the original's.
    """
    gm = capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
    item = SplitHead(head=head, keep_head=keep_head)
    made = PassManager([item])(gm)
    if not made.changes:
        reasons = [f"{r.reason} ({r.code})" for r in made.refusals]
        reasons += [f"{f.reason} ({f.code})" for f in made.failures]
        already = f"the model has the outputs {LOGITS!r} and {CLASS_FEATURES!r} already"
        raise PassError(
            f"cannot split the head of {capture_info(gm).model_name}: {'; '.join(reasons) or already}"
        )
    split = made.graph_module
    subspace = _subspace(gm, head, split.meta.pop(SUBSPACE_KEY))  # a copy of the module need not copy it
    module = restore(split)
    proof = Proof(_WithFeatures(Proof(model, gm).reference, gm, split, subspace), split)
    verdict = proof.baseline.compare(module).raise_if_failed()
    report = replace(build_report(gm, (item,), made, {}), verify_mode="final", verification=verdict)
    result = OptimizeResult(module, split, report, proof, dynamic_shapes)
    return SplitHeadResult(module, split, subspace, report, result)


def head_subspace(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    head: str | None = None,
    rtol: float | None = None,
    dynamic_shapes: Any = None,
) -> HeadSubspace:
    """Find what reaches the outputs of a head, without changing anything.

    Args:
        model: The network; it is not changed.
        example_inputs: As for `optimize`.
        head: As for `split_head`.
        rtol: Singular values up to this share of the largest count as zero; None takes the rule of
            `numpy.linalg.matrix_rank` for float64, `max(width, outputs) * 2^-52`.
        dynamic_shapes: As for `optimize`.

    Raises:
        CaptureError: The model or its inputs cannot be captured.
        PassError: There is no such head, or its weights are zero or not finite.
        ValueError: `rtol` is not within [0, 1).
    """
    gm = capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
    try:
        return _subspace(gm, head, rtol)
    except NoHead as no:
        raise PassError(
            f"cannot take the head of {capture_info(gm).model_name}: {no.reason} ({no.code})"
        ) from no


def _subspace(gm: fx.GraphModule, path: str | None, known: Subspace | float | None) -> HeadSubspace:
    """The subspace of a head, where it is not `known`, with that relative tolerance; and the way to it."""
    work = copy_graph_module(gm)
    scope = Scope(work)
    head = find_head(scope, path)
    found = known if isinstance(known, Subspace) else head.subspace(scope, known)
    return HeadSubspace(
        **vars(found), head=head.path, feature_axis=head.axis, feature_module=_cut(work, head)
    )


def _cut(gm: fx.GraphModule, head: Head) -> fx.GraphModule:
    """Make a graph return the features and the head's value, and nothing else."""
    set_outputs(gm, (head.features, head.node))
    gm.graph.eliminate_dead_code()
    delete_unused_attrs(gm)
    gm.recompile()
    return gm


class _WithFeatures(nn.Module):
    """What a split network has to compute: the original's outputs, and `f' Q` of its features."""

    Q: torch.Tensor

    def __init__(
        self, original: nn.Module, gm: fx.GraphModule, split: fx.GraphModule, subspace: HeadSubspace
    ) -> None:
        super().__init__()
        self.original, self.features = original, subspace.feature_module
        self.axis, self.rank, self.bias = subspace.feature_axis, subspace.rank, subspace.bias
        self.names, self.wanted = capture_info(gm).output_names, capture_info(split).output_names
        features: Any = self.features.graph.output_node().args[0]
        self.register_buffer("Q", subspace.Q.to(tensor_meta(features[0]).dtype))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        names = self.names
        if names == ("output",) and "output" not in self.wanted:
            names = (LOGITS,)
        found = dict(zip(names, pytree.tree_leaves(self.original(*args, **kwargs)), strict=True))
        features, logits = self.features(*args, **kwargs)
        wide = features.movedim(self.axis, -1)
        if self.bias:
            wide = torch.cat([wide, torch.ones_like(wide[..., :1])], -1)
        turned = wide @ self.Q
        found.setdefault(LOGITS, logits)
        found[CLASS_FEATURES] = turned[..., : self.rank].movedim(-1, self.axis)
        found[RESIDUAL_FEATURES] = turned[..., self.rank :].movedim(-1, self.axis)
        return {name: found[name] for name in self.wanted}
