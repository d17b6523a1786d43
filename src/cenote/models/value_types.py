"""Types of the values in a checkpoint's JSON files, which are checked like a user's options: nothing is converted.

`"false"` is not false, and `true` is not 1. The meaning of a value is checked where it is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from cenote.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Flag = bool | None
Text = str | None
Texts = list[str] | None

Location = Annotated[str, msgspec.Meta(max_length=1000, pattern=r"^[^\x00-\x1f]*$")]

MODULE_ENTRIES = Annotated[list[dict[str, Any]], msgspec.Meta(max_length=256)]
"""Content of `modules.json`; published folders have up to six modules."""

MODULE_ENTRY = {"type": str, "path": Location}

TRANSFORMER = {
    "max_seq_length": Positive | None,
    "do_lower_case": Flag,
    "transformer_task": str,
    "modality_config": dict[str, dict[str, Any]],
    "module_output_name": Text,
    "query_expansion": dict[str, Any] | None,
    "config_kwargs": dict[str, Any] | None,
    "processor_kwargs": dict[str, Any] | None,
    "model_kwargs": dict[str, Any] | None,
    "model_kwargs.add_pooling_layer": bool,
    "processing_kwargs": dict[str, Any] | None,
    "processing_kwargs.chat_template": dict[str, Any] | None,
    "processing_kwargs.text.add_special_tokens": bool,
    "processing_kwargs.common.add_special_tokens": bool,
    "processing_kwargs.text.return_token_type_ids": Flag,
    "processing_kwargs.common.return_token_type_ids": Flag,
}

SETTINGS = {
    "prompts": dict[str, Any] | None,
    "default_prompt_name": Text,
    "model_type": Text,
    "similarity_fn_name": Text,
    "max_active_dims": Positive | None,
    "activation_fn": Text,
    "query_prefix": Text,
    "document_prefix": Text,
    "query_length": Positive | None,
    "document_length": Positive | None,
    "query_expansion": dict[str, Any] | None,
    "do_query_expansion": Flag,
    "attend_to_expansion_tokens": Flag,
    "attend_to_mask_tokens": Flag,
    "skiplist_words": Texts,
}

MODULE = {
    "pooling_mode": str | list[str] | None,
    "pooling_mode_cls_token": Flag,
    "pooling_mode_max_tokens": Flag,
    "pooling_mode_mean_tokens": Flag,
    "pooling_mode_mean_sqrt_len_tokens": Flag,
    "pooling_mode_weightedmean_tokens": Flag,
    "pooling_mode_lasttoken": Flag,
    "include_prompt": bool,
    "embedding_dimension": Positive | None,
    "word_embedding_dimension": Positive | None,
    "in_features": Positive,
    "out_features": Positive,
    "bias": bool,
    "activation_function": str,
    "use_residual": bool,
    "module_input_name": Text,
    "module_output_name": Text,
    "dimension": Positive,
    "true_token_id": int,
    "false_token_id": int | None,
    "pooling_strategy": str,
    "skiplist_words": Texts,
    "skiplist_tasks": str | list[str] | None,
    "pool_factor": float,
    "num_protected_tokens": int,
    "normalize_embeddings": bool,
    "tasks": str | list[str] | None,
}

ROUTER = {
    "types": dict[str, str],
    "structure": dict[str, list[str]],
    "parameters": dict[str, Any] | None,
    "parameters.default_route": Text,
    "parameters.route_mappings": dict[str, Any] | None,
}

CONFIG = {
    "model_type": str,
    "dtype": str | dict[str, Any] | None,
    "torch_dtype": str | dict[str, Any] | None,
    "is_causal": Flag,
    "matryoshka_dimensions": list[Positive] | None,
    "is_matryoshka": Flag,
    "task_instructions": dict[str, str] | None,
    "is_original_qwen3_reranker": Flag,
    "sbert_ce_default_activation_function": Text,
    "sentence_transformers": dict[str, Any] | None,
    "emb_pooler": Text,
    "lora_adaptations": Texts,
    "lora_rank": Positive | None,
    "lora_alpha": float | None,
    "do_normalize": Flag,
    "score_type": Text,
    "gating_temperature": float | None,
    "architectures": Texts,
    "auto_map": dict[str, Any] | None,
    "id2label": dict[int, Any] | None,
    "label2id": dict[str, Any] | None,
    "num_labels": Natural | None,
    "problem_type": Text,
}
"""Keys of `config.json` that Cenote reads besides the fields of the config's class, which checks those itself."""

TOKENIZER = {
    "model_max_length": Annotated[float, msgspec.Meta(ge=1)] | None,
    "do_lower_case": Flag,
    "add_bos_token": Flag,
    "add_eos_token": Flag,
    "add_prefix_space": Flag,
    "clean_up_tokenization_spaces": Flag,
    "strip_accents": Flag,
    "tokenize_chinese_chars": Flag,
    "split_special_tokens": Flag,
    "legacy": Flag,
    "tokenizer_class": Text,
    "padding_side": Literal["left", "right"] | None,
    "truncation_side": Literal["left", "right"] | None,
    "model_input_names": Texts,
    "added_tokens_decoder": dict[str, Any] | None,
}


def check(file: str, content: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Refuse a value of another type than its key has.

    Args:
        file: in the message.
        content: a JSON object; keys of objects in it may be dotted.
        types: by keys; others are not looked at.

    Raises:
        CheckpointError: there is one.
    """
    for name in sorted(content.keys() & types.keys()):
        try:
            msgspec.convert(content[name], types[name], strict=True, str_keys=True)
        except msgspec.ValidationError as error:
            shown = repr(content[name])[:100]
            raise CheckpointError(f"{file}: {name} is {shown}. {error}; correct it, or download it again") from None
