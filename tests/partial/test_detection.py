"""Detectors of torchvision: their backbones are folded, and they take lists of pictures as before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from partial_models import block, part, statuses
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery.capture.inputs import Inputs
from graphsurgery.partial.graft import Grafts
from graphsurgery.partial.whole import Whole, culprits

ops = pytest.importorskip("torchvision.ops")
detection = pytest.importorskip("torchvision.models.detection")


def pictures(*shapes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *shape, dtype=torch.float64, generator=generator) for shape in shapes]


def warm(model: nn.Module, size: int) -> nn.Module:
    """Give the norms of the backbone statistics and weights that are not trivial, in float64."""
    model = model.double()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean of what was seen
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
    model.backbone.train()
    with torch.no_grad():
        model.backbone(torch.randn(4, 3, size, size, dtype=torch.float64))
    for norm in norms:
        norm.running_var.clamp_(min=1e-2)  # type: ignore[union-attr]
    return model.eval()


def small() -> nn.Module:
    """A detector with all of torchvision's stages and a backbone of one block."""
    torch.manual_seed(0)
    backbone = block(3, 8)
    backbone.out_channels = 8
    model = detection.FasterRCNN(
        backbone,
        min_size=24,
        max_size=32,
        rpn_post_nms_top_n_test=10,
        rpn_anchor_generator=detection.anchor_utils.AnchorGenerator(((8,),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=ops.MultiScaleRoIAlign(["0"], output_size=3, sampling_ratio=2),
        box_head=detection.faster_rcnn.TwoMLPHead(8 * 9, 16),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(16, 3),
    )
    return model.double().eval()


def test_folds_the_backbone_of_a_small_detector() -> None:
    model = small()
    images = pictures((20, 30), (24, 24))
    result = gs.optimize_parts(model, (images,), keep=["", "roi_heads"])
    assert part(result, "backbone").status == "folded"
    assert part(result, "rpn").code == "not-plain"
    assert norms_in(result.module.backbone) == []
    assert result.verdict is not None
    assert result.verdict.ok
    assert result.verdict.decided
    for others in (images, pictures((40, 24), seed=1), pictures((16, 25), (20, 20), (25, 16), seed=2)):
        assert_same_detections(model, result.module, others)
    assert_a_wrong_backbone_is_undone(model, result.module, images)


@pytest.fixture(scope="module")
def faster() -> nn.Module:
    torch.manual_seed(0)
    model = detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=32, max_size=64
    )
    model.rpn._post_nms_top_n["testing"] = 20
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.02)  # else all scores are alike
    return warm(model, 64)


@pytest.fixture(scope="module")
def ssd() -> nn.Module:
    torch.manual_seed(0)
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    model.transform.fixed_size = (96, 96)
    for name, weight in model.head.classification_head.named_parameters():
        if name.endswith("1.weight"):
            nn.init.normal_(weight, std=0.3)
    return warm(model, 128)


def norms_in(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if "Norm" in type(part).__name__]


def assert_same_detections(model: nn.Module, other: nn.Module, images: list[Tensor]) -> None:
    with torch.no_grad():
        expected, found = model(images), other(images)
    assert len(expected) == len(found) == len(images)
    for a, b in zip(expected, found, strict=True):
        assert len(a["boxes"]) > 0
        assert torch.equal(a["labels"], b["labels"])
        # float64, through some hundred layers; boxes are in pixels
        torch.testing.assert_close(b["scores"], a["scores"], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(b["boxes"], a["boxes"], rtol=1e-8, atol=1e-6)


def assert_a_wrong_backbone_is_undone(original: nn.Module, folded: nn.Module, images: list[Tensor]) -> None:
    model: Any = copy.deepcopy(original)
    backbone, wrong = model.backbone, copy.deepcopy(folded.get_submodule("backbone"))
    with torch.no_grad():
        next(wrong.parameters()).view(-1)[0] += 1e-2
    grafts = Grafts(model)
    grafts.add(backbone, wrong, ())
    checks, undone = culprits(Whole(model, "forward", [Inputs((images,), {})]), grafts, [backbone])
    assert list(undone) == [id(backbone)]
    assert model.backbone is backbone
    assert checks[0].ok


def assert_folded(model: nn.Module, result: gs.PartsResult) -> None:
    assert type(result.module) is type(model)
    assert statuses(result)[""] == "not-captured"
    assert part(result, "backbone").status == "folded"
    assert len(norms_in(model.backbone)) > 40
    assert norms_in(result.module.backbone) == []
    assert result.verdict is not None
    assert result.verdict.ok, result.verdict.reason
    for images in (
        pictures((60, 80), (70, 64)),
        pictures((100, 64), seed=1),
        pictures((50, 90), (64, 64), (90, 50), seed=2),
    ):
        assert_same_detections(model, result.module, images)


@pytest.fixture(scope="module")
def folded_faster(faster: nn.Module) -> gs.PartsResult:
    return gs.optimize_parts(faster, (pictures((60, 80), (70, 64)),))


@pytest.fixture(scope="module")
def folded_ssd(ssd: nn.Module) -> gs.PartsResult:
    return gs.optimize_parts(ssd, (pictures((60, 80), (70, 64)),))


@pytest.mark.sweep
def test_folds_the_backbone_of_faster_rcnn(faster: nn.Module, folded_faster: gs.PartsResult) -> None:
    assert_folded(faster, folded_faster)
    assert part(folded_faster, "rpn").code == "not-plain"


@pytest.mark.sweep
def test_folds_the_backbone_of_ssdlite_and_its_head(ssd: nn.Module, folded_ssd: gs.PartsResult) -> None:
    assert_folded(ssd, folded_ssd)
    assert norms_in(folded_ssd.module.head) == []


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["faster", "ssd"])
def test_detects_and_undoes_a_wrong_graft(name: str, request: pytest.FixtureRequest) -> None:
    model, folded = request.getfixturevalue(name), request.getfixturevalue(f"folded_{name}")
    assert_a_wrong_backbone_is_undone(model, folded.module, pictures((60, 80)))
