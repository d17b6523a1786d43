"""Heads and projections that Transformers has no class for, and the audit of all tensors of a checkpoint."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from cenote import LLM, PoolingParams
from cenote.errors import CheckpointError, EngineFailed, TaskNotOffered
from cenote.models.leftovers import Names
from tests import checkpoints
from tests.checkpoints import HIDDEN, byte_level, wordpiece

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

TEXTS = ["the quick brown fox", "a", "one two three four five six seven eight nine ten "]
RAW = PoolingParams(use_activation=False)


def tokenizer(*special: str) -> Any:
    return byte_level("$A", special=special)


def backbone(folder: Path, family: str = "Llama", kind: str = "Model", **options: Any) -> Path:
    options = {"tokenizer": tokenizer(), **options}
    return checkpoints.classifier(folder, family, kind, **options)


def drawn(seed: int = 1, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Tensors by name, with "__" for a dot."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name.replace("__", "."): torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for name, shape in shapes.items()
    }


def add(folder: Path, tensors: dict[str, Tensor], architecture: str | None = None, **config: Any) -> Path:
    """Give the checkpoint in `folder` further tensors, and another architecture's name."""
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})
    if architecture is not None:
        config["architectures"] = [architecture]
    checkpoints.edit_json(folder / "config.json", **config)
    return folder


def ids_of(folder: Path, texts: list[str] | None = None) -> list[list[int]]:
    made = transformers.AutoTokenizer.from_pretrained(folder)
    return [made(text)["input_ids"] for text in texts or TEXTS]


def states(folder: Path, ids: list[list[int]] | None = None, attention: str = "eager", **options: Any) -> list[Tensor]:
    """The reference: last hidden states of each text, alone."""
    model = AutoModel.from_pretrained(folder, attn_implementation=attention, **options).eval()
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([one])).last_hidden_state[0] for one in ids or ids_of(folder)]


def close(found: Any, expected: Any, scale: float = 1.0) -> None:
    for one, other in zip(found, expected, strict=True):
        assert np.shape(one) == tuple(other.shape)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(scale, float(other.abs().max())))


def rewards(llm: LLM, texts: Any = None, params: Any = None) -> list[Any]:
    outputs = llm.reward(texts or TEXTS, pooling_params=params, use_tqdm=False)
    return [output.outputs.data.numpy() for output in outputs]


def left(llm: LLM) -> dict[str, str]:
    """Modules that were left, with the reason."""
    return {name: entries.reason for entries in llm.info.report.left for name in entries.names}


def used(llm: LLM) -> set[str]:
    return {name for entries in llm.info.report.used for name in entries.names}


# --- reward heads --------------------------------------------------------------------------------------------------

V_HEAD = drawn(v_head__summary__weight=(1, HIDDEN), v_head__summary__bias=(1,))
REGRESSION = drawn(regression_head__weight=(1, HIDDEN))
SCORE_HEAD = drawn(score_head__weight=(1, HIDDEN), score_head__bias=(1,))
OF_TOKENS = {
    "Skywork": ("Qwen2", "Model", "Qwen2ForPrmModel", V_HEAD, "value head (TRL)"),
    "TRL": ("Llama", "ForCausalLM", "LlamaForCausalLM", V_HEAD, "value head (TRL)"),
}
OF_INPUTS = {
    "UltraRM": ("Llama", "LlamaRewardModel", REGRESSION, "regression head (UltraRM)"),
    "Eurus": ("Mistral", "MistralForRewardModel", REGRESSION, "regression head (UltraRM)"),
    "beaver": ("Llama", "LlamaModelForScore", SCORE_HEAD, "score head (safe-rlhf)"),
}


def linear(head: dict[str, Tensor], x: Tensor) -> Tensor:
    weight = next(tensor for name, tensor in head.items() if name.endswith("weight"))
    bias = next((tensor for name, tensor in head.items() if name.endswith("bias")), torch.zeros(1))
    return x @ weight.T + bias


@pytest.mark.parametrize("name", OF_TOKENS)
def test_value_heads_rate_every_token(tmp_path: Path, name: str) -> None:
    family, kind, architecture, head, row = OF_TOKENS[name]
    folder = add(backbone(tmp_path, family, kind), head, architecture)
    expected = [linear(head, x) for x in states(folder)]
    with LLM(model=str(folder)) as llm:
        assert llm.info.report.head == f"{architecture}, {row}"
        assert llm.info.tasks[0] == llm.info.reward == "token_classify"
        assert "v_head" in used(llm)
        close(rewards(llm), expected)
        close(rewards(llm, params=PoolingParams(use_activation=True)), [x.sigmoid() for x in expected])


@pytest.mark.parametrize("name", OF_INPUTS)
def test_heads_that_rate_the_input(tmp_path: Path, name: str) -> None:
    family, architecture, head, row = OF_INPUTS[name]
    folder = add(backbone(tmp_path, family), head, architecture)
    expected = [linear(head, x) for x in states(folder)]
    with LLM(model=str(folder)) as llm:
        assert llm.info.report.head == f"{architecture}, {row}"
        assert llm.info.tasks[0] == llm.info.reward == "classify"
        close(rewards(llm), [values[-1] for values in expected])
        tokens = llm.encode(TEXTS, pooling_task="token_classify", use_tqdm=False)
        close([output.outputs.data.numpy() for output in tokens], expected)


@pytest.mark.parametrize("kind", ["reward", "cost", "critic"])
@pytest.mark.parametrize("place", ["config", "tensors"])
def test_normalised_scores_of_safe_rlhf(tmp_path: Path, kind: str, place: str) -> None:
    """`Normalizer.normalize`: (x - mean) / (std + 1e-8) for rewards, x / (std + 1e-8) for costs, x for critics."""
    mean, var = torch.tensor([0.7]), torch.tensor([2.5])
    config: dict[str, Any] = {"do_normalize": True, "score_type": kind}
    head = dict(SCORE_HEAD)
    if place == "config":
        config |= {"mean": mean.tolist(), "var": var.tolist()}
    else:
        head |= {"normalizer.mean": mean, "normalizer.var": var, "normalizer.count": torch.tensor(9)}
    folder = add(backbone(tmp_path), head, "LlamaModelForScore", **config)
    raw = [linear(SCORE_HEAD, x)[-1] for x in states(folder)]
    shift, scale = {"reward": (mean, var.sqrt()), "cost": (0.0, var.sqrt()), "critic": (0.0, 1.0)}[kind]
    with LLM(model=str(folder)) as llm:
        close(rewards(llm), [(x - shift) / scale for x in raw])


def test_normalised_scores_without_statistics_are_refused(tmp_path: Path) -> None:
    folder = add(backbone(tmp_path), SCORE_HEAD, "LlamaModelForScore", do_normalize=True)
    with pytest.raises(CheckpointError, match=r"neither 'mean' there nor the tensor normalizer\.mean"):
        LLM(model=str(folder))
    with LLM(model=str(folder), hf_overrides={"do_normalize": False}) as llm:
        close(rewards(llm), [linear(SCORE_HEAD, x)[-1] for x in states(folder)])


def test_two_layers_below_a_sequence_classifiers_name(tmp_path: Path) -> None:
    """INF-ORM: the raw score of the last token."""
    head = drawn(
        score__0__weight=(HIDDEN, HIDDEN), score__0__bias=(HIDDEN,), score__2__weight=(1, HIDDEN), score__2__bias=(1,)
    )
    folder = add(backbone(tmp_path), head, "INFORMForSequenceClassification")
    expected = [
        (x[-1] @ head["score.0.weight"].T + head["score.0.bias"]).relu() @ head["score.2.weight"].T
        + head["score.2.bias"]
        for x in states(folder)
    ]
    with LLM(model=str(folder)) as llm:
        assert llm.info.tasks[0] == llm.info.reward == "classify"
        close(rewards(llm), expected)


LLAMA3 = ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
CHAT = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{}"


def armorm(folder: Path, objectives: int = 5, **config: Any) -> tuple[Path, dict[str, Tensor]]:
    shapes: dict[str, tuple[int, ...]] = {
        "regression_layer__weight": (objectives, HIDDEN),
        "reward_transform_matrix": (objectives, objectives),
        "gating__logit_scale": (1,),
        "gating__layers__0__weight": (12, HIDDEN),
        "gating__layers__0__bias": (12,),
        "gating__layers__1__weight": (12, 12),
        "gating__layers__1__bias": (12,),
        "gating__layers__2__weight": (objectives, 12),
        "gating__layers__2__bias": (objectives,),
    }
    head = {name: 4 * tensor for name, tensor in drawn(**shapes).items()}
    made = backbone(folder, tokenizer=tokenizer(*LLAMA3), max_position_embeddings=256)
    return add(made, head, "LlamaForRewardModelWithGating", **config), head


def gated(head: dict[str, Tensor], ids: list[int], end: list[int], x: Tensor, temperature: float) -> Tensor:
    """`LlamaForRewardModelWithGating.forward`, of one conversation."""
    place = max(i for i in range(len(ids)) if ids[i : i + len(end)] == end)
    gate = x[place]
    for i in range(3):
        gate = gate @ head[f"gating.layers.{i}.weight"].T + head[f"gating.layers.{i}.bias"]
        gate = gate.relu() if i < 2 else gate
    gate = (gate / temperature).softmax(-1) * head["gating.logit_scale"][0]
    objectives = x[-1] @ head["regression_layer.weight"].T @ head["reward_transform_matrix"]
    return (gate * objectives).sum()[None]


@pytest.mark.parametrize("temperature", [None, 2.0])
def test_gated_objectives(tmp_path: Path, temperature: float | None) -> None:
    config = {} if temperature is None else {"gating_temperature": temperature}
    folder, head = armorm(tmp_path, **config)
    texts = [CHAT.format("one two", "three"), CHAT.format("a", "the fox") + CHAT.format("b", "water water")]
    made, ids = tokenizer(*LLAMA3), ids_of(folder, texts)
    end = made("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")["input_ids"]
    expected = [gated(head, one, end, x, temperature or 10.0) for one, x in zip(ids, states(folder, ids), strict=True)]
    assert abs(float(expected[0] - expected[1])) > 1e-2
    with LLM(model=str(folder)) as llm:
        assert llm.info.tasks == ("classify", "embed", "token_embed")
        close(rewards(llm, texts), expected)
        with pytest.raises(EngineFailed, match="not finite"):
            llm.reward("no prompt ends here", use_tqdm=False)
        close(rewards(llm, texts), expected)


def test_quantiles_of_objectives_are_refused(tmp_path: Path) -> None:
    folder, _ = armorm(tmp_path)
    add(folder, drawn(regression_layer__weight=(15, HIDDEN)))
    with pytest.raises(CheckpointError, match=r"quantiles of rewards \(QRM\) are not served"):
        LLM(model=str(folder))


def test_embed_keeps_known_heads_beside_it(tmp_path: Path) -> None:
    folder = add(backbone(tmp_path, "Qwen2"), V_HEAD, "Qwen2ForPrmModel")
    hidden = states(folder)
    with LLM(model=str(folder), convert="embed") as llm:
        assert (llm.info.default_task, llm.info.reward) == ("embed", "token_classify")
        close(rewards(llm), [linear(V_HEAD, x) for x in hidden])
        found = [output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False)]
        close(found, [nn.functional.normalize(x[-1], dim=-1) for x in hidden])


def test_attention_heads_are_no_reward_heads(tmp_path: Path) -> None:
    """Funnel calls its value projections `v_head`."""
    folder = checkpoints.classifier(
        tmp_path, "Funnel", "BaseModel", block_sizes=[1, 1], n_head=4, d_head=8, d_inner=64, d_model=HIDDEN
    )
    assert any(name.endswith(".v_head.weight") for name in load_file(folder / "model.safetensors"))
    with pytest.raises(CheckpointError) as caught:
        LLM(model=str(folder))
    assert "reward" not in str(caught.value)


# --- classification heads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaClassificationModel", "LlamaModel"])
def test_a_score_layer_under_another_architectures_name(tmp_path: Path, architecture: str) -> None:
    folder = checkpoints.classifier(tmp_path, "Llama", tokenizer=tokenizer(), num_labels=3)
    checkpoints.edit_json(folder / "config.json", architectures=[architecture])
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([ids])).logits[0] for ids in ids_of(folder)]
    with LLM(model=str(folder)) as llm:
        assert "score" in used(llm)
        close([o.outputs.probs for o in llm.classify(TEXTS, pooling_params=RAW, use_tqdm=False)], expected)


NAMELESS = [
    ("Bert", "ForSequenceClassification", AutoModelForSequenceClassification),
    ("Bert", "ForTokenClassification", AutoModelForTokenClassification),
    ("Roberta", "ForSequenceClassification", AutoModelForSequenceClassification),
    ("DistilBert", "ForSequenceClassification", AutoModelForSequenceClassification),
    ("DistilBert", "ForTokenClassification", AutoModelForTokenClassification),
    ("Qwen2", "ForSequenceClassification", AutoModelForSequenceClassification),
    ("Qwen2", "ForTokenClassification", AutoModelForTokenClassification),
]


@pytest.mark.parametrize(("family", "kind", "auto"), NAMELESS)
def test_heads_of_configs_without_architectures(tmp_path: Path, family: str, kind: str, auto: Any) -> None:
    made = wordpiece() if family in ("Bert", "DistilBert") else tokenizer()
    folder = checkpoints.classifier(tmp_path, family, kind, tokenizer=made, num_labels=3)
    content = json.loads((folder / "config.json").read_text())
    del content["architectures"]
    (folder / "config.json").write_text(json.dumps(content))
    model = auto.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([ids])).logits[0] for ids in ids_of(folder)]
    task = "token_classify" if "Token" in kind else "classify"
    with LLM(model=str(folder)) as llm:
        assert llm.info.tasks[0] == task
        outputs = llm.encode(TEXTS, RAW, pooling_task=task, use_tqdm=False)
        close([output.outputs.data.numpy() for output in outputs], expected)


@pytest.mark.parametrize(("family", "kind"), [("Bert", "Model"), ("Bert", "ForMaskedLM"), ("Llama", "ForCausalLM")])
def test_embedders_of_configs_without_architectures(tmp_path: Path, family: str, kind: str) -> None:
    made = wordpiece() if family == "Bert" else tokenizer()
    folder = checkpoints.classifier(tmp_path, family, kind, tokenizer=made)
    content = json.loads((folder / "config.json").read_text())
    del content["architectures"]
    (folder / "config.json").write_text(json.dumps(content))
    with LLM(model=str(folder)) as llm:
        assert llm.info.tasks == ("embed", "token_embed")


@pytest.mark.parametrize(("family", "labels"), [("Llama", 1), ("Llama", 5), ("Roberta", 3)])
def test_labels_that_only_the_head_knows(tmp_path: Path, family: str, labels: int) -> None:
    """As OpenRLHF saves a reward model: its config names no number of labels."""
    folder = checkpoints.classifier(tmp_path, family, tokenizer=tokenizer(), num_labels=labels)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    content = json.loads((folder / "config.json").read_text())
    content = {key: value for key, value in content.items() if key not in ("id2label", "label2id", "num_labels")}
    (folder / "config.json").write_text(json.dumps(content))
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([ids])).logits[0] for ids in ids_of(folder)]
    with LLM(model=str(folder)) as llm:
        assert llm.info.num_labels == labels
        close([o.outputs.probs for o in llm.classify(TEXTS, pooling_params=RAW, use_tqdm=False)], expected)


def test_labels_that_contradict_the_head_are_refused(tmp_path: Path) -> None:
    folder = checkpoints.classifier(tmp_path, "Llama", tokenizer=tokenizer(), num_labels=3)
    checkpoints.edit_json(folder / "config.json", id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(CheckpointError, match=r"has misshapen weights .*score\.weight"):
        LLM(model=str(folder))


def test_a_missing_head_says_so(tmp_path: Path) -> None:
    folder = checkpoints.classifier(tmp_path, "Qwen2", tokenizer=tokenizer(), num_labels=1)
    file = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "score.weight"}, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match=r"lacks weights .*score\.weight, in model\.safetensors; the checkpoint was saved without its",
    ):
        LLM(model=str(folder))
    with LLM(model=str(folder), convert="embed") as llm:
        assert llm.info.tasks == ("embed", "token_embed")


# --- projections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["VoyageQwen3BidirectionalEmbedModel", "Qwen3Model"])
@pytest.mark.parametrize("pooling", ["MEAN", "LAST"])
def test_a_projection_before_pooling(tmp_path: Path, architecture: str, pooling: str) -> None:
    """voyage-4-nano: no causal mask, then a layer, then pooling."""
    head = drawn(linear__weight=(16, HIDDEN))
    folder = add(backbone(tmp_path, "Qwen3"), head, architecture, num_labels=16)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.is_causal = False
    projected = [x @ head["linear.weight"].T for x in states(folder, config=config)]
    causal = [x @ head["linear.weight"].T for x in states(folder)]
    assert float((projected[0] - causal[0]).abs().max()) > 1e-2
    rows = [x.mean(0) if pooling == "MEAN" else x[-1] for x in projected]
    with LLM(model=str(folder), pooler_config={"pooling_type": pooling}) as llm:
        assert llm.info.dimension == 16
        assert "linear" in used(llm)
        found = [output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False)]
        close(found, [nn.functional.normalize(row, dim=-1) for row in rows])
        tokens = llm.encode(TEXTS, pooling_task="token_embed", use_tqdm=False)
        expected = [nn.functional.normalize(x, dim=-1) for x in projected]
        close([output.outputs.data.numpy() for output in tokens], expected)


@pytest.mark.parametrize("bias", [True, False])
def test_a_text_projection_of_colpali_engine(tmp_path: Path, bias: bool) -> None:
    shapes: dict[str, tuple[int, ...]] = {"custom_text_proj__weight": (12, HIDDEN)}
    if bias:
        shapes["custom_text_proj__bias"] = (12,)
    head = drawn(**shapes)
    folder = add(backbone(tmp_path, "Qwen3"), head, "ColQwen3")
    with LLM(model=str(folder)) as llm:
        assert (llm.info.score_types[0], "custom_text_proj" in used(llm)) == ("late-interaction", True)
        tokens = llm.encode(TEXTS, pooling_task="token_embed", use_tqdm=False)
    expected = [
        nn.functional.normalize(
            x @ head["custom_text_proj.weight"].T + head.get("custom_text_proj.bias", torch.zeros(12)), dim=-1
        )
        for x in states(folder)
    ]
    close([output.outputs.data.numpy() for output in tokens], expected)


# --- listwise ------------------------------------------------------------------------------------------------------

MARKERS = ("<|im_start|>", "<|im_end|>", "<|embed_token|>", "<|rerank_token|>")
SYSTEM = (
    "You are a search relevance expert who can determine a ranking of the passages based on how relevant they are to "
    "the query. If the query is a question, how relevant a passage is depends on how well it answers the question. If "
    "not, try to analyze the intent of the query and assess how well each passage satisfies the intent. If an "
    "instruction is provided, you should follow the instruction when determining the ranking."
)


def listwise_prompt(query: str, documents: list[str], instruction: str = "") -> str:
    """As the checkpoint's `format_docs_prompts_func` writes it."""
    lines = [
        f"<|im_start|>system\n{SYSTEM}<|im_end|>",
        "<|im_start|>user",
        f"I will provide you with {len(documents)} passages, each indicated by a numerical identifier. Rank the "
        f"passages based on their relevance to query: {query}",
        *(["<instruct>", instruction, "</instruct>"] if instruction else []),
    ]
    for i, document in enumerate(documents):
        lines += [f'<passage id="{i}">', f"{document}<|embed_token|>", "</passage>"]
    lines += ["<query>", f"{query}<|rerank_token|>", "</query><|im_end|>", "<|im_start|>assistant", "<think>", ""]
    return "\n".join([*lines, "</think>", "", ""])


@pytest.fixture(scope="module")
def jina(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = backbone(
        tmp_path_factory.mktemp("jina"), "Qwen3", tokenizer=tokenizer(*MARKERS), max_position_embeddings=16384
    )
    head = drawn(projector__0__weight=(HIDDEN // 2, HIDDEN), projector__2__weight=(12, HIDDEN // 2))
    return add(folder, head, "JinaForRanking")


def projected(folder: Path, prompt: str, attention: str = "eager") -> tuple[Tensor, Tensor]:
    """The reference: vectors of the documents of a prompt, and of its query."""
    head, made = load_file(folder / "model.safetensors"), transformers.AutoTokenizer.from_pretrained(folder)
    ids = made(prompt)["input_ids"]
    (x,) = states(folder, [ids], attention)
    rows = (x @ head["projector.0.weight"].T).relu() @ head["projector.2.weight"].T
    document, query = made.convert_tokens_to_ids(["<|embed_token|>", "<|rerank_token|>"])
    tokens = torch.tensor(ids)
    return rows[tokens == document], rows[tokens == query]


def cosines(documents: Tensor, query: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(documents, query.expand_as(documents), dim=-1)


DOCUMENTS = ["the fox jumps", "water", "", "a natural stone of the lazy dog " * 3, "the fox jumps"]


@pytest.mark.parametrize("instruction", ["", "prefer the fox"])
def test_listwise_scores(jina: Path, instruction: str) -> None:
    query = "brown fox?"
    expected = cosines(*projected(jina, listwise_prompt(query, DOCUMENTS, instruction)))
    assert float(expected.std()) > 2e-3
    with LLM(model=str(jina)) as llm:
        assert llm.info.score_types == ("listwise",)
        outputs = llm.score(query, DOCUMENTS, use_tqdm=False, **({"instruction": instruction} if instruction else {}))
        np.testing.assert_allclose([o.outputs.score for o in outputs], expected, rtol=0, atol=1e-5)
        made = transformers.AutoTokenizer.from_pretrained(jina)
        ids = made(listwise_prompt(query, DOCUMENTS, instruction))["input_ids"]
        assert all(output.prompt_token_ids == ids for output in outputs)
        ranked = llm.rerank(query, DOCUMENTS, use_tqdm=False, **({"instruction": instruction} if instruction else {}))
        assert [entry.index for entry in ranked] == sorted(range(5), key=lambda i: -float(expected[i]))


def test_listwise_scores_of_several_queries(jina: Path) -> None:
    queries, documents = ["fox", "stone"], ["the quick fox", "water and stone"]
    expected = [
        float(cosines(*projected(jina, listwise_prompt(query, [document]))))
        for query, document in zip(queries, documents, strict=True)
    ]
    with LLM(model=str(jina)) as llm:
        outputs = llm.score(queries, documents, use_tqdm=False)
    np.testing.assert_allclose([o.outputs.score for o in outputs], expected, rtol=0, atol=1e-5)


def test_listwise_blocks(jina: Path) -> None:
    """130 documents are two prompts, and the query's vectors are averaged by the best document of each.

    The reference is by torch's attention: eager Transformers takes seconds for a prompt of thousands of tokens.
    """
    documents = [f"{number} fox" for number in range(130)]
    parts = [projected(jina, listwise_prompt("fox", block), "sdpa") for block in (documents[:125], documents[125:])]
    weights = torch.stack([(1 + cosines(*part).max()) / 2 for part in parts])
    query = (torch.cat([query for _, query in parts]) * weights[:, None]).sum(0) / weights.sum()
    expected = torch.cat([cosines(rows, query) for rows, _ in parts])
    with LLM(model=str(jina)) as llm:
        outputs = llm.score("fox", documents, use_tqdm=False)
    np.testing.assert_allclose([o.outputs.score for o in outputs], expected, rtol=0, atol=1e-5)
    assert outputs[0].prompt_token_ids != outputs[-1].prompt_token_ids


def test_listwise_markers_of_the_caller_are_taken_out(jina: Path) -> None:
    with LLM(model=str(jina)) as llm:
        clean = llm.score("fox", ["the dog", "b"], use_tqdm=False)
        marked = llm.score("fo<|rerank_token|>x", ["the <|embed_token|>dog", "b"], use_tqdm=False)
    assert [o.outputs.score for o in marked] == [o.outputs.score for o in clean]


def test_a_listwise_reranker_without_its_projector_is_refused(tmp_path: Path) -> None:
    folder = add(backbone(tmp_path, "Qwen3", tokenizer=tokenizer(*MARKERS)), {}, "JinaForRanking")
    with pytest.raises(CheckpointError, match=r"JinaForRanking needs the tensors projector\.0\.weight"):
        LLM(model=str(folder))


# --- the audit -----------------------------------------------------------------------------------------------------

UNKNOWN = drawn(own_proj__weight=(4, HIDDEN), own_proj__bias=(4,))


def test_unknown_heads_are_refused_by_name(tmp_path: Path) -> None:
    folder = add(checkpoints.bert(tmp_path), UNKNOWN)
    sentence = r"has the tensors own_proj\.bias, own_proj\.weight.*--convert embed.*--allow-unread own_proj\.bias"
    with pytest.raises(CheckpointError, match=sentence):
        LLM(model=str(folder))
    with LLM(model=str(folder), convert="embed") as llm:
        assert left(llm)["own_proj"] == "left out by --convert embed"
        assert {"embeddings", "encoder"} <= used(llm)
    with LLM(model=str(folder), allow_unread=["own_proj.*"]) as llm:
        assert left(llm)["own_proj.bias"] == "allowed to go unread"


PRETRAINED = [
    ("Bert", "ForPreTraining", {"cls"}),
    ("Bert", "ForMaskedLM", set()),
    ("Roberta", "ForMaskedLM", {"lm_head"}),
    ("XLMRoberta", "ForMaskedLM", {"lm_head"}),
    ("Camembert", "ForMaskedLM", {"lm_head"}),
    ("DistilBert", "ForMaskedLM", {"vocab_transform", "vocab_layer_norm", "vocab_projector"}),
    ("Albert", "ForPreTraining", {"predictions", "sop_classifier"}),
    ("Electra", "ForPreTraining", {"discriminator_predictions"}),
    ("Electra", "ForMaskedLM", {"generator_predictions", "generator_lm_head"}),
    ("MPNet", "ForMaskedLM", {"lm_head"}),
    ("ModernBert", "ForMaskedLM", {"head", "decoder"}),
    ("DebertaV2", "ForMaskedLM", {"cls"}),
    ("Esm", "ForMaskedLM", {"lm_head"}),
    ("RoFormer", "ForMaskedLM", {"cls"}),
    ("ConvBert", "ForMaskedLM", {"generator_predictions", "generator_lm_head"}),
    ("NomicBert", "ForMaskedLM", {"cls"}),
    ("GPT2", "LMHeadModel", set()),
    ("GPTNeoX", "ForCausalLM", {"embed_out"}),
    ("OPT", "ForCausalLM", set()),
    ("Qwen3", "ForCausalLM", {"lm_head"}),
    ("T5", "ForConditionalGeneration", {"decoder"}),
]


@pytest.mark.parametrize(("family", "kind", "modules"), PRETRAINED)
def test_heads_of_the_training_are_left_with_a_reason(
    tmp_path: Path, family: str, kind: str, modules: set[str]
) -> None:
    """As the base models are published: with the heads that they were trained by."""
    if not hasattr(transformers, f"{family}{kind}"):
        pytest.skip(f"this release of Transformers has no {family}{kind}")
    options: dict[str, Any] = {"tie_word_embeddings": False} if family in ("Qwen3", "GPTNeoX") else {}
    if family == "T5":
        options |= {"d_ff": 64, "d_kv": 8, "num_layers": 2, "d_model": 32, "decoder_start_token_id": 0}
    folder = checkpoints.classifier(tmp_path, family, kind, **options)
    with LLM(model=str(folder), convert="auto" if (family, kind) != ("Bert", "ForMaskedLM") else "embed") as llm:
        assert modules <= set(left(llm))
        assert all("allowed" not in reason for reason in left(llm).values())
        assert llm.info.tasks == ("embed", "token_embed")
        assert used(llm) - modules


GLM = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
PASSED_OVER = [
    ("Esm", {"position_embedding_type": "rotary"}, "esm.embeddings.position_embeddings.weight"),
    ("Glm4Moe", GLM, "model.layers.46.eh_proj.weight"),
]
"""Classes of Transformers that say nothing of a tensor that they lack."""


@pytest.mark.parametrize(("family", "options", "name"), PASSED_OVER, ids=["Esm", "Glm4Moe"])
def test_tensors_that_transformers_passes_over_are_left_with_a_reason(
    tmp_path: Path, family: str, options: dict[str, Any], name: str
) -> None:
    """Rotary ESM-2 has a table of positions, and GLM-4.5 a layer that predicts several tokens at a time."""
    kind = {"Esm": "ForMaskedLM", "Glm4Moe": "ForCausalLM"}[family]
    folder = checkpoints.classifier(tmp_path, family, kind, **options)
    with LLM(model=str(folder)) as llm:
        plain, before = llm.embed(TEXTS, use_tqdm=False), left(llm)
    with LLM(model=str(add(folder, {name: torch.ones(HIDDEN, HIDDEN)}))) as llm:
        after = left(llm)
        modules = used(llm)
        outputs = llm.embed(TEXTS, use_tqdm=False)
    entry = {"Esm": "embeddings.position_embeddings.weight", "Glm4Moe": "layers.46"}[family]
    assert after == {**before, entry: "Transformers' class has no place for it, and passes over it"}
    assert {"Esm": {"embeddings", "encoder"}, "Glm4Moe": {"embed_tokens", "layers", "norm"}}[family] <= modules
    for output, expected in zip(outputs, plain, strict=True):
        checkpoints.assert_same(np.array(output.outputs.embedding), np.array(expected.outputs.embedding))


@pytest.mark.parametrize("count", [46, 47])
def test_a_layer_that_a_larger_model_has_is_not_passed_over(count: int) -> None:
    """GLM-4.5-Air ends before layer 46, and GLM-4.5 goes on; its experts are stored one by one."""
    with torch.device("meta"):
        config = transformers.Glm4MoeConfig(**GLM, hidden_size=32, num_hidden_layers=count, vocab_size=16, head_dim=8)
        names = Names(transformers.Glm4MoeModel(config), needs_pooler=False)
    name = "model.layers.46.mlp.experts.0.up_proj.weight"
    assert names.is_passed_over(name) == (count == 46)
    assert names.listed(name) == {46: "layers.46", 47: "layers"}[count]


@pytest.mark.parametrize(("prefix", "cause"), [("_orig_mod.", "torch.compile"), ("module.", "DataParallel")])
def test_wrapped_models_are_refused_with_the_cause(tmp_path: Path, prefix: str, cause: str) -> None:
    folder = checkpoints.bert(tmp_path)
    file = folder / "model.safetensors"
    save_file({prefix + k: v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"names of all weights begin with '{prefix}'.*{cause}"):
        LLM(model=str(folder))


@pytest.mark.parametrize("architectures", [True, False])
def test_a_padding_token_beyond_the_vocabulary_is_refused(tmp_path: Path, architectures: bool) -> None:
    folder = checkpoints.classifier(tmp_path, "Llama", tokenizer=tokenizer(), num_labels=1)
    content = {**json.loads((folder / "config.json").read_text()), "pad_token_id": 100000}
    if not architectures:
        del content["architectures"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"pad_token_id in config\.json is 100000, expected an id of"):
        LLM(model=str(folder))
    with LLM(model=str(folder), hf_overrides={"pad_token_id": 0}) as llm:
        assert "classify" in llm.info.tasks


def test_a_colberts_projection_is_used(tmp_path: Path) -> None:
    folder = add(checkpoints.bert(tmp_path), drawn(linear__weight=(12, HIDDEN)), "HF_ColBERT")
    with LLM(model=str(folder)) as llm:
        assert "linear" in used(llm)
        assert "linear" not in left(llm)
        assert (llm.info.dimension, llm.info.report.token_dimension) == (HIDDEN, 12)
        (output,) = llm.encode(TEXTS[:1], pooling_task="token_embed", use_tqdm=False)
        assert output.outputs.data.shape[-1] == 12


# --- tasks ---------------------------------------------------------------------------------------------------------


def test_masked_language_models_rate_tokens_by_the_vocabulary(tmp_path: Path) -> None:
    """As vLLM's `BertForMaskedLM`; vectors stay the default."""
    folder = checkpoints.classifier(tmp_path, "Bert", "ForMaskedLM", tokenizer=wordpiece())
    model = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([ids])).logits[0].softmax(-1) for ids in ids_of(folder)]
    with LLM(model=str(folder)) as llm:
        assert llm.info.tasks == ("embed", "token_embed", "token_classify")
        assert (llm.info.default_task, llm.info.score_types[0]) == ("embed", "bi-encoder")
        outputs = llm.encode(TEXTS, pooling_task="token_classify", use_tqdm=False)
        close([output.outputs.data.numpy() for output in outputs], expected)


@pytest.mark.parametrize("family", ["Bert", "Qwen2"])
def test_rewards_of_models_that_rate_tokens(tmp_path: Path, family: str) -> None:
    """`LLM.reward` gives the rows of `token_classify` where a model is no reward model."""
    kind, made = ("ForTokenClassification", wordpiece()) if family == "Bert" else ("ForSequenceClassification", None)
    folder = checkpoints.classifier(tmp_path, family, kind, tokenizer=made or tokenizer(), num_labels=2)
    with LLM(model=str(folder)) as llm:
        rows = llm.encode(TEXTS, pooling_task="token_classify", use_tqdm=False)
        found = rewards(llm)
        assert all(np.array_equal(a, b.outputs.data.numpy()) for a, b in zip(found, rows, strict=True))
        raw = llm.encode(TEXTS, RAW, pooling_task="token_classify", use_tqdm=False)
        assert all(np.array_equal(a, b.outputs.data) for a, b in zip(rewards(llm, params=RAW), raw, strict=True))
    plain = checkpoints.bert(tmp_path / "plain")
    with LLM(model=str(plain)) as llm, pytest.raises(TaskNotOffered, match="is not a reward model"):
        llm.reward("a")


@pytest.mark.parametrize(("labels", "problem"), [(3, "multi_label_classification"), (3, "regression"), (1, None)])
def test_entities_take_the_softmax_whatever_the_problem_is_called(
    tmp_path: Path, labels: int, problem: str | None
) -> None:
    names = ["O", "B-PER", "I-PER"][:labels] if labels > 1 else ["B-PER"]
    folder = checkpoints.classifier(
        tmp_path,
        "Bert",
        "ForTokenClassification",
        tokenizer=wordpiece(),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type=problem,
    )
    pipeline = transformers.pipeline("token-classification", model=str(folder), device=-1)
    with LLM(model=str(folder)) as llm:
        for strategy in ("none", "simple", "first"):
            expected = pipeline(TEXTS[0], aggregation_strategy=strategy, ignore_labels=[])
            (output,) = llm.token_classify(TEXTS[0], aggregation_strategy=strategy, ignore_labels=(), use_tqdm=False)
            assert [entity.word for entity in output.outputs] == [entity["word"] for entity in expected]
            np.testing.assert_allclose(
                [entity.score for entity in output.outputs], [float(e["score"]) for e in expected], rtol=0, atol=1e-5
            )
