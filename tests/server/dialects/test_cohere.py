"""`/v2/embed` and `/v1/embed`: bodies key by key, what reaches the engine, refusals, and Cohere's own client."""

from __future__ import annotations

import base64
import json
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cohere
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

from cenote.engine.fake import FakeEngine
from cenote.models.hub import embedded
from cenote.pipeline.pipeline import Service
from cenote.pipeline.prompts import Prompts
from cenote.pipeline.rendering import Renderer
from cenote.tensors.quantize import Ranges, quantize
from material import corpus
from tests.conftest import INFO, error, expected, floats
from tests.server.test_process import Process, close_to

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.testclient import TestClient
    from transformers import PreTrainedTokenizerBase

    from cenote.core import ModelInfo
    from tests.conftest import Serve

ROUTE = "/v2/embed"
CLS, SEP = 101, 102
HELLO, WORLD, ONE, TWO, THREE, FOUR = 7592, 2088, 2028, 2048, 2093, 2176
COUNT = "one two three four"
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
SYSTEM, USER = 2291, 5310
ONE_OF = "Exactly one of texts, images, or inputs must be provided, and it must be non-empty"
IMAGE = "data:image/png;base64,aGVsbG8="
NO_IMAGES = (
    f"{INFO.architecture} takes no images, only texts: send `texts`, or `inputs` whose content has the type 'text'"
)


def content(*texts: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": text} for text in texts]}


@pytest.fixture
def prompted(serve: Serve, tokenizer: PreTrainedTokenizerBase) -> Prompted:
    return Prompted(serve, tokenizer)


class Prompted:
    """Starts a server over a fake engine that has prompts, ranges or a template."""

    def __init__(self, serve: Serve, tokenizer: PreTrainedTokenizerBase) -> None:
        self.serve, self.tokenizer = serve, tokenizer

    def __call__(
        self,
        prompts: dict[str, str] | None = None,
        *,
        default: str | None = None,
        template: str | None = None,
        info: ModelInfo = INFO,
        ranges: Ranges | None = None,
        auto_truncate: bool = False,
    ) -> TestClient:
        tokenizer = copy(self.tokenizer)
        tokenizer.chat_template = template
        named = Prompts(prompts or {}, default)
        renderer = Renderer(tokenizer, info, prompts=named, auto_truncate=auto_truncate)
        return self.serve.of(Service(FakeEngine(info), renderer, ("fake",), ranges=ranges))


def embed(client: TestClient, **body: Any) -> Any:
    answer = client.post(ROUTE, json=body, headers={"X-Request-Id": "r1"})
    assert answer.status_code == 200, answer.text
    return answer.json()


def vectors(client: TestClient, **body: Any) -> Any:
    return floats(embed(client, **body)["embeddings"]["float"])


def test_body_key_by_key(client: TestClient) -> None:
    answer = client.post(
        ROUTE, json={"model": "fake", "texts": ["hello", "hello world"]}, headers={"X-Request-Id": "r"}
    )
    body = answer.json()
    body["embeddings"]["float"] = floats(body["embeddings"]["float"])
    assert answer.headers["content-type"] == "application/json"
    assert body == {
        "id": "embd-r",
        "embeddings": {"float": [expected([CLS, HELLO, SEP]), expected([CLS, HELLO, WORLD, SEP])]},
        "texts": ["hello", "hello world"],
        "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 7, "image_tokens": 0}},
        "response_type": "embeddings_by_type",
    }
    assert list(body) == ["id", "embeddings", "texts", "meta", "response_type"]


def test_every_type(client: TestClient) -> None:
    types = ["ubinary", "float", "base64", "int8", "uint8", "binary", "float"]
    got = embed(client, texts=["hello", "world"], embedding_types=types)["embeddings"]
    rows = np.array([expected([CLS, HELLO, SEP]), expected([CLS, WORLD, SEP])], np.float32)
    ranges = Ranges.unit(8)
    assert list(got) == ["ubinary", "float", "base64", "int8", "uint8", "binary"]
    assert floats(got["float"]) == rows.tolist()
    assert got["ubinary"] == np.packbits(rows >= 0, axis=1).tolist()
    assert got["binary"] == (np.packbits(rows >= 0, axis=1).astype(int) - 128).tolist()
    for name in ("int8", "uint8"):
        stacked = np.stack([ranges.low_D, ranges.high_D])
        assert got[name] == quantize_embeddings(rows, name, ranges=stacked).tolist()
    assert [np.frombuffer(base64.b64decode(text), "<f4").tolist() for text in got["base64"]] == rows.tolist()


@pytest.mark.parametrize("types", [None, []])
def test_float_is_the_default(client: TestClient, types: Any) -> None:
    assert list(embed(client, texts=["hello"], embedding_types=types)["embeddings"]) == ["float"]


def test_calibrated_ranges(prompted: Prompted) -> None:
    ranges = Ranges(np.full(8, -0.5), np.linspace(0.1, 0.5, 8))
    got = embed(prompted(ranges=ranges), texts=["hello"], embedding_types=["int8"])["embeddings"]["int8"]
    row = np.array([expected([CLS, HELLO, SEP])], np.float32)
    assert got == quantize(row, "int8", ranges).tolist() != quantize(row, "int8").tolist()


def test_the_neighbours_of_a_text_do_not_change_its_code(client: TestClient) -> None:
    alone = embed(client, texts=["hello"], embedding_types=["int8"])["embeddings"]["int8"]
    among = embed(client, texts=["world", "hello", COUNT], embedding_types=["int8"])["embeddings"]["int8"]
    assert alone[0] == among[1]


def test_unknown_fields_and_priority_change_nothing(client: TestClient) -> None:
    got = vectors(client, texts=["hello"], priority=7, no_such_field=1, images=None, inputs=[])
    assert got == [expected([CLS, HELLO, SEP])]


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({}, [CLS, ONE, TWO, THREE, FOUR, SEP]),
        ({"max_tokens": 4}, [CLS, ONE, TWO, SEP]),
        ({"max_tokens": 4, "truncate": "END"}, [CLS, ONE, TWO, SEP]),
        ({"max_tokens": 4, "truncate": "START"}, [TWO, THREE, FOUR, SEP]),
        ({"max_tokens": 6, "truncate": "NONE"}, [CLS, ONE, TWO, THREE, FOUR, SEP]),
        ({"max_tokens": 100, "truncate": "NONE"}, [CLS, ONE, TWO, THREE, FOUR, SEP]),
        ({"max_tokens": 100, "truncate": "START"}, [CLS, ONE, TWO, THREE, FOUR, SEP]),
    ],
    ids=str,
)
def test_truncation(client: TestClient, options: dict[str, Any], ids: list[int]) -> None:
    answer = embed(client, texts=[COUNT], **options)
    assert floats(answer["embeddings"]["float"]) == [expected(ids)]
    assert answer["meta"]["billed_units"]["input_tokens"] == len(ids)


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({}, [CLS, *[ONE] * 62, SEP]),
        ({"truncate": "START"}, [*[ONE] * 63, SEP]),
        ({"max_tokens": 1000}, [CLS, *[ONE] * 62, SEP]),
    ],
    ids=str,
)
def test_longer_than_the_model(client: TestClient, options: dict[str, Any], ids: list[int]) -> None:
    assert vectors(client, texts=["one " * 90], **options) == [expected(ids)]


@pytest.mark.parametrize("auto_truncate", [False, True])
def test_truncate_none_refuses_what_is_too_long(prompted: Prompted, auto_truncate: bool) -> None:
    client = prompted(auto_truncate=auto_truncate)
    found = error(client, {"texts": ["a", "one " * 90], "truncate": "NONE"}, ROUTE)
    assert found["param"] == "input_tokens"
    assert "maximum context length is 64 tokens. However, your prompt contains 92 input tokens" in found["message"]


def test_truncate_none_and_max_tokens(client: TestClient) -> None:
    assert error(client, {"texts": ["a", COUNT], "truncate": "NONE", "max_tokens": 5}, ROUTE) == {
        "message": "Input of 6 tokens exceeds max_tokens=5 with truncate=NONE. "
        "Set truncate to END or START to allow truncation.",
        "type": "BadRequestError",
        "param": "max_tokens",
        "code": 400,
    }


PROMPTS = {"query": "one ", "passage": "two ", "sts": "three "}


@pytest.mark.parametrize(
    ("input_type", "ids"),
    [
        (None, [CLS, HELLO, SEP]),
        ("query", [CLS, ONE, HELLO, SEP]),
        ("search_query", [CLS, ONE, HELLO, SEP]),
        ("search_document", [CLS, TWO, HELLO, SEP]),
        ("sts", [CLS, THREE, HELLO, SEP]),
    ],
)
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_input_type_is_put_before_texts(
    prompted: Prompted, input_type: str | None, ids: list[int], template: str | None
) -> None:
    client = prompted(PROMPTS, template=template)
    assert vectors(client, texts=["hello"], input_type=input_type) == [expected(ids)]
    assert embed(client, texts=["hello"], input_type=input_type)["texts"] == ["hello"], "the echo has no prompt"


def test_the_default_prompt(prompted: Prompted) -> None:
    client = prompted(PROMPTS, default="sts")
    assert vectors(client, texts=["hello"]) == [expected([CLS, THREE, HELLO, SEP])]
    assert vectors(client, texts=["hello"], input_type="query") == [expected([CLS, ONE, HELLO, SEP])]


@pytest.mark.parametrize(
    ("prompts", "known"),
    [
        (PROMPTS, "Supported values: passage, query, sts"),
        ({}, "This model does not define any input_type task instructions."),
    ],
)
def test_unknown_input_type(prompted: Prompted, prompts: dict[str, str], known: str) -> None:
    assert error(prompted(prompts), {"texts": ["hello"], "input_type": "poem"}, ROUTE) == {
        "message": f"Unsupported input_type 'poem'. {known}",
        "type": "BadRequestError",
        "param": "input_type",
        "code": 400,
    }


@pytest.mark.parametrize(
    ("template", "input_type", "ids"),
    [
        (None, None, [CLS, HELLO, WORLD, SEP]),
        (None, "query", [CLS, ONE, HELLO, WORLD, SEP]),
        (TEMPLATE, None, [USER, HELLO, WORLD]),
        (TEMPLATE, "query", [SYSTEM, ONE, USER, HELLO, WORLD]),
    ],
)
def test_inputs(prompted: Prompted, template: str | None, input_type: str | None, ids: list[int]) -> None:
    """With a chat template, parts are a user's message and the prompt a system message; else they are joined."""
    client = prompted(PROMPTS, template=template)
    answer = embed(client, inputs=[content("hello", "world"), content("hello", "world")], input_type=input_type)
    assert floats(answer["embeddings"]["float"]) == [expected(ids)] * 2
    assert answer["meta"]["billed_units"] == {"input_tokens": 2 * len(ids), "image_tokens": 0}
    assert "texts" not in answer


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"texts": []},
        {"images": []},
        {"inputs": []},
        {"texts": None},
        {"texts": ["a"], "images": [IMAGE]},
        {"texts": ["a"], "inputs": [content("a")]},
        {"images": [IMAGE], "inputs": [content("a")]},
    ],
    ids=str,
)
def test_exactly_one_source(client: TestClient, body: dict[str, Any]) -> None:
    assert error(client, body, ROUTE) == {"message": ONE_OF, "type": "Bad Request", "param": "texts", "code": 400}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"images": [IMAGE]}, "images"),
        ({"inputs": [{"content": [{"type": "image_url", "image_url": {"url": IMAGE}}]}]}, "inputs"),
        ({"inputs": [content("a"), {"content": [{"type": "image_url", "image_url": {"url": IMAGE}}]}]}, "inputs"),
    ],
    ids=["images", "inputs", "mixed"],
)
def test_images_are_refused(client: TestClient, body: dict[str, Any], param: str) -> None:
    assert error(client, body, ROUTE) == {
        "message": NO_IMAGES,
        "type": "BadRequestError",
        "param": param,
        "code": 400,
    }


@pytest.mark.parametrize(
    ("body", "words", "param"),
    [
        ({"texts": ["a"], "embedding_types": ["float", "int4"]}, "literal_error", "body.embedding_types.1"),
        ({"texts": ["a"], "embedding_types": "float"}, "list_type", "body.embedding_types"),
        ({"texts": ["a"], "truncate": "MIDDLE"}, "literal_error", "body.truncate"),
        ({"texts": ["a"], "max_tokens": 0}, "greater_than_equal", "body.max_tokens"),
        ({"texts": "a"}, "list_type", "body.texts"),
        ({"texts": ["a"], "priority": 2**63}, "less_than", "body.priority"),
        ({"inputs": [{"content": []}]}, "too_short", "body.inputs.0.content"),
        ({"inputs": [{"content": [{"type": "text"}]}]}, "type='text' requires text", "body.inputs.0.content.0"),
        (
            {"inputs": [{"content": [{"type": "image_url", "image_url": {}}]}]},
            "type='image_url' requires image_url.url",
            "body.inputs.0.content.0",
        ),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_refused_by_form(client: TestClient, body: dict[str, Any], words: str, param: str) -> None:
    found = error(client, body, ROUTE)
    assert words in found["message"]
    assert (found["type"], found["param"], found["code"]) == ("Bad Request", param, 400)


@pytest.mark.parametrize(
    ("matryoshka", "dimension", "fault"),
    [
        (None, 4, "Model 'fake' does not support Matryoshka embeddings; dimensions must be unset "
                  "(received dimensions=4)."),
        ((), 4, None),
        ((), 9, "Model 'fake' only supports dimensions in range [1, 8], got 9."),
        ((2, 4), 4, None),
        ((2, 4), 3, "Model 'fake' only supports Matryoshka dimensions [2, 4], got 3."),
    ],
)  # fmt: skip
def test_output_dimension(serve: Serve, matryoshka: tuple[int, ...] | None, dimension: int, fault: str | None) -> None:
    client = serve(info=replace(INFO, matryoshka=matryoshka))
    body = {"texts": ["hello"], "output_dimension": dimension}
    if fault is None:
        assert vectors(client, **body) == [expected([CLS, HELLO, SEP], dimensions=dimension)]
    else:
        found = error(client, {**body, "embedding_types": ["binary"]}, ROUTE)
        assert found == {"message": fault, "type": "BadRequestError", "param": "output_dimension", "code": 400}


@pytest.mark.parametrize("name", ["binary", "ubinary"])
def test_bits_need_a_multiple_of_8(serve: Serve, name: str) -> None:
    engine = FakeEngine(replace(INFO, dimension=12, matryoshka=()))
    client = serve(engine)
    assert error(client, {"texts": ["hello"], "embedding_types": ["float", name]}, ROUTE) == {
        "message": "Embedding dimension must be a multiple of 8 for binary embedding types, but got 12.",
        "type": "BadRequestError",
        "param": "embedding_types",
        "code": 400,
    }
    assert not engine.submitted
    got = embed(client, texts=["hello"], embedding_types=[name], output_dimension=8)
    assert len(got["embeddings"][name][0]) == 1


def test_int8_of_shortened_vectors(prompted: Prompted) -> None:
    """By the fixed range of their own length; calibrated ranges do not fit them, so there it is refused."""
    info = replace(INFO, matryoshka=())
    body = {"texts": ["hello"], "embedding_types": ["int8"], "output_dimension": 4}
    row = np.array([expected([CLS, HELLO, SEP], dimensions=4)], np.float32)
    assert embed(prompted(info=info), **body)["embeddings"]["int8"] == quantize(row, "int8", Ranges.unit(4)).tolist()
    client = prompted(info=info, ranges=Ranges.unit(8))
    assert error(client, body, ROUTE) == {
        "message": "int8 and uint8 embeddings are calibrated for 8 dimensions on this server, so they cannot be "
        "shortened to 4; ask for float, binary or ubinary",
        "type": "BadRequestError",
        "param": "output_dimension",
        "code": 400,
    }
    assert len(embed(client, **{**body, "output_dimension": 8})["embeddings"]["int8"][0]) == 8
    assert vectors(client, **{**body, "embedding_types": ["float"]}) == row.tolist()


def test_int8_of_vectors_of_any_length(prompted: Prompted) -> None:
    info = replace(INFO, use_activation=False)
    found = error(prompted(info=info), {"texts": ["hello"], "embedding_types": ["uint8"]}, ROUTE)
    assert found["message"].startswith("int8 and uint8 embeddings need a fixed range, and vectors that are not norm")
    assert found["param"] == "embedding_types"
    ranges = Ranges(np.full(8, -3.0), np.full(8, 3.0))
    got = embed(prompted(info=info, ranges=ranges), texts=["hello"], embedding_types=["uint8"])
    assert len(got["embeddings"]["uint8"][0]) == 8


def test_more_inputs_than_allowed(serve: Serve) -> None:
    found = error(serve(max_client_batch_size=2), {"inputs": [content("a")] * 3}, ROUTE)
    assert found["message"] == "the request has 3 inputs; at most 2 are allowed"


def test_unknown_model(client: TestClient) -> None:
    found = error(client, {"texts": ["a"], "model": "embed-v4.0"}, ROUTE)
    assert (found["code"], found["message"]) == (404, "The model `embed-v4.0` does not exist.")


def test_a_model_without_embeddings(serve: Serve) -> None:
    client = serve(info=replace(INFO, tasks=("classify",), default_task="classify"))
    assert "Embedding API is not supported by this model" in error(client, {"texts": ["a"]}, ROUTE)["message"]


def test_a_large_answer(serve: Serve) -> None:
    client = serve(info=replace(INFO, dimension=40_000))
    got = embed(client, texts=["hello", "world"], embedding_types=["int8", "float"])["embeddings"]
    assert got["int8"] == quantize(np.array(got["float"], np.float32), "int8").tolist()


def test_the_older_form(client: TestClient) -> None:
    """`/v1/embed` gives a bare list, unless types are asked for."""
    answer = client.post("/v1/embed", json={"texts": ["hello"]}, headers={"X-Request-Id": "r"}).json()
    answer["embeddings"] = floats(answer["embeddings"])
    assert answer == {
        "id": "embd-r",
        "embeddings": [expected([CLS, HELLO, SEP])],
        "texts": ["hello"],
        "meta": {"api_version": {"version": "1"}, "billed_units": {"input_tokens": 3, "image_tokens": 0}},
        "response_type": "embeddings_floats",
    }
    answer = client.post("/v1/embed", json={"texts": ["hello"], "embedding_types": ["int8"]}).json()
    assert (answer["response_type"], list(answer["embeddings"])) == ("embeddings_by_type", ["int8"])


TEXTS = ["Hello, my name is", "Cenotes are natural pits", "水 and naïve café"]


@pytest.fixture(scope="module")
def reference() -> SentenceTransformer:
    return SentenceTransformer(str(embedded()), device="cpu")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Path]]:
    """The embedded model with two prompts, calibrated by texts of a file."""
    texts = tmp_path_factory.mktemp("calibration") / "texts.jsonl"
    texts.write_text("".join(json.dumps(text) + "\n" for text in corpus.docstrings(40)))
    prompts = json.dumps({"query": "query: ", "document": ""})
    process = Process("--served-model-name", "minilm", "--prompts", prompts, "--calibration", str(texts))
    yield process, texts
    process.kill()


@pytest.fixture
def sdk(server: tuple[Process, Path]) -> Iterator[cohere.ClientV2]:
    with cohere.ClientV2(api_key="none", base_url=server[0].url) as client:
        yield client


def test_client_v2(sdk: cohere.ClientV2, server: tuple[Process, Path], reference: SentenceTransformer) -> None:
    process, texts = server
    assert "int8 and uint8 embeddings: by calibrated ranges" in process.log
    types = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    answer = sdk.embed(model="minilm", input_type="search_query", texts=TEXTS, embedding_types=types)
    wanted = reference.encode(TEXTS, prompt="query: ")
    assert close_to(answer.embeddings.float_, wanted)
    assert answer.texts == TEXTS
    assert answer.response_type == "embeddings_by_type"
    tokens = reference.tokenizer([f"query: {text}" for text in TEXTS])["input_ids"]
    assert answer.meta.billed_units.input_tokens == sum(map(len, tokens))
    rows = np.array(answer.embeddings.float_, np.float32)
    calibration = reference.encode([json.loads(line) for line in texts.read_text().splitlines()])
    for name in ("int8", "uint8"):
        codes = quantize_embeddings(rows, name, calibration_embeddings=calibration).astype(int)
        assert np.abs(np.array(getattr(answer.embeddings, name)) - codes).max() <= 1, "but for rounding"
        assert (np.array(getattr(answer.embeddings, name)) == codes).mean() > 0.99
    for name in ("binary", "ubinary"):
        assert getattr(answer.embeddings, name) == quantize_embeddings(rows, name).tolist()
    assert [np.frombuffer(base64.b64decode(t), "<f4").tolist() for t in answer.embeddings.base64] == rows.tolist()


def test_client_v2_inputs(sdk: cohere.ClientV2, reference: SentenceTransformer) -> None:
    answer = sdk.embed(
        model="minilm", input_type="search_document", inputs=[content("a cave", "with water")], max_tokens=4
    )
    assert close_to(answer.embeddings.float_, reference.encode(["a cave"]))
    assert answer.texts is None


def test_client_v2_errors(sdk: cohere.ClientV2) -> None:
    with pytest.raises(cohere.BadRequestError, match="Unsupported input_type 'poem'. Supported values: docu"):
        sdk.embed(model="minilm", input_type="poem", texts=["a"])
    with pytest.raises(cohere.NotFoundError, match="The model `embed-v4.0` does not exist"):
        sdk.embed(model="embed-v4.0", input_type="search_query", texts=["a"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:cohere")
def test_client_v1(server: tuple[Process, Path], reference: SentenceTransformer) -> None:
    """It sends 96 texts a request, and joins the answers."""
    texts = [f"text {i}" for i in range(100)]
    wanted = reference.encode(texts)
    request = {"model": "minilm", "input_type": "search_document", "texts": texts}
    with cohere.Client(api_key="none", base_url=server[0].url) as client:
        plain = client.embed(**request)
        typed = client.embed(**request, embedding_types=["float", "int8"])
    assert close_to(plain.embeddings, wanted)
    assert close_to(typed.embeddings.float_, wanted)
    assert np.shape(typed.embeddings.int8) == (100, 384)
