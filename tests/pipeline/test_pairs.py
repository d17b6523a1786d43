"""Pairs equal what Hugging Face's tokenizers make of two texts: joined, cut, typed. Prompts lose documents only."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer

from cenote.conventions import PairTemplate
from cenote.core import ModelInfo, PoolingParams
from cenote.errors import BadRequest, TaskNotOffered, TooLong
from cenote.pipeline.options import TextOptions
from cenote.pipeline.pairs import PairOptions, PairRenderer
from cenote.pipeline.rendering import COUNTED, Renderer
from cenote.pipeline.tokenizing import FastTokenizer, shares
from tests.checkpoints import TEXTS, byte_level, sentinels, wordpiece

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

    from cenote.core import Sequence

LIMIT = 64
PAIRS = [*itertools.product(TEXTS[:8:2], TEXTS[::3]), ("one " * 12, "two " * 12), ("two " * 13, "one " * 12)]
TYPED = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}


class _Typed(ByT5Tokenizer):
    """A Python tokenizer whose second text has another type."""

    model_input_names = TYPED["model_input_names"]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [0] * (len(token_ids_0) + 1) + [1] * (0 if token_ids_1 is None else len(token_ids_1) + 1)


TOKENIZERS: dict[str, Callable[..., PreTrainedTokenizerBase]] = {
    "wordpiece": wordpiece,
    "sentinels": sentinels,
    "byte level": byte_level,
    "byte level, typed": lambda **options: byte_level(**TYPED, **options),
    "python": ByT5Tokenizer,
    "python, typed": _Typed,
}


def renderer(tokenizer: PreTrainedTokenizerBase, *, limit: int = LIMIT, **options: Any) -> Renderer:
    info = ModelInfo(
        name="tiny",
        architecture="BertForSequenceClassification",
        tasks=("classify", "embed"),
        default_task="classify",
        dimension=8,
        max_model_len=limit,
        vocab_size=len(tokenizer),
        use_activation=True,
    )
    return Renderer(tokenizer, info, **options)


def pairs(tokenizer: PreTrainedTokenizerBase, template: str | None = None, **options: Any) -> PairRenderer:
    return PairRenderer(renderer(tokenizer, **options), PairTemplate(template) if template else None)


def rendered(
    made: PairRenderer, listed: list[tuple[str, str]], own: PairOptions | None = None, **options: Any
) -> list[Sequence]:
    return made.render(listed, "classify", PoolingParams(), TextOptions(**options), own or PairOptions())


def flat(sequences: list[Sequence]) -> list[tuple[list[int], list[int]]]:
    """Ids and type ids; type ids that are not given are zeros."""
    return [(list(s.ids), list(s.type_ids if s.type_ids is not None else [0] * len(s))) for s in sequences]


def reference(
    tokenizer: PreTrainedTokenizerBase, listed: list[tuple[str, str]], **options: Any
) -> list[tuple[list[int], list[int]]]:
    firsts, seconds = ([*side] for side in zip(*listed, strict=True))
    found = tokenizer(firsts, seconds, **options)
    types = found.get("token_type_ids") or [[0] * len(ids) for ids in found["input_ids"]]
    return list(zip(found["input_ids"], types, strict=True))


# --- joined --------------------------------------------------------------------------------------------------------


def test_shares_are_those_of_the_tokenizers_library() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for room in range(20):
        tokenizer.enable_truncation(room, strategy="longest_first")
        for first, second in itertools.product(range(12), repeat=2):
            ids = tokenizer.encode("a " * first, "b " * second).ids
            assert shares(first, second, room) == (ids.count(0), ids.count(1)), (first, second, room)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_whole_pairs(name: str, special: bool) -> None:
    build = TOKENIZERS[name]
    expected = reference(build(), PAIRS, add_special_tokens=special)
    kept = [(pair, own) for pair, own in zip(PAIRS, expected, strict=True) if own[0]]
    found = rendered(pairs(build(), limit=1000), [pair for pair, _ in kept], add_special_tokens=special)
    assert flat(found) == [own for _, own in kept]
    assert {s.task for s in found} == {"classify"}


def test_forms_of_pairs() -> None:
    """Written out once, so that the tokenizers of these tests are what they are taken for."""
    build = wordpiece()
    cls, sep, one, two = build.convert_tokens_to_ids(["[CLS]", "[SEP]", "one", "two"])
    assert flat(rendered(pairs(wordpiece()), [("one", "two")])) == [([cls, one, sep, two, sep], [0, 0, 0, 1, 1])]
    (sequence,) = rendered(pairs(sentinels()), [("a", "b")])
    assert sentinels().convert_ids_to_tokens(sequence.ids) == ["<s>", "a", "</s>", "</s>", "b", "</s>"]
    assert sequence.type_ids is None
    (sequence,) = rendered(pairs(byte_level()), [("a", "b")])
    assert byte_level().convert_ids_to_tokens(sequence.ids) == ["a", "b"]
    assert sequence.type_ids is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_cut_longest_first(name: str, special: bool, side: str) -> None:
    build = TOKENIZERS[name]
    made, theirs = pairs(build(truncation_side=side)), build(truncation_side=side)
    ((shortest, types),) = reference(theirs, [("", "")], add_special_tokens=special)
    lengths = set()
    for length in (1, 2, 3, 4, 5, 8, 13, 33, LIMIT):
        cut = {"truncation": "longest_first", "max_length": length, "add_special_tokens": special}
        expected = reference(theirs, PAIRS, **cut)
        if length < len(shortest):  # never more than asked, where Hugging Face cuts nothing
            expected = [(shortest[:length], types[:length])] * len(PAIRS)
        kept = [(pair, own) for pair, own in zip(PAIRS, expected, strict=True) if own[0]]
        found = flat(rendered(made, [pair for pair, _ in kept], truncate=length, add_special_tokens=special))
        assert found == [own for _, own in kept]
        lengths.add(max(len(ids) for ids, _ in found))
    assert lengths == {1, 2, 3, 4, 5, 8, 13, 33, LIMIT}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_an_explicit_side_slices_the_finished_pair(name: str, side: str, length: int) -> None:
    build = TOKENIZERS[name]
    whole = reference(build(), PAIRS)
    expected = [tuple(row[-length:] if side == "left" else row[:length] for row in own) for own in whole]
    kept = [(pair, own) for pair, own in zip(PAIRS, expected, strict=True) if own[0]]
    assert flat(rendered(pairs(build()), [pair for pair, _ in kept], truncate=length, side=side)) == [
        own for _, own in kept
    ]


def test_minus_one_is_the_models_maximum() -> None:
    made = pairs(wordpiece(), limit=9)
    assert flat(rendered(made, PAIRS, truncate=-1)) == reference(
        wordpiece(), PAIRS, truncation="longest_first", max_length=9
    )
    assert flat(rendered(pairs(wordpiece(), limit=9, auto_truncate=True), PAIRS)) == flat(
        rendered(made, PAIRS, truncate=-1)
    )


def test_too_long_is_refused_with_the_number_of_tokens() -> None:
    pair = ("the quick brown fox", "jumps over the lazy dog")
    ((ids, _),) = reference(wordpiece(), [pair])
    assert flat(rendered(pairs(wordpiece(), limit=len(ids)), [pair])) == reference(wordpiece(), [pair])
    with pytest.raises(TooLong, match=rf"maximum context length is {len(ids) - 1} tokens.* contains {len(ids)} input"):
        rendered(pairs(wordpiece(), limit=len(ids) - 1), [("a", "b"), pair])
    with pytest.raises(BadRequest, match="truncate_prompt_tokens value is greater than max_model_len"):
        rendered(pairs(wordpiece()), [pair], truncate=LIMIT + 1)


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of characters of the texts that were tokenised."""
    lengths: list[int] = []
    own = FastTokenizer.encodings

    def counted(self: FastTokenizer, texts: list[str], **options: Any) -> Any:
        lengths.extend(map(len, texts))
        return own(self, texts, **options)

    monkeypatch.setattr(FastTokenizer, "encodings", counted)
    return lengths


@pytest.mark.parametrize("which", ["query", "document"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_far_too_long_are_cut_before_they_are_tokenised(tokenised: list[int], side: str, which: str) -> None:
    long = "one two three " + "four five " * (8 * COUNTED) + " six seven eight"
    pair = ("a", long) if which == "document" else (long, "a")
    with pytest.raises(TooLong, match="contains at least 9 input tokens"):
        rendered(pairs(wordpiece(), limit=8), [pair])
    found = rendered(pairs(wordpiece(truncation_side=side), limit=8), [pair], truncate=8)
    expected = reference(wordpiece(truncation_side=side), [pair], truncation="longest_first", max_length=8)
    assert flat(found) == expected
    assert max(tokenised) <= 12 * 9


CUTS = [(limit, side) for limit in (3, 4, 8, 9) for side in ("left", "right")]


@pytest.mark.parametrize(("limit", "side"), CUTS)
def test_two_long_texts_cost_as_much_as_their_tokens(monkeypatch: pytest.MonkeyPatch, side: str, limit: int) -> None:
    """What is cut off is kept in pieces, and each piece of one text would be joined to each piece of the other."""
    pieces: list[int] = []
    own = FastTokenizer.text_of
    monkeypatch.setattr(FastTokenizer, "text_of", lambda self, e: pieces.append(len(e.overflowing)) or own(self, e))
    long = [("one two three " * 170, "four five six " * 165), ("a " * 20, "b " * 300), ("a " * 300, "b")]
    found = rendered(pairs(wordpiece(truncation_side=side), limit=limit), long, truncate=limit)
    expected = reference(wordpiece(truncation_side=side), long, truncation="longest_first", max_length=limit)
    assert flat(found) == expected
    assert max(pieces) <= 8


def test_padding_pads_types_with_zeros() -> None:
    ((ids, types),) = reference(wordpiece(), [("one", "two")])
    found = rendered(pairs(wordpiece()), [("one", "two")], truncate=8, pad=True)
    assert flat(found) == [([*ids, 0, 0, 0], [*types, 0, 0, 0])]


@pytest.mark.parametrize("name", ["wordpiece", "byte level", "python"])
def test_lowercase(name: str) -> None:
    build = TOKENIZERS[name]
    listed = [("Hello WORLD", "The FOX"), ("FOX", "hello")]
    expected = reference(build(), [(a.lower(), b.lower()) for a, b in listed])
    assert expected != reference(build(), listed)
    assert flat(rendered(pairs(build(), lowercase=True), listed)) == expected


def test_task_and_params_reach_the_sequences() -> None:
    made = pairs(wordpiece())
    (sequence,) = made.render([("a", "b")], "classify", PoolingParams(use_activation=False), TextOptions())
    assert sequence.params == PoolingParams(use_activation=False, task="classify")
    with pytest.raises(TaskNotOffered, match="Unsupported task: 'token_embed'"):
        made.render([("a", "b")], "token_embed", PoolingParams(), TextOptions())
    with pytest.raises(BadRequest, match=r"only supports \['use_activation'\] parameters, .*\['dimensions'\]"):
        made.render([("a", "b")], "classify", PoolingParams(dimensions=4), TextOptions())


@pytest.mark.parametrize("name", ["wordpiece", "byte level"])
def test_lone_surrogates_are_refused(name: str) -> None:
    with pytest.raises(BadRequest, match="text must be valid Unicode"):
        rendered(pairs(TOKENIZERS[name]()), [("a", "\ud800")])


# --- cut at a token's end ------------------------------------------------------------------------------------------

UNICODE = [*TEXTS, "水水水 é e\u0301 ﬁ", "a🐟🐟b", "🐟", "ﬁﬁ", "  two   spaces ", "İstanbul"]


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_max_tokens_cut_at_a_tokens_end(name: str, most: int) -> None:
    tokenizer = TOKENIZERS[name]()

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    for text, cut in zip(UNICODE, pairs(TOKENIZERS[name]()).cut(UNICODE, most), strict=True):
        beginnings = [text[:n] for n in range(len(text) + 1)]
        fitting = [b for b in beginnings if len(ids(b)) <= most and ids(b) == ids(text)[: len(ids(b))]]
        assert cut.rstrip() == fitting[-1].rstrip()
        assert cut in fitting


def test_max_tokens_of_zero_cut_nothing() -> None:
    assert pairs(wordpiece()).cut(TEXTS, 0) == TEXTS


def test_max_tokens_of_query_and_document() -> None:
    made = pairs(wordpiece())
    pair = ("one two three four", "five six seven eight nine")
    for query, document, expected in (
        (0, 0, pair),
        (2, 0, ("one two", pair[1])),
        (0, 3, (pair[0], "five six seven")),
        (1, 4, ("one", "five six seven eight")),
        (4, 5, pair),
    ):
        options = PairOptions(max_tokens_per_query=query, max_tokens_per_doc=document)
        assert flat(rendered(made, [pair], options)) == reference(wordpiece(), [expected])
        in_prompt = rendered(made, [pair], PairOptions(query, document, PairTemplate(PROMPT)))
        assert wordpiece().decode(in_prompt[0].ids) == f"[CLS] the fox {expected[0]} name {expected[1]} is it? [SEP]"


def test_max_tokens_spare_texts_that_are_far_too_long(tokenised: list[int]) -> None:
    long = "one two " * (LIMIT * COUNTED)
    found = rendered(pairs(wordpiece()), [("a", long)], PairOptions(max_tokens_per_doc=2))
    found += rendered(pairs(wordpiece()), [(long, "a")], PairOptions(max_tokens_per_query=2))
    assert flat(found) == reference(wordpiece(), [("a", "one two"), ("one two", "a")])
    assert max(tokenised) <= 12 * 3


@pytest.mark.parametrize("name", ["max_tokens_per_query", "max_tokens_per_doc"])
@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (-1, "{} must be a non-negative integer"),
        (True, "{} must be a non-negative integer"),
        (1.5, "{} must be a non-negative integer"),
        ("7", "{} must be a non-negative integer"),
        (LIMIT, r"{} \(64\) must be less than max_model_len \(64\)\."),
    ],
)
def test_max_tokens_out_of_range(name: str, value: Any, sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence.format(name)) as caught:
        rendered(pairs(wordpiece()), [("a", "b")], PairOptions(**{name: value}))
    assert caught.value.param == name


# --- prompts -------------------------------------------------------------------------------------------------------

PROMPT = (
    "the fox {{ (messages | selectattr('role', 'eq', 'query') | first).content }} name "
    "{{ (messages | selectattr('role', 'eq', 'document') | first).content }} {{ ending or 'is it?' }}"
)


def test_prompts() -> None:
    """A template replaces the tokenizer's joining; special tokens come around the whole."""
    (sequence,) = rendered(pairs(wordpiece(), PROMPT), [("one two", "three")])
    expected = wordpiece()("the fox one two name three is it?")["input_ids"]
    assert (sequence.ids, sequence.type_ids) == (expected, None)
    (sequence,) = rendered(pairs(wordpiece(), PROMPT), [("one two", "three")], add_special_tokens=False)
    assert sequence.ids == expected[1:-1]


def test_a_requests_template_and_variables_win() -> None:
    made = pairs(wordpiece(), PROMPT)
    template = PairTemplate("{{ messages[1].content }}{{ ending }} hello", {"ending": "?", "other": 1})
    ids = wordpiece()

    def found(options: PairOptions) -> str:
        (sequence,) = rendered(made, [("one", "two")], options)
        return str(ids.decode(sequence.ids[1:-1]))

    assert found(PairOptions(kwargs={"ending": "!"})) == "the fox one name two!"
    assert found(PairOptions(template=template)) == "two? hello"
    assert found(PairOptions(template=template, kwargs={"ending": "!"})) == "two! hello"


def test_structured_messages_and_special_tokens_of_a_template() -> None:
    template = PairTemplate(
        "{% for m in messages %}{{ m.role }} {{ m.content[0].type }} {{ m.content[0].text }} {% endfor %}",
        structured=True,
        add_special_tokens=False,
    )
    (sequence,) = rendered(pairs(wordpiece()), [("one", "two")], PairOptions(template=template))
    assert sequence.ids == wordpiece()("query text one document text two", add_special_tokens=False)["input_ids"]


def test_the_tokenizers_own_template() -> None:
    tokenizer = wordpiece()
    tokenizer.chat_template = "{{ messages[0].content }}-{{ messages[1].content }}{{ ending }}"
    options = PairOptions(template=PairTemplate(None, {"ending": "!"}))
    (sequence,) = rendered(pairs(tokenizer), [("one", "two")], options)
    assert sequence.ids == wordpiece()("one-two!")["input_ids"]
    assert flat(rendered(pairs(tokenizer), [("one", "two")])) == reference(wordpiece(), [("one", "two")])


@pytest.mark.parametrize("name", ["wordpiece", "sentinels", "byte level", "python"])
@pytest.mark.parametrize("special", [True, False])
def test_a_prompt_that_is_too_long_loses_tokens_of_its_document(name: str, special: bool) -> None:
    """Query and ending stay; what is left of the document is as long as fits, up to what a cut at a token costs."""
    build = TOKENIZERS[name]
    query, document = "one two", "Cenotes are naïve pits 水🐟, or sinkholes, that expose groundwater"
    theirs, made = build(), pairs(build(), PROMPT, limit=500)

    def whole(text: str) -> list[int]:
        prompt = f"the fox {query} name {text} is it?"
        found: list[int] = theirs(prompt, add_special_tokens=special)["input_ids"]
        return found

    lengths = []
    cuts = [whole(document[:n]) for n in range(len(document) + 1)]
    longest, least = len(cuts[-1]), len(cuts[0])
    for truncate in range(least, longest + 2):
        (sequence,) = rendered(made, [(query, document)], truncate=truncate, add_special_tokens=special)
        assert list(sequence.ids) in cuts
        assert truncate - 4 <= len(sequence) <= truncate or len(sequence) == longest
        lengths.append(len(sequence))
    assert lengths == sorted(lengths)
    assert lengths[-2:] == [longest, longest]
    with pytest.raises(TooLong, match=rf"has {least} tokens without its document, and is to be cut to {least - 1}"):
        rendered(made, [(query, document)], truncate=least - 1, add_special_tokens=special)
    with pytest.raises(TooLong, match=f"contains {longest} input tokens"):
        rendered(pairs(build(), PROMPT, limit=longest - 1), [(query, document)], add_special_tokens=special)


def test_each_prompt_is_cut_for_itself() -> None:
    made = pairs(wordpiece(), PROMPT)
    listed = [("one", "two"), ("one", "two " * 20), ("one two", "three " * 20)]
    found = [wordpiece().decode(s.ids[1:-1]) for s in rendered(made, listed, truncate=14)]
    assert found == [
        "the fox one name two is it?",
        "the fox one name two two two two is it?",
        "the fox one two name three three three is it?",
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_explicit_side_slices_the_finished_prompt(side: str) -> None:
    ids = wordpiece()("the fox one name two two two is it?")["input_ids"]
    (sequence,) = rendered(pairs(wordpiece(), PROMPT), [("one", "two two two")], truncate=6, side=side)
    assert sequence.ids == (ids[-6:] if side == "left" else ids[:6])


@pytest.mark.parametrize("source", ["{{ raise_exception('no such pair') }}", "{% if %}", "{{ messages[7].content }}"])
def test_templates_that_refuse(source: str) -> None:
    with pytest.raises(BadRequest, match="the chat template refuses these messages"):
        rendered(pairs(wordpiece(), source), [("a", "b")])


def test_variables_without_a_template_are_refused() -> None:
    with pytest.raises(
        BadRequest, match="joins query and document without a template, so instruction, other would"
    ) as e:
        rendered(pairs(wordpiece()), [("a", "b")], PairOptions(kwargs={"other": 1, "instruction": "x"}))
    assert e.value.param == "instruction"
