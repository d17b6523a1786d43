"""Architectures whose pictures are not served: refused by name with that reason, while their texts go on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from cenote import LLM
from cenote.errors import BadRequest
from cenote.models.families.sights import SIGHTS, SIGNS, of_backbone
from tests import pictured
from tests.pictured import noise

if TYPE_CHECKING:
    from pathlib import Path

TOLERANCE = 2e-5


def fields(kind: type) -> set[str]:
    """The names of a config's entries."""
    return set().union(*(vars(parent).get("__annotations__", {}) for parent in kind.__mro__))


@pytest.mark.full
def test_every_config_with_a_part_for_pictures_is_served_or_refused_by_name() -> None:
    entries_of = {kind: fields(CONFIG_MAPPING[kind]) for kind in CONFIG_MAPPING_NAMES}
    sighted = {kind for kind, entries in entries_of.items() if entries & {"vision_config", "image_token_id"}}
    assert len(sighted) > 100
    for kind in sighted.difference(SIGHTS):
        entries = entries_of[kind].intersection(SIGNS)
        config = SimpleNamespace(model_type=kind, **dict.fromkeys(entries, 1))
        sight = of_backbone(SimpleNamespace(config=config, architecture=f"{kind}-model"))  # type: ignore[arg-type]
        assert sight is not None, kind
        assert sight.vision is None
        assert sight.pictures.refusal == f"pictures for {kind}-model are not served yet, only texts"


LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 700, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 600, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
SIGLIP = {**TOWER, "model_type": "siglip_vision_model"}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0}
PLACEHOLDER = 10
LATER: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": LLAMA, "vision_config": {**TOWER, "model_type": "clip_vision_model"},
        "image_token_index": PLACEHOLDER,
    },
    "internvl": {
        "text_config": {**LLAMA, "model_type": "qwen2"},
        "vision_config": {**TOWER, "image_size": [32, 32], "patch_size": [8, 8]}, "image_token_id": PLACEHOLDER,
    },
    "paligemma": {
        "text_config": {**LLAMA, "model_type": "gemma", "head_dim": 16},
        "vision_config": {**SIGLIP, "projection_dim": 64}, "image_token_index": PLACEHOLDER, "projection_dim": 64,
        "hidden_size": 64, "vocab_size": 700,
    },
    "idefics3": {"text_config": LLAMA, "vision_config": TOWER, "image_token_id": PLACEHOLDER, "scale_factor": 2},
    "glm4v": {
        "text_config": {**{key: LLAMA[key] for key in LLAMA if key != "model_type"}, "rope_parameters": ROPE},
        "vision_config": {
            "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "patch_size": 14, "image_size": 56,
            "intermediate_size": 64,
        },
        "image_token_id": PLACEHOLDER,
    },
    "gemma3": {
        "text_config": {**LLAMA, "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 16},
        "vision_config": SIGLIP, "image_token_index": PLACEHOLDER, "mm_tokens_per_image": 4,
    },
    "embedding_gemma2": {
        "text_config": {
            "vocab_size": 700, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32, "intermediate_size": 128,
            "sliding_window": 12, "sliding_window_pattern": 2, "hidden_size_per_layer_input": 16, "embedding_dim": 48,
            "max_position_embeddings": 600, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
        "vision_config": {
            "model_type": "gemma4_vision", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "patch_size": 16,
            "position_embedding_size": 64,
        },
        "image_token_id": PLACEHOLDER,
    },
    "clap": {
        "text_config": {
            "vocab_size": 700, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 96, "max_position_embeddings": 80, "projection_dim": 24, "pad_token_id": 1,
        },
        "audio_config": {
            "patch_embeds_hidden_size": 16, "hidden_size": 64, "depths": [1, 1], "num_attention_heads": [2, 2],
            "num_hidden_layers": 2, "projection_dim": 24,
        },
        "projection_dim": 24,
    },
}  # fmt: skip
"""Small configs of architectures whose other inputs come later."""


def row(kind: str, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The vector of a text by Transformers; PaliGemma's processor gives token types, without which it is causal."""
    with torch.inference_mode():
        if kind == "clap":
            return model.get_text_features(input_ids=ids).pooler_output[0]  # type: ignore[no-any-return]
        types = {"token_type_ids": torch.zeros_like(ids)} if kind == "paligemma" else {}
        return model(input_ids=ids, **types)[0][0, -1]  # type: ignore[no-any-return]


def saved(kind: str, config: dict[str, Any], folder: Path) -> None:
    """A checkpoint of that architecture, with weights from a seed."""
    tokenizer = pictured.byte_pairs(("<pad>", "<bos>", "<eos>", "<image>"), 600)
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **config))
    pictured.write_model(folder, pictured.randomised(model))


def agree(kind: str, outputs: list[Any], folder: Path) -> None:
    """Assert that the vectors are those of Transformers, one text at a time."""
    reference = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    for output in outputs:
        ids = torch.tensor([list(output.prompt_token_ids)])
        expected = torch.nn.functional.normalize(row(kind, reference, ids), dim=-1)
        assert float((torch.tensor(output.outputs.embedding) - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize("kind", LATER)
def test_texts_go_on_and_a_picture_is_refused(kind: str, tmp_path: Path) -> None:
    saved(kind, LATER[kind], tmp_path)
    with LLM(str(tmp_path)) as llm:
        outputs = llm.embed(["what is the revenue", "a page of a report"], use_tqdm=False)
        reason = f"pictures (and sound )?for {llm.info.architecture} are not served yet, only texts"
        with pytest.raises(BadRequest, match=reason):
            llm.embed([noise(30, 30)], use_tqdm=False)
    agree(kind, outputs, tmp_path)


def test_windows_of_a_config_within_another(tmp_path: Path) -> None:
    """The mask is made by the text's config, and each layer has a window of its own: texts are packed by both."""
    text = {**LATER["gemma3"]["text_config"], "sliding_window": 540, "max_position_embeddings": 700}
    saved("gemma3", {**LATER["gemma3"], "text_config": text}, tmp_path)
    with LLM(str(tmp_path)) as llm:
        assert llm.info.report.layout == "packed"
        outputs = llm.embed(["what is the revenue", "a page of a report", "q w x z " * 80], use_tqdm=False)
    assert len(outputs[-1].prompt_token_ids) > 560
    agree("gemma3", outputs, tmp_path)
