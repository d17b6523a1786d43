"""The Sentence-Transformers part of a checkpoint: `modules.json` and the folders that it names.

Modules are recognised by the package and the name of their class, which is the same in the old
(`sentence_transformers.models.X`) and new (`sentence_transformers.base.modules.x.X`) spellings. A module or a key that
Cenote does not honour is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import torch
from torch import nn

from cenote.core import Similarity
from cenote.errors import CheckpointError
from cenote.functions import coalesce
from cenote.models import keys, remote_code, transformer_module, value_types
from cenote.models.inside import inside
from cenote.models.modules import PACKAGES, Module, Normalized, check_names, dense, loaded
from cenote.models.reading import about, load, read_json
from cenote.models.transformer_module import TransformerModule, as_tuple
from cenote.tensors.heads import Cut, normalize
from cenote.tensors.pooling import MODES
from cenote.tensors.similarity import PAIRWISE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

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

TRANSFORMERS = {"Transformer": "feature-extraction", "CLIPModel": "feature-extraction", "MLMTransformer": "fill-mask"}
"""Module classes that hold the Transformers checkpoint, and their default task."""

OF_TOWERS = {"CLIPModel"}
"""Those of them whose towers make the vectors, unless their config says otherwise."""

STANDARD = "sentence_transformers.base.modules.transformer.Transformer"

OWN_MODULES = {"custom_st.Transformer": frozenset({"XLMRobertaLoRA"})}
"""Modules of a checkpoint's own code that are a Transformer to us, with the classes of models that they load: that of
jina-embeddings-v3 only chooses an adapter, as prompts do here."""

MODULES, SETTINGS = "modules.json", "config_sentence_transformers.json"

Kind = Literal["vectors", "tokens", "sparse"]
"""Kinds of embeddings, by which they are compared."""

TOKEN_SIMILARITIES = ("maxsim", "meanmaxsim")

SIMILARITIES: dict[str, frozenset[Kind]] = {
    **dict.fromkeys(PAIRWISE, frozenset[Kind](("vectors", "sparse"))),
    **dict.fromkeys(TOKEN_SIMILARITIES, frozenset[Kind](("tokens",))),
}
"""Names of similarities to the kinds of embeddings that they compare."""

COMPARED: dict[Kind, tuple[str, ...]] = {
    "vectors": ("vectors",),
    "tokens": ("tokens",),
    "sparse": ("vectors", "sparse"),
}
"""Kinds of embeddings that a model gives to the fields of `Similarity` that its similarity is for."""


@dataclass(frozen=True)
class SentenceTransformer:
    """The content of `modules.json` and its neighbours; of a checkpoint without them, its folder and prompts.

    Attributes:
        transformer: its first module.
        settings: content of `config_sentence_transformers.json`.
        result: name of the value that the modules read so far give: of each token, of the input, or its scores.
        modes: pooling modes, concatenated if several; empty if there is no Pooling module.
        include_prompt: whether pooling looks at the prompt's tokens.
        steps: modules after pooling, in order, without a closing Normalize, and the cut to `truncate_dim`.
        scoring: modules after pooling that give scores, in place of `steps`.
        normalizes: whether the last module is Normalize.
        dimension: length of the vector or number of scores, if a module fixes it.
        prompts: name to text.
        logit_score: token ids (true, false) of a `LogitScore` module: the language model's logits are the score.
        over_tokens: modules over the states of all tokens, before pooling.
        token_width: size of a state behind them; `None` = the model's.
        special: modules that need a family to read them, in order, then those of queries alone.
    """

    transformer: TransformerModule
    settings: Mapping[str, Any] = field(default_factory=dict)
    result: str = "token_embeddings"
    modes: tuple[str, ...] = ()
    include_prompt: bool = True
    steps: tuple[Step, ...] = ()
    scoring: tuple[Step, ...] = ()
    normalizes: bool = False
    dimension: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    logit_score: tuple[int, int | None] | None = None
    over_tokens: tuple[nn.Module, ...] = ()
    token_width: int | None = None
    special: tuple[Module, ...] = ()

    @property
    def backbone(self) -> Path:
        """Folder of the Transformers checkpoint."""
        return self.transformer.folder

    @property
    def default_prompt(self) -> str:
        """Text of the default prompt, empty if there is none."""
        return self.prompts[self.default_prompt_name] if self.default_prompt_name else ""

    @property
    def model_type(self) -> str:
        """Type of the model, empty if the checkpoint has no modules."""
        return str(self.settings.get("model_type") or "")

    @property
    def is_cross_encoder(self) -> bool:
        """Whether the files describe a CrossEncoder."""
        return self.model_type == "CrossEncoder"

    @property
    def is_scored_by_modules(self) -> bool:
        """Whether modules behind the pooling make scores of its vector."""
        return self.result == "scores" and bool(self.modes)

    @property
    def has_own_pooler(self) -> bool:
        """Whether the model's own pooler makes the vector."""
        return self.transformer.output == ("pooler_output",)

    @property
    def pools(self) -> bool:
        """Whether the files say how tokens become one vector or score."""
        return bool(self.modes) or self.is_cross_encoder

    @property
    def truncate_dim(self) -> int | None:
        """Length to which vectors are cut after all modules.

        Raises:
            CheckpointError: it is no positive integer.
        """
        if self.model_type != "SentenceTransformer":
            return None
        length: int | None = self.settings.get("truncate_dim")
        if not transformer_module.is_length(length):
            raise CheckpointError(f"{SETTINGS}: truncate_dim is {length!r}; honoured is a positive integer")
        return length

    @property
    def activation(self) -> str | None:
        """Import path of the activation that a CrossEncoder was saved with."""
        return self.settings.get("activation_fn") if self.is_cross_encoder else None

    def similarity(self, kind: Kind) -> Similarity:
        """Return how embeddings are compared in a model of embeddings of this kind.

        A name that is meant for another kind of model says nothing, as in sentence-transformers.

        Raises:
            CheckpointError: there is no such similarity.
        """
        written = self.settings.get("similarity_fn_name")
        name = coalesce(written, "").lower()  # PyLate writes "MaxSim"
        if written is not None and name not in SIMILARITIES:
            raise CheckpointError(
                f"{SETTINGS}: similarity_fn_name is {written!r}; honoured are {', '.join(SIMILARITIES)}"
            )
        if kind in SIMILARITIES.get(name, ()):
            changes: dict[str, Any] = dict.fromkeys(COMPARED[kind], name)
            return Similarity(**changes)
        return Similarity(vectors="dot") if kind == "sparse" and self.special else Similarity()


def read(path: Path, audit: Audit, *, allow_pickle: bool = False) -> SentenceTransformer | None:
    """Read the Sentence-Transformers part of the checkpoint at `path`; `None` if it has none.

    Raises:
        CheckpointError: a module, a key or a value is not honoured, or weights of a module are missing.
    """
    if not (path / MODULES).is_file():
        return None
    with about(path):
        modules = _listed(path, audit)
        settings = _settings(path, modules, audit)
        first = modules[0]
        task, has_towers = TRANSFORMERS[first.kind], first.kind in OF_TOWERS
        transformer = transformer_module.read(first.folder, first.path, audit, task=task, has_towers=has_towers)
        with about(path / SETTINGS):
            prompts, default = _prompts(settings)
        st = SentenceTransformer(
            transformer, settings, transformer.result, prompts=prompts, default_prompt_name=default
        )
        if st.has_own_pooler:
            st = replace(st, modes=("cls",))
        elif transformer.output == transformer_module.FEATURES:
            st = replace(st, modes=("lasttoken",))
        for module in modules[1:]:
            st = _with(st, module, audit, allow_pickle)
        return _closed(st)


def _listed(path: Path, audit: Audit) -> list[Module]:
    """Return the entries of `modules.json`; of a Router, those of its routes.

    Raises:
        CheckpointError: the first one is no Transformer.
    """
    file = path / MODULES
    entries = read_json(file)
    with about(file):
        entries = msgspec.convert(entries, value_types.MODULE_ENTRIES)
        modules = [_entry(path, entry, audit) for entry in entries]
    if [module.kind for module in modules] == ["Router"]:
        modules = _routed(modules[0], audit)
    first = next(iter(modules), Module("nothing", path))
    if first.kind not in TRANSFORMERS:
        raise CheckpointError(_refused_first(first.type))
    return modules


def _entry(path: Path, entry: dict[str, Any], audit: Audit) -> Module:
    """Return one entry of `modules.json`."""
    audit.read(MODULES, entry, keys.MODULE_ENTRY)
    return Module(_type(entry["type"], path), inside(path, entry["path"], MODULES), entry["path"])


def _refused_first(kind: str) -> str:
    """Return a message about a first module that is no Transformer of sentence-transformers."""
    if kind.startswith(PACKAGES) or "." not in kind:
        return f"modules.json begins with {kind}; Cenote honours checkpoints that begin with a Transformer"
    return (
        f"modules.json begins with {kind}, which is code of the checkpoint itself, and Cenote does not run the code of "
        "modules, not with --trust-remote-code either. Where that code only loads the model, name "
        f"{STANDARD} in modules.json instead"
    )


def _type(written: str, path: Path) -> str:
    """Return the type of a module, of a known package if its own code is known."""
    classes = remote_code.classes(load(path / "config.json"))
    return STANDARD if classes & OWN_MODULES.get(written, frozenset()) else written


def _settings(path: Path, modules: list[Module], audit: Audit) -> dict[str, Any]:
    """Return the content of `config_sentence_transformers.json` with the model's type.

    Raises:
        CheckpointError: the type is not known, or a key is not honoured.
    """
    file = SETTINGS
    settings = load(path / file)
    model_type = settings.get("model_type") or _model_type(settings, modules)
    if model_type not in keys.SETTINGS_OF:
        raise CheckpointError(f"{file}: model_type is {model_type!r}; honoured are {', '.join(keys.SETTINGS_OF)}")
    audit.read(file, settings, keys.settings_keys(model_type))
    return {**settings, "model_type": model_type}


def _model_type(settings: Mapping[str, Any], modules: list[Module]) -> str:
    """Return the type of a model that does not say it: PyLate did not before Sentence-Transformers 5."""
    of_packages = ["ColBERT" for module in modules if module.type.startswith("pylate.")]
    of_modules = [TYPE_OF_MODULE.get(module.kind) for module in modules]
    of_similarity = TYPE_OF_SIMILARITY.get(str(settings.get("similarity_fn_name")).lower())
    signs = filter(None, (*of_packages, *of_modules, of_similarity))
    return next(signs, "SentenceTransformer")


TYPE_OF_MODULE = {
    "SpladePooling": "SparseEncoder",
    "LogitScore": "CrossEncoder",
    "MultiVectorMask": "MultiVectorEncoder",
}
"""Module classes that one type of model alone has."""

TYPE_OF_SIMILARITY = dict.fromkeys(TOKEN_SIMILARITIES, "ColBERT")
"""Names of similarities that only PyLate wrote without a type."""


def _prompts(settings: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """Return the prompts, of which null is an empty one, and the name of the default prompt.

    Raises:
        CheckpointError: a prompt is no text, or the default one is none of them.
    """
    prompts = {}
    for name, text in (settings.get("prompts") or {}).items():
        if not isinstance(text, str | None):
            raise CheckpointError(f"prompts: {name!r} is {text!r}; a prompt is a text or null")
        prompts[name] = text or ""
    default = settings.get("default_prompt_name")
    if default in transformer_module.SIDES and settings["model_type"] != "CrossEncoder":
        prompts.setdefault(default, "")  # every embedder has these two
    if default is not None and default not in prompts:
        raise CheckpointError(f"default_prompt_name is {default!r}, but the prompts are {sorted(prompts)}")
    return prompts, default


def _with(st: SentenceTransformer, module: Module, audit: Audit, allow_pickle: bool) -> SentenceTransformer:
    """Return `st` with one more module."""
    entries = keys.MODULES.get(module.kind)
    with about(module.folder / "config.json"):
        if entries is not None:
            audit.read(f"{module.path}/config.json", module.config, replace(entries, types=value_types.MODULE))
        reader = _reader(st, module)
        if reader is None or module.side:
            return replace(st, special=(*st.special, module))
        return reader(st, module, allow_pickle)


Reader = Callable[["SentenceTransformer", Module, bool], "SentenceTransformer"]


def _reader(st: SentenceTransformer, module: Module) -> Reader | None:
    """Return the reader of a module; `None` = a family has to read it, as all over tokens that are compared."""
    names = (st.result, module.config.get("module_input_name"))
    before_pooling = OVER_TOKENS.get((st.model_type, *names, module.kind))
    return before_pooling or READERS.get((st.result, module.kind))


def _closed(st: SentenceTransformer) -> SentenceTransformer:
    """Return `st` after its last module: a closing Normalize is an activation, which requests can leave out.

    Raises:
        CheckpointError: a CrossEncoder's modules give no scores, layers over tokens have no pooling behind them, or
            inputs without a second text are to lose tokens of it.
    """
    if st.over_tokens and not st.modes:
        raise CheckpointError("modules.json has modules over token embeddings, and no Pooling behind them")
    if st.transformer.cuts == "only_second" and not st.is_cross_encoder:
        raise CheckpointError("truncation is 'only_second', which is for pairs, and no CrossEncoder reads this folder")
    if st.is_cross_encoder != (st.result == "scores"):
        raise CheckpointError(
            f"the modules of this {st.model_type} give {st.result}; a CrossEncoder gives scores, and no other model"
        )
    if st.is_cross_encoder:
        return replace(st, steps=(), scoring=st.steps)
    length = st.truncate_dim
    if length is not None:
        return replace(st, steps=(*st.steps, Cut(length)), dimension=min(st.dimension or length, length))
    if st.steps[-1:] == (normalize,):
        return replace(st, steps=st.steps[:-1], normalizes=True)
    return st


def _with_pooling(st: SentenceTransformer, module: Module, allow_pickle: bool) -> SentenceTransformer:
    if st.transformer.task != "feature-extraction":
        raise CheckpointError(f"modules.json has a Pooling behind a Transformer for {st.transformer.task}")
    modes = pooling_modes(module.config)
    width = module.config.get("embedding_dimension", module.config.get("word_embedding_dimension"))
    return replace(
        st,
        modes=modes,
        include_prompt=bool(module.config.get("include_prompt", True)),
        dimension=width * len(modes) if width else None,
        result="sentence_embedding",
    )


def _with_token_dense(st: SentenceTransformer, module: Module, allow_pickle: bool) -> SentenceTransformer:
    step, width = dense(module, allow_pickle, over="token_embeddings")
    return replace(st, over_tokens=(*st.over_tokens, step), token_width=width)


def _with_token_normalize(st: SentenceTransformer, module: Module, allow_pickle: bool) -> SentenceTransformer:
    check_names(module, ("token_embeddings",))
    return replace(st, over_tokens=(*st.over_tokens, Normalized()))


def _with_logit_score(st: SentenceTransformer, module: Module, allow_pickle: bool) -> SentenceTransformer:
    check_names(module, ("causal_logits",))
    tokens = (int(module.config["true_token_id"]), module.config.get("false_token_id"))
    return replace(st, logit_score=tokens, result="scores")


def _with_dense(st: SentenceTransformer, module: Module, allow_pickle: bool) -> SentenceTransformer:
    result = module.config.get("module_output_name") or "sentence_embedding"
    outputs = ("sentence_embedding", "scores") if st.is_cross_encoder else ("sentence_embedding",)
    step, width = dense(module, allow_pickle, outputs=outputs)
    return replace(st, steps=(*st.steps, step), dimension=width, result=result)


def _with_layer_norm(st: SentenceTransformer, module: Module, allow_pickle: bool) -> SentenceTransformer:
    norm = nn.Module()
    norm.norm = nn.LayerNorm(module.config["dimension"], dtype=torch.float32, device="meta")
    loaded(norm, module.folder, allow_pickle, ("dimension",))
    return replace(st, steps=(*st.steps, norm.norm), dimension=module.config["dimension"])


def _with_normalize(st: SentenceTransformer, module: Module, allow_pickle: bool) -> SentenceTransformer:
    check_names(module, ("sentence_embedding",))
    return replace(st, steps=(*st.steps, normalize))


def _with_dropout(st: SentenceTransformer, module: Module, allow_pickle: bool) -> SentenceTransformer:
    return st


TOKENS_OF_TOKENS = ("token_embeddings", "token_embeddings")
"""The value that modules give so far, and the one that a module over the states of all tokens reads."""

OVER_TOKENS: dict[tuple[str | None, ...], Reader] = {
    ("SentenceTransformer", *TOKENS_OF_TOKENS, "Dense"): _with_token_dense,
    ("SentenceTransformer", *TOKENS_OF_TOKENS, "Normalize"): _with_token_normalize,
    ("CrossEncoder", *TOKENS_OF_TOKENS, "Dense"): _with_token_dense,
    ("CrossEncoder", *TOKENS_OF_TOKENS, "Normalize"): _with_token_normalize,
}
"""The type of a model that pools, both values, and the class of a module before its pooling, to the module's reader."""

READERS: dict[tuple[str, str], Reader] = {
    ("token_embeddings", "Pooling"): _with_pooling,
    ("causal_logits", "LogitScore"): _with_logit_score,
    ("sentence_embedding", "Dense"): _with_dense,
    ("sentence_embedding", "LayerNorm"): _with_layer_norm,
    ("sentence_embedding", "Normalize"): _with_normalize,
    ("sentence_embedding", "Dropout"): _with_dropout,
}
"""The value that a module reads and its class, to its reader."""


def _routed(router: Module, audit: Audit) -> list[Module]:
    """Return the modules that documents pass in a Router, then those of queries alone.

    Raises:
        CheckpointError: it has other routes, or another default than documents.
    """
    file = "router_config.json" if (router.folder / "router_config.json").is_file() else "config.json"
    config = load(router.folder / file)
    audit.read(_below(router.path, file), keys.flattened(config, ("parameters",)), keys.ROUTER)
    routes, settings = config["structure"], config.get("parameters") or {}
    if set(routes) != {"query", "document"}:
        raise CheckpointError(f"modules.json names a Router with the routes {sorted(routes)}; {ROUTES}")
    default = settings.get("default_route") or next(iter(routes))
    if settings.get("route_mappings") or default != "document":
        raise CheckpointError(
            "modules.json names a Router whose default route is not `document`, or that maps tasks to other routes"
        )
    modules = []
    for side, route in (("", "document"), ("query", "query")):
        for name in routes[route]:
            kind = str(config["types"][name])
            modules.append(Module(kind, inside(router.folder, name, file), _below(router.path, name), side))
    return modules


def _below(path: str, name: str) -> str:
    """Return the path of `name` in the folder `path` of a checkpoint, whose root is empty."""
    return f"{path}/{name}" if path else name


ROUTES = "honoured is a document encoder whose query route is a SparseStaticEmbedding"


def pooling_modes(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the pooling modes of a Pooling config, in its new (`pooling_mode`) or old (`pooling_mode_*`) spelling.

    Raises:
        CheckpointError: one is unknown.
    """
    named = config.get("pooling_mode")
    if named is None:
        return _flagged_modes(config) or ("mean",)
    modes = as_tuple(named)
    for mode in modes:
        if mode not in MODES:
            raise CheckpointError(f"pooling_mode is {mode!r}; known are: {', '.join(MODES)}")
    return modes or ("mean",)


def _flagged_modes(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the modes whose flags are set."""
    return tuple(mode for flag, mode in LEGACY_MODES.items() if config.get(flag))
