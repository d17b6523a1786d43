"""What an architecture's name decides: whether it only generates and how it pools; and how one's own model says it."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertConfig, BertForSequenceClassification, BertModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from cenote import LLM, default_pooling_type, register_model
from cenote.errors import CheckpointError, ConfigError
from cenote.models.convert import CLS_FAMILIES, MEAN_FAMILIES, architecture_pooling, check_convert, is_reward
from tests import checkpoints, forked
from tests.checkpoints import HIDDEN, NORMALIZE, SHORT, pooling

if TYPE_CHECKING:
    from pathlib import Path

# --- endings of names ---------------------------------------------------------------------------------------------

GENERATES = ("LlamaForCausalLM", "T5ForConditionalGeneration", "QWenChatModel", "GPT2LMHeadModel", "ChatModel")
EMBEDS = (
    "GteForTextEncoding",
    "GritLMEmbeddingModel",
    "InternLM2ForRewardModeling",
    "LlamaRewardModel",
    "BertModel",
    "Qwen3Model",
    "Unheard",
    "ForSequenceClassificationOfMine",  # a suffix, not a part
)
CLASSIFIES = (
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "ASTForAudioClassification",
    "ViTForImageClassification",
    "VivitForVideoClassification",
    "MyClassificationModel",  # "ClassificationModel" goes before "Model"
)


@pytest.mark.parametrize("name", [*GENERATES, *EMBEDS, *CLASSIFIES])
@pytest.mark.parametrize("convert", ["auto", "none", "embed", "classify", "sparse"])
@pytest.mark.parametrize("pools", [False, True])
def test_only_a_model_that_generates_needs_converting(name: str, convert: str, pools: bool) -> None:
    """A user who converts nothing gets one that has another purpose by its name, or by a module that pools."""
    if name in GENERATES and convert == "none" and not pools:
        with pytest.raises(CheckpointError, match=f"^{name} generates text and `convert` is 'none', so there is"):
            check_convert(name, convert, pools=pools)
    else:
        check_convert(name, convert, pools=pools)


def test_names_of_reward_models() -> None:
    names = [name for name in (*GENERATES, *EMBEDS, *CLASSIFIES) if is_reward(name)]
    assert names == ["InternLM2ForRewardModeling", "LlamaRewardModel"]


def _rows(folder: Path, **options: Any) -> np.ndarray:
    with LLM(model=str(folder), **options) as llm:
        assert llm.info.tasks == ("embed", "token_embed")
        return np.array([output.outputs.embedding for output in llm.embed(SHORT, use_tqdm=False)])


@pytest.mark.parametrize("architecture", ["Qwen3Model", "Qwen3ForCausalLM", "LlamaForCausalLM"])
def test_decoders_embed_their_last_token(tmp_path: Path, architecture: str) -> None:
    """With or without a head beside the backbone, and with or without its prefix `model.`."""
    folder = checkpoints.decoder(tmp_path, architecture)
    tokenizer = checkpoints.byte_level()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    expected = []
    for text in SHORT:
        with torch.inference_mode():
            last = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
        expected.append((last / last.norm()).numpy())
    for options in ({}, {"runner": "pooling"}, {"convert": "embed"}):
        np.testing.assert_allclose(_rows(folder, **options), expected, rtol=0, atol=1e-5)


def test_convert_none_of_a_generator_is_refused_until_it_pools(tmp_path: Path) -> None:
    """Qwen3-Embedding is a `Qwen3ForCausalLM`: its Pooling module says that it pools."""
    folder = checkpoints.decoder(tmp_path)
    plain = _rows(folder)
    with pytest.raises(CheckpointError, match=r"^Qwen3ForCausalLM generates text and `convert` is 'none'"):
        LLM(model=str(folder), convert="none")
    checkpoints.write_modules(folder, pooling("lasttoken"), NORMALIZE)
    for options in ({}, {"convert": "none"}, {"runner": "pooling", "convert": "none"}):
        checkpoints.assert_same(_rows(folder, **options), plain)


def test_convert_classify_without_a_head_says_what_would_make_one(tmp_path: Path) -> None:
    sentence = (
        r"^convert 'classify' needs a head: BertModel has no score\.weight\. Name the vocabulary entries whose logits "
        r'classify, as in hf_overrides {"classifier_from_token": \["no", "yes"\], "method": "from_2_way_softmax"}'
    )
    with pytest.raises(CheckpointError, match=sentence):
        LLM(model=str(checkpoints.bert(tmp_path)), convert="classify")


def test_a_classifier_serves_its_hidden_states(tmp_path: Path) -> None:
    tokenizer = checkpoints.wordpiece()
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    folder = checkpoints.save(model, tokenizer, tmp_path, seed=0)
    with torch.inference_mode():
        states = [model.bert.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0] for text in SHORT]
    expected = [(state / state.norm()).numpy() for state in states]
    np.testing.assert_allclose(_rows(folder, convert="embed"), expected, rtol=0, atol=1e-5)


# --- default pooling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "model_types"),
    [
        ("cls", ["bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "modernbert", "deberta-v2", "nomic_bert"]),
        ("mean", ["t5", "mt5", "umt5"]),
        ("lasttoken", ["qwen3", "qwen2", "llama", "mistral", "gemma2", "gpt2", "mamba", "never-heard-of"]),
    ],
)
def test_default_pooling(mode: str, model_types: list[str]) -> None:
    for model_type in model_types:
        model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
        assert architecture_pooling(model) == mode  # type: ignore[arg-type]


def test_families_are_names_that_transformers_knows() -> None:
    brought_by_checkpoints = {"gte", "nomic_bert", "jina_embeddings_v3"}
    assert set(CONFIG_MAPPING_NAMES) | brought_by_checkpoints >= CLS_FAMILIES | MEAN_FAMILIES
    assert not CLS_FAMILIES & MEAN_FAMILIES


# --- a model of one's own ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.bert(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("pooling_type", [None, "CLS", "LAST", "MEAN"])
def test_a_model_of_ones_own(bert: Path, tmp_path: Path, pooling_type: str | None) -> None:
    kind = f"own-{pooling_type}".lower()

    class OwnConfig(BertConfig):
        model_type = kind

    class OwnModel(BertModel):
        config_class = OwnConfig

        def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
            """Twice the hidden states: the class that runs is this one."""
            output = super().forward(input_ids, position_ids=position_ids, **kwargs)
            output.last_hidden_state = 2 * output.last_hidden_state
            return output

    folder = shutil.copytree(bert, tmp_path / "own")
    checkpoints.edit_json(folder / "config.json", model_type=kind, architectures=["OwnModel"])
    if pooling_type is None:
        with pytest.raises(CheckpointError, match=r"cannot read config\.json of .*own-none"):
            LLM(model=str(folder))
    else:
        assert default_pooling_type(pooling_type)(OwnModel) is OwnModel
    register_model(OwnModel)
    register_model(OwnModel)  # twice does no harm
    raw = {"use_activation": False}
    expected = _rows(bert, pooler_config={**raw, "pooling_type": pooling_type or "LAST"})
    np.testing.assert_allclose(_rows(folder, pooler_config=raw), 2 * expected, rtol=0, atol=1e-4)
    asked = _rows(folder, pooler_config={**raw, "pooling_type": "CLS"})
    np.testing.assert_allclose(asked, 2 * _rows(bert, pooler_config=raw), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["mean", "MEDIAN"])
def test_default_pooling_type_refuses_other_names(name: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown pooling type '{name}'; known are: CLS, LAST, MEAN, ALL, STEP"):
        default_pooling_type(name)


def test_register_model_needs_a_model_type() -> None:
    class WithoutConfig(torch.nn.Module):
        pass

    class WithoutName(torch.nn.Module):
        config_class = SimpleNamespace(model_type="")

    for model in (WithoutConfig, WithoutName):
        with pytest.raises(ConfigError, match=f"{model.__name__} needs a `config_class` whose `model_type` is set"):
            register_model(model)  # type: ignore[type-var]


PLUGIN = """
from transformers import BertConfig, BertModel
from cenote import default_pooling_type
class PluginConfig(BertConfig):
    model_type = "plugin-bert"
@default_pooling_type("MEAN")
class PluginModel(BertModel):
    config_class = PluginConfig
"""
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[2])
from cenote import LLM
print(*LLM(model=sys.argv[1]).embed("Hello, my name is", use_tqdm=False)[0].outputs.embedding)
"""


@pytest.mark.full
def test_a_model_of_an_installed_package(bert: Path, tmp_path: Path) -> None:
    """A package whose metadata names the class under `cenote.models` need not be imported by anyone."""
    site = tmp_path / "site"
    (site / "plugin-1.0.dist-info").mkdir(parents=True)
    (site / "plugin-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (site / "plugin-1.0.dist-info" / "entry_points.txt").write_text("[cenote.models]\nmine = plugin:PluginModel\n")
    (site / "plugin.py").write_text(PLUGIN)
    folder = shutil.copytree(bert, tmp_path / "model")
    checkpoints.edit_json(folder / "config.json", model_type="plugin-bert", architectures=["PluginModel"])
    done = forked.run(PROGRAM, str(folder), str(site))
    assert done.returncode == 0, done.stderr  # also: an LLM that nobody closed lets the interpreter exit
    expected = _rows(bert, pooler_config={"pooling_type": "MEAN"})[SHORT.index("Hello, my name is")]
    np.testing.assert_allclose([float(x) for x in done.stdout.split()], expected, rtol=0, atol=1e-5)
