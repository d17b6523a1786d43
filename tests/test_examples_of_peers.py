"""Snippets for `embed` and `encode` from vLLM's documentation, old and new, run with only the import changed.

The checkpoints they name are stood in for by tiny ones in folders of the same names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import requests
from transformers import JinaEmbeddingsV3Config, JinaEmbeddingsV3Model

from tests import checkpoints
from tests.server.test_process import Process

PRESENT = {
    "encode": """
from cenote import LLM

llm = LLM(model="intfloat/e5-small", runner="pooling")
(output,) = llm.encode("Hello, my name is", pooling_task="embed")

data = output.outputs.data
print(f"Data: {data!r}")
""",
    "embed": """
from cenote import LLM

llm = LLM(model="intfloat/e5-small", runner="pooling")
(output,) = llm.embed("Hello, my name is")

embeds = output.outputs.embedding
print(f"Embeddings: {embeds!r} (size={len(embeds)})")
""",
    "matryoshka": """
from cenote import LLM, PoolingParams

llm = LLM(
    model="jinaai/jina-embeddings-v3",
    runner="pooling",
    trust_remote_code=True,
)
outputs = llm.embed(
    ["Follow the white rabbit."],
    pooling_params=PoolingParams(dimensions=32),
)
print(outputs[0].outputs)
""",
}

PAST = {
    "task": """
from cenote import LLM

llm = LLM(model="intfloat/e5-mistral-7b-instruct", task="embed")
(output,) = llm.embed("Hello, my name is")
embeds = output.outputs.embedding
print(f"Embeddings: {embeds!r} (size={len(embeds)})")
""",
    "encode without a task": """
from cenote import LLM

llm = LLM(model="intfloat/e5-mistral-7b-instruct", task="embed")
outputs = llm.encode("Hello, my name is")
for output in outputs:
    embeddings = output.outputs.embedding
    print(f"Embeddings (size={len(embeddings)}: {embeddings!r}")
""",
}

ONLINE = """
host = "localhost"
model_name = "intfloat/e5-small"

api_url = f"http://{host}:{port}/pooling"

prompts = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
prompt = {"model": model_name, "input": prompts, "task": "embed"}

response = requests.post(api_url, json=prompt)

for output in response.json()["data"]:
    data = output["data"]
    print(f"Data: {data!r} (size={len(data)})")
"""


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders with the names that the snippets use, below the working directory."""
    for name in ("intfloat/e5-small", "intfloat/e5-mistral-7b-instruct", "jinaai/jina-embeddings-v3"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
    checkpoints.bert(tmp_path / "intfloat/e5-small")
    checkpoints.decoder(tmp_path / "intfloat/e5-mistral-7b-instruct")
    tokenizer = checkpoints.wordpiece()
    config = JinaEmbeddingsV3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.matryoshka_dimensions = [32, 64]
    checkpoints.save(JinaEmbeddingsV3Model(config), tokenizer, tmp_path / "jinaai/jina-embeddings-v3", seed=0)
    monkeypatch.chdir(tmp_path)


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(code, names)
    return names


@pytest.mark.parametrize("code", PRESENT.values(), ids=PRESENT)
def test_present(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(code)
    shown = capsys.readouterr().out
    if "outputs" in names:
        assert shown.strip() == "EmbeddingOutput(hidden_size=32)"
        vector = names["outputs"][0].outputs.embedding
        assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-5)
    else:
        assert ("Data: tensor([" in shown) or (f"(size={checkpoints.HIDDEN})" in shown)


@pytest.mark.parametrize("code", PAST.values(), ids=PAST)
def test_past(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(FutureWarning, match="older releases of vLLM"):
        run(code)
    assert f"(size={checkpoints.HIDDEN}" in capsys.readouterr().out


def test_online(capsys: pytest.CaptureFixture[str]) -> None:
    server = Process("intfloat/e5-small")
    try:
        run(ONLINE, requests=requests, port=server.port)
    finally:
        server.process.terminate()
        server.process.wait()
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(f"(size={checkpoints.HIDDEN})") for line in lines] == [True] * 4
    assert len(set(lines)) == 4
