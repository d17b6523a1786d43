"""The first module of a Sentence-Transformers folder: the Transformers checkpoint, and how text becomes its input.

The rules are those of sentence-transformers 6 (`base/modules/transformer.py`): where several keys are about one thing,
the same one counts here and there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cenote.errors import CheckpointError
from cenote.functions import coalesce, optional
from cenote.models import keys
from cenote.models.reading import load

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from cenote.conventions import Cuts
    from cenote.models.audit import Audit

CONFIGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
"""Names of the module's config; the first that is there and not empty counts."""

RESULTS: dict[str, tuple[str, str]] = {
    "feature-extraction": ("last_hidden_state", "token_embeddings"),
    "sequence-classification": ("logits", "scores"),
    "text-generation": ("logits", "causal_logits"),
    "any-to-any": ("logits", "causal_logits"),
    "fill-mask": ("logits", "token_embeddings"),
    "retrieval": ("embeddings", "token_embeddings"),
}
"""Tasks to the model's output and the name that the module gives it, where the config names neither."""

MODALITY_KEYS = frozenset({"method", "method_output_name", "format"})

MODALITIES = frozenset({"text", "message", "image", "audio", "video"})

OF_TOWER = "get_text_features"
"""Method of a model with a tower for texts and one for pictures."""
OF_TOWERS = ({"method": OF_TOWER, "method_output_name": "pooler_output"}, "sentence_embedding")
"""Entry of `modality_config` of such a model, and the name of its result."""
FEATURES = ("features",)
"""`TransformerModule.output` of such a model, which makes the vector itself."""

SIDES = ("query", "document")

CUTS: dict[Any, Cuts | None] = {
    True: "longest_first",
    "longest_first": "longest_first",
    "only_first": "only_first",
    "only_second": "only_second",
    False: None,
    "do_not_truncate": None,
}
"""Values of the tokenizer's `truncation` and the text of a pair that they cut; `None` = inputs are not cut."""

RESERVED = frozenset(
    {
        "tokenize",
        "return_dict",
        "return_assistant_tokens_mask",
        "sanitize_control_tokens",
        "tokenizer_kwargs",
        "common_kwargs",
        "conversation",
    }
)
"""Arguments of `apply_chat_template` that are no variables of a template."""

SIZES = ("padding", "truncation", "max_length", "return_tensors")
"""Arguments of the tokenizer that `apply_chat_template` takes itself."""

FLAT_TYPES = frozenset({"apertus", "deepseek_v3", "gpt_oss", "seed_oss"})
"""`model_type`s whose chat templates take the text of a message as it is, whatever they look like."""

STRUCTURED = ("content[0]", ".type", "'type'", '"type"', "item.type", "message.content[")
"""Parts of chat templates that take the content of a message as a list of parts."""


@dataclass(frozen=True)
class Messages:
    """How texts are rendered by the chat template.

    Attributes:
        variables: of the template.
        format: of message contents; "auto" = by the template.
        restores: the end of the template is put back where a text was cut.
    """

    variables: Mapping[str, Any] = field(default_factory=dict)
    format: str = "auto"
    restores: bool = True

    def is_structured(self, model_type: str, template: Any) -> bool:
        """Return whether contents are lists of parts rather than text.

        Args:
            model_type: of the config.
            template: the tokenizer's; a mapping if it has several.
        """
        if self.format != "auto":
            return self.format == "structured"
        if model_type in FLAT_TYPES:
            return False
        if not isinstance(template, str) or not template:
            return True
        return any(part in template for part in STRUCTURED)


@dataclass(frozen=True)
class TransformerModule:
    """The config of a Transformer module.

    Attributes:
        folder: the Transformers checkpoint.
        task: the kind of Transformers class that it is loaded with.
        output: path in that class's output: `("last_hidden_state",)`, `("hidden_states", -2)`, `("pooler_output",)`; or
            `FEATURES`.
        result: name of the output for the modules behind.
        config_kwargs: changes of the Transformers config.
        tokenizer_kwargs: arguments with which the tokenizer is made.
        model_kwargs: arguments with which the model is made.
        max_length: tokens to which an input is cut; `None` = the tokenizer's limit.
        is_cut: whether inputs are cut at all.
        cuts: the text of a pair that is cut.
        lengths: tokens to which inputs of a side are cut, by "query" and "document".
        is_one_length: arguments of the tokenizer set the length of both sides.
        special_tokens: the tokenizer adds its special tokens.
        type_ids: the model gets token type ids; `None` = as the tokenizer says.
        lowercase: text is lower-cased before it is tokenised.
        messages: the chat template renders every text; `None` = it does not.
        tokenizer: folder or hub id of another checkpoint's tokenizer; `None` = its own.
        written: the config itself.
    """

    folder: Path
    task: str = "feature-extraction"
    output: tuple[str | int, ...] = ("last_hidden_state",)
    result: str = "token_embeddings"
    config_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    is_cut: bool = True
    cuts: Cuts = "longest_first"
    lengths: Mapping[str, int] = field(default_factory=dict)
    is_one_length: bool = False
    special_tokens: bool = True
    type_ids: bool | None = None
    lowercase: bool = False
    messages: Messages | None = None
    tokenizer: str | None = None
    written: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str | None:
        """Name of the dtype that the model is stored in, if the files say another than its config."""
        dtype = self.model_kwargs.get("torch_dtype", self.model_kwargs.get("dtype"))
        return None if dtype in (None, "auto") else str(dtype)

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """Arguments of the model's class."""
        return _only(self.model_kwargs, ("add_pooling_layer",))

    @property
    def layer(self) -> int | None:
        """Index of the hidden states that are read; `None` = the last ones."""
        return int(self.output[1]) if self.output[0] == "hidden_states" else None


def read(folder: Path, name: str, audit: Audit, *, task: str, has_towers: bool = False) -> TransformerModule:
    """Read the config of the module in `folder`.

    Args:
        folder: its files.
        name: of the folder in messages and in the audit; empty = the root.
        audit: gets the keys.
        task: default of `transformer_task`.
        has_towers: default of `modality_config`: a tower for texts makes their vectors.

    Raises:
        CheckpointError: a key is not honoured, or has a value that is not.
    """
    file, written = _first(folder)
    place = f"{name}/{file}" if name else file
    config = _renamed(written)
    audit.read(place, keys.flattened(config, OBJECTS), keys.TRANSFORMER)
    return _Reader(folder, place, config, task, OF_TOWERS if has_towers else None).module()


OBJECTS = ("processing_kwargs", "processing_kwargs.text", "processing_kwargs.common", "model_kwargs")
"""Objects in the config whose keys the audit gets one by one."""


def _first(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the name and the content of the config; one that is empty counts as missing."""
    for name in CONFIGS:
        content = load(folder / name)
        if content:
            return name, content
    return CONFIGS[0], {}


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Return the entries of a list, or the only entry `value`."""
    return tuple(value) if isinstance(value, list) else (value,)


def _renamed(written: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config in the new spelling."""
    config = dict(written)
    for old, new in keys.RENAMED.items():
        if old in config:
            config[new] = config.pop(old)
    return config


class _Reader:
    """The values of one config, each checked.

    Args:
        folder: of the module.
        place: the file, in messages.
        config: its content, in the new spelling.
        task: default of `transformer_task`.
        default: entry of `modality_config` that texts take and the module's result where there is no such key; `None` =
            by the task.
    """

    def __init__(
        self,
        folder: Path,
        place: str,
        config: dict[str, Any],
        task: str,
        default: tuple[dict[str, Any], str] | None = None,
    ) -> None:
        self._folder = folder
        self._default = default
        self._place = place
        self._config = config
        self._processing = self._object(config, "processing_kwargs")
        self._text = self._object(self._processing, "text")
        self._common = self._object(self._processing, "common")
        self._chat = self._object(self._processing, "chat_template")
        self._task = self._one_of("transformer_task", config.get("transformer_task", task), RESULTS)

    @staticmethod
    def _object(content: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Return an object in another one, empty if it is missing or null."""
        return dict(content.get(name) or {})

    def module(self) -> TransformerModule:
        """Return all of them together."""
        modality, result = self._modality()
        messages = self._messages(modality)
        sizes = self._sizes(in_messages=messages is not None)
        lengths = {} if "max_length" in sizes else self._lengths()
        cuts = self._cuts(sizes)
        self._require(messages is None or cuts != "only_second", "truncation", cuts, "another one for rendered texts")
        tokenizer_kwargs = without(self._object(self._config, "processor_kwargs"), keys.LOADING)
        length = tokenizer_kwargs.get("model_max_length", self._config.get("max_seq_length"))
        return TransformerModule(
            folder=self._folder,
            task=self._task,
            output=self._output(modality, result),
            result=result,
            config_kwargs=without(self._object(self._config, "config_kwargs"), keys.LOADING),
            tokenizer_kwargs=tokenizer_kwargs,
            model_kwargs=self._object(self._config, "model_kwargs"),
            max_length=self._count("max_length", coalesce(sizes.get("max_length"), length)),
            is_cut=cuts is not None,
            cuts=cuts or "longest_first",
            lengths=lengths,
            is_one_length="max_length" in sizes,
            special_tokens=self._special_tokens(in_messages=messages is not None),
            type_ids=self._text_kwargs().get("return_token_type_ids"),
            lowercase=bool(self._config.get("do_lower_case", False)),
            messages=messages,
            tokenizer=self._config.get("tokenizer_name_or_path"),
            written=self._config,
        )

    def _require(self, holds: bool, name: str, value: Any, expected: str) -> None:
        """Refuse the value of a key unless the condition holds."""
        if not holds:
            raise CheckpointError(f"{self._place}: {name} is {value!r}; honoured is {expected}")

    def _one_of(self, name: str, value: Any, names: Collection[str]) -> str:
        """Return `value`, which has to be one of `names`."""
        self._require(value in names, name, value, f"one of {', '.join(names)}")
        return str(value)

    def _count(self, name: str, value: Any) -> int | None:
        """Return `value`, which has to be a positive integer or nothing."""
        self._require(is_length(value), name, value, "a positive integer")
        return optional(int, value)

    def _modality(self) -> tuple[dict[str, Any], str]:
        """Return the entry of `modality_config` that texts take, and the name of the module's result."""
        name, (output, result) = "modality_config", RESULTS[self._task]
        if name not in self._config:
            written = self._config.get("module_output_name", result)
            self._require(written == result, "module_output_name", written, f"{result}, as there is no {name}")
            return self._default or ({"method": "forward", "method_output_name": output}, result)
        modalities: dict[str, dict[str, Any]] = self._config[name]
        parts = {part for modality in modalities for part in modality.split("+")}
        self._require(parts <= MODALITIES, name, sorted(modalities), f"made of {', '.join(sorted(MODALITIES))}")
        entry = modalities.get("message", modalities.get("text", {}))
        self._require(bool(entry), name, sorted(modalities), "text or message; other inputs are not served")
        is_tower = (entry.get("method"), entry.get("method_output_name")) == (OF_TOWER, "pooler_output")
        is_known = (is_tower or entry.get("method") == "forward") and entry.keys() <= MODALITY_KEYS
        self._require(is_known, name, entry, "the method forward, with a method_output_name and a format")
        return entry, str(self._config.get("module_output_name"))

    def _output(self, modality: Mapping[str, Any], result: str) -> tuple[str | int, ...]:
        """Return the path in the model's output, which has to fit the name of the module's result."""
        written = modality["method_output_name"]
        path = as_tuple(written)
        fitting = RESULTS[self._task][1]
        if modality["method"] == OF_TOWER:
            path, fitting = FEATURES, "sentence_embedding"
        elif self._task != "feature-extraction":
            expected = RESULTS[self._task][0]
            self._require(
                path == (expected,), "method_output_name", written, f"{expected}, for transformer_task {self._task}"
            )
        elif path == ("pooler_output",):
            fitting = "sentence_embedding"
        else:
            is_layer = len(path) == 2 and path[0] == "hidden_states" and isinstance(path[1], int)
            is_known = is_layer or path == ("last_hidden_state",)
            choices = "last_hidden_state, pooler_output or hidden_states with a number"
            self._require(is_known, "method_output_name", written, choices)
        self._require(result == fitting, "module_output_name", result, f"{fitting} for {written}")
        return path

    def _text_kwargs(self) -> dict[str, Any]:
        """Return the arguments of the tokenizer over texts that no template renders."""
        return self._text | self._common

    def _sizes(self, *, in_messages: bool) -> dict[str, Any]:
        """Return the arguments about cutting. Of rendered texts other buckets come first than of plain ones."""
        if not in_messages:
            return self._text_kwargs()
        sizes = self._common | self._text | self._chat
        return _only(sizes, SIZES)

    def _cuts(self, sizes: Mapping[str, Any]) -> Cuts | None:
        """Return the text of a pair that the tokenizer cuts; `None` = it cuts no inputs."""
        truncation = coalesce(sizes.get("truncation", True), "max_length" in sizes)
        self._require(truncation in CUTS, "truncation", truncation, "true, false, or a strategy of Transformers")
        return CUTS[truncation]

    def _lengths(self) -> dict[str, int]:
        """Return the lengths by side."""
        lengths = {side: self._count(f"{side}_length", self._config.get(f"{side}_length")) for side in SIDES}
        return {side: length for side, length in lengths.items() if length is not None}

    def _special_tokens(self, *, in_messages: bool) -> bool:
        """Return whether the tokenizer adds special tokens; a template brings its own."""
        if not in_messages:
            return bool(self._text_kwargs().get("add_special_tokens", True))
        self._require(
            "add_special_tokens" not in self._text,
            "add_special_tokens",
            True,
            "nothing where a chat template renders texts",
        )
        return False

    def _messages(self, modality: Mapping[str, Any]) -> Messages | None:
        """Return how texts are rendered; `None` = no template renders them."""
        if "message" not in self._object(self._config, "modality_config"):
            return None
        variables = without(self._chat, (*SIZES, "restore_suffix"))
        restores = bool(self._chat.get("restore_suffix", True))
        reserved = sorted(RESERVED.intersection(variables))
        self._require(not reserved, "processing_kwargs.chat_template", reserved, "a variable of the template")
        style = self._one_of("format", modality.get("format", "auto"), ("structured", "flat", "auto"))
        return Messages(variables, style, restores)


def is_length(value: Any) -> bool:
    """Return whether `value` is a positive integer, or `None` for no length."""
    return value is None or (type(value) is int and value > 0)


def _only(kwargs: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the entries of `kwargs` called `names`."""
    return {name: value for name, value in kwargs.items() if name in names}


def without(kwargs: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return `kwargs` without the entries called `names`."""
    return {name: value for name, value in kwargs.items() if name not in names}
