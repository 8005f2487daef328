"""Networks with adapters of peft, trained ones by their looks: none of them at zero."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn

from zoo.entry import Entry
from zoo.text import GPT, GROUPED, SMALL, model_of, tokens

__all__ = ["entries"]

BERT_LAYERS = ["query", "key", "value", "dense"]


def _bert() -> tuple[nn.Module, Any]:
    return model_of("BertModel", SMALL), tokens()


def _gpt2() -> tuple[nn.Module, Any]:
    return model_of("GPT2LMHeadModel", GPT), tokens()


def _llama() -> tuple[nn.Module, Any]:
    return model_of("LlamaForCausalLM", GROUPED), tokens()


def _resnet() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None).eval(), torch.randn(2, 3, 64, 64)


BASES = {"bert": _bert, "gpt2": _gpt2, "llama": _llama, "resnet18": _resnet}

# Base, kind of configuration, its options.
WRAPPED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora-linear": ("bert", "LoraConfig", {"r": 4, "target_modules": BERT_LAYERS}),
    "rslora": ("bert", "LoraConfig", {"r": 4, "target_modules": BERT_LAYERS, "use_rslora": True}),
    "lora-bias": ("bert", "LoraConfig", {"r": 4, "target_modules": BERT_LAYERS, "lora_bias": True}),
    "dora": ("bert", "LoraConfig", {"r": 4, "target_modules": BERT_LAYERS, "use_dora": True}),
    "lora-embedding": ("bert", "LoraConfig", {"r": 4, "target_modules": ["word_embeddings", "query"]}),
    "lora-gpt2": (
        "gpt2",
        "LoraConfig",
        {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "lora-llama": ("llama", "LoraConfig", {"r": 4, "target_modules": "all-linear"}),
    "lora-conv": ("resnet18", "LoraConfig", {"r": 4, "target_modules": ["conv1", "conv2", "fc"]}),
    "dora-conv": ("resnet18", "LoraConfig", {"r": 4, "target_modules": ["conv1", "conv2"], "use_dora": True}),
    "ia3": (
        "bert",
        "IA3Config",
        {"target_modules": ["key", "value", "dense"], "feedforward_modules": ["dense"]},
    ),
    "loha": ("bert", "LoHaConfig", {"r": 4, "target_modules": BERT_LAYERS}),
    "lokr": ("bert", "LoKrConfig", {"r": 4, "target_modules": BERT_LAYERS}),
    "oft": ("bert", "OFTConfig", {"r": 4, "oft_block_size": 0, "target_modules": ["query", "key"]}),
    "vera": ("bert", "VeraConfig", {"r": 4, "target_modules": ["query", "key", "value"]}),
    "adalora": (
        "bert",
        "AdaLoraConfig",
        {"init_r": 4, "target_r": 4, "total_step": 10, "target_modules": ["query", "value"]},
    ),
}


def _warm(model: nn.Module) -> None:
    """Give what peft starts at a constant, mostly zero, values of its own."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            own = any(part in name for part in ("lora_", "ia3_", "hada_", "lokr_", "oft_", "vera_lambda"))
            if own and "magnitude" not in name and bool((parameter == parameter.flatten()[0]).all()):
                if "ia3_" in name or "lambda" in name:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(std=0.05)


def _wrapped(base: str, kind: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    peft = importlib.import_module("peft")
    model, inputs = BASES[base]()
    found = peft.get_peft_model(model, getattr(peft, kind)(**options)).get_base_model().eval()
    _warm(found)
    return found, inputs


def _several() -> tuple[nn.Module, Any]:
    """Two adapters of different ranks and layers, both active."""
    peft = importlib.import_module("peft")
    model, inputs = _bert()
    found = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=BERT_LAYERS), adapter_name="one")
    found.add_adapter("two", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["query", "value"]))
    found.base_model.set_adapter(["one", "two"])
    base: nn.Module = found.get_base_model().eval()
    _warm(base)
    return base, inputs


def _whole() -> tuple[nn.Module, Any]:
    """The wrapper itself, whose forward takes anything."""
    peft = importlib.import_module("peft")
    model, inputs = _bert()
    found: nn.Module = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=BERT_LAYERS)).eval()
    _warm(found)
    return found, inputs


def entries() -> list[Entry]:
    """LoRA on Linear, Conv1D, Embedding and convolutions, several at once, DoRA and the other methods."""
    found = [Entry(f"peft/{name}", "peft", partial(_wrapped, *row), row[0]) for name, row in WRAPPED.items()]
    found.append(Entry("peft/lora-several", "peft", _several, "bert"))
    found.append(Entry("peft/lora-wrapper", "peft", _whole, "bert"))
    return found
