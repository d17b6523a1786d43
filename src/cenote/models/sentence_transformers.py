"""Reads the Sentence-Transformers part of a checkpoint: `modules.json` and the folders it names.

Module types are recognised by their class name, which is the same in the old (`sentence_transformers.models.X`)
and new (`sentence_transformers.base.modules.x.X`) spellings. A module that Cenote does not honour is an error.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field, replace
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cenote.core import Similarity
from cenote.errors import CheckpointError
from cenote.models.families.multi_vector import from_settings
from cenote.tensors.heads import normalize
from cenote.tensors.pooling import MODES, Clustering
from cenote.tensors.similarity import PAIRWISE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from cenote.models.families.multi_vector import MultiVector
    from cenote.tensors.heads import Step

LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Flags of old Pooling configs, in the order in which several are concatenated."""

TRANSFORMER_CONFIGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)


@dataclass(frozen=True)
class SentenceTransformer:
    """What `modules.json` and its neighbours say.

    Attributes:
        backbone: folder of the Transformers checkpoint.
        modes: pooling modes, concatenated if several; empty if there is no Pooling module.
        include_prompt: whether pooling looks at the prompt's tokens.
        steps: modules after pooling, in order, without a closing Normalize.
        normalizes: whether the last module is Normalize.
        dimension: length of the vector, if a module fixes it.
        prompts: name to text.
        is_cross_encoder: whether the files describe a CrossEncoder.
        logit_score: token ids (true, false) of a `LogitScore` module: the language model's logits are the score.
        activation: import path of the activation that a CrossEncoder was saved with.
        multi_vector: how a late-interaction model encodes queries and documents; `None` = it is no such model.
        token_steps: its modules over token vectors.
        clustering: joins them into fewer; `None` = it does not.
        splade: config of a SpladePooling module.
        max_active: how many weights of a sparse embedding are kept; `None` = all.
        query_weights: weights of vocabulary entries by which queries are encoded without the model.
        pair_template: variables of the chat template that renders a pair; `None` = a pair is not rendered.
        structured: that template takes message contents as lists of parts.
        similarity: how its embeddings are compared.
    """

    backbone: Path
    modes: tuple[str, ...] = ()
    include_prompt: bool = True
    steps: tuple[Step, ...] = ()
    normalizes: bool = False
    dimension: int | None = None
    max_seq_length: int | None = None
    do_lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    is_cross_encoder: bool = False
    logit_score: tuple[int, int | None] | None = None
    activation: str | None = None
    multi_vector: MultiVector | None = None
    token_steps: tuple[Step, ...] = ()
    clustering: Clustering | None = None
    splade: dict[str, Any] | None = None
    max_active: int | None = None
    query_weights: Tensor | None = None
    pair_template: dict[str, Any] | None = None
    structured: bool = False
    similarity: Similarity = field(default_factory=Similarity)

    @property
    def default_prompt(self) -> str:
        """Text of the default prompt, empty if there is none."""
        return self.prompts[self.default_prompt_name] if self.default_prompt_name else ""


def read(path: Path, *, allow_pickle: bool = False) -> SentenceTransformer | None:
    """The Sentence-Transformers part of the checkpoint at `path`, or `None` if it has none.

    Raises:
        CheckpointError: a module, mode or activation is not honoured, or its weights are missing.
    """
    if not (path / "modules.json").is_file():
        return None
    try:
        return _read(path, allow_pickle=allow_pickle)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a well-formed Sentence-Transformers folder: {error!r}") from error


def _read(path: Path, *, allow_pickle: bool) -> SentenceTransformer:
    modules = sorted(_json(path / "modules.json"), key=lambda module: module["idx"])
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    query_weights = None
    if kinds == ["Router"]:
        modules, kinds, query_weights = _routed(path, modules[0]["path"], allow_pickle)
    if not kinds or kinds[0] not in BACKBONES:
        first = modules[0]["type"] if modules else "nothing"
        raise CheckpointError(
            f"modules.json begins with {first}; Cenote honours checkpoints that begin with a Transformer"
        )
    backbone = path / modules[0]["path"]
    transformer: dict[str, Any] = next(
        (_json(backbone / name) for name in TRANSFORMER_CONFIGS if (backbone / name).is_file()), {}
    )
    modes: tuple[str, ...] = ()
    include_prompt = True
    steps: list[Step] = []
    dimension: int | None = None
    logit_score = None
    splade = mask = clustering = None
    pooled_of: tuple[str, ...] = ()
    token_steps: list[Step] = []
    general = path / "config_sentence_transformers.json"
    settings = _json(general) if general.is_file() else {}
    is_multi_vector = settings.get("model_type") in ("MultiVectorEncoder", "ColBERT")
    for module, kind in zip(modules[1:], kinds[1:], strict=True):
        folder = path / module["path"]
        if kind == "Pooling" and not modes:
            config = _json(folder / "config.json")
            modes, include_prompt = pooling_modes(config), bool(config.get("include_prompt", True))
            width = config.get("embedding_dimension", config.get("word_embedding_dimension"))
            dimension = width * len(modes) if width else None
        elif kind == "SpladePooling" and not modes:
            splade = _json(folder / "config.json")
        elif kind == "MultiVectorMask" and is_multi_vector:
            mask = _json(folder / "config.json")
            if mask.get("keep_only_token_ids"):
                raise CheckpointError(
                    "MultiVectorMask with keep_only_token_ids is for images, which are not served yet"
                )
        elif is_multi_vector and kind == "Dense":
            token_steps.append(_dense(folder, allow_pickle, ("token_embeddings", None))[0])
        elif is_multi_vector and kind == "Normalize":
            token_steps.append(normalize)
        elif is_multi_vector and kind == "HierarchicalTokenPooling" and module is modules[-1]:
            clustering, pooled_of = _clustering(_json(folder / "config.json"))
        elif kind == "LogitScore" and not modes:
            config = _json(folder / "config.json")
            logit_score = (int(config["true_token_id"]), config.get("false_token_id"))
        elif kind in STEPS and modes:
            step, width = STEPS[kind](folder, allow_pickle)
            dimension = width or dimension
            steps += [step] if step else []
        else:
            raise CheckpointError(
                f"modules.json names the module {module['type']}, which Cenote does not honour here; "
                "honoured are Transformer, then LogitScore, SpladePooling, MultiVectorMask with "
                "HierarchicalTokenPooling as the last module, or Pooling and "
                f"{', '.join(STEPS)}"
            )
    normalizes = bool(steps) and steps[-1] is normalize
    multi_vector = None
    if is_multi_vector:
        multi_vector = from_settings(settings, transformer, mask, normalizes=normalize in token_steps)
        multi_vector = replace(multi_vector, pooled_of=pooled_of)
    prompts = {str(name): str(text) for name, text in (settings.get("prompts") or {}).items()}
    default = settings.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise CheckpointError(f"default_prompt_name is {default!r}, but the prompts are {sorted(prompts)}")
    return SentenceTransformer(
        backbone=backbone,
        modes=modes,
        include_prompt=include_prompt,
        steps=tuple(steps[:-1] if normalizes else steps),
        normalizes=normalizes,
        dimension=dimension,
        max_seq_length=transformer.get("max_seq_length"),
        do_lower_case=bool(transformer.get("do_lower_case", False)),
        prompts=prompts,
        default_prompt_name=default,
        is_cross_encoder=settings.get("model_type") == "CrossEncoder" or logit_score is not None,
        logit_score=logit_score,
        activation=settings.get("activation_fn"),
        multi_vector=multi_vector,
        token_steps=tuple(step for step in token_steps if step is not normalize),
        clustering=clustering,
        splade=splade,
        max_active=settings.get("max_active_dims"),
        query_weights=query_weights,
        pair_template=_pair_template(transformer),
        structured=(transformer.get("modality_config") or {}).get("message", {}).get("format") == "structured",
        similarity=_similarity(settings.get("similarity_fn_name"), tokens=is_multi_vector, sparse=splade is not None),
    )


BACKBONES = ("Transformer", "MLMTransformer")
"""Module classes that hold the Transformers checkpoint; both spell the same thing."""


def _routed(path: Path, own: str, allow_pickle: bool) -> tuple[list[dict[str, Any]], list[str], Tensor]:
    """The document side of the Router in the folder `own`, whose query side is a table of weights.

    Returns:
        Its modules, their kinds, and the weights.

    Raises:
        CheckpointError: the routes are others.
    """
    router = path / own
    config = _json(router / "router_config.json")
    types, routes, settings = config["types"], config["structure"], config.get("parameters") or {}
    kinds = {side: [str(types[folder]).rpartition(".")[2] for folder in folders] for side, folders in routes.items()}
    if set(kinds) != {"query", "document"} or kinds["query"] != ["SparseStaticEmbedding"]:
        raise CheckpointError(
            f"modules.json names a Router with the routes {sorted(routes)}; honoured is a document encoder whose query "
            "route is a SparseStaticEmbedding"
        )
    if "SpladePooling" not in kinds["document"]:
        raise CheckpointError("the queries' SparseStaticEmbedding needs documents with a SpladePooling to compare with")
    if settings.get("route_mappings") or settings.get("default_route", "document") != "document":
        raise CheckpointError(
            "modules.json names a Router whose default route is not `document`, or that maps tasks to other routes"
        )
    weights = _weights(router / routes["query"][0], allow_pickle)["weight"].float()
    modules = [{"path": f"{own or '.'}/{name}", "type": types[name]} for name in routes["document"]]
    return modules, kinds["document"], weights


def _similarity(name: str | None, *, tokens: bool, sparse: bool) -> Similarity:
    """What `similarity_fn_name` means for a model of token vectors, of sparse embeddings, or of neither.

    A name that is meant for the other kind of model says nothing, as in sentence-transformers.

    Raises:
        CheckpointError: there is no such similarity.
    """
    kinds = {**dict.fromkeys(PAIRWISE, False), "maxsim": True, "meanmaxsim": True}
    own = None if name is None else name.lower()  # PyLate writes "MaxSim"
    if own is not None and own not in kinds:
        raise CheckpointError(f"similarity_fn_name is {name!r}; honoured are {', '.join(kinds)}")
    if own is None or kinds[own] != tokens:
        return Similarity(vectors="dot") if sparse else Similarity()
    if tokens:
        return Similarity(tokens=own)
    return Similarity(own, own) if sparse else Similarity(own)


def _pair_template(transformer: dict[str, Any]) -> dict[str, Any] | None:
    """Variables for the chat template, if the Transformer module takes messages; `restore_suffix` is not one."""
    if "message" not in (transformer.get("modality_config") or {}):
        return None
    kwargs = dict((transformer.get("processing_kwargs") or {}).get("chat_template") or {})
    kwargs.pop("restore_suffix", None)
    return kwargs


def _clustering(config: dict[str, Any]) -> tuple[Clustering, tuple[str, ...]]:
    """What a HierarchicalTokenPooling does, and the sides that it is for.

    Raises:
        CheckpointError: a setting is not understood, or scipy, which clusters, is not installed.
    """
    if unknown := set(config) - {"pool_factor", "num_protected_tokens", "normalize_embeddings", "tasks"}:
        raise CheckpointError(f"HierarchicalTokenPooling has settings that are not honoured: {sorted(unknown)}")
    factor, protected = float(config.get("pool_factor", 1.0)), int(config.get("num_protected_tokens", 1))
    if factor < 1 or protected < 0:
        raise CheckpointError(
            f"HierarchicalTokenPooling joins at least 1 token into one and protects at least 0: got {config}"
        )
    if importlib.util.find_spec("scipy") is None:
        raise CheckpointError(
            "this checkpoint joins token vectors (HierarchicalTokenPooling), which needs scipy: "
            "pip install 'cenote[token-pooling]'; --plain-late-interaction serves it without"
        )
    sides = config.get("tasks") or ["document"]
    normalizes = bool(config.get("normalize_embeddings", False))  # what older folders, which do not say it, mean
    return Clustering(factor, protected, normalizes), (sides,) if isinstance(sides, str) else tuple(sides)


def pooling_modes(config: dict[str, Any]) -> tuple[str, ...]:
    """Pooling modes of a Pooling config, in its new (`pooling_mode`) or old (`pooling_mode_*`) spelling."""
    named = config.get("pooling_mode")
    if named is None:
        modes = tuple(mode for flag, mode in LEGACY_MODES.items() if config.get(flag))
        unknown = [k for k in config if k.startswith("pooling_mode_") and k not in LEGACY_MODES and config[k]]
    else:
        modes = (named,) if isinstance(named, str) else tuple(named)
        unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise CheckpointError(f"unknown pooling mode {unknown[0]!r}; known are: {', '.join(MODES)}")
    return modes or ("mean",)


class _Dense(nn.Module):
    """Linear, activation, and an optional residual around both."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, activation: nn.Module, residual: bool
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = activation
        self.use_residual = residual
        if residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x_RD: Tensor) -> Tensor:
        """`[R, in] -> [R, out]`."""
        y_RD: Tensor = self.activation(self.linear(x_RD))
        if not self.use_residual:
            return y_RD
        return y_RD + (self.residual(x_RD) if hasattr(self, "residual") else x_RD)


def _dense(
    folder: Path, allow_pickle: bool, inputs: tuple[str | None, ...] = ("sentence_embedding", None)
) -> tuple[Step, int]:
    config = _json(folder / "config.json")
    unknown = set(config) - DENSE_KEYS
    if unknown:
        raise CheckpointError(f"{folder.name}/config.json has keys that Cenote does not honour: {sorted(unknown)}")
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in inputs:
            raise CheckpointError(f"{folder.name}: Dense over {config.get(key)!r} is not honoured, only {inputs[0]}")
    dense = _Dense(
        config["in_features"],
        config["out_features"],
        bias=config.get("bias", True),
        activation=_activation(config.get("activation_function", "torch.nn.modules.activation.Tanh")),
        residual=bool(config.get("use_residual", False)),
    )
    return _loaded(dense, folder, allow_pickle), config["out_features"]


DENSE_KEYS = {
    "in_features",
    "out_features",
    "bias",
    "activation_function",
    "use_residual",
    "module_input_name",
    "module_output_name",
}


def _layer_norm(folder: Path, allow_pickle: bool) -> tuple[Step, int]:
    width = _json(folder / "config.json")["dimension"]
    norm = nn.Module()
    norm.norm = nn.LayerNorm(width)
    _loaded(norm, folder, allow_pickle)
    return norm.norm, width


def _normalize(folder: Path, allow_pickle: bool) -> tuple[Step, None]:
    return normalize, None


def _dropout(folder: Path, allow_pickle: bool) -> tuple[None, None]:
    return None, None


STEPS: dict[str, Callable[[Path, bool], tuple[Any, int | None]]] = {
    "Dense": _dense,
    "LayerNorm": _layer_norm,
    "Normalize": _normalize,
    "Dropout": _dropout,
}
"""Module class to a reader that returns its step (`None` = does nothing at inference) and its output size."""


def _activation(name: str) -> nn.Module:
    """An activation by its import path; only classes of `torch.nn` are looked up, nothing is imported."""
    found = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise CheckpointError(f"activation function {name!r} is not a module of torch.nn")
    return found()


def _loaded(module: nn.Module, folder: Path, allow_pickle: bool) -> nn.Module:
    """Load a module's weights, all of them, and freeze it in float32."""
    try:
        module.load_state_dict(_weights(folder, allow_pickle))
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {folder} do not fit: {error}") from None
    return module.float().eval().requires_grad_(False)


def _weights(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of a module's folder."""
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if not safe.is_file() and not (pickled.is_file() and allow_pickle):
        hint = " (there is a pytorch_model.bin; --allow-pickle would read it)" if pickled.is_file() else ""
        raise CheckpointError(f"{folder} has no model.safetensors{hint}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(safe) if safe.is_file() else torch.load(pickled, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise CheckpointError(f"cannot read the weights in {folder}: {error}") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
