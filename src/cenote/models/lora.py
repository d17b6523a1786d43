"""The settings of LoRA adapters as PEFT saves them. PEFT is not needed.

Every setting is honoured, known to be without effect, or refused (`cenote.models.audit`); `cenote.models.lora_changes`
reads the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import regex

from cenote.errors import CheckpointError
from cenote.models.audit import Keys
from cenote.models.reading import about, load
from cenote.models.transformer_module import as_tuple, without

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cenote.models.audit import Audit

CONFIG = "adapter_config.json"
WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"

_TRAINING = "it concerns training alone"
_INITIAL = "it concerns how the adapter's weights began"
KEYS = Keys(
    frozenset(
        {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "use_dora", "lora_bias"}
        | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
        | {"task_type", "base_model_name_or_path", "revision"}
    ),
    {
        "auto_mapping": "the tensors say which modules are changed",
        "peft_version": "the format of the files is the same in all versions",
        "inference_mode": _TRAINING,
        "lora_dropout": _TRAINING,
        "megatron_config": _TRAINING,
        "megatron_core": _TRAINING,
        "velora_config": _TRAINING,
        "runtime_config": "it concerns where PEFT keeps tensors",
        "fan_in_fan_out": "it follows from the class of each layer",
        "ensure_weight_tying": "changes of tied weights are refused if it is set",
        "qalora_group_size": "it belongs to use_qalora",
        "loftq_config": _INITIAL,
        "eva_config": _INITIAL,
        "corda_config": _INITIAL,
        "lora_ga_config": _INITIAL,
    },
)
"""The keys of `adapter_config.json`. Others must be unset, see `UNSET`."""
UNSET: tuple[Any, ...] = (None, "", [], {})
"""Values that settings have which nobody has set, besides false."""
PLAIN_STARTS = (True, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is. The others change it whenever PEFT loads the adapter."""
HEADS_OF_TASKS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}
"""Modules that PEFT trains whole and saves, by the type of the task."""
SUFFIXES = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
"""Ends of the names of the classes that PEFT trains, by the type of the task."""


Names = str | list[str]
"""Names of modules or the ends of their paths, or a regular expression of whole paths."""


class LoraSettings(msgspec.Struct, frozen=True):
    """The settings of an adapter that change its results, under PEFT's names.

    Attributes:
        r: rank of the changes, unless a pattern gives another.
        lora_alpha: the scale of the changes is this by the rank, unless a pattern gives another.
        use_rslora: the scale is `lora_alpha` by the square root of the rank.
        use_dora: changed weights are given trained norms.
        lora_bias: the second halves of changes have biases.
        rank_pattern: exceptions, by regular expressions of the ends of modules' paths.
        alpha_pattern: likewise.
        bias: the model's own biases that were trained, too.
        target_modules: modules with low-rank changes; `None` = not said.
        exclude_modules: modules without.
        layers_to_transform: numbers of the only layers with changes; empty = all.
        layers_pattern: names of the lists that hold layers.
        modules_to_save: names of the modules that were trained whole.
        task_type: "SEQ_CLS" and "TOKEN_CLS" have a head.
        base_model_name_or_path: folder or hub id of the model that was trained.
        revision: of that model, on the hub.
        ensure_weight_tying: tied weights were changed together.
    """

    r: Annotated[int, msgspec.Meta(ge=1)]
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: Names = "all-linear"
    exclude_modules: Names = []
    layers_to_transform: int | list[int] = []
    layers_pattern: str | list[str] = []
    modules_to_save: list[str] = []
    task_type: str = ""
    base_model_name_or_path: str = ""
    revision: str | None = None
    ensure_weight_tying: bool = False

    @property
    def patterns(self) -> dict[str, tuple[str, ...]]:
        """The regular expressions among the settings, by their keys."""
        return {
            "rank_pattern": tuple(self.rank_pattern),
            "alpha_pattern": tuple(self.alpha_pattern),
            "target_modules": _expressions(self.target_modules),
            "exclude_modules": _expressions(self.exclude_modules),
            "layers_pattern": as_tuple(self.layers_pattern),
            "modules_to_save": tuple(self.modules_to_save),
        }

    @property
    def whole(self) -> list[str]:
        """Names of the modules that were trained whole, with the head that the type of the task has."""
        return [*self.modules_to_save, *HEADS_OF_TASKS.get(self.task_type, ())]

    def rank(self, path: str) -> int:
        """Return the rank of the change of the module at `path`."""
        return int(_of_pattern("rank_pattern", self.rank_pattern, path, self.r))

    def scale(self, path: str) -> float:
        """Return the factor on the change of the module at `path`."""
        rank = self.rank(path)
        return _of_pattern("alpha_pattern", self.alpha_pattern, path, self.lora_alpha) / (
            rank**0.5 if self.use_rslora else rank
        )

    def targets(self, path: str) -> bool:
        """Return whether PEFT gives the module at `path` of the trained model a low-rank change."""
        if self.target_modules == "all-linear":
            return True
        if not _names_module("target_modules", self.target_modules, path):
            return False
        if _names_module("exclude_modules", self.exclude_modules, path):
            return False
        layers = as_tuple(self.layers_to_transform)
        return not layers or self._layer_of(path) in layers

    def trains_whole(self, path: str) -> bool:
        """Return whether the module at `path` of the trained model was trained whole."""
        return any(_match("modules_to_save", rf"(^|.*\.){name}($|\..*)", path) for name in self.whole)

    def _layer_of(self, path: str) -> int | None:
        """Return the number of the layer that a module is in."""
        lists = as_tuple(self.layers_pattern) or (r"[^.]*",)
        match = _match("layers_pattern", rf"(?:^|.*?\.)(?:{'|'.join(lists)})\.(\d+)\.", path)
        return None if match is None else int(match[1])


def _expressions(names: Names) -> tuple[str, ...]:
    """Return the regular expression that names modules, if one does."""
    return (names,) if isinstance(names, str) else ()


def _names_module(key: str, names: Names, path: str) -> bool:
    if isinstance(names, str):
        return _match(key, rf"(?:{names})\Z", path) is not None
    return f".{path}".endswith(tuple(f".{name}" for name in names))


MATCHING = 0.1
"""Seconds that one match of a regular expression may take; an ordinary one takes microseconds."""


def _match(key: str, pattern: str, path: str) -> regex.Match[str] | None:
    """Match a regular expression of a checkpoint against a module's path, in bounded time.

    Args:
        key: of the expression, for messages.
        pattern: the expression.
        path: of the module.

    Raises:
        CheckpointError: it backtracks without end.
    """
    try:
        return regex.match(pattern, path, timeout=MATCHING)
    except TimeoutError:
        shown = pattern[:100]
        raise CheckpointError(
            f"{CONFIG}: matching the regular expression {shown!r} of {key} against {path} takes longer than "
            f"{MATCHING} s; name the modules instead"
        ) from None


def _of_pattern(key: str, pattern: Mapping[str, float], path: str, default: float) -> float:
    """Return the entry of `pattern` for a module; its keys are regular expressions of the ends of paths."""
    for expression, value in pattern.items():
        if _match(key, rf"(.*\.)?({expression})$", path):
            return value
    return default


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk, of which the settings are read.

    Attributes:
        name: in requests and messages.
        folder: its files.
        place: the folder in messages, relative to the checkpoint's and with a closing slash; empty = that folder.
    """

    name: str
    folder: Path
    place: str
    settings: LoraSettings

    @property
    def file(self) -> Path:
        """Its tensors."""
        file = self.folder / WEIGHTS
        return file if file.is_file() else self.folder / PICKLED

    def fault(self, message: str) -> CheckpointError:
        """Return an error of this adapter."""
        return CheckpointError(f"adapter {self.name!r} {message}")


def read(name: str, folder: Path, audit: Audit, *, place: str = "", applies: bool = False) -> Adapter:
    """Read the settings of the adapter in `folder`.

    Args:
        name: in requests and messages.
        folder: its files.
        audit: gets all its settings.
        place: see `Adapter`.
        applies: it becomes part of the model, and its base is looked up.

    Raises:
        CheckpointError: the settings cannot be read, or one of them is not honoured.
    """
    with about(folder / CONFIG):
        return Adapter(name, folder, place, _settings(name, folder, audit, place, applies))


def _settings(name: str, folder: Path, audit: Audit, place: str, applies: bool) -> LoraSettings:
    """Return the settings of the adapter in `folder`; see `read`."""
    content = load(folder / CONFIG)
    kind = content.get("peft_type")
    if kind != "LORA":
        hint = f"; to go on without it: --allow-unread {name}" if place else ""
        raise CheckpointError(f"adapter {name!r} is of the peft_type {kind!r}; only LORA is supported{hint}")
    content = _audited(place + CONFIG, content, audit, applies)
    settings = msgspec.convert(content, LoraSettings)
    for key, patterns in settings.patterns.items():
        with about(f"the regular expressions of {key} in {CONFIG}"):
            for pattern in patterns:
                regex.compile(pattern)
    return settings


def _audited(file: str, content: Mapping[str, Any], audit: Audit, applies: bool) -> dict[str, Any]:
    """Return the settings that are set, and refuse those that are not honoured."""
    written = {key: value for key, value in content.items() if value is not False and value not in UNSET}
    audit.leave(file, content.keys() - written.keys(), "it is not set")
    rest = dict(written)
    start = rest.pop("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        remedy = (
            f"{start!r} changes the base whenever PEFT loads the adapter, which PEFT can convert to one that does not"
        )
        audit.refuse(file, ["init_lora_weights"], remedy)
    elif "init_lora_weights" in written:
        audit.leave(file, ["init_lora_weights"], _INITIAL)
    if not applies:
        base = written.keys() & {"base_model_name_or_path", "revision"}
        audit.leave(file, base, "the adapter changes the model beside it")
        rest = without(rest, base)
    audit.read(file, rest, KEYS)
    return written
