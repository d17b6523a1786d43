"""Embedding models in the file layouts that they are published in, against `SentenceTransformer`.

Every folder holds what the family's checkpoints hold: the backbone under the tensor names that Transformers writes for
it, a tokenizer that marks texts as the family's does, the modules after the backbone, and the prompts. The weights are
small and random; prompts of both sides, their names and the default are compared on texts of mixed length.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from cenote import LLM, PoolingParams
from cenote.errors import BadRequest, CheckpointError
from tests import checkpoints
from tests.checkpoints import HIDDEN, NORMALIZE, TEXTS, Module, dense, flagged_pooling, pooling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 120
IDENTITY = "torch.nn.modules.linear.Identity"
CUT = {"truncate_prompt_tokens": -1}
INSTRUCTION = "Instruct: Given a web search query, retrieve relevant passages\nQuery:"

QWEN = {"query": INSTRUCTION, "document": ""}
GEMMA = {
    "query": "task: search result | query: ",
    "document": "title: none | text: ",
    "Clustering": "task: clustering | query: ",
    "STS": "task: sentence similarity | query: ",
    "Retrieval-document": "title: none | text: ",
}
NOMIC = {
    "search_query": "search_query: ",
    "search_document": "search_document: ",
    "clustering": "clustering: ",
    "classification": "classification: ",
}
E5 = {"query": "query: ", "passage": "passage: "}

PROJECTIONS = (
    dense(HIDDEN, 4 * HIDDEN, activation=IDENTITY, bias=False),
    dense(4 * HIDDEN, HIDDEN, activation=IDENTITY, bias=False, seed=1),
)


def _marked(first: str, last: str, **options: Any) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer that puts a text between two special tokens."""
    single = " ".join(part for part in (first, "$A", last) if part)
    return checkpoints.byte_level(single, special=(first, last), model_max_length=LONGEST, **options)


def _tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    modern = {"cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": None}
    return {
        "qwen": checkpoints.byte_level(padding_side="left", model_max_length=LONGEST),
        "gemma": _marked("<bos>", "<eos>", bos_token="<bos>", eos_token="<eos>"),
        "bert": checkpoints.wordpiece(lowercase=True, model_max_length=LONGEST),
        "xlm-r": checkpoints.sentinels(model_max_length=LONGEST),
        "modern": _marked("[CLS]", "[SEP]", **modern),
        "euro": _marked("<|begin_of_text|>", "<|end_of_text|>", bos_token="<|begin_of_text|>"),
    }


@dataclass(frozen=True)
class Family:
    """What a family's folders hold.

    Attributes:
        backbone: Transformers' name without `Model`.
        tokenizer: key of `_tokenizers`.
        modules: what follows the backbone.
        prompts: name to text.
        sides: names of the prompts of queries and of documents; none where the family has no prompts.
        head: ending of the class that is named in `config.json`.
        options: of its config.
        tensor: a tensor that its published files have by this name.
        padded: it runs padded, as its attention cannot be told where sequences end.
    """

    backbone: str
    tokenizer: str
    modules: tuple[Module, ...]
    prompts: Mapping[str, str] = field(default_factory=dict)
    sides: tuple[str, str] | tuple[()] = ()
    head: str = "Model"
    options: Mapping[str, Any] = field(default_factory=dict)
    tensor: str = ""
    padded: bool = False


SIDES = ("query", "document")
QWEN_OPTIONS = {"tie_word_embeddings": True}
GEMMA_OPTIONS = {
    "use_bidirectional_attention": True,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
MODERN_OPTIONS = {"local_attention": 16, "layer_types": ["full_attention", "sliding_attention"]}
LAST = flagged_pooling("lasttoken", include_prompt=True)
MEAN = flagged_pooling("mean_tokens", include_prompt=True)
CLS = flagged_pooling("cls_token", include_prompt=True)

FAMILIES: dict[str, Family] = {
    "qwen3-embedding": Family(
        "Qwen3",
        "qwen",
        (LAST, NORMALIZE),
        QWEN,
        SIDES,
        "ForCausalLM",
        QWEN_OPTIONS,
        "model.layers.0.mlp.up_proj.weight",
    ),
    "qwen3-embedding, bare": Family(
        "Qwen3", "qwen", (LAST, NORMALIZE), QWEN, SIDES, "Model", QWEN_OPTIONS, "layers.0.mlp.up_proj.weight"
    ),
    "embedding-gemma": Family(
        "Gemma3Text", "gemma", (MEAN, *PROJECTIONS, NORMALIZE), GEMMA, SIDES, "Model", GEMMA_OPTIONS
    ),
    "nomic-embed v1.5": Family(
        "NomicBert",
        "bert",
        (MEAN, NORMALIZE),
        NOMIC,
        ("search_query", "search_document"),
        options={"type_vocab_size": 2},
        tensor="encoder.layers.0.attn.Wqkv.weight",
    ),
    "gte-multilingual": Family("Gte", "xlm-r", (CLS, NORMALIZE), tensor="encoder.layer.0.attention.qkv_proj.weight"),
    "gte-modernbert": Family("ModernBert", "modern", (CLS,), options=MODERN_OPTIONS),
    "modernbert-embed": Family(
        "ModernBert",
        "modern",
        (MEAN, NORMALIZE),
        NOMIC,
        ("search_query", "search_document"),
        options=MODERN_OPTIONS,
    ),
    "eurobert": Family("EuroBert", "euro", (pooling("mean"),)),
    "multilingual-e5": Family("XLMRoberta", "xlm-r", (MEAN, NORMALIZE), E5, ("query", "passage")),
    "all-mpnet-base": Family("MPNet", "xlm-r", (MEAN, NORMALIZE), head="ForMaskedLM", padded=True),
}


def write(family: Family, folder: Path, modules: tuple[Module, ...] | None = None, **settings: Any) -> Path:
    """Write a checkpoint of `family`; `settings` are further entries of its Sentence-Transformers settings."""
    checkpoints.classifier(
        folder,
        family.backbone,
        family.head,
        tokenizer=_tokenizers()[family.tokenizer],
        **{"max_position_embeddings": LONGEST + 8, **family.options},
    )
    return checkpoints.write_modules(
        folder,
        *(family.modules if modules is None else modules),
        new=False,
        transformer={"max_seq_length": LONGEST, "do_lower_case": False},
        settings={"prompts": dict(family.prompts), "default_prompt_name": None, **settings},
    )


def reference(folder: Path, **options: Any) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", **options)


def theirs(model: SentenceTransformer, **options: Any) -> np.ndarray:
    rows: np.ndarray = model.encode(TEXTS, show_progress_bar=False, **options)
    return rows


def ours(llm: LLM, **options: Any) -> np.ndarray:
    outputs = llm.embed(TEXTS, use_tqdm=False, tokenization_kwargs=CUT, **options)
    return np.array([output.outputs.embedding for output in outputs], np.float32)


def close(mine: np.ndarray, expected: np.ndarray) -> None:
    """Equal to 1e-5 of the largest value, and not because all texts give one row."""
    assert mine.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-5 * scale)
    apart = np.abs(expected[:, None] - expected[None]).max(axis=-1) + np.eye(len(expected))
    assert apart.min() > 1e-2


def far(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the rows of most texts differ by a hundred times what is taken as equal."""
    return one.shape != other.shape or float(np.median(np.abs(one - other).max(axis=-1))) > 1e-3


@dataclass(frozen=True)
class Loaded:
    """A family's checkpoint in both libraries."""

    family: Family
    folder: Path
    llm: LLM
    model: SentenceTransformer


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    family = FAMILIES[request.param]
    folder = write(family, tmp_path_factory.mktemp("family"))
    with LLM(model=str(folder)) as llm:
        yield Loaded(family, folder, llm, reference(folder))


def test_file_layout(loaded: Loaded) -> None:
    """The files are those of the family, and the model runs in the layout that the family needs."""
    with safe_open(loaded.folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert loaded.family.tensor in {*names, ""}
    architecture = checkpoints.read_json(loaded.folder / "config.json")["architectures"]
    assert architecture == [loaded.family.backbone + loaded.family.head]
    assert loaded.llm.info.report.layout.startswith("padded" if loaded.family.padded else "packed")
    assert loaded.llm.info.max_model_len == LONGEST


def test_encode(loaded: Loaded) -> None:
    """Rows of mixed lengths: one special token only, and more than the model takes."""
    lengths = [len(output.prompt_token_ids) for output in loaded.llm.embed(TEXTS, tokenization_kwargs=CUT)]
    assert min(lengths) <= 2
    assert max(lengths) == LONGEST or loaded.family.tokenizer == "bert"
    close(ours(loaded.llm), theirs(loaded.model))


def test_both_sides_of_a_search(loaded: Loaded) -> None:
    """`input_type` is `encode_query` and `encode_document`, and the side's own prompt under a name of the family's."""
    if not loaded.family.sides:
        close(ours(loaded.llm, input_type="query"), ours(loaded.llm))
        return
    query, document = loaded.family.sides
    rows = {side: ours(loaded.llm, input_type=side) for side in SIDES}
    close(rows["query"], theirs(loaded.model, prompt_name=query))
    close(rows["document"], theirs(loaded.model, prompt_name=document))
    # Sentence-Transformers knows a side by the first of its own names, and gives every model an empty prompt of that
    encoded = {"query": loaded.model.encode_query, "document": loaded.model.encode_document}
    for side, name in zip(SIDES, loaded.family.sides, strict=True):
        asked = {} if name == side else {"prompt_name": name}
        close(rows[side], encoded[side](TEXTS, show_progress_bar=False, **asked))
    plain = theirs(loaded.model)
    assert far(rows["query"], rows["document"])
    assert far(rows["query"], plain)
    assert far(rows["document"], plain) == bool(loaded.family.prompts[document])


def test_every_prompt_by_its_name(loaded: Loaded) -> None:
    plain = theirs(loaded.model)
    for name, text in loaded.family.prompts.items():
        rows = ours(loaded.llm, prompt_name=name)
        close(rows, theirs(loaded.model, prompt_name=name))
        assert far(rows, plain) == bool(text)
        checkpoints.assert_same(rows, ours(loaded.llm, input_type=name))
    text = "something of the caller's: "
    rows = ours(loaded.llm, prompt=text)
    close(rows, theirs(loaded.model, prompt=text))
    assert far(rows, plain)


@pytest.mark.parametrize("loaded", FAMILIES, indirect=True)
def test_default_prompt(loaded: Loaded, tmp_path: Path) -> None:
    """Inputs that ask for no prompt get the default; those of a side get the side's."""
    folder = shutil.copytree(loaded.folder, tmp_path / "model")
    prompts = dict(loaded.family.prompts) or {"query": "query: "}
    name = next(iter(prompts))
    settings = {"prompts": prompts, "default_prompt_name": name}
    checkpoints.write_json(folder / "config_sentence_transformers.json", settings)
    model = reference(folder)
    with LLM(model=str(folder)) as llm:
        rows = ours(llm)
        close(rows, theirs(model))
        close(rows, theirs(loaded.model, prompt=prompts[name]))
        if loaded.family.sides:
            document = ours(llm, input_type="document")
            close(document, theirs(model, prompt_name=loaded.family.sides[1]))
            assert far(rows, document)
    assert far(rows, theirs(loaded.model))


def test_every_module_counts(loaded: Loaded, tmp_path: Path) -> None:
    """The reference changes when any module is left out or pools otherwise, so `test_encode` would see that it was."""
    expected, modules = theirs(loaded.model), loaded.family.modules
    chosen = [flag for flag, value in modules[0].config.items() if value is True and flag.startswith("pooling_mode")]
    for mode in ("cls_token", "mean_tokens", "lasttoken", "max_tokens"):
        if f"pooling_mode_{mode}" in chosen or (not chosen and mode == "mean_tokens"):
            continue
        folder = shutil.copytree(loaded.folder, tmp_path / mode)
        checkpoints.write_json(folder / "1_Pooling" / "config.json", flagged_pooling(mode).config)
        assert far(theirs(reference(folder)), expected), mode
    listed = checkpoints.read_json(loaded.folder / "modules.json")
    left_out = [[place] for place in range(2, len(listed)) if modules[place - 1].kind != "Dense"]
    left_out += [[2, 3]] if "Dense" in [module.kind for module in modules] else []
    for places in left_out:
        folder = shutil.copytree(loaded.folder, tmp_path / f"without {places}")
        checkpoints.write_json(folder / "modules.json", [entry for entry in listed if entry["idx"] not in places])
        assert far(theirs(reference(folder)), expected), places


def test_each_projection_counts(tmp_path: Path) -> None:
    """Two projections without bias or activation are one matrix; both are in the result, in their order."""
    family = FAMILIES["embedding-gemma"]
    square = [dense(HIDDEN, HIDDEN, activation=IDENTITY, bias=False, seed=seed) for seed in (3, 4)]
    expected: list[np.ndarray] = []
    for number, chosen in enumerate([square, square[::-1], square[:1], square[1:]]):
        folder = write(family, tmp_path / str(number), (MEAN, *chosen, NORMALIZE))
        expected.append(theirs(reference(folder)))
        with LLM(model=str(folder)) as llm:
            close(ours(llm), expected[-1])
    assert all(far(one, other) for i, one in enumerate(expected) for other in expected[:i])


def test_qwen_closes_every_text(tmp_path: Path) -> None:
    """The last token, which is pooled, is the one that the tokenizer appends, also to a text that is cut."""
    folder = write(FAMILIES["qwen3-embedding"], tmp_path)
    tokenizer = _tokenizers()["qwen"]
    with LLM(model=str(folder)) as llm:
        outputs = llm.embed(TEXTS, use_tqdm=False, tokenization_kwargs=CUT, input_type="query")
    assert {output.prompt_token_ids[-1] for output in outputs} == {tokenizer.eos_token_id}
    prompt = tokenizer(INSTRUCTION)["input_ids"][:-1]
    assert all(output.prompt_token_ids[: len(prompt)] == prompt for output in outputs)


def test_gemma_attends_both_ways(tmp_path: Path) -> None:
    """Without the flag in its config the model is causal, and the vectors are others."""
    folder = write(FAMILIES["embedding-gemma"], tmp_path)
    with LLM(model=str(folder)) as llm:
        rows = ours(llm)
    checkpoints.edit_json(folder / "config.json", use_bidirectional_attention=False)
    causal = theirs(reference(folder))
    with LLM(model=str(folder)) as llm:
        close(ours(llm), causal)
    assert far(rows, causal)


@pytest.mark.parametrize("name", ["multilingual-e5", "embedding-gemma"])
def test_prompts_that_are_not_pooled(tmp_path: Path, name: str) -> None:
    """With `include_prompt` false the tokens of the prompt are attended to, but not averaged."""
    family = FAMILIES[name]
    modules = (flagged_pooling("mean_tokens", include_prompt=False), *family.modules[1:])
    folder = write(family, tmp_path / "left out", modules)
    pooled = reference(write(family, tmp_path / "pooled"))
    model = reference(folder)
    with LLM(model=str(folder)) as llm:
        for side, prompt in zip(SIDES, family.sides, strict=True):
            rows = ours(llm, input_type=side)
            close(rows, theirs(model, prompt_name=prompt))
            assert far(rows, theirs(pooled, prompt_name=prompt))
            assert far(rows, theirs(pooled))
        close(ours(llm), theirs(pooled))


@pytest.mark.parametrize("name", ["embedding-gemma", "nomic-embed v1.5"])
def test_matryoshka(tmp_path: Path, name: str) -> None:
    """Vectors are cut after the projections and normalised then."""
    folder = write(FAMILIES[name], tmp_path)
    model = reference(folder)
    with LLM(model=str(folder), hf_overrides={"matryoshka_dimensions": [8, 20]}) as llm:
        for length in (8, 20):
            params = PoolingParams(dimensions=length)
            rows = ours(llm, pooling_params=params, input_type="query")
            asked = {"prompt_name": FAMILIES[name].sides[0], "truncate_dim": length}
            close(rows, theirs(model, normalize_embeddings=True, **asked))
            np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), 1, atol=1e-5)
            assert np.linalg.norm(theirs(model, **asked), axis=-1).max() < 0.99
        with pytest.raises(BadRequest, match=r"only supports Matryoshka dimensions \[8, 20\], got 12"):
            ours(llm, pooling_params=PoolingParams(dimensions=12))


def _mixture(folder: Path) -> Path:
    """nomic-embed v2-moe's file: in every other layer a router and experts in the place of the MLP."""
    write(FAMILIES["nomic-embed v1.5"], folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    mlp = "encoder.layers.1.mlp."
    kept = {name: value for name, value in weights.items() if not name.startswith(mlp)}
    experts = {
        "router.layer.weight": torch.randn(4, HIDDEN),
        "experts.mlp.w1": torch.randn(4 * 48, HIDDEN),
        "experts.mlp.w2": torch.randn(4 * 48, HIDDEN),
        "experts.bias": torch.randn(HIDDEN),
    }
    save_file({**kept, **{mlp + name: value for name, value in experts.items()}}, file, metadata={"format": "pt"})
    checkpoints.edit_json(folder / "config.json", num_experts=4, moe_top_k=2, moe_every_n_layers=2)
    return folder


def test_nomic_experts_are_refused(tmp_path: Path) -> None:
    """Transformers' own class has no experts; the layers are not left random in their place."""
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp"):
        LLM(model=str(_mixture(tmp_path)))


def test_nomic_config_of_its_own_code_is_refused(tmp_path: Path) -> None:
    """Widths in the words of nomic's own code mean nothing to Transformers', whose defaults do not fit the weights."""
    folder = write(FAMILIES["nomic-embed v1.5"], tmp_path)
    own = {"n_embd": HIDDEN, "n_head": 4, "n_inner": 48}
    checkpoints.edit_json(
        folder / "config.json", hidden_size=None, num_attention_heads=None, intermediate_size=None, head_dim=None, **own
    )
    with pytest.raises(CheckpointError, match=r"has misshapen weights for NomicBertModel: embeddings\.LayerNorm\.bias"):
        LLM(model=str(folder))
