"""A page for a late-interaction model without a chat template, over HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from starlette.testclient import TestClient

from cenote import LLM
from cenote.config import ServerConfig
from cenote.server.app import build
from tests import pictured
from tests.pictured import noise, url

if TYPE_CHECKING:
    from pathlib import Path

PAGE = noise(90, 130)


def test_a_page_of_a_model_without_a_chat_template_is_rendered_by_its_own(tmp_path: Path) -> None:
    parts = [{"type": "image_url", "image_url": {"url": url(PAGE)}}, {"type": "text", "text": "Describe the image."}]
    with LLM(str(pictured.colpali(tmp_path / "colpali"))) as llm:
        (output,) = llm.encode([PAGE], use_tqdm=False, pooling_task="token_embed")
        with TestClient(build([llm._service], ServerConfig()), raise_server_exceptions=False) as client:
            answer = client.post("/pooling", json={"messages": [{"role": "user", "content": parts}]})
    assert answer.status_code == 200, answer.text
    own, expected = np.array(answer.json()["data"][0]["data"]), output.outputs.data.numpy()
    assert own.shape == expected.shape
    assert np.abs(own - expected).max() < 1e-5
