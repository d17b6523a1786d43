"""Entities: every key equals that of Transformers' pipeline on tiny models; each rule by hand-made scores."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForTokenClassification,
    RobertaConfig,
    RobertaForTokenClassification,
    TokenClassificationPipeline,
)

from cenote.errors import BadRequest
from cenote.pipeline.entities import AGGREGATIONS, Entity, entities
from tests.checkpoints import HIDDEN, byte_level, randomize, wordpiece

TEXTS = [
    "Hello, my name is (the) fox-hound; over one/two!",
    "  two   spaces,\tand\na line  ",
    "naïve CAFÉ — 水 and 🐟 of 水水 İstanbul",
    "one two three four five six seven eight nine ten water stone Represent lazy dog",
    "The [SEP] of <unk> <|endoftext|> U.S.A.'s",
    "one na\u0301me two",
    "",
    "水",
]
LABELS = {
    "two types": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"],
    "plain": ["PER", "O", "LOC"],
    "odd prefixes": ["O", "S-PER", "I-PER", "PER", "B-PER", "B-", "X-Y-Z", "I-Y-Z"],
    "without O": ["B-A", "I-A"],
}


def unigram() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer with an unknown token and closing `</s>`, as XLM-RoBERTa."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁the", "▁two", "▁one", "▁name", "he", "ll", "on", "in"]
    pieces = [*words, *(chr(c) for c in range(33, 127))]
    tokenizer = Tokenizer(models.Unigram([(piece, -10 / len(piece)) for piece in pieces], unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def trimmed_byte_level() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose offsets leave out the space before a word, as RoBERTa's."""
    tokenizer = byte_level()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), backend.post_processor])
    return tokenizer


TOKENIZERS = {
    "wordpiece": wordpiece(),
    "lowercased wordpiece": wordpiece(lowercase=True),
    "bytes": byte_level(),
    "trimmed bytes": trimmed_byte_level(),
    "unigram": unigram(),
}
_BERTS = (BertConfig, BertForTokenClassification)
MODELS: dict[str, tuple[str, Any, Any]] = {
    "bert": ("wordpiece", *_BERTS),
    "uncased bert": ("lowercased wordpiece", *_BERTS),
    "roberta": ("trimmed bytes", RobertaConfig, RobertaForTokenClassification),
    "qwen2": ("bytes", Qwen2Config, Qwen2ForTokenClassification),
    "xlm": ("unigram", RobertaConfig, RobertaForTokenClassification),
}


@dataclass
class Case:
    """A model with its tokenizer and the pipeline over them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    def __post_init__(self) -> None:
        self.pipeline = TokenClassificationPipeline(model=self.model, tokenizer=self.tokenizer)
        self.labels = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        self.scored: dict[str, tuple[Encoding, np.ndarray]] = {}

    def theirs(self, text: str, **options: Any) -> list[dict[str, Any]]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Tokenizer does not support real words")
            return self.pipeline(text, **options)

    def ours(self, text: str, **options: Any) -> list[Entity]:
        if text not in self.scored:
            encoded = self.tokenizer(text, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                scores_TC = self.model(**encoded).logits[0].softmax(-1).numpy()
            self.scored[text] = encoded.encodings[0], scores_TC
        return entities(text, *self.scored[text], self.labels, self.tokenizer, **options)


@pytest.fixture(scope="module", params=[(name, kind) for name in MODELS for kind in LABELS], ids=" - ".join)
def case(request: pytest.FixtureRequest) -> Case:
    name, kind = request.param
    tokenizer, config, architecture = MODELS[name]
    model = architecture(
        config(
            vocab_size=len(TOKENIZERS[tokenizer]),
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=48,
            max_position_embeddings=300,
            pad_token_id=0,
            id2label=dict(enumerate(LABELS[kind])),
            label2id={label: i for i, label in enumerate(LABELS[kind])},
        )
    )
    randomize(model, seed=3)
    spread_labels(model.eval(), TOKENIZERS[tokenizer])
    return Case(model, TOKENIZERS[tokenizer])


def spread_labels(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Move and scale the classifier so that over the tokens of `TEXTS` every logit has mean 0 and deviation 2."""
    layer = model.get_submodule("score" if hasattr(model, "score") else "classifier")
    with torch.no_grad():
        logits_TC = torch.cat(
            [model(**tokenizer(text, truncation=True, return_tensors="pt")).logits[0] for text in TEXTS]
        )
        scale_C = 2 / logits_TC.std(0)
        layer.weight *= scale_C[:, None]
        layer.bias.copy_((layer.bias - logits_TC.mean(0)) * scale_C)


def as_pipeline(entity: Entity, aggregation: str) -> dict[str, Any]:
    """`entity` with the keys of Transformers."""
    span = {"score": entity.score, "word": entity.word, "start": entity.start, "end": entity.end}
    if aggregation == "none":
        return {"entity": entity.label, "index": entity.index, **span}
    assert entity.index is None
    return {"entity_group": entity.label, **span}


COMPARED = [
    pytest.param((name, kind), aggregation, id=f"{name} - {kind}-{aggregation}")
    for name in MODELS
    for kind in LABELS
    for aggregation in AGGREGATIONS
]


@pytest.mark.parametrize(("case", "aggregation"), COMPARED, indirect=["case"])
def test_equals_the_pipeline(case: Case, aggregation: str) -> None:
    for text in TEXTS:
        found = [as_pipeline(entity, aggregation) for entity in case.ours(text, aggregation=aggregation)]
        expected = case.theirs(text, aggregation_strategy=aggregation)
        assert [{**e, "score": None} for e in found] == [{**e, "score": None} for e in expected], text
        assert [e["score"] for e in found] == pytest.approx([e["score"] for e in expected], abs=1e-5)


@pytest.mark.parametrize("ignored", [[], ["B-PER", "PER"], ["O", "LOC", "A"]])
@pytest.mark.parametrize("aggregation", ["none", "average"])
def test_ignored_labels_equal_the_pipeline(case: Case, aggregation: str, ignored: list[str]) -> None:
    found = case.ours(TEXTS[3], aggregation=aggregation, ignore_labels=ignored)
    expected = case.theirs(TEXTS[3], aggregation_strategy=aggregation, ignore_labels=ignored)
    key = "entity" if aggregation == "none" else "entity_group"
    assert [(e.label, e.word) for e in found] == [(e[key], e["word"]) for e in expected]


def test_labels_vary_over_tokens(case: Case) -> None:
    """Or the comparisons above would say little."""
    labels = [entity.label for text in TEXTS for entity in case.ours(text, ignore_labels=())]
    assert len(set(labels)) == len(set(case.labels))
    assert sum(a != b for a, b in pairwise(labels)) > len(labels) / 8


def encode(text: str, name: str = "wordpiece") -> tuple[Encoding, PreTrainedTokenizerFast]:
    return TOKENIZERS[name](text).encodings[0], TOKENIZERS[name]


def by_hand(text: str, *tags: str, name: str = "wordpiece", **options: Any) -> list[tuple[str, str]]:
    """Label and stretch of text of each entity, where the tokens of `text`, special ones included, have these tags."""
    encoding, tokenizer = encode(text, name)
    labels = sorted({*tags, "O"})
    assert len(tags) == len(encoding), encoding.tokens
    scores_TC = np.full((len(tags), len(labels)), 0.1, np.float32)
    for row, tag in zip(scores_TC, tags, strict=True):
        row[labels.index(tag)] = 0.9
    found = entities(text, encoding, scores_TC, labels, tokenizer, **options)
    return [(e.label, text[e.start : e.end]) for e in found]


def test_without_aggregation_every_token_stands_alone() -> None:
    encoding, tokenizer = encode("Hello dogs 水")
    assert encoding.tokens == ["[CLS]", "Hello", "dog", "##s", "[UNK]", "[SEP]"]
    scores_TC = np.array([[0, 1], [0.9, 0.1], [0.25, 0.75], [0, 1], [0.5, 0.5], [0, 1]], np.float32)
    assert entities("Hello dogs 水", encoding, scores_TC, ["O", "B-X"], tokenizer) == [
        Entity("B-X", 0.75, "dog", 6, 9, 2),
        Entity("B-X", 1.0, "##s", 9, 10, 3),
    ]
    unknown = entities("Hello dogs 水", encoding, scores_TC, ["O", "B-X"], tokenizer, ignore_labels=["B-X"])[-1]
    assert unknown == Entity("O", 0.5, "水", 11, 12, 4)


def test_neighbours_of_one_type_join() -> None:
    tags = ["B-PER", "B-PER", "I-PER", "I-PER", "I-PER", "I-LOC", "B-LOC", "O", "I-LOC", "I-LOC"]
    assert by_hand("one two three four five six seven eight", *tags, aggregation="simple") == [
        ("PER", "one two three four"),
        ("LOC", "five"),
        ("LOC", "six"),
        ("LOC", "eight"),
    ]


def test_labels_without_prefix_join() -> None:
    assert by_hand("one two three", "O", "LOC", "LOC", "B-LOC", "O", aggregation="simple") == [
        ("LOC", "one two"),
        ("LOC", "three"),
    ]


def test_other_prefixes_vanish_from_the_type_but_keep_it_apart() -> None:
    assert by_hand("one two three", "O", "S-PER", "E-PER", "E-PER", "O", aggregation="simple") == [
        ("PER", "one"),
        ("PER", "two three"),
    ]


def test_special_tokens_neither_appear_nor_join() -> None:
    assert by_hand("one", "B-X", "I-X", "I-X", aggregation="simple") == [("X", "one")]
    assert by_hand("", "B-X", "I-X", aggregation="simple") == []


def test_ignored_is_the_type_of_groups_and_the_label_of_tokens() -> None:
    tags = ("O", "B-X", "I-X", "O", "O")
    assert by_hand("one two three", *tags, ignore_labels=["I-X", "X"]) == [("B-X", "one"), ("O", "three")]
    assert by_hand("one two three", *tags, ignore_labels=["I-X"], aggregation="simple") == [
        ("X", "one two"),
        ("O", "three"),
    ]
    assert by_hand("one two three", *tags, ignore_labels=["X"], aggregation="first") == [("O", "three")]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("simple", [("A", 0.6, "name"), ("B", 0.5, "##s"), ("C", 0.7, "##o")]),
        ("first", [("A", 0.6, "nameso")]),
        ("average", [("B", 0.4, "nameso")]),
        ("max", [("C", 0.7, "nameso")]),
    ],
)
def test_a_word_whose_tokens_disagree(aggregation: str, expected: list[tuple[str, float, str]]) -> None:
    encoding, tokenizer = encode("nameso")
    assert encoding.tokens[1:-1] == ["name", "##s", "##o"]
    scores_TC = np.array([[0, 0, 1], [0.6, 0.4, 0], [0.1, 0.5, 0.4], [0, 0.3, 0.7], [0, 0, 1]], np.float32)
    found = entities("nameso", encoding, scores_TC, ["B-A", "I-B", "C"], tokenizer, aggregation=aggregation)
    assert [(e.label, e.word) for e in found] == [(label, word) for label, _, word in expected]
    assert [e.score for e in found] == pytest.approx([score for _, score, _ in expected])


def test_equal_scores_go_to_the_first_label_and_the_first_token() -> None:
    encoding, tokenizer = encode("names")
    scores_TC = np.array([[0, 0], [0.5, 0.5], [0.3, 0.5], [0, 0]], np.float32)
    for aggregation in ("first", "max"):
        (found,) = entities("names", encoding, scores_TC, ["A", "B"], tokenizer, aggregation=aggregation)
        assert (found.label, found.score) == ("A", 0.5)


def test_a_group_scores_the_mean_of_its_words_not_of_its_tokens() -> None:
    encoding, tokenizer = encode("names one")
    scores_TC = np.array([[0], [0.9], [0.5], [0.1], [0]], np.float32)
    (found,) = entities("names one", encoding, scores_TC, ["X"], tokenizer, aggregation="average")
    assert found == Entity("X", pytest.approx(0.4), "names one", 0, 9)


def test_an_unknown_token_begins_a_word() -> None:
    assert by_hand("a水s", "O", "B-X", "B-Y", "B-Z", "O", aggregation="first") == [("X", "a"), ("Y", "水"), ("Z", "s")]


def test_a_token_shorter_than_its_text_counts_as_a_continuation() -> None:
    """An accent of its own character, which the normalizer drops."""
    assert by_hand("one name", "O", "B-X", "B-Y", "O", aggregation="first") == [("X", "one"), ("Y", "name")]
    options = {"name": "lowercased wordpiece", "aggregation": "first"}
    assert by_hand("one na\u0301me", "O", "B-X", "B-Y", "O", **options) == [("X", "one na\u0301me")]


def test_where_tokens_are_not_marked_words_end_at_spaces_only() -> None:
    encoding, _ = encode("the in-on on", "bytes")
    assert encoding.tokens == ["the", "Ġ", "in", "-", "on", "Ġ", "on", "<|endoftext|>"]
    tags = ("B-X", "B-Y", "B-Z", "B-Z", "B-Z", "B-U", "B-V", "O")
    assert by_hand("the in-on on", *tags, name="bytes", aggregation="first") == [
        ("X", "the"),
        ("Y", " "),
        ("Z", "in-on"),
        ("U", " "),
        ("V", "on"),
    ]


def test_unknown_aggregation_is_refused() -> None:
    with pytest.raises(BadRequest, match="'median'; known are: none, simple, first, average, max") as refused:
        by_hand("one", "O", "O", "O", aggregation="median")
    assert refused.value.param == "aggregation_strategy"


def test_scores_of_another_text_are_refused() -> None:
    encoding, tokenizer = encode("one two")
    with pytest.raises(ValueError, match="3 rows of scores for 4 tokens"):
        entities("one two", encoding, np.ones((3, 1), np.float32), ["X"], tokenizer)
