"""Late-interaction checkpoints, in the file layouts that they are published in, against `MultiVectorEncoder`.

The weights are small and random. Queries shorter and longer than what they are filled up to, documents with tokens of
the skip-list and longer than what they are cut to: every rule of a checkpoint moves some row by far more than the
tolerance, and the tests say so where a rule could be dropped without a difference in shape.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import string
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling, MultiVectorMask
from transformers import (
    AutoModel,
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    OPTConfig,
    OPTModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from cenote import LLM
from cenote.core import Sequence
from cenote.errors import BadRequest, CheckpointError
from cenote.models.layouts import forward
from cenote.models.passes.subject import Settings
from cenote.models.passes.table import prepared
from cenote.tensors.packing import pack
from material.zoo import FIRST_TOKEN, WINDOW, ZOO, build
from tests import checkpoints
from tests.checkpoints import HIDDEN, POSITIONS, dense

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    Rows = list[np.ndarray]

WIDTH = 16
FILLED = 12
LONGEST = 20
IDENTITY = "torch.nn.modules.linear.Identity"
SIDES = ("query", "document")
QUERIES = [
    "quick fox",
    "The, lazy. dog!",
    "",
    "one two three four five six seven eight nine ten water stone dog fox",
]
"""The first three have fewer than `FILLED` tokens, the last more."""
DOCUMENTS = [
    "The quick brown fox jumps over the lazy dog.",
    "a, b. c! (hello) - water; stone?",
    "one two three four five six seven eight nine ten water stone, one two three four five six seven, eight. nine!",
    "...",
    "hello",
]
"""The third has more than `LONGEST` tokens and fewer than the models' positions."""
ALL_TEXTS = {"query": QUERIES, "document": DOCUMENTS}


def encoded(llm: LLM, texts: list[Any], side: str | None) -> Rows:
    outputs = llm.encode(texts, pooling_task="token_embed", input_type=side, use_tqdm=False)
    return [output.outputs.data.numpy() for output in outputs]


def reference(model: MultiVectorEncoder, texts: list[str], side: str | None) -> Rows:
    encode = {"query": model.encode_query, "document": model.encode_document, None: model.encode}[side]
    return encode(texts, convert_to_numpy=True, show_progress_bar=False)


def assert_same(got: Rows, expected: Rows) -> None:
    assert [rows.shape for rows in got] == [rows.shape for rows in expected]
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * max(1.0, float(np.abs(theirs).max(initial=0))))


def differ(first: Rows, second: Rows) -> bool:
    """Whether some row is another one, or there are more or fewer of them."""
    return any(a.shape != b.shape or np.abs(a - b).max() > 1e-2 for a, b in zip(first, second, strict=True))


def agree(folder: Path, **options: Any) -> dict[str | None, Rows]:
    """Assert that both sides, no side, and the scores are the reference's; return the vectors by side."""
    with agreed(folder, **options) as (_, found):
        return found


@contextmanager
def agreed(
    folder: Path, *, documents: list[str] = DOCUMENTS, **options: Any
) -> Iterator[tuple[LLM, dict[str | None, Rows]]]:
    """Yield the model, too, after the same assertions."""
    model = MultiVectorEncoder(str(folder), device="cpu")
    found: dict[str | None, Rows] = {}
    references: dict[str | None, Rows] = {}
    with LLM(model=str(folder), **options) as llm:
        assert llm.info.tasks[0] == "token_embed"
        assert llm.info.score_types[0] == "late-interaction"
        for side, texts in (("query", QUERIES), ("document", documents), (None, documents[:2])):
            found[side] = encoded(llm, texts, side)
            references[side] = reference(model, texts, side)
            assert_same(found[side], references[side])
        sides = [[torch.from_numpy(rows) for rows in references[side]] for side in SIDES]
        expected = model.similarity(*sides).cpu().numpy()
        for query, row in zip(QUERIES, expected, strict=True):
            scores = [output.outputs.score for output in llm.score(query, documents, use_tqdm=False)]
            np.testing.assert_allclose(scores, row, rtol=1e-5, atol=1e-5)
        yield llm, found


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def folder(bert: Path, tmp_path: Path) -> Path:
    """A copy of the encoder, to be made a late-interaction checkpoint."""
    return shutil.copytree(bert, tmp_path / "model")


# Sentence-Transformers


def projection(
    out: int = WIDTH, *, inputs: int = HIDDEN, bias: bool = False, seed: int = 0, activation: nn.Module | None = None
) -> Dense:
    torch.manual_seed(seed)
    return Dense(
        inputs,
        out,
        bias=bias,
        activation_function=activation or torch.nn.Identity(),
        module_input_name="token_embeddings",
    )


NORMALIZE = Normalize(module_input_name="token_embeddings")
FIXED: dict[str, Any] = {"strategy": "fixed", "length": FILLED, "attend": False}
PROMPTS = {"query": "hello ", "document": "represent the sentence: "}


def written(
    backbone: Path,
    path: Path,
    *modules: nn.Module,
    skipped: list[str] | None = None,
    skipped_of: list[str] | None = None,
    prompts: dict[str, str] = PROMPTS,
    last: tuple[nn.Module, ...] = (),
    **transformer: Any,
) -> Path:
    """A folder as the installed release saves it: Transformer, `modules` (default: one projection), mask, Normalize.

    Behind them come the modules `last`.
    """
    steps = modules or (projection(), NORMALIZE)
    mask = MultiVectorMask(skiplist_words=skipped, skiplist_tasks=skipped_of)
    model = MultiVectorEncoder(
        modules=[Transformer(str(backbone), **transformer), *steps[:-1], mask, steps[-1], *last],
        prompts=dict(prompts),
        device="cpu",
    )
    model.save_pretrained(str(path), create_model_card=False)
    return path


def test_a_normalize_that_writes_elsewhere_is_refused(bert: Path, tmp_path: Path) -> None:
    elsewhere = Normalize(module_input_name="token_embeddings", module_output_name="normalized")
    folder = written(bert, tmp_path / "model", projection(), elsewhere)
    with pytest.raises(CheckpointError, match="module_output_name 'normalized' is not honoured here, only token_embed"):
        LLM(model=str(folder))


PUNCTUATION = list(string.punctuation)

VARIANTS: dict[str, dict[str, Any]] = {
    "hidden expansion": {"query_expansion": FIXED},
    "seen expansion": {"query_expansion": {**FIXED, "attend": True}},
    "no expansion": {},
    "at least so many": {"query_expansion": {**FIXED, "strategy": "min"}},
    "at least so many, seen": {"query_expansion": {**FIXED, "strategy": "min", "attend": True}},
    "at least so many, cut": {"query_expansion": {**FIXED, "strategy": "min"}, "query_length": FILLED + 3},
    "another expansion token": {"query_expansion": {**FIXED, "token": "fox"}},
    "lengths": {"query_length": 7, "document_length": LONGEST},
    "lengths and expansion": {"query_expansion": FIXED, "document_length": LONGEST},
    "skip-list": {"skipped": PUNCTUATION, "query_expansion": FIXED},
    "skip-list of queries": {"skipped": ["the", "[MASK]", ","], "skipped_of": ["query"], "query_expansion": FIXED},
    "skip-list of both": {"skipped": PUNCTUATION, "skipped_of": ["query", "document"]},
    "skip-list of no single tokens": {"skipped": ["elephants", "fox"]},
    "no prompts": {"prompts": {}, "query_expansion": FIXED},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_sides_of_a_folder_of_the_installed_release(bert: Path, tmp_path: Path, variant: dict[str, Any]) -> None:
    found = agree(written(bert, tmp_path / "model", **variant))
    expansion = variant.get("query_expansion")
    if expansion and not variant.get("skipped_of"):
        counts = [len(rows) for rows in found["query"]]
        assert counts[:3] == [FILLED] * 3
        assert (counts[3] == FILLED) == (expansion["strategy"] == "fixed")
    if "document_length" in variant and "skipped" not in variant:
        assert len(found["document"][2]) == LONGEST


RULES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "hidden": ("query", {"query_expansion": FIXED}, {"query_expansion": {**FIXED, "attend": True}}),
    "expansion": ("query", {"query_expansion": FIXED}, {}),
    "its token": ("query", {"query_expansion": FIXED}, {"query_expansion": {**FIXED, "token": "fox"}}),
    "fixed": ("query", {"query_expansion": FIXED}, {"query_expansion": {**FIXED, "strategy": "min"}}),
    "query prompt": ("query", {}, {"prompts": {"document": PROMPTS["document"]}}),
    "document prompt": ("document", {}, {"prompts": {"query": PROMPTS["query"]}}),
    "document length": ("document", {"document_length": LONGEST}, {}),
    "query length": ("query", {"query_length": 7}, {}),
    "skip-list": ("document", {"skipped": [","]}, {}),
    "whose skip-list": ("query", {"skipped": [","]}, {"skipped": [","], "skipped_of": ["query"]}),
}


@pytest.fixture(scope="module")
def rows_of(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], dict[str, Rows]]:
    """Rows of both sides by a variant, each of which is written and loaded once."""

    @functools.cache
    def rows(variant: str) -> dict[str, Rows]:
        folder = written(bert, tmp_path_factory.mktemp("rule") / "model", **json.loads(variant))
        with LLM(model=str(folder)) as llm:
            return {side: encoded(llm, texts, side) for side, texts in ALL_TEXTS.items()}

    return lambda variant: rows(json.dumps(variant))


@pytest.mark.parametrize(("side", "one", "other"), RULES.values(), ids=RULES)
def test_every_rule_moves_something(
    rows_of: Callable[[dict[str, Any]], dict[str, Rows]], side: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert differ(rows_of(one)[side], rows_of(other)[side])


MODULES: dict[str, tuple[Callable[[], nn.Module], ...]] = {
    "bias": (lambda: projection(bias=True), lambda: NORMALIZE),
    "activation": (lambda: projection(activation=torch.nn.Tanh()), lambda: NORMALIZE),
    "two": (lambda: projection(24), lambda: projection(inputs=24, bias=True, seed=1), lambda: NORMALIZE),
    "none": (lambda: NORMALIZE,),
    "not normalised": (lambda: projection(),),
    "normalised first": (lambda: NORMALIZE, lambda: projection(bias=True)),
    "normalised before and behind": (lambda: NORMALIZE, lambda: projection(bias=True), lambda: NORMALIZE),
    "normalised between": (lambda: projection(24), lambda: NORMALIZE, lambda: projection(inputs=24, bias=True, seed=1)),
}


@pytest.mark.parametrize("made", MODULES.values(), ids=MODULES)
def test_modules_over_token_vectors(bert: Path, tmp_path: Path, made: tuple[Callable[[], nn.Module], ...]) -> None:
    modules = [make() for make in made]
    path = written(bert, tmp_path / "model", *modules, query_expansion=FIXED, skipped=PUNCTUATION)
    found = agree(path)
    widths = {rows.shape[1] for side in SIDES for rows in found[side]}
    assert widths == {HIDDEN if len(modules) == 1 and modules[0] is NORMALIZE else WIDTH}
    norms = np.concatenate([np.linalg.norm(rows, axis=1) for side in SIDES for rows in found[side]])
    assert np.allclose(norms, 1, atol=1e-5) == (modules[-1] is NORMALIZE)


POOLINGS: dict[str, dict[str, Any]] = {
    "by two": {"pool_factor": 2},
    "by a fraction": {"pool_factor": 1.5},
    "nearly all": {"pool_factor": 50},
    "none": {"pool_factor": 1},
    "nothing protected": {"pool_factor": 3, "num_protected_tokens": 0},
    "much protected": {"pool_factor": 2, "num_protected_tokens": 4},
    "not normalised": {"pool_factor": 2, "normalize_embeddings": False},
    "queries": {"pool_factor": 2, "tasks": "query"},
    "both": {"pool_factor": 2, "tasks": ["query", "document"]},
}


@pytest.fixture(scope="module")
def unpooled(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Numbers of rows before they are joined."""
    path = pooled(bert, tmp_path_factory.mktemp("unpooled") / "model", pool_factor=2)
    with LLM(model=str(path), plain_late_interaction=True) as llm:
        return {side: [len(rows) for rows in encoded(llm, texts, None)] for side, texts in ALL_TEXTS.items()}


@pytest.mark.parametrize("options", POOLINGS.values(), ids=POOLINGS)
def test_token_pooling(bert: Path, tmp_path: Path, unpooled: dict[str, list[int]], options: dict[str, Any]) -> None:
    found = agree(pooled(bert, tmp_path / "model", **options))
    sides, factor = options.get("tasks", "document"), options["pool_factor"]
    protected = options.get("num_protected_tokens", 1)
    for side, lengths in unpooled.items():
        fewer = [min(n, protected + max(int((n - protected) // factor), 1)) for n in lengths]
        assert [len(rows) for rows in found[side]] == (fewer if side in sides else lengths)
    norms = [np.linalg.norm(rows, axis=1) for rows in found["document"]]
    assert np.allclose(np.concatenate(norms), 1, atol=1e-5) == options.get("normalize_embeddings", True)


def test_token_pooling_comes_after_the_skip_list_and_is_for_texts(bert: Path, tmp_path: Path) -> None:
    path = pooled(bert, tmp_path / "model", skipped=PUNCTUATION, query_expansion=FIXED, pool_factor=2)
    with agreed(path) as (llm, _):
        ids = llm.get_tokenizer()(DOCUMENTS[0])["input_ids"]
        assert len(encoded(llm, [{"prompt_token_ids": ids}], "document")[0]) == len(ids)


def pooled(bert: Path, path: Path, *, skipped: list[str] | None = None, **options: Any) -> Path:
    names = ("pool_factor", "num_protected_tokens", "normalize_embeddings", "tasks")
    own = {name: options.pop(name) for name in names if name in options}
    pooling = HierarchicalTokenPooling(own.pop("pool_factor"), **own)
    return written(
        bert, path, projection(), NORMALIZE, last=(pooling,), skipped=skipped or [], **{"prompts": {}, **options}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool_factor": 0.5}, "at least 1 token into one and protects at least 0"),
        ({"num_protected_tokens": -1}, "at least 1 token into one and protects at least 0"),
        ({"linkage": "single"}, r"4_HierarchicalTokenPooling/config\.json has the key linkage"),
    ],
)
def test_token_poolings_that_are_not_understood(
    bert: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = pooled(bert, tmp_path / "model", pool_factor=2)
    checkpoints.edit_json(next(path.glob("*_HierarchicalTokenPooling")) / "config.json", **change)
    with pytest.raises(CheckpointError, match=message):
        LLM(model=str(path))


def test_token_pooling_of_older_folders_does_not_normalise(bert: Path, tmp_path: Path) -> None:
    path = pooled(bert, tmp_path / "model", pool_factor=2)
    file = next(path.glob("*_HierarchicalTokenPooling")) / "config.json"
    content = checkpoints.read_json(file)
    del content["normalize_embeddings"]
    checkpoints.write_json(file, content)
    rows = np.concatenate(agree(path)["document"])
    assert not np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)


def test_token_pooling_is_the_last_module(bert: Path, tmp_path: Path) -> None:
    pooling = HierarchicalTokenPooling(2)
    path = written(bert, tmp_path / "model", projection(), pooling, NORMALIZE)
    with pytest.raises(CheckpointError, match="HierarchicalTokenPooling as the last module"):
        LLM(model=str(path))


def test_token_pooling_needs_scipy(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pooled(bert, tmp_path / "model", pool_factor=2)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "scipy" else find(name, *more))
    with pytest.raises(CheckpointError, match=r"needs scipy: pip install 'cenote\[token-pooling\]'"):
        LLM(model=str(path))
    with LLM(model=str(path), plain_late_interaction=True) as llm:  # as the message says
        (output,) = llm.encode("fox, dog", pooling_task="token_embed", use_tqdm=False)
        assert len(output.outputs.data) == len(output.prompt_token_ids)


def test_documents_longer_than_the_model_are_cut_where_it_says_so(bert: Path, tmp_path: Path) -> None:
    texts = [*DOCUMENTS, "fox, dog. " * 100]
    found = {}
    for length in (LONGEST, POSITIONS, POSITIONS + 8):  # more than the model takes is as much as it takes
        path = written(bert, tmp_path / str(length), document_length=length)
        with LLM(model=str(path)) as llm:
            found[length] = encoded(llm, texts, "document")
        assert len(found[length][-1]) == min(length, POSITIONS)
        if length <= POSITIONS:
            model = MultiVectorEncoder(str(path), device="cpu")
            assert_same(found[length], reference(model, texts, "document"))
    assert_same(found[POSITIONS + 8], found[POSITIONS])


def test_a_model_that_names_no_length_refuses_what_is_too_long(bert: Path, tmp_path: Path) -> None:
    with LLM(model=str(written(bert, tmp_path / "model", query_expansion=FIXED))) as llm:
        with pytest.raises(BadRequest, match=f"maximum context length is {POSITIONS} tokens"):
            encoded(llm, ["fox " * 100], "document")
        assert len(encoded(llm, ["fox " * 100], "query")[0]) == FILLED


@pytest.mark.parametrize("side", [*SIDES, None])
def test_token_ids_are_taken_as_they_are(bert: Path, tmp_path: Path, side: str | None) -> None:
    """Neither marked, nor filled up, nor cut, nor is anything left out."""
    path = written(bert, tmp_path / "model", query_expansion=FIXED, document_length=8, skipped=[","])
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = [tokenizer(text)["input_ids"] for text in ("fox, dog", "a, b, c, d, e, f, g, h, water, stone")]
    model = MultiVectorEncoder(str(path), device="cpu")
    with torch.inference_mode():
        rows = [model[1].linear(AutoModel.from_pretrained(path)(torch.tensor([one]))[0][0]) for one in ids]
    expected = [torch.nn.functional.normalize(one, dim=-1).numpy() for one in rows]
    with LLM(model=str(path)) as llm:
        assert_same(encoded(llm, [{"prompt_token_ids": one} for one in ids], side), expected)


def test_score_and_rerank_choose_the_sides(bert: Path, tmp_path: Path) -> None:
    path = written(bert, tmp_path / "model", query_expansion=FIXED, document_length=LONGEST, skipped=PUNCTUATION)
    model = MultiVectorEncoder(str(path), device="cpu")
    documents = DOCUMENTS[:4]  # as many as queries
    expected = model.similarity(model.encode_query(QUERIES), model.encode_document(documents)).cpu().numpy()
    with LLM(model=str(path)) as llm:
        pairs = llm.score(QUERIES, documents, use_tqdm=False)
        np.testing.assert_allclose([o.outputs.score for o in pairs], np.diag(expected), rtol=1e-5)
        assert len(pairs[0].prompt_token_ids) > FILLED  # a filled query and a document
        ranked = llm.rerank(QUERIES[0], documents, use_tqdm=False)
        assert [entry.index for entry in ranked] == np.argsort(-expected[0]).tolist()
        np.testing.assert_allclose([entry.relevance_score for entry in ranked], np.sort(expected[0])[::-1], rtol=1e-5)
        sides = [
            llm.encode(texts, input_type=side, use_tqdm=False)
            for side, texts in zip(SIDES, (QUERIES, documents), strict=True)
        ]
        np.testing.assert_allclose(llm.similarity(*sides), expected, rtol=1e-5)
        plain = [llm.encode(texts, use_tqdm=False) for texts in (QUERIES, documents)]
        assert np.abs(llm.similarity(*plain).numpy() - expected).max() > 1e-2


def test_dense_scores_are_there_if_asked_for(bert: Path, tmp_path: Path) -> None:
    with LLM(model=str(written(bert, tmp_path / "model", query_expansion=FIXED))) as llm:
        assert llm.info.score_types == ("late-interaction", "bi-encoder")
        (late,), (dense_,) = (llm.score("fox", "dog", score_type=kind, use_tqdm=False) for kind in (None, "bi"))
        assert late.outputs.score > 1 > dense_.outputs.score  # a sum over tokens, and a cosine


@pytest.mark.parametrize(
    ("expansion", "message"),
    [
        ({"strategy": "most", "length": 8}, "query_expansion is not understood"),
        ({"strategy": "fixed"}, "query_expansion is not understood"),
        ({**FIXED, "colour": "red"}, "query_expansion is not understood"),
        ({**FIXED, "token": "elephants"}, "expanded with 'elephants', which the vocabulary does not have"),
    ],
)
def test_expansions_that_are_not_understood(
    bert: Path, tmp_path: Path, expansion: dict[str, Any], message: str
) -> None:
    path = written(bert, tmp_path / "model", query_expansion=FIXED)
    checkpoints.edit_json(path / "sentence_bert_config.json", query_expansion=expansion)
    with pytest.raises(CheckpointError, match=message):
        LLM(model=str(path))


# Backbones


def roberta(folder: Path) -> Path:
    tokenizer = checkpoints.sentinels()
    config = RobertaConfig(**sizes(len(tokenizer)), max_position_embeddings=POSITIONS + 2, pad_token_id=1)
    return checkpoints.save(RobertaModel(config), tokenizer, folder, 1)


def modernbert(folder: Path, window: int = 32) -> Path:
    tokenizer = checkpoints.wordpiece()
    config = ModernBertConfig(
        **{**sizes(len(tokenizer)), "num_hidden_layers": 3},
        max_position_embeddings=POSITIONS,
        local_attention=window,
        **SPECIAL_IDS,
    )
    return checkpoints.save(ModernBertModel(config), tokenizer, folder, 2)


def narrow(folder: Path) -> Path:
    """Its local layers see 4 tokens to each side: the last ones of a filled query see nothing there."""
    return modernbert(folder, 8)


def distilbert(folder: Path) -> Path:
    tokenizer = checkpoints.wordpiece()
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=HIDDEN, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=POSITIONS
    )
    return checkpoints.save(DistilBertModel(config), tokenizer, folder, 3)


def mpnet(folder: Path) -> Path:
    tokenizer = checkpoints.sentinels()
    config = MPNetConfig(**sizes(len(tokenizer)), max_position_embeddings=POSITIONS + 2, pad_token_id=1)
    return checkpoints.save(MPNetModel(config), tokenizer, folder, 4)


def deberta(folder: Path) -> Path:
    tokenizer = checkpoints.wordpiece()
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
    config = DebertaV2Config(**sizes(len(tokenizer)), max_position_embeddings=POSITIONS, pad_token_id=0, **relative)
    return checkpoints.save(DebertaV2Model(config), tokenizer, folder, 5)


def qwen(folder: Path) -> Path:
    """A causal model without a mask token: queries are filled up with what ends a text."""
    tokenizer = checkpoints.byte_level(special=("<pad>",), pad_token="<pad>", model_max_length=POSITIONS)
    return checkpoints.decoder(folder, "Qwen3Model", tokenizer=tokenizer, pad_token_id=1)


def t5(folder: Path) -> Path:
    """Its position bias does not reach hidden tokens in a packed batch."""
    tokenizer = checkpoints.byte_level(special=("<pad>",), pad_token="<pad>", model_max_length=POSITIONS)
    shape = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 1}
    config = T5Config(vocab_size=len(tokenizer), relative_attention_max_distance=16, **shape)
    return checkpoints.save(T5EncoderModel(config), tokenizer, folder, 6)


def opt(folder: Path) -> Path:
    """It counts positions by the attention mask."""
    tokenizer = checkpoints.byte_level(special=("<pad>",), pad_token="<pad>", model_max_length=POSITIONS)
    shape = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    config = OPTConfig(vocab_size=len(tokenizer), **shape, word_embed_proj_dim=HIDDEN, pad_token_id=1)
    return checkpoints.save(OPTModel(config), tokenizer, folder, 7)


def sizes(vocabulary: int) -> dict[str, int]:
    names = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return {**names, "vocab_size": vocabulary}


SPECIAL_IDS = {f"{name}_token_id": i for name, i in (("pad", 0), ("cls", 2), ("sep", 3), ("bos", 2), ("eos", 3))}

BACKBONES: dict[Callable[[Path], Path], str] = {
    roberta: "packed",
    modernbert: "packed",
    narrow: "packed",
    distilbert: "packed",
    mpnet: "padded",
    deberta: "padded",
    qwen: "packed",
    t5: "packed",
    opt: "packed",
}
"""Backbones and the layout that the probe finds for them."""
BYTE_LEVEL = (roberta, mpnet, qwen, t5, opt)
HIDES_PADDED = (t5, opt)
"""Those that run padded if tokens are to be hidden."""


FILLED_QUERIES = [
    pytest.param(made, attend, id=f"{made.__name__}-{'seen' if attend else 'hidden'}")
    for made in BACKBONES
    for attend in (False, True)
]


@pytest.mark.parametrize(("made", "attend"), FILLED_QUERIES)
def test_backbone(tmp_path: Path, made: Callable[[Path], Path], attend: bool) -> None:
    length = 24 if made in BYTE_LEVEL else FILLED  # their tokenizers make more tokens of the same text
    path = written(
        made(tmp_path / "backbone"),
        tmp_path / "model",
        query_expansion={"strategy": "fixed", "length": length, "attend": attend},
        document_length=40,
        skipped=[",", "."],
    )
    with agreed(path) as (llm, found):
        assert [len(rows) for rows in found["query"]] == [length] * len(QUERIES)
        assert llm.info.report.layout == ("padded" if made in HIDES_PADDED and not attend else BACKBONES[made])
        ids = llm.encode(QUERIES[:1], input_type="query", use_tqdm=False)[0].prompt_token_ids
        tokenizer = llm.get_tokenizer()
        assert ids[-1] == (tokenizer.eos_token_id if made in (qwen, t5, opt) else tokenizer.mask_token_id)


MIXED = ((12, 5), (9, 0), (20, 6), (12, 5), (1, 0), (9, 8), (24, 3), (12, 0))
"""Lengths, and how many of the last tokens are hidden."""
HIDING = ("bert", "xlm-roberta", "eurobert", "modernbert", "qwen3", "llama", "mistral-sliding", "gpt-oss", "mpnet")
HIDING += ("deberta-v2", "mobilebert", "llama-dynamic-rope", "t5", "opt", "esm-rotary", "gemma2")
LAYOUTS_OF_HIDING = {"t5": "padded", "opt": "padded", "esm-rotary": "padded"}
"""Where it is another one than without hidden tokens: the probe finds out that packing cannot hide them."""


@pytest.mark.parametrize("name", HIDING)
def test_hidden_tokens_are_seen_by_none_and_see_the_others(name: str) -> None:
    """As padding with an attention mask does it, for models whose attention is bidirectional, causal and local."""
    row = next(row for row in ZOO if row.name == name)
    generator = torch.Generator().manual_seed(0)
    sequences = [
        Sequence(torch.randint(FIRST_TOKEN, 300, (length,), generator=generator).tolist(), hidden=hidden)
        for length, hidden in MIXED
    ]
    with torch.inference_mode():
        net, alone = build(row), {}
        for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):  # no rotary frequency is left grown
            s = sequences[i]
            mask = torch.tensor([[1] * (len(s) - s.hidden) + [0] * s.hidden])
            alone[i] = net(input_ids=torch.tensor([s.ids]), attention_mask=mask)[0][0]
        layout = prepared(build(row), Settings(max_length=row.max_length), filled_to=WINDOW // 2).layout
        together = forward(layout, pack(sequences))
        seen = forward(layout, pack([replace(s, hidden=0) for s in sequences]))
    assert layout.name == LAYOUTS_OF_HIDING.get(name, row.layout)
    expected = torch.cat([alone[i] for i in range(len(sequences))])
    assert (together - expected).abs().max() < 2e-5 * max(1.0, float(expected.abs().max()))
    assert (seen - expected).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "layout"), [("gemma2", "padded"), ("mistral-sliding", "padded"), ("qwen3", "packed")])
def test_hidden_tokens_with_nothing_to_see(name: str, layout: str) -> None:
    """Beyond the window of local layers; what they get then is the model's own affair."""
    row = next(row for row in ZOO if row.name == name)
    ids = torch.randint(FIRST_TOKEN, 300, (3, 2 * WINDOW), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(2 * WINDOW) < torch.tensor([[3], [2 * WINDOW], [5]])).long()
    with torch.inference_mode():
        expected = torch.cat(
            [
                build(row)(input_ids=one[None], attention_mask=own[None])[0][0]
                for one, own in zip(ids, mask, strict=True)
            ]
        )
        subject = prepared(build(row), Settings(max_length=row.max_length), filled_to=2 * WINDOW)
        found, reasons = subject.layout, subject.reasons
        sequences = [Sequence(one.tolist(), hidden=int((1 - own).sum())) for one, own in zip(ids, mask, strict=True)]
        together = forward(found, pack(sequences))
    assert found.name == layout
    assert (together - expected).abs().max() < 2e-5 * max(1.0, float(expected.abs().max()))
    assert not reasons or "packed, with hidden tokens" in reasons[0]


# PyLate


def pylate(folder: Path, *, settings: dict[str, Any], width: int = WIDTH) -> Path:
    """What PyLate 1 writes: a Transformer and a Dense of its own class, everything else in one file."""
    module = dense(HIDDEN, width, activation=IDENTITY, bias=False)
    checkpoints.write_modules(
        folder, module, new=False, transformer={"max_seq_length": POSITIONS - 1, "do_lower_case": False}
    )
    listed = checkpoints.read_json(folder / "modules.json")
    listed[1]["type"] = "pylate.models.Dense.Dense"
    checkpoints.write_json(folder / "modules.json", listed)
    defaults = {
        "__version__": {"sentence_transformers": "4.0.2", "transformers": "4.48.0", "pytorch": "2.5.1"},
        "model_type": "ColBERT",
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "MaxSim",
        "query_prefix": "[Q] ",
        "document_prefix": "[D] ",
        "query_length": FILLED,
        "document_length": LONGEST,
        "attend_to_expansion_tokens": False,
        "skiplist_words": PUNCTUATION,
        "do_query_expansion": True,
    }
    content = {key: value for key, value in {**defaults, **settings}.items() if value != "absent"}
    checkpoints.write_json(folder / "config_sentence_transformers.json", content)
    return folder


PYLATE: dict[str, dict[str, Any]] = {
    "as it is": {},
    "seen expansion": {"attend_to_expansion_tokens": True},
    "no expansion": {"do_query_expansion": False},
    "expansion by default": {"do_query_expansion": "absent", "attend_to_expansion_tokens": "absent"},
    "no skip-list": {"skiplist_words": []},
    "skip-list by default": {"skiplist_words": "absent"},
    "own skip-list": {"skiplist_words": ["fox", ","]},
    "lengths by default": {"query_length": "absent", "document_length": "absent"},
    "prompts behind the prefixes": {"prompts": {"query": "hello ", "document": "[D] represent "}},
    "no prefixes": {"query_prefix": "", "document_prefix": ""},
}


MARKERS = [
    pytest.param(added, settings, id=f"{'added markers' if added else 'markers of the vocabulary'}-{name}")
    for added in (True, False)
    for name, settings in PYLATE.items()
]


@pytest.mark.parametrize(("added", "settings"), MARKERS)
def test_pylate(tmp_path: Path, settings: dict[str, Any], added: bool) -> None:
    """Markers are one token, whether they were added with their space or are entries that a text is split at."""
    tokenizer = checkpoints.wordpiece(lowercase=True, more=() if added else ("[unused0]", "[unused1]"))
    markers = ["[Q] ", "[D] "] if added else ["[unused0]", "[unused1]"]
    if added:
        tokenizer.add_tokens(markers)  # as text: the tokenizer lower-cases what it looks for
    backbone = checkpoints.bert(tmp_path / "model", tokenizer=tokenizer)
    named = dict(zip(("query_prefix", "document_prefix"), markers, strict=True))
    prompts = settings.get("prompts", {})
    if not added and prompts:
        prompts = {"query": "hello ", "document": "[unused1] represent "}
    folder = pylate(backbone, settings={**named, **settings, **({"prompts": prompts} if prompts else {})})
    with agreed(folder) as (llm, found):
        if settings == {}:
            assert [len(rows) for rows in found["query"]] == [FILLED] * len(QUERIES)
            for side, marker in zip(SIDES, markers, strict=True):
                ids = llm.encode(["fox"], input_type=side, use_tqdm=False)[0].prompt_token_ids
                assert ids[1] == llm.get_tokenizer().get_vocab()[marker]
    if settings.get("query_length") == "absent":
        assert [len(rows) for rows in found["query"]] == [32] * len(QUERIES)


def test_prefixes_of_pylate_move_the_vectors(tmp_path: Path) -> None:
    found = []
    for number, settings in enumerate(({}, {"query_prefix": "", "document_prefix": ""})):
        tokenizer = checkpoints.wordpiece()
        tokenizer.add_tokens(["[Q] ", "[D] "])
        folder = pylate(checkpoints.bert(tmp_path / str(number), tokenizer=tokenizer), settings=settings)
        with LLM(model=str(folder)) as llm:
            found.append([*encoded(llm, QUERIES, "query"), *encoded(llm, DOCUMENTS[:1], "document")])
    assert all(differ([marked], [bare]) for marked, bare in zip(*found, strict=True))


# Stanford


def colbert(folder: Path, metadata: dict[str, Any] | None, *, prefix: str = "bert.", **weights: torch.Tensor) -> Path:
    """ColBERT's own layout: the backbone under its prefix, beside it the projection, and the training's settings."""
    tokenizer = checkpoints.wordpiece(lowercase=True, more=("[unused0]", "[unused1]", "[unused2]"))
    checkpoints.bert(folder, tokenizer=tokenizer)
    file = folder / "model.safetensors"
    linear = torch.randn(WIDTH, HIDDEN, generator=torch.Generator().manual_seed(7)) / HIDDEN**0.5
    backbone = {prefix + name: tensor for name, tensor in load_file(file).items()}
    save_file({**backbone, "linear.weight": linear, **weights}, file, metadata={"format": "pt"})
    checkpoints.edit_json(folder / "config.json", architectures=["HF_ColBERT"])
    if metadata is not None:
        (folder / "artifact.metadata").write_text(json.dumps(metadata))
    return folder


METADATA: dict[str, Any] = {
    "query_token_id": "[unused0]",
    "doc_token_id": "[unused1]",
    "query_token": "[Q]",
    "doc_token": "[D]",
    "dim": WIDTH,
    "similarity": "cosine",
    "query_maxlen": FILLED,
    "doc_maxlen": LONGEST,
    "attend_to_mask_tokens": False,
    "mask_punctuation": True,
    "checkpoint": "colbert-ir/colbertv2.0",
    "interaction": "colbert",
}

STANFORD: dict[str, dict[str, Any] | None] = {
    "whole": METADATA,
    "absent": None,
    "seen expansion": {**METADATA, "attend_to_mask_tokens": True},
    "no skip-list": {**METADATA, "mask_punctuation": False},
    "other markers": {**METADATA, "query_token_id": "[unused2]", "doc_token_id": "[unused0]"},
    "little": {"query_maxlen": 9},
}


@pytest.mark.parametrize("metadata", STANFORD.values(), ids=STANFORD)
def test_stanford(tmp_path: Path, metadata: dict[str, Any] | None) -> None:
    folder = colbert(tmp_path / "model", metadata)
    asked = {"query": "query_token_id", "document": "doc_token_id"}
    with agreed(folder) as (llm, found):
        assert {rows.shape[1] for rows in found["query"]} == {WIDTH}
        assert {len(rows) for rows in found["query"]} == {(metadata or {}).get("query_maxlen", 32)}
        vocabulary = llm.get_tokenizer().get_vocab()
        for side, default in (("query", "[unused0]"), ("document", "[unused1]")):
            ids = llm.encode(["fox, dog"], input_type=side, use_tqdm=False)[0].prompt_token_ids
            assert ids[1] == vocabulary[(metadata or {}).get(asked[side], default)]
            assert ids[2] == vocabulary["fox"]
    rows = found["document"][0]  # a sentence with one full stop
    masked = metadata is None or metadata.get("mask_punctuation", True)
    with LLM(model=str(folder), plain_late_interaction=True) as llm:
        (plain,) = encoded(llm, DOCUMENTS[:1], "document")
    assert len(rows) == len(plain) + 1 - masked


STANFORD_RULES = {
    "markers": ("query", {"query_token_id": "[unused2]"}),
    "document marker": ("document", {"doc_token_id": "[unused2]"}),
    "skip-list": ("document", {"mask_punctuation": False}),
    "hidden": ("query", {"attend_to_mask_tokens": True}),
    "query length": ("query", {"query_maxlen": 10}),
    "document length": ("document", {"doc_maxlen": 10}),
}


def rated(folder: Path, metadata: dict[str, Any]) -> dict[str, Rows]:
    """Rows of both sides by ColBERT's own layout."""
    with LLM(model=str(colbert(folder, metadata))) as llm:
        return {side: encoded(llm, texts, side) for side, texts in ALL_TEXTS.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    """Those by all entries of the metadata."""
    return rated(tmp_path_factory.mktemp("whole") / "model", METADATA)


@pytest.mark.parametrize(("side", "change"), STANFORD_RULES.values(), ids=STANFORD_RULES)
def test_every_entry_of_the_metadata_counts(
    whole: dict[str, Rows], tmp_path: Path, side: str, change: dict[str, Any]
) -> None:
    assert differ(whole[side], rated(tmp_path / "model", {**METADATA, **change})[side])


def test_damaged_stanford_checkpoints(tmp_path: Path) -> None:
    folder = colbert(tmp_path / "damaged", None)
    (folder / "artifact.metadata").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read artifact\.metadata"):
        LLM(model=str(folder))
    bare = checkpoints.bert(tmp_path / "bare")
    checkpoints.edit_json(bare / "config.json", architectures=["HF_ColBERT"])
    with pytest.raises(CheckpointError, match=r"needs one of the tensors linear\.weight, colbert_linear\.weight"):
        LLM(model=str(bare))


# Plain: a projection and nothing else, as vLLM serves these models


def projected(folder: Path, texts: list[str], weight: torch.Tensor, bias: torch.Tensor | None = None) -> Rows:
    """Normalised projections of the backbone's rows, each text by itself."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
        rows = [torch.nn.functional.linear(one, weight, bias) for one in states]
        return [torch.nn.functional.normalize(one, dim=-1).numpy() for one in rows]


@pytest.mark.parametrize("name", ["linear", "colbert_linear"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_projection_beside_the_backbone(tmp_path: Path, name: str, biased: bool) -> None:
    folder = modernbert(tmp_path / "model")
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(WIDTH, HIDDEN, generator=generator) / HIDDEN**0.5
    bias = torch.randn(WIDTH, generator=generator) if biased else None
    backbone = {f"model.{key}": tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(backbone, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {f"{name}.weight": weight, **({} if bias is None else {f"{name}.bias": bias})}
    checkpoints.add_head(folder, "ModernBertModel", weights)
    expected = projected(folder, DOCUMENTS, weight, bias)
    with LLM(model=str(folder), hf_overrides={"architectures": ["ColBERTModernBertModel"]}) as llm:
        assert llm.info.score_types[0] == "late-interaction"
        for side in (*SIDES, None):
            assert_same(encoded(llm, DOCUMENTS, side), expected)
        (score,) = llm.score(DOCUMENTS[0], DOCUMENTS[1], use_tqdm=False)
        assert score.outputs.score == pytest.approx((expected[0] @ expected[1].T).max(1).sum(), rel=1e-5)


def test_a_colbert_architecture_needs_its_projection(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="needs one of the tensors"):
        LLM(model=str(modernbert(tmp_path / "m")), hf_overrides={"architectures": ["ColBERTModernBertModel"]})


def test_plain_late_interaction(tmp_path: Path) -> None:
    """Both sides of a marked, expanded and skipping checkpoint as their texts are, whole and unmarked."""
    folder = colbert(tmp_path / "model", {**METADATA, "doc_maxlen": 10})
    weight = load_file(folder / "model.safetensors")["linear.weight"]
    expected = projected(folder, DOCUMENTS, weight)
    with LLM(model=str(folder), plain_late_interaction=True) as llm:
        for side in (*SIDES, None):
            assert_same(encoded(llm, DOCUMENTS, side), expected)
        (score,) = llm.score(DOCUMENTS[0], DOCUMENTS[1], use_tqdm=False)
    assert score.outputs.score == pytest.approx((expected[0] @ expected[1].T).max(1).sum(), rel=1e-5)
    with LLM(model=str(folder)) as llm:
        (own,) = llm.score(DOCUMENTS[0], DOCUMENTS[1], use_tqdm=False)
    assert abs(own.outputs.score - score.outputs.score) > 1e-2


def test_plain_late_interaction_of_a_module_folder(bert: Path, tmp_path: Path) -> None:
    path = written(bert, tmp_path / "model", query_expansion=FIXED, document_length=8, skipped=[","])
    weight = load_file(next(path.glob("*_Dense")) / "model.safetensors")["linear.weight"]
    with LLM(model=str(path), plain_late_interaction=True) as llm:
        for side in SIDES:
            texts = DOCUMENTS[:2]
            prompt = PROMPTS[side]
            assert_same(encoded(llm, texts, side), projected(path, [prompt + text for text in texts], weight))
