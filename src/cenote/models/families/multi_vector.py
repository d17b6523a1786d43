"""Late-interaction text models (ColBERT): what a query and a document become before and after the backbone.

Four kinds of files say it: Sentence-Transformers' `MultiVectorEncoder`, PyLate, Stanford's `artifact.metadata`, and
plain checkpoints with a projection beside the backbone. All become one `MultiVector`. The rules are those of
sentence-transformers 6 (`multi_vector_encoder/model.py`) and of ColBERT (arXiv:2004.12832).
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cenote.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

ARCHITECTURES = ("HF_ColBERT", "ColBERTModernBertModel", "ColBERTJinaRobertaModel", "ColBERTLfm2Model")
"""Architecture names that mean a backbone and a projection of its token vectors."""

PROJECTIONS = ("linear.weight", "colbert_linear.weight")
"""Names that such a projection has beside the backbone."""

EXPANDED_LENGTH = 32
"""ColBERT's own length of a query."""

MARKERS = {"query": "[unused0]", "document": "[unused1]"}
"""Stanford's markers, where `artifact.metadata` names none."""


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
class MultiVector:
    """How queries and documents are encoded.

    Attributes:
        prefixes: text before a "query" or "document"; a marker of the vocabulary stays one token.
        lengths: tokens to which each is cut.
        expansion: of queries; `None` = they are not expanded.
        skipped: vocabulary entries whose vectors are left out.
        skipped_of: sides from which they are left out.
        pooled_of: sides whose token vectors are joined into fewer.
        markers: prefixes that a tokenizer must not take apart.
        projection: name of the tensor that projects token vectors, where no module folder has it.
        normalizes: whether token vectors have length 1.
    """

    prefixes: Mapping[str, str] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)
    expansion: Expansion | None = None
    skipped: tuple[str, ...] = ()
    skipped_of: tuple[str, ...] = ("document",)
    pooled_of: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    projection: str | None = None
    normalizes: bool = True

    def skipped_ids(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """Token ids of `skipped`; entries that the vocabulary does not have are none."""
        vocabulary = tokenizer.get_vocab()
        return frozenset(vocabulary[word] for word in self.skipped if word in vocabulary)

    def expansion_id(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """The token id that queries are filled up with.

        Raises:
            CheckpointError: the vocabulary has no such entry.
        """
        if self.expansion is None:
            return None
        token = self.expansion.token or tokenizer.mask_token or tokenizer.eos_token
        found = tokenizer.get_vocab().get(token) if token else None
        if found is None:
            raise CheckpointError(f"queries are to be expanded with {token!r}, which the vocabulary does not have")
        return int(found)


def from_stanford(folder: Path, tensors: tuple[str, ...]) -> MultiVector:
    """Of a checkpoint in ColBERT's own layout: `artifact.metadata` beside a backbone with `linear.weight`.

    Raises:
        CheckpointError: there is no projection, or the metadata is damaged.
    """
    file = folder / "artifact.metadata"
    metadata = _json(file) if file.is_file() else {}
    own = {
        "query": metadata.get("query_token_id") or MARKERS["query"],
        "document": metadata.get("doc_token_id") or MARKERS["document"],
    }
    prefixes = {side: f"{marker} " for side, marker in own.items()}
    length = metadata.get("doc_maxlen")
    attend = bool(metadata.get("attend_to_mask_tokens"))
    return MultiVector(
        prefixes=prefixes,
        lengths={} if length is None else {"document": int(length)},
        expansion=Expansion(int(metadata.get("query_maxlen") or EXPANDED_LENGTH), attend=attend),
        skipped=tuple(string.punctuation) if metadata.get("mask_punctuation", True) else (),
        markers=tuple(prefixes.values()),
        projection=projection(tensors),
    )


def plain(tensors: tuple[str, ...]) -> MultiVector:
    """The symmetric mode: a projection and normalisation, and nothing else, on both sides (as vLLM serves ColBERT)."""
    return MultiVector(projection=projection(tensors))


def projection(tensors: tuple[str, ...]) -> str:
    """Name of the tensor that projects token vectors.

    Raises:
        CheckpointError: there is none.
    """
    found = next((name for name in PROJECTIONS if name in tensors), None)
    if found is None:
        raise CheckpointError(f"a ColBERT checkpoint needs one of the tensors {', '.join(PROJECTIONS)}; it has none")
    return found


def from_settings(
    settings: Mapping[str, Any], transformer: Mapping[str, Any], mask: Mapping[str, Any] | None, *, normalizes: bool
) -> MultiVector:
    """Of a Sentence-Transformers or PyLate folder.

    Args:
        settings: `config_sentence_transformers.json`.
        transformer: `sentence_bert_config.json`.
        mask: config of the module `MultiVectorMask`; PyLate has none.
        normalizes: whether the last module is a Normalize of token vectors.
    """
    is_pylate = settings.get("model_type") == "ColBERT"
    prefixes = {name: str(text) for name, text in (settings.get("prompts") or {}).items() if text}
    markers: list[str] = []
    for side in ("query", "document"):
        marker = settings.get(f"{side}_prefix")
        if marker:
            markers.append(marker)
            prefixes[side] = marker + prefixes.get(side, "").removeprefix(marker)
    lengths = {}
    for side in ("query", "document"):
        length = settings.get(f"{side}_length") or transformer.get(f"{side}_length")
        if length:
            lengths[side] = int(length)
    expansion = _expansion(settings, transformer, lengths)
    if mask is None:
        skipped = settings.get("skiplist_words")
        skipped = tuple(string.punctuation) if skipped is None and is_pylate else tuple(skipped or ())
        of: Any = ("document",)
    else:
        skipped, of = tuple(mask.get("skiplist_words") or ()), mask.get("skiplist_tasks") or ("document",)
    return MultiVector(
        prefixes={side: prefixes[side] for side in ("query", "document") if side in prefixes},
        lengths=lengths,
        expansion=expansion,
        skipped=skipped,
        skipped_of=(of,) if isinstance(of, str) else tuple(of),
        markers=tuple(markers),
        normalizes=normalizes or is_pylate,
    )


PYLATE_KEYS = (
    "do_query_expansion",
    "attend_to_expansion_tokens",
    "attend_to_mask_tokens",
    "query_prefix",
    "document_prefix",
    "skiplist_words",
    "query_length",
    "document_length",
)
"""Settings by which a folder shows that PyLate wrote it: its queries are expanded unless it says no."""


def _expansion(
    settings: Mapping[str, Any], transformer: Mapping[str, Any], lengths: dict[str, int]
) -> Expansion | None:
    for source in (settings, transformer):
        if "query_expansion" in source:
            given = source["query_expansion"]
            if given is None:
                return None
            unknown = set(given) - {"strategy", "attend", "length", "token"}
            if unknown or given.get("strategy") not in ("fixed", "min") or not given.get("length"):
                raise CheckpointError(f"query_expansion is not understood: {given!r}")
            fixed = given["strategy"] == "fixed"
            if fixed:
                lengths.pop("query", None)
            return Expansion(int(given["length"]), fixed, bool(given.get("attend")), given.get("token"))
    if not any(key in settings for key in PYLATE_KEYS) or settings.get("do_query_expansion") is False:
        return None
    attend = settings.get("attend_to_expansion_tokens", settings.get("attend_to_mask_tokens"))
    return Expansion(lengths.pop("query", EXPANDED_LENGTH), attend=bool(attend))


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read {path.name}: {error}") from None
    return content
