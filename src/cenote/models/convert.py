"""What an architecture's name says: whether and how it becomes a pooling model, and how it pools by default.

The suffix table and the defaults are vLLM's, so that the same checkpoint pools alike here and there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from cenote.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

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
    (("ForRewardModeling", "RewardModel"), "pooling", "embed"),
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
    found = next((row for row in SUFFIXES if architecture.endswith(row[0])), None)
    native_runner, native = (found[1], found[2]) if found else ("pooling", "embed")
    if convert in ("embed", "classify"):
        return convert
    if pools or native != "none":
        return "embed" if pools else native
    if convert == "none" and native_runner == "generate":
        raise CheckpointError(
            f"{architecture} generates text and `convert` is 'none', so there is nothing to pool; "
            "use convert 'auto' or 'embed' to serve its hidden states"
        )
    return "embed"


def architecture_pooling(model: PreTrainedModel) -> str:
    """The mode by which a model pools when neither the user nor the checkpoint says."""
    declared = getattr(type(model), "default_pooling_type", None)
    if declared is not None:
        return MODE_OF_TYPE[declared]
    kind = model.config.model_type
    return "cls" if kind in CLS_FAMILIES else "mean" if kind in MEAN_FAMILIES else "lasttoken"
