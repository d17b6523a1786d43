"""Pictures in pairs of cross-encoders: the scores of the published code and of sentence-transformers, pair by pair."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder
from starlette.testclient import TestClient

from cenote import LLM
from cenote.config import ServerConfig
from cenote.errors import BadRequest, TooLong
from cenote.server.app import build
from tests import pictured
from tests.conftest import error
from tests.models.families.test_images_heads import END, NAME, SYSTEM, Reference
from tests.pictured import PICTURE, noise, saved

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

A, B, C = noise(90, 130), noise(90, 130, seed=1), noise(300, 60)
INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."
TOLERANCE = 2e-5
"""Largest difference of probabilities; measured: 1e-6."""
PAIRS: list[tuple[Any, Any]] = [
    ("revenue", "a page"),
    ("revenue", A),
    ("revenue", B),
    (A, "a page"),
    (A, B),
    ("", C),
    ({"text": "which of these", "image": A}, {"text": "a table", "image": [B, C]}),
]


def side(content: Any) -> tuple[str, list[Any]]:
    """The text of a query or a document by the published code, NULL for none, and its pictures, which stand first."""
    if isinstance(content, dict):
        images = content["image"] if isinstance(content["image"], list) else [content["image"]]
        return PICTURE * len(images) + content["text"], images
    return (content or "NULL", []) if isinstance(content, str) else (PICTURE, [content])


def published(reference: Reference, query: Any, document: Any, instruction: str = INSTRUCTION) -> float:
    """The score of Qwen3-VL-Reranker's own code."""
    (left, images), (right, others) = side(query), side(document)
    text = f"{SYSTEM}<Instruct>: {instruction}<Query>:{left}\n<Document>:{right}{END}"
    return reference.yes(text, [*images, *others])


class Case:
    """Qwen3-VL-Reranker, loaded here, served, and by Transformers."""

    def __init__(self, folder: Path) -> None:
        self.llm = LLM(str(folder))
        self.reference = Reference(folder, "qwen3_vl")
        self.expected = [published(self.reference, *pair) for pair in PAIRS]

    def scores(self, pairs: list[tuple[Any, Any]], **options: Any) -> np.ndarray:
        queries, documents = map(list, zip(*pairs, strict=True))
        outputs = self.llm.score(queries, documents, use_tqdm=False, **options)
        return np.array([output.outputs.score for output in outputs])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    made = Case(pictured.qwen_vl(tmp_path_factory.mktemp("pairs") / NAME, "qwen3_vl"))
    yield made
    made.llm.close()


@pytest.fixture(scope="module")
def client(case: Case) -> Iterator[TestClient]:
    with TestClient(build([case.llm._service], ServerConfig()), raise_server_exceptions=False) as client:
        yield client


def test_scores_are_those_of_the_published_code(case: Case) -> None:
    assert case.llm.info.report.layout == "packed"
    assert np.abs(case.scores(PAIRS) - case.expected).max() < TOLERANCE
    assert abs(case.expected[1] - case.expected[2]) > 1e-3, "another picture, another score"
    for pair, expected in zip(PAIRS, case.expected, strict=True):
        assert abs(case.scores([pair])[0] - expected) < TOLERANCE


def test_an_instruction_stands_before_pictures_too(case: Case) -> None:
    expected = published(case.reference, "revenue", A, "Find it.")
    assert abs(case.scores([("revenue", A)], instruction="Find it.")[0] - expected) < TOLERANCE
    assert abs(expected - case.expected[1]) > 1e-4, "another instruction, another score"


def test_documents_are_ranked_for_a_picture(case: Case) -> None:
    documents = ["a page", B, C, "a table"]
    expected = np.array([published(case.reference, A, document) for document in documents])
    ranked = case.llm.rerank(A, documents, use_tqdm=False)
    assert [document.index for document in ranked] == np.argsort(-expected).tolist()
    assert np.abs([document.relevance_score for document in ranked] - np.sort(expected)[::-1]).max() < TOLERANCE


def part(image: Any) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(saved(image)).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def content(*parts: Any) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": one} if isinstance(one, str) else part(one) for one in parts]}


def test_content_parts_over_http(case: Case, client: TestClient) -> None:
    documents = ["a page", content(A), content("a table", B, C)]
    expected = [
        published(case.reference, A, document) for document in ("a page", A, {"text": "a table", "image": [B, C]})
    ]
    answer = client.post("/score", json={"data_1": content(A), "data_2": documents})
    assert answer.status_code == 200, answer.text
    scores = [entry["score"] for entry in answer.json()["data"]]
    assert np.abs(np.array(scores) - expected).max() < TOLERANCE
    tokens = sum(
        len(output.prompt_token_ids)
        for output in case.llm.score(A, ["a page", A, {"text": "a table", "image": [B, C]}], use_tqdm=False)
    )
    assert answer.json()["usage"]["prompt_tokens"] == tokens
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        results = client.post(path, json={"query": content(A), "documents": documents, "top_n": 2}).json()["results"]
        assert [result["index"] for result in results] == np.argsort(-np.array(expected))[:2].tolist()
        found = [result["relevance_score"] for result in results]
        assert np.abs(np.array(found) - np.sort(expected)[::-1][:2]).max() < TOLERANCE


def test_a_query_s_picture_is_processed_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = case.llm._service.renderer.pictures._layout  # type: ignore[union-attr]
    seen = []
    processed = type(reader).processed
    monkeypatch.setattr(type(reader), "processed", lambda *args: seen.append(args[1].key) or processed(*args))
    case.llm.score(A, ["a page", B, "a table"], use_tqdm=False)
    assert len(seen) == len(set(seen)) == 2


def test_sizes_are_those_of_the_request(case: Case) -> None:
    kwargs = {"max_pixels": 9 * 32**2}
    large = {"prompt": "", "multi_modal_data": {"image": noise(640, 320)}}
    (whole,) = case.llm.score("revenue", large, use_tqdm=False)
    (small,) = case.llm.score("revenue", {**large, "mm_processor_kwargs": kwargs}, use_tqdm=False)
    assert len(small.prompt_token_ids) < len(whole.prompt_token_ids)
    with pytest.raises(BadRequest, match="other mm_processor_kwargs for the query"):
        case.llm.score(large, {**large, "mm_processor_kwargs": kwargs}, use_tqdm=False)


def test_pairs_with_pictures_are_not_cut(case: Case, client: TestClient) -> None:
    with pytest.raises(TooLong, match="such pairs are not cut"):
        case.scores([("revenue", A)], tokenization_kwargs={"truncate_prompt_tokens": 40})
    (whole,) = case.scores([("revenue", A)], tokenization_kwargs={"truncate_prompt_tokens": -1})
    assert abs(whole - case.expected[1]) < TOLERANCE
    with pytest.raises(BadRequest, match="cut texts alone"):
        case.scores([("revenue", A)], max_tokens_per_doc=5)
    expected = published(case.reference, "page page", A)
    (cut,) = case.scores([("page page page page", A)], max_tokens_per_query=2)
    assert case.llm._service.pairs.cut(["page page page page"], 2) == ["page page"]
    assert abs(cut - expected) < TOLERANCE
    found = error(client, {"query": "a", "documents": [content(A, "page " * 5000)]}, "/rerank")
    assert found["code"] == 400
    assert "maximum context length" in found["message"]


def test_a_placeholder_in_a_text_is_refused(case: Case) -> None:
    with pytest.raises(BadRequest, match="2 image placeholders for 1 images"):
        case.scores([(f"revenue {PICTURE}", A)])


def test_without_a_template_pictures_have_no_place(case: Case, tmp_path: Path) -> None:
    folder = pictured.qwen_vl(tmp_path / "plain", "qwen3_vl")
    override = {"classifier_from_token": ["no", "yes"], "method": "from_2_way_softmax"}
    with LLM(str(folder), hf_overrides=override) as llm, pytest.raises(BadRequest, match="images have no place"):
        llm.score("revenue", A, use_tqdm=False)


def test_pictures_stand_where_a_template_puts_their_side(case: Case, tmp_path: Path) -> None:
    """A template may begin with the document: its pictures come first then."""
    template = "D {{ messages[1].content }} Q {{ messages[0].content }} yes or no"
    (own,) = case.llm.score(A, C, use_tqdm=False, chat_template=template)
    expected = case.reference.yes(f"D {PICTURE} Q {PICTURE} yes or no", [C, A])
    swapped = case.reference.yes(f"D {PICTURE} Q {PICTURE} yes or no", [A, C])
    assert abs(own.outputs.score - expected) < TOLERANCE
    assert abs(expected - swapped) > 1e-4, "the pictures of the two sides are not alike"


def m0_prompt(query: Any, document: Any) -> tuple[str, list[Any]]:
    """The prompt of jina-reranker-m0's own code, and its pictures: the document comes first."""
    (left, images), (right, others) = side(query), side(document)
    return f"**Document**:\n{right}\n**Query**:\n{left}", [*others, *images]


def test_jina_reranker_m0(tmp_path: Path) -> None:
    """Two layers over the token with the id 100 behind the prompt, less 2.65."""
    folder = pictured.jina_reranker_m0(tmp_path / "jina-reranker-m0")
    reference = Reference(folder, "qwen2_vl")
    weights = load_file(folder / "model.safetensors")
    pairs = [*PAIRS[:5], PAIRS[6]]

    def expected(query: Any, document: Any) -> float:
        text, images = m0_prompt(query, document)
        inputs = reference.processor(text=[text], images=images or None, return_tensors="pt")
        for name, closing in {"input_ids": 100, "attention_mask": 1, "mm_token_type_ids": 0}.items():
            inputs[name] = torch.cat([inputs[name], torch.tensor([[closing]])], dim=1)
        with torch.inference_mode():
            row = reference.model.model(**inputs, use_cache=False)[0][0, -1]
        hidden = torch.relu(torch.nn.functional.linear(row, weights["score.0.weight"], weights["score.0.bias"]))
        logit = torch.nn.functional.linear(hidden, weights["score.2.weight"], weights["score.2.bias"])
        return float((logit - 2.65).sigmoid())

    wanted = np.array([expected(*pair) for pair in pairs])
    with LLM(str(folder)) as llm:
        assert llm.info.report.layout == "packed"
        assert llm.info.score_types[0] == "cross-encoder"
        outputs = llm.score(*map(list, zip(*pairs, strict=True)), use_tqdm=False)
        (cut,) = llm.score(
            "revenue", "a page " * 40, use_tqdm=False, tokenization_kwargs={"truncate_prompt_tokens": 30}
        )
    assert np.abs([output.outputs.score for output in outputs] - wanted).max() < TOLERANCE
    assert abs(wanted[1] - wanted[2]) > 1e-3, "another picture, another score"
    assert cut.prompt_token_ids[-1] == 100, "a document that is cut leaves the last token"


ROLES = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}" + PICTURE + "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CrossEncoder over Qwen3-VL in the layout of sentence-transformers 6: the order of parts is the caller's."""
    folder = pictured.qwen_vl(tmp_path_factory.mktemp("cross") / "st", "qwen3_vl")
    (folder / "chat_template.jinja").write_text(ROLES)
    ids = pictured.vocabulary(folder)
    way = {"method": "forward", "method_output_name": "logits"}
    package = "sentence_transformers"
    for name, content in {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": f"{package}.base.modules.transformer.Transformer"},
            {
                "idx": 1,
                "name": "1",
                "path": "1_LogitScore",
                "type": f"{package}.cross_encoder.modules.logit_score.LogitScore",
            },
        ],
        "sentence_bert_config.json": {
            "transformer_task": "any-to-any",
            "modality_config": {
                **dict.fromkeys(("text", "image", "image+text"), way),
                "message": {**way, "format": "structured"},
            },
            "module_output_name": "causal_logits",
            "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
        },
        "config_sentence_transformers.json": {
            "model_type": "CrossEncoder",
            "prompts": {"find": "Find the page."},
            "default_prompt_name": "find",
            "activation_fn": "torch.nn.modules.activation.Sigmoid",
        },
        "1_LogitScore/config.json": {"true_token_id": ids["yes"], "false_token_id": ids["no"]},
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        pictured.write(folder, name, content)
    return folder


def test_a_cross_encoder_of_sentence_transformers(saved_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictured.without_video(monkeypatch, "Qwen3VLProcessor")
    pairs = [*PAIRS[:5], ("revenue", {"text": "a table", "image": B}), ("revenue", {"image": B, "text": "a table"})]
    reference = CrossEncoder(str(saved_folder), device="cpu")
    expected = np.array([reference.predict([pair])[0] for pair in pairs])
    instructed = reference.predict([pairs[1]], prompt="Be strict.")[0]
    with LLM(str(saved_folder)) as llm:
        assert llm.info.report.layout == "packed"
        queries, documents = map(list, zip(*pairs, strict=True))
        outputs = llm.score(queries, documents, use_tqdm=False)
        (strict,) = llm.score(*pairs[1], use_tqdm=False, instruction="Be strict.")
    assert np.abs([output.outputs.score for output in outputs] - expected).max() < TOLERANCE
    assert abs(strict.outputs.score - instructed) < TOLERANCE
    assert np.ptp(expected[[1, 2]]) > 1e-3, "another picture, another score"
    assert np.ptp(expected[[5, 6]]) > 1e-4, "another order, another score"
