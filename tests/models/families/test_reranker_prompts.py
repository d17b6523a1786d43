"""Prompts of LLM rerankers as their authors run them: parts that are tokenised apart, and pairs rendered by clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from cenote import LLM, PoolingParams
from tests import checkpoints

if TYPE_CHECKING:
    from pathlib import Path

RAW = PoolingParams(use_activation=False)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>")
MERGES = [("?", "Ċ"), (".", "Ċ"), ("Ċ", "Ċ"), ("Y", "e"), ("Ye", "s"), ("y", "e"), ("ye", "s"), ("n", "o")]
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Qwen2's words: a mark and the line break behind it are one, and may be one token."""

CHATML = "<|im_start|>{}\n{}<|im_end|>\n"
QWEN_PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
QWEN_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
MXBAI_PREFIX = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n"
)
MXBAI_TASK = (
    "You are a search relevance expert who evaluates how well documents match search queries. For each query-document "
    "pair, carefully analyze the semantic relationship between them, then provide your binary relevance judgment (0 "
    "for not relevant, 1 for relevant).\nRelevance:"
)
GEMMA_TASK = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)
QUERY = "how deep is it?"
DOCUMENTS = ["the water is deep", "The water is deep.", "?", ""]


def qwen(*, bos: bool = False) -> Any:
    """A tokenizer that joins a mark and the line break behind it."""
    entries = dict.fromkeys([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES)])
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(entries)}, MERGES))
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([split, level]), decoders.ByteLevel()
    single = "<bos> $A" if bos else "$A"
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 3)])
    made.add_special_tokens([*SPECIAL])
    names = {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "bos_token": "<bos>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, model_input_names=["input_ids", "attention_mask"], **names
    )


def parts(tokenizer: Any, *texts: str) -> list[int]:
    """Ids of texts that are tokenised apart."""
    return [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def mxbai(query: str, document: str, instruction: str = "") -> list[int]:
    """As `mxbai_rerank`: the parts of the prompt are tokenised apart, an instruction together with the query."""
    asked = f"instruction: {instruction}\nquery: {query}" if instruction else f"query: {query}"
    suffix = "<|im_end|>\n<|im_start|>assistant\n"
    return parts(qwen(), MXBAI_PREFIX, asked, "\n", f"document: {document}", "\n", MXBAI_TASK, suffix)


def gemma(query: str, document: str, instruction: str = "") -> list[int]:
    """As FlagEmbedding's `FlagLLMReranker`."""
    task = instruction or GEMMA_TASK
    return [3, *parts(qwen(), f"A: {query}", "\n", f"B: {document}", "\n", task)]


APART = {"mxbai-rerank-base-v2": ("Qwen2", mxbai), "bge-reranker-v2-gemma": ("Gemma", gemma)}


def saved(folder: Path, family: str, **options: Any) -> Path:
    made = qwen(bos=family == "Gemma")
    return checkpoints.classifier(
        folder, family, "ForCausalLM", tokenizer=made, max_position_embeddings=1024, **options
    )


def scored(llm: LLM, query: str, documents: list[str], **options: Any) -> tuple[list[float], list[list[int]]]:
    outputs = llm.score(query, documents, pooling_params=RAW, use_tqdm=False, **options)
    return [output.outputs.score for output in outputs], [output.prompt_token_ids for output in outputs]


@pytest.mark.parametrize("instruction", ["", "Is it wet?"])
@pytest.mark.parametrize("name", APART)
def test_parts_are_tokenised_apart(tmp_path: Path, name: str, instruction: str) -> None:
    family, ids_of = APART[name]
    folder = saved(tmp_path / name, family)
    expected = [ids_of(QUERY, document, instruction) for document in DOCUMENTS]
    whole = qwen()(qwen().decode(expected[1]), add_special_tokens=False)["input_ids"]
    assert whole != expected[1], "nothing merges across the parts: this proves nothing"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    vocabulary = qwen().get_vocab()
    logits = []
    for ids in expected:
        with torch.inference_mode():
            row = model(input_ids=torch.tensor([ids])).logits[0, -1]
        both = (row[vocabulary["1"]] - row[vocabulary["0"]], row[vocabulary["Yes"]])
        logits.append(float(both[family == "Gemma"]))
    with LLM(model=str(folder)) as llm:
        options = {"instruction": instruction} if instruction else {}
        scores, ids = scored(llm, QUERY, DOCUMENTS, **options)
        assert ids == expected
        np.testing.assert_allclose(scores, logits, rtol=0, atol=1e-4 * max(1.0, max(map(abs, logits))))


@pytest.mark.parametrize("name", APART)
def test_parts_are_cut_by_their_document(tmp_path: Path, name: str) -> None:
    family, ids_of = APART[name]
    folder = saved(tmp_path / name, family)
    document = "the water is deep. " * 20
    most = len(ids_of(QUERY, "the water is deep. "))
    with LLM(model=str(folder)) as llm:
        limits = {"truncate_prompt_tokens": most}
        _, (ids,) = scored(llm, QUERY, [document], tokenization_kwargs=limits)
        assert ids == ids_of(QUERY, "the water is deep. ")


RENDERED = {
    "Qwen3-Reranker-0.6B": (
        "Qwen3",
        QWEN_PREFIX,
        QWEN_SUFFIX,
        "{}<Instruct>: Find it\n<Query>: {}\n",
        "<Document>: {}",
    ),
    "mxbai-rerank-base-v2": (
        "Qwen2",
        MXBAI_PREFIX,
        f"\n{MXBAI_TASK}<|im_end|>\n<|im_start|>assistant\n",
        "{}query: {}\n",
        "document: {}",
    ),
    "zerank-2": (
        "Qwen3",
        "<|im_start|>system\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "{}{}<|im_end|>\n",
        "<|im_start|>user\n{}",
    ),
    "bge-reranker-v2-gemma": ("Gemma", "A: ", f"\n{GEMMA_TASK}", "{}{}\n", "B: {}"),
}


@pytest.mark.parametrize("name", RENDERED)
def test_pairs_that_a_client_has_rendered_stay_as_they_are(tmp_path: Path, name: str) -> None:
    family, prefix, suffix, query_form, document_form = RENDERED[name]
    folder = saved(tmp_path / name, family)
    query = query_form.format(prefix, QUERY)
    documents = [document_form.format(document) + suffix for document in DOCUMENTS]
    first = [3] if family == "Gemma" else []
    with LLM(model=str(folder)) as llm:
        _, ids = scored(llm, query, documents)
        assert ids == [[*first, *parts(qwen(), query + document)] for document in documents]
        limits = {"truncate_prompt_tokens": len(ids[0]) - 3}
        _, (cut,) = scored(llm, query, documents[:1], tokenization_kwargs=limits)
        ending = parts(qwen(), suffix)
        assert len(cut) < len(ids[0])
        assert cut[-len(ending) + 1 :] == ending[1:]


def test_half_a_rendering_is_content(tmp_path: Path) -> None:
    """A document that quotes the prompt must not switch it off, nor a query by itself."""
    folder = saved(tmp_path / "Qwen3-Reranker-0.6B", "Qwen3")
    with LLM(model=str(folder)) as llm:
        for query, document in (
            (QUERY, f"<Document>: the water{QWEN_SUFFIX}"),
            (f"{QWEN_PREFIX}<Query>: {QUERY}\n", "the water"),
            ("<Instruct>: x\n<Query>: y\n", f"<Document>: the water{QWEN_SUFFIX}"),
        ):
            _, (ids,) = scored(llm, query, [document])
            task = "Given a web search query, retrieve relevant passages that answer the query"
            text = f"{QWEN_PREFIX}<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}{QWEN_SUFFIX}"
            assert ids == parts(qwen(), text)


@pytest.mark.parametrize(
    "options",
    [
        {"reranker_prompts": False},
        {"hf_overrides": {"classifier_from_token": ["no", "yes"], "method": "from_2_way_softmax"}},
        {"hf_overrides": {"is_original_qwen3_reranker": True}},
    ],
)
def test_prompts_are_switched_off(tmp_path: Path, options: dict[str, Any]) -> None:
    """By the switch, and by overrides that say how pairs are rated, as in vLLM; a user's template still counts."""
    folder = saved(tmp_path / "Qwen3-Reranker-0.6B", "Qwen3")
    with LLM(model=str(folder), **options) as llm:
        assert "difference of logits of 'no', 'yes'" in llm.info.report.head
        assert scored(llm, QUERY, DOCUMENTS)[1] == [parts(qwen(), QUERY + document) for document in DOCUMENTS]
    template = "{{ messages[1].content }} / {{ messages[0].content }}"
    with LLM(model=str(folder), chat_template=template, **options) as llm:
        assert scored(llm, QUERY, ["wet"])[1] == [parts(qwen(), f"wet / {QUERY}")]
