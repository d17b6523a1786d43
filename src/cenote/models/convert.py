"""What an architecture's name says: whether and how it becomes a pooling model, with which head, and how it pools.

The suffix table and the defaults are vLLM's, so that the same checkpoint pools alike here and there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from cenote.errors import CheckpointError, ConfigError
from cenote.models.families import rerankers

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

REWARDS = ("ForRewardModeling", "RewardModel")

SUFFIXES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("ForCausalLM", "ForConditionalGeneration", "ChatModel", "LMHeadModel"), "generate", "none"),
    (("ForTextEncoding", "EmbeddingModel"), "pooling", "embed"),
    (
        (
            "ForSequenceClassification",
            "ForTokenClassification",
            "ForAudioClassification",
            "ForImageClassification",
            "ForVideoClassification",
            "ClassificationModel",
        ),
        "pooling",
        "classify",
    ),
    (REWARDS, "pooling", "embed"),
    (("Model",), "pooling", "embed"),
)
"""(suffixes of the architecture's name, its runner, its conversion); the first that matches counts."""

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

MODE_OF_TYPE = {"CLS": "cls", "LAST": "lasttoken", "MEAN": "mean"}
"""Pooling types of `PoolerConfig` as modes of `cenote.tensors.pooling`."""

M = TypeVar("M", bound="type[PreTrainedModel]")


def default_pooling_type(pooling_type: str) -> Callable[[M], M]:
    """Class decorator: how a model of your own pools unless told otherwise.

    Args:
        pooling_type: "CLS", "LAST" or "MEAN".

    Raises:
        ConfigError: any other name.

    Example:
        >>> @default_pooling_type("MEAN")
        ... class MyEncoder(PreTrainedModel): ...
        >>> register_model(MyEncoder)
    """
    if pooling_type not in MODE_OF_TYPE:
        raise ConfigError(f"unknown pooling type {pooling_type!r}; known are: {', '.join(MODE_OF_TYPE)}")

    def decorate(model: M) -> M:
        model.default_pooling_type = pooling_type  # type: ignore[attr-defined]
        return model

    return decorate


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
    """Register the classes of the entry-point group `cenote.models`; returns their names."""
    from importlib.metadata import entry_points

    names = []
    for entry in entry_points(group="cenote.models"):
        register_model(entry.load())
        names.append(entry.name)
    return names


def conversion(architecture: str, convert: str, *, pools: bool) -> str:
    """How `architecture` becomes a pooling model: "embed" or "classify".

    Args:
        architecture: first entry of the config's `architectures`.
        convert: the option of that name.
        pools: the checkpoint has a Sentence-Transformers Pooling module.

    Raises:
        CheckpointError: `convert` is "none" and the model only generates.
    """
    found = _suffix(architecture)
    native_runner, native = (found[1], found[2]) if found else ("pooling", "embed")
    if convert in ("embed", "classify", "sparse"):
        return convert
    if pools or native != "none":
        return "embed" if pools else native
    if convert == "none" and native_runner == "generate":
        raise CheckpointError(
            f"{architecture} generates text and `convert` is 'none', so there is nothing to pool; "
            "use convert 'auto' or 'embed' to serve its hidden states"
        )
    return "embed"


@dataclass(frozen=True)
class Head:
    """Which classification head a checkpoint gets.

    Attributes:
        kind: "none"; "sequence" and "token" are the heads of Transformers' classes of those names; "vocabulary" are
            columns of a language model's output embeddings; "masked" is a masked-language-model head; "reward" is
            one that Transformers has no class for (`Family.classifier`).
        columns: for "vocabulary": the token ids; empty = all.
        difference: for "vocabulary": the score is the second column minus the first.
        sigma: by what logits are divided unless the pooler config says.
        template: prompt of a pair, as a Jinja template, if the model was trained on one.
        name: where the head comes from, for the report at start.
    """

    kind: Literal["none", "sequence", "token", "vocabulary", "masked", "reward"] = "none"
    columns: tuple[int, ...] = ()
    difference: bool = False
    sigma: float = 1.0
    template: str | None = None
    name: str = ""


@dataclass(frozen=True)
class Facts:
    """What choosing a head looks at.

    Attributes:
        names: what the checkpoint is called, by its user and by itself.
        tensors: names of all its tensors.
        logit_score: token ids (true, false) of Sentence-Transformers' `LogitScore` module.
        step: the pooler config asks for STEP pooling.
        token_id: token id of a vocabulary entry, or `None`.
    """

    architecture: str
    convert: str
    config: Any
    names: tuple[str, ...]
    tensors: tuple[str, ...]
    logit_score: tuple[int, int | None] | None
    step: bool
    step_columns: tuple[int, ...]
    token_id: Callable[[str], int | None]


METHODS = ("from_2_way_softmax", "no_post_processing")
"""Ways to make a classifier of a language model's head, with vLLM's names."""


def choose_head(facts: Facts) -> Head:
    """The classification head of a checkpoint, if it has one or conversion makes one.

    Raises:
        CheckpointError: a classifier is asked for, and nothing in the checkpoint or the options makes one.
    """
    architecture, config = facts.architecture, facts.config
    if facts.convert == "embed":
        return Head()
    if architecture.endswith("ForTokenClassification"):
        return Head("token", name=architecture)
    known = rerankers.recognise(list(facts.names), str(config.model_type))
    is_original = bool(getattr(config, "is_original_qwen3_reranker", False))
    template = known.template if known else rerankers.QWEN3 if is_original else None
    is_configured = is_original or getattr(config, "classifier_from_token", None) is not None
    has_score = any(name == "score" or name.startswith("score.") for name in facts.tensors)
    tokens, difference = _tokens(config, known, is_original=is_original)
    if architecture.endswith("ForSequenceClassification") and (has_score or not tokens):
        return Head("sequence", template=template, name=architecture)
    if facts.logit_score is not None and not is_configured:
        yes, no = facts.logit_score
        of_tokens = (yes,) if no is None else (no, yes)
        return Head("vocabulary", of_tokens, no is not None, name="LogitScore of its Sentence-Transformers files")
    if facts.convert == "classify" and has_score:
        return Head("sequence", template=template, name=f"the score layer of {architecture}")
    if tokens:
        columns = tuple(_token_id(token, facts) for token in tokens)
        name = f"{'difference of ' if difference else ''}logits of {', '.join(map(repr, tokens))}"
        name += f", recognised as {known.name}" if known and not is_configured else ""
        return Head("vocabulary", columns, difference, known.sigma if known else 1.0, template, name)
    if facts.step and _suffix(architecture) == SUFFIXES[0]:
        return Head("vocabulary", facts.step_columns, name="its language-model head")
    if facts.convert == "classify":
        raise CheckpointError(
            f"convert 'classify' needs a head: {architecture} has no score.weight. Name the vocabulary entries whose "
            'logits classify, as in hf_overrides {"classifier_from_token": ["no", "yes"], "method": '
            '"from_2_way_softmax"}, or set pooler_config {"pooling_type": "STEP", "returned_token_ids": [...]}'
        )
    return Head()


def _tokens(config: Any, known: rerankers.Reranker | None, *, is_original: bool) -> tuple[tuple[str, ...], bool]:
    """The tokens that classify and whether their difference does: by the config, else by the known reranker."""
    tokens = getattr(config, "classifier_from_token", None)
    method = getattr(config, "method", None)
    if tokens is None and is_original:
        tokens = ("no", "yes")
    if tokens is None:
        return (known.tokens, known.difference) if known else ((), False)
    if isinstance(tokens, str) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"classifier_from_token must be a list of vocabulary entries, got {tokens!r}")
    if is_original:
        method = METHODS[0]
    if method not in METHODS:
        raise CheckpointError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == METHODS[0] and len(tokens) != 2:
        raise CheckpointError(f"method {method} needs two tokens, the negative one first, got {list(tokens)}")
    return tuple(tokens), method == METHODS[0]


def _token_id(token: str, facts: Facts) -> int:
    found = facts.token_id(token)
    if found is None:
        raise CheckpointError(f"{facts.names[0]}: the vocabulary has no entry {token!r} to classify by")
    return found


def _suffix(architecture: str) -> tuple[tuple[str, ...], str, str] | None:
    return next((row for row in SUFFIXES if architecture.endswith(row[0])), None)


def is_reward(architecture: str) -> bool:
    """Return whether `architecture` is the name of a reward model."""
    row = _suffix(architecture)
    return row is not None and row[0] is REWARDS


def architecture_pooling(model: PreTrainedModel) -> str:
    """The mode by which a model pools when neither the user nor the checkpoint says."""
    declared = getattr(type(model), "default_pooling_type", None)
    if declared is not None:
        return MODE_OF_TYPE[declared]
    kind = model.config.model_type
    return "cls" if kind in CLS_FAMILIES else "mean" if kind in MEAN_FAMILIES else "lasttoken"
