"""Folders as well-known models are published: their lists of files, and the JSON in them, with small random weights.

Only entries that give a size or an id of the vocabulary differ from the published ones.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file

from tests import checkpoints
from tests.checkpoints import HIDDEN, Module, flagged_pooling

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

Reference = Literal[
    "sentences",
    "pairs",
    "sparse",
    "tokens",
    "classes",
    "entities",
    "m3",
    "answers",
    "rewards",
    "last",
    "steps",
    "gated",
]

LONGEST = 120
ROOM = 1024
"""Tokens of a model that sees a prompt."""

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

QWEN2 = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151646,
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
class Native:
    """The same repository in the words of Transformers and Sentence-Transformers, where its own are those of its code.

    Attributes:
        config: entries of the config of Transformers' class.
        tokenizer: key of `tokenizers`; empty = the repository's.
        modules: of its Sentence-Transformers folder; `None` = the repository's.
        settings: entries of `config_sentence_transformers.json`.
        zero: tensors that its code does not have, whose place Transformers' class fills with zeros.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = ""
    modules: tuple[Module, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    zero: tuple[str, ...] = ()


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
        listed: entries of modules in `modules.json`, by their class, where they are others.
        files: content of further JSON files, or text.
        beside: names of files beside whose content plays no role.
        prefix: before the names of the tensors of Transformers' class.
        renamed: patterns in the names of tensors of Transformers' class to those of its code.
        fused: matrices for queries, keys and values, and the name of the one that has the rows of the three.
        tensors: further tensors beside the model's, or their shapes.
        pickled: all weights are pickles.
        beside_tensors: tensors in files of their own, or their shapes, by file.
        tokenizer_at: a further folder with the tokenizer.
        words: names of sizes in its config, by Transformers' names.
        tasks: of which it has an adapter each, stacked in its tensors.
        prompt: parts of a rendered pair, which are tokenised apart.
        answers: tokens whose logits rate a pair, the first less the second.
        native: the repository that the reference loads; `None` = this one.
        reference: library or rule that its answers equal.
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
    listed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    prefix: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    fused: tuple[str, str, str, str] | None = None
    tensors: Mapping[str, tuple[int, ...] | Tensor] = field(default_factory=dict)
    pickled: bool = False
    beside_tensors: Mapping[str, Mapping[str, tuple[int, ...] | Tensor]] = field(default_factory=dict)
    tokenizer_at: str = ""
    words: Mapping[str, str] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    prompt: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    native: Native | None = None
    reference: Reference = "sentences"


def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    """Return small tokenizers that mark texts as the published ones do."""

    def marked(first: str, last: str, **options: Any) -> PreTrainedTokenizerBase:
        single = " ".join(part for part in (first, "$A", last) if part)
        special = tuple(part for part in (first, last) if part)
        return checkpoints.byte_level(single, special=special, model_max_length=LONGEST, **options)

    def with_markers(tokenizer: PreTrainedTokenizerBase, *markers: str) -> PreTrainedTokenizerBase:
        tokenizer.add_tokens([*markers])
        return tokenizer

    chat = ("<|im_start|>", "<|im_end|>", "<extra_0>")
    llama = ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    modern = {"cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": None}
    return {
        "bert": checkpoints.wordpiece(lowercase=True, model_max_length=LONGEST),
        "cased": checkpoints.wordpiece(model_max_length=LONGEST),
        "colbert": checkpoints.wordpiece(lowercase=True, more=("[unused0]", "[unused1]"), model_max_length=LONGEST),
        "xlm-r": checkpoints.sentinels(model_max_length=LONGEST),
        "qwen": checkpoints.byte_level(padding_side="left", model_max_length=LONGEST),
        "gemma": marked("<bos>", "<eos>", bos_token="<bos>", eos_token="<eos>"),
        "modern": marked("[CLS]", "[SEP]", **modern),
        "modern-colbert": with_markers(marked("[CLS]", "[SEP]", mask_token="[MASK]", **modern), "[Q] ", "[D] "),
        "jina-colbert": with_markers(
            checkpoints.sentinels(model_max_length=LONGEST), "[QueryMarker]", "[DocumentMarker]"
        ),
        "open": checkpoints.byte_level("$A", padding_side="left", model_max_length=LONGEST),
        "chat": checkpoints.byte_level("$A", special=chat, model_max_length=ROOM),
        "gemma-chat": checkpoints.byte_level("<bos> $A", special=("<bos>",), bos_token="<bos>", model_max_length=ROOM),
        "llama-3": checkpoints.byte_level("$A", special=llama, model_max_length=ROOM),
        "t5": marked("", "</s>", eos_token="</s>"),
        "mistral": marked("<s>", "</s>", bos_token="<s>", eos_token="</s>", padding_side="left"),
    }


def config(config: Mapping[str, Any], architecture: str, **changes: Any) -> dict[str, Any]:
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


def write(published: Published, folder: Path) -> Path:
    """Write the files of a repository."""
    _save(published, folder, published.tokenizer)
    _write_config(published, folder / "config.json")
    _change_tensors(published, folder)
    if published.tokenizer_config:
        checkpoints.edit_json(folder / "tokenizer_config.json", **published.tokenizer_config)
    if published.modules is not None:
        _write_modules(published, folder, published.modules, published.settings)
        listed = checkpoints.read_json(folder / "modules.json")
        for entry in listed:
            entry |= published.listed.get(entry["type"].rpartition(".")[2], {})
        checkpoints.write_json(folder / "modules.json", listed)
    _write_files(published, folder)
    for name in (".gitattributes", "README.md", *published.beside):
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"not to be read")
    return folder


def write_native(published: Published, folder: Path, task: str = "") -> Path:
    """Write the repository that the reference loads, with the adapter of a task in its weights."""
    native = published.native
    assert native is not None
    _save(published, folder, native.tokenizer or published.tokenizer)
    checkpoints.edit_json(folder / "config.json", **native.config)
    file = folder / "model.safetensors"
    weights = load_file(file)
    zeros = {name: torch.zeros_like(weights[name]) for name in native.zero}
    if task:
        number = published.tasks.index(task)
        for name, (a, b) in adapters(published, weights).items():
            delta = a[number] @ b[number] if "embeddings" in name else b[number] @ a[number]
            weights[name] += delta * published.config["lora_alpha"] / published.config["lora_rank"]
    beside = drawn(published.tensors) if published.reference == "tokens" else {}
    save_file({**weights, **zeros, **beside}, file, metadata={"format": "pt"})
    modules = published.modules if native.modules is None else native.modules
    if modules is not None:
        settings = {**(published.settings or {}), **native.settings}
        _write_modules(published, folder, modules, settings)
    _write_files(published, folder)
    return folder


def adapters(published: Published, weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the two halves of all tasks' adapters, by the matrix that they change: of a Linear, `B @ A` is added."""
    if not published.tasks:
        return {}
    generator = torch.Generator().manual_seed(3)
    rank, count, pairs = published.config["lora_rank"], len(published.tasks), {}
    for name in sorted(name for name, tensor in weights.items() if tensor.dim() == 2):
        out, into = weights[name].shape
        shapes = ((out, rank), (rank, into)) if "embeddings" in name else ((rank, into), (out, rank))
        a, b = (torch.randn(count, *shape, generator=generator) * 0.4 for shape in shapes)
        pairs[name] = (a, b)
    return pairs


def _save(published: Published, folder: Path, tokenizer: str) -> None:
    """Write a small model of Transformers' class, and its tokenizer."""
    shape = {"max_position_embeddings": LONGEST + 8, **published.shape}
    checkpoints.classifier(folder, published.family, published.head, tokenizer=tokenizers()[tokenizer], **shape)


def _write_config(published: Published, file: Path) -> None:
    """Write the published config, with the sizes of the small model."""
    small, words = checkpoints.read_json(file), published.words
    sized = {key: small.get(words.get(key, key)) for key in published.config.keys() & (SIZES | words.keys())}
    content = {**published.config, **sized}
    absent = [key for key, value in sized.items() if value is None]
    checkpoints.write_json(file, {key: content[key] for key in content if key not in absent})


def _write_modules(
    published: Published, folder: Path, modules: tuple[Module, ...], settings: Mapping[str, Any] | None
) -> None:
    checkpoints.write_modules(
        folder,
        *modules,
        new=published.new,
        transformer=published.transformer,
        settings=settings,
        pickled=published.pickled,
    )


def _write_files(published: Published, folder: Path) -> None:
    """Write the further files whose content counts."""
    for name, content in published.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    for name, tensors in published.beside_tensors.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            save_file(drawn(tensors), folder / name, metadata={"format": "pt"})
        else:
            torch.save(drawn(tensors), folder / name)
    if published.tokenizer_at:
        tokenizers()[published.tokenizer].save_pretrained(folder / published.tokenizer_at)


def _change_tensors(published: Published, folder: Path) -> None:
    """Give the tensors their published names, and add those for which Transformers has no class."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    zero = published.native.zero if published.native else ()
    named = {published.prefix + name: tensor for name, tensor in weights.items() if name not in zero}
    named = _renamed(published, _fused(published, named))
    for name, (a, b) in adapters(published, weights).items():
        place = f"{published.prefix}{name.removesuffix('.weight')}.parametrizations.weight"
        named[f"{place}.original"] = named.pop(published.prefix + name)
        named |= {f"{place}.0.lora_A": a, f"{place}.0.lora_B": b}
    named |= drawn(published.tensors)
    if published.pickled:
        file.unlink()
        torch.save(named, folder / "pytorch_model.bin")
    else:
        save_file(named, file, metadata={"format": "pt"})


def _renamed(published: Published, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        for pattern, words in published.renamed.items():
            name = re.sub(pattern, words, name)
        renamed[name] = tensor
    return renamed


def _fused(published: Published, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `weights` with one matrix, or bias, for queries, keys and values."""
    if published.fused is None:
        return weights
    *parts, fused = published.fused
    for name in [name for name in weights if parts[0] in name]:
        rows = [weights.pop(name.replace(parts[0], part)) for part in parts]
        weights[name.replace(parts[0], fused)] = torch.cat(rows)
    return weights


def drawn(tensors: Mapping[str, tuple[int, ...] | Tensor]) -> dict[str, Tensor]:
    """Return tensors, drawing those of which the shape is given."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(*tensor, generator=generator) if isinstance(tensor, tuple) else tensor
        for name, tensor in tensors.items()
    }
