"""Networks that people have, from the module to the ONNX file: folded, verified, nothing foldable left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torchvision
from random_chains import warmed
from torch import nn

import graphsurgery as gs
from graphsurgery.cost import graph_cost, layer_counts, op_name
from graphsurgery.passes import FoldAffine
from graphsurgery.rewrite.contracts import NodeRef

NETWORKS = ("resnet50", "mobilenet_v3_large", "vgg11_bn", "densenet121", "vit_b_16", "convnext_tiny")
# A minute each: 90 and 130 million parameters to copy and write, and the many nodes of DenseNet.
LONG = ("vgg11_bn", "vit_b_16", "densenet121", "convnext_tiny")
# Norms that have no layer to fold into: in DenseNet those between a concatenation and a ReLU.
NORMS_LEFT = {"densenet121": 62}


def network(name: str, size: int) -> nn.Module:
    """A torchvision network with seeded weights, statistics that are not trivial, and a head that answers."""
    torch.manual_seed(0)
    options = {"image_size": size} if name == "vit_b_16" else {}
    model = getattr(torchvision.models, name)(weights=None, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            warmed(module)
    if name == "vit_b_16":
        nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision starts it at zero
    return model.eval()


def norms_of(refs: Sequence[NodeRef]) -> int:
    return sum("norm" in ref.op for ref in refs)


def check(name: str, size: int, path: Path) -> None:
    model = network(name, size)
    x = torch.randn(1, 3, size, size)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = gs.optimize(model, (x,))
    assert result.report.verification is not None
    assert result.report.verification.ok

    captured = gs.capture(model, (x,))
    assert graph_cost(result.graph_module).macs <= graph_cost(captured).macs
    gone = sum(norms_of(change.before) - norms_of(change.after) for change in result.report.changes)
    assert layer_counts(result.graph_module).get("norm", 0) == layer_counts(captured).get("norm", 0) - gone
    norms = [n.name for n in result.graph_module.graph.nodes if op_name(n) == "batch_norm"]
    assert len(norms) == NORMS_LEFT.get(name, 0)
    reasons = {ref.name: r.code for r in result.report.refusals for ref in r.nodes}
    assert all(reasons.get(norm) in ("not-affine", "several-users") for norm in norms)

    exported = result.export_onnx(path / f"{name}.onnx")
    assert exported.verdict is not None
    assert exported.verdict.ok
    for candidate in (result.module, path / f"{name}.onnx"):
        verdict = gs.verify(model, candidate, (x,), dynamic_batch=True, samples=8)
        assert verdict.ok, str(verdict)
        assert {1, 2, 5} <= set(verdict.batch_sizes)

    assert not FoldAffine().run(result.graph_module).changes, "a second run found something"
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    # Old names, a bias where a norm was folded in, and the bare parameters of attention, which become layers.
    biases = {key.removesuffix("weight") + "bias" for key in before if key.endswith("weight")}
    bare = {f"{key}_linear.{slot}" for key in before if "in_proj" in key for slot in ("weight", "bias")}
    assert set(result.module.state_dict()) <= set(before) | biases | bare


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.sweep] if name in LONG else []) for name in NETWORKS]
)
def test_folded_exported_and_verified_at_a_small_size(name: str, tmp_path: Path) -> None:
    check(name, 64, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("name", NETWORKS)
def test_folded_exported_and_verified_at_its_own_size(name: str, tmp_path: Path) -> None:
    check(name, 224, tmp_path)


def test_inspect_names_the_norms_of_a_densenet_that_cannot_be_folded() -> None:
    model = network("densenet121", 64)
    report = gs.inspect(model, (torch.randn(1, 3, 64, 64),))
    left = {
        ref.module: (refusal.code, refusal.reason, ref.source)
        for refusal in report.refusals
        for ref in refusal.nodes
        if ref.op == "batch_norm"
    }
    code, reason, source = left["features.denseblock1.denselayer2.norm1"]
    assert code == "not-affine"
    assert "cat" in reason
    assert "relu" in reason
    assert "densenet.py" in source
    assert "features.denseblock1.denselayer1.norm2" not in left, "it follows a conv and folds"
