"""transformers architectures from small configurations."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.entry import Entry

__all__ = ["entries"]

VOCABULARY = 96

# Names that most configurations share, and those of the older ones.
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64}
HEADED = {**GROUPED, "head_dim": 16}
DISTIL = {"vocab_size": VOCABULARY, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
GPT = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", SMALL),
    "bert-classifier": ("BertForSequenceClassification", SMALL),
    "roberta": ("RobertaModel", SMALL),
    "xlm-roberta": ("XLMRobertaForTokenClassification", SMALL),
    "camembert": ("CamembertForMaskedLM", SMALL),
    "albert": ("AlbertModel", {**SMALL, "embedding_size": 32}),
    "distilbert": ("DistilBertForSequenceClassification", DISTIL),
    "electra": ("ElectraModel", {**SMALL, "embedding_size": 32}),
    "deberta": (
        "DebertaModel",
        {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_position_embeddings": 64},
    ),
    "deberta-v2": (
        "DebertaV2Model",
        {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16},
    ),
    "mpnet": ("MPNetModel", SMALL),
    "modernbert": ("ModernBertForMaskedLM", {**SMALL, "pad_token_id": 0}),
    "mobilebert": (
        "MobileBertModel",
        {**SMALL, "true_hidden_size": 32, "intra_bottleneck_size": 32, "embedding_size": 32},
    ),
    "squeezebert": ("SqueezeBertModel", {**SMALL, "embedding_size": 64}),
    "convbert": ("ConvBertModel", {**SMALL, "embedding_size": 32}),
    "roformer": ("RoFormerModel", {**SMALL, "embedding_size": 64, "max_position_embeddings": 64}),
    "fnet": ("FNetModel", SMALL),
    "nystromformer": ("NystromformerModel", {**SMALL, "num_landmarks": 4, "segment_means_seq_len": 12}),
    "megatron-bert": ("MegatronBertModel", SMALL),
    "ernie": ("ErnieModel", SMALL),
    "xlnet": (
        "XLNetModel",
        {"vocab_size": VOCABULARY, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},
    ),
    "funnel": (
        "FunnelBaseModel",
        {
            "vocab_size": VOCABULARY,
            "block_sizes": [1, 1],
            "d_model": 64,
            "n_head": 4,
            "d_head": 16,
            "d_inner": 128,
        },
    ),
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", GPT),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", SMALL),
    "gptj": ("GPTJForCausalLM", {**GPT, "rotary_dim": 8}),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", GPT),
    "codegen": ("CodeGenForCausalLM", {**GPT, "rotary_dim": 8}),
    "opt": (
        "OPTForCausalLM",
        {**SMALL, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64},
    ),
    "bloom": ("BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "llama": ("LlamaForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", GROUPED),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, **MIXTURE}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", HEADED),
    "phi": ("PhiForCausalLM", GROUPED),
    "phi3": ("Phi3ForCausalLM", {**GROUPED, "pad_token_id": 0}),
    "gemma": ("GemmaForCausalLM", HEADED),
    "gemma2": ("Gemma2ForCausalLM", HEADED),
    "falcon": ("FalconForCausalLM", SMALL),
    "stablelm": ("StableLmForCausalLM", GROUPED),
    "olmo": ("OlmoForCausalLM", {**GROUPED, "pad_token_id": 0}),
    "cohere": ("CohereForCausalLM", GROUPED),
    "granite": ("GraniteForCausalLM", GROUPED),
    "mpt": (
        "MptForCausalLM",
        {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    ),
    "xglm": (
        "XGLMForCausalLM",
        {"vocab_size": VOCABULARY, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128},
    ),
}
STATE_SPACE: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2}),
    "mamba2": (
        "Mamba2ForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "chunk_size": 8,
            "n_groups": 1,
        },
    ),
    "falcon-mamba": (
        "FalconMambaForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2},
    ),
}
SEQUENCE_TO_SEQUENCE: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5Model", T5),
    "t5-conditional": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
    "mt5": ("MT5Model", T5),
    "bart": ("BartModel", SEQ2SEQ),
    "mbart": ("MBartForConditionalGeneration", SEQ2SEQ),
    "marian": ("MarianModel", {**SEQ2SEQ, "pad_token_id": 0, "decoder_start_token_id": 0}),
    "pegasus": ("PegasusForConditionalGeneration", SEQ2SEQ),
    "blenderbot": ("BlenderbotModel", SEQ2SEQ),
    "m2m100": ("M2M100Model", SEQ2SEQ),
    "prophetnet": (
        "ProphetNetModel",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "encoder_ffn_dim": 128,
            "num_encoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "decoder_ffn_dim": 128,
            "num_decoder_layers": 2,
            "num_decoder_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
}


def model_of(kind: str, options: dict[str, Any]) -> nn.Module:
    """A network of transformers with random weights, without a cache of keys and values."""
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    made = getattr(transformers, kind)
    config = made.config_class(**options)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and hasattr(part, "use_cache"):
            part.use_cache = False
    model: nn.Module = made(config)
    return model.eval()


def tokens(rows: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Token numbers and a mask that hides the end of the last row."""
    ids = torch.randint(3, VOCABULARY, (rows, length))
    ids[0, 0], ids[0, 1] = 3, VOCABULARY - 1  # the whole range, so that verification draws from it
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[-1, length - 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _one(kind: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    model = model_of(kind, options)
    inputs = tokens()
    if kind.startswith(("FNet", "Nystromformer")):
        del inputs["attention_mask"]  # the one mixes all positions, the other fails with it
    return model, inputs


def _two(kind: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    model = model_of(kind, options)
    return model, {**tokens(), "decoder_input_ids": torch.randint(3, VOCABULARY, (2, 7))}


def entries() -> list[Entry]:
    """Encoders, decoders, state-space models, encoder-decoders."""
    groups = {
        "encoders": (ENCODERS, _one),
        "decoders": (DECODERS, _one),
        "state space": (STATE_SPACE, _one),
        "encoder-decoders": (SEQUENCE_TO_SEQUENCE, _two),
    }
    return [
        Entry(f"transformers/{name}", f"transformers, {group}", partial(make, kind, options))
        for group, (table, make) in groups.items()
        for name, (kind, options) in table.items()
    ]
