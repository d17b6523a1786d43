"""internlm2-1_8b-reward as published: its own names of tensors, its sentencepiece model, the reward of the last token.

The reference is its code's forward, written out over the published tensors.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch.nn import functional

from cenote import LLM
from tests import checkpoints
from tests.checkpoints import HIDDEN

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

TEXTS = ["the quick brown fox", "a", " two  spaces\nand a line", "naïve 水 and 🐟", "user<|im_start|>the lazy dog"]
CORPUS = ["the quick brown fox jumps over the lazy dog", "user assistant system reward", "one two three four five"] * 40
UNUSED = "[UNUSED_TOKEN_145]"
HEADS, GROUPS, INTERMEDIATE, LAYERS = 4, 2, 48, 2
WIDTH = HIDDEN // HEADS
THETA = 1000000.0
CONFIG: dict[str, Any] = {
    "architectures": ["InternLM2ForRewardModel"],
    "attn_implementation": "eager",
    "auto_map": {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModel": "modeling_internlm2.InternLM2ForRewardModel",
    },
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 128,
    "model_type": "internlm2",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": GROUPS,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "reward_token_id": 3,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    "rope_theta": THETA,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.41.0",
    "use_cache": True,
}
TOKENIZER: dict[str, Any] = {
    "auto_map": {
        "AutoTokenizer": [
            "tokenization_internlm2.InternLM2Tokenizer",
            "tokenization_internlm2_fast.InternLM2TokenizerFast",
        ]
    },
    "additional_special_tokens": ["<|im_start|>"],
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": "</s>",
    "tokenizer_class": "InternLM2Tokenizer",
    "unk_token": "<unk>",
}


def sentencepiece(folder: Path, *, prefix: bool) -> SentencePieceProcessor:
    """Write a model of byte pairs whose last entry is unused, and its config, which names that entry."""
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=[UNUSED],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    model = SentencePieceProcessor(model_proto=written.getvalue())
    texts = {0: "<unk>", 1: "<s>", 2: "</s>", model.piece_to_id(UNUSED): "<|im_start|>"}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(number): {"content": text, **flags} for number, text in texts.items()}
    checkpoints.write_json(folder / "tokenizer_config.json", {**TOKENIZER, "added_tokens_decoder": added})
    return model


def write(folder: Path, *, prefix: bool = False, bias: bool = False) -> SentencePieceProcessor:
    """Write the repository."""
    model = sentencepiece(folder, prefix=prefix)
    size = model.get_piece_size()
    checkpoints.write_json(folder / "config.json", {**CONFIG, "vocab_size": size, "bias": bias})
    shapes: dict[str, tuple[int, ...]] = {"model.tok_embeddings.weight": (size, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for number in range(LAYERS):
        own: dict[str, tuple[int, ...]] = {
            "attention.wqkv.weight": ((HEADS + 2 * GROUPS) * WIDTH, HIDDEN),
            "attention.wo.weight": (HIDDEN, HIDDEN),
            "feed_forward.w1.weight": (INTERMEDIATE, HIDDEN),
            "feed_forward.w2.weight": (HIDDEN, INTERMEDIATE),
            "feed_forward.w3.weight": (INTERMEDIATE, HIDDEN),
            "attention_norm.weight": (HIDDEN,),
            "ffn_norm.weight": (HIDDEN,),
        }
        if bias:
            own |= {"attention.wqkv.bias": ((HEADS + 2 * GROUPS) * WIDTH,), "attention.wo.bias": (HIDDEN,)}
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in own.items()}
    for name in ("configuration_internlm2.py", "modeling_internlm2.py", "tokenization_internlm2.py"):
        (folder / name).write_text("raise AssertionError")
    shapes["v_head.weight"] = (1, HIDDEN)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    scaled = {n: w * 1.5 / w.shape[-1] ** 0.5 if w.dim() == 2 and "emb" not in n else w for n, w in weights.items()}
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def ids_of(model: SentencePieceProcessor, text: str) -> list[int]:
    """Tokens by the code's slow tokenizer: parts between special tokens go through sentencepiece by themselves."""
    before, mark, after = text.partition("<|im_start|>")
    marked = [model.piece_to_id(UNUSED), *model.encode(after)] if mark else []
    return [1, *model.encode(before), *marked]


def norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return weights[f"{name}.weight"] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"])


def rotated(x: Tensor) -> Tensor:
    """`[T, H, W]` with rotary positions in halves."""
    frequencies = THETA ** (-torch.arange(0, WIDTH, 2) / WIDTH)
    angles = torch.arange(len(x))[:, None] * frequencies
    cos, sin = (torch.cat([part, part], -1)[:, None] for part in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def rewards(folder: Path, ids: list[int]) -> Tensor:
    """`InternLM2ForRewardModel.forward` of one text, before the last token is chosen, `[T, 1]`."""
    weights = load_file(folder / "model.safetensors")
    x, per_group = weights["model.tok_embeddings.weight"][ids], HEADS // GROUPS
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)

    def linear(name: str, x: Tensor) -> Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        states = linear(f"{layer}.attention.wqkv", norm(weights, f"{layer}.attention_norm", x))
        states = states.view(len(ids), GROUPS, per_group + 2, WIDTH)
        queries = rotated(states[:, :, :per_group].flatten(1, 2))
        keys = rotated(states[:, :, -2]).repeat_interleave(per_group, 1)
        values = states[:, :, -1].repeat_interleave(per_group, 1)
        scores = torch.einsum("qhw,khw->hqk", queries, keys) / WIDTH**0.5 + mask
        mixed = torch.einsum("hqk,khw->qhw", scores.softmax(-1), values).flatten(1)
        x = x + linear(f"{layer}.attention.wo", mixed)
        y = norm(weights, f"{layer}.ffn_norm", x)
        gate = functional.silu(linear(f"{layer}.feed_forward.w1", y))
        x = x + linear(f"{layer}.feed_forward.w2", gate * linear(f"{layer}.feed_forward.w3", y))
    return linear("v_head", norm(weights, "model.norm", x))


@pytest.mark.parametrize(("prefix", "bias"), [(False, False), (True, True)])
def test_answers_as_its_code(tmp_path: Path, prefix: bool, bias: bool) -> None:
    model = write(tmp_path, prefix=prefix, bias=bias)
    ids = [ids_of(model, text) for text in TEXTS]
    expected = [rewards(tmp_path, one).numpy() for one in ids]
    assert np.ptp([rows[-1] for rows in expected]) > 1e-2
    with LLM(model=str(tmp_path)) as llm:
        outputs = llm.reward(TEXTS, use_tqdm=False)
        assert [output.prompt_token_ids for output in outputs] == ids
        last = llm.encode(TEXTS, pooling_task="classify", use_tqdm=False)
        assert any("Transformers' own class for 'llama'" in note for note in llm.info.report.warnings)
    for rows, output, of_text in zip(expected, outputs, last, strict=True):
        scale = 1e-5 * max(1.0, float(np.abs(rows).max()))
        np.testing.assert_allclose(output.outputs.data, rows, rtol=0, atol=scale)
        np.testing.assert_allclose(of_text.outputs.data, rows[-1], rtol=0, atol=scale)
