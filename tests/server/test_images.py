"""Pictures over HTTP: content parts in messages, refusals before anything is decoded, and the tokens that count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.core import PoolingParams
from cenote.engine.host import Host
from cenote.pipeline.options import TextOptions
from cenote.pipeline.pipeline import Service
from cenote.server.app import build
from tests import pictured
from tests.conftest import error
from tests.pictured import PICTURE, noise, saved, url

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

A, B = noise(90, 130), noise(64, 64)


def message(*parts: Any) -> dict[str, Any]:
    shown = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "user", "content": shown}], "encoding_format": "float"}


def part(source: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": source}}


@pytest.fixture(scope="module")
def allowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "inside").mkdir()
    (folder / "inside" / "a.png").write_bytes(saved(A))
    (folder / "secret.png").write_bytes(saved(A))
    (folder / "inside" / "link.png").symlink_to(folder / "secret.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured.qwen_vl(tmp_path_factory.mktemp("served") / "qwen", "qwen3_vl")


def opened(folder: Path) -> Service:
    config = ModelConfig(model=str(folder), served_model_name=("qwen",), limit_mm_per_prompt={"image": 2})
    return Service.open(config, EngineConfig())


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    service = opened(folder)
    yield service
    service.engine.close()


@pytest.fixture(scope="module")
def client(service: Service, allowed: Path) -> Iterator[TestClient]:
    options = ServerConfig(allowed_local_media_path=str(allowed / "inside"))
    with TestClient(build([service], options), raise_server_exceptions=False) as client:
        yield client


def direct(service: Service, text: str, images: list[Any]) -> np.ndarray:
    prompt = {"prompt": text, "multi_modal_data": {"image": images}}
    (sequence,) = service.render([prompt], "embed", PoolingParams(), TextOptions())
    (output,) = service.engine.submit([sequence]).result()
    return output.data


@pytest.mark.parametrize("route", ["/v1/embeddings", "/pooling"])
def test_parts_are_rendered_by_the_chat_template(client: TestClient, service: Service, route: str) -> None:
    body = message(part(url(saved(A))), "what is in this page", part(url(saved(B, "JPEG", quality=95), "image/png")))
    if route == "/pooling":
        body["task"] = "embed"
    answer = client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    (entry,) = answer.json()["data"]
    text = f"<|im_start|>user\n{PICTURE}what is in this page{PICTURE}<|im_end|>\n"
    expected = direct(service, text, [saved(A), saved(B, "JPEG", quality=95)])
    assert np.abs(np.array(entry.get("embedding", entry.get("data"))) - expected).max() < 1e-6
    ids = service.renderer.tokenize(text, add_special_tokens=False)
    assert answer.json()["usage"]["prompt_tokens"] == len(ids) - 2 + 12 + 4


@pytest.mark.parametrize("odd", [{"role": "user", "content": 5}, {"role": "user"}, {"content": "a"}], ids=repr)
def test_a_message_beside_a_picture_has_a_role_and_a_content(client: TestClient, odd: dict[str, Any]) -> None:
    body = message(part(url(saved(A))))
    body["messages"].append(odd)
    refused = client.post("/v1/embeddings", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
    assert "of a message, which must be a text" in refused.json()["error"]["message"]


def test_a_client_may_send_the_placeholder_beside_the_picture(client: TestClient) -> None:
    plain = client.post("/v1/embeddings", json=message(part(url(saved(A))), "describe")).json()
    doubled = client.post("/v1/embeddings", json=message(part(url(saved(A))), f"{PICTURE}describe")).json()
    assert doubled["data"][0]["embedding"] == plain["data"][0]["embedding"]


@pytest.mark.parametrize(
    ("kwargs", "tokens"), [({"image_size": 64}, 4), ({"max_pixels": 6 * 32**2}, 6), ({}, 12), (None, 12)]
)
def test_requests_may_shrink_pictures(client: TestClient, kwargs: Any, tokens: int) -> None:
    body = {**message(part(url(saved(A)))), "mm_processor_kwargs": kwargs}
    usage = client.post("/v1/embeddings", json=body).json()["usage"]
    bare = client.post("/v1/embeddings", json=message("")).json()["usage"]
    assert usage["prompt_tokens"] - bare["prompt_tokens"] - 2 <= tokens


@pytest.mark.parametrize("name", ["inside/a.png", "inside/../inside/a.png"])
def test_files_below_the_folder_may_be_named(client: TestClient, allowed: Path, name: str) -> None:
    answer = client.post("/v1/embeddings", json=message(part(f"file://{allowed}/{name}")))
    assert answer.status_code == 200, answer.text


REFUSED = {
    "another file": (part("file:///etc/hostname"), "not below"),
    "a path": (part("/etc/hostname"), "expected a URL"),
    "another host": (part("file://server/a.png"), "names the host"),
    "the network": (part("https://example.com/a.png"), "not fetched"),
    "no base64": (part("data:image/png;base64,@@@"), "not base64"),
    "no encoding": (part("data:image/png,abc"), "must have the form"),
    "a text": (part(url(b"<svg/>")), "cannot be read"),
    "EPS": (part(url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")), "cannot be read"),
    "half a file": (part(url(saved(noise(300, 300))[:5000])), "cannot be read"),
    "empty": (part("data:image/png;base64,"), "cannot be read"),
    "a strip": (part(url(saved(noise(1, 400)))), "200 times"),
    "a video": ({"type": "video_url", "video_url": {"url": "x"}}, "'video_url' are not supported"),
    "sound": ({"type": "input_audio", "input_audio": {"data": ""}}, "'input_audio' are not supported"),
    "features": ({"type": "image_embeds", "image_embeds": ""}, "'image_embeds' are not supported"),
    "a name": ({**part(url(saved(A))), "uuid": "x"}, "uuid"),
    "nothing": ({"type": "image_url"}, "needs a picture"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(client: TestClient, name: str) -> None:
    wrong, expected = REFUSED[name]
    found = error(client, message(wrong, "text"))
    assert found["code"] == 400
    assert expected in found["message"]
    assert client.get("/health").status_code == 200


def test_a_link_out_of_the_folder_is_refused(client: TestClient, allowed: Path) -> None:
    found = error(client, message(part(f"file://{allowed}/inside/link.png")))
    assert "not below" in found["message"]


def test_pictures_are_counted(client: TestClient) -> None:
    found = error(client, message(*[part(url(saved(B)))] * 3))
    assert (found["code"], found["message"].partition(".")[0]) == (
        400,
        "At most 2 image(s) may be provided in one prompt",
    )


def test_arguments_that_enlarge_are_refused(client: TestClient) -> None:
    for kwargs in ({"max_pixels": 1 << 40}, {"size": {"longest_edge": 10**12}}, {"min_pixels": 1 << 30}):
        found = error(client, {**message(part(url(saved(A)))), "mm_processor_kwargs": kwargs})
        assert (found["code"], found["param"]) == (400, "mm_processor_kwargs")


def test_text_goes_on_beside_pictures(client: TestClient, service: Service) -> None:
    answer = client.post("/v1/embeddings", json={"input": ["hello", "page"], "encoding_format": "float"})
    (first, _) = service.render(["hello", "page"], "embed", PoolingParams(), TextOptions())
    (output,) = service.engine.submit([first]).result()
    assert np.abs(np.array(answer.json()["data"][0]["embedding"]) - output.data).max() < 1e-6


def test_a_process_in_front_renders_pictures_for_the_engine(folder: Path, tmp_path: Path) -> None:
    service = opened(folder)  # which its host closes
    expected = direct(service, f"a {PICTURE}", [saved(A)])
    assert service.facts is not None
    host = Host(service.engine, str(tmp_path / "private" / "engine.sock"), service.facts.plain())
    front = Service.connect(str(tmp_path / "private" / "engine.sock"))
    try:
        assert np.array_equal(direct(front, f"a {PICTURE}", [saved(A)]), expected)
    finally:
        front.engine.close()
        host.close()
