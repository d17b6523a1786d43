"""Checkpoints of several kinds, and the ways in which their files are damaged.

`DAMAGES` has them for every file that a reader looks at, by families: values of other types and sizes, files that are
none, tensors that are not what their header says, tokenizers and adapters with parts missing.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from tests import checkpoints
from tests.checkpoints import HIDDEN, NORMALIZE, POSITIONS, dense, edit_json, pooling, read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    Change = Callable[[Path], object]

TITLE = "---\nlanguage: en\ntags:\n- sentence-transformers\n- loss:MatryoshkaLoss\n---\n# A model\n"
WEIGHTS = "model.safetensors"
PICKLE = "pytorch_model.bin"
ADAPTER = "adapter_model.safetensors"
QUERY = "encoder.layer.0.attention.self.query.weight"


# Checkpoints


def bert(folder: Path) -> Path:
    """A backbone alone."""
    checkpoints.bert(folder)
    (folder / "README.md").write_text(TITLE)
    return folder


def modules(folder: Path) -> Path:
    """A Sentence-Transformers folder with a Dense."""
    return checkpoints.write_modules(
        bert(folder),
        pooling("mean"),
        dense(HIDDEN, 20),
        NORMALIZE,
        transformer={"max_seq_length": 40, "do_lower_case": False},
        settings={
            "prompts": {"query": "hello "},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            "truncate_dim": None,
        },
    )


def colbert(folder: Path) -> Path:
    """A folder of PyLate's."""
    checkpoints.write_modules(
        checkpoints.bert(folder),
        dense(HIDDEN, 16, activation="torch.nn.modules.linear.Identity", bias=False),
        new=False,
        transformer={"max_seq_length": POSITIONS - 1, "do_lower_case": False},
        settings={
            "model_type": "ColBERT",
            "similarity_fn_name": "MaxSim",
            "query_prefix": "hello ",
            "document_prefix": "my ",
            "query_length": 16,
            "document_length": 40,
            "attend_to_expansion_tokens": False,
            "skiplist_words": ["!", "."],
            "do_query_expansion": True,
        },
    )
    listed = read_json(folder / "modules.json")
    listed[1]["type"] = "pylate.models.Dense.Dense"
    write_json(folder / "modules.json", listed)
    return folder


def cross_encoder(folder: Path) -> Path:
    """A classifier of three named labels."""
    return checkpoints.classifier(folder, id2label={0: "no", 1: "maybe", 2: "yes"})


def decoder(folder: Path) -> Path:
    """A decoder with its generation head, in two shards."""
    checkpoints.decoder(folder)
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    write_json(folder / f"{WEIGHTS}.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def adapter(folder: Path) -> Path:
    """A backbone with an adapter that is part of it."""
    checkpoints.bert(folder)
    generator = torch.Generator().manual_seed(3)
    path = "base_model.model.encoder.layer.0.attention.self.query"
    tensors = {
        f"{path}.lora_A.weight": torch.randn(4, HIDDEN, generator=generator),
        f"{path}.lora_B.weight": torch.randn(HIDDEN, 4, generator=generator),
    }
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query"], "bias": "none"}
    write_json(folder / "adapter_config.json", settings)
    return folder


def pickled(folder: Path) -> Path:
    """A backbone with pickled weights."""
    checkpoints.bert(folder)
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()
    return folder


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "bert": bert,
    "modules": modules,
    "colbert": colbert,
    "cross-encoder": cross_encoder,
    "decoder": decoder,
    "adapter": adapter,
    "pickled": pickled,
}


# Damages


@dataclass(frozen=True)
class Damage:
    """A change of one file of a checkpoint.

    Attributes:
        checkpoint: its kind.
        file: relative to its folder.
        name: of the change.
        change: makes it in a folder.
        key: the entry that is changed, which the error names; empty = the file alone.
    """

    checkpoint: str
    file: str
    name: str
    change: Change
    key: str = ""

    @property
    def id(self) -> str:
        """Name of the test."""
        return " ".join(filter(None, (self.checkpoint, self.file, self.key, self.name)))


def _set(file: str, key: str, value: Any, folder: Path) -> None:
    content = read_json(folder / file)
    content[key] = value
    write_json(folder / file, content)


def _drop(file: str, key: str, folder: Path) -> None:
    edit_json(folder / file, **{key: None})


ABSENT = object()

NUMBERS: dict[str, Any] = {
    "text": "32",
    "negative": -1,
    "zero": 0,
    "true": True,
    "null": None,
    "list": [],
    "NaN": float("nan"),
}
"""Values in the place of a size."""

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
)
TEXTS = {"number": 5, "unknown": "never-heard-of", "list": [], "object": {}}
FLAGS = {"text": "false", "number": 2}

ENDLESS = r"(?:a|e|[a-z.0]|[a-z])*[0-9]"
"""A regular expression that backtracks without end over the path of a module."""

VALUES: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    ("bert", "config.json"): {
        **dict.fromkeys(SIZES, NUMBERS),
        "layer_norm_eps": {"text": "1e-12", "NaN": float("nan"), "list": []},
        "pad_token_id": {"text": "0", "far": 10**6},
        "hidden_act": TEXTS,
        "model_type": {**TEXTS, "null": None, "absent": ABSENT},
        "architectures": {"text": "BertModel", "number": 5, "list of numbers": [5], "object": {}},
        "is_decoder": FLAGS,
        "dtype": {"number": 5, "unknown": "float33", "list": []},
        "auto_map": {"text": "x", "number": 5, "list": ["a"]},
        "matryoshka_dimensions": {"text": "8", "zero": [0], "texts": ["8"], "number": 8},
        "is_matryoshka": FLAGS,
    },
    ("cross-encoder", "config.json"): {
        "id2label": {
            "hole": {"0": "no", "2": "yes", "3": "more"},
            "too few": {"0": "no", "1": "yes"},
            "too many": {str(i): str(i) for i in range(5)},
            "list": ["no", "maybe", "yes"],
            "texts": {"a": "no", "b": "maybe", "c": "yes"},
            "negative": {"-1": "no", "0": "maybe", "1": "yes"},
            "text": "no",
        },
        "problem_type": TEXTS,
    },
    ("decoder", "config.json"): {
        **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size"), NUMBERS),
        "rope_parameters": {"text": "x", "list": [], "unknown": {"rope_type": "x", "rope_theta": 1e4}},
        "layer_types": {"text": "full_attention", "too few": ["full_attention"], "unknown": ["x", "y"]},
        "tie_word_embeddings": FLAGS,
    },
    ("modules", "sentence_bert_config.json"): {
        "max_seq_length": {"text": "40", "negative": -1, "zero": 0, "one": 1, "two": 2, "true": True, "float": 4.5},
        "do_lower_case": FLAGS,
        "transformer_task": TEXTS,
        "modality_config": {"text": "x", "list": [], "null": None, "inner": {"text": 5}},
        "model_kwargs": {"text": "x", "list": [1]},
        "processor_kwargs": {"text": "x", "list": [1]},
        "config_kwargs": {"text": "x", "list": [1], "labels": {"num_labels": 10**7}},
        "query_length": {"text": "8", "zero": 0},
    },
    ("modules", "config_sentence_transformers.json"): {
        "prompts": {"text": "x", "list": ["a"], "number": {"query": 5}, "list of texts": {"query": ["a"]}},
        "default_prompt_name": {"number": 5, "unknown": "x", "list": []},
        "similarity_fn_name": TEXTS,
        "truncate_dim": {"text": "8", "zero": 0, "negative": -4, "true": True, "float": 2.5},
        "model_type": TEXTS,
    },
    ("modules", "1_Pooling/config.json"): {
        "embedding_dimension": {"text": "32", "zero": 0, "other": 33, "huge": 10**12, "true": True},
        "pooling_mode": {**TEXTS, "list of numbers": [5]},
        "include_prompt": FLAGS,
    },
    ("modules", "2_Dense/config.json"): {
        "in_features": {"text": "32", "zero": 0, "negative": -4, "other": 33, "null": None, "absent": ABSENT},
        "out_features": {"zero": 0, "other": 21, "float": 20.0, "huge": 10**30, "absent": ABSENT},
        "bias": {**FLAGS, "null": None, "false": False},
        "activation_function": {**TEXTS, "number of torch.nn": "torch.nn.Linear", "no class": "torch.nn.functional"},
        "use_residual": FLAGS,
    },
    ("colbert", "config_sentence_transformers.json"): {
        "query_length": {"text": "16", "zero": 0, "negative": -1, "true": True},
        "document_length": {"text": "40", "zero": 0, "negative": -1},
        "query_prefix": {"number": 5, "list": ["a"]},
        "skiplist_words": {"text": "!.", "numbers": [5], "number": 5},
        "do_query_expansion": FLAGS,
        "attend_to_expansion_tokens": FLAGS,
        "model_type": {"number": 5, "unknown": "x"},
    },
    ("colbert", "1_Dense/config.json"): {
        "in_features": {"other": 33, "text": "32"},
        "out_features": {"other": 17},
    },
    ("adapter", "adapter_config.json"): {
        "peft_type": TEXTS,
        "r": {"text": "4", "zero": 0, "negative": -4, "other": 5, "huge": 10**12, "NaN": float("nan")},
        "lora_alpha": {"text": "8", "list": [], "NaN": float("nan")},
        "target_modules": {"number": 5, "other": ["value"], "endless": ENDLESS, "no pattern": "(("},
        "rank_pattern": {"endless": {ENDLESS: 4}, "no pattern": {"((": 4}, "text": "x", "texts": {"query": "4"}},
        "alpha_pattern": {"list": ["x"], "texts": {"query": "4"}},
        "use_dora": FLAGS,
        "bias": {"unknown": "x", "true": True},
        "modules_to_save": {"number": 5, "no pattern": ["(("]},
        "layers_to_transform": {"text": "0", "texts": ["0"]},
        "task_type": {"number": 5},
    },
    ("bert", "tokenizer_config.json"): {
        "model_max_length": {"text": "64", "zero": 0, "negative": -1, "one": 1, "true": True, "list": []},
        "do_lower_case": FLAGS,
        "tokenizer_class": TEXTS,
        "padding_side": {"number": 5, "unknown": "x"},
        "pad_token": {"number": 5, "list": []},
        "model_input_names": {"text": "input_ids", "number": 5},
        "added_tokens_decoder": {"text": "x", "list": [], "inner": {"x": 5}},
    },
}  # fmt: skip


def _values() -> Iterator[Damage]:
    for (kind, file), keys in VALUES.items():
        for key, values in keys.items():
            for name, value in values.items():
                change = partial(_drop, file, key) if value is ABSENT else partial(_set, file, key, value)
                yield Damage(kind, file, name, change, key)


def _twice(file: str, key: str, value: Any, folder: Path) -> None:
    text = (folder / file).read_text()
    (folder / file).write_text(f'{{"{key}": {json.dumps(value)}, {text.strip()[1:]}')


TWICE: dict[tuple[str, str], tuple[str, Any]] = {
    ("bert", "config.json"): ("hidden_size", 64),
    ("modules", "2_Dense/config.json"): ("activation_function", "torch.nn.GELU"),
    ("modules", "config_sentence_transformers.json"): ("similarity_fn_name", "dot"),
    ("adapter", "adapter_config.json"): ("lora_alpha", 5),
    ("decoder", f"{WEIGHTS}.index.json"): ("weight_map", {}),
}


def _replace(file: str, content: bytes, folder: Path) -> None:
    (folder / file).write_bytes(content)


def _cut(file: str, folder: Path) -> None:
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])


def _recode(file: str, folder: Path) -> None:
    (folder / file).write_text((folder / file).read_text(), encoding="utf-16")


def _make_folder(file: str, folder: Path) -> None:
    (folder / file).unlink()
    (folder / file).mkdir()


def _make_pipe(file: str, folder: Path) -> None:
    (folder / file).unlink()
    os.mkfifo(folder / file)


def _make_link(file: str, target: str, folder: Path) -> None:
    (folder / file).unlink()
    (folder / file).symlink_to(target)


FILES: dict[str, Callable[[str], Change]] = {
    "empty": lambda file: partial(_replace, file, b""),
    "cut": lambda file: partial(_cut, file),
    "zeros": lambda file: partial(_replace, file, bytes(5000)),
    "a folder": lambda file: partial(_make_folder, file),
    "a pipe": lambda file: partial(_make_pipe, file),
    "a link to nothing": lambda file: partial(_make_link, file, "nowhere"),
    "a link to itself": lambda file: partial(_make_link, file, file.rpartition("/")[2]),
    "unreadable": lambda file: partial(_make_link, file, "/proc/self/mem"),
}
"""What happens to any file. `/proc/self/mem` is a file that root, too, cannot read."""

TEXT_FILES: dict[str, Callable[[str], Change]] = {
    "UTF-16": lambda file: partial(_recode, file),
    "null": lambda file: partial(_replace, file, b"null"),
    "a number": lambda file: partial(_replace, file, b"5"),
    "a text": lambda file: partial(_replace, file, b'"x"'),
    "a list": lambda file: partial(_replace, file, b'["x"]'),
    "nested": lambda file: partial(_replace, file, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "not UTF-8": lambda file: partial(_replace, file, b'{"a": "\xff"}'),
    "a huge number": lambda file: partial(_replace, file, b'{"a": ' + b"9" * 10_000 + b"}"),
}

DAMAGED_FILES: dict[str, tuple[str, ...]] = {
    "bert": ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"),
    "modules": (
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "2_Dense/config.json",
        f"2_Dense/{WEIGHTS}",
    ),
    "decoder": (f"{WEIGHTS}.index.json", "model-00002-of-00002.safetensors"),
    "adapter": ("adapter_config.json", ADAPTER),
    "pickled": (PICKLE,),
}


def _files() -> Iterator[Damage]:
    for kind, files in DAMAGED_FILES.items():
        for file in files:
            for name, change in {**FILES, **(TEXT_FILES if file.endswith(".json") else {})}.items():
                yield Damage(kind, file, name, change(file))
    for (kind, file), (key, value) in TWICE.items():
        yield Damage(kind, file, "twice", partial(_twice, file, key, value), key)


def _tensor(file: str, name: str, change: Callable[[Tensor], Tensor | None], folder: Path) -> None:
    tensors = load_file(folder / file)
    changed = change(tensors[name].clone())
    if changed is None:
        del tensors[name]
    else:
        tensors[name] = changed.contiguous()
    save_file(tensors, folder / file, metadata={"format": "pt"})


def _with_value(value: float, tensor: Tensor) -> Tensor:
    tensor.view(-1)[3] = value
    return tensor


TENSORS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda tensor: None,
    "NaN": partial(_with_value, float("nan")),
    "infinite": partial(_with_value, float("inf")),
    "minus infinite": partial(_with_value, float("-inf")),
    "int64": lambda tensor: (tensor * 100).long(),
    "int8": lambda tensor: (tensor * 10).to(torch.int8),
    "bool": lambda tensor: tensor > 0,
    "complex": lambda tensor: tensor.to(torch.complex64),
    "turned": lambda tensor: tensor.reshape(*reversed(tensor.shape), 1),
    "a row more": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "a row less": lambda tensor: tensor[:-1],
    "empty": lambda tensor: tensor[:0],
    "scalar": lambda tensor: tensor.view(-1)[0],
    "flat": lambda tensor: tensor.view(-1, 1),
}

DAMAGED_TENSORS: dict[tuple[str, str], tuple[str, str]] = {
    ("bert", WEIGHTS): (QUERY, QUERY),
    ("modules", f"2_Dense/{WEIGHTS}"): ("linear.weight", "linear.weight"),
    ("cross-encoder", WEIGHTS): ("classifier.weight", "classifier.weight"),
    ("adapter", ADAPTER): (
        f"base_model.model.{QUERY.replace('weight', 'lora_B.weight')}",
        QUERY.removesuffix(".weight"),
    ),
}
"""A tensor of each file, and its name in messages."""


def _header(change: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]], folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = change(json.loads(content[8 : 8 + length]), content[8 + length :])
    written = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(written)) + written + data)


def _entry(key: str, value: Any, header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    header[QUERY] = {**header[QUERY], key: value}
    return header, data


def _overlap(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    name = "encoder.layer.0.attention.self.key.weight"
    header[QUERY] = {**header[QUERY], "data_offsets": header[name]["data_offsets"]}
    return header, data


HEADERS: dict[str, Change] = {
    "longer header": lambda folder: _replace(WEIGHTS, struct.pack("<Q", 10**6) + b"{}", folder),
    "endless header": lambda folder: _replace(WEIGHTS, struct.pack("<Q", 2**63) + b"{}", folder),
    "no JSON": lambda folder: _replace(WEIGHTS, struct.pack("<Q", 2) + b"xx", folder),
    "no tensors": lambda folder: _replace(WEIGHTS, struct.pack("<Q", 2) + b"{}", folder),
    "overlapping": partial(_header, _overlap),
    "out of range": partial(_header, partial(_entry, "data_offsets", [10**9, 10**9 + 4 * HIDDEN * HIDDEN])),
    "negative offsets": partial(_header, partial(_entry, "data_offsets", [-4, 4])),
    "reversed offsets": partial(_header, partial(_entry, "data_offsets", [4096, 0])),
    "unknown dtype": partial(_header, partial(_entry, "dtype", "F33")),
    "half the dtype": partial(_header, partial(_entry, "dtype", "F16")),
    "huge shape": partial(_header, partial(_entry, "shape", [10**12, 10**12])),
    "negative shape": partial(_header, partial(_entry, "shape", [-HIDDEN, -HIDDEN])),
    "data missing": partial(_header, lambda header, data: (header, data[:-4])),
    "data left over": partial(_header, lambda header, data: (header, data + b"1234")),
    "a pointer of LFS": partial(_replace, WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
}


def _tensors() -> Iterator[Damage]:
    for (kind, file), (tensor, key) in DAMAGED_TENSORS.items():
        for name, change in TENSORS.items():
            yield Damage(kind, file, name, partial(_tensor, file, tensor, change), key)
    for name, made in HEADERS.items():
        yield Damage("bert", WEIGHTS, name, made)


def _in_index(change: Callable[[dict[str, Any]], object], folder: Path) -> None:
    file = folder / f"{WEIGHTS}.index.json"
    content = read_json(file)
    change(content)
    write_json(file, content)


def _two_shards(folder: Path) -> None:
    """Write other values of a tensor of the first shard into the second."""
    first, second = sorted(folder.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: -tensor}, second, metadata={"format": "pt"})


INDEX: dict[str, Change] = {
    "an absent file": partial(_in_index, lambda content: content["weight_map"].update(x="absent.safetensors")),
    "no map": partial(_in_index, lambda content: content.pop("weight_map")),
    "empty map": partial(_in_index, lambda content: content["weight_map"].clear()),
    "map is a list": partial(_in_index, lambda content: content.update(weight_map=[])),
    "a number for a file": partial(_in_index, lambda content: content["weight_map"].update(x=5)),
    "null for a file": partial(_in_index, lambda content: content["weight_map"].update(x=None)),
    "no name": partial(_in_index, lambda content: content["weight_map"].update(x="")),
    "a folder for a file": partial(_in_index, lambda content: content["weight_map"].update(x=".")),
    "another file": partial(_in_index, lambda content: content["weight_map"].update(x="config.json")),
    "a list for a file": partial(_in_index, lambda content: content["weight_map"].update(x=["a"])),
    "a shard less": lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
    "a tensor in two shards": _two_shards,
}

MODULES: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "no modules": lambda listed: [],
    "texts": lambda listed: ["a"],
    "numbers": lambda listed: [5],
    "without type": lambda listed: [{"idx": 0, "path": ""}],
    "without path": lambda listed: [{"idx": 0, "type": listed[0]["type"]}],
    "type is a number": lambda listed: [{**listed[0], "type": 5}],
    "path is a number": lambda listed: [{**listed[0], "path": 5}],
    "path is null": lambda listed: [{**listed[0], "path": None}],
    "path is a list": lambda listed: [{**listed[0], "path": []}],
    "unknown type": lambda listed: [*listed, {**listed[1], "type": "sentence_transformers.models.Unknown"}],
    "a path with NUL": lambda listed: [*listed[:2], {**listed[2], "path": "a\0b"}],
    "a long path": lambda listed: [*listed[:2], {**listed[2], "path": "a" * 5000}],
    "pooling first": lambda listed: listed[1:],
    "two poolings": lambda listed: [*listed, listed[1]],
    "endless": lambda listed: [*listed, *[listed[3]] * 100_000],
    "endless transformers": lambda listed: [listed[0]] * 100_000,
}


def _modules(change: Callable[[list[dict[str, Any]]], Any], folder: Path) -> None:
    write_json(folder / "modules.json", change(read_json(folder / "modules.json")))


def _part(change: Callable[[dict[str, Any]], object], folder: Path) -> None:
    content = read_json(folder / "tokenizer.json")
    change(content)
    write_json(folder / "tokenizer.json", content)


TOKENIZERS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "no model": ("bert", lambda content: content.pop("model")),
    "null model": ("bert", lambda content: content.update(model=None)),
    "unknown model": ("bert", lambda content: content["model"].update(type="Unknown")),
    "no vocabulary": ("bert", lambda content: content["model"].pop("vocab")),
    "empty vocabulary": ("bert", lambda content: content["model"].update(vocab={})),
    "vocabulary of texts": ("bert", lambda content: content["model"].update(vocab={"a": "b"})),
    "negative ids": ("bert", lambda content: content["model"].update(vocab={"a": -1})),
    "huge ids": ("bert", lambda content: content["model"].update(vocab={"a": 2**40})),
    "no unknown token": ("bert", lambda content: content["model"]["vocab"].pop("[UNK]")),
    "unknown normalizer": ("bert", lambda content: content.update(normalizer={"type": "Unknown"})),
    "bad pattern": (
        "bert",
        lambda content: content.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
        ),
    ),
    "ends without an id": ("bert", lambda content: content["post_processor"].update(special_tokens={})),
    "ends of another kind": ("bert", lambda content: content["post_processor"].update(single=5)),
    "added tokens are texts": ("bert", lambda content: content.update(added_tokens=["a"])),
    "added tokens are null": ("bert", lambda content: content.update(added_tokens=None)),
    "version is a number": ("bert", lambda content: content.update(version=5)),
    "no merges": ("decoder", lambda content: content["model"].pop("merges")),
    "merges of unknown pieces": ("decoder", lambda content: content["model"].update(merges=[["qq", "zz"]])),
    "merges of three": ("decoder", lambda content: content["model"].update(merges=[["a", "b", "c"]])),
}

CARDS: dict[str, bytes] = {
    "a day that is not there": b"---\ndate: 2024-02-30\n---\n# A model\n",
    "aliases": b"---\na: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 111))
    + b"tags: [*n]\n---\n# A model\n",
    "aliases in tags": b"---\ntags: [&a [x,x,x], &b [*a,*a,*a,*a,*a], [*b,*b,*b,*b]]\n---\n# A model\n",
    "200,000 lines": b"---\n" + b"key: value\n" * 200_000 + b"---\n# A model\n",
    "200,000 tags": b"---\ntags:\n" + b"- x\n" * 200_000 + b"---\n# A model\n",
    "no YAML": b"---\ntags: [a, {b\n---\n# A model\n",
    "nested": b"---\ntags: " + b"[" * 20_000 + b"\n---\n# A model\n",
    "tags are a number": b"---\ntags: 5\n---\n# A model\n",
    "tags are an object": b"---\ntags: {a: 1}\n---\n# A model\n",
    "NUL": b"---\ntags: [\0]\n---\n# A model\n",
    "not UTF-8": b"---\ntags: [\xff\xfe]\n---\n# A model\n",
    "no end": b"---\ntags: [a]\n# A model\n",
    "a code": b"---\ntags: !!python/object/apply:os.system ['true']\n---\n",
    "empty": b"",
}


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def _pickle(content: Any, folder: Path) -> None:
    torch.save(content, folder / PICKLE)


def _in_pickle(change: Callable[[dict[str, Any]], object], folder: Path) -> None:
    tensors = torch.load(folder / PICKLE, weights_only=True)
    change(tensors)
    torch.save(tensors, folder / PICKLE)


PICKLES: dict[str, Change] = {
    "a list": partial(_pickle, [torch.ones(2)]),
    "a number": partial(_pickle, 5),
    "nothing in it": partial(_pickle, {}),
    "numbers for names": partial(_pickle, {5: torch.ones(2)}),
    "nested": lambda folder: _pickle({"state_dict": torch.load(folder / PICKLE, weights_only=True)}, folder),
    "code": lambda folder: (folder / PICKLE).write_bytes(pickle.dumps({"x": _Code()})),
    "more shown than stored": partial(
        _in_pickle, lambda tensors: tensors.update({"pooler.dense.weight": torch.zeros(1).expand(10**6, 10**6)})
    ),
    "sparse": partial(_in_pickle, lambda tensors: tensors.update({QUERY: tensors[QUERY].to_sparse()})),
    "integers": partial(_in_pickle, lambda tensors: tensors.update({QUERY: tensors[QUERY].long()})),
    "a text": partial(_in_pickle, lambda tensors: tensors.update({QUERY: "x"})),
    "null": partial(_in_pickle, lambda tensors: tensors.update({QUERY: None})),
    "NaN": partial(_in_pickle, lambda tensors: tensors.update({QUERY: tensors[QUERY] * float("nan")})),
    "missing": partial(_in_pickle, lambda tensors: tensors.pop(QUERY)),
}


def _others() -> Iterator[Damage]:
    for name, change in INDEX.items():
        yield Damage("decoder", f"{WEIGHTS}.index.json", name, change)
    for name, listed in MODULES.items():
        yield Damage("modules", "modules.json", name, partial(_modules, listed))
    for name, (kind, part) in TOKENIZERS.items():
        yield Damage(kind, "tokenizer.json", name, partial(_part, part))
    for name, content in CARDS.items():
        yield Damage("bert", "README.md", name, partial(_replace, "README.md", content))
    for name, change in PICKLES.items():
        yield Damage("pickled", PICKLE, name, change)


DAMAGES = [*_values(), *_files(), *_tensors(), *_others()]

WHOLE = ("hidden_size", "num_key_value_heads")
"""Sizes in whose places `make test` puts each of `NUMBERS`; the others are read by the same code."""
READ_ALONE = ("config.json", WEIGHTS, "tokenizer.json", "modules.json", PICKLE)
"""Files to which `make test` does everything that happens to files, each by another reader."""
OF_NUMBERS = {"zero", "true", "list", "NaN"}
OF_FILES = {*FILES, *TEXT_FILES} - {"empty", "a folder", "a pipe", "not UTF-8", "a list"}


def is_repeated(damage: Damage) -> bool:
    """Whether `make test` has the same of another key or another file."""
    if damage.key:
        is_size = VALUES.get((damage.checkpoint, damage.file), {}).get(damage.key) is NUMBERS
        return is_size and damage.key not in WHOLE and damage.name in OF_NUMBERS
    is_read_alike = damage.file not in READ_ALONE and damage.file in DAMAGED_FILES.get(damage.checkpoint, ())
    return is_read_alike and damage.name in OF_FILES


HUGE: dict[tuple[str, str], tuple[str, ...]] = {
    ("bert", "config.json"): (
        "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings",
        "type_vocab_size", "num_labels", "num_attention_heads",
    ),
    ("cross-encoder", "config.json"): ("num_labels", "vocab_size"),
    ("decoder", "config.json"): (
        "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_key_value_heads", "head_dim",
        "num_attention_heads",
    ),
    ("modules", "2_Dense/config.json"): ("in_features", "out_features"),
    ("colbert", "1_Dense/config.json"): ("in_features", "out_features"),
    ("colbert", "config_sentence_transformers.json"): ("query_length",),
}  # fmt: skip
"""Keys of sizes that are made huge, in a process of bounded memory."""

HUGE_SIZES = (100_000, 10**7, 10**9, 10**12)

HUGE_DAMAGES = [
    Damage(kind, file, str(size), partial(_set, file, key, size), key)
    for (kind, file), keys in HUGE.items()
    for key in keys
    for size in HUGE_SIZES
]
