"""The files of a checkpoint: each that holds weights or code is used, without effect, or refused by its name."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cenote import LLM
from cenote.errors import CheckpointError
from cenote.models.hub import HUB_FILES, TOKENIZER_FILES
from tests import checkpoints
from tests.checkpoints import HIDDEN, NORMALIZE, SHORT, dense, edit_json, pooling, write_json

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'5' * 64}\nsize 90868376\n"


def rows(folder: Path, **options: Any) -> np.ndarray:
    with LLM(model=str(folder), **options) as llm:
        return np.array([output.outputs.embedding for output in llm.embed(SHORT, use_tqdm=False)])


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        LLM(model=str(folder), **options)
    assert "\n" not in error.value.message
    return error.value.message


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.bert(tmp_path_factory.mktemp("contents") / "bert")


@pytest.fixture(scope="module")
def untouched(bert: Path) -> np.ndarray:
    """The vectors of the folder as it is."""
    vectors = rows(bert)
    vectors.flags.writeable = False
    return vectors


@pytest.fixture
def folder(bert: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bert, tmp_path / "model")


# --- files beside the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["value_head.bin", "reward_head.safetensors", "projection.pt", "heads/score.pth", "whitening.npz"]
)
def test_an_unknown_file_of_weights_is_refused_by_its_name(folder: Path, untouched: np.ndarray, name: str) -> None:
    """It may be a head or a projection that answers depend on; the user may let it go."""
    (folder / name).parent.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        save_file({"embeddings.word_embeddings.weight": torch.zeros(2, 2)}, folder / name)
    else:
        torch.save({"weight": torch.zeros(2, 2)}, folder / name)
    assert f"has the file {name}" in refusal(folder)
    checkpoints.assert_same(rows(folder, allow_unread=name), untouched)


IDLE = (
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "openvino/openvino_model.bin",
    "model_quantized.onnx",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "model.fp16.safetensors",
    "model-q8_0.gguf",
    "original/consolidated.00.pth",
    "consolidated.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state_0.pth",
    "training_args.bin",
    "checkpoint-500/model.safetensors",
    "handler.py",
    ".cache/huggingface/x.bin",
)


def test_published_files_beside_the_model_are_left_with_a_reason(folder: Path, untouched: np.ndarray) -> None:
    """None of them is read as weights of the model, and each is listed with the reason."""
    for name in IDLE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0")
    with LLM(model=str(folder)) as llm:
        outputs = llm.embed(SHORT, use_tqdm=False)
        left = {name: entry.reason for entry in llm.info.report.left for name in entry.names}
        used = {name for entry in llm.info.report.used for name in entry.names}
    checkpoints.assert_same(np.array([output.outputs.embedding for output in outputs]), untouched)
    assert "model.safetensors" in used
    for name in IDLE:
        if not name.startswith((".cache", "checkpoint-")):
            assert left[name], name


def test_files_of_modules(folder: Path) -> None:
    """Modules' weights are used, also as pickles; folders of other widths that modules.json does not name are left."""
    checkpoints.write_modules(folder, pooling("mean"), dense(HIDDEN, 20), NORMALIZE)
    expected = rows(folder)
    (folder / "2_Dense_512").mkdir()
    shutil.copy(folder / "2_Dense" / "model.safetensors", folder / "2_Dense_512")
    weights = load_file(folder / "2_Dense" / "model.safetensors")
    torch.save(weights, folder / "2_Dense" / "pytorch_model.bin")
    (folder / "2_Dense" / "model.safetensors").unlink()
    with LLM(model=str(folder)) as llm:
        left = {name: entry.reason for entry in llm.info.report.left for name in entry.names}
        outputs = llm.embed(SHORT, use_tqdm=False)
    checkpoints.assert_same(np.array([output.outputs.embedding for output in outputs]), expected)
    assert left["2_Dense_512/model.safetensors"] == "of a module that modules.json does not name"
    (folder / "2_Dense" / "scale.pt").write_bytes(b"\0")
    assert "has the file 2_Dense/scale.pt" in refusal(folder)


def test_shards(folder: Path, untouched: np.ndarray) -> None:
    """Weights in several files are those that the index names."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({n: weights[n] for n in names if places[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    assert "but no model.safetensors.index.json; add the index" in refusal(folder)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    checkpoints.assert_same(rows(folder), untouched)
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = refusal(folder)
    assert "lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names" in message


# --- other kinds of folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "1_Pooling/config.json"])
def test_a_pointer_of_git_lfs(folder: Path, name: str) -> None:
    """A broken download is named as one, whatever file it is of."""
    checkpoints.write_modules(folder, pooling("mean"))
    (folder / name).write_text(POINTER)
    assert f"{name} of {folder} is a pointer of Git LFS" in refusal(folder)


def test_a_pointer_of_a_file_that_is_not_read(folder: Path) -> None:
    """Whoever leaves out large files that nobody reads is not held up."""
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text(POINTER)
    assert rows(folder).shape == (len(SHORT), HIDDEN)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model-q4.gguf", "GGUF"),
        ("onnx/model.onnx", "ONNX only"),
        ("tf_model.h5", "TensorFlow only"),
        ("flax_model.msgpack", "Flax only"),
        ("consolidated.00.pth", "Mistral's own format only"),
    ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_weights_of_another_format_alone(folder: Path, name: str, words: str, has_config: bool) -> None:
    """The format is named, with or without a config beside it."""
    (folder / "model.safetensors").unlink()
    if not has_config:
        (folder / "config.json").unlink()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\0")
    message = refusal(folder)
    assert words in message
    assert "model_type" not in message


def test_a_file_in_place_of_a_folder(folder: Path) -> None:
    """GGUF files are not read, and a file of weights is not its folder."""
    (folder / "model.gguf").write_bytes(b"GGUF")
    for name in ("model.gguf", "model.safetensors"):
        assert f"{name}' is a file, and single files, as of GGUF, are not read" in refusal(folder / name)


def test_a_gliner_folder(folder: Path) -> None:
    (folder / "gliner_config.json").write_text("{}")
    assert "is a GLiNER checkpoint, whose heads over spans are not served" in refusal(folder)


# --- config.json and the tokenizer -------------------------------------------------------------------------------


def test_a_dtype_as_torch_prints_it(folder: Path, untouched: np.ndarray) -> None:
    """`torch.float16` is float16."""
    edit_json(folder / "config.json", torch_dtype="torch.float16", dtype=None)
    np.testing.assert_allclose(rows(folder), untouched, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "changes", [{"_attn_implementation": "flash_attention_2"}, {"attn_implementation": "flash_attention_2"}], ids=str
)
def test_a_kernel_for_attention_is_the_layouts(folder: Path, untouched: np.ndarray, changes: dict[str, str]) -> None:
    edit_json(folder / "config.json", **changes)
    checkpoints.assert_same(rows(folder), untouched)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"vocab_size": "236"}, "vocab_size"),
        ("config.json", {"hidden_act": 7}, "hidden_act"),
    ],
)
def test_values_of_another_type(folder: Path, file: str, changes: dict[str, Any], words: str) -> None:
    """A value that is no number where one belongs is a sentence that names it."""
    edit_json(folder / file, **changes)
    assert words in refusal(folder)


def test_a_config_that_is_no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    assert "is list, expected a JSON object" in refusal(folder)


def test_a_tokenizer_of_a_newer_library(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] = {"type": "Superpiece", "vocab": {}}
    write_json(folder / "tokenizer.json", content)
    assert "cannot read the tokenizer of" in refusal(folder)


UNREAD = {
    "pooling_type": "mean",
    "head_hidden_size": 16,
    "score_scale": 2.0,
    "projection_dim_of_text": 8,
    "prompt_prefix": "query: ",
    "use_bidirectional_attention": True,
}


@pytest.mark.parametrize("key", UNREAD)
def test_a_key_that_picks_something_is_refused_by_its_name(folder: Path, key: str) -> None:
    """Keys about heads, pooling, prompts or the direction of attention that neither Transformers nor Cenote reads."""
    edit_json(folder / "config.json", **{key: UNREAD[key]})
    assert f"config.json has the key {key}" in refusal(folder)
    assert rows(folder, allow_unread=f"config.json:{key}").shape == (len(SHORT), HIDDEN)


def test_relative_positions_are_refused(folder: Path) -> None:
    """Transformers' BERT has absolute positions only, whatever the config says."""
    edit_json(folder / "config.json", position_embedding_type="relative_key")
    assert "position_embedding_type" in refusal(folder)


PUBLISHED = {
    "_name_or_path": "somewhere/else",
    "transformers_version": "4.6.0",
    "gradient_checkpointing": False,
    "position_embedding_type": "absolute",
    "use_cache": True,
    "directionality": "bidi",
    "pooler_fc_size": 768,
    "pooler_num_attention_heads": 12,
    "pooler_num_fc_layers": 3,
    "pooler_size_per_head": 128,
    "pooler_type": "first_token_transform",
    "finetuning_task": "sts-b",
    "classifier_dropout": None,
    "task_specific_params": {},
    "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1.0"},
    "summary_type": "first",
    "summary_use_proj": True,
    "tokenizer_class": "BertTokenizer",
    "language": "en",
    "num_labels": 2,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "torch_dtype": "float32",
    "model_max_length": 512,
    "sep_token_id": 3,
    "is_decoder": False,
}


def test_published_keys_load(folder: Path, untouched: np.ndarray) -> None:
    """Keys that published configs are full of change nothing."""
    edit_json(folder / "config.json", **PUBLISHED)
    checkpoints.assert_same(rows(folder), untouched)


# --- files of tokenizers -----------------------------------------------------------------------------------------


def test_every_file_of_transformers_tokenizers_is_downloaded() -> None:
    """What the tokenizers of the installed Transformers read is in the patterns for a repository of the hub."""
    import ast

    names: set[str] = set()
    sources = Path(transformers.__file__).parent.glob("models/*/tokenization_*.py")
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            is_table = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "VOCAB_FILES_NAMES"
            if is_table and isinstance(node.value, ast.Dict):
                names |= {value.value for value in node.value.values if isinstance(value, ast.Constant)}
    assert {"bpe.codes", "spiece.model", "source.spm", "prophetnet.tokenizer"} <= names
    patterns = (*HUB_FILES, *TOKENIZER_FILES)
    assert not [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]


def test_a_tokenizer_of_sentencepiece_alone(folder: Path, tmp_path: Path) -> None:
    """A checkpoint with nothing but the sentencepiece model loads, as in Transformers."""
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(["the quick brown fox", "water fills the stone", "hello, my name is"] * 40))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "pieces"), vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    shape = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.XLMRobertaConfig(
        vocab_size=120, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, **shape
    )
    target = tmp_path / "xlm"
    model = transformers.XLMRobertaModel(config).eval()
    checkpoints.randomize(model, 0)
    model.save_pretrained(target)
    shutil.copy(tmp_path / "pieces.model", target / "sentencepiece.bpe.model")
    write_json(target / "tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 64})
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    expected = []
    for text in SHORT:
        with torch.inference_mode():
            row = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0, 0].double()
        expected.append((row / row.norm()).numpy())
    np.testing.assert_allclose(rows(target), np.stack(expected), rtol=0, atol=2e-5)


def test_a_tokenizer_of_tiktoken_alone(tmp_path: Path) -> None:
    """A vocabulary in tiktoken's format is read with tiktoken, which Cenote depends on."""
    pytest.importorskip("tiktoken", reason="an environment from before tiktoken became a dependency")
    folder = checkpoints.decoder(tmp_path / "model", vocab_size=300)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    pieces = [*(bytes([i]) for i in range(256)), b"he", b"in", b"the"]
    entries = [f"{base64.b64encode(piece).decode()} {i}" for i, piece in enumerate(pieces)]
    (folder / "tiktoken.model").write_text("\n".join(entries) + "\n")
    write_json(folder / "tokenizer_config.json", {"eos_token": "<end>", "pad_token": "<end>"})
    with LLM(model=str(folder)) as llm:
        assert llm.get_tokenizer()("the hen")["input_ids"] == [258, 32, 256, 110]


# --- image-and-text checkpoints ----------------------------------------------------------------------------------


def _text_states(folder: Path) -> Callable[[str], np.ndarray]:
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def vector(text: str) -> np.ndarray:
        with torch.inference_mode():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double()
        return (states[-1] / states[-1].norm()).numpy()

    return vector


def test_text_of_gemma3_with_images(tmp_path: Path) -> None:
    """The length is the text model's, not the number of patches of its image tower."""
    tokenizer = checkpoints.byte_level()
    text = {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
    shape = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.Gemma3Config(
        text_config={**text, **shape, "sliding_window": 16, "pad_token_id": 0},
        vision_config={**shape, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    folder = checkpoints.save(model, tokenizer, tmp_path / "gemma", seed=3)
    with LLM(model=str(folder)) as llm:
        assert llm.info.max_model_len == 256
        outputs = llm.embed(SHORT, use_tqdm=False)
    expected = np.stack([_text_states(folder)(text) for text in SHORT])
    np.testing.assert_allclose([output.outputs.embedding for output in outputs], expected, rtol=0, atol=5e-5)


def test_text_of_llava(tmp_path: Path) -> None:
    """The head inside its language model comes after all hidden states."""
    tokenizer = checkpoints.byte_level()
    text = {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
    shape = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    vision = {"model_type": "clip_vision_model", "projection_dim": HIDDEN, "image_size": 28, "patch_size": 14}
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **text, **shape, "pad_token_id": 0},
        vision_config={**vision, **shape},
        image_token_index=5,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    folder = checkpoints.save(model, tokenizer, tmp_path / "llava", seed=3)
    assert "language_model.lm_head.weight" in load_file(folder / "model.safetensors")
    expected = np.stack([_text_states(folder)(text) for text in SHORT])
    np.testing.assert_allclose(rows(folder), expected, rtol=0, atol=5e-5)
