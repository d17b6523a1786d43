"""The Sentence-Transformers part of a checkpoint: `modules.json` and the folders that it names.

Module types are recognised by their class name, which is the same in the old (`sentence_transformers.models.X`)
and new (`sentence_transformers.base.modules.x.X`) spellings. A module that Cenote does not honour is an error.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from cenote.core import Similarity
from cenote.errors import CheckpointError
from cenote.tensors.heads import normalize
from cenote.tensors.pooling import MODES
from cenote.tensors.similarity import PAIRWISE

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from torch import Tensor

    from cenote.models.audit import Audit
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


TRANSFORMERS = ("Transformer", "MLMTransformer")
"""Module classes that hold the Transformers checkpoint; both spell the same thing."""

Kind = Literal["vectors", "tokens", "sparse"]
"""Kinds of embeddings, by which they are compared."""

SIMILARITIES: dict[str, frozenset[Kind]] = {
    **dict.fromkeys(PAIRWISE, frozenset[Kind](("vectors", "sparse"))),
    **dict.fromkeys(("maxsim", "meanmaxsim"), frozenset[Kind](("tokens",))),
}
"""Names of similarities to the kinds of embeddings that they compare."""


@dataclass(frozen=True)
class Module:
    """One entry of `modules.json`.

    Attributes:
        type: import path of its class.
        folder: its files.
        side: "query" if only queries pass it; empty = every input does.
    """

    type: str
    folder: Path
    side: str = ""

    @property
    def kind(self) -> str:
        """Name of the class, without the package, which differs between releases."""
        return self.type.rpartition(".")[2]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of its `config.json`."""
        content: dict[str, Any] = read_json(self.folder / "config.json")
        return content


@dataclass(frozen=True)
class SentenceTransformer:
    """The content of `modules.json` and its neighbours; of a checkpoint without them, its folder and prompts.

    Attributes:
        backbone: folder of the Transformers checkpoint.
        settings: content of `config_sentence_transformers.json`.
        transformer: config of the Transformer module.
        max_seq_length: tokens to which an input is cut.
        do_lower_case: text is lower-cased before it is tokenised.
        modes: pooling modes, concatenated if several; empty if there is no Pooling module.
        include_prompt: whether pooling looks at the prompt's tokens.
        steps: modules after pooling, in order, without a closing Normalize.
        normalizes: whether the last module is Normalize.
        dimension: length of the vector, if a module fixes it.
        prompts: name to text.
        activation: import path of the activation that a CrossEncoder was saved with.
        pair_template: variables of the chat template that renders a pair; `None` = a pair is not rendered.
        structured: that template takes message contents as lists of parts.
        logit_score: token ids (true, false) of a `LogitScore` module: the language model's logits are the score.
        special: modules that need a family to read them, in order, then those of queries alone.
    """

    backbone: Path
    settings: dict[str, Any] = field(default_factory=dict)
    transformer: dict[str, Any] = field(default_factory=dict)
    max_seq_length: int | None = None
    do_lower_case: bool = False
    modes: tuple[str, ...] = ()
    include_prompt: bool = True
    steps: tuple[Step, ...] = ()
    normalizes: bool = False
    dimension: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    activation: str | None = None
    pair_template: dict[str, Any] | None = None
    structured: bool = False
    logit_score: tuple[int, int | None] | None = None
    special: tuple[Module, ...] = ()

    @property
    def default_prompt(self) -> str:
        """Text of the default prompt, empty if there is none."""
        return self.prompts[self.default_prompt_name] if self.default_prompt_name else ""

    @property
    def is_cross_encoder(self) -> bool:
        """Whether the files describe a CrossEncoder."""
        return self.settings.get("model_type") == "CrossEncoder" or self.logit_score is not None

    def similarity(self, kind: Kind) -> Similarity:
        """Return how embeddings are compared in a model of embeddings of this kind.

        A name that is meant for another kind of model says nothing, as in sentence-transformers.

        Raises:
            CheckpointError: there is no such similarity.
        """
        written = self.settings.get("similarity_fn_name")
        name = "" if written is None else written.lower()  # PyLate writes "MaxSim"
        if written is not None and name not in SIMILARITIES:
            raise CheckpointError(f"similarity_fn_name is {written!r}; honoured are {', '.join(SIMILARITIES)}")
        if kind not in SIMILARITIES.get(name, ()):
            return Similarity(vectors="dot") if kind == "sparse" and self.special else Similarity()
        if kind == "tokens":
            return Similarity(tokens=name)
        return Similarity(name, name) if kind == "sparse" else Similarity(name)


@contextmanager
def well_formed(path: Path) -> Iterator[None]:
    """Refuse the folder `path` if code in the `with` block finds values of other types or names than it expects.

    Raises:
        CheckpointError: instead of the error that reading such a value raises.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a well-formed Sentence-Transformers folder: {error!r}") from error


def read(path: Path, audit: Audit, *, allow_pickle: bool = False) -> SentenceTransformer | None:
    """Read the Sentence-Transformers part of the checkpoint at `path`; `None` if it has none.

    Raises:
        CheckpointError: a mode or an activation is not honoured, or weights of a module are missing.
    """
    if not (path / "modules.json").is_file():
        return None
    with well_formed(path):
        listed = sorted(read_json(path / "modules.json"), key=lambda entry: entry["idx"])
        modules = [Module(str(entry["type"]), path / entry["path"]) for entry in listed]
        if [module.kind for module in modules] == ["Router"]:
            modules = _routed(modules[0].folder)
        return _read(path, modules, audit, allow_pickle)


def _read(path: Path, modules: list[Module], audit: Audit, allow_pickle: bool) -> SentenceTransformer:
    if not modules or modules[0].kind not in TRANSFORMERS:
        first = modules[0].type if modules else "nothing"
        raise CheckpointError(
            f"modules.json begins with {first}; Cenote honours checkpoints that begin with a Transformer"
        )
    st = _of_transformer(modules[0].folder, _first_json(path, ("config_sentence_transformers.json",)))
    for module in modules[1:]:
        st = _with(st, module, allow_pickle)
    if st.steps and st.steps[-1] is normalize:
        st = replace(st, steps=st.steps[:-1], normalizes=True)
    return st


def _of_transformer(folder: Path, settings: dict[str, Any]) -> SentenceTransformer:
    """Return the description of a Transformer module alone, which lies in `folder`.

    Raises:
        CheckpointError: the default prompt is none of the prompts.
    """
    transformer = _first_json(folder, TRANSFORMER_CONFIGS)
    modalities = transformer.get("modality_config") or {}
    prompts = {str(name): str(text) for name, text in (settings.get("prompts") or {}).items()}
    default = settings.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise CheckpointError(f"default_prompt_name is {default!r}, but the prompts are {sorted(prompts)}")
    return SentenceTransformer(
        backbone=folder,
        settings=settings,
        transformer=transformer,
        max_seq_length=transformer.get("max_seq_length"),
        do_lower_case=bool(transformer.get("do_lower_case", False)),
        prompts=prompts,
        default_prompt_name=default,
        activation=settings.get("activation_fn"),
        pair_template=_pair_variables(transformer) if "message" in modalities else None,
        structured=modalities.get("message", {}).get("format") == "structured",
    )


def _pair_variables(transformer: dict[str, Any]) -> dict[str, Any]:
    """Return the variables of the chat template that renders a pair."""
    variables = dict((transformer.get("processing_kwargs") or {}).get("chat_template") or {})
    variables.pop("restore_suffix", None)  # is not one
    return variables


def _with(st: SentenceTransformer, module: Module, allow_pickle: bool) -> SentenceTransformer:
    """Return `st` with one more module."""
    if module.kind in POOLERS and not st.modes:
        return POOLERS[module.kind](st, module)
    if module.kind in STEPS and st.modes:
        step, width = STEPS[module.kind](module, allow_pickle)
        steps = st.steps if step is None else (*st.steps, step)
        return replace(st, steps=steps, dimension=width or st.dimension)
    return replace(st, special=(*st.special, module))


def _with_pooling(st: SentenceTransformer, module: Module) -> SentenceTransformer:
    modes = pooling_modes(module.config)
    width = module.config.get("embedding_dimension", module.config.get("word_embedding_dimension"))
    return replace(
        st,
        modes=modes,
        include_prompt=bool(module.config.get("include_prompt", True)),
        dimension=width * len(modes) if width else None,
    )


def _with_logit_score(st: SentenceTransformer, module: Module) -> SentenceTransformer:
    tokens = (int(module.config["true_token_id"]), module.config.get("false_token_id"))
    return replace(st, logit_score=tokens)


POOLERS: dict[str, Callable[[SentenceTransformer, Module], SentenceTransformer]] = {
    "Pooling": _with_pooling,
    "LogitScore": _with_logit_score,
}
"""Module class to a reader, of modules that make one result of all tokens."""


def _routed(router: Path) -> list[Module]:
    """Return the modules that documents pass in the Router of the folder `router`, then those of queries alone.

    Raises:
        CheckpointError: it has other routes, or another default than documents.
    """
    config = read_json(router / "router_config.json")
    types, routes, settings = config["types"], config["structure"], config.get("parameters") or {}
    if set(routes) != {"query", "document"}:
        raise CheckpointError(f"modules.json names a Router with the routes {sorted(routes)}; {ROUTES}")
    if settings.get("route_mappings") or settings.get("default_route", "document") != "document":
        raise CheckpointError(
            "modules.json names a Router whose default route is not `document`, or that maps tasks to other routes"
        )
    documents = [Module(str(types[name]), router / name) for name in routes["document"]]
    return documents + [Module(str(types[name]), router / name, side="query") for name in routes["query"]]


ROUTES = "honoured is a document encoder whose query route is a SparseStaticEmbedding"


def pooling_modes(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the pooling modes of a Pooling config, in its new (`pooling_mode`) or old (`pooling_mode_*`) spelling.

    Raises:
        CheckpointError: one is unknown.
    """
    named = config.get("pooling_mode")
    if named is None:
        return _flagged_modes(config) or ("mean",)
    modes = (named,) if isinstance(named, str) else tuple(named)
    for mode in modes:
        _check_mode(mode, MODES)
    return modes or ("mean",)


def _flagged_modes(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the modes whose flags are set."""
    for flag, is_set in config.items():
        if flag.startswith("pooling_mode_") and is_set:
            _check_mode(flag, LEGACY_MODES)
    return tuple(mode for flag, mode in LEGACY_MODES.items() if config.get(flag))


def _check_mode(name: str, names: Collection[str]) -> None:
    if name not in names:
        raise CheckpointError(f"unknown pooling mode {name!r}; known are: {', '.join(MODES)}")


class _Dense(nn.Module):
    """Linear, activation, and an optional residual around both."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, activation: nn.Module, residual: bool
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = activation
        self.use_residual = residual
        self.residual: nn.Module = nn.Identity()
        if residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x_RD: Tensor) -> Tensor:
        """`[R, in] -> [R, out]`."""
        y_RD: Tensor = self.activation(self.linear(x_RD))
        return y_RD + self.residual(x_RD) if self.use_residual else y_RD


def dense(module: Module, allow_pickle: bool, over: str = "sentence_embedding") -> tuple[Step, int]:
    """Return the layer of a Dense module over vectors of the name `over`, and its output size.

    Raises:
        CheckpointError: a setting is not honoured, or the weights do not fit.
    """
    config, folder = module.config, module.folder
    unknown = set(config) - DENSE_KEYS
    if unknown:
        raise CheckpointError(f"{folder.name}/config.json has keys that Cenote does not honour: {sorted(unknown)}")
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (over, None):
            raise CheckpointError(f"{folder.name}: Dense over {config.get(key)!r} is not honoured, only {over}")
    layer = _Dense(
        config["in_features"],
        config["out_features"],
        bias=config.get("bias", True),
        activation=_activation(config.get("activation_function", "torch.nn.modules.activation.Tanh")),
        residual=bool(config.get("use_residual", False)),
    )
    return _loaded(layer, folder, allow_pickle), config["out_features"]


DENSE_KEYS = {
    "in_features",
    "out_features",
    "bias",
    "activation_function",
    "use_residual",
    "module_input_name",
    "module_output_name",
}


def _layer_norm(module: Module, allow_pickle: bool) -> tuple[Step, int]:
    width = module.config["dimension"]
    norm = nn.Module()
    norm.norm = nn.LayerNorm(width)
    _loaded(norm, module.folder, allow_pickle)
    return norm.norm, width


def _normalize(module: Module, allow_pickle: bool) -> tuple[Step, None]:
    return normalize, None


def _dropout(module: Module, allow_pickle: bool) -> tuple[None, None]:
    return None, None


STEPS: dict[str, Callable[[Module, bool], tuple[Any, int | None]]] = {
    "Dense": dense,
    "LayerNorm": _layer_norm,
    "Normalize": _normalize,
    "Dropout": _dropout,
}
"""Module class to a reader that returns its step (`None` = does nothing at inference) and its output size."""


def _activation(name: str) -> nn.Module:
    """Return an activation by its import path; only classes of `torch.nn` are looked up, nothing is imported."""
    kind = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise CheckpointError(f"activation function {name!r} is not a module of torch.nn")
    return kind()


def _loaded(module: nn.Module, folder: Path, allow_pickle: bool) -> nn.Module:
    """Load a module's weights, all of them, and freeze it in float32."""
    try:
        module.load_state_dict(weights(folder, allow_pickle))
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {folder} do not fit: {error}") from None
    return module.float().eval().requires_grad_(False)


def weights(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """Return the tensors of a module's folder by name.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    has_pickle = pickled.is_file()
    try:
        if safe.is_file():
            return load_file(safe)
        if has_pickle and allow_pickle:
            tensors: dict[str, Tensor] = torch.load(pickled, map_location="cpu", weights_only=True)
            return tensors
    except (OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise CheckpointError(f"cannot read the weights in {folder}: {error}") from None
    hint = " (there is a pytorch_model.bin, which --safetensors-only leaves unread)" if has_pickle else ""
    raise CheckpointError(f"{folder} has no model.safetensors{hint}")


def _first_json(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the content of the first of the files `names` that is in `folder`; empty if none is."""
    for name in names:
        if (folder / name).is_file():
            content: dict[str, Any] = read_json(folder / name)
            return content
    return {}


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read {path.name} of {path.parent.name}: {error}") from None
