"""Rendering equals Hugging Face's tokenizers: whole, cut, padded, lower-cased, in many threads; and what is refused."""

from __future__ import annotations

import functools
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer, CanineTokenizer

from cenote.core import ModelInfo, PoolingParams
from cenote.errors import BadRequest, TaskNotOffered, TooLong
from cenote.pipeline.options import ChatOptions, TextOptions
from cenote.pipeline.prompts import Prompts
from cenote.pipeline.rendering import COUNTED, Renderer
from tests.checkpoints import TEXTS, byte_level, wordpiece

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

LIMIT = 64

TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "wordpiece": wordpiece,
    "wordpiece, left": partial(wordpiece, truncation_side="left"),
    "byte level": byte_level,
    "byte level, left": partial(byte_level, truncation_side="left"),
    "python": ByT5Tokenizer,
    "python, left": partial(ByT5Tokenizer, truncation_side="left"),
    "python, characters": CanineTokenizer,
}


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """One of `TOKENIZERS`, made once: the one of characters lists a million of them."""
    return TOKENIZERS[name]()


def renderer(tokenizer: PreTrainedTokenizerBase, *, limit: int = LIMIT, **options: Any) -> Renderer:
    info = ModelInfo(
        name="tiny",
        architecture="BertModel",
        tasks=("embed", "token_embed"),
        default_task="embed",
        dimension=8,
        max_model_len=limit,
        vocab_size=len(tokenizer),
        use_activation=True,
    )
    return Renderer(tokenizer, info, **options)


def ids(made: Renderer, prompts: Any, **options: Any) -> list[list[int]]:
    """Token ids of `prompts`."""
    sequences = made.render(prompts, "embed", PoolingParams(), TextOptions(**options))
    return [list(sequence.ids) for sequence in sequences]


def reference(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, **options)["input_ids"]
    return found


# --- text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("special", [True, False])
def test_whole_texts(name: str, special: bool) -> None:
    tokenizer = tokenizer_of(name)
    expected = reference(tokenizer, TEXTS, add_special_tokens=special)
    texts = [text for text, ids_ in zip(TEXTS, expected, strict=True) if ids_]
    assert ids(renderer(tokenizer, limit=1000), texts, add_special_tokens=special) == [
        ids_ for ids_ in expected if ids_
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 13, 33, LIMIT])
def test_cut_as_hugging_face_cuts(name: str, special: bool, length: int) -> None:
    tokenizer = tokenizer_of(name)
    texts = [text for text in TEXTS if text]
    found = ids(renderer(tokenizer), texts, truncate=length, add_special_tokens=special)
    if special and length < tokenizer.num_special_tokens_to_add():
        special_ids = reference(tokenizer, [""])[0]
        assert found == [special_ids[:length]] * len(texts)  # never more than asked, where Hugging Face cuts nothing
        return
    expected = reference(tokenizer, texts, truncation=True, max_length=length, add_special_tokens=special)
    assert found == expected
    assert max(map(len, found)) == length


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_an_explicit_side_cuts_the_finished_ids(name: str, side: str, length: int) -> None:
    """As vLLM: special tokens are cut like any other."""
    whole = reference(tokenizer_of(name), TEXTS)
    expected = [one[-length:] if side == "left" else one[:length] for one in whole]
    assert ids(renderer(tokenizer_of(name)), TEXTS, truncate=length, side=side) == [one for one in expected if one]


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_minus_one_is_the_models_maximum(side: Any) -> None:
    made = renderer(tokenizer_of("wordpiece"), limit=9)
    assert ids(made, TEXTS, truncate=-1, side=side) == ids(made, TEXTS, truncate=9, side=side)
    assert ids(made, TEXTS, truncate=-1, side=side) != ids(made, TEXTS, truncate=8, side=side)


def test_too_long_is_refused_with_the_number_of_tokens() -> None:
    tokenizer = tokenizer_of("wordpiece")
    made = renderer(tokenizer, limit=9)
    (text,) = (text for text in TEXTS if text.startswith("The quick"))
    (count,) = map(len, reference(tokenizer, [text]))
    with pytest.raises(TooLong, match=rf"maximum context length is 9 tokens\. However, .* contains {count} input"):
        ids(made, ["a", text])
    assert ids(renderer(tokenizer, limit=count), [text]) == reference(tokenizer, [text])
    with pytest.raises(TooLong, match="contains 10 input tokens"):
        ids(made, [[5] * 10])


def test_auto_truncate() -> None:
    tokenizer = tokenizer_of("wordpiece")
    made = renderer(tokenizer, limit=9, auto_truncate=True)
    assert ids(made, TEXTS) == reference(tokenizer, TEXTS, truncation=True, max_length=9)
    assert ids(made, TEXTS, truncate=5) == reference(tokenizer, TEXTS, truncation=True, max_length=5)
    assert ids(made, [[5] * 20]) == [[5] * 9]


def test_more_than_the_maximum_cannot_be_asked_for() -> None:
    with pytest.raises(BadRequest, match="truncate_prompt_tokens value is greater than max_model_len") as caught:
        ids(renderer(tokenizer_of("wordpiece")), ["a"], truncate=LIMIT + 1)
    assert caught.value.param == "truncate_prompt_tokens"


@pytest.mark.parametrize("name", ["wordpiece", "wordpiece, left", "byte level", "byte level, left"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_very_long_text_is_cut_before_it_is_tokenised(name: str, side: Any) -> None:
    """Megabytes are not tokenised for a few tokens, and the end that is kept is the right one."""
    tokenizer = tokenizer_of(name)
    made = renderer(tokenizer, limit=8)
    text = "one two three " + "four five " * (8 * COUNTED) + " six seven eight"
    with pytest.raises(TooLong, match="contains at least 9 input tokens"):
        ids(made, [text])
    (found,) = ids(made, [text], truncate=8, side=side)
    if side is None:
        assert [found] == reference(tokenizer, [text], truncation=True, max_length=8)
    else:
        (whole,) = reference(tokenizer, [text])
        assert found == (whole[-8:] if side == "left" else whole[:8])


@pytest.mark.parametrize("name", ["wordpiece", "byte level", "python"])
@pytest.mark.parametrize("length", [-1, 8])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_padding(name: str, length: int, side: Any) -> None:
    tokenizer = tokenizer_of(name)
    made = renderer(tokenizer)
    whole, total = ids(made, TEXTS, truncate=length, side=side), LIMIT if length == -1 else length
    padded = ids(made, TEXTS, truncate=length, side=side, pad=True)
    assert padded == [one + [tokenizer.pad_token_id] * (total - len(one)) for one in whole]
    assert ids(made, ["a"], pad=True) == [[*whole[2], *[tokenizer.pad_token_id] * (LIMIT - len(whole[2]))]]


def test_saved_truncation_and_padding_of_a_tokenizer_do_not_count() -> None:
    tokenizer = wordpiece()
    expected = reference(tokenizer, TEXTS)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    assert ids(renderer(tokenizer, limit=1000), TEXTS) == expected


@pytest.mark.parametrize("name", ["wordpiece", "byte level", "python"])
@pytest.mark.parametrize("length", [None, 9])
def test_lowercase(name: str, length: int | None) -> None:
    tokenizer = {"wordpiece": wordpiece, "byte level": byte_level, "python": ByT5Tokenizer}[name]()
    cut: dict[str, Any] = {"truncation": True, "max_length": length} if length else {}
    lowered = reference(tokenizer, [text.lower() for text in TEXTS], **cut)
    assert lowered != reference(tokenizer, TEXTS, **cut)
    assert ids(renderer(tokenizer, limit=1000, lowercase=True), TEXTS, truncate=length) == lowered


def test_default_prompt_goes_before_text_and_not_before_ids() -> None:
    tokenizer = tokenizer_of("wordpiece")
    made = renderer(tokenizer, limit=1000, prompts=Prompts({"p": "represent: "}, "p"), include_prompt=False)
    sequences = made.render([TEXTS[0], [5, 6], {"prompt": TEXTS[1]}], "embed", PoolingParams())
    expected = reference(tokenizer, ["represent: " + text for text in TEXTS[:2]])
    assert [list(s.ids) for s in sequences] == [expected[0], [5, 6], expected[1]]
    skipped = len(tokenizer("represent: ")["input_ids"]) - 1  # [CLS] and the prompt, without [SEP]
    assert [s.skip for s in sequences] == [skipped, 0, skipped]
    included = renderer(tokenizer, limit=1000, prompts=Prompts({"p": "represent: "}, "p"))
    assert [s.skip for s in included.render([TEXTS[0]], "embed", PoolingParams())] == [0]


# --- forms of a prompt ---------------------------------------------------------------------------------------------


def test_forms_of_a_prompt() -> None:
    tokenizer = tokenizer_of("wordpiece")
    (text,) = reference(tokenizer, ["hello"])
    prompts = ["hello", {"prompt": "hello"}, text, tuple(text), np.array(text), {"prompt_token_ids": text}]
    made = renderer(tokenizer)
    assert ids(made, prompts) == [text] * 6
    assert ids(made, prompts) == [ids(made, [prompt])[0] for prompt in prompts]


def test_token_ids_are_cut_on_the_asked_or_the_tokenizers_side() -> None:
    given = [[5, 6, 7, 8]]
    for name, side, expected in (
        ("wordpiece", None, [5, 6]),
        ("wordpiece, left", None, [7, 8]),
        ("wordpiece", "left", [7, 8]),
        ("wordpiece, left", "right", [5, 6]),
    ):
        assert ids(renderer(tokenizer_of(name)), given, truncate=2, side=side) == [expected]


def test_task_and_params_reach_the_sequences() -> None:
    made = renderer(tokenizer_of("wordpiece"))
    params = PoolingParams(use_activation=False)
    (sequence,) = made.render(["a"], "token_embed", params)
    assert (sequence.task, sequence.params) == ("token_embed", PoolingParams(use_activation=False, task="token_embed"))
    assert params.task is None


VOCABULARY = len(tokenizer_of("wordpiece"))
REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": ([], "You must pass at least one prompt"),
    "no ids": ([[]], "The decoder prompt cannot be empty"),
    "no ids among others": (["a", {"prompt_token_ids": []}], "The decoder prompt cannot be empty"),
    "negative": ([[5, -1]], f"Token id -1 is out of vocabulary; tiny takes ids from 0 to {VOCABULARY - 1}"),
    "too large": ([[5, VOCABULARY]], f"Token id {VOCABULARY} is out of vocabulary"),
    "far too large": ([[5, 1 << 70]], f"Token id {1 << 70} is out of vocabulary"),
    "float": ([[5.0]], "a prompt is text or a list of token ids, got list"),
    "number": ([5.5], "a prompt is text or a list of token ids, got float"),
    "none": (["a", None], "a prompt is text or a list of token ids, got NoneType at index 1"),
    "not a number": ([*"abc", float("nan"), 5], "a prompt is text or a list of token ids, got float at index 3"),
    "bytes as ids": ([{"prompt_token_ids": bytearray(b"x")}], "a prompt is text or a list of token ids, got bytearray"),
    "booleans": (["a", [5, True]], "a prompt is text or a list of token ids, got list at index 1"),
    "in a mapping": (["a", {"prompt": 5}], "a prompt is text or a list of token ids, got int at index 1"),
    "bytes": ([b"hello"], "tiny takes no images, only texts"),
    "list of texts": ([["hello"]], "a prompt is text or a list of token ids, got list"),
    "unknown key": ([{"promt": "a"}], r"keys that are not supported: \['promt'\]"),
    "media": ([{"prompt": "a", "multi_modal_data": {"image": b""}}], "tiny takes no images, only texts"),
    "sound": ([{"prompt": "a", "multi_modal_data": {"audio": b""}}], "only `image` is supported"),
    "no media": ([{"prompt": "a", "multi_modal_data": 5}], "multi_modal_data of a prompt must be a dict, got 5"),
    "no kwargs": (
        [{"prompt": "a", "multi_modal_data": {"image": b""}, "mm_processor_kwargs": ["size"]}],
        r"mm_processor_kwargs of a prompt must be a dict, got \['size'\]",
    ),
    "both": ([{"prompt": "a", "prompt_token_ids": [5]}], "either `prompt` or `prompt_token_ids`"),
    "neither": ([{}], "either `prompt` or `prompt_token_ids`"),
    "surrogate": (["\ud800"], "text must be valid Unicode, without lone surrogates"),
}


@pytest.mark.parametrize(("prompts", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused(prompts: Any, sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence) as caught:
        ids(renderer(tokenizer_of("wordpiece")), prompts)
    assert caught.value.param == "input"


def test_text_without_tokens_is_refused() -> None:
    made = renderer(tokenizer_of("wordpiece"))
    with pytest.raises(BadRequest, match="The decoder prompt cannot be empty"):
        ids(made, [""], add_special_tokens=False)


def test_tasks_and_params_are_checked() -> None:
    made = renderer(tokenizer_of("wordpiece"))
    for task, sentence in (
        ("classify", r"Unsupported task: 'classify' Supported tasks: \('embed', 'token_embed'\)"),
        ("score", "`score` task was removed; use `classify` instead."),
    ):
        with pytest.raises(TaskNotOffered, match=sentence):
            made.render(["a"], task, PoolingParams())
    with pytest.raises(BadRequest, match="does not support Matryoshka embeddings; dimensions must be unset"):
        made.render(["a"], "embed", PoolingParams(dimensions=4))


# --- threads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wordpiece", "byte level, left", "python"])
def test_threads_with_different_options_do_not_disturb_each_other(name: str) -> None:
    made = renderer(tokenizer_of(name), limit=1000)
    jobs: list[dict[str, Any]] = [
        {"truncate": truncate, "side": side, "pad": pad, "add_special_tokens": special}
        for truncate, side, pad, special in itertools.product(
            (None, 3, 9), (None, "left", "right"), (True, False), (True, False)
        )
    ]
    texts = [text for text in TEXTS if text]
    alone = [ids(made, texts, **job) for job in jobs]
    assert len({str(found) for found in alone}) > 10
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda job: ids(made, texts, **job), jobs * 4))
    assert together == alone * 4


class _NotReentrant(ByT5Tokenizer):
    """A Python tokenizer that notices when two threads are in it."""

    busy = threading.Semaphore(1)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self.busy.acquire(blocking=False), "two threads at once"
        try:
            time.sleep(0.001)
            return super().__call__(*args, **kwargs)
        finally:
            self.busy.release()


@pytest.mark.parametrize("length", [None, 4])
def test_python_tokenizers_are_used_by_one_thread_at_a_time(length: int | None) -> None:
    made = renderer(_NotReentrant(), limit=1000)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: ids(made, TEXTS, truncate=length), range(16)))
    assert found == [ids(made, TEXTS, truncate=length)] * 16


# --- messages and single tokens ------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ extra }}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]


def chatty() -> Renderer:
    tokenizer = wordpiece()
    tokenizer.chat_template = TEMPLATE
    return renderer(tokenizer)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (ChatOptions(), "<system>Be brief.<user>hello"),
        (ChatOptions(add_generation_prompt=True), "<system>Be brief.<user>hello<assistant>"),
        (ChatOptions(kwargs={"extra": "!"}), "<system>Be brief.<user>hello!"),
        (ChatOptions(template="{{ messages[-1].content }}"), "hello"),
    ],
)
def test_messages(options: ChatOptions, expected: str) -> None:
    assert chatty().conversations.text(MESSAGES, options) == expected


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, "two", {"text": "three"}]
    assert chatty().conversations.text([{"role": "user", "content": parts}]) == "<user>one\ntwo\nthree"


def test_a_message_has_further_keys_and_calls_of_tools_instead_of_a_content() -> None:
    template = "{% for m in messages %}{{ m.role }} {{ m.name }} {{ m.tool_calls }} {{ m.content }};{% endfor %}"
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [1]},
        {"role": "assistant", "tool_calls": [2]},
        {"role": "tool", "name": "f", "content": ""},
    ]
    text = chatty().conversations.text(messages, ChatOptions(template=template))
    assert text == "assistant  [1] ;assistant  [2] ;tool f  ;"


CHAT_FAULTS: dict[str, tuple[Any, ChatOptions, str]] = {
    "none": ([], ChatOptions(), "`messages` must not be empty"),
    "image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        ChatOptions(),
        "content parts of type 'image_url' are not supported by this model, only text",
    ),
    "template raises": (
        MESSAGES,
        ChatOptions(template="{{ raise_exception('only one message') }}"),
        "the chat template refuses these messages: only one message",
    ),
    "template is broken": (MESSAGES, ChatOptions(template="{% if %}"), "the chat template refuses these messages"),
    "both ends": (
        MESSAGES,
        ChatOptions(add_generation_prompt=True, continue_final_message=True),
        "Cannot set both `continue_final_message` and `add_generation_prompt` to True",
    ),
}


@pytest.mark.parametrize(("messages", "options", "sentence"), CHAT_FAULTS.values(), ids=CHAT_FAULTS)
def test_faults_of_messages(messages: Any, options: ChatOptions, sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence):
        chatty().conversations.text(messages, options)


def test_messages_without_a_template() -> None:
    with pytest.raises(BadRequest, match="tiny has no chat template, so `messages` cannot be rendered"):
        renderer(tokenizer_of("wordpiece")).conversations.text(MESSAGES)


@pytest.mark.parametrize("name", ["wordpiece", "byte level", "python"])
def test_tokens_there_and_back(name: str) -> None:
    tokenizer = tokenizer_of(name)
    made = renderer(tokenizer, limit=4)  # the limit is the model's, not the tokenizer's
    for text in TEXTS:
        for special in (True, False):
            found = made.tokenize(text, add_special_tokens=special)
            assert found == tokenizer(text, add_special_tokens=special)["input_ids"]
            assert made.token_strings(found) == tokenizer.convert_ids_to_tokens(found)
            assert made.detokenize(found) == tokenizer.decode(found)
    with pytest.raises(BadRequest, match="Token id -7 is out of vocabulary"):
        made.detokenize([-7])
