"""From an architecture's name: whether and how it becomes a pooling model, with which head, and how it pools.

The endings and the defaults are vLLM's, so that the same checkpoint pools alike here and there.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import entry_points
from itertools import filterfalse
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec

from cenote.errors import CheckpointError, ConfigError
from cenote.functions import coalesce
from cenote.models.families import rerankers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from importlib.metadata import EntryPoint

    from transformers import PretrainedConfig, PreTrainedModel

    from cenote.config import ModelConfig
    from cenote.conventions import PairTemplate
    from cenote.models.families.rerankers import Reranker

REWARDS = ("ForRewardModeling", "RewardModel")
"""Ends of the names of reward models."""

GENERATIVE = ("ForCausalLM", "ForConditionalGeneration", "ChatModel", "LMHeadModel")
"""Ends of the names of models that generate text."""

# fmt: off
CLS_FAMILIES = frozenset({
    "albert", "bert", "big_bird", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2", "distilbert",
    "electra", "ernie", "esm", "eurobert", "fnet", "gte", "ibert", "jina_embeddings_v3", "layoutlm", "longformer",
    "megatron-bert", "mobilebert", "modernbert", "mpnet", "nomic_bert", "nystromformer", "rembert", "roberta",
    "roberta-prelayernorm", "roformer", "squeezebert", "xlm-roberta", "xlm-roberta-xl", "xmod",
})
# fmt: on
"""`model_type`s of encoders with a classification token at the front: they pool CLS by default."""

MEAN_FAMILIES = frozenset({"t5", "mt5", "umt5", "t5gemma"})
"""`model_type`s of encoders without one: they pool MEAN by default."""

MODES = {**dict.fromkeys(CLS_FAMILIES, "cls"), **dict.fromkeys(MEAN_FAMILIES, "mean")}
"""Default pooling modes by `model_type`; all others pool the last token."""

MODE_OF_TYPE = {"CLS": "cls", "LAST": "lasttoken", "MEAN": "mean"}
"""Pooling types of `PoolerConfig` as modes of `cenote.tensors.pooling`."""

DECLARED = {
    **dict.fromkeys(MODE_OF_TYPE, "default_pooling_type"),
    **dict.fromkeys(("ALL", "STEP"), "default_token_pooling_type"),
}
"""Pooling types to the attribute by which a class declares them."""

TOKEN_TASKS = ("token_classify", "token_embed")

M = TypeVar("M", bound="type[PreTrainedModel]")


def default_pooling_type(
    pooling_type: str | None = None, *, seq_pooling_type: str | None = None, tok_pooling_type: str | None = None
) -> Callable[[M], M]:
    """Decorate a model class of your own with the way in which it pools unless told otherwise.

    Args:
        pooling_type: short for `seq_pooling_type` or `tok_pooling_type`.
        seq_pooling_type: rows of whole sequences: "CLS", "LAST" or "MEAN".
        tok_pooling_type: rows of tokens: "ALL" serves the tasks of tokens first, "STEP" rates steps.

    Raises:
        ConfigError: any other name, or none.

    Example:
        >>> @default_pooling_type("MEAN")
        ... class MyEncoder(PreTrainedModel): ...
        >>> register_model(MyEncoder)
    """
    names = [name for name in (pooling_type, seq_pooling_type, tok_pooling_type) if name is not None]
    unknown = next(filterfalse(DECLARED.__contains__, names), None)
    if unknown is not None or not names:
        raise ConfigError(f"unknown pooling type {unknown!r}; known are: {', '.join(DECLARED)}")

    def decorate(model: M) -> M:
        for name in names:
            setattr(model, DECLARED[name], name)
        return model

    return decorate


def declared_tasks(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the tasks that a class serves first by its `default_pooling_type`."""
    return TOKEN_TASKS if getattr(type(model), "default_token_pooling_type", None) == "ALL" else ()


def with_defaults(options: ModelConfig, config: PretrainedConfig) -> ModelConfig:
    """Return `options` with STEP pooling, if the registered class of `config` declares it and the user says nothing."""
    from transformers import MODEL_MAPPING

    declared = getattr(MODEL_MAPPING.get(type(config), None), "default_token_pooling_type", None)
    pooler = options.pooler_config
    if declared != "STEP" or pooler.token_pooling is not None:
        return options
    return options.model_copy(update={"pooler_config": pooler.model_copy(update={"tok_pooling_type": "STEP"})})


def register_model(model: type[PreTrainedModel]) -> None:
    """Make a model class of your own known, so that checkpoints with its `model_type` load.

    The same happens at start for every class that an installed package names in the entry-point group
    `cenote.models`. The class needs a `config_class` with a `model_type`.
    """
    from transformers import AutoConfig, AutoModel

    config = getattr(model, "config_class", None)
    if config is None or not getattr(config, "model_type", ""):
        raise ConfigError(f"{model.__name__} needs a `config_class` whose `model_type` is set")
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)


def register_installed() -> list[str]:
    """Register the classes of the entry-point group `cenote.models`, and return their names."""
    entries = _installed(tuple(sys.path))
    for entry in entries:
        register_model(entry.load())
    return [entry.name for entry in entries]


@functools.cache
def _installed(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Return the entry points of the group; `path`, where packages are found, is that of the process."""
    return tuple(entry_points(group="cenote.models"))


def check_convert(architecture: str, convert: str, *, pools: bool) -> None:
    """Refuse a model that only generates, if nothing is to make a pooling model of it.

    Args:
        architecture: first entry of the config's `architectures`.
        convert: the option of that name.
        pools: the checkpoint has a Sentence-Transformers Pooling module.

    Raises:
        CheckpointError: `convert` is "none", and neither the name nor a module says how the model pools.
    """
    if convert == "none" and architecture.endswith(GENERATIVE) and not pools:
        raise CheckpointError(
            f"{architecture} generates text and `convert` is 'none', so there is nothing to pool; "
            "use convert 'auto' or 'embed' to serve its hidden states"
        )


@dataclass(frozen=True)
class Head:
    """The head that a checkpoint gets.

    Attributes:
        kind: "none"; "sequence" and "token" are the heads of Transformers' classes of those names; "vocabulary" are
            columns of a language model's output embeddings; "masked" is a masked-language-model head of a family,
            "tokens" one that rates each token by the whole vocabulary; "modules" are Sentence-Transformers modules
            behind the pooling; "reward" is one that Transformers has no class for (`Family.classifier`).
        columns: for "vocabulary": the token ids; empty = all.
        difference: for "vocabulary": the score is the second column minus the first.
        sigma: divisor of logits unless the pooler config has one.
        prompt: of a pair, if the model was trained on one.
        name: where the head comes from, for the report at start.
    """

    kind: Literal["none", "sequence", "token", "vocabulary", "masked", "tokens", "modules", "reward"] = "none"
    columns: tuple[int, ...] = ()
    difference: bool = False
    sigma: float = 1.0
    prompt: PairTemplate | None = None
    name: str = ""


@dataclass(frozen=True)
class Facts:
    """The facts by which a head is chosen.

    Attributes:
        names: of the checkpoint, by its user and by itself.
        tensors: names of all its tensors.
        logit_score: token ids (true, false) of Sentence-Transformers' `LogitScore` module.
        scored_by_modules: Sentence-Transformers modules behind the pooling make scores.
        pools: Sentence-Transformers' files say how vectors are pooled.
        overrides: keys of the config that the user sets.
        prompts: the prompt of a known reranker is used.
        step: the pooler config asks for STEP pooling.
        token_id: token id of a vocabulary entry, or `None`.
    """

    architecture: str
    convert: str
    config: Any
    names: tuple[str, ...]
    tensors: tuple[str, ...]
    logit_score: tuple[int, int | None] | None
    scored_by_modules: bool
    step: bool
    step_columns: tuple[int, ...]
    token_id: Callable[[str], int | None]
    pools: bool = False
    overrides: tuple[str, ...] = ()
    prompts: bool = True

    @property
    def has_score(self) -> bool:
        """Whether the checkpoint has a score layer."""
        return "score.weight" in self.tensors

    @property
    def is_original(self) -> bool:
        """Whether the config says that it is a Qwen3 reranker as it was published."""
        return bool(getattr(self.config, "is_original_qwen3_reranker", False))

    @property
    def is_configured(self) -> bool:
        """Whether the config says which tokens classify."""
        return self.is_original or getattr(self.config, "classifier_from_token", None) is not None

    @cached_property
    def reranker(self) -> Reranker | None:
        """The reranker that the checkpoint is known as."""
        return rerankers.recognise(list(self.names), str(self.config.model_type))

    @property
    def prompt(self) -> PairTemplate | None:
        """Prompt of a pair, unless the user switches it off or says which tokens classify."""
        if not self.prompts or OVERRIDES.intersection(self.overrides):
            return None
        if self.reranker is not None:
            return self.reranker.prompt
        original = rerankers.ORIGINAL.get(self.config.model_type, rerankers.QWEN3)
        return original if self.is_original else None


OVERRIDES = frozenset({"is_original_qwen3_reranker", "classifier_from_token"})
"""Keys of the config by which a user says which tokens classify; pairs are then joined as they are, as in vLLM."""

METHODS = ("from_2_way_softmax", "no_post_processing")
"""Ways to make a classifier of a language model's head, with vLLM's names."""


VocabularyEntries = Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]


class Tokens(NamedTuple):
    """Vocabulary entries that classify.

    Attributes:
        entries: as text; empty = there are none.
        difference: the score is the second one's logit minus the first's.
    """

    entries: tuple[str, ...] = ()
    difference: bool = False


def choose_head(facts: Facts) -> Head:
    """Return the classification head of a checkpoint, if it has one or conversion makes one.

    Raises:
        CheckpointError: a classifier is asked for, and nothing in the checkpoint or the options makes one.
    """
    if facts.convert == "embed":
        return Head()
    if facts.architecture.endswith("ForTokenClassification") and not facts.scored_by_modules:
        return Head("token", name=facts.architecture)
    tokens = _tokens(facts)
    head = next(filter(None, (choose(facts, tokens) for choose in CHOICES)), None)
    if head is None and facts.convert == "classify":
        raise CheckpointError(
            f"convert 'classify' needs a head: {facts.architecture} has no score.weight. Name the vocabulary entries "
            'whose logits classify, as in hf_overrides {"classifier_from_token": ["no", "yes"], "method": '
            '"from_2_way_softmax"}, or set pooler_config {"pooling_type": "STEP", "returned_token_ids": [...]}'
        )
    return coalesce(head, Head())


def _modular_head(facts: Facts, tokens: Tokens) -> Head | None:
    """Return the head that modules of a CrossEncoder make."""
    return Head("modules", name="the modules of its Sentence-Transformers files") if facts.scored_by_modules else None


def _sequence_head(facts: Facts, tokens: Tokens) -> Head | None:
    """Return the head of a `...ForSequenceClassification` model, unless tokens classify in its place."""
    is_one = facts.architecture.endswith("ForSequenceClassification")
    if is_one and (facts.has_score or not tokens.entries):
        return Head("sequence", prompt=facts.prompt, name=facts.architecture)
    return None


def _logit_score(facts: Facts, tokens: Tokens) -> Head | None:
    """Return the head of a `LogitScore` module, unless the config says otherwise."""
    if facts.logit_score is None or facts.is_configured:
        return None
    yes, no = facts.logit_score
    columns = (yes,) if no is None else (no, yes)
    return Head("vocabulary", columns, no is not None, name="LogitScore of its Sentence-Transformers files")


def _score_layer(facts: Facts, tokens: Tokens) -> Head | None:
    """Return the score layer of a model of another class, unless its files say how it pools."""
    may_classify = facts.convert == "classify" or (not facts.pools and _has_classifier(facts.config))
    if not facts.has_score or not may_classify:
        return None
    return Head("sequence", prompt=facts.prompt, name=f"the score layer of {facts.architecture}")


def _has_classifier(config: Any) -> bool:
    """Return whether Transformers has a sequence classifier for a config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    return config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


def _vocabulary_head(facts: Facts, tokens: Tokens) -> Head | None:
    """Return the logits of tokens."""
    if not tokens.entries:
        return None
    reranker = facts.reranker
    name = f"logits of {', '.join(map(repr, tokens.entries))}"
    if tokens.difference:
        name = f"difference of {name}"
    if reranker is not None and not facts.is_configured:
        name += f", recognised as {reranker.name}"
    return Head(
        "vocabulary",
        columns=tuple(_token_id(entry, facts) for entry in tokens.entries),
        difference=tokens.difference,
        sigma=reranker.sigma if reranker else 1.0,
        prompt=facts.prompt,
        name=name,
    )


def _step_head(facts: Facts, tokens: Tokens) -> Head | None:
    """Return the language-model head, if it is to rate steps."""
    if facts.step and facts.architecture.endswith(GENERATIVE):
        return Head("vocabulary", facts.step_columns, name="its language-model head")
    return None


def _masked_head(facts: Facts, tokens: Tokens) -> Head | None:
    """Return the masked-language-model head, if it rates tokens as in vLLM, which has such a class for BERT alone."""
    if facts.architecture != RATES_BY_VOCABULARY or facts.pools or facts.convert != "auto":
        return None
    return Head("tokens", name="its masked-language-model head")


RATES_BY_VOCABULARY = "BertForMaskedLM"

CHOICES = (
    _modular_head,
    _sequence_head,
    _logit_score,
    _score_layer,
    _vocabulary_head,
    _step_head,
    _masked_head,
)
"""Heads of a checkpoint; the first that is there counts."""


def _tokens(facts: Facts) -> Tokens:
    """Return the tokens that classify: by the config, else by the known reranker."""
    entries = getattr(facts.config, "classifier_from_token", None)
    if facts.is_original:
        return _checked(coalesce(entries, ("no", "yes")), METHODS[0])
    if entries is not None:
        return _checked(entries, getattr(facts.config, "method", None))
    if facts.reranker is not None:
        return Tokens(facts.reranker.tokens, facts.reranker.difference)
    return Tokens()


def _checked(entries: Any, method: str | None) -> Tokens:
    """Return tokens out of a config.

    Raises:
        CheckpointError: they are no list of texts, or the method is unknown or needs another number of them.
    """
    try:
        names = msgspec.convert(entries, VocabularyEntries)
    except msgspec.ValidationError:
        raise CheckpointError(f"classifier_from_token must be a list of vocabulary entries, got {entries!r}") from None
    if method not in METHODS:
        raise CheckpointError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    difference = method == METHODS[0]
    if difference and len(names) != 2:
        raise CheckpointError(f"method {method} needs two tokens, the negative one first, got {list(names)}")
    return Tokens(names, difference)


def _token_id(token: str, facts: Facts) -> int:
    token_id = facts.token_id(token)
    if token_id is None:
        raise CheckpointError(f"{facts.names[0]}: the vocabulary has no entry {token!r} to classify by")
    return token_id


def unnamed(config: Any, tensors: Collection[str]) -> str:
    """Return the architecture of a checkpoint whose config names none: the class with the fewest other tensors.

    Args:
        config: of the checkpoint.
        tensors: names of all its tensors.
    """
    import torch
    import transformers

    backbone = f"{type(config).__name__.removesuffix('Config')}Model"
    tables = transformers.models.auto.modeling_auto
    distances: dict[str, int] = {}
    for table in ("MODEL_MAPPING_NAMES", *OF_HEADS):
        name = getattr(tables, table).get(config.model_type, "")
        names = (name,) if isinstance(name, str) else name
        for architecture in filter(partial(hasattr, transformers), names):
            with torch.device("meta"):
                model = getattr(transformers, architecture)(config)
            distances[architecture] = len(_heads(model, model.state_dict()) ^ _heads(model, tensors))
    return min(distances, key=lambda name: distances[name], default=backbone)


OF_HEADS = ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES")
"""Transformers' tables of classes by `model_type` whose heads are recognised by their tensors."""


def _heads(model: PreTrainedModel, tensors: Collection[str]) -> set[str]:
    """Return those of `tensors` that are in no layer of the backbone."""
    prefix = f"{model.base_model_prefix}."
    names = {name.removeprefix(prefix) for name in tensors}
    return {name for name in names if not is_in_layer(name) or "classif" in name}


def is_in_layer(name: str) -> bool:
    """Return whether a tensor is in a numbered layer."""
    return any(map(str.isdigit, name.split(".")))


def is_reward(architecture: str) -> bool:
    """Return whether `architecture` is the name of a reward model."""
    return architecture.endswith(REWARDS)


def architecture_pooling(model: PreTrainedModel) -> str:
    """Return the mode by which a model pools when neither the user nor the checkpoint says."""
    declared = getattr(type(model), "default_pooling_type", None)
    if declared is not None:
        return MODE_OF_TYPE[declared]
    return MODES.get(model.config.model_type, "lasttoken")
