"""The reward head over Ernie-4.5-VL-MoE: conversations with pictures to the rewards of Transformers' own model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from starlette.testclient import TestClient

from cenote import LLM
from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.pipeline.pipeline import Service
from cenote.server.app import build
from tests import pictured
from tests.pictured import ERNIE_PICTURE, noise, url

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from PIL.Image import Image

A, B, C = noise(90, 130), noise(300, 60), noise(64, 64)
INPUTS: list[tuple[str, list[Any]]] = [
    ("what is in this page", []),
    (f"{ERNIE_PICTURE}describe the image", [A]),
    (f"q {ERNIE_PICTURE} and {ERNIE_PICTURE} compare", [B, C]),
    (f"<|IMAGE_START|> a text that names the frame of a picture <|IMAGE_END|> {'query ' * 9}", []),
    (ERNIE_PICTURE, [A]),
    (f"x {ERNIE_PICTURE}{ERNIE_PICTURE}", [A, A]),
    (ERNIE_PICTURE, [noise(90, 130, seed=1)]),
]
TOLERANCE = 5e-6
"""Largest difference of normalised token rows; measured: 4.6e-7."""
OF_REWARDS = 1e-4
"""Largest difference of rewards, whose size is up to 7.5; measured: 1e-5."""


class Reference:
    """Transformers' own model, with the reward head of FastDeploy over its last token."""

    def __init__(self, folder: Path) -> None:
        load: Any = transformers.Ernie4_5_VLMoeModel.from_pretrained
        self.model = load(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.processor: Any = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.weights = load_file(folder / "model.safetensors")

    def rows(self, text: str, images: list[Image], **size: Any) -> torch.Tensor:
        """Last hidden states, with the inputs that the model's own processor makes."""
        vocabulary = self.tokenizer.get_vocab()
        placeholder = vocabulary["<|IMAGE_PLACEHOLDER|>"]
        inputs = dict(self.processor(images=images, return_tensors="pt", **size)) if images else {}
        counts = iter((inputs["image_grid_thw"].prod(-1) // 4).tolist() if images else [])
        ids: list[int] = []
        for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]:
            ids += [token] * (next(counts) if token == placeholder else 1)
        ids_1L = torch.tensor([ids])
        of_vision = [vocabulary[f"<|IMAGE_{word}|>"] for word in ("PLACEHOLDER", "START", "END")]
        types = {
            "mm_token_type_ids": (ids_1L == placeholder).int(),
            "moe_mm_token_type_ids": torch.isin(ids_1L, torch.tensor(of_vision)).int(),
        }
        with torch.inference_mode():
            return self.model(input_ids=ids_1L, **inputs, **types, use_cache=False).last_hidden_state[0]

    def reward(self, text: str, images: list[Image], **size: Any) -> float:
        row = self.rows(text, images, **size)[-1]
        gate, up = (self.weights["rm_head.up_gate_proj.weight"] @ row).chunk(2)
        return float(self.weights["rm_head.down_proj.weight"] @ (F.silu(gate) * up))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured.ernie_vl(tmp_path_factory.mktemp("ernie") / "ernie-vl")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    service = Service.open(ModelConfig(model=str(folder)), EngineConfig())
    yield service
    service.engine.close()


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(build([service], ServerConfig()), raise_server_exceptions=False) as client:
        yield client


def prompt(text: str, images: list[Any]) -> Any:
    return {"prompt": text, "multi_modal_data": {"image": images}} if images else text


def test_rows_and_rewards_are_those_of_transformers_one_input_at_a_time(folder: Path, reference: Reference) -> None:
    with LLM(str(folder)) as llm:
        assert llm.info.report.layout == "packed"
        assert llm.info.reward == "classify"
        prompts = [prompt(*one) for one in INPUTS]
        rows = [output.outputs.data for output in llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)]
        rewards = [float(output.outputs.data[0]) for output in llm.reward(prompts, use_tqdm=False)]
        alone = [float(llm.reward([one], use_tqdm=False)[0].outputs.data[0]) for one in prompts]
    for own, one in zip(rows, INPUTS, strict=True):
        assert float((own - F.normalize(reference.rows(*one), dim=-1)).abs().max()) < TOLERANCE
    expected = [reference.reward(*one) for one in INPUTS]
    assert np.abs(np.array(rewards) - expected).max() < OF_REWARDS
    assert np.abs(np.array(rewards) - alone).max() < OF_REWARDS
    assert abs(expected[4] - expected[6]) > 1e-2, "another picture, another reward"


def of_seed(url: str) -> dict[str, Any]:
    """The body of FastDeploy's documentation, whose picture is at `url`: its longer side is to be 224."""
    return {
        "model": "",
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]},
            {"role": "assistant", "content": [{"type": "text", "text": "图里有几个人"}]},
        ],
        "user": "user-123",
        "chat_template": None,
        "chat_template_kwargs": {"custom_var": "value"},
        "mm_processor_kwargs": {"image_size": 224},
    }


@pytest.mark.parametrize("route", ["/v1/reward", "/v1/chat/reward"])
@pytest.mark.parametrize(("image", "most"), [(A, pictured.MOST_TOKENS * 28**2), (noise(600, 400), 224 * 149)])
def test_the_documented_body_of_fastdeploy(
    client: TestClient, reference: Reference, route: str, image: Image, most: int
) -> None:
    source = url(image)
    answer = client.post(route, json=of_seed(source))
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["id"].startswith("reward-user-123-")
    text = f"<|begin_of_sentence|>User: Picture 1:{ERNIE_PICTURE}\nAssistant: 图里有几个人<|end_of_sentence|>"
    size = {"shortest_edge": 4 * 28**2, "longest_edge": most}
    expected = reference.reward(text, [image], size=size)
    assert body["data"][0]["score"] == [pytest.approx(expected, abs=OF_REWARDS)]
    assert body["usage"]["prompt_tokens"] == len(reference.rows(text, [image], size=size))
    other = url(noise(*image.size, seed=1))
    score = client.post(route, json=of_seed(other)).json()["data"][0]["score"][0]
    assert abs(score - expected) > 1e-3, "another picture, another reward"
