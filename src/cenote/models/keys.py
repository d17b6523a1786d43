"""The keys of the JSON files of Sentence-Transformers and PyLate folders: honoured, or known to be without effect.

By the sources of sentence-transformers 6.2. A key that is in no table is refused. Keys of nested objects are spelled
with a dot: `processing_kwargs.text.max_length`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cenote.models import value_types
from cenote.models.audit import Keys

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

OVERWRITTEN = "sentence-transformers overwrites it with the arguments of its caller"
ARRANGEMENT = "arranges batches, which no row depends on"

MODULE_ENTRY = Keys(
    frozenset({"type", "path"}),
    {
        "idx": "modules run in the order of the file",
        "name": "only names the module",
        "kwargs": "names arguments of `encode`, which no request carries",
    },
    value_types.MODULE_ENTRY,
)
"""Keys of an entry of `modules.json`."""

LOADING = ("cache_dir", "revision", "token", "local_files_only", "subfolder", "trust_remote_code")
"""Arguments of `from_pretrained` that say where files are; sentence-transformers sets them itself."""

TEXT = ("max_length", "truncation", "add_special_tokens", "return_token_type_ids")
"""Arguments of the tokenizer that are honoured."""

TEXT_IDLE = {
    "padding": ARRANGEMENT,
    "padding_side": ARRANGEMENT,
    "pad_to_multiple_of": ARRANGEMENT,
    "verbose": "only writes warnings",
    "logits_to_keep": "the score is of the last token, which every value keeps",
}
"""Arguments of the tokenizer that change no row."""

OTHER_INPUTS = "is for inputs that are not text"

TRANSFORMER = Keys(
    frozenset(
        {
            "max_seq_length",
            "do_lower_case",
            "transformer_task",
            "modality_config",
            "module_output_name",
            "query_length",
            "document_length",
            "query_expansion",
            "tokenizer_name_or_path",
            "config_kwargs",
            "processor_kwargs",
            "model_kwargs.dtype",
            "model_kwargs.torch_dtype",
            "model_kwargs.add_pooling_layer",
            "processing_kwargs.chat_template",
            *(f"processing_kwargs.{part}.{name}" for part in ("text", "common") for name in TEXT),
        }
    ),
    {
        "unpad_inputs": ARRANGEMENT,
        "backend": OVERWRITTEN,
        **{f"model_kwargs.{name}": OVERWRITTEN for name in LOADING},
        "model_kwargs.attn_implementation": "attention is Cenote's own, equal to every implementation",
        "model_kwargs.low_cpu_mem_usage": "is about memory while weights are loaded",
        "model_kwargs.use_safetensors": "the option allow_pickle says which weights are read",
        **{
            f"processing_kwargs.{part}.{name}": why
            for part in ("text", "common")
            for name, why in {**TEXT_IDLE, "return_tensors": ARRANGEMENT}.items()
        },
        **{f"processing_kwargs.{part}": OTHER_INPUTS for part in ("audio", "image", "video")},
    },
    value_types.TRANSFORMER,
)
"""Keys of `sentence_bert_config.json` and its older names, in their new spelling."""

RENAMED = {"model_args": "model_kwargs", "tokenizer_args": "processor_kwargs", "config_args": "config_kwargs"}
"""Old spellings of keys of the Transformer's config; where both are there, the old one counts."""

EVERY_SETTING = frozenset({"prompts", "default_prompt_name", "model_type"})

SETTINGS_OF: dict[str, frozenset[str]] = {
    "SentenceTransformer": frozenset({"similarity_fn_name", "truncate_dim"}),
    "SparseEncoder": frozenset({"similarity_fn_name", "max_active_dims"}),
    "CrossEncoder": frozenset({"activation_fn"}),
    "MultiVectorEncoder": frozenset(
        {
            "similarity_fn_name",
            "query_prefix",
            "document_prefix",
            "query_length",
            "document_length",
            "query_expansion",
            "do_query_expansion",
            "attend_to_expansion_tokens",
            "attend_to_mask_tokens",
            "skiplist_words",
        }
    ),
}
"""Keys of `config_sentence_transformers.json` that a type of model reads besides `EVERY_SETTING`."""

SETTINGS_OF["ColBERT"] = SETTINGS_OF["MultiVectorEncoder"]


def settings_keys(model_type: str) -> Keys:
    """Return the keys of `config_sentence_transformers.json` of a type of model."""
    honoured = EVERY_SETTING | SETTINGS_OF[model_type]
    idle = {
        "__version__": "names the releases that wrote the folder",
        "requirements": "names releases of packages that sentence-transformers needs",
        "keep_in_fp32_modules": "heads run in float32 anyway",
    }
    for owner, names in SETTINGS_OF.items():
        for name in names - honoured:
            idle.setdefault(name, f"is read of {owner} folders alone")
    return Keys(honoured, idle, value_types.SETTINGS)


_WIDTH = "follows from the model"

MODULES: dict[str, Keys] = {
    "Pooling": Keys(
        frozenset(
            {
                "pooling_mode",
                "pooling_mode_cls_token",
                "pooling_mode_max_tokens",
                "pooling_mode_mean_tokens",
                "pooling_mode_mean_sqrt_len_tokens",
                "pooling_mode_weightedmean_tokens",
                "pooling_mode_lasttoken",
                "include_prompt",
                "embedding_dimension",
                "word_embedding_dimension",
            }
        )
    ),
    "Dense": Keys(
        frozenset(
            {
                "in_features",
                "out_features",
                "bias",
                "activation_function",
                "use_residual",
                "module_input_name",
                "module_output_name",
            }
        )
    ),
    "LayerNorm": Keys(frozenset({"dimension"})),
    "Normalize": Keys(frozenset({"module_input_name", "module_output_name"})),
    "Dropout": Keys(frozenset(), {"dropout": "nothing is dropped at inference"}),
    "LogitScore": Keys(frozenset({"true_token_id", "false_token_id", "module_input_name"})),
    "SpladePooling": Keys(
        frozenset({"pooling_strategy", "activation_function"}),
        {
            "embedding_dimension": _WIDTH,
            "word_embedding_dimension": _WIDTH,
            "chunk_size": "is about memory",
        },
    ),
    "SparseStaticEmbedding": Keys(frozenset(), {"frozen": "is about training"}),
    "MultiVectorMask": Keys(frozenset({"skiplist_words", "skiplist_tasks", "keep_only_token_ids"})),
    "HierarchicalTokenPooling": Keys(
        frozenset({"pool_factor", "num_protected_tokens", "normalize_embeddings", "tasks"})
    ),
}
"""Keys of the `config.json` of each kind of module but the Transformer."""

ROUTER = Keys(
    frozenset(
        {
            "types",
            "structure",
            "parameters.default_route",
            "parameters.allow_empty_key",
            "parameters.route_mappings",
        }
    ),
    types=value_types.ROUTER,
)
"""Keys of `router_config.json`."""


def flattened(content: Mapping[str, Any], paths: Collection[str], above: str = "") -> dict[str, Any]:
    """Return `content` with the entries of the objects at `paths` under dotted names.

    Args:
        content: a JSON object.
        paths: dotted names of the objects that are taken apart; others stay as they are.
        above: dotted name of `content` itself, with a dot behind it.
    """
    flat: dict[str, Any] = {}
    for name, value in content.items():
        path = above + name
        if path in paths and isinstance(value, dict):
            flat |= flattened(value, paths, f"{path}.")
        else:
            flat[path] = value
    return flat
