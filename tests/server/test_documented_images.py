"""Commands and bodies that vLLM and FastDeploy document for pictures, as written, on checkpoints of those layouts."""

from __future__ import annotations

import base64
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import httpcore
import numpy as np
import pytest
from starlette.testclient import TestClient

from cenote.cli.flags import parse
from cenote.cli.serve import models_of
from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.pipeline import dialling
from cenote.pipeline.pipeline import Service
from cenote.server.app import build
from tests import pictured
from tests.models.families.test_images_col import OfColQwen3, maxsim
from tests.pictured import PICTURE, noise, saved, url

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

FIRST, SECOND = noise(90, 130), noise(300, 60)
MODELS = {
    "tomoro": "TomoroAI/tomoro-colqwen3-embed-4b",
    "ops": "OpenSearch-AI/Ops-Colqwen3-4B",
    "nemotron": "nvidia/nemotron-colembed-vl-4b-v2",
}
PAGES = {
    "tomoro": f"<|im_start|>user\n{PICTURE}Describe the image.<|im_end|><|endoftext|>",
    "ops": f"<|im_start|>user\n{PICTURE}Describe the image.<|im_end|><|im_start|>assistant\n<|endoftext|>",
    "nemotron": f"<|im_start|>user\n{PICTURE}passage: Describe the image.<|im_end|>\n<|im_start|>assistant\n",
}
"""The page of the bodies, by each model's own code."""
TEXTS_RANKED = """{
    "model": "MODEL",
    "query": "What is machine learning?",
    "documents": [
        "Machine learning is a subset of artificial intelligence.",
        "Python is a programming language.",
        "Deep learning uses neural networks."
    ]
}"""
TEXTS_SCORED = """{
    "model": "MODEL",
    "text_1": "What is the capital of France?",
    "text_2": ["The capital of France is Paris.", "Python is a programming language."]
}"""
PAGES_SCORED = """{
    "model": "MODEL",
    "data_1": "Retrieve the city of Beijing",
    "data_2": [
        {
            "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,<BASE64>"}},
                {"type": "text", "text": "Describe the image."}
            ]
        }
    ]
}"""
PAGES_RANKED = """{
    "model": "MODEL",
    "query": "Retrieve the city of Beijing",
    "documents": [
        {
            "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,<BASE64_1>"}},
                {"type": "text", "text": "Describe the image."}
            ]
        },
        {
            "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,<BASE64_2>"}},
                {"type": "text", "text": "Describe the image."}
            ]
        }
    ],
    "top_n": 2
}"""
TEXT_POOLED = """{
    "model": "MODEL",
    "input": "What is machine learning?",
    "task": "token_embed"
}"""
PAGE_POOLED = """{
    "model": "MODEL",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,<BASE64>"}},
                {"type": "text", "text": "Describe the image."}
            ]
        }
    ]
}"""


class Case:
    """A model, launched by its documented command, and its own code."""

    def __init__(self, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind, self.name = kind, MODELS[kind]
        path = folder / self.name
        path.parent.mkdir(parents=True)
        self.reference = OfColQwen3(kind, pictured.colqwen3(path, kind))
        monkeypatch.chdir(folder)
        arguments = parse(["serve", self.name, "--max-model-len", "4096"])
        ((model, engine, server),), _ = models_of({key: arguments[key] for key in arguments if key != "command"})
        self.service = Service.open(model, engine)
        self.client = TestClient(build([self.service], server), raise_server_exceptions=False)

    def send(self, path: str, body: str) -> Any:
        """Send a body, with pictures for its blanks."""
        body = body.replace("MODEL", self.name)
        pictures = {"<BASE64>": FIRST, "<BASE64_1>": FIRST, "<BASE64_2>": SECOND}
        for blank, picture in pictures.items():
            body = body.replace(blank, base64.b64encode(saved(picture)).decode())
        answer = self.client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def page(self, picture: Any) -> npt.NDArray[np.float32]:
        return self.reference.rows(PAGES[self.kind], [picture])


@pytest.fixture(scope="module", params=[*MODELS])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = Case(request.param, tmp_path_factory.mktemp("documented"), monkeypatch)
        with made.client:
            yield made
        made.service.engine.close()


def test_texts_are_ranked_and_scored(case: Case) -> None:
    body = json.loads(TEXTS_RANKED)
    query = case.reference(body["query"])
    expected = [maxsim(query, case.reference(document)) for document in body["documents"]]
    results = case.send("/rerank", TEXTS_RANKED)["results"]
    assert [result["index"] for result in results] == np.argsort(expected)[::-1].tolist()
    assert [result["relevance_score"] for result in results] == pytest.approx(sorted(expected)[::-1], abs=2e-4)
    body = json.loads(TEXTS_SCORED)
    query = case.reference(body["text_1"])
    expected = [maxsim(query, case.reference(document)) for document in body["text_2"]]
    scores = [entry["score"] for entry in case.send("/score", TEXTS_SCORED)["data"]]
    assert scores == pytest.approx(expected, abs=2e-4)


def test_pages_are_scored_and_ranked(case: Case) -> None:
    query = case.reference("Retrieve the city of Beijing")
    expected = [maxsim(query, case.page(picture)) for picture in (FIRST, SECOND)]
    assert abs(expected[0] - expected[1]) > 1e-2, "another picture, another score"
    (entry,) = case.send("/score", PAGES_SCORED)["data"]
    assert entry["score"] == pytest.approx(expected[0], abs=2e-4)
    results = case.send("/rerank", PAGES_RANKED)["results"]
    assert [result["index"] for result in results] == np.argsort(expected)[::-1].tolist()
    assert [result["relevance_score"] for result in results] == pytest.approx(sorted(expected)[::-1], abs=2e-4)


def test_tokens_of_a_text_and_a_page(case: Case) -> None:
    rows = np.array(case.send("/pooling", TEXT_POOLED)["data"][0]["data"])
    assert np.abs(rows - case.reference("What is machine learning?")).max() < 2e-5
    rows = np.array(case.send("/pooling", PAGE_POOLED)["data"][0]["data"])
    text = f"<|im_start|>user\n{PICTURE}Describe the image.<|im_end|>\n"  # by the chat template
    assert np.abs(rows - case.reference.rows(text, [FIRST])).max() < 2e-5


REWARD = """{
    "model": "",
    "messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://xxx/a.png"}}]},
        {"role": "assistant", "content": [{"type": "text", "text": "图里有几个人"}]}
    ],
    "user": "user-123",
    "chat_template": null,
    "chat_template_kwargs": {"custom_var": "value"},
    "mm_processor_kwargs": {"image_size": 224}
}"""


class Pages(BaseHTTPRequestHandler):
    """The host `xxx`, which has one picture."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        is_there = (self.path, self.headers["Host"]) == ("/a.png", "xxx")
        self.send_response(200 if is_there else 404)
        self.end_headers()
        self.wfile.write(saved(FIRST))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `https://xxx` be a server on loopback: the resolver says so, and TLS is left out."""
    look_up, connect = socket.getaddrinfo, httpcore.SyncBackend.connect_tcp

    def found(name: Any, *rest: Any, **more: Any) -> Any:
        return look_up("127.0.0.1" if name == "xxx" else name, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", found)
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def connect_tcp(self: Any, address: str, port: int, *rest: Any, **more: Any) -> Any:
            assert (address, port) == ("127.0.0.1", 443)
            return connect(self, address, server.server_port, *rest, **more)

        monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connect_tcp)
        monkeypatch.setattr(dialling.Timed, "start_tls", lambda self, **_: self)
        yield
        server.shutdown()


def test_the_reward_of_a_picture_behind_https(tmp_path: Path, host: None) -> None:
    folder = str(pictured.ernie_vl(tmp_path / "RM_v1008"))
    service = Service.open(ModelConfig(model=folder, runner="pooling", convert="embed"), EngineConfig())
    first, other = url(FIRST), url(SECOND)
    config = ServerConfig(allowed_media_domains=("xxx",), allow_private_media=True)
    with TestClient(build([service], config), raise_server_exceptions=False) as client:
        for route in ("/v1/reward", "/v1/chat/reward"):
            answers = [
                client.post(route, content=REWARD.replace("https://xxx/a.png", source).encode())
                for source in ("https://xxx/a.png", first, other)
            ]
            assert [answer.status_code for answer in answers] == [200] * 3, answers[0].text
            fetched, sent, another = (answer.json()["data"][0]["score"][0] for answer in answers)
            assert fetched == pytest.approx(sent, abs=1e-5)
            assert abs(fetched - another) > 1e-3, "another picture, another reward"
    with TestClient(build([service], ServerConfig()), raise_server_exceptions=False) as client:
        refused = client.post("/v1/chat/reward", content=REWARD.encode())
    assert refused.status_code == 400
    assert "--allowed-media-domains" in refused.text
    service.engine.close()
