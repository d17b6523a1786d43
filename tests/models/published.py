"""Folders as well-known models are published: their lists of files, and the JSON in them, with small random weights.

Only entries that give a size or an id of the vocabulary differ from the published ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file

from tests import checkpoints
from tests.checkpoints import HIDDEN, NORMALIZE, Module, dense, flagged_pooling

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

Reference = Literal["sentences", "pairs", "sparse", "tokens", "classes", "entities"]

LONGEST = 120
IDENTITY = "torch.nn.modules.linear.Identity"
LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
VERSIONS = {"__version__": {"sentence_transformers": "2.2.2", "transformers": "4.28.1", "pytorch": "1.13.0+cu117"}}
SETTINGS = {**VERSIONS, "prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
LENGTH = {"max_seq_length": LONGEST, "do_lower_case": False}

SIZES = frozenset(
    {"vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id"}
    | {"sep_token_id", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "head_dim"}
    | {"num_key_value_heads", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "dim", "hidden_dim", "n_heads"}
    | {"n_layers", "n_positions", "n_embd", "n_head", "n_inner", "n_layer", "encoder_layers", "decoder_layers"}
    | {"encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim", "layer_types"}
    | {"query_pre_attn_scalar", "sliding_window", "_sliding_window_pattern", "decoder_start_token_id"}
    | {"forced_eos_token_id", "relative_attention_num_buckets", "num_decoder_layers", "position_buckets"}
)
"""Entries of a config that a small model has of its own."""

BERT = {
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": None,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "torch_dtype": "float32",
    "transformers_version": "4.29.0.dev0",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30522,
}
XLM_R = {
    **{key: value for key, value in BERT.items() if key != "gradient_checkpointing"},
    "model_type": "xlm-roberta",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-05,
    "output_past": True,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "vocab_size": 250002,
}
MODERN = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 50281,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "cls_token_id": 50281,
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "eos_token_id": 50282,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "gradient_checkpointing": False,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02,
    "intermediate_size": 1152,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "pad_token_id": 50283,
    "position_embedding_type": "absolute",
    "reference_compile": True,
    "repad_logits_with_grad": False,
    "sep_token_id": 50282,
    "sparse_pred_ignore_index": -100,
    "sparse_prediction": False,
    "torch_dtype": "float32",
    "transformers_version": "4.48.0",
    "vocab_size": 50368,
}
QWEN3 = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.3",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151669,
}

BERT_TOKENIZER = {
    "clean_up_tokenization_spaces": True,
    "do_basic_tokenize": True,
    "do_lower_case": True,
    "mask_token": "[MASK]",
    "model_max_length": LONGEST,
    "never_split": None,
    "strip_accents": None,
    "tokenize_chinese_chars": True,
    "tokenizer_class": "BertTokenizer",
}
WEIGHTS_AGAIN = ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot")
ONNX = ("onnx/config.json", "onnx/model.onnx", "onnx/model_O4.onnx", "onnx/model_qint8_avx512_vnni.onnx")
OPENVINO = ("openvino/openvino_model.bin", "openvino/openvino_model.xml")


@dataclass(frozen=True)
class Published:
    """A published repository.

    Attributes:
        family: of Transformers' classes.
        head: ending of the class that made its weights.
        tokenizer: key of `tokenizers`.
        config: content of `config.json`.
        shape: options of the small config besides the usual ones.
        modules: of a Sentence-Transformers folder, after the Transformer; `None` = it is none.
        transformer: content of `sentence_bert_config.json`; `None` = there is none.
        settings: content of `config_sentence_transformers.json`; `None` = there is none.
        tokenizer_config: entries of `tokenizer_config.json`.
        new: module types in the spelling of Sentence-Transformers 5.4 and later.
        types: import paths of modules, by their class, where they are others.
        files: content of further JSON files, or text.
        beside: names of files beside whose content plays no role.
        prefix: before the names of the tensors of Transformers' class.
        tensors: shapes of further tensors in `model.safetensors`.
        pickled: the modules' weights are pickles.
        reference: library that its answers equal.
    """

    family: str
    head: str
    tokenizer: str
    config: Mapping[str, Any]
    shape: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[Module, ...] | None = None
    transformer: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] | None = None
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    new: bool = False
    types: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    prefix: str = ""
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    pickled: bool = False
    reference: Reference = "sentences"


def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    """Return small tokenizers that mark texts as the published ones do."""

    def marked(first: str, last: str, **options: Any) -> PreTrainedTokenizerBase:
        single = " ".join(part for part in (first, "$A", last) if part)
        special = tuple(part for part in (first, last) if part)
        return checkpoints.byte_level(single, special=special, model_max_length=LONGEST, **options)

    return {
        "bert": checkpoints.wordpiece(lowercase=True, model_max_length=LONGEST),
        "cased": checkpoints.wordpiece(model_max_length=LONGEST),
        "colbert": checkpoints.wordpiece(lowercase=True, more=("[unused0]", "[unused1]"), model_max_length=LONGEST),
        "xlm-r": checkpoints.sentinels(model_max_length=LONGEST),
        "qwen": checkpoints.byte_level(padding_side="left", model_max_length=LONGEST),
        "gemma": marked("<bos>", "<eos>", bos_token="<bos>", eos_token="<eos>"),
        "modern": marked("[CLS]", "[SEP]", cls_token="[CLS]", sep_token="[SEP]", eos_token=None),
        "t5": marked("", "</s>", eos_token="</s>"),
        "mistral": marked("<s>", "</s>", bos_token="<s>", eos_token="</s>", padding_side="left"),
    }


def _config(config: Mapping[str, Any], architecture: str, **changes: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **config, **changes}


CLS = flagged_pooling("cls_token")
MEAN = flagged_pooling("mean_tokens")
LAST = flagged_pooling("lasttoken", include_prompt=True)
POOLED = {"pooling_mode_weightedmean_tokens": False, "pooling_mode_lasttoken": False, "include_prompt": True}
OLD_MEAN = Module(
    "Pooling",
    {
        "word_embedding_dimension": HIDDEN,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    },
)
"""A Pooling module of the first releases, which knew four modes."""

MULTILINGUAL_POOLER = {
    "directionality": "bidi",
    "pooler_fc_size": 768,
    "pooler_num_attention_heads": 12,
    "pooler_num_fc_layers": 3,
    "pooler_size_per_head": 128,
    "pooler_type": "first_token_transform",
}
"""Entries of multilingual BERT's config, which no class of Transformers reads."""

MODELS: dict[str, Published] = {
    "intfloat/e5-base-v2": Published(
        "Bert",
        "Model",
        "bert",
        _config(BERT, "BertModel", _name_or_path="tmp/"),
        modules=(MEAN, NORMALIZE),
        transformer=LENGTH,
        tokenizer_config=BERT_TOKENIZER,
        beside=("pytorch_model.bin", "onnx/model.onnx", "onnx/tokenizer.json", "onnx/config.json", "README.md"),
    ),
    "intfloat/multilingual-e5-large": Published(
        "XLMRoberta",
        "Model",
        "xlm-r",
        _config(XLM_R, "XLMRobertaModel", _name_or_path="./large"),
        shape={"type_vocab_size": 1},
        modules=(MEAN, NORMALIZE),
        transformer=LENGTH,
        tokenizer_config={"sp_model_kwargs": {}},
        beside=("pytorch_model.bin", "onnx/model.onnx", "onnx/model.onnx_data", *OPENVINO),
    ),
    "intfloat/e5-mistral-7b-instruct": Published(
        "Mistral",
        "Model",
        "mistral",
        {
            "_name_or_path": "mistralai/Mistral-7B-v0.1",
            "architectures": ["MistralModel"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "pad_token_id": 2,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.34.0",
            "use_cache": False,
            "vocab_size": 32000,
        },
        modules=(LAST, NORMALIZE),
        transformer=LENGTH,
        settings={
            "prompts": {
                "web_search_query": "Instruct: Given a web search query, retrieve relevant passages that answer the "
                "query\nQuery: ",
                "sts_query": "Instruct: Retrieve semantically similar text.\nQuery: ",
            }
        },
    ),
    "BAAI/bge-base-en-v1.5": Published(
        "Bert",
        "Model",
        "bert",
        _config(BERT, "BertModel", _name_or_path="/root/.cache/torch/sentence_transformers/BAAI_bge-base-en/") | LABEL,
        modules=(CLS, NORMALIZE),
        transformer={"max_seq_length": LONGEST, "do_lower_case": True},
        settings=VERSIONS,
        tokenizer_config=BERT_TOKENIZER,
        beside=("pytorch_model.bin", "onnx/model.onnx"),
    ),
    "BAAI/bge-reranker-v2-m3": Published(
        "XLMRoberta",
        "ForSequenceClassification",
        "xlm-r",
        _config(XLM_R, "XLMRobertaForSequenceClassification", _name_or_path="BAAI/bge-m3") | LABEL,
        shape={"type_vocab_size": 1, "num_labels": 1},
        beside=("assets/BEIR-bge-en-v1.5.png",),
        reference="pairs",
    ),
    "BAAI/bge-reranker-base": Published(
        "XLMRoberta",
        "ForSequenceClassification",
        "xlm-r",
        _config(XLM_R, "XLMRobertaForSequenceClassification") | LABEL,
        shape={"type_vocab_size": 1, "num_labels": 1},
        beside=("pytorch_model.bin", "onnx/model.onnx", "onnx/config.json"),
        reference="pairs",
    ),
    "thenlper/gte-base": Published(
        "Bert",
        "Model",
        "bert",
        _config(BERT, "BertModel", torch_dtype="float16"),
        modules=(MEAN, NORMALIZE),
        transformer=LENGTH,
        tokenizer_config=BERT_TOKENIZER,
        beside=("pytorch_model.bin", "onnx/model.onnx", "openvino/openvino_model.xml", "openvino/openvino_model.bin"),
    ),
    "Alibaba-NLP/gte-modernbert-base": Published(
        "ModernBert",
        "Model",
        "modern",
        _config(MODERN, "ModernBertModel"),
        shape={"local_attention": 16},
        modules=(CLS,),
        transformer=LENGTH,
        settings=SETTINGS,
        beside=("onnx/model.onnx", "onnx/model_bnb4.onnx", "onnx/model_fp16.onnx"),
    ),
    "Alibaba-NLP/gte-reranker-modernbert-base": Published(
        "ModernBert",
        "ForSequenceClassification",
        "modern",
        _config(MODERN, "ModernBertForSequenceClassification") | LABEL,
        shape={"local_attention": 16, "num_labels": 1},
        beside=("onnx/model.onnx",),
        reference="pairs",
    ),
    "nomic-ai/modernbert-embed-base": Published(
        "ModernBert",
        "Model",
        "modern",
        _config(MODERN, "ModernBertModel", _name_or_path="checkpoints/modernbert"),
        shape={"local_attention": 16},
        modules=(MEAN, NORMALIZE),
        transformer=LENGTH,
        settings={
            **SETTINGS,
            "prompts": {"search_query": "search_query: ", "search_document": "search_document: "},
        },
        beside=("onnx/model.onnx",),
    ),
    "ibm-granite/granite-embedding-english-r2": Published(
        "ModernBert",
        "Model",
        "modern",
        _config(MODERN, "ModernBertModel", torch_dtype="bfloat16"),
        shape={"local_attention": 16},
        modules=(CLS, NORMALIZE),
        transformer=LENGTH,
        settings={**VERSIONS, "model_type": "SentenceTransformer", **SETTINGS},
    ),
    "Snowflake/snowflake-arctic-embed-m-v1.5": Published(
        "Bert",
        "Model",
        "bert",
        _config(BERT, "BertModel"),
        modules=(CLS, NORMALIZE),
        transformer=LENGTH,
        settings={
            **SETTINGS,
            "prompts": {"query": "Represent this sentence for searching relevant passages: "},
        },
        tokenizer_config=BERT_TOKENIZER,
        beside=("onnx/model.onnx", "gguf/snowflake-arctic-embed-m-v1.5-f16.gguf"),
    ),
    "Snowflake/snowflake-arctic-embed-l-v2.0": Published(
        "XLMRoberta",
        "Model",
        "xlm-r",
        _config(XLM_R, "XLMRobertaModel", _name_or_path="BAAI/bge-m3-retromae"),
        shape={"type_vocab_size": 1},
        modules=(CLS, NORMALIZE),
        transformer=LENGTH,
        settings={**SETTINGS, "prompts": {"query": "query: "}},
        beside=("onnx/model.onnx", "onnx/model.onnx_data"),
    ),
    "mixedbread-ai/mxbai-embed-large-v1": Published(
        "Bert",
        "Model",
        "bert",
        _config(BERT, "BertModel", torch_dtype="float16", use_cache=False),
        modules=(CLS,),
        transformer=LENGTH,
        settings={
            **VERSIONS,
            "prompts": {
                "query": "Represent this sentence for searching relevant passages: ",
                "passage": "",
            },
            "default_prompt_name": None,
        },
        tokenizer_config=BERT_TOKENIZER,
        beside=("onnx/model.onnx", "gguf/mxbai-embed-large-v1-f16.gguf", *OPENVINO),
    ),
    "mixedbread-ai/mxbai-rerank-base-v1": Published(
        "DebertaV2",
        "ForSequenceClassification",
        "modern",
        {
            "_name_or_path": "mixedbread-ai/mxbai-rerank-base-v1",
            "architectures": ["DebertaV2ForSequenceClassification"],
            "attention_probs_dropout_prob": 0.1,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "hidden_size": 768,
            **LABEL,
            "initializer_range": 0.02,
            "intermediate_size": 3072,
            "layer_norm_eps": 1e-07,
            "max_position_embeddings": 512,
            "max_relative_positions": -1,
            "model_type": "deberta-v2",
            "norm_rel_ebd": "layer_norm",
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "pad_token_id": 0,
            "pooler_dropout": 0,
            "pooler_hidden_act": "gelu",
            "pooler_hidden_size": HIDDEN,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "position_buckets": 256,
            "relative_attention": True,
            "share_att_key": True,
            "torch_dtype": "float16",
            "transformers_version": "4.38.2",
            "type_vocab_size": 0,
            "vocab_size": 128100,
        },
        shape={
            "num_labels": 1,
            "type_vocab_size": 0,
            "position_biased_input": False,
            "relative_attention": True,
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "position_buckets": 16,
            "pooler_hidden_size": HIDDEN,
        },
        beside=("onnx/model.onnx", "onnx/model_quantized.onnx"),
        reference="pairs",
    ),
    "Qwen/Qwen3-Embedding-0.6B": Published(
        "Qwen3",
        "Model",
        "qwen",
        _config(QWEN3, "Qwen3ForCausalLM"),
        shape={"tie_word_embeddings": True},
        modules=(LAST, NORMALIZE),
        settings={
            "prompts": {
                "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
                "document": "",
            },
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        files={
            "generation_config.json": {
                "bos_token_id": 151643,
                "eos_token_id": 151643,
                "max_new_tokens": 2048,
                "transformers_version": "4.51.3",
            }
        },
    ),
    "google/embeddinggemma-300m": Published(
        "Gemma3Text",
        "Model",
        "gemma",
        {
            "_sliding_window_pattern": 6,
            "architectures": ["Gemma3TextModel"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "bos_token_id": 2,
            "dtype": "float32",
            "eos_token_id": 1,
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 768,
            "initializer_range": 0.02,
            "intermediate_size": 1152,
            "layer_types": [],
            "max_position_embeddings": 2048,
            "model_type": "gemma3_text",
            "num_attention_heads": 3,
            "num_hidden_layers": 24,
            "num_key_value_heads": 1,
            "pad_token_id": 0,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": 512,
            "transformers_version": "4.57.0.dev0",
            "use_bidirectional_attention": True,
            "use_cache": True,
            "vocab_size": 262144,
        },
        shape={
            "use_bidirectional_attention": True,
            "query_pre_attn_scalar": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        modules=(
            MEAN,
            dense(HIDDEN, 4 * HIDDEN, activation=IDENTITY, bias=False),
            dense(4 * HIDDEN, HIDDEN, activation=IDENTITY, bias=False, seed=1),
            NORMALIZE,
        ),
        transformer=LENGTH,
        settings={
            "model_type": "SentenceTransformer",
            "__version__": {"sentence_transformers": "5.1.0", "transformers": "4.57.0.dev0", "pytorch": "2.8.0+cu128"},
            "prompts": {
                "query": "task: search result | query: ",
                "document": "title: none | text: ",
                "BitextMining": "task: search result | query: ",
                "Clustering": "task: clustering | query: ",
                "Retrieval-query": "task: search result | query: ",
                "Retrieval-document": "title: none | text: ",
            },
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        files={"generation_config.json": {"cache_implementation": "hybrid", "do_sample": True, "top_k": 64}},
    ),
    "sentence-transformers/all-mpnet-base-v2": Published(
        "MPNet",
        "ForMaskedLM",
        "xlm-r",
        {
            "_name_or_path": "microsoft/mpnet-base",
            "architectures": ["MPNetForMaskedLM"],
            "attention_probs_dropout_prob": 0.1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "hidden_size": 768,
            "initializer_range": 0.02,
            "intermediate_size": 3072,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 514,
            "model_type": "mpnet",
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "pad_token_id": 1,
            "relative_attention_num_buckets": 32,
            "transformers_version": "4.8.2",
            "vocab_size": 30527,
        },
        modules=(OLD_MEAN, NORMALIZE),
        transformer=LENGTH,
        settings={"__version__": {"sentence_transformers": "2.0.0", "transformers": "4.6.1", "pytorch": "1.8.1"}},
        files={"data_config.json": [{"name": "stackexchange_title_title.jsonl.gz", "lines": 304525, "weight": 47}]},
        beside=("pytorch_model.bin", "train_script.py", *ONNX, *OPENVINO),
    ),
    "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2": Published(
        "Bert",
        "Model",
        "cased",
        _config(BERT, "BertModel", _name_or_path="old_models/paraphrase-multilingual-MiniLM-L12-v2/0_Transformer"),
        modules=(OLD_MEAN,),
        transformer=LENGTH,
        settings={"__version__": {"sentence_transformers": "2.0.0", "transformers": "4.7.0", "pytorch": "1.9.0+cu102"}},
        beside=("pytorch_model.bin", "tf_model.h5", "unigram.json", *ONNX, *OPENVINO),
    ),
    "sentence-transformers/distiluse-base-multilingual-cased-v2": Published(
        "DistilBert",
        "Model",
        "cased",
        {
            "_name_or_path": "old_models/distiluse-base-multilingual-cased-v2/0_Transformer",
            "activation": "gelu",
            "architectures": ["DistilBertModel"],
            "attention_dropout": 0.1,
            "dim": 768,
            "dropout": 0.1,
            "hidden_dim": 3072,
            "initializer_range": 0.02,
            "max_position_embeddings": 512,
            "model_type": "distilbert",
            "n_heads": 12,
            "n_layers": 6,
            "output_hidden_states": True,
            "output_past": True,
            "pad_token_id": 0,
            "qa_dropout": 0.1,
            "seq_classif_dropout": 0.2,
            "sinusoidal_pos_embds": False,
            "tie_weights_": True,
            "transformers_version": "4.7.0",
            "vocab_size": 119547,
        },
        shape={"dim": HIDDEN, "hidden_dim": 48, "n_heads": 4, "n_layers": 2},
        modules=(OLD_MEAN, dense(HIDDEN, 24)),
        transformer=LENGTH,
        settings={"__version__": {"sentence_transformers": "2.0.0", "transformers": "4.7.0", "pytorch": "1.9.0+cu102"}},
        beside=("pytorch_model.bin", "tf_model.h5", "2_Dense/pytorch_model.bin", *ONNX, *OPENVINO),
    ),
    "sentence-transformers/LaBSE": Published(
        "Bert",
        "Model",
        "cased",
        _config(BERT, "BertModel", _name_or_path="old_models/LaBSE/0_Transformer") | MULTILINGUAL_POOLER,
        modules=(
            Module(
                "Pooling",
                {
                    **OLD_MEAN.config,
                    **dict.fromkeys(["pooling_mode_mean_tokens"], False),
                    "pooling_mode_cls_token": True,
                },
            ),
            dense(HIDDEN, HIDDEN),
            NORMALIZE,
        ),
        transformer={"max_seq_length": LONGEST, "do_lower_case": False},
        beside=("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "2_Dense/pytorch_model.bin", *ONNX),
    ),
    "sentence-transformers/sentence-t5-base": Published(
        "T5",
        "EncoderModel",
        "t5",
        {
            "_name_or_path": "models/sentence-t5-base",
            "architectures": ["T5EncoderModel"],
            "d_ff": 3072,
            "d_kv": 64,
            "d_model": 768,
            "decoder_start_token_id": 0,
            "dropout_rate": 0.1,
            "eos_token_id": 1,
            "feed_forward_proj": "relu",
            "initializer_factor": 1.0,
            "is_encoder_decoder": True,
            "layer_norm_epsilon": 1e-06,
            "model_type": "t5",
            "n_positions": 512,
            "num_decoder_layers": 12,
            "num_heads": 12,
            "num_layers": 12,
            "output_past": True,
            "pad_token_id": 0,
            "relative_attention_num_buckets": 32,
            "task_specific_params": {"summarization": {"early_stopping": True, "prefix": "summarize: "}},
            "torch_dtype": "float32",
            "transformers_version": "4.12.0.dev0",
            "use_cache": True,
            "vocab_size": 32128,
        },
        shape={"d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "n_positions": 512},
        modules=(OLD_MEAN, dense(HIDDEN, 24, activation=IDENTITY, bias=False), NORMALIZE),
        transformer=LENGTH,
        settings={"__version__": {"sentence_transformers": "2.2.0", "transformers": "4.7.0", "pytorch": "1.9.0+cu102"}},
        beside=("pytorch_model.bin", "rust_model.ot", "2_Dense/rust_model.ot", "2_Dense/pytorch_model.bin", *ONNX),
    ),
    "sentence-transformers/msmarco-distilbert-base-tas-b": Published(
        "DistilBert",
        "Model",
        "bert",
        {
            "_name_or_path": "sebastian-hofstaetter/distilbert-dot-tas_b-b256-msmarco",
            "activation": "gelu",
            "architectures": ["DistilBertModel"],
            "attention_dropout": 0.1,
            "dim": 768,
            "dropout": 0.1,
            "hidden_dim": 3072,
            "initializer_range": 0.02,
            "max_position_embeddings": 512,
            "model_type": "distilbert",
            "n_heads": 12,
            "n_layers": 6,
            "pad_token_id": 0,
            "qa_dropout": 0.1,
            "seq_classif_dropout": 0.2,
            "sinusoidal_pos_embds": False,
            "tie_weights_": True,
            "transformers_version": "4.6.1",
            "vocab_size": 30522,
        },
        shape={"dim": HIDDEN, "hidden_dim": 48, "n_heads": 4, "n_layers": 2},
        modules=(
            Module("Pooling", {**OLD_MEAN.config, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}),
        ),
        transformer=LENGTH,
        beside=("pytorch_model.bin", "tf_model.h5", *ONNX),
    ),
    "cross-encoder/ms-marco-MiniLM-L6-v2": Published(
        "Bert",
        "ForSequenceClassification",
        "bert",
        _config(BERT, "BertForSequenceClassification", transformers_version="4.49.0")
        | LABEL
        | {"sentence_transformers": {"activation_fn": IDENTITY, "version": "4.0.1"}},
        shape={"num_labels": 1},
        tokenizer_config=BERT_TOKENIZER,
        beside=("pytorch_model.bin", "flax_model.msgpack", *ONNX, *OPENVINO),
        reference="pairs",
    ),
    "cross-encoder/nli-deberta-v3-base": Published(
        "DebertaV2",
        "ForSequenceClassification",
        "modern",
        {
            "architectures": ["DebertaV2ForSequenceClassification"],
            "attention_probs_dropout_prob": 0.1,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "hidden_size": 768,
            "id2label": {"0": "contradiction", "1": "entailment", "2": "neutral"},
            "initializer_range": 0.02,
            "intermediate_size": 3072,
            "label2id": {"contradiction": 0, "entailment": 1, "neutral": 2},
            "layer_norm_eps": 1e-07,
            "max_position_embeddings": 512,
            "model_type": "deberta-v2",
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "pad_token_id": 0,
            "position_biased_input": False,
            "transformers_version": "4.49.0",
            "type_vocab_size": 0,
            "vocab_size": 128100,
            "sentence_transformers": {"activation_fn": IDENTITY, "version": "4.1.0.dev0"},
        },
        shape={"num_labels": 3, "type_vocab_size": 0, "position_biased_input": False},
        beside=("pytorch_model.bin", *ONNX, *OPENVINO),
        reference="pairs",
    ),
    "naver/splade-v3": Published(
        "Bert",
        "ForMaskedLM",
        "bert",
        _config(BERT, "BertForMaskedLM", _name_or_path="naver/splade-v3", torch_dtype="float32"),
        modules=(
            Module(
                "SpladePooling",
                {"pooling_strategy": "max", "activation_function": "relu", "word_embedding_dimension": None},
            ),
        ),
        transformer=LENGTH,
        settings={
            "model_type": "SparseEncoder",
            "__version__": {"sentence_transformers": "5.0.0", "transformers": "4.50.3", "pytorch": "2.6.0+cu124"},
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "dot",
        },
        tokenizer_config=BERT_TOKENIZER,
        types={
            "Transformer": "sentence_transformers.sparse_encoder.models.MLMTransformer",
            "SpladePooling": "sentence_transformers.sparse_encoder.models.SpladePooling",
        },
        beside=("pytorch_model.bin",),
        reference="sparse",
    ),
    "colbert-ir/colbertv2.0": Published(
        "Bert",
        "Model",
        "colbert",
        _config(BERT, "HF_ColBERT", _name_or_path="bert-base-uncased"),
        files={
            "artifact.metadata": {
                "query_maxlen": 32,
                "doc_maxlen": 60,
                "dim": 16,
                "similarity": "cosine",
                "mask_punctuation": True,
                "attend_to_mask_tokens": False,
                "query_token_id": "[unused0]",
                "doc_token_id": "[unused1]",
                "query_token": "[Q]",
                "doc_token": "[D]",
                "checkpoint": "/future/u/okhattab/root/unit/experiments",
            }
        },
        beside=("pytorch_model.bin", "onnx/model.onnx"),
        prefix="bert.",
        tensors={"linear.weight": (16, HIDDEN)},
        tokenizer_config=BERT_TOKENIZER,
        reference="tokens",
    ),
    "answerdotai/answerai-colbert-small-v1": Published(
        "Bert",
        "Model",
        "colbert",
        _config(
            BERT,
            "HF_ColBERT",
            _name_or_path="bclavie/small_colbert",
            id2label={"0": "LABEL_0"},
            label2id={"LABEL_0": 0},
        ),
        files={
            "artifact.metadata": {
                "query_maxlen": 32,
                "doc_maxlen": 60,
                "dim": 12,
                "similarity": "cosine",
                "mask_punctuation": True,
                "attend_to_mask_tokens": False,
                "query_token_id": "[unused0]",
                "doc_token_id": "[unused1]",
                "query_token": "[Q]",
                "doc_token": "[D]",
                "use_ib_negatives": True,
            }
        },
        beside=("onnx/model.onnx", "onnx/model_int8.onnx", "vespa_colbert.onnx"),
        prefix="bert.",
        tensors={"linear.weight": (12, HIDDEN)},
        tokenizer_config=BERT_TOKENIZER,
        reference="tokens",
    ),
    "facebook/bart-large-mnli": Published(
        "Bart",
        "ForSequenceClassification",
        "xlm-r",
        {
            "_num_labels": 3,
            "activation_dropout": 0.0,
            "activation_function": "gelu",
            "add_final_layer_norm": False,
            "architectures": ["BartForSequenceClassification"],
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "classif_dropout": 0.0,
            "classifier_dropout": 0.0,
            "d_model": 1024,
            "decoder_attention_heads": 16,
            "decoder_ffn_dim": 4096,
            "decoder_layerdrop": 0.0,
            "decoder_layers": 12,
            "decoder_start_token_id": 2,
            "dropout": 0.1,
            "encoder_attention_heads": 16,
            "encoder_ffn_dim": 4096,
            "encoder_layerdrop": 0.0,
            "encoder_layers": 12,
            "eos_token_id": 2,
            "forced_eos_token_id": 2,
            "gradient_checkpointing": False,
            "id2label": {"0": "contradiction", "1": "neutral", "2": "entailment"},
            "init_std": 0.02,
            "is_encoder_decoder": True,
            "label2id": {"contradiction": 0, "entailment": 2, "neutral": 1},
            "max_position_embeddings": 1024,
            "model_type": "bart",
            "normalize_before": False,
            "num_hidden_layers": 12,
            "output_past": False,
            "pad_token_id": 1,
            "scale_embedding": False,
            "transformers_version": "4.7.0.dev0",
            "use_cache": True,
            "vocab_size": 50265,
        },
        shape={
            "num_labels": 3,
            "d_model": HIDDEN,
            "encoder_layers": 2,
            "num_hidden_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
        },
        beside=("pytorch_model.bin", "flax_model.msgpack", "rust_model.ot"),
        reference="classes",
    ),
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english": Published(
        "DistilBert",
        "ForSequenceClassification",
        "bert",
        {
            "activation": "gelu",
            "architectures": ["DistilBertForSequenceClassification"],
            "attention_dropout": 0.1,
            "dim": 768,
            "dropout": 0.1,
            "finetuning_task": "sst-2",
            "hidden_dim": 3072,
            "id2label": {"0": "NEGATIVE", "1": "POSITIVE"},
            "initializer_range": 0.02,
            "label2id": {"NEGATIVE": 0, "POSITIVE": 1},
            "max_position_embeddings": 512,
            "model_type": "distilbert",
            "n_heads": 12,
            "n_layers": 6,
            "output_past": True,
            "pad_token_id": 0,
            "qa_dropout": 0.1,
            "seq_classif_dropout": 0.2,
            "sinusoidal_pos_embds": False,
            "tie_weights_": True,
            "transformers_version": "4.17.0",
            "vocab_size": 30522,
        },
        shape={"dim": HIDDEN, "hidden_dim": 48, "n_heads": 4, "n_layers": 2, "num_labels": 2},
        beside=("pytorch_model.bin", "tf_model.h5", "rust_model.ot", "map.jpeg", "onnx/model.onnx"),
        reference="classes",
    ),
    "cardiffnlp/twitter-roberta-base-sentiment": Published(
        "Roberta",
        "ForSequenceClassification",
        "xlm-r",
        {
            **{key: value for key, value in XLM_R.items() if key not in ("output_past", "classifier_dropout")},
            "_name_or_path": "tweeteval_new/roberta-base-rt-sentiment/",
            "architectures": ["RobertaForSequenceClassification"],
            "gradient_checkpointing": False,
            "id2label": {"0": "negative", "1": "neutral", "2": "positive"},
            "label2id": {"negative": 0, "neutral": 1, "positive": 2},
            "model_type": "roberta",
        },
        shape={"num_labels": 3, "type_vocab_size": 1},
        beside=("pytorch_model.bin", "tf_model.h5"),
        reference="classes",
    ),
    "dslim/bert-base-NER": Published(
        "Bert",
        "ForTokenClassification",
        "cased",
        {
            **BERT,
            "_num_labels": 9,
            "architectures": ["BertForTokenClassification"],
            "id2label": {"0": "O", "1": "B-MISC", "2": "I-MISC", "3": "B-PER", "4": "I-PER"},
            "label2id": {"O": 0, "B-MISC": 1, "I-MISC": 2, "B-PER": 3, "I-PER": 4},
            "output_past": True,
        },
        shape={"num_labels": 5},
        beside=("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx"),
        reference="entities",
    ),
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": Published(
        "Qwen3",
        "ForSequenceClassification",
        "qwen",
        {
            **_config(QWEN3, "Qwen3ForSequenceClassification", transformers_version="4.52.4", use_cache=False),
            **LABEL,
            "pad_token_id": 151643,
        },
        shape={"tie_word_embeddings": True, "num_labels": 1},
        files={"additional_chat_templates/none.txt": ""},
        beside=("training_args.bin",),
        reference="classes",
    ),
}
"""Repositories by their names on the hub."""


def write(published: Published, folder: Path) -> Path:
    """Write the files of a repository."""
    checkpoints.classifier(
        folder,
        published.family,
        published.head,
        tokenizer=tokenizers()[published.tokenizer],
        **{"max_position_embeddings": LONGEST + 8, **published.shape},
    )
    small = checkpoints.read_json(folder / "config.json")
    sized = {key: small.get(key) for key in published.config.keys() & SIZES}
    content = {**published.config, **sized}
    absent = [key for key, value in sized.items() if value is None]
    checkpoints.write_json(folder / "config.json", {key: content[key] for key in content if key not in absent})
    _add_tensors(published, folder / "model.safetensors")
    if published.tokenizer_config:
        checkpoints.edit_json(folder / "tokenizer_config.json", **published.tokenizer_config)
    if published.modules is not None:
        checkpoints.write_modules(
            folder,
            *published.modules,
            new=published.new,
            transformer=published.transformer,
            settings=published.settings,
            pickled=published.pickled,
        )
        listed = checkpoints.read_json(folder / "modules.json")
        for entry in listed:
            entry["type"] = published.types.get(entry["type"].rpartition(".")[2], entry["type"])
        checkpoints.write_json(folder / "modules.json", listed)
    for name, content in published.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    for name in (".gitattributes", "README.md", *published.beside):
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"not to be read")
    return folder


def _add_tensors(published: Published, file: Path) -> None:
    """Add tensors for which Transformers has no class."""
    if not published.tensors:
        return
    generator = torch.Generator().manual_seed(7)
    added = {name: torch.randn(*shape, generator=generator) for name, shape in published.tensors.items()}
    weights = {published.prefix + name: tensor for name, tensor in load_file(file).items()}
    save_file({**weights, **added}, file, metadata={"format": "pt"})
