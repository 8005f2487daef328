"""The networks of the benchmark, made by code with weights that look trained."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo.entry import as_trained

__all__ = ["BATCHES", "Made", "Network", "first", "networks"]

BATCHES = (1, 8)
"""Numbers of samples that results are checked and timed at."""

TREE = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Made:
    """A network in evaluation mode.

    Attributes:
        model: The network.
        inputs: A batch of 8: one tensor, or a mapping of keyword inputs.
        own: What the network's authors give to make it ready for inference, where they do; it may change
            `model`.
    """

    model: nn.Module
    inputs: Any
    own: Callable[[], nn.Module] | None = None


@dataclass(frozen=True)
class Network:
    """A network of the benchmark.

    Attributes:
        name: Unique, and the name of its folder.
        group: The group of the table.
        make: Makes it; the same weights each time.
        note: What is not the default about it.
    """

    name: str
    group: str
    make: Callable[[], Made]
    note: str = ""


def first(inputs: Any, samples: int) -> Any:
    """The first samples of a batch, stored apart."""
    return torch.utils._pytree.tree_map(lambda value: value[:samples].clone(), inputs)


class Normalised(nn.Module):
    """A classifier of pictures from 0 to 1, the statistics of ImageNet in front."""

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, 3, h, w) to logits."""
        logits: Tensor = self.classifier((x - self.mean) / self.std)
        return logits


def _trained(model: nn.Module, inputs: Any) -> nn.Module:
    torch.manual_seed(1)
    return as_trained(model, first(inputs, 2))


def _timm(name: str, *, reparameterised: bool = False, normalised: bool = False, **options: Any) -> Made:
    timm = importlib.import_module("timm")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **options)
    pictures = torch.rand(8, 3, 224, 224) if normalised else torch.randn(8, 3, 224, 224)
    if normalised:
        model = Normalised(model)
    model = _trained(model, pictures)
    reparameterise = importlib.import_module("timm.utils").reparameterize_model
    return Made(model, pictures, partial(reparameterise, model) if reparameterised else None)


def _torchvision(name: str, *, normalised: bool = False) -> Made:
    torchvision = importlib.import_module("torchvision")
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    pictures = torch.rand(8, 3, 224, 224) if normalised else torch.randn(8, 3, 224, 224)
    return Made(_trained(Normalised(model) if normalised else model, pictures), pictures)


VOCABULARY, LENGTH = 8000, 64
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": 128}
LORA: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", BERT, {"target_modules": ["query", "key", "value", "dense"]}),
    "gpt2": (
        "GPT2LMHeadModel",
        GPT2,
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
}


def _lora(base: str) -> Made:
    peft, transformers = importlib.import_module("peft"), importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    kind, options, layers = LORA[base]
    made = getattr(transformers, kind)
    config = made.config_class(**options)
    config.use_cache = False
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(made(config), peft.LoraConfig(r=16, lora_alpha=32, **layers))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    ids = torch.randint(0, VOCABULARY, (8, LENGTH))
    ids[0, :2] = torch.tensor([0, VOCABULARY - 1])  # the whole range, so that verification draws from it
    mask = torch.ones(8, LENGTH, dtype=torch.int64)
    mask[1::2, LENGTH - 8 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    # The wrapper's own forward takes anything; what it calls is the network with adapters in it.
    model = _trained(wrapped.get_base_model(), inputs)
    return Made(model, inputs, wrapped.merge_and_unload)


def _digits() -> Made:
    sys.path.append(str(TREE / "examples" / "digits"))
    data, network = importlib.import_module("data"), importlib.import_module("network")
    _, (pictures, _) = data.load_split()
    return Made(network.trained(), pictures[:8].clone())


def networks() -> list[Network]:
    """All networks, by group."""
    found: list[Network] = []
    training = ("repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9", "repghostnet_100", "levit_128")
    for name in training:
        found.append(Network(name, "training form", partial(_timm, name, reparameterised=True)))
    found.append(Network("efficientformer_l1", "training form", partial(_timm, "efficientformer_l1")))
    for base, (_, options, _) in LORA.items():
        width = options.get("hidden_size", options.get("n_embd"))
        found.append(
            Network(
                f"lora_{base}", "LoRA", partial(_lora, base), f"6 layers of {width}, {LENGTH} tokens, r=16"
            )
        )
    for name in ("cait_xxs24_224", "deit3_small_patch16_224"):
        found.append(Network(name, "layer scale", partial(_timm, name)))
    name = "vit_small_patch14_dinov2"
    found.append(Network(name, "layer scale", partial(_timm, name, img_size=224), "224 x 224"))
    for name in ("resnet18", "vgg11"):
        make = partial(_torchvision, name, normalised=True)
        found.append(Network(f"normalised_{name}", "normalised input", make))
    name = "convnext_atto"
    found.append(Network(f"normalised_{name}", "normalised input", partial(_timm, name, normalised=True)))
    found.append(Network("digits", "trained example", _digits, "examples/digits, 8 x 8"))
    for name in ("resnet50", "mobilenet_v3_large", "vit_b_16"):
        found.append(Network(name, "nothing to gain", partial(_torchvision, name)))
    return found
