"""Builds small but complete checkpoints on disk: real configs, real tokenizers, weights from a fixed seed.

The weights are large enough that every token, position and layer moves the result, so a wrong answer is far away.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HIDDEN = 32
POSITIONS = 64

TEXTS = [
    "Hello, my name is",
    "The quick brown fox jumps over the lazy dog.",
    "a",
    "",
    "Cenotes are natural pits, or sinkholes, that expose groundwater underneath the limestone bedrock.",
    "MIXED case and UPPER CASE, to be seen or not",
    "represent the sentence: for retrieval",
    "naïve café — 水 and 🐟",
    "one two three four five six seven eight nine ten " * 3,
]
"""Texts of mixed length; the longest is longer than `POSITIONS` tokens of the tokenizers here."""

ROUNDING = 1e-6
"""Most that rows of one model may differ by between two loads, or in other company: both are as near to float64."""

SHORT = [text for text in TEXTS if len(text) < 60]
"""Those that fit into the tests' models without being cut."""

_WORDS = """
the a an is are of and or to my name hello quick brown fox jumps over lazy dog natural pits that case upper mixed
represent sentence for retrieval one two three four five six seven eight nine ten water stone The Hello Represent
"""
_ASCII = [chr(code) for code in range(33, 127)]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def wordpiece(*, lowercase: bool = False, more: tuple[str, ...] = (), **options: Any) -> PreTrainedTokenizerFast:
    """A BERT tokenizer over a few words, all of ASCII and the entries `more`; cased unless `lowercase`."""
    entries = dict.fromkeys([*_SPECIAL, *_ASCII, *(f"##{c}" for c in _ASCII), *_WORDS.split(), *more])
    vocabulary = {token: i for i, token in enumerate(entries)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    names = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    options.setdefault("model_max_length", POSITIONS)
    names_of_inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names_of_inputs, **names, **options)


_MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("o", "n"), ("a", "n"), ("Ġ", "the"), ("e", "r")]
_MERGES += [("y", "e"), ("ye", "s"), ("n", "o"), ("Y", "e"), ("Ye", "s")]


def byte_level(
    single: str = "$A <|endoftext|>", pair: str | None = None, special: tuple[str, ...] = (), **options: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a few merges; by default it closes every text as Qwen3-Embedding's.

    Args:
        single: what is put around a text.
        pair: what is put around two texts; `None` = they are joined as they are.
        special: special tokens besides `<|endoftext|>`, which pads.
        options: of the Transformers class.
    """
    listed = ("<|endoftext|>", *special)
    entries = [*listed, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in _MERGES)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(entries)}, _MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair or "$A $B:1", special_tokens=[(token, i) for i, token in enumerate(listed)]
    )
    tokenizer.add_special_tokens([*listed])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{
            "pad_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "model_input_names": ["input_ids", "attention_mask"],
            **options,
        },
    )


def sentinels(**options: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that marks texts as RoBERTa's: `<s> a </s>`, and pairs `<s> a </s></s> b </s>`."""
    names = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
    return byte_level(
        "<s> $A </s>",
        "<s> $A </s> </s> $B </s>",
        ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
        **{**{f"{name}_token": token for name, token in names.items()}, "model_max_length": POSITIONS, **options},
    )


def randomize(module: nn.Module, seed: int) -> None:
    """Draw all weights of `module` anew: matrices that keep the scale of their input, and no neutral bias or norm."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise if "embed" in name else noise * 1.5 / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int) -> Path:
    """Write `model`, with weights from `seed`, and `tokenizer` into `folder`."""
    randomize(model, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(kind: Any, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int) -> Path:
    """Write a model of the class `kind`, with weights from `seed`, and `tokenizer` into `folder`.

    Equal models are made once a process, and each folder has files of its own.
    """
    key = (kind, config.to_json_string(), seed, torch.get_default_dtype())
    if key not in _WRITTEN:
        with torch.random.fork_rng(devices=[]):  # what is drawn next must not depend on what was made before
            model = kind(config)
        randomize(model, seed)
        model.save_pretrained(Path(_root().name) / str(len(_WRITTEN)))
        _WRITTEN[key] = Path(_root().name) / str(len(_WRITTEN))
    shutil.copytree(_WRITTEN[key], folder, dirs_exist_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


_WRITTEN: dict[tuple[Any, ...], Path] = {}


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cenote-checkpoints-")


def bert(
    folder: Path,
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    masked_lm: bool = False,
    **options: Any,
) -> Path:
    """A two-layer BERT encoder; with `masked_lm` under its prefix `bert.` and with the head of `BertForMaskedLM`."""
    tokenizer = tokenizer or wordpiece()
    config = BertConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": POSITIONS,
            "pad_token_id": 0,
            **options,
        }
    )
    return write(BertForMaskedLM if masked_lm else BertModel, config, tokenizer, folder, seed)


_DECODERS: dict[str, tuple[type[Any], type[Any]]] = {
    "Qwen3Model": (Qwen3Model, Qwen3Config),
    "Qwen3ForCausalLM": (Qwen3ForCausalLM, Qwen3Config),
    "LlamaForCausalLM": (LlamaForCausalLM, LlamaConfig),
}


def decoder(
    folder: Path,
    architecture: str = "Qwen3ForCausalLM",
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Path:
    """A two-layer causal decoder with grouped key-value heads."""
    tokenizer = tokenizer or byte_level()
    model, kind = _DECODERS[architecture]
    config = kind(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 0,
            **options,
        }
    )
    return write(model, config, tokenizer, folder, seed)


def classifier(
    folder: Path,
    family: str = "Bert",
    head: str = "ForSequenceClassification",
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Path:
    """A two-layer model of any Transformers family with a classification head, as `BertForTokenClassification`."""
    tokenizer = tokenizer or wordpiece()
    kind = getattr(transformers, f"{family}Config")
    known = {item.name for item in fields(kind)} | set(kind.attribute_map)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_position_embeddings": POSITIONS,
    }
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
    shared = {name: value for name, value in {**shape, **ids}.items() if name in known}
    return write(getattr(transformers, family + head), kind(**{**shared, **options}), tokenizer, folder, seed)


def add_head(folder: Path, architecture: str, weights: Mapping[str, Tensor]) -> Path:
    """Add tensors to a checkpoint and rename it, for architectures that Transformers has no class for."""
    file = folder / "model.safetensors"
    save_file({**load_file(file), **weights}, file, metadata={"format": "pt"})
    edit_json(folder / "config.json", architectures=[architecture])
    return folder


def two_layers(labels: int, *, seed: int = 0) -> dict[str, Tensor]:
    """The head of Qwen2's reward models: two layers with a ReLU between them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"score.{place}.{kind}": torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for place, rows in ((0, HIDDEN), (2, labels))
        for kind, shape in (("weight", (rows, HIDDEN)), ("bias", (rows,)))
    }


def pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained(folder)` in eval mode, loaded once for each content of the folder's files.

    For references alone, whose forwards leave it as it is: a model that a test has changed is given to no other.
    """
    model, untouched = _pretrained(kind, folder, _digest(folder), tuple(sorted(options.items())))
    assert _touches(model) == untouched, "a test has changed a model that others share"
    return model


@functools.lru_cache(maxsize=8)
def _pretrained(kind: Any, folder: Path, digest: bytes, options: tuple[tuple[str, Any], ...]) -> tuple[Any, Any]:
    with torch.inference_mode(mode=False):  # whose tensors count their changes
        model = kind.from_pretrained(folder, **dict(options)).eval().requires_grad_(False)
    return model, _touches(model)


def _digest(folder: Path) -> bytes:
    """Hash of all files of `folder`, their names included."""
    hashed = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        hashed.update(f"{file.relative_to(folder)} {len(content)} ".encode() + content)
    return hashed.digest()


def _touches(model: nn.Module) -> list[tuple[Any, ...]]:
    """What differs after a model's tensors, forwards, hooks or mode were changed."""
    tensors = [(id(tensor), tensor._version) for tensor in model.state_dict(keep_vars=True).values()]
    return tensors + [("forward" in vars(x), len(x._forward_hooks), x.training) for x in model.modules()]


OLD = "sentence_transformers.models."
NEW = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "LayerNorm": "sentence_transformers.sentence_transformer.modules.layer_norm.LayerNorm",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
    "Dropout": "sentence_transformers.sentence_transformer.modules.dropout.Dropout",
    "LogitScore": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
    "SpladePooling": "sentence_transformers.sparse_encoder.modules.splade_pooling.SpladePooling",
    "MultiVectorMask": "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
    "HierarchicalTokenPooling": (
        "sentence_transformers.multi_vector_encoder.modules.token_pooling.HierarchicalTokenPooling"
    ),
}
"""Module types as Sentence-Transformers wrote them until 5.3, and as it writes them now."""


@dataclass(frozen=True)
class Module:
    """One module of a Sentence-Transformers folder after the Transformer."""

    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)


def pooling(*modes: str, width: int = HIDDEN, **config: Any) -> Module:
    """A Pooling module in the current spelling."""
    mode = modes[0] if len(modes) == 1 else list(modes)
    return Module("Pooling", {"embedding_dimension": width, "pooling_mode": mode, **config})


def flagged_pooling(*modes: str, width: int = HIDDEN, **config: Any) -> Module:
    """A Pooling module in the old spelling, a flag for each mode."""
    flags = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    chosen = {f"pooling_mode_{flag}": flag in modes for flag in flags}
    return Module("Pooling", {"word_embedding_dimension": width, **chosen, **config})


def dense(
    in_features: int,
    out_features: int,
    *,
    activation: str = "torch.nn.modules.activation.Tanh",
    bias: bool = True,
    residual: bool = False,
    seed: int = 0,
    **config: Any,
) -> Module:
    """A Dense module with random weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = {"linear.weight": torch.randn(out_features, in_features, generator=generator) / in_features**0.5}
    if bias:
        weights["linear.bias"] = torch.randn(out_features, generator=generator)
    if residual and in_features != out_features:
        weights["residual.weight"] = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    shape = {"in_features": in_features, "out_features": out_features, "bias": bias}
    extra = {"use_residual": True} if residual else {}
    return Module("Dense", {**shape, "activation_function": activation, **extra, **config}, weights)


def layer_norm(width: int, *, seed: int = 0) -> Module:
    """A LayerNorm module with random weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "norm.weight": 1 + 0.5 * torch.randn(width, generator=generator),
        "norm.bias": torch.randn(width, generator=generator),
    }
    return Module("LayerNorm", {"dimension": width}, weights)


NORMALIZE = Module("Normalize")


def write_modules(
    folder: Path,
    *modules: Module,
    backbone: str = "",
    new: bool = True,
    transformer: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    pickled: bool = False,
) -> Path:
    """Make `folder`, which has a backbone at `backbone`, a Sentence-Transformers folder of these modules.

    Args:
        folder: root of the checkpoint.
        modules: what follows the Transformer.
        backbone: path of the Transformer below `folder`.
        new: module types in the current spelling, else in the old one.
        transformer: content of `sentence_bert_config.json`.
        settings: content of `config_sentence_transformers.json`.
        pickled: write the modules' weights as `pytorch_model.bin`.
    """
    listed = [{"idx": 0, "name": "0", "path": backbone, "type": _type("Transformer", new)}]
    for number, module in enumerate(modules, 1):
        path = f"{number}_{module.kind}"
        listed.append({"idx": number, "name": str(number), "path": path, "type": _type(module.kind, new)})
        (folder / path).mkdir(parents=True)
        write_json(folder / path / "config.json", module.config)
        if module.weights and pickled:
            torch.save(dict(module.weights), folder / path / "pytorch_model.bin")
        elif module.weights:
            save_file(dict(module.weights), folder / path / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "modules.json", listed)
    if transformer is not None:
        write_json(folder / backbone / "sentence_bert_config.json", transformer)
    if settings is not None:
        write_json(folder / "config_sentence_transformers.json", settings)
    return folder


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Rows `[N, D]` of two loads are the same but for rounding: batches, and addresses in memory, may be others."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING * max(1.0, float(np.abs(expected).max())))


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON."""
    path.write_text(json.dumps(content, indent=2))


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text())


def edit_json(path: Path, **changes: Any) -> None:
    """Set entries of a JSON object in a file; `None` removes one."""
    content = {**read_json(path), **changes}
    write_json(path, {key: value for key, value in content.items() if value is not None})


def _type(kind: str, new: bool) -> str:
    return NEW[kind] if new and kind in NEW else OLD + kind
