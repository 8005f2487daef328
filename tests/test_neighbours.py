"""What is used on a network besides: all of it works on the result, by the names that the layers had."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torchvision
from random_chains import warmed
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphsurgery as gs


@dataclass
class Case:
    """A network, what was made of it, and what the network answers."""

    model: nn.Module
    inputs: tuple[Any, ...] | dict[str, Any]
    result: gs.OptimizeResult
    peft: list[str]  # targets, by the names in the original

    def run(self, module: Callable[..., Any], dtype: torch.dtype | None = None) -> list[Tensor]:
        given = pytree.tree_map(lambda x: x.to(dtype) if dtype and x.is_floating_point() else x, self.inputs)
        with torch.no_grad():
            found = module(**given) if isinstance(given, dict) else module(*given)
        return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]

    def check(self, module: Callable[..., Any]) -> None:
        for got, wanted in zip(self.run(module), self.run(self.model), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def resnet() -> tuple[nn.Module, Any, list[str]]:
    model = torchvision.models.resnet18(num_classes=7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            warmed(module)
    return model, (torch.randn(2, 3, 32, 32).double(),), ["layer1.0.conv1", "fc"]


def vit() -> tuple[nn.Module, Any, list[str]]:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_classes=7, init_values=0.5
    )
    return model, (torch.randn(2, 3, 32, 32).double(),), ["qkv", "fc1"]


def bert() -> tuple[nn.Module, Any, list[str]]:
    import transformers  # here, for it takes seconds

    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    ids = torch.randint(0, 50, (2, 7))
    return transformers.BertModel(config), {"input_ids": ids, "attention_mask": mask}, ["query", "value"]


@pytest.fixture(scope="module", params=[resnet, vit, bert], ids=lambda build: build.__name__)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    model, inputs, targets = request.param()
    model = model.double().eval()
    found = Case(model, inputs, gs.optimize(model, inputs, verify="off"), targets)
    found.check(found.result.module)
    return found


def layers(module: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Conv2d, nn.Linear, nn.Embedding, nn.LayerNorm, nn.BatchNorm2d)
    return {name: part for name, part in module.named_modules() if isinstance(part, kinds)}


def unchanged(case: Case) -> list[str]:
    """Layers whose weights are those of the original."""
    before = case.model.state_dict()
    after = case.result.module.state_dict()
    own = {name: {k for k in after if k.startswith(name + ".")} for name in layers(case.result.module)}
    return [
        name
        for name, keys in own.items()
        if keys and all(k in before and torch.equal(before[k], after[k]) for k in keys)
    ]


def test_layers_have_the_names_that_they_had(case: Case) -> None:
    before, after = layers(case.model), layers(case.result.module)
    assert set(after) <= set(before)
    assert all(isinstance(before[name], type(after[name])) for name in after)  # timm has norms of its own
    # A folded layer is called by the part that carries most: no conv, linear or embedding has lost its name.
    heavy = {name for name, part in before.items() if not isinstance(part, (nn.LayerNorm, nn.BatchNorm2d))}
    assert heavy <= set(after)
    assert {name for name, _ in case.model.named_modules()} >= set(after)


def test_hooks_by_name_see_what_they_saw(case: Case) -> None:
    names = unchanged(case)
    assert names
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    handles = [
        module.get_submodule(name).register_forward_hook(
            lambda _, given, out, name=name: seen[name].append((given[0], out))
        )
        for module in (case.model, case.result.module)
        for name in names
    ]
    case.run(case.model)
    case.run(case.result.module)
    for handle in handles:
        handle.remove()
    for name, calls in seen.items():
        assert len(calls) == 2, name
        if isinstance(case.model.get_submodule(name), nn.LayerNorm):
            continue  # what it reads may be shifted by a layer that took in its neighbour's bias
        for wanted, got in zip(*calls, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_a_hook_that_changes_the_output_changes_the_result(case: Case) -> None:
    module = copy.deepcopy(case.result.module)
    module.get_submodule(unchanged(case)[-1]).register_forward_hook(lambda _, given, out: out + 1)
    assert not torch.allclose(case.run(module)[-1], case.run(case.result.module)[-1])


def test_state_dicts_go_from_one_result_to_another(case: Case) -> None:
    second = copy.deepcopy(case.result.module)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    second.load_state_dict(case.result.module.state_dict())
    case.check(second)
    own = second.state_dict()  # a kernel that reads one position of a map alone has become smaller
    matching = {k: v for k, v in case.model.state_dict().items() if k in own and v.shape == own[k].shape}
    assert second.load_state_dict(matching, strict=False).unexpected_keys == []
    assert all(torch.equal(second.state_dict()[name], value) for name, value in matching.items())


def test_deepcopy_and_pickle(case: Case) -> None:
    buffer = io.BytesIO()
    torch.save(case.result.module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    names = list(case.result.module.state_dict())
    for twin in (copy.deepcopy(case.result.module), loaded, copy.deepcopy(loaded)):
        case.check(twin)
        assert sorted(twin.state_dict()) == sorted(names)
        assert not any(part.training for part in twin.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_casts(case: Case, dtype: torch.dtype) -> None:
    module = copy.deepcopy(case.result.module).to(dtype)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    wanted = case.run(copy.deepcopy(case.model).to(dtype), dtype)
    exact = case.run(case.model)
    for got, low, true in zip(case.run(module, dtype), wanted, exact, strict=True):
        assert got.dtype == dtype
        # no further from the truth than a few times what the original is
        assert (got.double() - true).abs().max() <= 4 * (low.double() - true).abs().max()


def test_export_again(case: Case) -> None:
    given = case.inputs
    args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
    program = torch.export.export(case.result.module, args, kwargs, strict=False)
    case.check(program.module())
    assert set(program.state_dict) <= {name for name, _ in case.result.module.named_parameters()} | {
        name for name, _ in case.result.module.named_buffers()
    }


@pytest.mark.sweep
def test_compile(case: Case) -> None:
    torch.compiler.reset()
    case.check(torch.compile(case.result.module, backend="eager", fullgraph=True))
    torch.compiler.reset()


# peft still reads what transformers has renamed
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_finds_its_targets_by_name(case: Case) -> None:
    import peft  # here, for it takes seconds

    config = peft.LoraConfig(r=2, target_modules=case.peft)
    original = peft.inject_adapter_in_model(config, copy.deepcopy(case.model))
    module = peft.inject_adapter_in_model(config, copy.deepcopy(case.result.module))
    adapters = [sorted(n for n, _ in m.named_parameters() if "lora_" in n) for m in (original, module)]
    assert adapters[0] == adapters[1] != []
    case.check(module)  # adapters start at zero
    for m in (original, module):
        generator = torch.Generator().manual_seed(0)
        for name, parameter in sorted(m.named_parameters()):
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1
    trained = case.run(original)
    assert not torch.allclose(trained[-1], case.run(case.model)[-1])
    if set(case.model.state_dict()) == set(case.result.module.state_dict()):  # no layer was folded
        for got, wanted in zip(case.run(module), trained, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "work", [gs.optimize, gs.optimize_parts, gs.inspect], ids=["whole", "parts", "inspect"]
)
def test_what_torchao_has_quantised_is_refused_by_name(work: Callable[..., Any]) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(2, 64)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(gs.CaptureError, match=r"'0\.weight' is of type \w+, .* before it is quantised"):
        work(model, x)


# torchao registers classes in a way that torch has deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_quantises_as_much_as_in_the_original(case: Case, kind: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def quantised(module: nn.Module) -> tuple[list[Tensor], int]:
        twin = copy.deepcopy(module).float()
        quantization.quantize_(twin, getattr(quantization, kind)())
        count = sum(type(parameter) is not nn.Parameter for parameter in twin.parameters())
        return case.run(twin, torch.float32), count

    wanted, many = quantised(case.model)
    got, count = quantised(case.result.module)
    assert count == many > 0
    exact = case.run(case.model)
    for mine, theirs, true in zip(got, wanted, exact, strict=True):
        assert (mine - true).abs().max() <= 2 * (theirs - true).abs().max()
