"""Long text is tokenised in part, and no answer differs for it; a request's work has bounds."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cenote.core import UNLIMITED, PoolingParams
from cenote.engine.fake import FAKE_INFO
from cenote.errors import BadRequest, TooLong
from cenote.pipeline.options import Bounds, TextOptions
from cenote.pipeline.pairs import PairRenderer
from cenote.pipeline.prompts import Applied
from cenote.pipeline.rendering import Renderer
from cenote.pipeline.tokenizing import FastTokenizer
from tests import checkpoints

LIMIT = 8
WORDS = [
    *"abcdefg",
    "number",
    "antidisestablishmentarianism",
    "1234567",
    "水の中",
    "don't",
    "[SEP]",
    "  ",
    "\n\n\t",
    "é",
]


def trained(model: Any, trainer: Any, *, digits: bool = False, metaspace: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of a few hundred tokens."""
    backend = Tokenizer(model)
    backend.normalizer = normalizers.NFKC()
    parts: list[Any] = [pre_tokenizers.Metaspace()] if metaspace else [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if digits:  # groups of three, counted from the end of a number
        parts.insert(0, pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*(?:\D|$))"), "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


SPECIAL = ["[PAD]", "[UNK]", "[SEP]"]
TOKENIZERS = {
    "wordpiece": checkpoints.wordpiece(),
    "bpe": trained(models.BPE(), trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)),
    "digits": trained(
        models.BPE(), trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False), digits=True
    ),
    "unigram": trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False),
        metaspace=True,
    ),
}


@cache
def other(name: str, side: str) -> Any:
    """A tokenizer of its own for the reference: a call of Transformers' leaves truncation switched on."""
    tokenizer = deepcopy(TOKENIZERS[name])
    tokenizer.truncation_side = side
    return tokenizer


def reference(name: str, side: str, *texts: str, truncation: Any = True, limit: int = LIMIT) -> list[int]:
    """Transformers' ids, all of the text tokenised."""
    ids: list[int] = other(name, side)(*texts, truncation=truncation, max_length=limit)["input_ids"]
    return ids


def renderer(name: str, side: str = "right", limit: int = LIMIT, **options: Any) -> Renderer:
    tokenizer = deepcopy(TOKENIZERS[name])
    tokenizer.truncation_side = side
    return Renderer(tokenizer, replace(FAKE_INFO, vocab_size=len(tokenizer), max_model_len=limit), **options)


def texts(seed: int) -> list[str]:
    """Long texts of words, of one word, and with a long word or number at the beginning, in the middle, at the end."""
    draw = random.Random(seed)
    long = ["f" * draw.randrange(900, 1100), "1" * draw.randrange(900, 1100), "é水" * 500, " " * 1000]
    words = [" ".join(draw.choices(WORDS, k=400)) for _ in long]
    return [text for a, b in zip(words, long, strict=True) for text in (a, b, f"{b} {a}", f"a {b} c", f"{a} {b}")]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", range(1))
def test_no_answer_differs_for_what_is_not_tokenised(name: str, side: str, seed: int) -> None:
    made = renderer(name, side)
    for text in texts(seed):
        (sequence,) = made.render([text], "embed", PoolingParams(), TextOptions(truncate=LIMIT))
        assert list(sequence.ids) == reference(name, side, text), text[:50]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_no_pair_differs_for_what_is_not_tokenised(name: str, side: str) -> None:
    made = PairRenderer(renderer(name, side))
    long = texts(5)
    short = [text[:200] for text in long]  # of two long ones the reference makes all pairs of their parts
    for pair in [*zip(short, short[::-1], strict=True), *(("a b", text) for text in long[:10]), (long[0], "a")]:
        (sequence,) = made.render([pair], "embed", PoolingParams(), TextOptions(truncate=LIMIT))
        expected = reference(name, side, *pair, truncation="longest_first")
        assert list(sequence.ids) == expected, [text[:50] for text in pair]


def test_one_very_long_word_is_not_too_many_tokens() -> None:
    made = renderer("wordpiece", limit=16)
    (sequence,) = made.render(["f" * 20_000 + " fox"], "embed", PoolingParams())
    assert list(sequence.ids) == reference("wordpiece", "right", "f" * 20_000 + " fox", limit=16)
    assert len(sequence.ids) == 4
    with pytest.raises(TooLong, match="at least 17 input tokens"):
        made.render(["fox " * 20_000], "embed", PoolingParams())


def count_characters(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The characters of each text that is tokenised from now on."""
    sizes: list[int] = []
    encodings = FastTokenizer.encodings

    def counted(self: FastTokenizer, texts: list[str], **options: Any) -> Any:
        sizes.extend(map(len, texts))
        return encodings(self, texts, **options)

    monkeypatch.setattr(FastTokenizer, "encodings", counted)
    return sizes


def test_a_prompt_before_many_inputs_is_bounded_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = count_characters(monkeypatch)
    made = renderer("wordpiece", include_prompt=False)
    prompt = Applied("one two " * 7_500)
    options = TextOptions(truncate=LIMIT, prompt=prompt)
    found = made.render(["a"] * 300, "embed", PoolingParams(), options)
    assert {tuple(sequence.ids) for sequence in found} == {tuple(reference("wordpiece", "right", prompt.text))}
    assert sum(sizes) < 300 * 60 * (LIMIT + 1), "not 300 times 60,000"
    sizes.clear()
    with pytest.raises(TooLong, match="at least 9"):
        made.render(["a"] * 300, "embed", PoolingParams(), options._replace(truncate=None))
    assert sum(sizes) < 100 * (LIMIT + 1), "the first is refused, the others are not looked at"


@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_text_that_is_cut_a_part_is_tokenised(monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    sizes = count_characters(monkeypatch)
    text = "one two " * 7_500
    found = renderer("wordpiece", side, limit=256).render(
        [text] * 10, "embed", PoolingParams(), TextOptions(truncate=256)
    )
    assert {tuple(sequence.ids) for sequence in found} == {tuple(reference("wordpiece", side, text, limit=256))}
    assert sum(sizes) < 10 * len(text) / 4


@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        (["a b"] * 30, TextOptions()),
        ([[5, 6, 7, 8]] * 30, TextOptions()),
        (["a"] * 13, TextOptions(pad=True)),
        (["a"], TextOptions(pad=True, truncate=1 << 39)),
    ],
)
def test_a_request_may_run_so_many_tokens(prompts: list[Any], options: TextOptions) -> None:
    made = renderer("wordpiece")
    made.bounds = Bounds(tokens=100)
    if options.truncate:
        made.info = replace(made.info, max_embed_len=UNLIMITED)
    with pytest.raises(BadRequest, match=r"at most 100 are allowed \(--max-request-tokens\)"):
        made.render(prompts, "embed", PoolingParams(), options)
    if len(prompts) > 1:
        assert len(made.render(prompts[:12], "embed", PoolingParams(), options)) == 12


def test_pairs_and_entities_have_the_same_bound() -> None:
    made = renderer("wordpiece")
    made.bounds = Bounds(tokens=100)
    for count, is_allowed in ((20, True), (21, False)):
        for render in (
            lambda: PairRenderer(made).render([("a", "b")] * count, "embed", PoolingParams(), TextOptions()),  # noqa: B023
            lambda: made.annotated(["a b c"] * count, "embed", PoolingParams()),  # noqa: B023
        ):
            if is_allowed:
                assert len(render()) == count
            else:
                with pytest.raises(BadRequest, match="at least 105 tokens"):
                    render()


def test_text_that_cannot_be_cut_may_have_so_many_characters() -> None:
    made = renderer("bpe")
    made.bounds = Bounds(characters=10_000)
    options = TextOptions(truncate=LIMIT)
    made.render(["a b " * 100_000], "embed", PoolingParams(), options)
    with pytest.raises(BadRequest, match=r"at most 10000 may \(--max-text-characters\)"):
        made.render(["f" * 10_001], "embed", PoolingParams(), options)
    with pytest.raises(BadRequest, match=r"at most 10000 may"):
        PairRenderer(made).render([("f" * 10_001, "a")], "embed", PoolingParams(), options)


def test_long_prompts_are_not_kept() -> None:
    made = renderer("wordpiece", include_prompt=False)
    for text in ("one ", "one two " * 10_000):
        made.render(["a"], "embed", PoolingParams(), TextOptions(truncate=LIMIT, prompt=Applied(text)))
    assert made._length.cache_info().currsize == 1
