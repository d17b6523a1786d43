"""Every JSON key that Sentence-Transformers and PyLate read: honoured like the reference, without effect, or refused.

The keys are those of the installed release: the arguments of its modules' classes, and those that its loaders look up.
Each has rows here that set it in a folder of a kind that reads it. A row that is *honoured* gives the reference's
numbers, which are others than without the key; one *without effect* leaves the reference's numbers as they were, and
Cenote's are the same; one that is *refused* is named in the error.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling, MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SparseStaticEmbedding, SpladePooling
from transformers import AutoTokenizer

from cenote import LLM
from cenote.errors import CheckpointError
from tests import checkpoints
from tests.checkpoints import HIDDEN, Module, dense, layer_norm, pooling

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Rows = list[np.ndarray]

BERT, SETTINGS = "sentence_bert_config.json", "config_sentence_transformers.json"
TANH, IDENTITY = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"
CUT = {"truncate_prompt_tokens": -1}
TEXTS = ["The quick brown fox jumps over the lazy dog.", "one TWO three", "hello, water stone! my name is a pit"]
PAIRS = [(TEXTS[1], TEXTS[0]), (TEXTS[2], TEXTS[1])]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ task }}"
    "{% if add_generation_prompt %}<end>{% endif %}"
)
PROMPTS = {"query": "find the ", "document": ""}


def hidden(**message: str) -> dict[str, Any]:
    entry = {"method": "forward", "method_output_name": "last_hidden_state"}
    return {"text": entry, "message": {**entry, **message}} if message else {"text": entry}


LOGITS = {"text": {"method": "forward", "method_output_name": "logits"}}
DENSE = {"modality_config": hidden(), "module_output_name": "token_embeddings"}
CLASSES = {
    "transformer_task": "sequence-classification",
    "modality_config": LOGITS,
    "module_output_name": "scores",
}
MASKED = {"transformer_task": "fill-mask", "modality_config": LOGITS, "module_output_name": "token_embeddings"}


# Folders, by kind


def _dense(path: Path) -> Path:
    modules = (pooling("mean"), dense(HIDDEN, HIDDEN), layer_norm(HIDDEN), Module("Dropout", {"dropout": 0.5}))
    settings = {"model_type": "SentenceTransformer", "prompts": PROMPTS}
    return checkpoints.write_modules(checkpoints.bert(path), *modules, transformer=DENSE, settings=settings)


def _messages(path: Path) -> Path:
    folder = checkpoints.decoder(path)
    checkpoints.edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    transformer = {**DENSE, "modality_config": hidden(format="flat")}
    settings = {"model_type": "SentenceTransformer", "prompts": PROMPTS}
    return checkpoints.write_modules(folder, pooling("lasttoken"), transformer=transformer, settings=settings)


def _pairs(path: Path, labels: int = 1) -> Path:
    folder = checkpoints.classifier(path, num_labels=labels)
    settings = {"model_type": "CrossEncoder", "prompts": {"q": "find the "}}
    return checkpoints.write_modules(folder, transformer=CLASSES, settings=settings)


def _modular(path: Path) -> Path:
    head = dense(HIDDEN, 1, activation=IDENTITY, module_output_name="scores", module_input_name="sentence_embedding")
    modules = (pooling("cls"), dense(HIDDEN, HIDDEN), head)
    folder = checkpoints.bert(path)
    return checkpoints.write_modules(folder, *modules, transformer=DENSE, settings={"model_type": "CrossEncoder"})


def _sparse(path: Path) -> Path:
    pool = Module("SpladePooling", {"pooling_strategy": "max", "activation_function": "relu"})
    settings = {"model_type": "SparseEncoder", "prompts": PROMPTS}
    folder = checkpoints.bert(path, masked_lm=True)
    return checkpoints.write_modules(folder, pool, transformer=MASKED, settings=settings)


def _tokens(path: Path) -> Path:
    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    modules = (
        dense(HIDDEN, 16, bias=False, activation=IDENTITY, **names),
        Module("MultiVectorMask", {"skiplist_words": [","]}),
        Module("Normalize", names),
        Module("HierarchicalTokenPooling", {"pool_factor": 1.0}),
    )
    settings = {"model_type": "MultiVectorEncoder", "prompts": PROMPTS}
    folder = checkpoints.bert(path)
    return checkpoints.write_modules(folder, *modules, transformer=DENSE, settings=settings)


def _logits(path: Path) -> Path:
    score = Module("LogitScore", {"true_token_id": 90, "false_token_id": 70})
    transformer = {
        "transformer_task": "text-generation",
        "modality_config": LOGITS,
        "module_output_name": "causal_logits",
    }
    settings = {"model_type": "CrossEncoder", "activation_fn": IDENTITY}
    return checkpoints.write_modules(checkpoints.decoder(path), score, transformer=transformer, settings=settings)


def _routed(path: Path) -> Path:
    """Queries by a table of weights."""
    source = checkpoints.bert(path / "source", masked_lm=True)
    table = torch.rand(len(checkpoints.wordpiece()), generator=torch.Generator().manual_seed(0))
    router = Router.for_query_document(
        query_modules=[SparseStaticEmbedding(AutoTokenizer.from_pretrained(source), weight=table)],
        document_modules=[MLMTransformer(str(source)), SpladePooling("max")],
    )
    SparseEncoder(modules=[router], device="cpu", prompts={}).save_pretrained(str(path / "routed"))
    return path / "routed"


def _pylate(path: Path) -> Path:
    """As PyLate wrote it before Sentence-Transformers 5, without the model's type, which the reference needs."""
    folder = checkpoints.bert(path)
    projection = dense(HIDDEN, 16, bias=False, activation=IDENTITY)
    settings = {"similarity_fn_name": "MaxSim", "query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 12}
    checkpoints.write_modules(folder, projection, transformer={"max_seq_length": 30}, settings=settings)
    listed = checkpoints.read_json(folder / "modules.json")
    listed[1]["type"] = "pylate.models.Dense.Dense"
    checkpoints.write_json(folder / "modules.json", listed)
    return folder


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "dense": _dense,
    "messages": _messages,
    "pairs": _pairs,
    "classes": partial(_pairs, labels=3),
    "modular": _modular,
    "logits": _logits,
    "sparse": _sparse,
    "routed": _routed,
    "tokens": _tokens,
    "pylate": _pylate,
}


# The two sides


def ours(folder: Path, kind: str) -> Rows:
    """Cenote's numbers: of both sides and of no side, or of pairs."""
    with LLM(model=str(folder), plain=True, auto_truncate=True) as llm:
        if kind in ("pairs", "modular", "logits"):
            return [np.array([llm.score(*pair, use_tqdm=False)[0].outputs.score]) for pair in PAIRS]
        if kind == "classes":
            pairs = [{"text": first, "text_pair": second} for first, second in PAIRS]
            return [np.array(llm.classify([pair], use_tqdm=False)[0].outputs.probs) for pair in pairs]
        rows: Rows = []
        for side in (None, "query", "document"):
            rows += _embedded(llm, kind, side)
        return rows


def _embedded(llm: LLM, kind: str, side: str | None) -> Rows:
    if kind in ("tokens", "pylate"):
        outputs = llm.encode(TEXTS, pooling_task="token_embed", input_type=side, use_tqdm=False)
        return [output.outputs.data.numpy() for output in outputs]
    if kind in ("sparse", "routed"):
        encoded = llm.encode(TEXTS, pooling_task="embed", input_type=side, use_tqdm=False)
        return [output.outputs.data.numpy() for output in encoded]
    vectors = llm.embed(TEXTS, input_type=side, use_tqdm=False)
    return [np.array(output.outputs.embedding) for output in vectors]


REFERENCES = {
    "sparse": SparseEncoder,
    "routed": SparseEncoder,
    "tokens": MultiVectorEncoder,
    "pylate": MultiVectorEncoder,
}


def theirs(folder: Path, kind: str) -> Rows:
    """The reference's numbers, one input at a time."""
    if kind in ("pairs", "classes", "modular", "logits"):
        scorer = CrossEncoder(str(folder), device="cpu")
        return [np.atleast_1d(scorer.predict(pair, show_progress_bar=False)) for pair in PAIRS]
    model = REFERENCES.get(kind, SentenceTransformer)(str(folder), device="cpu")
    rows: Rows = []
    for encode in (model.encode, model.encode_query, model.encode_document):
        for text in TEXTS:
            row = encode([text], show_progress_bar=False)[0]
            rows.append(np.asarray(row.to_dense() if kind in ("sparse", "routed") else row))
    return rows


def moved(first: Rows, second: Rows) -> float:
    """The largest difference; infinity where shapes differ."""
    if [row.shape for row in first] != [row.shape for row in second]:
        return float("inf")
    return max(float(np.abs(a - b).max(initial=0)) for a, b in zip(first, second, strict=True))


# The rows


@dataclass(frozen=True)
class Row:
    """A key that is set in a folder.

    Attributes:
        key: with dots for nested objects, and numbers for entries of a list.
        outcome: see the module.
        others: further keys of the file that the value needs.
    """

    kind: str
    file: str
    key: str
    value: Any
    outcome: Literal["honoured", "idle", "refused"]
    others: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} {self.file} {self.key}={json.dumps(self.value)[:40]}"


def honoured(kind: str, file: str, key: str, *values: Any, **others: Any) -> list[Row]:
    return [Row(kind, file, key, value, "honoured", tuple(others.items())) for value in values]


def idle(kind: str, file: str, key: str, *values: Any) -> list[Row]:
    return [Row(kind, file, key, value, "idle") for value in values]


def refused(kind: str, file: str, key: str, *values: Any) -> list[Row]:
    return [Row(kind, file, key, value, "refused") for value in values]


LAYER = {"text": {"method": "forward", "method_output_name": ["hidden_states", -2]}}
PARTS = "{% for p in m.content %}{% if p.type %}{{ p.text }}{% endif %}{% endfor %}"
STRUCTURED = "{% for m in messages %}<{{ m.role }}>" + PARTS + "{% endfor %}"

SECTIONS = ("model_kwargs", "processor_kwargs", "config_kwargs")
PLACES = {
    "cache_dir": "elsewhere",
    "revision": "other",
    "token": "none",
    "local_files_only": False,
    "subfolder": "other",
    "trust_remote_code": True,
}
"""Arguments that say where files are."""
ARRANGED = {
    "padding": "max_length",
    "padding_side": "right",
    "pad_to_multiple_of": 8,
    "verbose": False,
    "logits_to_keep": 3,
}
"""Arguments of the tokenizer that no row depends on."""

TRANSFORMER_ROWS = [
    *honoured("dense", BERT, "max_seq_length", 7),
    *honoured("dense", BERT, "do_lower_case", True),
    *honoured("dense", BERT, "query_length", 5),
    *honoured("dense", BERT, "document_length", 5),
    *honoured("dense", BERT, "config_args", {"hidden_act": "relu"}),
    *honoured("dense", BERT, "config_kwargs", {"hidden_act": "relu"}),
    *honoured("dense", BERT, "tokenizer_args", {"model_max_length": 6}),
    *honoured("dense", BERT, "tokenizer_args", {"model_max_length": 6, "truncation_side": "left"}),
    *honoured("dense", BERT, "processor_kwargs", {"model_max_length": 6}),
    *honoured("dense", BERT, "modality_config", LAYER),
    *honoured("dense", BERT, "processing_kwargs.text.max_length", 6),
    *honoured("dense", BERT, "processing_kwargs.text.add_special_tokens", False),
    *idle("dense", BERT, "processing_kwargs.text.truncation", True, "longest_first", "only_first"),
    *honoured("messages", BERT, "processing_kwargs.text.truncation", False, max_seq_length=20),
    *honoured("dense", BERT, "processing_kwargs.common.max_length", 6),
    *honoured("pairs", BERT, "processing_kwargs.text.return_token_type_ids", False),
    *honoured("pairs", BERT, "tokenizer_args", {"model_max_length": 12}),
    *honoured("pairs", BERT, "config_args", {"hidden_act": "relu"}),
    *idle("classes", BERT, "config_kwargs", {"id2label": {"0": "no", "1": "maybe", "2": "yes"}}),
    *honoured("sparse", BERT, "processing_kwargs.text.max_length", 6),
    *honoured("sparse", BERT, "query_length", 5),
    *honoured("tokens", BERT, "query_length", 5),
    *honoured("tokens", BERT, "document_length", 5),
    *honoured("tokens", BERT, "query_expansion", {"strategy": "fixed", "length": 12}),
    *honoured("tokens", BERT, "query_expansion", {"strategy": "min", "length": 16, "attend": True}),
    *honoured("messages", BERT, "processing_kwargs.chat_template", {"add_generation_prompt": True}),
    *honoured("messages", BERT, "processing_kwargs.chat_template", {"chat_template": TEMPLATE + "x"}),
    *honoured("messages", BERT, "processing_kwargs.chat_template", {"max_length": 20}),
    *honoured("messages", BERT, "processing_kwargs.chat_template", {"restore_suffix": False}, max_seq_length=20),
    *honoured("messages", BERT, "max_seq_length", 20),
    *honoured("messages", BERT, "query_length", 20),
    *honoured("messages", BERT, "modality_config", hidden()),
    *honoured("messages", BERT, "processor_kwargs", {"chat_template": TEMPLATE + "y"}),
    *honoured("messages", BERT, "modality_config", hidden(format="structured")),
    *honoured(
        "messages", BERT, "modality_config", hidden(format="auto"), processor_kwargs={"chat_template": STRUCTURED}
    ),
    *idle("dense", BERT, "transformer_task", "feature-extraction"),
    *idle("dense", BERT, "module_output_name", "token_embeddings"),
    *idle("dense", BERT, "unpad_inputs", True, False),
    *idle("dense", BERT, "backend", "onnx"),
    *idle("dense", BERT, "tokenizer_name_or_path", None),
    *idle("dense", BERT, "model_args", {"attn_implementation": "eager"}),
    *idle("dense", BERT, "model_kwargs", {"dtype": "float32"}, {"torch_dtype": "float32"}),
    *idle("dense", BERT, "model_kwargs", {"add_pooling_layer": False}),
    *idle("dense", BERT, "model_kwargs", {"use_safetensors": True}, {"low_cpu_mem_usage": True}),
    *[Row("dense", BERT, section, {name: value}, "idle") for section in SECTIONS for name, value in PLACES.items()],
    *[Row("dense", BERT, f"processing_kwargs.text.{name}", value, "idle") for name, value in ARRANGED.items()],
    *idle("dense", BERT, "processing_kwargs.common.return_tensors", "pt"),
    *[
        Row("dense", BERT, f"processing_kwargs.{part}", {"padding": True}, "idle")
        for part in ("audio", "image", "video")
    ],
    *refused("dense", BERT, "cache_dir", "elsewhere"),
    *refused("dense", BERT, "unknown", 1, None),
    *refused("dense", BERT, "processing_kwargs.unknown", {"a": 1}),
    *refused("dense", BERT, "processing_kwargs.text.stride", 2),
    *refused("dense", BERT, "processing_kwargs.text.truncation", "only_second"),
    *refused("messages", BERT, "processing_kwargs.text.truncation", "only_second"),
    *refused("dense", BERT, "model_kwargs", {"quantization_config": {}}),
    *refused("dense", BERT, "modality_config", {"image": {"method": "forward", "method_output_name": "logits"}}),
    *refused("dense", BERT, "modality_config.text.method", "get_text_features"),
    *refused("dense", BERT, "modality_config.text.method_output_name", "attentions"),
    *refused("dense", BERT, "transformer_task", "any-to-any", "retrieval"),
    *refused("messages", BERT, "processing_kwargs.text.add_special_tokens", True),
    *refused("messages", BERT, "processing_kwargs.chat_template", {"tokenize": False}),
]

SETTINGS_ROWS = [
    *honoured("dense", SETTINGS, "prompts", {"query": "water ", "document": None}),
    *honoured("dense", SETTINGS, "default_prompt_name", "query"),
    *honoured("dense", SETTINGS, "truncate_dim", 12),
    *honoured("messages", SETTINGS, "default_prompt_name", "query"),
    *honoured("pairs", SETTINGS, "default_prompt_name", "q"),
    *honoured("pairs", SETTINGS, "activation_fn", IDENTITY, TANH, "torch.nn.modules.activation.ReLU"),
    *honoured("pairs", SETTINGS, "activation_fn", "torch.nn.modules.activation.Softmax"),
    *honoured("classes", SETTINGS, "activation_fn", "torch.nn.modules.activation.Sigmoid", TANH),
    *honoured("classes", SETTINGS, "activation_fn", "torch.nn.modules.activation.Softmax", "torch.nn.Softplus"),
    *honoured("modular", SETTINGS, "activation_fn", IDENTITY, TANH),
    *honoured("sparse", SETTINGS, "max_active_dims", 7),
    *honoured("tokens", SETTINGS, "query_prefix", "name "),
    *honoured("tokens", SETTINGS, "document_prefix", "name "),
    *honoured("tokens", SETTINGS, "document_length", 6),
    *honoured("tokens", SETTINGS, "query_length", 6),
    *honoured("tokens", SETTINGS, "query_expansion", {"strategy": "fixed", "length": 9}),
    *honoured("pylate", SETTINGS, "do_query_expansion", False),
    *honoured("pylate", SETTINGS, "attend_to_expansion_tokens", True),
    *honoured("pylate", SETTINGS, "attend_to_mask_tokens", True),
    *honoured("pylate", SETTINGS, "skiplist_words", ["water"]),
    *honoured("pylate", SETTINGS, "query_length", 9),
    *honoured("pylate", SETTINGS, "query_prefix", "name "),
    *honoured("pylate", SETTINGS, "document_length", 6),
    *idle("dense", SETTINGS, "similarity_fn_name", "cosine", "dot", None),
    *idle("dense", SETTINGS, "__version__", {"sentence_transformers": "5.4.0"}),
    *idle("dense", SETTINGS, "requirements", {"sentence_transformers": ">=1"}),
    *idle("dense", SETTINGS, "activation_fn", TANH),
    *idle("dense", SETTINGS, "max_active_dims", 3),
    *idle("dense", SETTINGS, "truncate_dim", None),
    *idle("pairs", SETTINGS, "truncate_dim", 1),
    *idle("modular", SETTINGS, "keep_in_fp32_modules", ["2.linear"]),
    *idle("sparse", SETTINGS, "truncate_dim", 4),
    *idle("tokens", SETTINGS, "truncate_dim", 4),
    *idle("dense", SETTINGS, "query_length", 3),
    *idle("dense", SETTINGS, "query_prefix", "name "),
    *refused("dense", SETTINGS, "unknown", 1),
    *refused("dense", SETTINGS, "truncate_dim", 0),
    *refused("dense", SETTINGS, "model_type", "Other"),
    *refused("dense", SETTINGS, "prompts", {"query": 3}),
    *refused("pairs", SETTINGS, "activation_fn", "own.Activation", "torch.nn.modules.activation.GLU"),
]

MODULE_ROWS = [
    *honoured("dense", "1_Pooling/config.json", "pooling_mode", "cls", ["max", "mean"][:1]),
    *honoured("dense", "1_Pooling/config.json", "include_prompt", False),
    *honoured("dense", "2_Dense/config.json", "activation_function", IDENTITY),
    *honoured("dense", "2_Dense/config.json", "use_residual", True),
    *honoured("sparse", "1_SpladePooling/config.json", "pooling_strategy", "sum"),
    *honoured("sparse", "1_SpladePooling/config.json", "activation_function", "log1p_relu"),
    *honoured("tokens", "2_MultiVectorMask/config.json", "skiplist_words", [".", "!"]),
    *honoured("tokens", "2_MultiVectorMask/config.json", "keep_only_token_ids", [2, 16, 208, 209, 210, 212, 215]),
    *honoured("tokens", "2_MultiVectorMask/config.json", "skiplist_tasks", "query", ["query", "document"]),
    *honoured("tokens", "3_Normalize/config.json", "module_input_name", "sentence_embedding"),
    *honoured("tokens", "4_HierarchicalTokenPooling/config.json", "pool_factor", 2.0),
    *honoured("tokens", "4_HierarchicalTokenPooling/config.json", "num_protected_tokens", 2, pool_factor=2.0),
    *honoured("tokens", "4_HierarchicalTokenPooling/config.json", "tasks", ["query"], pool_factor=2.0),
    *honoured("tokens", "4_HierarchicalTokenPooling/config.json", "normalize_embeddings", True, pool_factor=2.0),
    *idle("dense", "1_Pooling/config.json", "embedding_dimension", HIDDEN),
    *idle("dense", "2_Dense/config.json", "module_input_name", "sentence_embedding"),
    *idle("dense", "2_Dense/config.json", "module_output_name", "sentence_embedding", None),
    *idle("dense", "3_LayerNorm/config.json", "dimension", HIDDEN),
    *idle("dense", "4_Dropout/config.json", "dropout", 0.9),
    *idle("sparse", "1_SpladePooling/config.json", "embedding_dimension", 7),
    *idle("sparse", "1_SpladePooling/config.json", "word_embedding_dimension", 7),
    *idle("sparse", "1_SpladePooling/config.json", "chunk_size", 2),
    *idle("tokens", "2_MultiVectorMask/config.json", "keep_only_token_ids", None),
    *idle("tokens", "3_Normalize/config.json", "module_output_name", "token_embeddings"),
    *refused("dense", "1_Pooling/config.json", "unknown", True),
    *refused("dense", "2_Dense/config.json", "unknown", True),
    *refused("dense", "2_Dense/config.json", "module_input_name", "token_embeddings"),
    *refused("dense", "3_LayerNorm/config.json", "eps", 1e-3),
    *idle("dense", "modules.json", "1.idx", 7),
    *idle("dense", "modules.json", "1.name", "other"),
    *idle("dense", "modules.json", "1.kwargs", ["task"]),
    *idle("dense", "modules.json", "2.type", "sentence_transformers.models.Dense"),
    *idle("dense", "modules.json", "2.path", "./2_Dense"),
    *refused("dense", "modules.json", "1.type", "own.Pooling", "sentence_transformers.models.CNN"),
    *refused("dense", "modules.json", "0.type", "own.Transformer", "custom_st.Transformer"),
    *refused("dense", "modules.json", "1.unknown", 1),
]

ROUTES = "router_config.json"
OTHER_ROWS = [
    *honoured("logits", "1_LogitScore/config.json", "true_token_id", 100),
    *honoured("logits", "1_LogitScore/config.json", "false_token_id", 100, None),
    *idle("logits", "1_LogitScore/config.json", "module_input_name", "causal_logits"),
    *idle("logits", BERT, "processing_kwargs.text.logits_to_keep", 0),
    *refused("logits", "1_LogitScore/config.json", "module_input_name", "scores"),
    *idle("routed", ROUTES, "parameters.default_route", "document"),
    *idle("routed", ROUTES, "parameters.allow_empty_key", True, False),
    *idle("routed", ROUTES, "parameters.route_mappings", {}),
    *idle("routed", "query_0_SparseStaticEmbedding/config.json", "frozen", True),
    *refused("routed", ROUTES, "parameters.default_route", "query"),
    *refused("routed", ROUTES, "parameters.route_mappings", {"(None, 'text')": "query"}),
    *refused("routed", ROUTES, "unknown", 1),
]

ROWS = [*TRANSFORMER_ROWS, *SETTINGS_ROWS, *MODULE_ROWS, *OTHER_ROWS]
SOME = [*{(row.kind, row.file, row.outcome): row for row in ROWS if row.outcome != "honoured"}.values()]
"""Of the keys without effect in a file, and of those that are refused, the one of `make test`."""


FILES: dict[type[Any], str] = {
    Transformer: BERT,
    Pooling: "1_Pooling/config.json",
    Dense: "2_Dense/config.json",
    LayerNorm: "3_LayerNorm/config.json",
    Dropout: "4_Dropout/config.json",
    Normalize: "3_Normalize/config.json",
    LogitScore: "1_LogitScore/config.json",
    SpladePooling: "1_SpladePooling/config.json",
    SparseStaticEmbedding: "query_0_SparseStaticEmbedding/config.json",
    MultiVectorMask: "2_MultiVectorMask/config.json",
    HierarchicalTokenPooling: "4_HierarchicalTokenPooling/config.json",
}
"""Modules that Cenote reads, and the file here that has their keys."""

NOT_IN_FILES = {"self", "kwargs", "model_name_or_path", "weight", "tokenizer", "init_weight", "init_bias"}
"""Arguments of their classes that no JSON file can give."""

BASIS = {"in_features", "out_features", "bias", "modality_config", "pooling_mode", "pooling_strategy"}
"""Keys without which no folder here would be one."""


@pytest.mark.parametrize("module", FILES, ids=lambda module: module.__name__)
def test_every_key_of_a_module_has_a_row(module: type[Any]) -> None:
    """Those of the installed release: one that is new, or has gone, shows here."""
    read = {*inspect.signature(module.__init__).parameters, *module.config_keys}
    rows = {row.key.partition(".")[0] for row in ROWS if row.file == FILES[module]}
    assert read - NOT_IN_FILES - BASIS <= rows


SETTINGS_READ = {"prompts", "default_prompt_name", "model_type", "requirements", "__version__", "similarity_fn_name"}
SETTINGS_READ |= {"truncate_dim", "max_active_dims", "activation_fn", "keep_in_fp32_modules"}
SETTINGS_READ |= {"query_prefix", "document_prefix", "query_length", "document_length", "query_expansion"}
SETTINGS_READ |= {"do_query_expansion", "attend_to_expansion_tokens", "attend_to_mask_tokens", "skiplist_words"}


def test_every_setting_has_a_row() -> None:
    """Those that the installed release looks up, by its source: `config.get("x")`, `"x" in config`."""
    sources = [inspect.getsource(sys.modules[model.__module__]) for model in MODELS]
    looked_up = set()
    for source in sources:
        looked_up |= set(re.findall(r"""model_config(?:\.get\(|\[)["'](\w+)["']""", source))
        looked_up |= set(re.findall(r"""["'](\w+)["'] in model_config""", source))
    assert looked_up - {"sentence_transformers"} <= SETTINGS_READ  # which is looked up in `__version__`
    assert {row.key.partition(".")[0] for row in SETTINGS_ROWS} >= SETTINGS_READ


def test_no_key_that_changes_vectors_is_refused_alone() -> None:
    """A key that is honoured somewhere has a row that says so, and none is only refused but for those listed."""
    outcomes: dict[tuple[str, str], set[str]] = {}
    for row in ROWS:
        outcomes.setdefault((row.file, row.key), set()).add(row.outcome)
    only_refused = {key for (_, key), found in outcomes.items() if found == {"refused"}}
    assert only_refused <= REFUSED_KEYS
    counts = Counter(row.outcome for row in ROWS)
    assert counts["honoured"] > counts["refused"]


REFUSED_KEYS = {
    "unknown",
    "1.unknown",
    "eps",
    "cache_dir",
    "processing_kwargs.unknown",
    "processing_kwargs.text.stride",
    "modality_config.text.method",
    "modality_config.text.method_output_name",
    "model_type",
    "1.type",
    "0.type",
}
"""Keys of which every row is refused; of the last five, other values are what the folders here are made of."""

MODELS = (BaseModel, SentenceTransformer, SparseEncoder, CrossEncoder, MultiVectorEncoder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Rows]]:
    """The folder of a kind as it is, and the reference's numbers for it; each is made once."""
    made: dict[str, tuple[Path, Rows]] = {}

    def of(kind: str) -> tuple[Path, Rows]:
        if kind not in made:
            folder = FOLDERS[kind](tmp_path_factory.mktemp(kind))
            made[kind] = folder, theirs(_with_type(folder, kind), kind)
        return made[kind]

    return of


def _with_type(folder: Path, kind: str) -> Path:
    """The folder as the reference takes it: PyLate's needs the type of its model."""
    if kind != "pylate":
        return folder
    copy = folder.with_name(f"{folder.name}-typed")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    checkpoints.edit_json(copy / SETTINGS, model_type="ColBERT")
    return copy


def put(folder: Path, file: str, key: str, value: Any) -> None:
    """Set a key of a JSON file."""
    path = folder / file
    content = checkpoints.read_json(path)
    *above, last = key.split(".")
    place = content
    for name in above:
        place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
    place[last] = value
    checkpoints.write_json(path, content)


NAMED = {
    "1.type": "the module",
    "0.type": "begins with",
    "activation_fn": "activation",
    "processing_kwargs.chat_template": "chat_template",
    "parameters.default_route": "default route",
    "parameters.route_mappings": "maps tasks",
    "modality_config.text.method": "the method forward",
}
"""Words of the refusal where it does not have the key's own name."""


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")  # of torch, in the reference
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=str(row), marks=pytest.mark.full if row.outcome != "honoured" and row not in SOME else ())
        for row in ROWS
    ],
)
def test_a_key(row: Row, plain: Callable[[str], tuple[Path, Rows]], tmp_path: Path) -> None:
    source, before = plain(row.kind)
    folder = shutil.copytree(source, tmp_path / "model")
    for key, value in row.others:
        put(folder, row.file, key, value)
    if row.others:
        before = theirs(_with_type(folder, row.kind), row.kind)
    put(folder, row.file, row.key, row.value)
    if row.outcome == "refused":
        with pytest.raises(CheckpointError, match=NAMED.get(row.key, row.key.rpartition(".")[2])):
            ours(folder, row.kind)
        return
    reference = theirs(_with_type(folder, row.kind), row.kind)
    scale = max(1.0, max(float(np.abs(values).max(initial=0)) for values in reference))
    assert moved(ours(folder, row.kind), reference) <= 2e-5 * scale
    if row.outcome == "idle":
        assert moved(reference, before) <= 2e-5 * scale
    else:
        assert moved(reference, before) > 1e-3 * scale
