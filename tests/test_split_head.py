"""`gs.split_head` and `gs.head_subspace`: networks that people have, ONNX files, energy over a loader."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torchvision
from random_chains import warmed
from torch import Tensor, nn

import graphsurgery as gs

ROOT = Path(__file__).parent.parent
PARTS = ("class_features", "residual_features")


def network(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    makers = torchvision.models.segmentation if name.startswith("fcn") else torchvision.models
    more = {"weights_backbone": None} if name.startswith("fcn") else {}
    model = getattr(makers, name)(weights=None, **more, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            warmed(module)
    return model.eval()


def pictures(batch: int, size: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def on_onnxruntime(path: Path, x: Tensor) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {session.get_inputs()[0].name: x.numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def check(split: gs.SplitHeadResult, model: nn.Module, x: Tensor, path: Path) -> dict[str, Tensor]:
    """Check what holds of every split; return what the module gives."""
    verdict = split.report.verification
    assert verdict is not None
    assert verdict.ok
    with torch.no_grad():
        found = split.module(x)
        features = split.subspace.features_of(x).movedim(split.subspace.feature_axis, -1)
    assert [output.name for output in verdict.outputs] == list(found)
    identity = torch.eye(split.subspace.width, dtype=torch.float64)
    assert (split.subspace.Q.T @ split.subspace.Q - identity).abs().max() <= 1e-12
    # the parts are f' Q, and their norms add up, to the rounding of Q and of sums in float32
    turned = split.subspace.coordinates(features)
    parts = torch.cat(
        [found[part].movedim(split.subspace.feature_axis, -1) for part in PARTS if part in found], -1
    )
    norm = turned.norm(dim=-1)
    assert ((parts.double() - turned).norm(dim=-1) <= 1e-5 * norm).all()
    assert ((parts.double().norm(dim=-1) - norm).abs() <= 1e-5 * norm).all()
    done = split.export_onnx(path)
    assert done.verdict is not None
    assert done.verdict.ok
    assert split.report.onnx is not None
    there = on_onnxruntime(path, x)
    assert list(there) == list(found)
    for name, value in found.items():
        assert there[name].shape == value.shape
        assert (there[name] - value).abs().max() <= 1e-4 * value.abs().max()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "rank", "rest"), [(10, 10, 503), (1000, 513, 0)])
def test_resnet18(classes: int, rank: int, rest: int, tmp_path: Path) -> None:
    model = network("resnet18", num_classes=classes)
    split = gs.split_head(model, pictures(2), head="fc")
    found = check(split, model, pictures(3, seed=2), tmp_path / "split.onnx")
    assert split.subspace.rank == rank
    assert found["class_features"].shape == (3, rank)
    assert ("residual_features" in found) == bool(rest)
    if rest:
        assert found["residual_features"].shape == (3, rest)
    with torch.no_grad():
        assert torch.equal(found["logits"], model(pictures(3, seed=2)))
    assert set(model.state_dict()) <= set(split.module.state_dict())
    assert type(split.module.get_submodule("fc_class_features")) is nn.Linear


@pytest.mark.slow
def test_resnet18_through_r(tmp_path: Path) -> None:
    model = network("resnet18", num_classes=10)
    split = gs.split_head(model, pictures(2), keep_head=False)
    found = check(split, model, pictures(3, seed=2), tmp_path / "split.onnx")
    module = split.module
    assert not hasattr(module, "fc")
    with torch.no_grad():
        wanted = model(pictures(3, seed=2))
        assert (found["logits"] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        # here the logits are computed of the class-specific features and of nothing else
        assert torch.equal(module.get_submodule("fc_logits")(found["class_features"]), found["logits"])


@pytest.mark.sweep
def test_fcn_resnet50_per_pixel(tmp_path: Path) -> None:
    model = network("fcn_resnet50", num_classes=21, aux_loss=True)
    x = pictures(2, 48, seed=2)
    split = gs.split_head(model, pictures(2, 48))
    found = check(split, model, x, tmp_path / "split.onnx")
    assert split.subspace.head == "classifier.4"
    assert list(found) == ["out", "aux", "logits", *PARTS]
    assert found["logits"].shape == (2, 21, 6, 6)
    assert [found[part].shape for part in PARTS] == [(2, 21, 6, 6), (2, 492, 6, 6)]
    with torch.no_grad():
        wanted = model(x)
    assert torch.equal(found["out"], wanted["out"])
    assert torch.equal(found["aux"], wanted["aux"])
    other = gs.head_subspace(model, pictures(2, 48), head="aux_classifier.4")
    assert (other.rank, other.width) == (21, 257)


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "digits"))
    for name in ("data", "network"):
        sys.modules.pop(name, None)
    import data
    import network

    yield network.trained(), data.load_split()[1]
    for name in ("data", "network"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_digits_network(digits: Any, tmp_path: Path) -> None:
    model, (images, labels) = digits
    split = gs.split_head(model, images[:4])
    found = check(split, model, images, tmp_path / "split.onnx")
    assert split.subspace.head == "classify"
    with torch.no_grad():
        assert torch.equal(found["logits"], model(images))
    # trained weights: the ten classes are apart, and the features lie mostly where they are told apart
    assert (split.subspace.rank, split.subspace.width) == (10, 33)
    energy = split.subspace.energy(images.split(100))
    assert energy.vectors == len(images)
    assert energy.variance_share > 0.5
    # the class-specific features alone classify the test pictures
    again = found["class_features"].double() @ split.subspace.R
    assert (again.argmax(1) == labels).float().mean() > 0.98


# -- the subspace and its energy -------------------------------------------------------------------------


class Flat(nn.Module):
    """A head that reads its input as it is, in `(N, C)` or per pixel."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.head(x if scale is None else x * scale)


def linear(bias: bool) -> Flat:
    torch.manual_seed(0)
    return Flat(nn.Linear(12, 3, bias=bias)).double()


@pytest.mark.parametrize(
    ("head", "shape", "axis"),
    [
        (lambda: nn.Linear(12, 3), (2, 5, 12), 2),
        (lambda: nn.Linear(12, 3, bias=False), (2, 4, 5, 12), 3),
        (lambda: nn.Conv1d(12, 3, 1), (2, 12, 5), 1),
        (lambda: nn.Conv3d(12, 3, 1), (2, 12, 2, 3, 4), 1),
        (lambda: nn.Conv2d(12, 3, 1), (12, 4, 5), 0),
    ],
    ids=["tokens", "grid", "conv1d", "conv3d", "no-batch"],
)
def test_the_axis_of_the_features(head: Any, shape: tuple[int, ...], axis: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Flat(head()).eval()
    x = torch.randn(shape)
    split = gs.split_head(model, x)
    assert split.subspace.feature_axis == axis
    found = check(split, model, x, tmp_path / "split.onnx")
    assert [found[part].shape[axis] for part in PARTS] == [3, split.subspace.width - 3]
    assert torch.equal(found["logits"], model(x))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_energy_is_that_of_all_data_at_once(bias: bool) -> None:
    x = torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 100
    found = gs.head_subspace(linear(bias), x[:2])
    energy = found.energy([x[:1], x[1:20], x[20:20], x[20:]])
    whole = torch.cat([x, torch.ones(50, 1).double()], 1)[:, : found.width]
    inside = whole @ found.Q[:, :3]
    assert energy.vectors == 50
    assert energy.energy == pytest.approx(float(whole.square().sum(1).mean()), rel=1e-12)
    assert energy.class_energy == pytest.approx(float(inside.square().sum(1).mean()), rel=1e-12)
    assert energy.variance == pytest.approx(float(whole.var(0, correction=0).sum()), rel=1e-11)
    assert energy.class_variance == pytest.approx(float(inside.var(0, correction=0).sum()), rel=1e-11)
    assert energy.share == energy.class_energy / energy.energy
    assert 0 < energy.variance_share < 1


def test_energy_of_features_in_one_of_the_spaces() -> None:
    model = linear(bias=False)
    found = gs.head_subspace(model, torch.ones(2, 12).double())
    mix = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for kept, share in ((slice(0, 3), 1.0), (slice(3, 12), 0.0)):
        x = mix[:, kept] @ found.Q[:, kept].T
        assert found.energy([x]).share == pytest.approx(share, abs=1e-14)
        assert found.energy([x]).variance_share == pytest.approx(share, abs=1e-14)
    still = found.energy([torch.zeros(3, 12).double()])
    assert still.share != still.share
    assert still.variance_share != still.variance_share


def test_energy_per_pixel_counts_positions() -> None:
    torch.manual_seed(0)
    model = Flat(nn.Conv2d(12, 3, 1))
    x = torch.randn(4, 12, 5, 6)
    found = gs.head_subspace(model, x)
    energy = found.energy([x[:1], x[1:]])
    assert energy.vectors == 4 * 5 * 6
    assert energy.energy == pytest.approx(float(x.double().square().sum(1).mean()) + 1, rel=1e-12)


def test_nothing_is_held_of_the_data() -> None:
    seen: list[int] = []

    def batches() -> Any:
        for seed in range(5):
            seen.append(seed)
            yield torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    found = gs.head_subspace(linear(True), torch.ones(2, 12).double())
    assert found.energy(batches()).vectors == 15
    assert seen == list(range(5))


def test_inputs_in_every_form() -> None:
    x, scale = torch.randn(4, 12).double(), torch.randn(12).double()
    for example in ((x, scale), {"x": x, "scale": scale}):
        found = gs.head_subspace(linear(True), example)
        assert torch.equal(found.features_of(example), x * scale)
        assert found.energy([example]).vectors == 4


def test_inputs_are_checked_as_those_of_a_captured_graph() -> None:
    """What the graph does not hold for is declined by the split network and on the way to its features."""
    model = linear(True)
    split = gs.split_head(model, torch.ones(2, 12).double())
    for run in (split.module, split.graph_module, split.subspace.features_of):
        assert run(torch.ones(5, 12).double()) is not None
        with pytest.raises(ValueError, match="12"):
            run(torch.ones(5, 11).double())


def test_a_loader_of_pairs_is_told_from_inputs() -> None:
    found = gs.head_subspace(linear(True), torch.ones(2, 12).double())
    with pytest.raises(ValueError, match=r"holds 2 inputs, the network takes 1 \(x\).*for x, _ in loader"):
        found.energy([(torch.ones(2, 12).double(), torch.zeros(2))])
    with pytest.raises(ValueError, match="no features were seen"):
        found.energy([])


def test_head_subspace_options_and_errors() -> None:
    model = linear(True)
    x = torch.ones(2, 12).double()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = gs.head_subspace(model, x, head="head")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (found.head, found.rank, found.width, found.bias) == ("head", 3, 13, True)
    assert torch.allclose(
        found.Q[:, :3] @ found.R, torch.cat([model.head.weight, model.head.bias[:, None]], 1).T
    )
    assert gs.head_subspace(model, x, rtol=0.999).rank == 1
    with pytest.raises(gs.PassError, match="cannot take the head of Flat: the network has no layer at 'fc'"):
        gs.head_subspace(model, x, head="fc")
    with pytest.raises(ValueError, match="rtol"):
        gs.head_subspace(model, x, rtol=2)


# -- the way through -------------------------------------------------------------------------------------


def test_splits_what_optimize_made_and_what_was_split_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trunk = [nn.Conv2d(3, 8, 3), warmed(nn.BatchNorm2d(8)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*trunk, nn.Linear(8, 6), nn.Linear(6, 4)).eval()
    x = pictures(2, 8)
    folded = gs.optimize(model, x)
    split = gs.split_head(folded.module, x)
    check(split, folded.module, pictures(3, 8), tmp_path / "split.onnx")
    assert split.subspace.features == 8
    assert gs.verify(model, _Logits(split.module), x, dynamic_batch=True).ok
    with pytest.raises(gs.PassError, match="has the outputs 'logits' and 'class_features' already"):
        gs.split_head(split.module, x)


class _Logits(nn.Module):
    def __init__(self, split: nn.Module) -> None:
        super().__init__()
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        return self.split(x)["logits"]


def test_saves_an_exported_program(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Flat(nn.Linear(12, 3))
    split = gs.split_head(model, torch.randn(2, 12))
    loaded = torch.export.load(split.save(tmp_path / "split.pt2")).module()
    x = torch.randn(5, 12)
    with torch.no_grad():
        assert {name: value.shape for name, value in loaded(x).items()} == {
            "logits": (5, 3),
            "class_features": (5, 3),
            "residual_features": (5, 10),
        }
        assert torch.equal(loaded(x)["logits"], model(x))


def test_a_file_that_differs_is_not_left_behind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    split = gs.split_head(Flat(nn.Linear(12, 3)), torch.randn(2, 12))
    with torch.no_grad():
        split.module.get_submodule("head_residual_features").weight[0, 0] += 1e-3
    with pytest.raises(gs.VerificationError, match="residual_features"):
        split.export_onnx(tmp_path / "split.onnx")
    assert not list(tmp_path.iterdir())
