"""`LLM`: forms of prompts, parameters, outputs, progress, faults, and what happens to work when something raises."""

from __future__ import annotations

import gc
import logging
import re
import threading
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, ByT5Tokenizer

import cenote.calls
import cenote.llm
from cenote import LLM, PoolerConfig, PoolingParams
from cenote.errors import BadRequest, CheckpointError, Closed, ConfigError, EngineFailed, TooLong
from cenote.outputs import EmbeddingOutput, EmbeddingRequestOutput, PoolingOutput, PoolingRequestOutput
from tests import PATIENCE, checkpoints, forked
from tests.checkpoints import SHORT, TEXTS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future
    from pathlib import Path

IDS = [checkpoints.wordpiece()(text)["input_ids"] for text in SHORT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(model=str(folder), runner="pooling", pooler_config=PoolerConfig(pooling_type="MEAN")) as made:
        yield made


@pytest.fixture(scope="module")
def states(folder: Path) -> list[np.ndarray]:
    """Hidden states of `SHORT`, `[T, D]` each, as Transformers computes them one by one."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy() for ids in IDS]


def unit(rows: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return scaled


@pytest.fixture(scope="module")
def means(states: list[np.ndarray]) -> np.ndarray:
    return unit(np.stack([state.mean(0) for state in states]))


def vectors(outputs: list[EmbeddingRequestOutput]) -> np.ndarray:
    return np.array([output.outputs.embedding for output in outputs])


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


# --- prompts -------------------------------------------------------------------------------------------------------

SEVERAL: dict[str, Any] = {
    "texts": SHORT,
    "tuple of texts": tuple(SHORT),
    "lists of ids": IDS,
    "arrays of ids": [np.array(ids) for ids in IDS],
    "int32 arrays": [np.array(ids, dtype=np.int32) for ids in IDS],
    "tuples of ids": [tuple(ids) for ids in IDS],
    "text mappings": [{"prompt": text} for text in SHORT],
    "id mappings": [{"prompt_token_ids": ids} for ids in IDS],
    "mixed": [*SHORT[:1], IDS[1], {"prompt": SHORT[2]}, {"prompt_token_ids": IDS[3]}, *SHORT[4:]],
}  # fmt: skip
ONE: dict[str, Any] = {
    "text": SHORT[1],
    "ids": IDS[1],
    "array": np.array(IDS[1]),
    "tuple": tuple(IDS[1]),
    "text mapping": {"prompt": SHORT[1]},
    "id mapping": {"prompt_token_ids": IDS[1]},
}


@pytest.mark.parametrize("prompts", SEVERAL.values(), ids=SEVERAL)
def test_embed_several(llm: LLM, means: np.ndarray, prompts: Any) -> None:
    outputs = llm.embed(prompts, use_tqdm=False)
    close(vectors(outputs), means)
    assert [output.prompt_token_ids for output in outputs] == IDS


@pytest.mark.parametrize("prompt", ONE.values(), ids=ONE)
def test_embed_one(llm: LLM, means: np.ndarray, prompt: Any) -> None:
    outputs = llm.embed(prompt, use_tqdm=False)
    close(vectors(outputs), means[1:2])
    assert outputs[0].prompt_token_ids == IDS[1]


def test_a_table_of_ids_is_a_prompt_a_row(llm: LLM) -> None:
    table = np.array([[5, 6, 7], [8, 9, 10]])
    np.testing.assert_allclose(
        vectors(llm.embed(table, use_tqdm=False)), vectors(llm.embed(table.tolist(), use_tqdm=False)), atol=1e-6
    )


@pytest.mark.parametrize("prompts", [*SEVERAL.values(), *ONE.values()], ids=[*SEVERAL, *ONE])
def test_encode_tokens(llm: LLM, states: list[np.ndarray], prompts: Any) -> None:
    """Rows of `token_embed` are the backbone's last hidden states, normalised."""
    outputs = llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
    expected = states if len(outputs) > 1 else states[1:2]
    for output, state in zip(outputs, expected, strict=True):
        close(output.outputs.data.numpy(), unit(state))


def test_encode_tokens_without_activation(llm: LLM, states: list[np.ndarray]) -> None:
    params = PoolingParams(use_activation=False)
    outputs = llm.encode(SHORT, params, pooling_task="token_embed", use_tqdm=False)
    for output, state in zip(outputs, states, strict=True):
        np.testing.assert_allclose(output.outputs.data.numpy(), state, rtol=0, atol=3e-5)


@pytest.mark.parametrize("task", ["embed", None])
def test_encode_vectors(llm: LLM, means: np.ndarray, task: str | None) -> None:
    outputs = llm.encode(SHORT, pooling_task=task, use_tqdm=False)
    close(torch.stack([output.outputs.data for output in outputs]).numpy(), means)


def test_more_prompts_than_are_rendered_at_once(llm: LLM, means: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cenote.calls, "RENDERED_AT_ONCE", 3)
    close(vectors(llm.embed(SHORT * 3, use_tqdm=False)), np.concatenate([means] * 3))
    params = [PoolingParams(use_activation=i % 2 == 0) for i in range(len(SHORT))]
    norms = np.linalg.norm(vectors(llm.embed(SHORT, pooling_params=params, use_tqdm=False)), axis=-1)
    np.testing.assert_array_equal(np.abs(norms - 1) < 1e-4, [p.use_activation for p in params])


def test_small_batches(folder: Path, means: np.ndarray) -> None:
    options: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 20}
    with LLM(model=str(folder), pooler_config={"pooling_type": "MEAN"}, **options) as made:
        close(vectors(made.embed(SHORT, use_tqdm=False)), means)


# --- outputs -------------------------------------------------------------------------------------------------------


def test_embed_outputs(llm: LLM) -> None:
    first, second = llm.embed(SHORT[:2], use_tqdm=False)
    assert type(first) is EmbeddingRequestOutput
    assert isinstance(first, PoolingRequestOutput)
    assert type(first.outputs) is EmbeddingOutput
    assert first.outputs.hidden_size == len(first.outputs.embedding) == checkpoints.HIDDEN
    assert {type(value) for value in first.outputs.embedding} == {float}
    assert repr(first.outputs) == f"EmbeddingOutput(hidden_size={checkpoints.HIDDEN})"
    assert (first.num_cached_tokens, first.finished) == (0, True)
    assert int(second.request_id) == int(first.request_id) + 1
    assert {type(token) for token in first.prompt_token_ids} == {int}


def test_encode_outputs(llm: LLM) -> None:
    (vector,) = llm.encode(SHORT[0], pooling_task="embed", use_tqdm=False)
    (matrix,) = llm.encode(SHORT[0], pooling_task="token_embed", use_tqdm=False)
    assert type(vector) is PoolingRequestOutput
    assert type(vector.outputs) is PoolingOutput
    for output, shape in ((vector, (checkpoints.HIDDEN,)), (matrix, (len(IDS[0]), checkpoints.HIDDEN))):
        data = output.outputs.data
        assert (tuple(data.shape), data.dtype, data.device.type) == (shape, torch.float32, "cpu")
        assert output.outputs.embedding == data.tolist()
        data += 1  # the caller's own memory
    assert int(matrix.request_id) == int(vector.request_id) + 1


def test_tokenizer_and_info(llm: LLM, folder: Path) -> None:
    assert llm.get_tokenizer()(SHORT)["input_ids"] == IDS
    info = llm.info
    assert (info.name, info.architecture, info.default_task, info.report.layout) == (
        folder.name,
        "BertModel",
        "embed",
        "packed",
    )
    assert (info.dimension, info.max_model_len) == (checkpoints.HIDDEN, checkpoints.POSITIONS)
    assert (info.report.pooling, info.report.source) == ("mean", str(folder))
    assert info.vocab_size == len(checkpoints.wordpiece())


@pytest.mark.parametrize(("names", "name"), [((), "{folder}"), (("mine", "other"), "mine"), (("{path}",), "{folder}")])
def test_messages_have_the_served_name_and_no_path(folder: Path, names: tuple[str, ...], name: str) -> None:
    """`cenote serve` of several models gives each its path as served name, where the user gave none."""
    served = tuple(spelling.format(path=folder) for spelling in names)
    with LLM(str(folder), served_model_name=served) as llm:
        expected = f"Token id 99999 is out of vocabulary; {name.format(folder=folder.name)} takes ids from 0 to "
        with pytest.raises(BadRequest, match=f"^{re.escape(expected)}"):
            llm.embed({"prompt_token_ids": [99999]}, use_tqdm=False)
        assert llm.info.report.source == str(folder)


# --- parameters ----------------------------------------------------------------------------------------------------


def test_params_for_all_and_for_each(llm: LLM, states: list[np.ndarray], means: np.ndarray) -> None:
    raw = np.stack([state.mean(0) for state in states])
    off, on = PoolingParams(use_activation=False), PoolingParams()
    np.testing.assert_allclose(vectors(llm.embed(SHORT, pooling_params=off, use_tqdm=False)), raw, rtol=0, atol=3e-5)
    each = [off if i % 3 == 0 else on for i in range(len(SHORT))]
    expected = np.where((np.arange(len(SHORT)) % 3 == 0)[:, None], raw, means)
    np.testing.assert_allclose(
        vectors(llm.embed(SHORT, pooling_params=each, use_tqdm=False)), expected, rtol=0, atol=3e-5
    )
    assert (off.task, on.task) == (None, None)  # the caller's objects stay as they are


@pytest.mark.parametrize("count", [0, 1, len(SHORT) - 1, len(SHORT) + 1])
def test_a_wrong_number_of_params(llm: LLM, count: int) -> None:
    sentence = rf"The lengths of prompts \({len(SHORT)}\) and pooling_params \({count}\) must be the same"
    with pytest.raises(ValueError, match=sentence):
        llm.embed(SHORT, pooling_params=[PoolingParams()] * count, use_tqdm=False)


def _hugging_face(**options: Any) -> list[list[int]]:
    found: list[list[int]] = checkpoints.wordpiece()(TEXTS, **options)["input_ids"]
    return found


WHOLE = _hugging_face()
TOKENIZATION: dict[str, tuple[dict[str, Any], list[list[int]]]] = {
    "number": ({"truncate_prompt_tokens": 5}, _hugging_face(truncation=True, max_length=5)),
    "maximum": ({"truncate_prompt_tokens": -1}, _hugging_face(truncation=True, max_length=64)),
    "truncation": ({"truncation": True, "max_length": 6}, _hugging_face(truncation=True, max_length=6)),
    "no length": ({"truncation": True, "max_length": None}, _hugging_face(truncation=True, max_length=64)),
    "longest first": ({"truncation": "longest_first"}, _hugging_face(truncation=True, max_length=64)),
    "right": ({"truncate_prompt_tokens": 5, "truncation_side": "right"}, [ids[:5] for ids in WHOLE]),
    "left": ({"truncate_prompt_tokens": 5, "truncation_side": "left"}, [ids[-5:] for ids in WHOLE]),
    "padded": (
        {"truncate_prompt_tokens": 5, "padding": "max_length"},
        _hugging_face(truncation=True, max_length=5, padding="max_length"),
    ),
    "not padded": (
        {"truncate_prompt_tokens": 5, "padding": "do_not_pad"},
        _hugging_face(truncation=True, max_length=5),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kwargs", "expected"), TOKENIZATION.values(), ids=TOKENIZATION)
def test_tokenization_kwargs(llm: LLM, kwargs: dict[str, Any], expected: list[list[int]]) -> None:
    outputs = llm.embed(TEXTS, tokenization_kwargs=kwargs, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == expected
    by_ids = llm.embed([output.prompt_token_ids for output in outputs], use_tqdm=False)
    np.testing.assert_allclose(vectors(outputs), vectors(by_ids), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", ["false", "no", 2], ids=str)
def test_use_activation_is_a_bool(value: Any) -> None:
    with pytest.raises(BadRequest, match=f"use_activation must be true or false, got {value!r}"):
        PoolingParams(use_activation=value)


def test_the_task_of_parameters(llm: LLM) -> None:
    params = PoolingParams(task="token_embed")
    for given in (params, [params] * 2, deque([params] * 2)):
        outputs = llm.encode(SHORT[:2], given, use_tqdm=False)
        assert [len(output.outputs.data) for output in outputs] == [len(ids) for ids in IDS[:2]]
    with pytest.raises(BadRequest, match="pooling_params name the task 'embed', and the call has 'classify'"):
        llm.classify(SHORT[0], pooling_params=PoolingParams(task="embed"), use_tqdm=False)


def test_the_task_of_parameters_that_score(llm: LLM) -> None:
    """The task by which pairs are scored may have its own name; another one would be without effect."""
    expected = llm.score("a", ["b"], use_tqdm=False)[0].outputs.score
    for task in ("score", "embed"):
        (output,) = llm.score("a", ["b"], pooling_params=PoolingParams(task=task), use_tqdm=False)
        assert output.outputs.score == expected
    sentence = "pooling_params name the task 'classify', and the call has 'score'; leave one of them out"
    for method in (llm.score, llm.rerank):
        with pytest.raises(BadRequest, match=sentence):
            method("a", ["b"], pooling_params=PoolingParams(task="classify"), use_tqdm=False)


def test_scoring_arguments_of_another_kind(llm: LLM) -> None:
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "parameters": ({"pooling_params": [PoolingParams()]}, "this call takes one `PoolingParams`, not a list"),
        "further": ({"pooling_params": PoolingParams(extra_kwargs="foo")}, "extra_kwargs must be a Mapping, got 'foo'"),  # type: ignore[arg-type]
        "template": ({"chat_template": 3}, "chat_template must be a str, got 3"),
        "variables": ({"chat_template_kwargs": [1]}, r"chat_template_kwargs must be a Mapping, got \[1\]"),
        "way": ({"score_type": ["bi"]}, r"score_type must be one of cross-encoder, .*, got \['bi'\]"),
        "adapter": ({"lora_request": "law"}, "got 'law', expected a LoRARequest"),
    }
    for options, message in wrong.values():
        with pytest.raises(BadRequest, match=message):
            llm.score("a", "b", use_tqdm=False, **options)
        with pytest.raises(BadRequest, match=message):
            llm.rerank("a", ["b"], use_tqdm=False, **options)


def test_a_task_that_is_named_twice_counts_once(llm: LLM) -> None:
    (twice,) = llm.encode(SHORT[0], pooling_task=["embed", "token_embed", "embed"], use_tqdm=False)
    assert list(twice.outputs.others) == ["token_embed"]
    assert twice.outputs.data.shape == (checkpoints.HIDDEN,)


def test_without_special_tokens(llm: LLM) -> None:
    (output,) = llm.encode(
        SHORT[1], pooling_task="embed", tokenization_kwargs={"add_special_tokens": False}, use_tqdm=False
    )
    assert output.prompt_token_ids == IDS[1][1:-1]


# --- progress ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["embed", "encode"])
def test_progress_bar(llm: LLM, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(llm, method)(SHORT)
    shown = capsys.readouterr().err
    assert f"{len(SHORT)}/{len(SHORT)}" in shown
    assert "100%" in shown
    getattr(llm, method)(SHORT, use_tqdm=False)
    assert capsys.readouterr().err == ""


# --- faults --------------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no prompts": ([], {}, "^You must pass at least one prompt$"),
    "empty ids": ([[]], {}, "^The decoder prompt cannot be empty$"),
    "not a prompt": ([3.5], {}, "a prompt is text or a list of token ids, got float"),
    "not iterable": (7, {}, "a prompt is text or a list of token ids, got int"),
    "negative id": ([5, -2], {}, "Token id -2 is out of vocabulary"),
    "id too large": ([5, 99999], {}, r"Token id 99999 is out of vocabulary; .* takes ids from 0 to \d+\. Send text"),
    "unknown key": ({"promt": "a"}, {}, r"keys that are not supported: \['promt'\]"),
    "media": ({"prompt": "a", "multi_modal_data": {"image": 1}}, {}, "takes no images, only texts"),
    "unknown tokenization": (
        "a",
        {"tokenization_kwargs": {"truncation_sid": "left"}},
        "unknown tokenization argument 'truncation_sid'; did you mean 'truncation_side'?",
    ),
    "side": ("a", {"tokenization_kwargs": {"truncation_side": "top"}}, "truncation_side must be 'left' or 'right'"),
    "padding": ("a", {"tokenization_kwargs": {"padding": "longest"}}, "padding must be 'max_length' or 'do_not_pad'"),
    "truncation": ("a", {"tokenization_kwargs": {"truncation": "only_first"}}, "truncation must be True, False, 'long"),
    "length alone": ("a", {"tokenization_kwargs": {"max_length": 8}}, "max_length is for truncation=True, without"),
    "padding to a length": (
        "a",
        {"tokenization_kwargs": {"padding": "max_length", "max_length": 32}},
        "max_length is for truncation=True, without truncate_prompt_tokens; got {'padding': 'max_length', 'max_len",
    ),
    "cut and whole": (
        "a",
        {"tokenization_kwargs": {"truncate_prompt_tokens": 4, "truncation": False}},
        "truncate_prompt_tokens cuts, and truncation=False does not",
    ),
    "special tokens": ("a", {"tokenization_kwargs": {"add_special_tokens": "no"}}, "must be True or False, got 'no'"),
    "a length below": (
        "a",
        {"tokenization_kwargs": {"truncation": True, "max_length": -2}},
        "max_length must be an integer >= -1, got -2",
    ),
    "two lengths": (
        "a",
        {"tokenization_kwargs": {"truncation": True, "max_length": 8, "truncate_prompt_tokens": 5}},
        "max_length is for truncation=True, without truncate_prompt_tokens",
    ),
    "tokenization of another kind": ("a", {"tokenization_kwargs": 5}, "tokenization_kwargs must be a Mapping, got 5"),
    "a key that is no name": ("a", {"tokenization_kwargs": {1: 2}}, "unknown tokenization argument '1'"),
    "parameters of another kind": ("a", {"pooling_params": 5}, "pooling_params must be a Pool.* list .* 5"),
    "parameters for one prompt": (["a", "b"], {"pooling_params": [None, PoolingParams()]}, "pooling_params must be"),
    "a prompt of another kind": ("a", {"prompt": 3}, "prompt must be a str, got 3"),
    "a name of another kind": ("a", {"prompt_name": ["query"]}, r"prompt_name must be a str, got \['query'\]"),
    "an adapter of another kind": ("a", {"lora_request": "law"}, "got 'law', expected a LoRARequest or one for each"),
    "a number for adapters": ("a", {"lora_request": 3}, "got 3, expected a LoRARequest or one for each prompt"),
    "truncate below": (
        "a",
        {"tokenization_kwargs": {"truncate_prompt_tokens": -2}},
        "truncate_prompt_tokens must be an integer >= -1, got -2",
    ),
    "truncate text": ("a", {"tokenization_kwargs": {"truncate_prompt_tokens": "5"}}, "an integer >= -1, got '5'"),
    "truncate bool": ("a", {"tokenization_kwargs": {"truncate_prompt_tokens": True}}, "an integer >= -1, got True"),
    "truncate above": ("a", {"tokenization_kwargs": {"truncate_prompt_tokens": 65}}, "greater than max_model_len"),
    "dimensions": ("a", {"pooling_params": PoolingParams(dimensions=4)}, "does not support Matryoshka embeddings"),
    "another task": (
        "a",
        {"pooling_params": PoolingParams(task="classify"), "pooling_task": "embed"},
        "pooling_params name the task 'classify', and the call has 'embed'; leave one of them out",
    ),
    "two tasks": (
        ["a", "b"],
        {"pooling_params": [PoolingParams(task="token_embed"), PoolingParams(task="embed")]},
        "pooling_params name the task '(token_)?embed', and the call has",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("prompts", "options", "sentence"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("method", ["embed", "encode"])
def test_faults(llm: LLM, method: str, prompts: Any, options: dict[str, Any], sentence: str) -> None:
    if method == "embed":
        options = {name: value for name, value in options.items() if name != "pooling_task"}
    with pytest.raises(BadRequest, match=sentence) as caught:
        getattr(llm, method)(prompts, use_tqdm=False, **options)
    assert isinstance(caught.value, ValueError)
    assert caught.value.status == 400


def test_too_long(llm: LLM) -> None:
    (count,) = (len(ids) for ids in WHOLE if len(ids) > checkpoints.POSITIONS)
    sentence = f"maximum context length is 64 tokens. However, your prompt contains {count} input tokens"
    with pytest.raises(TooLong, match=sentence):
        llm.embed(TEXTS, use_tqdm=False)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("classify", r"Unsupported task: 'classify' Supported tasks: \('embed', 'token_embed'\)"),
        ("score", "`score` task was removed; use `classify` instead"),
        ("encode", "`encode` task was removed; use `token_embed` or `token_classify` instead"),
    ],
)
def test_tasks_that_are_not_offered(llm: LLM, task: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        llm.encode("a", pooling_task=task, use_tqdm=False)


# --- older spellings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["embed", "embedding", "token_embed"])
def test_task_of_older_releases(folder: Path, task: str) -> None:
    with pytest.warns(FutureWarning) as warned:
        made = LLM(model=str(folder), task=task)
    assert [str(warning.message) for warning in warned] == [
        f"task={task!r} is the spelling of older releases of vLLM; tasks follow from the model, and convert or "
        "pooler_config.task say what does not"
    ]
    assert warned[0].filename == __file__, "the warning points at the caller"
    meant = "token_embed" if task == "token_embed" else "embed"
    with made:
        assert made.info.default_task == meant
        (output,) = made.encode("Hello, my name is", use_tqdm=False)
        (named,) = made.encode("Hello, my name is", pooling_task=meant, use_tqdm=False)
    np.testing.assert_allclose(output.outputs.data, named.outputs.data, rtol=0, atol=1e-6)
    tokens = len(output.prompt_token_ids)
    assert output.outputs.data.shape == ((tokens, checkpoints.HIDDEN) if "token" in meant else (checkpoints.HIDDEN,))


def test_task_score_of_older_releases_is_what_the_model_does(folder: Path) -> None:
    with pytest.warns(FutureWarning, match="^task='score' is the spelling"):
        made = LLM(model=str(folder), task="score")
    with made:
        assert (made.info.default_task, made.info.score_types[0]) == ("embed", "bi-encoder")


@pytest.mark.filterwarnings("ignore:task=:FutureWarning")
@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"task": "generate"}, ConfigError, "task: unknown task 'generate'; known are: classify, embed, embedding, "),
        ({"task": "encode"}, ConfigError, "task: `encode` task was removed; use `token_embed` or `token_classify`"),
        ({"task": "classify"}, CheckpointError, "convert 'classify' needs a head: BertModel has no score.weight"),
        ({"task": "reward"}, CheckpointError, "the task asked for is 'reward', but .* offers embed, token_embed$"),
        ({"task": "token_classify"}, CheckpointError, "the task asked for is 'token_classify', but .* offers embed, "),
        (
            {"task": "embed", "convert": "classify"},
            ConfigError,
            "task 'embed' means convert 'embed', but convert is 'classify'",
        ),
    ],
    ids=["generate", "encode", "classify", "reward", "token_classify", "two conversions"],
)
def test_tasks_of_older_releases_that_cannot_be(
    folder: Path, options: dict[str, str], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        LLM(model=str(folder), **options)


def test_options_without_effect_are_noted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cenote"), LLM(model=str(folder), seed=7, tensor_parallel_size=1):
        pass
    assert "seed has no effect: nothing is sampled" in caplog.messages


# --- when something raises, and at the end -------------------------------------------------------------------------


class _Gate:
    """Holds the model's forward until it is opened."""

    def __init__(self, made: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        model = made._service.engine._model  # type: ignore[attr-defined]
        launch = model.launch

        def held(sequences: Any) -> Any:
            self.entered.set()
            assert self.open.wait(PATIENCE)
            return launch(sequences)

        monkeypatch.setattr(model, "launch", held)


def test_an_exception_cancels_the_rest(llm: LLM, means: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cenote.calls, "RENDERED_AT_ONCE", 2)
    engine = llm._service.engine
    submit = engine.submit
    futures: list[Future[Any]] = []

    def submitted(*args: Any, **kwargs: Any) -> Future[Any]:
        futures.append(submit(*args, **kwargs))
        return futures[-1]

    gate = _Gate(llm, monkeypatch)
    monkeypatch.setattr(engine, "submit", submitted)
    with pytest.raises(BadRequest, match="out of vocabulary"):
        llm.embed([*SHORT[:4], [99999], *SHORT[4:]], use_tqdm=False)
    assert [future.cancelled() for future in futures] == [True, True]
    gate.open.set()
    close(vectors(llm.embed(SHORT, use_tqdm=False)), means)


def test_a_forward_that_raises_fails_its_own_call(llm: LLM, means: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> None:
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(llm._service.engine._model, "launch", broken)  # type: ignore[attr-defined]
        with pytest.raises(EngineFailed, match="the forward pass failed: RuntimeError") as failure:
            llm.embed(SHORT, use_tqdm=False)
    assert str(failure.value.__cause__) == "the device is on fire"
    close(vectors(llm.embed(SHORT, use_tqdm=False)), means)


def test_values_that_are_not_finite_fail_their_call(folder: Path) -> None:
    """One token's embedding is damaged: who uses it gets an error, and nobody a NaN."""
    token = checkpoints.wordpiece().convert_tokens_to_ids("water")
    with LLM(model=str(folder)) as made:
        backbone = made._service.engine._model.layout.backbone.model  # type: ignore[attr-defined]
        with torch.no_grad():
            backbone.get_input_embeddings().weight[token] = torch.inf
        assert np.isfinite(vectors(made.embed("stone", use_tqdm=False))).all()
        with pytest.raises(EngineFailed, match="values that are not finite"):
            made.embed(["stone", "water"], use_tqdm=False)
        assert np.isfinite(vectors(made.embed("stone", use_tqdm=False))).all()


def test_calls_from_many_threads(llm: LLM, means: np.ndarray) -> None:
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda _: vectors(llm.embed(SHORT, use_tqdm=False)), range(18)))
    for rows in found:
        close(rows, means)


def test_close(folder: Path) -> None:
    made = LLM(model=str(folder))
    made.embed("a", use_tqdm=False)
    made.close()
    made.close()
    with pytest.raises(Closed, match="shutting down"):
        made.embed("a", use_tqdm=False)


def test_a_forgotten_llm_stops_its_thread(folder: Path) -> None:
    made = LLM(model=str(folder))
    made.embed("a", use_tqdm=False)
    thread, gone = made._service.engine._threads[0], weakref.ref(made)  # type: ignore[attr-defined]
    assert thread.is_alive()
    del made
    gc.collect()
    thread.join(PATIENCE)
    assert gone() is None
    assert not thread.is_alive()


def test_an_open_llm_does_not_disturb_the_interpreters_exit(folder: Path) -> None:
    program = (
        "import sys, cenote\n"
        "made = cenote.LLM(model=sys.argv[1])\n"
        "made.embed(['a'] * 50, use_tqdm=False)\n"
        "made._service.engine.submit(made._service.renderer.render(['b'] * 500, 'embed', cenote.PoolingParams()))\n"
    )
    done = forked.run(program, str(folder))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


# --- other checkpoints ---------------------------------------------------------------------------------------------


def test_a_decoder_with_a_chat_template(tmp_path: Path) -> None:
    folder = checkpoints.decoder(tmp_path)
    with LLM(model=str(folder), chat_template="{{ messages[0].content }}!") as made:
        assert made.get_tokenizer().chat_template == "{{ messages[0].content }}!"
        (output,) = made.embed("name", use_tqdm=False)
    assert output.prompt_token_ids[-1] == made.get_tokenizer().eos_token_id
    (tmp_path / "template.jinja").write_text("{{ messages[0].content }}?")
    with LLM(model=str(folder), chat_template=str(tmp_path / "template.jinja")) as made:
        assert made.get_tokenizer().chat_template == "{{ messages[0].content }}?"


def test_a_python_tokenizer(tmp_path: Path) -> None:
    folder = checkpoints.bert(tmp_path, tokenizer=ByT5Tokenizer())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not tokenizer.is_fast
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    expected = []
    for text in SHORT[:4]:
        with torch.inference_mode():
            inputs = tokenizer(text, truncation=True, max_length=checkpoints.POSITIONS, return_tensors="pt")
            expected.append(unit(model(input_ids=inputs["input_ids"]).last_hidden_state[0, 0].numpy()))
    with LLM(model=str(folder)) as made:
        close(vectors(made.embed(SHORT[:4], use_tqdm=False)), np.stack(expected))


def test_data_is_for_plugins(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"keys that are not supported: \['data'\]"):
        llm.embed({"data": 1}, use_tqdm=False)
    with pytest.raises(ValueError, match="No IOProcessor plugin installed"):
        llm.encode({"data": 1}, use_tqdm=False)


def test_threads_are_those_of_the_forward(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, seen = torch.get_num_threads(), list[int]()
    try:
        with LLM(model=str(folder), threads=mine + 2) as made:
            model = made._service.engine._model  # type: ignore[attr-defined]
            launch = model.launch
            monkeypatch.setattr(model, "launch", lambda s: (seen.append(torch.get_num_threads()), launch(s))[1])
            made.embed("a", use_tqdm=False)
            assert (seen, torch.get_num_threads()) == ([mine + 2], mine)
    finally:
        torch.set_num_threads(mine)
    with pytest.raises(ConfigError, match="threads: Input should be greater than or equal to 1"):
        LLM(model=str(folder), threads=0)


def test_streams_give_what_one_gives(folder: Path) -> None:
    texts = [f"{text} {number}" for number in range(20) for text in SHORT]
    vectors = []
    for streams in (1, 2, 3):
        with LLM(model=str(folder), threads=3, streams=streams, max_num_batched_tokens=64) as made:
            info = made._service.engine.info
            assert (info.report.streams, info.report.warnings) == (streams, ())
            vectors.append(np.array([o.outputs.embedding for o in made.embed(texts, use_tqdm=False)]))
    assert np.abs(vectors[1] - vectors[0]).max() <= 1e-6
    assert np.abs(vectors[2] - vectors[0]).max() <= 1e-6


def test_a_model_that_remembers_runs_one_batch_at_a_time_and_says_so(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    checkpoints.decoder(tmp_path, rope_parameters=rope, max_position_embeddings=32)
    with LLM(model=str(tmp_path), runner="pooling", threads=2, streams=2, max_model_len=64) as made:
        info = made._service.engine.info
        assert info.report.streams == 1
        told = "runs one batch at a time, because its rotary frequencies"
        assert [note for note in info.report.warnings if told in note]
        short, long = "one two", "one two " * 6
        (alone,) = made.embed([short], use_tqdm=False)
        _, again, _ = made.embed([long, short, long], use_tqdm=False)
    assert np.allclose(alone.outputs.embedding, again.outputs.embedding, atol=1e-5)
