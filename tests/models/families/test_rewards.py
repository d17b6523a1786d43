"""Reward models: heads without a Transformers class, and rows and columns of STEP, equal to direct computation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from cenote import LLM, PoolingParams
from cenote.errors import BadRequest, CheckpointError, ConfigError, TaskNotOffered, TooLong
from tests import checkpoints
from tests.checkpoints import HIDDEN, byte_level

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    Rows = Callable[[Tensor], Tensor]

TAG = "<extra_0>"
RAW, ACTIVE = PoolingParams(use_activation=False), PoolingParams(use_activation=True)


def tokenizer() -> PreTrainedTokenizerBase:
    return byte_level("$A", special=(TAG, "<|im_start|>", "<|im_end|>"))


TEXTS = [
    f"one and one is two.{TAG}two and two is four.{TAG}",
    f"water{TAG}",
    "the fox is quick",
    f"{TAG}{TAG}stone {TAG} naïve café — 水 and 🐟{TAG}",
]
IDS = [tokenizer()(text)["input_ids"] for text in TEXTS]
(TAG_ID,) = tokenizer()(TAG)["input_ids"]


def backbone(folder: Path, family: str = "Qwen2", **options: Any) -> Path:
    """A tiny language model."""
    return checkpoints.classifier(folder, family, "ForCausalLM", tokenizer=tokenizer(), **options)


def with_head(folder: Path, architecture: str, head: dict[str, Tensor], *, keep: bool = False, **config: Any) -> Path:
    """Give the checkpoint in `folder` other head tensors and another architecture's name.

    Args:
        folder: a language model.
        architecture: what its config names.
        head: tensors that it carries besides the backbone's.
        keep: leave its own output embeddings there.
        config: changes of its config.
    """
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if keep or not name.startswith("lm_head")}
    save_file({**weights, **head}, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoints.edit_json(folder / "config.json", architectures=[architecture], **config)
    return folder


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes]


def two_layers(labels: int, prefix: str = "") -> tuple[dict[str, Tensor], Rows]:
    """As Qwen2's: Linear, ReLU, Linear."""
    w0, b0, w2, b2 = drawn((HIDDEN, HIDDEN), (HIDDEN,), (labels, HIDDEN), (labels,))
    named = {"score.0.weight": w0, "score.0.bias": b0, "score.2.weight": w2, "score.2.bias": b2}
    return {prefix + name: tensor for name, tensor in named.items()}, lambda x: (x @ w0.T + b0).relu() @ w2.T + b2


def linear(name: str, *, bias: bool = False) -> tuple[dict[str, Tensor], Rows]:
    """One layer to one number."""
    w, b = drawn((1, HIDDEN), (1,))
    head = {f"{name}.weight": w, **({f"{name}.bias": b} if bias else {})}
    return head, lambda x: x @ w.T + (b if bias else 0)


def gated() -> tuple[dict[str, Tensor], Rows]:
    """As Ernie's: the first half of `up_gate_proj` is the gate."""
    up_gate, down = drawn((2 * HIDDEN, HIDDEN), (1, HIDDEN))
    gate, up = up_gate[:HIDDEN], up_gate[HIDDEN:]
    head = {"rm_head.up_gate_proj.weight": up_gate, "rm_head.down_proj.weight": down}
    return head, lambda x: (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def states(folder: Path, kind: Any = AutoModel) -> list[Tensor]:
    """The reference: last hidden states of each text, alone."""
    model = kind.from_pretrained(folder, attn_implementation="eager").eval()
    model = model if kind is AutoModel else model.base_model
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in IDS]


def rewards(llm: LLM, prompts: Any = None, params: Any = None) -> list[np.ndarray]:
    outputs = llm.reward(TEXTS if prompts is None else prompts, pooling_params=params, use_tqdm=False)
    return [output.outputs.data.numpy() for output in outputs]


def encoded(llm: LLM, task: str, params: Any = None) -> list[np.ndarray]:
    outputs = llm.encode(TEXTS, params, pooling_task=task, use_tqdm=False)
    return [output.outputs.data.numpy() for output in outputs]


def close(found: list[np.ndarray], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == tuple(other.shape)
        scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale)


def sigmoid(values: list[Tensor]) -> list[Tensor]:
    return [value.sigmoid() for value in values]


# --- rewards of tokens ---------------------------------------------------------------------------------------------

OF_TOKENS: dict[str, tuple[str, str, Callable[[], tuple[dict[str, Tensor], Rows]]]] = {
    "two layers": ("Qwen2", "Qwen2ForRewardModel", lambda: two_layers(1)),
    "v_head": ("Llama", "LlamaForRewardModel", lambda: linear("v_head")),
    "score": ("Qwen3", "Qwen3ForRewardModel", lambda: linear("score")),
    "score with a bias": ("Qwen3", "Qwen3ForRewardModeling", lambda: linear("score", bias=True)),
    "below a prefix": ("Mistral", "MistralRewardModel", lambda: linear("reward.v_head")),
}


HEADS = [
    pytest.param(keep, name, id=f"{'with' if keep else 'without'} lm_head-{name}")
    for keep in (True, False)
    for name in OF_TOKENS
]


@pytest.mark.parametrize(("keep", "name"), HEADS)
def test_rewards_of_tokens(tmp_path: Path, name: str, keep: bool) -> None:
    """`[T, 1]`, raw; of the last token as class; and vectors besides."""
    family, architecture, build = OF_TOKENS[name]
    head, rows = build()
    folder = with_head(backbone(tmp_path, family), architecture, head, keep=keep)
    hidden = states(folder)
    expected = [rows(x) for x in hidden]
    assert min(float(values.std()) for values in expected if len(values) > 1) > 1e-2
    with LLM(model=str(folder)) as llm:
        info = llm.info
        assert info.tasks == ("token_classify", "classify", "embed", "token_embed")
        assert (info.default_task, info.reward, info.step, info.num_labels) == (
            "token_classify",
            "token_classify",
            False,
            1,
        )
        assert info.report.head.startswith(f"{architecture}, ")
        close(rewards(llm), expected)
        close(rewards(llm, IDS), expected)
        close(rewards(llm, params=ACTIVE), sigmoid(expected))
        close(rewards(llm, params=PoolingParams(task="reward")), expected)
        with pytest.raises(BadRequest, match="pooling_params name the task 'embed', and the call has 'reward'"):
            rewards(llm, params=[*[PoolingParams()] * (len(TEXTS) - 1), PoolingParams(task="embed")])
        close(encoded(llm, "token_classify"), expected)
        close(encoded(llm, "token_classify", ACTIVE), sigmoid(expected))
        close(encoded(llm, "classify"), [values[-1] for values in expected])
        close(encoded(llm, "embed"), [nn.functional.normalize(x[-1], dim=-1) for x in hidden])
        params = [PoolingParams(use_activation=i % 2 == 1) for i in range(len(TEXTS))]
        close(rewards(llm, params=params), [v.sigmoid() if i % 2 else v for i, v in enumerate(expected)])


def test_rewards_of_tokens_by_pooling(tmp_path: Path) -> None:
    head, rows = two_layers(1)
    folder = with_head(backbone(tmp_path), "Qwen2ForRewardModel", head)
    hidden = states(folder)
    with LLM(model=str(folder), pooler_config={"pooling_type": "MEAN"}) as llm:
        close(encoded(llm, "classify"), [rows(x.mean(0)) for x in hidden])
        close(rewards(llm), [rows(x) for x in hidden])
    with LLM(model=str(folder), pooler_config={"use_activation": True, "task": "classify"}) as llm:
        close(encoded(llm, "classify"), [rows(x[-1]).sigmoid() for x in hidden])
        close(rewards(llm), [rows(x).sigmoid() for x in hidden])
        close(rewards(llm, params=RAW), [rows(x) for x in hidden])
        assert llm.info.default_task == "classify"
    with LLM(model=str(folder), pooler_config={"logit_mean": 0.5, "logit_sigma": 2.0}) as llm:
        close(rewards(llm), [(rows(x) - 0.5) / 2 for x in hidden])


def test_reward_heads_are_float32(tmp_path: Path) -> None:
    head, _ = two_layers(1)
    half = {name: tensor.bfloat16() for name, tensor in head.items()}
    folder = with_head(backbone(tmp_path), "Qwen2ForRewardModel", half)
    hidden = states(folder)
    rounded = {name: tensor.float() for name, tensor in half.items()}
    first = [(x @ rounded["score.0.weight"].T + rounded["score.0.bias"]).relu() for x in hidden]
    with LLM(model=str(folder)) as llm:
        close(rewards(llm), [x @ rounded["score.2.weight"].T + rounded["score.2.bias"] for x in first])


# --- rewards of inputs ---------------------------------------------------------------------------------------------


def ernie(folder: Path) -> Path:
    """A tiny Ernie-4.5-VL-MoE, its vision tower included."""
    made = tokenizer()
    text = {
        "vocab_size": len(made),
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mlp_layer_types": ["dense", "sparse"],
        "moe_intermediate_size": [24, 24],
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "pad_token_id": 0,
    }
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "patch_size": 4}
    config = transformers.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)
    return checkpoints.save(transformers.Ernie4_5_VLMoeModel(config), made, folder, seed=0)


def test_gated_heads_rate_the_input(tmp_path: Path) -> None:
    """FastDeploy's reward model pools LAST: `[1]`, raw."""
    head, rows = gated()
    folder = with_head(ernie(tmp_path), "Ernie4_5_VLMoeForProcessRewardModel", head)
    expected = [rows(x) for x in states(folder)]
    with LLM(model=str(folder)) as llm:
        assert llm.info.tasks == ("classify", "token_classify", "embed", "token_embed")
        assert (llm.info.reward, llm.info.report.head.split(", ")[1]) == ("classify", "gated (Ernie)")
        close(rewards(llm), [values[-1] for values in expected])
        close(rewards(llm, params=ACTIVE), [values[-1].sigmoid() for values in expected])
        close(encoded(llm, "token_classify"), expected)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_outcomes(tmp_path: Path, family: str) -> None:
    """As Skywork-Reward: a sequence classifier with one label, whose raw score is the reward."""
    folder = checkpoints.classifier(tmp_path, family, tokenizer=tokenizer(), num_labels=1)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([ids])).logits[0] for ids in IDS]
    with LLM(model=str(folder)) as llm:
        assert llm.info.reward == "classify"
        close(rewards(llm), expected)
        close(rewards(llm, params=ACTIVE), sigmoid(expected))
        close(encoded(llm, "classify"), sigmoid(expected))


def test_long_conversations_are_refused_or_cut(tmp_path: Path) -> None:
    head, _ = two_layers(1)
    folder = with_head(backbone(tmp_path, max_position_embeddings=32), "Qwen2ForRewardModel", head)
    with LLM(model=str(folder)) as llm:
        with pytest.raises(TooLong, match="maximum context length is 32 tokens"):
            llm.reward("water " * 40)
        (output,) = llm.reward("water " * 40, use_tqdm=False, tokenization_kwargs={"truncate_prompt_tokens": -1})
        assert output.outputs.data.shape == (32, 1)


# --- steps ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2ForProcessRewardModel."""
    folder = backbone(tmp_path_factory.mktemp("prm"))
    return with_head(folder, "Qwen2ForProcessRewardModel", two_layers(2)[0])


@pytest.fixture(scope="module")
def classes(prm: Path) -> list[Tensor]:
    """Raw values of both classes for every token, `[T, 2]` each."""
    return [two_layers(2)[1](x) for x in states(prm)]


@pytest.fixture(scope="module")
def steps(prm: Path) -> Iterator[LLM]:
    with LLM(model=str(prm)) as made:
        yield made


def of_tag(values: list[Tensor], tag: int = TAG_ID) -> list[Tensor]:
    """Rows of the tokens that are `tag`."""
    return [rows[torch.tensor(ids) == tag] for rows, ids in zip(values, IDS, strict=True)]


def softmax(values: list[Tensor]) -> list[Tensor]:
    return [rows.softmax(-1) for rows in values]


def test_process_rewards(steps: LLM, classes: list[Tensor]) -> None:
    """A row for each `<extra_0>`, none where there is none; softmax over two classes by default."""
    assert [len(rows) for rows in of_tag(classes)] == [2, 1, 0, 4]
    assert steps.info.tasks == ("token_classify", "classify", "embed", "token_embed")
    assert (steps.info.reward, steps.info.step, steps.info.num_labels) == ("token_classify", True, 2)
    close(rewards(steps), softmax(of_tag(classes)))
    close(rewards(steps, params=RAW), of_tag(classes))
    close(encoded(steps, "token_classify"), softmax(of_tag(classes)))
    close(rewards(steps, IDS[2]), [torch.empty(0, 2)])
    close(encoded(steps, "classify"), [rows[-1].softmax(-1) for rows in classes])


def test_process_rewards_are_raw_if_the_user_wants_it(prm: Path, classes: list[Tensor]) -> None:
    with LLM(model=str(prm), pooler_config={"use_activation": False}) as llm:
        close(rewards(llm), of_tag(classes))
        close(rewards(llm, params=ACTIVE), softmax(of_tag(classes)))


def test_step_parameters_of_a_request(steps: LLM, classes: list[Tensor]) -> None:
    (letter,) = tokenizer()("o")["input_ids"]
    assert sum(map(len, of_tag(classes, letter))) > 3
    close(rewards(steps, params=PoolingParams(step_tag_id=letter)), softmax(of_tag(classes, letter)))
    for columns in ((1,), (1, 0), (0, 1), (1, 1, 0)):
        raw = [rows[:, list(columns)] for rows in of_tag(classes)]
        close(rewards(steps, params=PoolingParams(use_activation=False, returned_token_ids=columns)), raw)
        close(rewards(steps, params=PoolingParams(returned_token_ids=columns)), softmax(raw))
    mixed = [
        PoolingParams(step_tag_id=letter, use_activation=False),
        PoolingParams(),
        PoolingParams(returned_token_ids=(1, 0)),
        PoolingParams(use_activation=False, returned_token_ids=(0,)),
    ]
    expected = [
        of_tag(classes, letter)[0],
        of_tag(classes)[1].softmax(-1),
        torch.empty(0, 2),
        of_tag(classes)[3][:, :1],
    ]
    close(rewards(steps, params=mixed), expected)


def test_lists_and_numpy_integers_are_step_parameters(steps: LLM, classes: list[Tensor]) -> None:
    params = PoolingParams(step_tag_id=np.int64(TAG_ID), returned_token_ids=np.array([1]), use_activation=False)  # type: ignore[arg-type]
    close(rewards(steps, params=params), [rows[:, 1:] for rows in of_tag(classes)])
    assert params.returned_token_ids == (1,)


def test_steps_by_the_pooler_config(prm: Path, classes: list[Tensor]) -> None:
    (letter,) = tokenizer()("o")["input_ids"]
    with LLM(model=str(prm), pooler_config={"pooling_type": "STEP", "step_tag_id": letter}) as llm:
        close(rewards(llm), softmax(of_tag(classes, letter)))
        close(rewards(llm, params=PoolingParams(step_tag_id=TAG_ID)), softmax(of_tag(classes)))
    with LLM(model=str(prm), pooler_config={"step_tag_id": letter, "returned_token_ids": [1, 0]}) as llm:
        close(rewards(llm), softmax([rows[:, [1, 0]] for rows in of_tag(classes, letter)]))
        close(rewards(llm, params=PoolingParams(returned_token_ids=(0,), use_activation=False)), [
            rows[:, :1] for rows in of_tag(classes, letter)
        ])  # fmt: skip
    with LLM(model=str(prm), pooler_config={"returned_token_ids": [1]}) as llm:  # one class: its own probability
        close(rewards(llm), sigmoid([rows[:, 1:] for rows in of_tag(classes)]))
    with LLM(model=str(prm), pooler_config={"tok_pooling_type": "ALL"}) as llm:
        assert not llm.info.step
        close(encoded(llm, "token_classify", ACTIVE), softmax(classes))
        close(rewards(llm), classes)


def test_a_process_reward_model_without_its_tag(tmp_path: Path) -> None:
    made = byte_level("$A")
    folder = checkpoints.classifier(tmp_path, "Qwen2", "ForCausalLM", tokenizer=made)
    with_head(folder, "Qwen2ForProcessRewardModel", two_layers(2)[0])
    with pytest.raises(CheckpointError, match="the vocabulary has no '<extra_0>'; set pooler_config.step_tag_id"):
        LLM(model=str(folder))
    with LLM(model=str(folder), pooler_config={"step_tag_id": 5}) as llm:
        assert [rows.shape for rows in rewards(llm, [[5, 6, 5], [6]])] == [(2, 2), (0, 2)]


# --- columns of a vocabulary ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shepherd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As math-shepherd-mistral-7b-prm: a language model that rates a step by two entries of its vocabulary."""
    return backbone(tmp_path_factory.mktemp("shepherd"), "Llama")


@pytest.fixture(scope="module")
def logits(shepherd: Path) -> list[Tensor]:
    """Of every token over the whole vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(shepherd, attn_implementation="eager").eval()
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids])).logits[0] for ids in IDS]


GOOD, BAD = tokenizer().convert_tokens_to_ids(["+", "-"])
STEP = {"pooling_type": "STEP", "step_tag_id": TAG_ID, "returned_token_ids": [GOOD, BAD]}


def test_steps_of_a_language_model(shepherd: Path, logits: list[Tensor]) -> None:
    expected = [rows[:, [GOOD, BAD]] for rows in of_tag(logits)]
    assert float(torch.cat(expected).std(0).min()) > 1e-2
    for convert in ("auto", "classify"):
        with LLM(model=str(shepherd), convert=convert, pooler_config=STEP) as llm:
            assert llm.info.tasks == ("token_classify", "embed", "token_embed")
            assert (llm.info.reward, llm.info.step, llm.info.num_labels) == ("token_classify", True, 2)
            assert llm.info.report.head == "its language-model head"
            close(rewards(llm), softmax(expected))
            close(rewards(llm, params=RAW), expected)
            swapped = PoolingParams(returned_token_ids=(BAD, GOOD), use_activation=False)
            close(rewards(llm, params=swapped), [rows[:, [1, 0]] for rows in expected])
            with pytest.raises(BadRequest, match=f"returned_token_ids: {GOOD + 5} is no column") as caught:
                llm.reward(TEXTS, pooling_params=PoolingParams(returned_token_ids=(GOOD, GOOD + 5)))
            assert caught.value.param == "returned_token_ids"
            close(rewards(llm), softmax(expected))


def test_a_whole_vocabulary(shepherd: Path, logits: list[Tensor]) -> None:
    """Without columns all are kept: softmax over the vocabulary, or over those that a request names."""
    with LLM(model=str(shepherd), pooler_config={"pooling_type": "STEP"}) as llm:
        assert llm.info.num_labels == len(tokenizer())
        close(rewards(llm), softmax(logits))
        named = PoolingParams(step_tag_id=TAG_ID, returned_token_ids=(BAD, GOOD))
        close(rewards(llm, params=named), softmax([rows[:, [BAD, GOOD]] for rows in of_tag(logits)]))
        with pytest.raises(BadRequest, match=f"returned_token_ids: {len(tokenizer())} is no column"):
            llm.reward("a", pooling_params=PoolingParams(returned_token_ids=(0, len(tokenizer()))))


@pytest.mark.parametrize("tied", [True, False])
def test_steps_of_capped_logits(tmp_path: Path, tied: bool) -> None:
    options = {"query_pre_attn_scalar": 16, "final_logit_softcapping": 0.9, "tie_word_embeddings": tied}
    folder = backbone(tmp_path, "Gemma2", **options)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([ids])).logits[0] for ids in IDS]
    with LLM(model=str(folder), pooler_config=STEP) as llm:
        close(rewards(llm, params=RAW), [rows[:, [GOOD, BAD]] for rows in of_tag(logits)])


@pytest.mark.parametrize("columns", [[1 << 40], [GOOD, 10_000]])
def test_columns_outside_the_vocabulary_are_refused(shepherd: Path, columns: list[int]) -> None:
    sentence = f"{columns[-1]} is no column|token ids below {len(tokenizer())}"
    with pytest.raises(CheckpointError, match=sentence):
        LLM(model=str(shepherd), pooler_config={**STEP, "returned_token_ids": columns})


def test_columns_outside_the_head_are_refused(prm: Path, steps: LLM) -> None:
    with pytest.raises(CheckpointError, match=r"returned_token_ids: 2 is no column of .*'s head"):
        LLM(model=str(prm), pooler_config={"returned_token_ids": [0, 2]})
    for columns in ((2,), (0, -1), (1 << 70,)):
        with pytest.raises(BadRequest, match=f"returned_token_ids: {columns[-1]} is no column of .*'s head") as caught:
            steps.reward(TEXTS, pooling_params=PoolingParams(returned_token_ids=columns))
        assert caught.value.param == "returned_token_ids"


@pytest.mark.parametrize("tag", [-1, 10_000, 1 << 70])
def test_tags_outside_the_vocabulary_are_refused(steps: LLM, tag: int) -> None:
    with pytest.raises(BadRequest, match=f"Token id {tag} is out of vocabulary") as caught:
        steps.reward(TEXTS, pooling_params=PoolingParams(step_tag_id=tag))
    assert caught.value.param == "step_tag_id"


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step_tag_id", "a"),
        ("step_tag_id", True),
        ("step_tag_id", 1.5),
        ("step_tag_id", [1]),
        ("returned_token_ids", []),
        ("returned_token_ids", "x"),
        ("returned_token_ids", b"x"),
        ("returned_token_ids", 5),
        ("returned_token_ids", [1.5]),
        ("returned_token_ids", ["1"]),
        ("returned_token_ids", [0, True]),
    ],
)
def test_step_parameters_of_a_wrong_type(prm: Path, name: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=f"{name} must be (an integer|a list of token ids), got ") as caught:
        PoolingParams(**{name: value})
    assert caught.value.param == name
    with pytest.raises(ConfigError, match=name):
        LLM(model=str(prm), pooler_config={name: value})


@pytest.mark.parametrize("params", [PoolingParams(step_tag_id=5), PoolingParams(returned_token_ids=(0,))])
def test_step_parameters_where_there_are_no_steps(tmp_path: Path, params: PoolingParams) -> None:
    head, _ = two_layers(2)
    folder = with_head(backbone(tmp_path), "Qwen2ForRewardModel", head)
    (name,) = params.given()
    with LLM(model=str(folder)) as llm:
        with pytest.raises(BadRequest, match=rf"{name} is for process reward models \(pooling type STEP\)") as caught:
            llm.reward("a", pooling_params=params)
        assert caught.value.param == name
        with pytest.raises(BadRequest, match=r"Task 'classify' only supports \['use_activation'\] parameters"):
            llm.classify("a", pooling_params=params)
    with pytest.raises(
        CheckpointError, match=rf"pooler_config\.{name} is for pooling type STEP, which .* does not use"
    ):
        LLM(model=str(folder), pooler_config={name: getattr(params, name)})


def test_steps_without_a_head_are_refused(tmp_path: Path) -> None:
    folder = checkpoints.bert(tmp_path)
    with pytest.raises(CheckpointError, match="pooling type STEP rates steps, but .* has no head to rate them"):
        LLM(model=str(folder), pooler_config={"pooling_type": "STEP"})


@pytest.mark.parametrize("name", ["logit_mean", "logit_sigma"])
def test_calibration_without_a_head_is_refused(tmp_path: Path, name: str) -> None:
    folder = checkpoints.bert(tmp_path)
    sentence = rf"pooler_config\.{name} calibrates the logits of a classification head, which .* has not"
    with pytest.raises(CheckpointError, match=sentence):
        LLM(model=str(folder), pooler_config={name: 1.0})


def test_models_that_give_no_reward(tmp_path: Path) -> None:
    with LLM(model=str(checkpoints.bert(tmp_path / "bert"))) as llm:
        with pytest.raises(TaskNotOffered, match="is not a reward model. It offers: embed, token_embed"):
            llm.reward("a")
        with pytest.raises(TaskNotOffered, match="`reward` task was removed; use `classify`"):
            llm.encode("a", pooling_task="reward")
    three = checkpoints.classifier(tmp_path / "three", num_labels=3)
    sentence = "is not a reward model; it has 3 labels, and a reward has one. It offers: classify"
    with LLM(model=str(three)) as llm, pytest.raises(TaskNotOffered, match=sentence):
        llm.reward("a")


def test_a_reward_model_without_a_head_gives_its_states(tmp_path: Path) -> None:
    """As vLLM turns `*ForRewardModeling` into an embedder."""
    folder = with_head(backbone(tmp_path), "Qwen2ForRewardModel", {})
    with LLM(model=str(folder)) as llm:
        assert llm.info.tasks == ("embed", "token_embed")
        close(encoded(llm, "token_embed", RAW), states(folder))


def test_converted_to_embed(prm: Path, classes: list[Tensor]) -> None:
    """FastDeploy's launch of a reward model: vectors are the default, and the head stays."""
    with LLM(model=str(prm), convert="embed") as llm:
        assert llm.info.tasks == ("embed", "token_embed", "token_classify", "classify")
        assert (llm.info.default_task, llm.info.reward) == ("embed", "token_classify")
        close(rewards(llm), softmax(of_tag(classes)))
        close(encoded(llm, "embed"), [nn.functional.normalize(x[-1], dim=-1) for x in states(prm)])


def test_the_older_task_reward(prm: Path, shepherd: Path, tmp_path: Path) -> None:
    """`LLM(task="reward")` is older vLLM's: `encode` then rewards without being told."""
    with pytest.warns(FutureWarning, match="task='reward' is the spelling of older releases"):
        llm = LLM(model=str(prm), task="reward")
    with llm:
        assert llm.info.default_task == "token_classify"
        (output,) = llm.encode(TEXTS[1], use_tqdm=False)
        assert output.outputs.data.shape == (1, 2)
    head, rows = gated()
    folder = with_head(ernie(tmp_path / "ernie"), "Ernie4_5_VLMoeForProcessRewardModel", head)
    with pytest.warns(FutureWarning):
        llm = LLM(model=str(folder), task="reward")
    with llm:
        assert llm.info.default_task == "classify"
        close(encoded(llm, llm.info.default_task), [rows(x[-1]) for x in states(folder)])
    plain = checkpoints.bert(tmp_path / "bert")
    with pytest.warns(FutureWarning), pytest.raises(CheckpointError, match="the task asked for is 'reward', but"):
        LLM(model=str(plain), task="reward")
