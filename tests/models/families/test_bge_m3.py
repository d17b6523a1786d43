"""bge-m3: three kinds of embeddings of one forward, against FlagEmbedding's rules (`tests.models.flag_embedding`)."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, XLMRobertaConfig, XLMRobertaModel

from cenote import LLM
from cenote.errors import BadRequest, CheckpointError
from cenote.models.layouts import Packed
from tests import checkpoints
from tests.checkpoints import HIDDEN, NORMALIZE, POSITIONS, SHORT, pooling
from tests.models.flag_embedding import reference

if TYPE_CHECKING:
    from collections.abc import Iterator

TEXTS = [text for text in SHORT if len(text) < 45]
WIDTH = 24
WIDTHS = {"sparse_linear.pt": 1, "colbert_linear.pt": WIDTH}
TASKS = ["embed", "sparse", "token_embed", "token_classify"]


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published layout: an XLM-RoBERTa, modules for the dense vector, two layers as pickled tensors."""
    folder = tmp_path_factory.mktemp("m3")
    tokenizer = checkpoints.sentinels()
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=POSITIONS + 2,
        type_vocab_size=1,
        pad_token_id=1,
    )
    checkpoints.save(XLMRobertaModel(config), tokenizer, folder, 1)
    checkpoints.write_modules(
        folder, pooling("cls"), NORMALIZE, transformer={"max_seq_length": POSITIONS, "do_lower_case": False}
    )
    generator = torch.Generator().manual_seed(2)
    for name, width in WIDTHS.items():
        weight = torch.randn(width, HIDDEN, generator=generator)
        bias = (
            torch.randn(width, generator=generator) if width > 1 else torch.tensor([-3.0])
        )  # some weights are below 0
        torch.save({"weight": weight, "bias": bias}, folder / name)
    return folder


@pytest.fixture(scope="module")
def llm(m3: Path) -> Iterator[LLM]:
    with LLM(model=str(m3)) as llm:
        yield llm


@pytest.fixture
def folder(m3: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(m3, tmp_path / "model")


def assert_same(output: Any, task: str, expected: Any) -> None:
    if task == "sparse":
        assert output.indices.tolist() == sorted(expected)
        expected = [expected[token] for token in sorted(expected)]
    assert output.data.shape == np.shape(expected)
    np.testing.assert_allclose(output.data.numpy(), expected, rtol=0, atol=1e-5)


def test_what_it_offers(llm: LLM, m3: Path) -> None:
    assert llm.info.tasks == tuple(TASKS)
    assert llm.info.default_task == "embed"
    assert llm.info.score_types == ("bi-encoder", "hybrid", "late-interaction", "sparse")
    assert llm.info.max_model_len == POSITIONS


@pytest.mark.parametrize("task", TASKS)
def test_each_task(llm: LLM, m3: Path, task: str) -> None:
    outputs = llm.encode(TEXTS, pooling_task=task, use_tqdm=False)
    for text, output in zip(TEXTS, outputs, strict=True):
        assert_same(output.outputs, task, reference(m3, text)[task])


def test_the_texts_tell_the_rules_apart(m3: Path) -> None:
    """Tokens come twice with different weights, some have none, and the special ones would have one."""
    found = [reference(m3, text) for text in TEXTS]
    tokenizer = AutoTokenizer.from_pretrained(m3)
    ids = [tokenizer(text)["input_ids"][1:-1] for text in TEXTS]
    repeated = [
        len({round(w, 4) for i, w in zip(one, f["token_classify"], strict=True) if i == token and w > 0})
        for one, f in zip(ids, found, strict=True)
        for token in set(one)
    ]
    assert max(repeated) > 1
    assert any(0.0 in f["token_classify"] for f in found)
    assert all(len(f["token_embed"]) == len(one) + 1 for one, f in zip(ids, found, strict=True))
    layer = torch.load(m3 / "sparse_linear.pt", weights_only=True)
    states = AutoModel.from_pretrained(m3)(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state[0]
    assert torch.nn.functional.linear(states[[0, -1]], **layer).max() > 0.1  # the first and the last token


@pytest.mark.parametrize("special", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
def test_special_tokens_have_no_weight(llm: LLM, m3: Path, special: str) -> None:
    """Not even within a text; the mask token is none of those that are dropped."""
    tokenizer = AutoTokenizer.from_pretrained(m3)
    own = tokenizer.convert_tokens_to_ids(special)
    texts = [f"water {special} {word}" for word in ("stone", "fox", "the", "a", "dog", "jumps")]
    outputs = llm.encode(texts, pooling_task="sparse", use_tqdm=False)
    weights = [reference(m3, text) for text in texts]
    for output, expected in zip(outputs, weights, strict=True):
        assert_same(output.outputs, "sparse", expected["sparse"])
        assert special == "<mask>" or own not in output.outputs.indices
    raw = [
        w
        for text, r in zip(texts, weights, strict=True)
        for i, w in zip(tokenizer(text)["input_ids"][1:-1], r["token_classify"], strict=True)
        if i == own
    ]
    assert max(raw) > 0


def test_embed_sparse(llm: LLM, m3: Path) -> None:
    for text, output in zip(TEXTS, llm.embed_sparse(TEXTS, use_tqdm=False), strict=True):
        expected = reference(m3, text)["sparse"]
        assert output.outputs.indices == sorted(expected)
        assert output.outputs.tokens == llm.get_tokenizer().convert_ids_to_tokens(sorted(expected))
    (few,) = llm.embed_sparse(TEXTS[0], top_k=2, use_tqdm=False)
    expected = reference(m3, TEXTS[0])["sparse"]
    assert few.outputs.indices == sorted(sorted(expected, key=lambda token: -expected[token])[:2])


def test_an_empty_text_has_no_word(llm: LLM) -> None:
    (output,) = llm.encode("", pooling_task=TASKS, use_tqdm=False)
    others = output.outputs.others
    assert len(others["sparse"].data) == len(others["sparse"].indices) == len(others["token_classify"].data) == 0
    assert others["token_embed"].data.shape == (1, WIDTH)  # the closing token


def test_all_tasks_of_one_forward(llm: LLM, m3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    run = Packed.run
    monkeypatch.setattr(Packed, "run", lambda own, batch, *at: batches.append(batch.size) or run(own, batch, *at))
    outputs = llm.encode(TEXTS, pooling_task=TASKS, use_tqdm=False)
    assert sum(batches) == len(TEXTS)
    for text, output in zip(TEXTS, outputs, strict=True):
        expected = reference(m3, text)
        assert_same(output.outputs, "embed", expected["embed"])
        assert list(output.outputs.others) == TASKS[1:]
        for task, own in output.outputs.others.items():
            assert_same(own, task, expected[task])
    batches.clear()
    llm.score(TEXTS[0], TEXTS, score_type="hybrid", use_tqdm=False)
    assert sum(batches) == len(TEXTS), "the query is one of the documents, and runs once"


# Scores


def dense_score(query: dict[str, Any], document: dict[str, Any]) -> float:
    return float(query["embed"] @ document["embed"])


def lexical_score(query: dict[str, Any], document: dict[str, Any]) -> float:
    shared = query["sparse"].keys() & document["sparse"].keys()
    return sum(query["sparse"][token] * document["sparse"][token] for token in shared)


def max_sim(query: dict[str, Any], document: dict[str, Any]) -> float:
    return float((query["token_embed"] @ document["token_embed"].T).max(1).sum())


def hybrid_score(query: dict[str, Any], document: dict[str, Any]) -> float:
    """FlagEmbedding's weighted sum, in which MaxSim is divided by the query's rows."""
    colbert = max_sim(query, document) / len(query["token_embed"])
    return 0.4 * dense_score(query, document) + 0.2 * lexical_score(query, document) + 0.4 * colbert


SCORES = {
    None: dense_score,
    "bi-encoder": dense_score,
    "sparse": lexical_score,
    "late-interaction": max_sim,
    "hybrid": hybrid_score,
}


@pytest.mark.parametrize("kind", SCORES)
def test_scores(llm: LLM, m3: Path, kind: str | None) -> None:
    texts = [text for text in TEXTS if text]
    known = [reference(m3, text) for text in texts]
    expected = np.array([[SCORES[kind](query, document) for document in known] for query in known])
    for query, row in zip(texts, expected, strict=True):
        outputs = llm.score(query, texts, score_type=kind, use_tqdm=False)
        np.testing.assert_allclose([o.outputs.score for o in outputs], row, rtol=1e-4, atol=1e-5)
    paired = llm.score(texts, texts[::-1], score_type=kind, use_tqdm=False)
    np.testing.assert_allclose([o.outputs.score for o in paired], np.diag(expected[:, ::-1]), rtol=1e-4, atol=1e-5)
    ranked = llm.rerank(texts[1], texts, score_type=kind, use_tqdm=False)
    assert [entry.index for entry in ranked] == np.argsort(-expected[1]).tolist()


def test_texts_without_a_word_in_common_score_zero(llm: LLM) -> None:
    (output,) = llm.score("a", "b", score_type="sparse", use_tqdm=False)
    assert output.outputs.score == 0.0
    (output,) = llm.score("", "b", score_type="sparse", use_tqdm=False)
    assert output.outputs.score == 0.0


# What makes a checkpoint one of them


def test_recognised_by_its_files_without_modules(folder: Path) -> None:
    (folder / "modules.json").unlink()
    with LLM(model=str(folder)) as llm:
        (output,) = llm.encode(TEXTS[0], pooling_task=TASKS, use_tqdm=False)
    expected = reference(folder, TEXTS[0])
    assert_same(output.outputs, "embed", expected["embed"])  # CLS by default
    assert_same(output.outputs.others["sparse"], "sparse", expected["sparse"])


def test_one_of_the_files_is_not_enough(folder: Path) -> None:
    (folder / "colbert_linear.pt").unlink()
    with pytest.raises(CheckpointError, match=r"has the file sparse_linear\.pt.*--allow-unread sparse_linear\.pt"):
        LLM(model=str(folder))
    with LLM(model=str(folder), allow_unread="sparse_linear.pt") as llm:
        assert llm.info.tasks == ("embed", "token_embed")
        (output,) = llm.encode("a", pooling_task="token_embed", use_tqdm=False)
        assert output.outputs.data.shape == (3, HIDDEN)
        with pytest.raises(BadRequest, match="Unsupported task: 'sparse'"):
            llm.embed_sparse("a", use_tqdm=False)


OVERRIDES = {"architectures": ["BgeM3EmbeddingModel"]}


def test_recognised_by_name(folder: Path) -> None:
    with LLM(model=str(folder), hf_overrides=OVERRIDES) as llm:
        assert llm.info.architecture == "BgeM3EmbeddingModel"
        (output,) = llm.encode(TEXTS[0], pooling_task="sparse", use_tqdm=False)
    assert_same(output.outputs, "sparse", reference(folder, TEXTS[0])["sparse"])
    (folder / "sparse_linear.pt").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read sparse_linear\.pt"):
        LLM(model=str(folder), hf_overrides=OVERRIDES)


@pytest.fixture
def published(folder: Path) -> Path:
    """The files of the hub's repository: the backbone as a pickle, no folder for Normalize, float16 heads."""
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    checkpoints.edit_json(folder / "config.json", architectures=["XLMRobertaModel"])
    shutil.rmtree(folder / "2_Normalize")
    return folder


def test_the_published_files(m3: Path, published: Path) -> None:
    names = {file.name for file in published.iterdir()}
    assert names >= {"pytorch_model.bin", *WIDTHS, "1_Pooling", "modules.json", "sentence_bert_config.json"}
    assert not any(name.endswith(".safetensors") for name in names)
    with pytest.raises(CheckpointError, match="has pickled weights only, and --safetensors-only refuses them"):
        LLM(model=str(published), safetensors_only=True)
    with LLM(model=str(published)) as llm:
        assert llm.info.tasks == tuple(TASKS)
        assert any("restricted unpickler" in note and "pytorch_model.bin" in note for note in llm.info.report.warnings)
        outputs = llm.encode(TEXTS, pooling_task=TASKS, use_tqdm=False)
        scores = llm.score(TEXTS[0], TEXTS[1:3], score_type="hybrid", use_tqdm=False)
    known = [reference(m3, text) for text in TEXTS]
    for output, expected in zip(outputs, known, strict=True):
        assert_same(output.outputs, "embed", expected["embed"])
        for task, own in output.outputs.others.items():
            assert_same(own, task, expected[task])
    expected = [hybrid_score(known[0], document) for document in known[1:3]]
    np.testing.assert_allclose([o.outputs.score for o in scores], expected, rtol=1e-4)


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "older format"])
def test_code_in_a_pickled_backbone_is_not_run(published: Path, tmp_path: Path, archive: bool) -> None:
    heard = tmp_path / "heard"
    weights = torch.load(published / "pytorch_model.bin", weights_only=True)
    content = {**weights, "extra": Shout(str(heard))}
    torch.save(content, published / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    with pytest.raises(CheckpointError, match=r"cannot read pytorch_model\.bin"):
        LLM(model=str(published), allow_pickle=True)
    assert not heard.exists()
    torch.save(weights, published / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    with LLM(model=str(published), allow_pickle=True) as llm:
        assert "sparse" in llm.info.tasks


class Shout:
    """What runs code when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.path, "w")


def test_code_in_a_pickle_is_not_run(folder: Path, tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    torch.save({"weight": Shout(str(heard)), "bias": torch.zeros(1)}, folder / "sparse_linear.pt")
    with pytest.raises(CheckpointError, match=r"cannot read sparse_linear\.pt"):
        LLM(model=str(folder))
    assert not heard.exists()
    with (folder / "sparse_linear.pt").open("wb") as file:
        pickle.dump(Shout(str(heard)), file, protocol=2)  # in the format before the archive
    with pytest.raises(CheckpointError, match=r"cannot read sparse_linear\.pt"):
        LLM(model=str(folder), allow_pickle=True)
    assert not heard.exists()


DAMAGED: dict[str, Any] = {
    "empty": b"",
    "cut": None,
    "text": b"version https://git-lfs.github.com/spec/v1",
    "no bias": {"weight": torch.zeros(WIDTH, HIDDEN)},
    "more": {"weight": torch.zeros(WIDTH, HIDDEN), "bias": torch.zeros(WIDTH), "scale": torch.ones(1)},
    "three bytes": b"abc",
    "a number": {"weight": torch.zeros(WIDTH, HIDDEN), "bias": torch.tensor(1.0)},
    "a tensor": torch.zeros(WIDTH, HIDDEN),
    "a vector": {"weight": torch.zeros(HIDDEN), "bias": torch.zeros(WIDTH)},
    "another bias": {"weight": torch.zeros(WIDTH, HIDDEN), "bias": torch.zeros(WIDTH + 1)},
    "another width": {"weight": torch.zeros(WIDTH, HIDDEN + 1), "bias": torch.zeros(WIDTH)},
    "no tensors": {"weight": [1.0], "bias": [1.0]},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused_at_load(folder: Path, content: Any) -> None:
    file = folder / "colbert_linear.pt"
    if isinstance(content, bytes) or content is None:
        file.write_bytes(file.read_bytes()[:300] if content is None else content)
    else:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"colbert_linear\.pt"):
        LLM(model=str(folder))


def test_a_token_has_one_weight(folder: Path) -> None:
    shutil.copy(folder / "colbert_linear.pt", folder / "sparse_linear.pt")
    with pytest.raises(CheckpointError, match=rf"sparse_linear\.pt must give one weight per token, not {WIDTH}"):
        LLM(model=str(folder))


def test_half_precision_files(folder: Path) -> None:
    """The published ones are float16; the layers run in float32."""
    for name in WIDTHS:
        layer = torch.load(folder / name, weights_only=True)
        torch.save({key: tensor.half() for key, tensor in layer.items()}, folder / name)
    halves = {name: torch.load(folder / name, weights_only=True) for name in WIDTHS}
    for name, layer in halves.items():
        torch.save({key: tensor.float() for key, tensor in layer.items()}, folder / name)
    expected = reference(folder, TEXTS[0])
    for name, layer in halves.items():
        torch.save(layer, folder / name)
    with LLM(model=str(folder)) as llm:
        (output,) = llm.encode(TEXTS[0], pooling_task=TASKS, use_tqdm=False)
    for task in TASKS[1:]:
        assert_same(output.outputs.others[task], task, expected[task])
