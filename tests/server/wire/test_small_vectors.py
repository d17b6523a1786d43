"""Small forms of vectors on `/v1/embeddings`, as clients of Jina, Voyage and Cohere ask for them, and calibration."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from cenote.config import EngineConfig, ModelConfig
from cenote.engine.fake import FakeEngine
from cenote.errors import BadRequest, ConfigError
from cenote.pipeline import calibration
from cenote.pipeline.pipeline import Service
from cenote.pipeline.rendering import Renderer
from cenote.server.wire.encoding import VECTOR_TYPES, typed, typed_values
from cenote.tensors.quantize import Ranges, quantize
from tests import checkpoints
from tests.conftest import INFO, error, expected, floats

if TYPE_CHECKING:
    from starlette.testclient import TestClient
    from transformers import PreTrainedTokenizerBase

    from tests.conftest import Serve

ROUTE = "/v1/embeddings"
TEXTS = ["hello", "hello world"]
ROWS = np.array([expected([101, 7592, 102]), expected([101, 7592, 2088, 102])], np.float32)
CODES = {name: quantize(ROWS, name).tolist() for name in ("float", "int8", "uint8", "binary", "ubinary")}
DTYPES = {"float": "<f4", "base64": "<f4", "int8": "i1", "uint8": "u1", "binary": "i1", "ubinary": "u1"}
BASE64 = [base64.b64encode(row.tobytes()).decode() for row in ROWS]


def embeddings(client: TestClient, **body: Any) -> list[Any]:
    answer = client.post(ROUTE, json={"input": TEXTS, **body})
    assert answer.status_code == 200, answer.text
    assert [(entry["index"], entry["object"]) for entry in answer.json()["data"]] == [
        (0, "embedding"),
        (1, "embedding"),
    ]
    assert list(answer.json()) == ["id", "object", "created", "model", "data", "usage"]
    return [entry["embedding"] for entry in answer.json()["data"]]


def decoded(text: str, name: str) -> list[float]:
    values: list[float] = np.frombuffer(base64.b64decode(text), DTYPES[name]).tolist()
    return values


def test_typed() -> None:
    made = typed(list(ROWS), [*VECTOR_TYPES, "int8"])
    assert tuple(made) == VECTOR_TYPES
    assert {name: made[name].tolist() for name in CODES} == CODES
    assert made["base64"] == BASE64
    ranges = Ranges(np.full(8, -2.0), np.full(8, 3.0))
    assert typed(list(ROWS), ["uint8"], ranges)["uint8"].tolist() == quantize(ROWS, "uint8", ranges).tolist()
    with pytest.raises(BadRequest, match="multiple of 8") as caught:
        typed([ROWS[0, :5]], ["binary"], param="p")
    assert caught.value.param == "p"


def test_typed_values() -> None:
    (one, _) = typed_values(list(ROWS), ["binary"])
    assert one.tolist() == CODES["binary"][0]
    assert typed_values(list(ROWS), ["binary"], as_base64=True)[0] == base64.b64encode(one.tobytes()).decode()
    both = typed_values(list(ROWS), ["base64", "float"], as_base64=True)
    assert both == [{"base64": text, "float": text} for text in BASE64]


SPELLINGS = {
    "Jina": lambda name: {"embedding_type": name},
    "Jina, a list": lambda name: {"embedding_type": [name]},
    "LlamaIndex": lambda name: {"encoding_type": name},
    "Voyage": lambda name: {"output_dtype": name},
    "Cohere": lambda name: {"embedding_types": [name]},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", VECTOR_TYPES)
def test_one_type(client: TestClient, spelling: str, name: str) -> None:
    got = embeddings(client, **SPELLINGS[spelling](name))
    if name == "base64":
        assert got == BASE64
    else:
        assert (floats(got) if name == "float" else got) == CODES[name]


@pytest.mark.parametrize("name", VECTOR_TYPES)
def test_one_type_as_base64(client: TestClient, name: str) -> None:
    """What Voyage's client asks for: base64 of the integers' bytes."""
    got = embeddings(client, output_dtype=name, encoding_format="base64")
    assert [decoded(text, name) for text in got] == CODES["float" if name == "base64" else name]


@pytest.mark.parametrize("field", ["embedding_type", "embedding_types"])
def test_several_types(client: TestClient, field: str) -> None:
    got = embeddings(client, **{field: ["int8", "float", "base64", "ubinary"]})
    assert [list(entry) for entry in got] == [["int8", "float", "base64", "ubinary"]] * 2
    assert [entry["int8"] for entry in got] == CODES["int8"]
    assert floats([entry["float"] for entry in got]) == CODES["float"]
    assert [entry["base64"] for entry in got] == BASE64
    assert [entry["ubinary"] for entry in got] == CODES["ubinary"]


def test_several_types_as_base64(client: TestClient) -> None:
    got = embeddings(client, embedding_type=["int8", "float"], encoding_format="base64")
    assert [decoded(entry["int8"], "int8") for entry in got] == CODES["int8"]
    assert [entry["float"] for entry in got] == BASE64


@pytest.mark.parametrize("body", [{}, {"embedding_type": None}, {"embedding_types": []}, {"output_dtype": "float"}])
def test_what_encoding_format_says_alone(client: TestClient, body: dict[str, Any]) -> None:
    """Bytes and other dtypes stay what they are where no other form is asked for."""
    answer = client.post(
        ROUTE, json={"input": TEXTS, "encoding_format": "bytes_only", "embed_dtype": "float16", **body}
    )
    assert answer.content == ROWS.astype(np.float16).tobytes()


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (
            {"embedding_types": ["int4"]},
            "Unknown embedding type 'int4'; known are: float, int8, uint8, binary, ubinary, base64, dense, colbert, "
            "sparse.",
            "embedding_types",
        ),
        (
            {"embedding_type": "int8", "output_dtype": "int8"},
            "Only one of `embedding_type` and `output_dtype` can be given.",
            "embedding_type",
        ),
        *(
            (
                {"output_dtype": "int8", **extra},
                "`output_dtype` has the encoding_format 'float' (numbers) or 'base64' (their bytes), without "
                "`embed_dtype` or `endianness`.",
                "output_dtype",
            )
            for extra in (
                {"encoding_format": "bytes"},
                {"encoding_format": "bytes_only"},
                {"encoding_format": "base64", "embed_dtype": "float16"},
                {"encoding_format": "base64", "endianness": "big"},
            )
        ),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_refused_by_form(client: TestClient, body: dict[str, Any], message: str, param: str) -> None:
    found = error(client, {"input": "hello", **body})
    assert found == {"message": message, "type": "Bad Request", "param": param, "code": 400}


@pytest.mark.parametrize("field", ["embedding_type", "encoding_type", "output_dtype"])
def test_unknown_type(client: TestClient, field: str) -> None:
    found = error(client, {"input": "hello", field: "int4"})
    assert "literal_error" in found["message"]
    assert found["param"].startswith(f"body.{field}")


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (
            {"embedding_type": "int8", "task": "token_embed"},
            "`embedding_type` is for dense embeddings (task 'embed'), and the task is 'token_embed'",
            "embedding_type",
        ),
        (
            {"output_dtype": "binary", "dimensions": 4},
            "Embedding dimension must be a multiple of 8 for binary embedding types, but got 4.",
            "output_dtype",
        ),
        (
            {"output_dtype": "binary", "dimensions": -1},
            "Model 'fake' only supports dimensions in range [1, 8], got -1.",
            "dimensions",
        ),
        (
            {"output_dtype": "int8", "use_activation": False},
            "int8 and uint8 embeddings need a fixed range, and vectors that are not normalised have none: "
            "set use_activation, or start the server with --calibration",
            "output_dtype",
        ),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_refused_by_meaning(serve: Serve, body: dict[str, Any], message: str, param: str) -> None:
    engine = FakeEngine(replace(INFO, matryoshka=()))
    found = error(serve(engine), {"input": "hello", **body})
    assert found == {"message": message, "type": "BadRequestError", "param": param, "code": 400}
    assert not engine.submitted


def test_bits_need_no_fixed_length(client: TestClient) -> None:
    assert embeddings(client, output_dtype="ubinary", use_activation=False) == CODES["ubinary"]


def calibrated(serve: Serve, tokenizer: PreTrainedTokenizerBase, ranges: Ranges) -> TestClient:
    info = replace(INFO, matryoshka=())
    return serve.of(Service(FakeEngine(info), Renderer(tokenizer, info), ("fake",), ranges=ranges))


def test_calibrated_ranges(serve: Serve, tokenizer: PreTrainedTokenizerBase) -> None:
    ranges = Ranges(np.full(8, -0.4), np.linspace(0.1, 0.5, 8))
    client = calibrated(serve, tokenizer, ranges)
    assert embeddings(client, output_dtype="int8") == quantize(ROWS, "int8", ranges).tolist() != CODES["int8"]
    assert embeddings(client, output_dtype="binary") == CODES["binary"]
    assert len(embeddings(client, output_dtype="float", dimensions=4)[0]) == 4
    found = error(client, {"input": "hello", "output_dtype": "uint8", "dimensions": 4})
    assert found["message"].startswith("int8 and uint8 embeddings are calibrated for 8 dimensions on this server")
    found = error(client, {"input": "hello", "output_dtype": "uint8", "use_activation": False})
    assert (found["param"], found["message"]) == (
        "use_activation",
        "int8 and uint8 embeddings are calibrated for this model's own use_activation (true), so it cannot be changed",
    )


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Service:
    """A model of dense, sparse and token vectors."""
    folder = checkpoints.bert(tmp_path_factory.mktemp("small") / "m3")
    for file, width in (("sparse_linear.pt", 1), ("colbert_linear.pt", 16)):
        torch.save({"weight": torch.ones(width, checkpoints.HIDDEN), "bias": torch.zeros(width)}, folder / file)
    return Service.open(ModelConfig(model=str(folder), served_model_name=("m3",)), EngineConfig())


def test_beside_other_kinds(serve: Serve, m3: Service) -> None:
    """A form asks for the dense vector, which the other kinds stand beside."""
    client = serve.of(m3)
    plain = embeddings(client, embedding_types=["dense", "sparse"])
    rows = np.array([entry["dense"] for entry in plain], np.float32)
    for asked in (["sparse", "int8"], ["sparse", "dense", "int8"]):
        got = embeddings(client, embedding_types=asked)
        assert [entry["dense"] for entry in got] == quantize(rows, "int8").tolist()
        assert [entry["sparse"] for entry in got] == [entry["sparse"] for entry in plain]
    both = embeddings(client, embedding_types=["colbert", "int8", "binary"])
    assert [entry["dense"]["binary"] for entry in both] == quantize(rows, "binary").tolist()
    assert embeddings(client, embedding_types=["dense", "uint8"]) == quantize(rows, "uint8").tolist()
    alone = [decoded(text, "float") for text in embeddings(client, embedding_types=["dense", "base64"])]
    assert np.abs(np.array(alone) - rows).max() < 1e-6  # its last layer runs for the pooled tokens alone


SENTENCES = ["the quick brown fox", "hello, my name is", "a lazy dog", "fox " * 300]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.bert(tmp_path_factory.mktemp("calibrated") / "model")


def load(folder: Path, calibration: Path, **options: Any) -> Service:
    return Service.open(ModelConfig(model=str(folder), calibration=str(calibration), **options), EngineConfig())


def rows_of(service: Service) -> np.ndarray:
    from cenote.core import PoolingParams
    from cenote.pipeline.options import TextOptions

    made = service.render(SENTENCES, "embed", PoolingParams(), TextOptions(-1))
    return np.stack([output.data for output in service.engine.submit(made).result()])


FILES = {
    "texts.txt": "\n\n".join(SENTENCES) + "\n",
    "texts.jsonl": "".join(json.dumps(text) + "\n" for text in SENTENCES),
    "objects.jsonl": "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in SENTENCES),
}


@pytest.mark.parametrize("name", FILES)
def test_calibration_by_texts(folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "AT_ONCE", 3)
    (tmp_path / name).write_text(FILES[name])
    service = load(folder, tmp_path / name)
    rows = rows_of(service)
    service.engine.close()
    assert service.ranges is not None
    assert np.allclose(service.ranges.low_D, rows.min(axis=0), atol=1e-6)
    assert np.allclose(service.ranges.high_D, rows.max(axis=0), atol=1e-6)


@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_calibration_by_ranges(folder: Path, tmp_path: Path, suffix: str) -> None:
    ranges = Ranges(np.full(checkpoints.HIDDEN, -0.5), np.full(checkpoints.HIDDEN, 0.25))
    ranges.save(tmp_path / f"ranges{suffix}")
    service = load(folder, tmp_path / f"ranges{suffix}")
    service.engine.close()
    assert service.ranges is not None
    assert service.ranges.high_D.tolist() == ranges.high_D.tolist()
    assert service.ranges.low_D.tolist() == ranges.low_D.tolist()


def test_calibration_of_vectors_that_are_always_shortened(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text(FILES["texts.txt"])
    service = load(
        folder, tmp_path / "texts.txt", pooler_config={"dimensions": 8}, hf_overrides={"is_matryoshka": True}
    )
    service.engine.close()
    assert service.ranges is not None
    assert service.ranges.dimension == 8


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ranges.json", '{"low": [0, 0]}', "cannot take the ranges of int8 from"),
        ("ranges.csv", "", "must end in .json or .npy, got 'ranges.csv'"),
        ("texts.txt", None, "cannot read the texts of .*texts.txt"),
        ("texts.txt", "one\n \n", "must have at least 2 texts to calibrate by, better 1,000; got 1"),
        ("texts.txt", b"\xff\xfe", "cannot read the texts of"),
        ("texts.jsonl", '"one"\ntwo\n', "a line of .*texts.jsonl is not valid JSON"),
        ("texts.jsonl", '"one"\n{"content": "two"}\n', "must be a JSON string or have one under 'text', got {"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_to_calibrate_by_is_refused_before_the_model_is_loaded(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "no checkpoint", tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ranges.json", '{"low": [0, 0], "high": [1, 1]}', "has ranges for 2 dimensions, but the vectors have 32"),
        ("texts.jsonl", '"one"\n"\\ud800"\n', "a text of .* cannot be embedded: text must be valid Unicode"),
    ],
)
def test_calibration_refuses(folder: Path, tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(folder, tmp_path / name)


def test_calibration_is_for_embeddings(tokenizer: PreTrainedTokenizerBase) -> None:
    info = replace(INFO, tasks=("classify",), default_task="classify")
    with pytest.raises(ConfigError, match="calibration is for int8 and uint8 embeddings, and fake gives none"):
        calibration.load("ranges.json", 8, Renderer(tokenizer, info), FakeEngine(info))
