"""Keys of `config.json` that the config's class does not have: without effect, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cenote.config import ModelConfig
from cenote.errors import CheckpointError
from cenote.models import configs
from cenote.models.audit import Audit
from tests.checkpoints import read_json, write_json

BARE = {"adapters": {}, "config_map": {}, "fusion_config_map": {}, "fusions": {}}
"""What adapter-transformers wrote of a model without adapters."""

OF_OLD_RELEASES: dict[str, Any] = {
    "pruned_heads": {},
    "output_scores": False,
    "prefix": " ",
    "adapters": BARE,
    "task_specific_params": {"summarization": {"prefix": "summarize: "}},
    "pooler_fc_size": 768,
    "pooler_type": "first_token_transform",
    "summary_use_proj": True,
    "_num_labels": 3,
    "normalize_before": False,
    "position_embedding_type": "absolute",
    "head_dim": None,
    "add_prefix_space": True,
}
"""Keys of published configs whose classes have lost them, and that change no answer."""

PICKING: dict[str, Any] = {
    "pruned_heads": {"0": [1, 2]},
    "adapters": {**BARE, "adapters": {"sst-2": "text_task"}},
    "pooling_type": "mean",
    "use_mean_pooling": False,
    "query_prefix": "query: ",
    "query_maxlen": 32,
    "is_unidirectional": True,
    "output_normalized": True,
    "use_crf": True,
    "classifier_activation": "relu",
    "position_embedding_type": "relative_key_query",
}
"""Keys that nothing reads, and that could change every answer."""


def read(folder: Path, key: str, value: Any) -> Audit:
    write_json(folder / "config.json", {"model_type": "bert", "architectures": ["BertModel"], key: value})
    audit = Audit()
    configs.read(folder, "tiny", ModelConfig(), audit, {})
    return audit


@pytest.mark.parametrize("key", OF_OLD_RELEASES)
def test_keys_of_old_releases_change_nothing(tmp_path: Path, key: str) -> None:
    audit = read(tmp_path, key, OF_OLD_RELEASES[key])
    assert all(entries.reason for entries in audit.left)


@pytest.mark.parametrize("key", PICKING)
def test_a_key_that_picks_something_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json has the key {key}, which Cenote does not honour"):
        read(tmp_path, key, PICKING[key])


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    """Transformers writes infinity as an object, for JSON has no word for it."""
    entries = {"model_type": "mamba2", "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    write_json(tmp_path / "config.json", entries)
    config, _ = configs.read(tmp_path, "tiny", ModelConfig(), Audit(), {})
    assert config.time_step_limit == [0.0, float("inf")]


@pytest.mark.parametrize(
    ("kind", "key", "value"), [("deepseek_v3", "qk_head_dim", 192), ("zamba2", "attention_head_dim", 160)]
)
def test_widths_that_transformers_computes_and_writes(tmp_path: Path, kind: str, key: str, value: int) -> None:
    write_json(tmp_path / "config.json", {"model_type": kind, key: value})
    config, _ = configs.read(tmp_path, "tiny", ModelConfig(), Audit(), {})
    assert getattr(config, key) == value


COMPUTED = {"bailing_hybrid": "linear_num_heads", "bros": "dim_bbox_projection", "lw_detr": "projector_out_channels"}


@pytest.mark.parametrize(("kind", "key"), COMPUTED.items())
def test_a_value_that_the_class_computes(tmp_path: Path, kind: str, key: str) -> None:
    """It is in every file that Transformers writes. Another value would be another model, which the class cannot be."""
    value = getattr(CONFIG_MAPPING[kind](), key)
    write_json(tmp_path / "config.json", {"model_type": kind, key: value})
    configs.read(tmp_path, "tiny", ModelConfig(), Audit(), {})
    write_json(tmp_path / "config.json", {"model_type": kind, key: value + 1})
    with pytest.raises(CheckpointError, match=rf"config\.json has the key {key}, which Cenote does not honour"):
        configs.read(tmp_path, "tiny", ModelConfig(), Audit(), {})


def written(kind: str, folder: Path) -> dict[str, Any] | None:
    """What Transformers writes of a config of its defaults; `None` of a class that has none for all fields."""
    try:
        CONFIG_MAPPING[kind]().save_pretrained(folder)
    except (ValueError, StrictDataclassError):
        return None
    return configs.decoded(read_json(folder / "config.json"))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_every_config_that_transformers_writes_is_read(tmp_path: Path) -> None:
    contents = {kind: written(kind, tmp_path / kind) for kind in CONFIG_MAPPING}
    refused = {}
    for kind, content in contents.items():
        if content is None:
            continue
        try:
            configs._check_keys(content, CONFIG_MAPPING[kind].from_dict(content), Audit())
        except CheckpointError as error:
            refused[kind] = str(error)
    assert not refused
    assert [kind for kind, content in contents.items() if content is None] == ["gemma4_assistant", "nougat"]


def test_experts_of_a_model_without_any(tmp_path: Path) -> None:
    """Doge's config has a number of experts, and says that they are not used."""
    write_json(tmp_path / "config.json", {"model_type": "doge", "is_moe": False, "num_experts": 16384})
    config, _ = configs.read(tmp_path, "tiny", ModelConfig(), Audit(), {})
    assert (config.is_moe, config.num_experts) == (False, 16384)
    write_json(tmp_path / "config.json", {"model_type": "doge", "is_moe": True, "num_experts": 16384})
    with pytest.raises(CheckpointError, match="num_experts is 16384, and the largest size in the weights is 0"):
        configs.read(tmp_path, "tiny", ModelConfig(), Audit(), {})
