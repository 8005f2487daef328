"""transformers architectures for pictures, sound, and pictures with text, from small configurations."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.entry import Entry
from zoo.text import SEQ2SEQ, SMALL, VOCABULARY, model_of, tokens

__all__ = ["entries"]

PATCHES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
WINDOWS = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
STAGES = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
SOUND: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": [32, 32, 32],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}

# Class, configuration, height and width.
PICTURES: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("ViTForImageClassification", PATCHES, 32),
    "deit": ("DeiTForImageClassificationWithTeacher", PATCHES, 32),
    "beit": ("BeitForImageClassification", {**PATCHES, "use_relative_position_bias": True}, 32),
    "dinov2": ("Dinov2ForImageClassification", PATCHES, 32),
    "swin": ("SwinForImageClassification", WINDOWS, 32),
    "swinv2": ("Swinv2ForImageClassification", WINDOWS, 32),
    "yolos": ("YolosForObjectDetection", {**PATCHES, "image_size": [32, 32], "num_detection_tokens": 5}, 32),
    "convnext": ("ConvNextForImageClassification", STAGES, 64),
    "convnextv2": ("ConvNextV2ForImageClassification", STAGES, 64),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32},
        64,
    ),
    "resnet": ("ResNetForImageClassification", {"embedding_size": 16, **STAGES}, 64),
    "regnet": ("RegNetForImageClassification", {"embedding_size": 16, "groups_width": 16, **STAGES}, 64),
    "mobilevit": (
        "MobileViTForImageClassification",
        {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 128], "image_size": 64},
        64,
    ),
    "mobilenet-v1": ("MobileNetV1ForImageClassification", {}, 64),
    "mobilenet-v2": ("MobileNetV2ForImageClassification", {}, 64),
    "poolformer": ("PoolFormerForImageClassification", {**STAGES}, 64),
    "levit": (
        "LevitForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [2, 2, 2],
        },
        64,
    ),
    "cvt": (
        "CvtForImageClassification",
        {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
        64,
    ),
    "pvt": (
        "PvtForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 64, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 8],
        },
        64,
    ),
    "dpt": (
        "DPTForDepthEstimation",
        {
            **PATCHES,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 32, 48, 64],
            "fusion_hidden_size": 32,
            "readout_type": "project",
        },
        32,
    ),
    "focalnet": (
        "FocalNetForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1, 1, 1]},
        32,
    ),
    "vit-mae-decoderless": ("ViTMSNForImageClassification", PATCHES, 32),
    "siglip-vision": ("SiglipVisionModel", PATCHES, 32),
    "clip-vision": ("CLIPVisionModelWithProjection", PATCHES, 32),
    "hiera": (
        "HieraForImageClassification",
        {"embed_dim": 32, "image_size": [64, 64], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]},
        64,
    ),
}
WAVES: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2": ("Wav2Vec2ForCTC", SOUND),
    "wav2vec2-stable": (
        "Wav2Vec2Model",
        {**SOUND, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
    ),
    "hubert": ("HubertModel", SOUND),
    "wavlm": ("WavLMModel", SOUND),
    "data2vec-audio": ("Data2VecAudioModel", SOUND),
    "unispeech": ("UniSpeechModel", SOUND),
}


def _picture(kind: str, options: dict[str, Any], size: int) -> tuple[nn.Module, Any]:
    return model_of(kind, options), {"pixel_values": torch.randn(2, 3, size, size)}


def _wave(kind: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    return model_of(kind, options), {"input_values": torch.randn(2, 800)}


def _spectrogram() -> tuple[nn.Module, Any]:
    options = {**PATCHES, "max_length": 32, "num_mel_bins": 16}
    del options["image_size"]
    return model_of("ASTForAudioClassification", options), {"input_values": torch.randn(2, 32, 16)}


def _whisper() -> tuple[nn.Module, Any]:
    own = {"max_source_positions": 32, "max_target_positions": 32, "num_mel_bins": 16}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    options = {**SEQ2SEQ, **own, **ids}
    del options["max_position_embeddings"]
    inputs: dict[str, Tensor] = {
        "input_features": torch.randn(2, 16, 64),
        "decoder_input_ids": torch.randint(3, VOCABULARY, (2, 7)),
    }
    return model_of("WhisperForConditionalGeneration", options), inputs


def _pair(kind: str) -> tuple[nn.Module, Any]:
    text = {**SMALL, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    options: dict[str, Any] = {"text_config": text, "vision_config": PATCHES}
    if kind == "CLIPModel":
        options["projection_dim"] = 32
    inputs = {**tokens(length=8), "pixel_values": torch.randn(2, 3, 32, 32)}
    if kind == "SiglipModel":
        del inputs["attention_mask"]
    return model_of(kind, options), inputs


def entries() -> list[Entry]:
    """Vision, audio, and both with text."""
    vision, audio = "transformers, vision", "transformers, audio"
    found = [
        Entry(f"transformers/{name}", vision, partial(_picture, *row), f"{row[2]} x {row[2]}")
        for name, row in PICTURES.items()
    ]
    found += [Entry(f"transformers/{name}", audio, partial(_wave, *row)) for name, row in WAVES.items()]
    found += [
        Entry("transformers/ast", audio, _spectrogram),
        Entry("transformers/whisper", audio, _whisper),
        Entry("transformers/clip", "transformers, vision and text", partial(_pair, "CLIPModel")),
        Entry("transformers/siglip", "transformers, vision and text", partial(_pair, "SiglipModel")),
    ]
    return found
