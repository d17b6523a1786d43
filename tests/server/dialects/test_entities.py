"""`/v1/token_classify`: entities equal to those of `LLM.token_classify` and of Transformers' pipeline, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from starlette.testclient import TestClient
from transformers import AutoModelForTokenClassification, AutoTokenizer, TokenClassificationPipeline

from cenote import LLM
from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.engine.fake import FakeEngine
from cenote.errors import BadRequest, EngineFailed
from cenote.pipeline.entities import AGGREGATIONS
from cenote.pipeline.pipeline import Service
from cenote.server.app import build
from cenote.server.wire.entities import form
from tests import checkpoints
from tests.conftest import CLASSIFIER, CROSS_ENCODER, classes, error, floats, usage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Serve

ROUTES = ("/v1/token_classify", "/token_classify")
ROUTE = ROUTES[0]
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
TEXTS = [
    "Hello, my name is (the) fox-hound; over one/two!",
    "  two   spaces,\tand\na line  ",
    "naïve CAFÉ — 水 and 🐟",
    "one two three four five six seven eight nine ten water stone",
    "",
]
CLS, SEP, HELLO, WORLD = 101, 102, 7592, 2088


def post(client: TestClient, given: Any, path: str = ROUTE, **fields: Any) -> Any:
    answer = client.post(path, json={"input": given, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def found(client: TestClient, given: Any, **fields: Any) -> list[list[dict[str, Any]]]:
    return [entry["entities"] for entry in post(client, given, **fields)["data"]]


# --- a real model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ner")
    return checkpoints.classifier(root, head="ForTokenClassification", seed=5, id2label=dict(enumerate(LABELS)))


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    service = Service.open(ModelConfig(model=str(folder), served_model_name=("ner",)), EngineConfig())
    with TestClient(build([service], ServerConfig())) as made:
        yield made


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder)) as made:
        yield made


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> TokenClassificationPipeline:
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    return TokenClassificationPipeline(model=model, tokenizer=AutoTokenizer.from_pretrained(folder))


def same(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    """Equal but for rounding of the scores."""
    scores = [[float(entity["score"]) for entity in one] for one in (got, wanted)]
    rest = [[{**entity, "score": 0} for entity in one] for one in (got, wanted)]
    return rest[0] == rest[1] and bool(np.allclose(*scores, rtol=0, atol=1e-5))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_entities_are_those_of_the_pipeline_and_of_llm(
    client: TestClient, llm: LLM, pipeline: TokenClassificationPipeline, aggregation: str
) -> None:
    got = found(client, TEXTS, aggregation_strategy=aggregation)
    own = llm.token_classify(TEXTS, aggregation_strategy=aggregation, use_tqdm=False)
    for text, here, there in zip(TEXTS, got, own, strict=True):
        assert same(here, pipeline(text, aggregation_strategy=aggregation)), text
        assert same(here, [form(entity) for entity in there.outputs]), text
    kinds = {entity.get("entity", entity.get("entity_group")) for one in got for entity in one}
    assert len(kinds) > 1, "one kind of entity in all texts: this proves little"


def test_strategies_differ(client: TestClient) -> None:
    """So that no test above passes by using another one."""
    seen = [str(found(client, TEXTS, aggregation_strategy=aggregation)) for aggregation in AGGREGATIONS]
    assert len(set(seen)) == len(AGGREGATIONS)


@pytest.mark.parametrize("ignored", [[], ["O", "B-PER"], ["PER"]], ids=str)
@pytest.mark.parametrize("aggregation", ["none", "simple"])
def test_ignored_labels(
    client: TestClient, llm: LLM, pipeline: TokenClassificationPipeline, aggregation: str, ignored: list[str]
) -> None:
    (got,) = found(client, TEXTS[0], aggregation_strategy=aggregation, ignore_labels=ignored)
    options = {"aggregation_strategy": aggregation, "ignore_labels": ignored}
    (own,) = llm.token_classify(TEXTS[0], use_tqdm=False, **options)
    assert same(got, pipeline(TEXTS[0], **options))
    assert same(got, [form(entity) for entity in own.outputs])


@pytest.mark.parametrize("path", ROUTES)
def test_answer(client: TestClient, path: str) -> None:
    tokens = sum(len(checkpoints.wordpiece()(text)["input_ids"]) for text in TEXTS)
    answer = client.post(path, json={"input": TEXTS, "user": "u", "new": 1}, headers={"X-Request-Id": "r"}).json()
    assert isinstance(answer["created"], int)
    assert list(answer) == ["id", "object", "created", "model", "data", "usage"]
    assert (answer["id"], answer["object"], answer["model"]) == ("token_classify-r", "list", "ner")
    assert [{**entry, "entities": None} for entry in answer["data"]] == [
        {"index": i, "object": "token_classify", "entities": None} for i in range(len(TEXTS))
    ]
    assert answer["data"][-1]["entities"] == []
    assert answer["usage"] == usage(tokens)


def test_keys_of_tokens_and_of_groups(client: TestClient) -> None:
    (tokens,), (groups,) = (found(client, TEXTS[0], aggregation_strategy=kind) for kind in ("none", "simple"))
    assert list(tokens[0]) == ["entity", "score", "index", "word", "start", "end"]
    assert list(groups[0]) == ["entity_group", "score", "word", "start", "end"]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_offsets_point_into_the_text(client: TestClient, aggregation: str) -> None:
    for text, one in zip(TEXTS, found(client, TEXTS, aggregation_strategy=aggregation, ignore_labels=[]), strict=True):
        assert "".join(text.split()) == "".join("".join(text[e["start"] : e["end"]].split()) for e in one)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_text_that_is_cut(client: TestClient, llm: LLM, aggregation: str) -> None:
    text = TEXTS[3]
    options = {"aggregation_strategy": aggregation, "ignore_labels": []}
    answer = post(client, text, truncate_prompt_tokens=7, **options)
    (got,) = (entry["entities"] for entry in answer["data"])
    kept = "one two three four five"
    assert answer["usage"]["prompt_tokens"] == 7
    assert got[-1]["end"] == len(kept)
    assert same(got, found(client, kept, **options)[0])
    (own,) = llm.token_classify(text, use_tqdm=False, tokenization_kwargs={"truncate_prompt_tokens": 7}, **options)
    assert same(got, [form(entity) for entity in own.outputs])


def test_a_text_that_is_too_long_is_cut_only_when_asked(client: TestClient) -> None:
    long = "one two " * 40
    assert error(client, {"input": long}, ROUTE)["param"] == "input_tokens"
    answer = post(client, long, truncate_prompt_tokens=-1, ignore_labels=[])
    assert answer["usage"]["prompt_tokens"] == 64
    assert len(answer["data"][0]["entities"]) == 62
    assert same(answer["data"][0]["entities"], found(client, "one two " * 31, ignore_labels=[])[0])


@pytest.mark.parametrize("repeated", [60, 400], ids="times {}".format)
def test_a_text_that_loses_its_beginning(tmp_path: Path, repeated: int) -> None:
    """Of a long one only an end is tokenised; characters are those of the whole text."""
    tokenizer = checkpoints.wordpiece(truncation_side="left")
    folder = checkpoints.classifier(
        tmp_path, head="ForTokenClassification", tokenizer=tokenizer, seed=5, id2label=dict(enumerate(LABELS))
    )
    end = "three four five"
    text = "one two " * repeated + end
    options = {"ignore_labels": [], "use_tqdm": False}
    with LLM(str(folder)) as llm:
        (cut,) = llm.token_classify(text, tokenization_kwargs={"truncate_prompt_tokens": 5}, **options)
        (alone,) = llm.token_classify(end, **options)
    moved = len(text) - len(end)
    assert [text[entity.start : entity.end] for entity in cut.outputs] == end.split()
    assert [(e.start - moved, e.end - moved, e.word, e.label) for e in cut.outputs] == [
        (e.start, e.end, e.word, e.label) for e in alone.outputs
    ]


# --- what is refused ---------------------------------------------------------------------------------------------

WITHOUT_HEAD = (
    "Unsupported task: 'token_classify' Supported tasks: ('embed', 'token_embed'). Classification API is not supported "
    "by this model. It needs a checkpoint with a head for tokens (*ForTokenClassification, *RewardModel), or a "
    "language model and `--convert classify`."
)


@pytest.mark.parametrize("path", ROUTES)
def test_a_model_without_a_head(serve: Serve, path: str) -> None:
    assert error(serve(), {"input": "hello"}, path) == {
        "message": WITHOUT_HEAD,
        "type": "BadRequestError",
        "param": "task",
        "code": 400,
    }


@pytest.mark.parametrize(
    ("info", "rates"),
    [
        (replace(CROSS_ENCODER, labels=()), "tokens"),
        (replace(CLASSIFIER, step=True), "steps"),
    ],
    ids=["no labels", "steps"],
)
def test_a_model_whose_rows_are_no_labelled_tokens(serve: Serve, info: Any, rates: str) -> None:
    engine = FakeEngine(info)
    assert error(serve(engine), {"input": "hello"}, ROUTE) == {
        "message": f"fake rates {rates} and has no labels that would be entities; task token_classify of /pooling and "
        "LLM.encode gives its numbers",
        "type": "BadRequestError",
        "param": "task",
        "code": 400,
    }
    assert not engine.submitted


def test_a_reward_model_names_no_entities_offline(tmp_path: Path) -> None:
    folder = checkpoints.decoder(tmp_path, "Qwen3Model")
    checkpoints.add_head(folder, "Qwen2ForRewardModel", checkpoints.two_layers(1))
    with LLM(str(folder)) as llm, pytest.raises(BadRequest, match="rates tokens and has no labels that would be"):
        llm.token_classify("hello", use_tqdm=False)


AGGREGATION = "unknown aggregation_strategy 'word'; known are: none, simple, first, average, max"


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"input": "a", "aggregation_strategy": "word"}, AGGREGATION, "aggregation_strategy"),
        ({"input": "a", "softmax": True}, "Parameter `softmax` was removed; use `use_activation` instead.", "softmax"),
        ({"input": "a", "truncation_side": "left"}, "`truncation_side` and `padding` are not", "truncation_side"),
        ({"input": "a", "padding": "max_length"}, "`truncation_side` and `padding` are not", "truncation_side"),
        ({"input": "a", "mm_processor_kwargs": {"a": 1}}, "`mm_processor_kwargs` is not", "mm_processor_kwargs"),
        ({"input": ["a", "one " * 63]}, "This model's maximum context length is 64 tokens.", "input_tokens"),
        ({"input": "a", "truncate_prompt_tokens": 65}, "truncate_prompt_tokens value is", "truncate_prompt_tokens"),
        ({"input": "\ud800"}, "text must be valid Unicode, without lone surrogates", "input"),
    ],
    ids=lambda value: str(value).encode(errors="replace").decode()[:60] if isinstance(value, dict) else "",
)
def test_refused_by_meaning(serve: Serve, body: dict[str, Any], message: str, param: str) -> None:
    given = error(serve(info=CLASSIFIER), body, ROUTE)
    assert given["message"].startswith(message)
    assert (given["code"], given["param"]) == (400, param)


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        ({}, "missing", "body.input"),
        ({"input": []}, "too_short", "body.input"),
        ({"input": [5, 6]}, "string_type", "body.input"),
        ({"input": [["a"]]}, "string_type", "body.input"),
        ({"input": "a", "ignore_labels": "O"}, "list_type", "body.ignore_labels"),
        ({"input": "a", "aggregation_strategy": 5}, "string_type", "body.aggregation_strategy"),
    ],
    ids=str,
)
def test_refused_by_type(serve: Serve, body: dict[str, Any], kind: str, param: str) -> None:
    given = error(serve(info=CLASSIFIER), body, ROUTE)
    assert f"'type': '{kind}'" in given["message"]
    assert (given["code"], given["type"], given["param"].split(".")[:2]) == (400, "Bad Request", param.split("."))


def test_too_many_texts(serve: Serve) -> None:
    engine = FakeEngine(CLASSIFIER)
    client = serve(engine, max_client_batch_size=2)
    assert error(client, {"input": ["a"] * 3}, ROUTE)["message"] == "the request has 3 inputs; at most 2 are allowed"
    assert not engine.submitted


def test_unknown_model_and_failing_engine(serve: Serve) -> None:
    client = serve(FakeEngine(CLASSIFIER, failures=[EngineFailed("boom")]))
    assert error(client, {"input": "a", "model": "other"}, ROUTE)["code"] == 404
    assert error(client, {"input": "a"}, ROUTE)["code"] == 500


def test_labels_and_scores_are_those_of_the_largest_probability(serve: Serve) -> None:
    """They are the softmax of the logits, whatever the server's default of `use_activation`."""
    engine = FakeEngine(replace(CLASSIFIER, classifies=False))
    (got,) = found(serve(engine), "hello world", ignore_labels=[])
    values = [classes([token]) for token in (HELLO, WORLD)]
    assert [(e["entity"], floats(e["score"]), e["index"]) for e in got] == [
        (CLASSIFIER.labels[int(np.argmax(own))], max(own), i) for i, own in enumerate(values, 1)
    ]
    assert [sequence.params.use_activation for sequence in engine.submitted] == [False]
