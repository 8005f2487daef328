"""Restore: layers at the paths they had, one module per weight, a result that behaves like any nn.Module."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.export import Dim, export

from graphsurgery.capture import capture
from graphsurgery.graph import annotate, get_attr_value, set_attr, structural_hash
from graphsurgery.restore import restore

aten = torch.ops.aten
LAYERS = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.Embedding,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layers(model: nn.Module) -> dict[str, str]:
    return {name: repr(module) for name, module in model.named_modules() if isinstance(module, LAYERS)}


def randomized(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif tensor.is_floating_point():
                tensor.normal_()
    return model.eval()


def assert_same(a: nn.Module, b: nn.Module, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        left, spec_left = torch.utils._pytree.tree_flatten(a(*args, **kwargs))
        right, spec_right = torch.utils._pytree.tree_flatten(b(*args, **kwargs))
    assert spec_left == spec_right
    for x, y in zip(left, right, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


IMAGE = (2, 6, 9, 9)
CASES: list[tuple[str, Callable[[], nn.Module], torch.Tensor]] = [
    ("conv1d", lambda: nn.Conv1d(6, 4, 3, stride=2, padding=1, dilation=2, groups=2), torch.randn(2, 6, 20)),
    (
        "conv2d",
        lambda: nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
        torch.randn(IMAGE),
    ),
    ("conv2d-same", lambda: nn.Conv2d(6, 4, 3, padding="same"), torch.randn(IMAGE)),
    ("conv3d", lambda: nn.Conv3d(6, 4, 3), torch.randn(2, 6, 5, 5, 5)),
    ("transpose1d", lambda: nn.ConvTranspose1d(6, 4, 3, 2, 1, 1, groups=2), torch.randn(2, 6, 9)),
    ("transpose2d", lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2, dilation=2), torch.randn(IMAGE)),
    ("transpose3d", lambda: nn.ConvTranspose3d(6, 4, 3, bias=False), torch.randn(2, 6, 5, 5, 5)),
    ("linear", lambda: nn.Linear(9, 4, bias=False), torch.randn(IMAGE)),
    ("bn1d", lambda: nn.BatchNorm1d(6, eps=1e-2, momentum=0.3), torch.randn(2, 6)),
    ("bn1d-3", lambda: nn.BatchNorm1d(6, momentum=None), torch.randn(2, 6, 5)),
    ("bn2d-plain", lambda: nn.BatchNorm2d(6, affine=False), torch.randn(IMAGE)),
    ("bn2d-batch", lambda: nn.BatchNorm2d(6, track_running_stats=False), torch.randn(IMAGE)),
    ("bn3d", lambda: nn.BatchNorm3d(6), torch.randn(2, 6, 5, 5, 5)),
    ("layer-norm", lambda: nn.LayerNorm((9, 9), eps=1e-3, bias=False), torch.randn(IMAGE)),
    ("rms-norm", lambda: nn.RMSNorm(9, eps=1e-3), torch.randn(IMAGE)),
    ("group-norm", lambda: nn.GroupNorm(3, 6, eps=1e-3), torch.randn(IMAGE)),
    ("embedding", lambda: nn.Embedding(7, 4, padding_idx=2), torch.randint(0, 7, (2, 5))),
]


@pytest.mark.parametrize(("make", "x"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_restores_the_layer_as_it_was(make: Callable[[], nn.Module], x: torch.Tensor) -> None:
    model = randomized(nn.Sequential(nn.Sequential(make())))
    restored = restore(capture(model, x))
    assert layers(restored) == layers(model)
    assert restored.state_dict().keys() == model.state_dict().keys()
    assert_same(restored, model, x)
    assert not any(node.op == "get_attr" for node in restored.graph.nodes)


class Mixed(nn.Module):
    """Repeated calls, tied weights, a computed weight, bare parameters, keyword inputs and nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8, padding_idx=0)
        self.norm = nn.LayerNorm(8)
        self.twice = nn.Linear(8, 8)
        self.scaled = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.w1 = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("scale", torch.rand(8), persistent=False)

    def forward(self, ids: torch.Tensor, *, mask: torch.Tensor) -> dict[str, Any]:
        x = self.norm(self.emb(ids))
        x = self.twice(F.gelu(self.twice(x)))
        x = F.linear(self.scaled(x), self.w1) * self.scale
        x = x * mask.unsqueeze(-1)
        return {"logits": self.head(x), "more": (x, [x.sum(1)], None)}


def mixed() -> tuple[nn.Module, fx.GraphModule, dict[str, torch.Tensor]]:
    model = Mixed().double().eval()
    inputs = {"ids": torch.randint(0, 11, (2, 5)), "mask": torch.rand(2, 5, dtype=torch.float64)}
    return model, restore(capture(model, inputs)), inputs


def test_signature_and_structure_are_kept() -> None:
    model, restored, _ = mixed()
    for batch in (1, 2, 5):
        ids, mask = torch.randint(0, 11, (batch, 5)), torch.rand(batch, 5, dtype=torch.float64)
        assert_same(restored, model, ids, mask=mask)
        assert_same(restored, model, ids=ids, mask=mask)
    assert not restored.training


def test_repeated_calls_share_a_module_and_tied_weights_stay_tied() -> None:
    _, restored, _ = mixed()
    calls = [str(node.target) for node in restored.graph.nodes if node.op == "call_module"]
    assert calls.count("twice") == 2
    assert isinstance(restored.head, nn.Linear)
    assert isinstance(restored.emb, nn.Embedding)
    assert restored.head.weight is restored.emb.weight
    assert "self.twice(" in restored.code


def test_what_has_no_module_stays_functional() -> None:
    _, restored, _ = mixed()
    linear = [node for node in restored.graph.nodes if node.target is aten.linear.default]
    assert len(linear) == 1  # the weight of `scaled` is computed
    assert "scaled.parametrizations.weight.original0" in restored.state_dict()
    assert isinstance(restored.w1_linear, nn.Linear)  # a bare parameter
    assert "w1" not in restored.state_dict()


class SharedConfigurations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        z = F.conv2d(x, self.conv.weight, None, padding=1)
        w = F.conv2d(x, self.conv.weight, self.conv.bias, padding=2, dilation=2)
        return y + z + w + self.conv.weight.sum()


def test_a_weight_of_several_configurations_has_one_module() -> None:
    model = SharedConfigurations()
    restored = restore(capture(model, torch.randn(2, 3, 6, 6)))
    assert_same(restored, model, torch.randn(5, 3, 6, 6))
    calls = [node for node in restored.graph.nodes if node.op == "call_module"]
    functional = [node for node in restored.graph.nodes if node.target is aten.conv2d.default]
    assert (len(calls), len(functional)) == (1, 2)
    assert restored.state_dict().keys() == model.state_dict().keys()


class BiasElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(x, self.a.weight, self.b.bias)
        return F.linear(x, self.b.weight) + F.linear(x, self.a.weight, self.a.bias)


def test_a_bias_of_another_module_stays_functional() -> None:
    model = BiasElsewhere()
    restored = restore(capture(model, torch.randn(2, 3)))
    assert_same(restored, model, torch.randn(5, 3))
    assert restored.state_dict().keys() == model.state_dict().keys()
    assert [str(n.target) for n in restored.graph.nodes if n.op == "call_module"] == ["a"]


class LinearWithChildren(nn.Linear):
    """As adapters are made: a layer with parameters of its own and layers inside."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.lora_a = nn.Linear(4, 2, bias=False)
        self.gate = nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) * self.gate + self.lora_a(x).sum(-1, keepdim=True)


def test_a_layer_with_layers_inside() -> None:
    model = nn.Sequential(LinearWithChildren())
    restored = restore(capture(model, torch.randn(2, 4)))
    assert_same(restored, model, torch.randn(5, 4))
    assert restored.state_dict().keys() == model.state_dict().keys()
    assert isinstance(restored.get_submodule("0"), nn.Linear)
    assert_same(copy.deepcopy(restored), model, torch.randn(5, 4))


def test_a_bare_layer_is_the_whole_model() -> None:
    model = nn.Linear(3, 4)
    restored = restore(capture(model, torch.randn(2, 3)))
    assert_same(restored, model, torch.randn(5, 3))
    assert isinstance(restored.weight_linear, nn.Linear)


def test_a_layer_that_a_pass_wrote() -> None:
    gm = capture(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU()), torch.randn(2, 3, 8, 8))
    conv = next(node for node in gm.graph.nodes if node.target is aten.conv2d.default)
    set_attr(gm, "0.bias", torch.randn(4), parameter=True)
    with gm.graph.inserting_before(conv):
        bias = gm.graph.get_attr("0.bias")
    annotate(gm, bias)
    conv.args = (*conv.args[:2], bias, *conv.args[3:])
    gm.recompile()
    restored = restore(gm)
    assert repr(restored.get_submodule("0")) == repr(nn.Conv2d(3, 4, 3))
    assert_same(restored, gm, torch.randn(5, 3, 8, 8))


# -- the result is a module like any other


def test_the_graph_is_not_changed_nor_moved_along() -> None:
    model, _, inputs = mixed()
    gm = capture(model, inputs)
    before = structural_hash(gm)
    restored = restore(gm)
    restored.float()
    assert structural_hash(gm) == before
    assert get_attr_value(gm, "twice.weight").dtype == torch.float64
    assert model.twice.weight.dtype == torch.float64


def test_deepcopy_and_state_dict(tmp_path: Path) -> None:
    model, restored, inputs = mixed()
    twin = copy.deepcopy(restored)
    assert_same(twin, model, **inputs)
    assert twin.state_dict().keys() == restored.state_dict().keys()
    assert not any(module.training for module in twin.modules())
    assert twin.head.weight is twin.emb.weight
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same(restored, model, **inputs)
    torch.save(restored.state_dict(), tmp_path / "state.pt")
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(twin, model, **inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_casts(dtype: torch.dtype) -> None:
    model = randomized(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    )
    restored = restore(capture(model, torch.randn(2, 3, 8, 8)))
    x = torch.randn(2, 3, 8, 8).to(dtype)
    assert_same(restored.to(dtype), model.to(dtype), x)


def test_export_and_scripted_round_trip() -> None:
    model, restored, inputs = mixed()
    shapes = {"ids": {0: Dim.AUTO}, "mask": {0: Dim.AUTO}}
    program = export(restored, (), inputs, dynamic_shapes=shapes)
    assert_same(program.module(), model, ids=torch.randint(0, 11, (5, 5)), mask=torch.rand(5, 5).double())
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    assert_same(capture(loaded, inputs), model, **inputs)


def test_a_second_capture_reads_the_same_names() -> None:
    model, restored, inputs = mixed()
    again = restore(capture(restored, inputs))
    assert again.state_dict().keys() == restored.state_dict().keys()
    assert_same(again, model, **inputs)


def test_requires_grad_and_training_steps() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    restored = restore(capture(model.eval(), torch.randn(2, 3)))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in restored.named_parameters()} == flags
    restored.train()
    optimizer = torch.optim.SGD([p for p in restored.parameters() if p.requires_grad], lr=0.1)
    restored(torch.randn(8, 3)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(restored.get_parameter("2.weight"), kept["2.weight"])
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    restored.eval()
    assert not any(module.training for module in restored.modules())


def test_hooks_fire_on_restored_layers() -> None:
    restored = restore(capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3)))
    seen: list[torch.Size] = []
    restored.get_submodule("0").register_forward_hook(lambda module, args, output: seen.append(output.shape))
    restored(torch.randn(5, 3))
    assert seen == [torch.Size([5, 4])]


# -- networks people use


SWIN = {
    "patch_size": [4, 4],
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": [4, 4],
}


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **options)


def _torchvision(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    return getattr(models, name)(**options)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: _torchvision("resnet18"), 64),
        (lambda: _torchvision("mobilenet_v3_small"), 64),
        (lambda: _torchvision("DenseNet", growth_rate=8, block_config=(2, 3), num_init_features=16), 64),
        (lambda: _torchvision("SwinTransformer", **SWIN), 64),
        (lambda: _timm("test_convnext"), 64),
        (lambda: _timm("test_vit"), 160),
    ],
    ids=["resnet18", "mobilenet_v3_small", "densenet", "swin", "convnext", "vit"],
)
def test_real_networks(make: Callable[[], nn.Module], size: int) -> None:
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    gm = capture(model, torch.randn(1, 3, size, size))
    restored = restore(gm)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, size, size)
        assert_same(gm, model, x)
        assert_same(restored, model, x)
    kept = {
        name
        for name, module in model.named_modules()
        if type(module) in (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    }
    assert kept == {name for name in layers(restored) if name in kept}
    for name in kept:
        assert repr(restored.get_submodule(name)) == repr(model.get_submodule(name))


class Bare(nn.Module):
    """Norms without weight: two modules, one of them called twice, and a function beside a child."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6, elementwise_affine=False)
        self.groups = nn.GroupNorm(2, 6, affine=False)
        self.root = nn.RMSNorm(6, eps=1e-6, elementwise_affine=False)
        self.fc = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.fc(torch.tanh(self.norm(x))))
        return F.layer_norm(self.root(self.groups(y)), (6,))


def test_norms_without_weight_are_modules_under_their_names() -> None:
    model = Bare().eval()
    x = torch.randn(3, 6)
    restored = restore(capture(model, (x,)))
    kinds = {
        name: type(module) for name, module in restored.named_modules() if "Norm" in type(module).__name__
    }
    assert kinds == {"norm": nn.LayerNorm, "groups": nn.GroupNorm, "root": nn.RMSNorm}
    assert sum(node.op == "call_module" and node.target == "norm" for node in restored.graph.nodes) == 2
    assert any(node.op == "call_function" for node in restored.graph.nodes if "norm" in str(node.target))
    torch.testing.assert_close(restored(x), model(x), rtol=0, atol=0)
