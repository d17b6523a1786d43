"""Tiny random-weight text models, one row per architecture, built from Transformers' own config classes.

The weights are drawn so that attention is far from uniform and every bias and norm matters: a wrong mask,
position or window moves the output by O(1). Nothing is downloaded, and this file knows nothing of Cenote.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig, PreTrainedModel

    Options = Mapping[str, Any]

VOCABULARY = 300
FIRST_TOKEN = 5  # smaller ids may be special (padding, separators) in some row
WINDOW = 16  # as configured; some models attend to half of it on each side
ROPE_LIMIT = 32  # original context of the rows whose rope changes with the length

SMALL: Options = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "mask_token_id": 3,
}


@dataclass(frozen=True)
class Architecture:
    """One tiny model, and how it must be batched to agree with itself run on one sequence at a time."""

    name: str
    model: str
    config: str
    options: Options = field(default_factory=dict)
    layout: str = "packed"  # or "padded" (right, masked), or "equal lengths" (padding leaks past the mask)
    max_length: int = 130


def _packed(name: str, family: str, suffix: str = "Model", **options: object) -> Architecture:
    return Architecture(name, family + suffix, family + "Config", options)


def _padded(name: str, family: str, **options: object) -> Architecture:
    return Architecture(name, family + "Model", family + "Config", options, "padded")


def _equal(name: str, family: str, **options: object) -> Architecture:
    return Architecture(name, family + "Model", family + "Config", options, "equal lengths")


WINDOWS: Options = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
SLIDING: Options = {"sliding_window": WINDOW, **WINDOWS}
LOCAL: Options = {"local_attention": WINDOW, **WINDOWS}
LINEAR: Options = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS: Options = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
SOFTCAP: Options = {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}
BIDIRECTIONAL: Options = {"query_pre_attn_scalar": 16, "use_bidirectional_attention": True}
MULTIPLIERS: Options = {"attention_multiplier": 0.3, "residual_multiplier": 0.8, "embedding_multiplier": 3.0}
# Two ropes whose frequencies depend on the longest sequence of the batch: dynamic on its length, longrope on
# whether it exceeds the limit. Only sequences that agree in that may share a forward. The dynamic one also
# keeps what it grew until a sequence shorter than the limit comes: compare with a model just built.
DYNAMIC: Options = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "max_position_embeddings": ROPE_LIMIT,
}
SCALED = {"rope_theta": 1e4, "factor": 5.0, "original_max_position_embeddings": ROPE_LIMIT}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
LONGROPE: Options = {
    "rope_parameters": {"rope_type": "longrope", **SCALED, **FACTORS},
    "original_max_position_embeddings": ROPE_LIMIT,
}
YARN: Options = {"rope_parameters": {"rope_type": "yarn", **SCALED}}
YARN_LLAMA4: Options = {"rope_parameters": {"rope_type": "yarn", **SCALED, "llama_4_scaling_beta": 0.1}}
RELATIVE: Options = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
}
BUCKETS: Options = {"position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
BART: Options = {
    "encoder_layers": 2,
    "encoder_ffn_dim": 128,
    "decoder_layers": 2,
    "decoder_ffn_dim": 128,
    "decoder_attention_heads": 4,
    "pad_token_id": 1,
}
# MobileBert's own "no_norm" explodes with weights this large
BOTTLENECK: Options = {
    "embedding_size": 32,
    "intra_bottleneck_size": 32,
    "normalization_type": "layer_norm",
}
# Its other attention, relative_shift, fails on sequences of one or two tokens
FUNNEL: Options = {
    "attention_type": "factorized",
    "block_sizes": [1, 1],
    "n_head": 4,
    "d_head": 16,
    "d_inner": 128,
}
LANDMARKS: Options = {"segment_means_seq_len": 160, "num_landmarks": 160}
PER_LAYER: Options = {"hidden_size_per_layer_input": 32, "embedding_dim": 64}
T5: Options = {"d_ff": 128, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 32}
MAMBA2: Options = {"num_heads": 8, "state_size": 16, "n_groups": 2, "chunk_size": 8}
FALCON_H1: Options = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 8}

ZOO: tuple[Architecture, ...] = (
    # Encoders, learned positions
    _packed("bert", "Bert"),
    _packed("bert-causal", "Bert", is_decoder=True),
    _packed("electra", "Electra", embedding_size=32),
    _packed("albert", "Albert", embedding_size=32),
    _packed("distilbert", "DistilBert", hidden_dim=128),
    _packed("ernie", "Ernie"),
    # It separates, but its attention does not say whether it is causal, so nobody may guess
    _padded("layoutlm", "LayoutLM"),
    _packed("roberta", "Roberta", pad_token_id=1),
    _packed("roberta-prelayernorm", "RobertaPreLayerNorm", pad_token_id=1),
    _packed("xlm-roberta", "XLMRoberta", pad_token_id=1),
    _packed("xlm-roberta-xl", "XLMRobertaXL", pad_token_id=1),
    _packed("camembert", "Camembert", pad_token_id=1),
    _packed("data2vec-text", "Data2VecText", pad_token_id=1),
    _packed("xmod", "Xmod", pad_token_id=1, default_language="en_XX"),
    # A literal mask token changes the scale of its whole row, so rows must stay apart.
    _padded("esm", "Esm", pad_token_id=1, token_dropout=True),
    _padded("mpnet", "MPNet", pad_token_id=1),
    _padded("megatron-bert", "MegatronBert"),
    _padded("rembert", "RemBert", input_embedding_size=32),
    _equal("mobilebert", "MobileBert", **BOTTLENECK),
    _equal("convbert", "ConvBert", embedding_size=32, conv_kernel_size=3),
    _padded("squeezebert", "SqueezeBert", embedding_size=64),
    _padded("ibert", "IBert", pad_token_id=1),
    _equal("fnet", "FNet"),
    _padded("longformer", "Longformer", attention_window=WINDOW, pad_token_id=1),
    # Its block_sparse attention turns itself off for good at the first short sequence
    _padded("big-bird", "BigBird", attention_type="original_full"),
    _equal("nystromformer", "Nystromformer", **LANDMARKS),
    _equal("funnel", "Funnel", **FUNNEL),
    # Encoders, relative positions
    _padded("deberta", "Deberta", **RELATIVE),
    _padded("deberta-v2", "DebertaV2", **RELATIVE, **BUCKETS),
    _padded("deberta-v2-conv", "DebertaV2", **RELATIVE, **BUCKETS, conv_kernel_size=3, conv_act="gelu"),
    _packed("t5", "T5", suffix="EncoderModel", **T5),
    _packed("t5-gated", "T5", suffix="EncoderModel", **T5, feed_forward_proj="gated-gelu"),
    _packed("mt5", "MT5", suffix="EncoderModel", **T5),
    _packed("umt5", "UMT5", suffix="EncoderModel", **T5),
    _padded("xlnet", "XLNet", d_head=16, d_inner=128),
    # Encoders, rotary positions
    _packed("esm-rotary", "Esm", pad_token_id=1, position_embedding_type="rotary"),
    _padded("roformer", "RoFormer", embedding_size=32),
    _packed("nomic-bert", "NomicBert"),
    _packed("gte", "Gte"),
    _packed("jina-embeddings-v3", "JinaEmbeddingsV3", pad_token_id=1),
    _packed("eurobert", "EuroBert"),
    _packed("modernbert", "ModernBert", **LOCAL),
    _packed("modernbert-decoder", "ModernBertDecoder", **LOCAL),
    # Decoders
    _packed("gpt2", "GPT2"),
    _packed("gpt-bigcode", "GPTBigCode"),
    _packed("gpt-neox", "GPTNeoX"),
    _padded("gpt-neo", "GPTNeo", attention_types=[[["global", "local", "local"], 1]], window_size=WINDOW),
    _padded("gptj", "GPTJ", rotary_dim=8),
    _packed("opt", "OPT", ffn_dim=128, word_embed_proj_dim=32),
    _padded("bloom", "Bloom"),
    _padded("mpt", "Mpt", max_seq_len=160),
    _padded("falcon", "Falcon"),
    _padded("falcon-alibi", "Falcon", alibi=True),
    _packed("llama", "Llama"),
    _packed("llama-noncausal", "Llama", is_causal=False),
    _packed("llama-dynamic-rope", "Llama", **DYNAMIC),
    _packed("mistral", "Mistral", sliding_window=None),
    _packed("mistral-sliding", "Mistral", sliding_window=WINDOW),
    _packed("ministral3", "Ministral3", **YARN_LLAMA4),
    _packed("mixtral", "Mixtral", sliding_window=None, num_local_experts=4),
    _packed("qwen2", "Qwen2"),
    _packed("qwen2-sliding", "Qwen2", use_sliding_window=True, **SLIDING),
    _packed("qwen2-noncausal", "Qwen2", is_causal=False),
    _packed("qwen3", "Qwen3"),
    _packed("qwen3-noncausal", "Qwen3", is_causal=False),
    _packed("qwen3-moe", "Qwen3Moe", num_experts=4, **EXPERTS),
    _packed("gemma", "Gemma"),
    _packed("gemma2", "Gemma2", **SOFTCAP, **SLIDING),
    _packed("gemma3", "Gemma3Text", query_pre_attn_scalar=16, **SLIDING),
    _packed("embedding-gemma", "Gemma3Text", **BIDIRECTIONAL, **SLIDING),
    _packed("embedding-gemma2", "EmbeddingGemma2Text", **PER_LAYER, **SLIDING),
    _packed("gpt-oss", "GptOss", num_local_experts=4, num_experts_per_tok=2, **YARN, **SLIDING),
    _packed("phi3", "Phi3"),
    _packed("phi3-longrope", "Phi3", **LONGROPE),
    _packed("olmo2", "Olmo2"),
    _packed("olmo3", "Olmo3", **SLIDING),
    _packed("granite", "Granite", **MULTIPLIERS),
    _packed("smollm3", "SmolLM3", no_rope_layers=[1, 0, 1]),
    _packed("stablelm", "StableLm"),
    _packed("starcoder2", "Starcoder2", sliding_window=None),
    _packed("cohere2", "Cohere2", **SLIDING),
    # Encoder and decoder on the same tokens; the output is the decoder's
    _padded("bart", "Bart", **BART),
    # State that runs along the sequence
    _padded("mamba", "Mamba", state_size=8),
    _padded("mamba2", "Mamba2", **MAMBA2),
    _padded("falcon-h1", "FalconH1", **FALCON_H1),
    _padded("lfm2", "Lfm2", layer_types=["conv", "full_attention", "conv"]),
    _padded("qwen3-next", "Qwen3Next", num_experts=4, **EXPERTS, **LINEAR),
    _padded("qwen3.5", "Qwen3_5Text", **LINEAR),
    _padded("recurrent-gemma", "RecurrentGemma", attention_window_size=WINDOW),
    _padded("jamba", "Jamba", num_experts=2, attn_layer_period=2, attn_layer_offset=1),
    # Text towers; they separate, but refuse a pack longer than max_position_embeddings
    _padded("clip-text", "CLIPText"),
    _padded("siglip-text", "SiglipText"),
)


def build(architecture: Architecture, *, seed: int = 0, head: str = "", **options: object) -> PreTrainedModel:
    """The row's model: fp32, eager attention, eval mode, the same weights for the same seed.

    Args:
        architecture: a row of the zoo.
        seed: of the weights.
        head: ending of the class with a head, as "ForSequenceClassification"; none = the bare model.
        options: further entries of the config.
    """
    config = _config(replace(architecture, options={**architecture.options, **options}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = class_of(architecture, head)(config).eval()
        _sharpen(model)
    return model


def class_of(architecture: Architecture, head: str) -> Any:
    """The row's class with `head`."""
    return getattr(transformers, _class_name(architecture, head))


def has_class(architecture: Architecture, head: str) -> bool:
    """Whether Transformers has the row's class with `head`; the class is not imported."""
    return _class_name(architecture, head) in _names()


@functools.cache
def _names() -> frozenset[str]:
    return frozenset(dir(transformers))


def _class_name(architecture: Architecture, head: str) -> str:
    name = architecture.model
    return f"{name.removesuffix('Model').removesuffix('Encoder')}{head}" if head else name


def _config(architecture: Architecture) -> PreTrainedConfig:
    kind = getattr(transformers, architecture.config)
    known = {item.name for item in fields(kind)} | set(kind.attribute_map)
    shared = {name: value for name, value in SMALL.items() if name in known}
    # Not set_attn_implementation afterwards: it leaves models outside AttentionInterface as they are
    config: PreTrainedConfig = kind(**{**shared, **architecture.options}, attn_implementation="eager")
    return config


@torch.no_grad()
def _sharpen(model: PreTrainedModel) -> None:
    """Redraw the matrices wide enough for peaked attention, and move every vector off its neutral value."""
    for weight in model.parameters():
        if weight.ndim >= 2 and weight.requires_grad:
            weight.normal_(std=0.15)
        else:
            weight.add_(torch.randn_like(weight), alpha=0.1)
    for weight in model.get_input_embeddings().parameters():
        weight.mul_(3)
