"""Checkpoints whose config names code of their own (`auto_map`).

Without `--trust-remote-code` the class of Transformers for the `model_type` would run, which often is another model:
bidirectional attention, rotary positions or adapters would be missing, and nobody would notice. So such a checkpoint is
refused, unless a row of `NATIVE` says that Transformers has its model, and how its config reads there. A row counts
with the flag too, for much published code does not run on today's Transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cenote.functions import coalesce

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PretrainedConfig

Config = dict[str, Any]
"""Content of a `config.json`."""


def references(config: Config) -> dict[str, str]:
    """Return the code that the `auto_map` of a config names for models and their configs, by the auto class."""
    auto_map = config.get("auto_map") or {}
    kinds = ("AutoModel", "AutoConfig")
    return {auto_class: str(code) for auto_class, code in auto_map.items() if auto_class.startswith(kinds)}


def classes(config: Config) -> set[str]:
    """Return the names of the classes that a config names, as code or as its architecture."""
    return {*(config.get("architectures") or ()), *(name.rpartition(".")[2] for name in references(config).values())}


def native(config: Config) -> Config | None:
    """Return `config` as Transformers' own class reads it; `None` if there is none for the code that it names."""
    if config.get("model_type") in OWN_TYPES:
        return OWN_TYPES[config["model_type"]](config)
    names = {name.rpartition("--")[2] for name in references(config).values()}
    for name in NATIVE.keys() & names:
        return NATIVE[name](config)
    classes = {name.rpartition(".")[2] for name in names}
    return config if classes & HEAD_CLASSES & {*(config.get("architectures") or ())} else None


def _agrees(config: Config, settings: Mapping[str, Any]) -> bool:
    """Return whether the config has each of the settings, where it says anything."""
    return all(config.get(key, value) == value for key, value in settings.items())


def _without(config: Config, *keys: str) -> Config:
    """Return `config` without keys, which the caller accounts for."""
    return {key: value for key, value in config.items() if key not in keys}


def _entry(config: Config, key: str, default: Any) -> Any:
    """Return the value of `key`, or the `default` where it is missing or null."""
    return coalesce(config.get(key), default)


def _head_dim(config: Config) -> int:
    return int(config["hidden_size"]) // int(config["num_attention_heads"])


def _same(config: Config) -> Config:
    """Return `config` as it is: the code is that of Transformers' class."""
    return config


FLASH = {"position_embedding_type": "rotary", "truncate_dim": None}
"""Settings of jinaai/xlm-roberta-flash-implementation that Transformers' class has built in."""

FLASH_IDLE = (
    "load_trained_adapters",
    "lora_dropout_p",
    "lora_main_params_trainable",
    "use_flash_attn",
    "use_reentrant",
)
"""Settings that change no answer of the weights as they are."""


def _jina_flash(config: Config) -> Config | None:
    """Return the config of jinaai/xlm-roberta-flash-implementation; with absolute positions it is XLM-RoBERTa.

    Defaults are those of its `XLMRobertaFlashConfig`.
    """
    if config.get("position_embedding_type") == "absolute" and config.get("truncate_dim") is None:
        return {
            **_without(config, *FLASH_IDLE, "rotary_emb_base", "truncate_dim"),
            "renamed_tensors": "xlm-roberta-flash",
        }
    if not _agrees(config, FLASH):
        return None
    rope = {"rope_type": "default", "rope_theta": float(_entry(config, "rotary_emb_base", 10000.0))}
    plain = _without(config, *FLASH, *FLASH_IDLE, "rotary_emb_base")
    return {**plain, "model_type": "jina_embeddings_v3", "rope_parameters": rope}


GTE = {
    "position_embedding_type": "rope",
    "layer_norm_type": "layer_norm",
    "logn_attention_scale": False,
    "pack_qkv": True,
}
"""Settings of Alibaba-NLP/new-impl that Transformers' class has built in."""

TOKEN_TYPES = ["embeddings.token_type_embeddings.weight", "gte.embeddings.token_type_embeddings.weight"]
"""Names of the table of token types in Transformers' class, alone and with a head."""

GTE_IDLE = ("logn_attention_clip1", "unpad_inputs", "use_memory_efficient_attention")
"""Settings that change no answer, the first unless another is set."""


def _gte(config: Config) -> Config | None:
    """Return the config of Alibaba-NLP/new-impl.

    Its "ntk" scaling by a factor `f` multiplies the base by `f` and divides all frequencies by `f ** (2 / head_dim)`.
    Some have no token types, whose table is zero then.
    """
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "none"))
    if not _agrees(config, GTE) or kind not in ("none", "ntk") or scaling.get("mixed_b") is not None:
        return None
    theta, factor = float(_entry(config, "rope_theta", 10000.0)), float(scaling.get("factor", 1.0))
    rope: Config = {"rope_type": "default", "rope_theta": theta}
    if factor > 1:
        rope = {"rope_type": "linear", "rope_theta": theta * factor, "factor": factor ** (2 / _head_dim(config))}
    types = int(config.get("type_vocab_size", 1))
    return {
        **_without(config, *GTE, *GTE_IDLE, "rope_scaling", "rope_theta"),
        "model_type": "gte",
        "rope_parameters": rope,
        "type_vocab_size": max(types, 1),
        "absent_tensors": [] if types else TOKEN_TYPES,
    }


def absent(config: PretrainedConfig) -> set[str]:
    """Return names of tensors that Transformers' class has and the checkpoint's code has not."""
    return set(getattr(config, "absent_tensors", ()))


NOMIC = {
    "activation_function": "swiglu",
    "causal": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "num_experts": 0,
    "parallel_block": False,
    "prenorm": False,
    "qkv_proj_bias": False,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "use_rms_norm": False,
}
"""Settings of nomic-ai/nomic-bert-2048 that Transformers' class has built in."""

NOMIC_NAMES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
}
"""Names in nomic-ai/nomic-bert-2048 to those of Transformers."""

NOMIC_THETA = 10_000.0
"""Base of rotary positions in nomic-ai/nomic-bert-2048 where a config names none; Transformers' class has another."""

NOMIC_READ = ("pad_vocab_size_multiple", "rotary_emb_base", "rotary_scaling_factor", "max_trained_positions")


def _nomic(config: Config) -> Config | None:
    """Return the config of nomic-ai/nomic-bert-2048.

    Its `rotary_scaling_factor` is "dynamic" scaling beyond the trained positions, up to `n_positions`.
    """
    if not _agrees(config, NOMIC):
        return None
    renamed = {NOMIC_NAMES.get(key, key): value for key, value in _without(config, *NOMIC, *NOMIC_READ).items()}
    multiple, size = int(_entry(config, "pad_vocab_size_multiple", 1)), int(config["vocab_size"])
    renamed |= {"model_type": "nomic_bert", "hidden_act": "silu", "vocab_size": -(-size // multiple) * multiple}
    rope = config.get("rope_parameters") or {}
    theta = _entry(config, "rotary_emb_base", _entry(rope, "rope_theta", NOMIC_THETA))
    renamed["rope_parameters"] = {"rope_type": "default", **rope, "rope_theta": float(theta)}
    factor = config.get("rotary_scaling_factor")
    if factor:
        renamed["rope_parameters"] |= {"rope_type": "dynamic", "factor": float(factor)}
        renamed["scaled_positions"] = renamed.get("max_position_embeddings")
        renamed["max_position_embeddings"] = int(_entry(config, "max_trained_positions", 2048))
    return renamed


def scaled_positions(config: PretrainedConfig) -> int | None:
    """Return the positions for which published code scales; `None` = those of Transformers' keys count."""
    return getattr(config, "scaled_positions", None)


def _internlm2(config: Config) -> Config:
    """Return the config of InternLM2, which is Llama by other names, in one of its biases and none elsewhere."""
    bias = bool(config.get("bias", False))
    changes = {"model_type": "llama", "attention_bias": bias, "mlp_bias": False, "renamed_tensors": "internlm2"}
    return {**_without(config, "bias"), **changes}


def _two_way_qwen(config: Config) -> Config | None:
    """Return the config of gte-Qwen2's code, which attends both ways if its config says so."""
    return config if config.get("is_causal") is False else None


def _colqwen3(config: Config) -> Config:
    """Return the config of TomoroAI's ColQwen3, whose model is a part of another one."""
    return {**config, "model_type": "qwen3_vl", "renamed_tensors": "colqwen3"}


def _ops_colqwen3(config: Config) -> Config:
    """Return the config of OpenSearch-AI's ColQwen3."""
    return {**config, "model_type": "qwen3_vl"}


def _nemotron_colembed(config: Config) -> Config | None:
    """Return the config of NVIDIA's nemotron-colembed-vl-v2, which attends both ways."""
    if not _agrees(config, {"pooling": "colbert"}):
        return None
    text = {**config["text_config"], "is_causal": False}
    return {**_without(config, "pooling"), "model_type": "qwen3_vl", "text_config": text}


OWN_TYPES: Mapping[str, Callable[[Config], Config | None]] = {
    "colqwen3": _colqwen3,
    "ops_colqwen3": _ops_colqwen3,
    "qwen3_vl_nemotron_embed": _nemotron_colembed,
}
"""The `model_type`s of code, to a function that returns its config in Transformers' words."""

NATIVE: Mapping[str, Callable[[Config], Config | None]] = {
    "modeling_lora.XLMRobertaLoRA": _jina_flash,
    "modeling_xlm_roberta.XLMRobertaModel": _jina_flash,
    "modeling.NewModel": _gte,
    "modeling_hf_alibaba_nlp_gte.GteModel": _gte,
    "modeling_hf_nomic_bert.NomicBertModel": _nomic,
    "modeling_internlm2.InternLM2ForRewardModel": _internlm2,
    "modeling_qwen.Qwen2Model": _two_way_qwen,
    "modeling_eurobert.EuroBertModel": _same,
}
"""Code, without the repository that it lies in, to a function that returns its config in Transformers' words."""

HEAD_CLASSES = frozenset(
    {
        "EurusRewardModel",
        "INFORMForSequenceClassification",
        "JinaForRanking",
        "JinaVLForRanking",
        "LlamaForRewardModelWithGating",
        "LlamaModelForScore",
        "LlamaRewardModel",
        "Qwen2ForPrmModel",
        "Qwen2ForProcessRewardModel",
        "Qwen2ForRewardModel",
        "VoyageQwen3BidirectionalEmbedModel",
    }
)
"""Classes of code that is a head over Transformers' backbone, which a family builds (`cenote.models.families`)."""
