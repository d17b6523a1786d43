"""Requests and answers as the vendors' documents and clients have them (`tests/data/dialects`), with `LLM`'s numbers.

A file has a vendor's pairs. In its answers an object with a key that begins with `$` stands for a value that `LLM`
gives; keys that we send besides are allowed unless the pair is `exact`, as some clients fail at them.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from starlette.testclient import TestClient

from cenote import LLM, PoolingParams
from cenote.config import ServerConfig
from cenote.server.app import DIALECTS, build
from tests import checkpoints

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FILES = sorted((Path(__file__).parent.parent / "data" / "dialects").glob("*.json"))
PAIRS = [
    pytest.param(pair, id=f"{file.stem}: {pair['name']}")
    for file in FILES
    for pair in json.loads(file.read_text())["pairs"]
]
TOLERANCE = 2e-6
"""Largest difference of the same value in another batch."""
UNTOLD = {"hub": "tei"}
"""Files of vendors whose routes are another dialect's."""


class Models(NamedTuple):
    """Models, and the values of each placeholder."""

    minilm: LLM
    reranker: LLM
    classifier: LLM
    judge: LLM

    def vector(self, text: str, raw: bool = False) -> np.ndarray:
        params = PoolingParams(use_activation=not raw)
        (output,) = self.minilm.embed([text], pooling_params=params, use_tqdm=False)
        return np.array(output.outputs.embedding)

    def score(self, pair: list[str], raw: bool = False) -> float:
        params = PoolingParams(use_activation=not raw)
        (output,) = self.reranker.score(pair[0], pair[1], pooling_params=params, use_tqdm=False)
        return output.outputs.score

    def probs(self, text: str) -> list[float]:
        (output,) = self.classifier.classify([text], use_tqdm=False)
        return output.outputs.probs

    def classes(self, text: str, top: int | None = None) -> list[dict[str, Any]]:
        probs = self.probs(text)
        order = sorted(range(len(probs)), key=lambda i: -probs[i])[:top]
        return [{"label": f"LABEL_{i}", "score": probs[i]} for i in order]

    def reward(self, text: str) -> list[float]:
        options: dict[str, Any] = {"tokenization_kwargs": {"add_special_tokens": False}, "use_tqdm": False}
        (output,) = self.judge.classify([text], pooling_params=PoolingParams(use_activation=False), **options)
        return output.outputs.probs

    def rendered_tokens(self, text: str) -> int:
        return len(self.judge.get_tokenizer()(text, add_special_tokens=False)["input_ids"])

    def cosine(self, pair: list[str]) -> float:
        return float(np.dot(*map(self.vector, pair)))

    def flat(self, texts: list[str]) -> np.ndarray:
        return np.concatenate([*map(self.vector, texts)])

    def tokens(self, texts: list[str]) -> int:
        return sum(len(self.minilm.get_tokenizer()(text)["input_ids"]) for text in texts)

    def pair_tokens(self, pairs: list[list[str]]) -> int:
        return sum(len(self.reranker.get_tokenizer()(*pair)["input_ids"]) for pair in pairs)

    def ids(self, text: str, at: int | None = None) -> Any:
        ids = self.minilm.get_tokenizer()(text, add_special_tokens=False)["input_ids"]
        return ids if at is None else ids[at]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    root = tmp_path_factory.mktemp("documented")
    reranker = LLM(str(checkpoints.classifier(root / "reranker", num_labels=1)), served_model_name="reranker")
    classifier = LLM(str(checkpoints.classifier(root / "classifier", num_labels=3)), served_model_name="classifier")
    template = root / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}")
    judge = LLM(str(root / "reranker"), served_model_name="judge", chat_template=str(template))
    models = Models(LLM(served_model_name="minilm"), reranker, classifier, judge)
    yield models
    for llm in models:
        llm.close()


@pytest.fixture(scope="module")
def client(models: Models) -> Iterator[TestClient]:
    with TestClient(build([llm._service for llm in models], ServerConfig())) as client:
        yield client


class Comparison:
    """Compares an answer with a vendor's."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def check(self, got: Any, wanted: Any, exact: bool, where: str = "") -> None:
        """Fail unless `got` has what is `wanted`, at each place."""
        if isinstance(wanted, dict) and any(key.startswith("$") for key in wanted):
            self._special(got, wanted, exact, where)
        elif isinstance(wanted, dict):
            assert isinstance(got, dict), where
            assert wanted.keys() <= got.keys(), (where, wanted.keys() - got.keys())
            assert not exact or got.keys() == wanted.keys(), (where, got.keys() - wanted.keys())
            for key, value in wanted.items():
                self.check(got[key], value, exact, f"{where}.{key}")
        elif isinstance(wanted, list):
            assert isinstance(got, list), where
            assert len(got) == len(wanted), where
            for i, (one, value) in enumerate(zip(got, wanted, strict=True)):
                self.check(one, value, exact, f"{where}.{i}")
        else:
            assert (got, type(got)) == (wanted, type(wanted)), where

    def _special(self, got: Any, wanted: dict[str, Any], exact: bool, where: str) -> None:
        (key,) = (key for key in wanted if key.startswith("$"))
        value = wanted[key]
        options = {name: option for name, option in wanted.items() if name != key}
        if key == "$first":
            self.check(got[0], value, exact, f"{where}.0")
        elif key == "$ranked":
            scores = [self.models.score(by["$score"]) for by in options["by"]]
            order = sorted(range(len(scores)), key=lambda i: -scores[i])
            assert abs(scores[0] - scores[1]) > 100 * TOLERANCE
            self.check(got, [value[i] for i in order], exact, where)
        elif key == "$base64":
            self._near(np.frombuffer(base64.b64decode(got), "<f4"), self.models.vector(value), where)
        elif key == "$classes":
            classes = self.models.classes(value, **options)
            assert [entry["label"] for entry in got] == [entry["label"] for entry in classes], where
            self._near([entry["score"] for entry in got], [entry["score"] for entry in classes], where)
        elif key in ("$tokens", "$pair_tokens", "$ids", "$rendered_tokens"):
            assert got == getattr(self.models, key[1:])(value, **options), where
        elif key != "$any":
            number: Callable[..., Any] = getattr(self.models, key[1:])
            self._near(got, number(value, **options), where)

    def _near(self, got: Any, wanted: Any, where: str) -> None:
        assert np.shape(got) == np.shape(wanted), where
        assert np.abs(np.subtract(got, wanted)).max() < TOLERANCE, where


@pytest.mark.parametrize("pair", PAIRS)
def test_an_answer_is_the_documented_one(client: TestClient, models: Models, pair: dict[str, Any]) -> None:
    answer = client.request(pair["method"], pair["path"], json=pair["body"])
    assert answer.status_code == 200, answer.text
    parsed, exact = answer.json(), pair.get("exact", False)
    comparison = Comparison(models)
    if isinstance(exact, list):
        for key in exact:
            comparison.check(parsed[key], pair["answer"][key], exact=True, where=key)
    comparison.check(parsed, pair["answer"], exact=exact is True)


def test_every_dialect_has_a_file() -> None:
    names = {UNTOLD.get(file.stem, file.stem) for file in FILES}
    assert names == {dialect.prefix for dialect in DIALECTS if dialect.prefix}
    assert all(json.loads(file.read_text())["source"] for file in FILES)
