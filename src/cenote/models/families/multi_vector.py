"""Late-interaction text models (ColBERT): queries and documents before and after the backbone.

Four kinds of files say it: Sentence-Transformers' `MultiVectorEncoder`, PyLate, Stanford's `artifact.metadata`, and
plain checkpoints with a projection beside the backbone. All become one `MultiVector`. The rules are those of
sentence-transformers 6 (`multi_vector_encoder/model.py`) and of ColBERT (arXiv:2004.12832).
"""

from __future__ import annotations

import importlib.util
import string
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from cenote.conventions import Sides
from cenote.errors import CheckpointError
from cenote.functions import coalesce
from cenote.models.classifiers import linear
from cenote.models.families.family import Family
from cenote.models.modules import check_names, dense
from cenote.models.poolers import Pooler, TokenEmbed
from cenote.models.reading import about, load
from cenote.models.transformer_module import as_tuple
from cenote.tensors.heads import normalize
from cenote.tensors.pooling import Clustering

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from cenote.config import ModelConfig
    from cenote.models.facts import Files
    from cenote.models.families.family import Loaded
    from cenote.models.modules import Module
    from cenote.models.poolers import TaskOutput
    from cenote.models.sentence_transformers import SentenceTransformer
    from cenote.tensors.heads import Step

T = TypeVar("T")
M = TypeVar("M", bound="MultiVector")

PYLATE = "ColBERT"
"""Type of PyLate's models."""

STANFORD = "HF_ColBERT"
"""Architecture name of checkpoints in ColBERT's own layout."""

ARCHITECTURES = (STANFORD, "ColBERTModernBertModel", "ColBERTJinaRobertaModel", "ColBERTLfm2Model")
"""Architecture names that mean a backbone and a projection of its token vectors."""

OWN_PROJECTION = "custom_text_proj.weight"
"""Tensor by which the architectures of colpali-engine (ColQwen3, ...) are recognised whatever they are called."""

PROJECTIONS = ("linear.weight", "colbert_linear.weight", "custom_text_proj.weight")
"""Names that such a projection has beside the backbone."""

EXPANDED_LENGTH = 32
"""ColBERT's own length of a query."""

SIDES = ("query", "document")

MARKERS = {"query": ("query_token_id", "[unused0]"), "document": ("doc_token_id", "[unused1]")}
"""The key of `artifact.metadata` that names each side's marker, and Stanford's marker where it names none."""


@dataclass(frozen=True)
class Expansion:
    """A query is filled up with mask tokens, which MaxSim counts.

    Attributes:
        length: tokens that a query has at least.
        fixed: queries are also cut to `length`.
        attend: other tokens attend to the added ones.
        token: the vocabulary entry; `None` = the mask token, or the end of sequence where there is none.
    """

    length: int
    fixed: bool = True
    attend: bool = False
    token: str | None = None


@dataclass(frozen=True)
class MultiVector(Family):
    """How queries and documents are encoded.

    Attributes:
        prefixes: text before a "query" or "document"; a marker of the vocabulary stays one token.
        lengths: tokens to which each is cut.
        expansion: of queries; `None` = they are not expanded.
        skipped: vocabulary entries whose vectors are left out.
        skipped_of: sides from which they are left out.
        kept: ids of the only tokens of documents whose vectors are kept; empty = all.
        clustering: joins token vectors into fewer; `None` = they stay.
        pooled_of: sides whose token vectors are joined.
        markers: prefixes that a tokenizer must not take apart.
        steps: modules over token vectors.
        projection: name of the tensor that projects token vectors, where no module does.
        normalizes: whether token vectors have length 1.
        inserts: markers of sides that stand behind the first token, whatever it is, rather than before the text.
        assumed: markers that the files do not name, but that PyLate puts there.
    """

    title: ClassVar[str] = "late interaction (ColBERT)"
    modules: ClassVar[tuple[str, ...]] = ("MultiVectorMask", "Dense", "Normalize", "HierarchicalTokenPooling")
    honours = "MultiVectorMask with HierarchicalTokenPooling as the last module"
    hub_files: ClassVar[tuple[str, ...]] = ("artifact.metadata",)
    compares = "tokens"

    prefixes: Mapping[str, str] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)
    expansion: Expansion | None = None
    skipped: tuple[str, ...] = ()
    skipped_of: tuple[str, ...] = ("document",)
    kept: frozenset[int] = frozenset()
    clustering: Clustering | None = None
    pooled_of: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    projection: str | None = None
    tensors: tuple[str, ...] = ()
    keeps_lengths: bool = True
    normalizes: bool = True
    inserts: Mapping[str, str] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()

    @classmethod
    def recognise(cls, files: Files, options: ModelConfig) -> MultiVector | None:
        """Recognise a Sentence-Transformers or PyLate folder, else an architecture's name.

        With `plain_late_interaction` both sides get a projection and normalisation alone, as vLLM serves ColBERT.
        """
        if is_one(files.st):
            with about(files.path):
                plain = _plain(files.st, options.reads_pickles)
                if options.plain_late_interaction:
                    return replace(plain, keeps_lengths=False)
                return of_modules(files.st, plain)
        if files.architecture not in ARCHITECTURES and OWN_PROJECTION not in files.tensors:
            return None
        weight = _projection(files.tensors)
        bias = weight.removesuffix("weight") + "bias"
        plain = cls(projection=weight, tensors=(weight, bias))
        if options.plain_late_interaction or files.architecture != STANFORD:
            return plain
        return _of_stanford(files, plain)

    @classmethod
    def reads(cls, module: Module, st: SentenceTransformer) -> bool:
        """Return whether `module` is one over token vectors; one that joins them has to be the last."""
        if not is_one(st) or not super().reads(module, st):
            return False
        return module.kind != "HierarchicalTokenPooling" or module is st.special[-1]

    @property
    def filled_to(self) -> int:
        """Tokens to which queries are filled up with tokens that none attends to."""
        if self.expansion is None or self.expansion.attend:
            return 0
        return self.expansion.length

    def sides(self, tokenizer: PreTrainedTokenizerBase) -> Sides:
        """Return how queries and documents are encoded, in token ids; entries that are not there are not skipped.

        Raises:
            CheckpointError: the vocabulary has no entry to expand queries with, or lacks a marker.
        """
        vocabulary, fill = tokenizer.get_vocab(), self.expansion
        missing = sorted(set(self.assumed).difference(vocabulary))
        if missing:
            raise CheckpointError(
                "config_sentence_transformers.json has no query_prefix or document_prefix, for which PyLate takes "
                f"{missing[0]!r}, and the vocabulary does not have it; write the prefix there, '' for none"
            )
        sides = Sides(
            lengths=self.lengths,
            skipped=frozenset(vocabulary[word] for word in self.skipped if word in vocabulary),
            skipped_of=self.skipped_of,
            pooled_of=self.pooled_of,
            inserted=self._inserted(tokenizer),
            kept=self.kept,
        )
        if fill is None:
            return sides
        token = fill.token or tokenizer.mask_token or tokenizer.eos_token
        if token not in vocabulary:
            raise CheckpointError(f"queries are to be expanded with {token!r}, which the vocabulary does not have")
        return replace(sides, fill_to=fill.length, fill_id=int(vocabulary[token]), fixed=fill.fixed, attend=fill.attend)

    def _inserted(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
        """Return the ids of markers that are behind the first token, where no special token begins a text."""
        (first, *_) = tokenizer("a")["input_ids"]
        if first in tokenizer.all_special_ids:
            return {}
        ids = tokenizer.get_vocab()
        return {side: ids[marker] for side, marker in self.inserts.items() if marker in ids}

    def outputs(self, loaded: Loaded) -> dict[str, TaskOutput]:
        """Return token vectors, projected."""
        config = loaded.options.pooler_config
        normalizes = coalesce(config.use_activation, self.normalizes)
        steps = self.steps if self.projection is None else (_linear(loaded, self.projection),)
        loaded.place(steps)
        pooler = Pooler(loaded.pooler.modes, steps, normalizes, config.dimensions)
        return {"token_embed": TokenEmbed(pooler, clustering=self.clustering)}

    def score_types(self, tasks: Collection[str]) -> tuple[str, ...]:
        """Return late interaction first."""
        return ("late-interaction", "bi-encoder")


def _linear(loaded: Loaded, weight: str) -> nn.Linear:
    """Return the layer whose weight is the tensor of that name; its bias, if it has one, is beside it."""
    bias = weight.removesuffix("weight") + "bias"
    tensors = loaded.tensors({weight, bias}.intersection(loaded.files.tensors))
    return linear(tensors[weight], tensors.get(bias))


def _projection(tensors: tuple[str, ...]) -> str:
    """Return the name of the tensor that projects token vectors.

    Raises:
        CheckpointError: there is none.
    """
    name = next(filter(tensors.__contains__, PROJECTIONS), None)
    if name is None:
        raise CheckpointError(f"a ColBERT checkpoint needs one of the tensors {', '.join(PROJECTIONS)}; it has none")
    return name


def _of_stanford(files: Files, plain: MultiVector) -> MultiVector:
    """Return `plain` with the settings of ColBERT's own layout: `artifact.metadata` beside the backbone.

    Raises:
        CheckpointError: the metadata is damaged.
    """
    metadata = load(files.folder / "artifact.metadata")
    prefixes = {side: f"{metadata.get(key) or usual} " for side, (key, usual) in MARKERS.items()}
    length = metadata.get("doc_maxlen")
    attend = bool(metadata.get("attend_to_mask_tokens"))
    return replace(
        plain,
        prefixes=prefixes,
        lengths={} if length is None else {"document": int(length)},
        expansion=Expansion(int(metadata.get("query_maxlen") or EXPANDED_LENGTH), attend=attend),
        skipped=tuple(string.punctuation) if metadata.get("mask_punctuation", True) else (),
        markers=tuple(prefixes.values()),
    )


def is_one(st: SentenceTransformer) -> bool:
    """Return whether Sentence-Transformers files describe a model that compares tokens."""
    return st.model_type in ("MultiVectorEncoder", PYLATE)


def _plain(st: SentenceTransformer, allow_pickle: bool) -> MultiVector:
    """Return the modules over token vectors of a Sentence-Transformers or PyLate folder.

    A closing Normalize is an activation, which requests can leave out; PyLate always normalises at the end.
    """
    steps = _steps(st, allow_pickle)
    is_closed = steps[-1:] == (normalize,)
    return MultiVector(steps=steps[:-1] if is_closed else steps, normalizes=is_closed or _is_pylate(st.settings))


def _steps(st: SentenceTransformer, allow_pickle: bool) -> tuple[Step, ...]:
    """Return the modules over token vectors, in the order of `modules.json`."""
    steps: list[Step] = []
    for module in st.special:
        if module.kind == "Dense":
            layer, _ = dense(module, allow_pickle, over="token_embeddings")
            steps.append(layer)
        elif _normalizes_tokens(module):
            check_names(module, ["token_embeddings"])
            steps.append(normalize)
    return tuple(steps)


def _normalizes_tokens(module: Module) -> bool:
    """Return whether `module` normalises token vectors; one over sentence vectors finds none and does nothing."""
    return module.kind == "Normalize" and module.config.get("module_input_name") == "token_embeddings"


def _is_pylate(settings: Mapping[str, Any]) -> bool:
    return settings.get("model_type") == PYLATE


def of_modules(st: SentenceTransformer, plain: M) -> M:
    """Return `plain` with the settings of a Sentence-Transformers or PyLate folder.

    Raises:
        CheckpointError: one of them is not understood.
    """
    modules = {module.kind: module for module in st.special}
    defaults = _defaults(st)
    st = replace(st, settings={**st.settings, **defaults})
    prefixes, markers = _prefixes(st.settings)
    lengths = _lengths(st)
    expansion = _expansion(st)
    if expansion is not None:
        lengths = _beside(expansion, lengths)
    mask = modules.get("MultiVectorMask")
    skipped, skipped_of = _skipped(st.settings, mask)
    clustering, pooled_of = _clustering(modules.get("HierarchicalTokenPooling"))
    return replace(
        plain,
        prefixes=prefixes,
        lengths=lengths,
        expansion=expansion,
        skipped=skipped,
        skipped_of=skipped_of,
        kept=_kept(mask),
        clustering=clustering,
        pooled_of=pooled_of,
        markers=tuple(markers.values()),
        inserts={PYLATE: markers}.get(st.model_type, {}),
        assumed=tuple(value for name, value in defaults.items() if name.endswith("_prefix")),
    )


def _defaults(st: SentenceTransformer) -> dict[str, Any]:
    """Return PyLate's defaults for the settings that a folder of PyLate leaves out, or has as null."""
    if not _is_pylate(st.settings) or "query_expansion" in {**st.settings, **st.transformer.written}:
        return {}
    return {name: value for name, value in PYLATE_DEFAULTS.items() if st.settings.get(name) is None}


def _prefixes(settings: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the text before each side, which begins with its marker, and the markers of sides."""
    prompts = settings.get("prompts") or {}
    markers = {side: settings.get(f"{side}_prefix") or "" for side in SIDES}
    texts = {side: markers[side] + str(prompts.get(side) or "").removeprefix(markers[side]) for side in SIDES}
    return _filled(texts), _filled(markers)


def _filled(values: Mapping[str, T]) -> dict[str, T]:
    """Return the values of sides that are not empty or zero."""
    return {side: value for side, value in values.items() if value}


def _lengths(st: SentenceTransformer) -> dict[str, int]:
    """Return the tokens to which each side is cut: the Transformer's config comes before PyLate's settings."""
    if st.transformer.is_one_length:
        return {}
    lengths = {side: int(st.settings.get(f"{side}_length") or 0) for side in SIDES}
    return _filled({**lengths, **st.transformer.lengths})


def _beside(expansion: Expansion, lengths: Mapping[str, int]) -> dict[str, int]:
    """Return the lengths of sides whose queries are filled up, no shorter than they are filled up to."""
    kept = dict(lengths)
    query = kept.pop("query", None)
    if query is not None and not expansion.fixed:
        kept["query"] = max(query, expansion.length)
    return kept


def _skipped(settings: Mapping[str, Any], mask: Module | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the words whose vectors are left out, and the sides from which they are; PyLate has no `mask`.

    Raises:
        CheckpointError: the mask keeps only some tokens.
    """
    if mask is None:
        return tuple(settings.get("skiplist_words") or ()), ("document",)
    return tuple(mask.config.get("skiplist_words") or ()), _listed(mask.config.get("skiplist_tasks"))


def _kept(mask: Module | None) -> frozenset[int]:
    """Return the ids of the only tokens of documents whose vectors are kept; empty = all are."""
    return frozenset(() if mask is None else mask.config.get("keep_only_token_ids") or ())


def _listed(sides: Any) -> tuple[str, ...]:
    """Return the sides that a config names, one as a text or several as a list; none = documents."""
    return as_tuple(sides or "document")


PYLATE_DEFAULTS: dict[str, Any] = {
    "query_prefix": "[Q] ",
    "document_prefix": "[D] ",
    "query_length": EXPANDED_LENGTH,
    "document_length": 180,
    "skiplist_words": list(string.punctuation),
}
"""Settings of PyLate's `models.ColBERT` where a folder says nothing."""

PYLATE_KEYS = frozenset(
    {
        "do_query_expansion",
        "attend_to_expansion_tokens",
        "attend_to_mask_tokens",
        "query_prefix",
        "document_prefix",
        "skiplist_words",
        "query_length",
        "document_length",
    }
)
"""Settings by which a folder shows that PyLate wrote it: its queries are expanded unless it says no."""


def _expansion(st: SentenceTransformer) -> Expansion | None:
    """Return how queries are filled up.

    Raises:
        CheckpointError: they are, but a chat template renders them, whose end would be filled up.
    """
    expansion = _any_expansion(st)
    if expansion is not None and st.transformer.messages is not None:
        raise CheckpointError(
            "queries are to be expanded with mask tokens and rendered by a chat template, which sentence-transformers "
            "refuses as well; set query_expansion to null, or leave message out of modality_config"
        )
    return expansion


def _any_expansion(st: SentenceTransformer) -> Expansion | None:
    """Return how queries are filled up, in the words of Sentence-Transformers or else of PyLate."""
    settings = st.settings
    written = {**settings, **st.transformer.written}
    if "query_expansion" in written:
        return _written_expansion(written["query_expansion"])
    if settings.get("do_query_expansion") is False or PYLATE_KEYS.isdisjoint(settings):
        return None
    attend = settings.get("attend_to_expansion_tokens", settings.get("attend_to_mask_tokens"))
    return Expansion(int(settings.get("query_length") or EXPANDED_LENGTH), attend=bool(attend))


def _written_expansion(written: Mapping[str, Any] | None) -> Expansion | None:
    """Return the expansion that a setting `query_expansion` describes.

    Raises:
        CheckpointError: a setting in it is not understood.
    """
    if written is None:
        return None
    unknown = set(written) - {"strategy", "attend", "length", "token"}
    if unknown or written.get("strategy") not in ("fixed", "min") or not written.get("length"):
        raise CheckpointError(f"query_expansion is not understood: {written!r}")
    return Expansion(
        int(written["length"]), written["strategy"] == "fixed", bool(written.get("attend")), written.get("token")
    )


def _clustering(module: Module | None) -> tuple[Clustering | None, tuple[str, ...]]:
    """Return how a HierarchicalTokenPooling joins token vectors, and the sides whose vectors it joins.

    Raises:
        CheckpointError: a value is out of range, or scipy, which clusters, is not installed.
    """
    if module is None:
        return None, ()
    config = module.config
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
    normalizes = bool(config.get("normalize_embeddings", False))  # older folders do not say it
    return Clustering(factor, protected, normalizes), _listed(config.get("tasks"))
