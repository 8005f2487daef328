"""Decoders with LoRA: their cache and generation keep working through partial surgery."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from partial_models import part, spoil_after_its_check, statuses
from torch import Tensor, nn

import graphsurgery as gs

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# peft asks transformers by a name that this one deprecates
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

WIDTH = 16
NEW_TOKENS = 8


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=40, n_embd=WIDTH, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=None
    )
    lora = peft.LoraConfig(
        r=2, target_modules=["c_attn", "c_fc"], init_lora_weights=False, fan_in_fan_out=True
    )
    return lora_of(transformers.GPT2LMHeadModel, config, lora)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "gate_proj", "up_proj"], init_lora_weights=False)
    return lora_of(transformers.LlamaForCausalLM, config, lora)


def lora_of(kind: Any, config: Any, lora: Any) -> nn.Module:
    torch.manual_seed(0)
    model = peft.get_peft_model(kind(config), lora).double().eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.3)  # else all logits are nearly alike
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


def assert_same_decoder(model: nn.Module, other: nn.Module) -> None:
    for ids in (tokens(2, 6), tokens(3, 9, seed=1), tokens(1, 3, seed=2)):
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        expected = model.generate(input_ids=ids, **options)
        assert expected.shape == (len(ids), ids.shape[1] + NEW_TOKENS)
        assert torch.equal(other.generate(input_ids=ids, **options), expected)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
            torch.testing.assert_close(other(input_ids=ids).logits, logits, rtol=1e-10, atol=1e-10)
            # one token more, from the cache that a call of the other model has filled
            cached = other(input_ids=ids).past_key_values
            step = other(input_ids=ids[:, :1], past_key_values=cached).logits
            whole = model(input_ids=torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
            torch.testing.assert_close(step, whole, rtol=1e-8, atol=1e-8)


def adapters_in(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_modules() if name.endswith("lora_A")]


@pytest.mark.parametrize("build", [pytest.param(gpt2, marks=pytest.mark.sweep), llama])
def test_generation_with_a_cache_stays_what_it_was(build: Any) -> None:
    model = build()
    result = gs.optimize_parts(
        model, kwargs={"input_ids": tokens(2, 6), "max_new_tokens": 2, "do_sample": False}, method="generate"
    )
    assert type(result.module) is type(model)
    assert adapters_in(model)
    assert adapters_in(result.module) == []
    assert {item.status for item in result.parts if "Cache" not in item.reason} >= {"folded"}
    assert any(item.kind.endswith("MLP") and item.status == "folded" for item in result.parts)
    assert result.verdict is not None
    assert result.verdict.ok
    assert_same_decoder(model, result.module)


@pytest.mark.sweep
def test_a_single_forward_is_enough() -> None:
    model = llama()
    result = gs.optimize_parts(model, {"input_ids": tokens(1, 5)})
    assert statuses(result)[""] == "not-plain"
    assert "DynamicCache" in part(result, "").reason
    assert adapters_in(result.module) == []
    assert result.verdict is not None
    assert result.verdict.verdict is not None  # the logits and what the cache holds
    assert len(result.verdict.verdict.outputs) > 2
    assert_same_decoder(model, result.module)


@pytest.mark.sweep
@pytest.mark.parametrize("build", [gpt2, llama])
def test_detects_and_undoes_a_wrong_graft(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_after_its_check(monkeypatch, lambda module: type(module).__name__.endswith("MLP"))
    model = build()
    result = gs.optimize_parts(model, {"input_ids": tokens(2, 5)})
    wrong = [item for item in result.parts if item.code == "whole-differs"]
    assert [item.kind for item in wrong] == [type(model.get_submodule(wrong[0].path)).__name__]
    assert wrong[0].kind.endswith("MLP")
    assert any(item.status == "folded" for item in result.parts)
    assert_same_decoder(model, result.module)
