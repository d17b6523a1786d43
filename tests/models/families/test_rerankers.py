"""Language models that rerank: scores equal the whole model's last logits over the exact prompt, and CrossEncoder's."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules.logit_score import LogitScore
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from cenote import LLM, PoolingParams
from cenote.errors import BadRequest, CheckpointError, NotScored, TaskNotOffered, TooLong
from tests import checkpoints
from tests.checkpoints import byte_level, wordpiece

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

LIMIT = 640
LOGITS = PoolingParams(use_activation=False)
PAIRS = [
    ("What is a cenote?", "A natural pit."),
    ("What is a cenote?", "Bread, & <b>butter</b> {{ x }}\n\n  "),
    (" the  fox\n", "naïve café — 水 and 🐟"),
    ("What is a cenote?", ""),
    ("What is a cenote?", "A natural pit, or sinkhole, that exposes groundwater. " * 3),
]


def chatml(**options: Any) -> PreTrainedTokenizerBase:
    """As Qwen's: special tokens around turns, and none around a text."""
    return byte_level("$A", special=("<|im_start|>", "<|im_end|>"), **options)


def gemma() -> PreTrainedTokenizerBase:
    """As Gemma's: every text opens with `<bos>`."""
    return byte_level("<bos> $A", special=("<bos>",), bos_token="<bos>")


def language_model(folder: Path, family: str = "Qwen3", tokenizer: Any = None, **options: Any) -> Path:
    """A tiny causal language model in `folder`."""
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    options = {"tokenizer": tokenizer or chatml(), "max_position_embeddings": LIMIT, **options}
    return checkpoints.classifier(folder, family, head, **options)


def sigmoid(logit: Tensor) -> float:
    return float(logit.sigmoid())


def of_two(no: str, yes: str) -> Callable[[Tensor, dict[str, int]], float]:
    """Softmax over two logits."""
    return lambda logits, ids: float(logits[[ids[no], ids[yes]]].softmax(0)[1])


@dataclass(frozen=True)
class Layout:
    """A published reranker: its prompt, `{q}` and `{d}` to be filled in, and its rule from last logits to score."""

    family: str
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    prompt: str
    rule: Callable[[Tensor, dict[str, int]], float]
    title: str
    options: dict[str, Any] = field(default_factory=dict)

    def fill(self, query: str, document: str) -> str:
        return self.prompt.replace("{q}", query, 1).replace("{d}", document, 1)


QWEN3_PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
    "<Query>: {q}\n<Document>: {d}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
GEMMA_PROMPT = (
    "A: {q}\nB: {d}\nGiven a query A and a passage B, determine whether the passage contains an answer to the query by "
    "providing a prediction of either 'Yes' or 'No'."
)
MXBAI_PROMPT = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nquery: {q}\ndocument: {d}\n"
    "You are a search relevance expert who evaluates how well documents match search queries. For each query-document "
    "pair, carefully analyze the semantic relationship between them, then provide your binary relevance judgment (0 "
    "for not relevant, 1 for relevant).\nRelevance:<|im_end|>\n<|im_start|>assistant\n"
)
ZERANK_PROMPT = "<|im_start|>system\n{q}<|im_end|>\n<|im_start|>user\n{d}<|im_end|>\n<|im_start|>assistant\n"
LAYOUTS = {
    "Qwen3-Reranker-0.6B": Layout("Qwen3", chatml, QWEN3_PROMPT, of_two("no", "yes"), "# Qwen3-Reranker-0.6B"),
    "bge-reranker-v2-gemma": Layout(
        "Gemma", gemma, GEMMA_PROMPT, lambda logits, ids: sigmoid(logits[ids["Yes"]]), "# BGE reranker v2 Gemma"
    ),
    "mxbai-rerank-base-v2": Layout("Qwen2", chatml, MXBAI_PROMPT, of_two("0", "1"), "# 🍞 mxbai-rerank-large-v2"),
    "zerank-2": Layout(
        "Qwen3", chatml, ZERANK_PROMPT, lambda logits, ids: sigmoid(logits[ids["Yes"]] / 5), "# Releasing zerank-2"
    ),
}


def last_logits(folder: Path, prompts: Sequence[list[int]]) -> list[Tensor]:
    """The reference: logits of the last token of each prompt, over the whole vocabulary."""
    model = checkpoints.pretrained(AutoModelForCausalLM, folder, attn_implementation="eager")
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in prompts]


def scored(llm: LLM, pairs: Sequence[tuple[str, str]] = PAIRS, **options: Any) -> tuple[list[float], list[list[int]]]:
    """Scores of pairs, and the ids that they were rated by."""
    queries, documents = ([*side] for side in zip(*pairs, strict=True))
    outputs = llm.score(queries, documents, use_tqdm=False, **options)
    return [output.outputs.score for output in outputs], [output.prompt_token_ids for output in outputs]


def close(found: Any, expected: Any, *, scale: float = 1.0) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, scale))


def agree(folder: Path, layout: Layout, **options: Any) -> LLM:
    """Assert that `folder`, loaded without a flag, scores by the layout's prompt and rule."""
    tokenizer = layout.tokenizer()
    prompts = [tokenizer(layout.fill(*pair))["input_ids"] for pair in PAIRS]
    expected = [layout.rule(logits, tokenizer.get_vocab()) for logits in last_logits(folder, prompts)]
    with LLM(model=str(folder), **options) as llm:
        found, ids = scored(llm)
        assert ids == prompts
        close(found, expected)
        assert np.std(expected) > 3e-3, "all pairs have nearly the same score: this proves nothing"
        return llm


# --- recognised ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_recognised_by_the_folders_name(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    info = agree(language_model(tmp_path / name, layout.family, layout.tokenizer()), layout).info
    assert (info.default_task, info.num_labels) == ("classify", 1)
    assert info.score_types[0] == "cross-encoder"
    assert "recognised as " in info.report.head


@pytest.mark.parametrize("name", LAYOUTS)
def test_recognised_by_the_title_of_its_card(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    folder = language_model(tmp_path / "model", layout.family, layout.tokenizer())
    (folder / "README.md").write_text(
        f"---\nlicense: other\n---\n\nIntroduction\n\n{layout.title}\n\n# Another model\n"
    )
    agree(folder, layout)


def test_recognised_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    commit = tmp_path / "models--Qwen--Qwen3-Reranker-0.6B" / "snapshots" / "0a1b2c"
    agree(language_model(commit), LAYOUTS["Qwen3-Reranker-0.6B"])


def test_recognised_behind_a_link(tmp_path: Path) -> None:
    folder = language_model(tmp_path / "zerank-1-small")
    (tmp_path / "link").symlink_to(folder)
    agree(tmp_path / "link", LAYOUTS["zerank-2"])


def plain(folder: Path, **options: Any) -> None:
    """Assert that `folder` is no reranker: it embeds, and scores by its embeddings."""
    with LLM(model=str(folder), **options) as llm:
        assert (llm.info.tasks, llm.info.score_types[0]) == (("embed", "token_embed"), "bi-encoder")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Qwen3-Embedding-0.6B", "Qwen3"),
        ("Qwen3-Reranker-0.6B", "Qwen2"),
        ("bge-reranker-v2-gemma", "Gemma2"),
        ("mxbai-rerank-base-v2", "Qwen3"),
        ("mxbai-rerank-base-v1", "Qwen2"),
        ("zerank-2", "Llama"),
    ],
)
def test_language_models_of_another_name_or_type_are_not_recognised(tmp_path: Path, name: str, family: str) -> None:
    plain(language_model(tmp_path / name, family))


def test_folders_above_and_later_headings_do_not_count(tmp_path: Path) -> None:
    folder = language_model(tmp_path / "Qwen3-Reranker-0.6B" / "chat")
    (folder / "README.md").write_text("# A chat model\n\n# Compared with Qwen3-Reranker\n\n## zerank-2\n")
    plain(folder)


@pytest.mark.parametrize("name", LAYOUTS)
def test_encoders_of_such_a_name_are_not_recognised(tmp_path: Path, name: str) -> None:
    plain(checkpoints.bert(tmp_path / name))
    folder = checkpoints.classifier(tmp_path / "other" / name, num_labels=1)
    with LLM(model=str(folder)) as llm:
        _, (ids,) = scored(llm, [("one", "two")])
        assert ids == wordpiece()("one", "two")["input_ids"]
        assert llm.info.report.head == "BertForSequenceClassification"


def test_converted_to_embed(tmp_path: Path) -> None:
    folder = language_model(tmp_path / "Qwen3-Reranker-0.6B")
    plain(folder, convert="embed")
    with LLM(model=str(folder), convert="embed") as llm:
        with pytest.raises(TaskNotOffered, match="Classification API is not supported by this model"):
            llm.classify("a")
        with pytest.raises(
            BadRequest, match="scores as a bi-encoder, which renders no pairs: instruction would have no"
        ):
            llm.score("a", "b", instruction="x")
        with pytest.raises(BadRequest, match="renders no pairs: a template would have no effect"):
            llm.score("a", "b", chat_template="{{ messages[0].content }}")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["Qwen3", "Gemma"])
def test_tied_and_own_output_embeddings(tmp_path: Path, family: str, tied: bool) -> None:
    name = "Qwen3-Reranker-4B" if family == "Qwen3" else "bge-reranker-v2-gemma"
    layout = LAYOUTS["Qwen3-Reranker-0.6B" if family == "Qwen3" else name]
    folder = language_model(tmp_path / name, family, layout.tokenizer(), seed=13, tie_word_embeddings=tied)
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != tied
    info = agree(folder, layout).info
    assert info.vocab_size == len(layout.tokenizer())


def test_a_classifier_of_such_a_name_keeps_its_head_and_gets_the_prompt(tmp_path: Path) -> None:
    """As tomaarsen/Qwen3-Reranker-0.6B-seq-cls."""
    tokenizer = chatml()
    folder = checkpoints.classifier(
        tmp_path / "Qwen3-Reranker-0.6B-seq-cls",
        "Qwen3",
        tokenizer=tokenizer,
        num_labels=1,
        max_position_embeddings=LIMIT,
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    prompts = [tokenizer(LAYOUTS["Qwen3-Reranker-0.6B"].fill(*pair))["input_ids"] for pair in PAIRS]
    with torch.inference_mode():
        expected = [sigmoid(model(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in prompts]
    with LLM(model=str(folder)) as llm:
        found, ids = scored(llm)
    assert ids == prompts
    close(found, expected)


def test_a_vocabulary_without_the_tokens_is_refused(tmp_path: Path) -> None:
    folder = language_model(tmp_path / "Qwen3-Reranker-0.6B", tokenizer=wordpiece())
    with pytest.raises(CheckpointError, match="Qwen3-Reranker-0.6B: the vocabulary has no entry 'no' to classify by"):
        LLM(model=str(folder))


# --- requests ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(tmp_path_factory.mktemp("m") / "Qwen3-Reranker-0.6B")


@pytest.fixture(scope="module")
def zerank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(tmp_path_factory.mktemp("m") / "zerank-2")


@pytest.fixture(scope="module")
def llm(qwen: Path) -> Iterator[LLM]:
    with LLM(model=str(qwen)) as made:
        yield made


def test_scores_classes_and_ranks_are_one_number(llm: LLM, qwen: Path) -> None:
    query, documents = PAIRS[0][0], [document for _, document in PAIRS]
    found, ids = scored(llm, [(query, document) for document in documents])
    many = llm.score(query, documents, use_tqdm=False)
    close([output.outputs.score for output in many], found)
    classes = llm.classify([(query, document) for document in documents], use_tqdm=False)
    close([output.outputs.probs[0] for output in classes], found)
    ranked = llm.rerank(query, documents, use_tqdm=False)
    assert [entry.index for entry in ranked] == np.argsort(-np.array(found)).tolist()
    logits = scored(llm, [(query, document) for document in documents], pooling_params=LOGITS)[0]
    tokens = chatml().get_vocab()
    expected = [float(row[tokens["yes"]] - row[tokens["no"]]) for row in last_logits(qwen, ids)]
    close(logits, expected, scale=max(map(abs, expected)))


def test_instructions(llm: LLM) -> None:
    default = "Given a web search query, retrieve relevant passages that answer the query"
    expected = chatml()(QWEN3_PROMPT.replace(default, "Find <it> & rate it").replace("{q}", "a").replace("{d}", "b"))
    for options in (
        {"instruction": "Find <it> & rate it"},
        {"chat_template_kwargs": {"instruction": "Find <it> & rate it"}},
        {"chat_template_kwargs": {"instruct": "Find <it> & rate it"}},
        {"instruction": "not this", "chat_template_kwargs": {"instruction": "Find <it> & rate it"}},
        {"pooling_params": PoolingParams(extra_kwargs={"instruction": "Find <it> & rate it"})},
    ):
        assert scored(llm, [("a", "b")], **options)[1] == [expected["input_ids"]]
        (found,) = llm.rerank("a", ["b"], use_tqdm=False, **options)
        close(found.relevance_score, scored(llm, [("a", "b")], **options)[0][0])
    assert scored(llm, [("a", "b")])[0] != scored(llm, [("a", "b")], instruction="Find <it> & rate it")[0]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        (
            "zerank-2",
            "<|im_start|>system\n{q}<|im_end|>",
            "<|im_start|>system\n<query>{q}</query>\n<instruction>be strict</instruction><|im_end|>",
        ),
        ("mxbai-rerank-base-v2", "user\nquery: {q}", "user\ninstruction: be strict\nquery: {q}"),
        ("bge-reranker-v2-gemma", GEMMA_PROMPT[14:], "be strict"),
    ],
)
def test_instructions_of_the_other_layouts(tmp_path: Path, name: str, before: str, after: str) -> None:
    layout = LAYOUTS[name]
    folder = language_model(tmp_path / name, layout.family, layout.tokenizer())
    assert before in layout.prompt
    prompt = layout.prompt.replace(before, after).replace("{q}", "a").replace("{d}", "b")
    ids = layout.tokenizer()(prompt)["input_ids"]
    with LLM(model=str(folder)) as llm:
        (found,), (rendered,) = scored(llm, [("a", "b")], instruction="be strict")
    assert rendered == ids
    close(found, layout.rule(last_logits(folder, [ids])[0], layout.tokenizer().get_vocab()))


def test_unknown_options_are_refused(llm: LLM) -> None:
    with pytest.raises(BadRequest, match="unknown scoring option 'instructions'; did you mean 'instruction'"):
        llm.score("a", "b", instructions="x")
    with pytest.raises(BadRequest, match="chat_template_kwargs may not set 'tokenize'"):
        llm.score("a", "b", chat_template_kwargs={"tokenize": True})


def test_long_documents_are_cut_and_prompts_stay(llm: LLM) -> None:
    document = "water and stone " * 300
    with pytest.raises(TooLong, match=f"maximum context length is {LIMIT} tokens"):
        llm.score("a", document)
    _, (ids,) = scored(llm, [("a", document)], tokenization_kwargs={"truncate_prompt_tokens": -1})
    assert LIMIT - 6 <= len(ids) <= LIMIT
    text = chatml().decode(ids)
    start, end = QWEN3_PROMPT.replace("{q}", "a").split("{d}")
    assert text.startswith(start + "water and stone")
    assert text.endswith(end)
    assert text[len(start) : -len(end)] in document
    _, (ids,) = scored(llm, [("a", document)], max_tokens_per_doc=5)
    cut = chatml().decode(chatml()(document)["input_ids"][:5])
    assert ids == chatml()(start + cut + end)["input_ids"]
    with pytest.raises(TooLong, match="only documents are cut; max_tokens_per_query cuts the query"):
        llm.score("a " * LIMIT, "b", tokenization_kwargs={"truncate_prompt_tokens": -1})


# --- templates -----------------------------------------------------------------------------------------------------

OTHER = "{{ messages[1].content }} or {{ messages[0].content }}{{ ending }}"


def test_templates_given_by_the_user(qwen: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(OTHER)
    expected = chatml()("b or a")["input_ids"]
    for template in (OTHER, str(file)):
        with LLM(model=str(qwen), chat_template=template) as llm:
            assert scored(llm, [("a", "b")])[1] == [expected]
            assert scored(llm, [("a", "b")], chat_template="{{ messages[0].role }}?")[1] == [
                chatml()("query?")["input_ids"]
            ]
    with LLM(model=str(qwen)) as llm:
        (found,), (ids,) = scored(llm, [("a", "b")], chat_template=str(file))
        assert ids == expected
        close(found, of_two("no", "yes")(last_logits(qwen, [ids])[0], chatml().get_vocab()))
        assert scored(llm, [("a", "b")], chat_template=OTHER, chat_template_kwargs={"ending": "!"})[1] == [
            chatml()("b or a!")["input_ids"]
        ]


def test_the_tokenizers_chat_template_is_for_conversations(tmp_path: Path) -> None:
    tokenizer = chatml()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} says {{ m.content }}{% endfor %}"
    agree(language_model(tmp_path / "zerank-2", tokenizer=tokenizer), LAYOUTS["zerank-2"])
    chatty = wordpiece()
    chatty.chat_template = tokenizer.chat_template
    folder = checkpoints.classifier(tmp_path / "bert", tokenizer=chatty, num_labels=1)
    with LLM(model=str(folder)) as llm:
        assert scored(llm, [("one", "two")])[1] == [wordpiece()("one", "two")["input_ids"]]


# --- named by options ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unnamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose name says nothing."""
    return language_model(tmp_path_factory.mktemp("m") / "model")


def overrides(*tokens: str, method: str | None = None, **more: Any) -> dict[str, Any]:
    """As vLLM's documentation writes them."""
    found: dict[str, Any] = {"architectures": ["Qwen3ForSequenceClassification"], "classifier_from_token": list(tokens)}
    return {**found, **({"method": method} if method else {}), **more}


def joined(*pairs: tuple[str, str]) -> list[list[int]]:
    return [chatml()(query + document)["input_ids"] for query, document in pairs]


def test_the_original_qwen3_reranker_as_vllm_documents_it(unnamed: Path, qwen: Path) -> None:
    """Overrides say how pairs are rated; the client renders them, or `--chat-template` does."""
    options = overrides("no", "yes", is_original_qwen3_reranker=True)
    rule = of_two("no", "yes")
    for folder, config in ((unnamed, options), (unnamed, {"is_original_qwen3_reranker": True}), (qwen, options)):
        with LLM(model=str(folder), hf_overrides=config) as llm:
            found, ids = scored(llm)
            assert ids == joined(*PAIRS)
            close(found, [rule(logits, chatml().get_vocab()) for logits in last_logits(folder, ids)])


def test_a_config_that_calls_itself_original_gets_the_prompt(unnamed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(unnamed, tmp_path / "model")
    checkpoints.edit_json(folder / "config.json", is_original_qwen3_reranker=True)
    agree(folder, LAYOUTS["Qwen3-Reranker-0.6B"])


def test_two_tokens(unnamed: Path) -> None:
    pairs = [("the fox", " is"), ("a", " natural pit"), ("水", "b")]
    tokens = chatml().get_vocab()
    rows = torch.stack(last_logits(unnamed, joined(*pairs)))[:, [tokens["Yes"], tokens["1"]]]
    with LLM(model=str(unnamed), hf_overrides=overrides("Yes", "1", method="from_2_way_softmax")) as llm:
        found, ids = scored(llm, pairs)
        assert ids == joined(*pairs)
        close(found, rows.softmax(-1)[:, 1])
        assert "difference of logits of 'Yes', '1'" in llm.info.report.head
    with LLM(model=str(unnamed), hf_overrides=overrides("Yes", "1", method="no_post_processing")) as llm:
        close([o.outputs.probs for o in llm.classify(pairs, use_tqdm=False)], rows.softmax(-1))
        close(
            [o.outputs.probs for o in llm.classify(joined(*pairs), use_tqdm=False, pooling_params=LOGITS)],
            rows,
            scale=float(rows.abs().max()),
        )
        assert (llm.info.num_labels, llm.info.labels) == (2, ())
        with pytest.raises(NotScored, match=r"num_labels == 1\. .* has 2 labels"):
            llm.score("a", "b")
    with LLM(model=str(unnamed), hf_overrides=overrides("1", method="no_post_processing")) as llm:
        close(scored(llm, pairs)[0], rows[:, 1].sigmoid())


@pytest.mark.parametrize("convert", ["auto", "classify"])
def test_without_another_architecture(unnamed: Path, convert: str) -> None:
    options = {"classifier_from_token": ["no", "yes"], "method": "from_2_way_softmax"}
    tokens = chatml().get_vocab()
    with LLM(model=str(unnamed), convert=convert, hf_overrides=options) as llm:
        (found,), ids = scored(llm, [("a", "b")])
        close(found, of_two("no", "yes")(last_logits(unnamed, ids)[0], tokens))


def test_calibration_of_the_user_wins(zerank: Path) -> None:
    ids = [chatml()(LAYOUTS["zerank-2"].fill("a", "b"))["input_ids"]]
    logit = last_logits(zerank, ids)[0][chatml().get_vocab()["Yes"]]
    for config, expected in (
        ({}, sigmoid(logit / 5)),
        ({"logit_sigma": 2.0}, sigmoid(logit / 2)),
        ({"logit_mean": 1.0}, sigmoid((logit - 1) / 5)),
    ):
        with LLM(model=str(zerank), pooler_config=config) as llm:
            close(scored(llm, [("a", "b")])[0], expected)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no method": (overrides("no", "yes"), "method must be one of from_2_way_softmax, no_post_processing, got None"),
    "unknown method": (overrides("no", "yes", method="mean"), "method must be one of .*, got 'mean'"),
    "unknown token": (
        overrides("no", "perhaps", method="from_2_way_softmax"),
        "the vocabulary has no entry 'perhaps' to classify by",
    ),
    "one of two": (
        overrides("yes", method="from_2_way_softmax"),
        r"from_2_way_softmax needs two tokens, the negative one first, got \['yes'\]",
    ),
    "three of two": (overrides("no", "yes", "Yes", method="from_2_way_softmax"), "needs two tokens"),
    "three for Qwen3": (overrides("no", "yes", "Yes", is_original_qwen3_reranker=True), "needs two tokens"),
    "none": (overrides(method="no_post_processing"), r"classifier_from_token must be a list .*, got \[\]"),
    "one word": (
        {"classifier_from_token": "yes", "method": "no_post_processing"},
        "classifier_from_token must be a list of vocabulary entries, got 'yes'",
    ),
    "ids": (
        {"classifier_from_token": [5, 6], "method": "no_post_processing"},
        r"classifier_from_token must be a list of vocabulary entries, got \[5, 6\]",
    ),
}


@pytest.mark.parametrize(("options", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused(unnamed: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        LLM(model=str(unnamed), hf_overrides=options)


# --- score layers --------------------------------------------------------------------------------------------------


def with_score(source: Path, folder: Path, labels: int, *, bias: bool = False, prefix: str = "") -> Path:
    """A copy of a language model that has a `score` layer besides its own head."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    weights[f"{prefix}score.weight"] = torch.randn(labels, checkpoints.HIDDEN, generator=generator)
    if bias:
        weights["score.bias"] = torch.randn(labels, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoints.edit_json(folder / "config.json", id2label={str(i): f"LABEL_{i}" for i in range(labels)})
    return folder


def by_score(folder: Path, ids: list[list[int]]) -> Tensor:
    """The reference: the score layer over last states."""
    weights = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder).eval().base_model
    with torch.inference_mode():
        rows = torch.stack([model(input_ids=torch.tensor([own])).last_hidden_state[0, -1] for own in ids])
    logits: Tensor = nn.functional.linear(rows, weights["score.weight"], weights.get("score.bias"))
    return logits


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_score_layer_beside_a_language_model(unnamed: Path, tmp_path: Path, labels: int, bias: bool) -> None:
    folder = with_score(unnamed, tmp_path / "model", labels, bias=bias)
    ids = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    expected = by_score(folder, ids)
    for convert in ("auto", "classify"):
        with LLM(model=str(folder), convert=convert) as llm:
            found = [o.outputs.probs for o in llm.classify(ids, use_tqdm=False, pooling_params=LOGITS)]
            close(found, expected, scale=float(expected.abs().max()))
            assert llm.info.report.head == "the score layer of Qwen3ForCausalLM"
    plain(folder, convert="embed")


def test_a_score_layer_wins_over_tokens(unnamed: Path, tmp_path: Path) -> None:
    """As in vLLM: a converted checkpoint may still carry the options that it was converted by."""
    folder = with_score(unnamed, tmp_path / "model", 1)
    expected = by_score(folder, joined(("a", "b")))
    options = overrides("no", "yes", method="from_2_way_softmax")
    for convert in ("auto", "classify"):
        with LLM(model=str(folder), convert=convert, hf_overrides=options) as llm:
            close(scored(llm, [("a", "b")])[0], expected[0].sigmoid())
    tokens = {"classifier_from_token": ["no", "yes"], "method": "from_2_way_softmax"}
    with LLM(model=str(folder), convert="classify", hf_overrides=tokens) as llm:
        close(scored(llm, [("a", "b")])[0], expected[0].sigmoid())


def test_convert_classify_without_a_head_is_refused(unnamed: Path, tmp_path: Path) -> None:
    sentence = r"convert 'classify' needs a head: {} has no score\.weight.*classifier_from_token.*STEP"
    with pytest.raises(CheckpointError, match=sentence.format("Qwen3ForCausalLM")):
        LLM(model=str(unnamed), convert="classify")
    with pytest.raises(CheckpointError, match=sentence.format("BertModel")):
        LLM(model=str(checkpoints.bert(tmp_path)), convert="classify")


def test_score_layer_of_another_size_is_refused(unnamed: Path, tmp_path: Path) -> None:
    folder = with_score(unnamed, tmp_path / "model", 3)
    with pytest.raises(CheckpointError, match=r"cannot load the weights|misshapen"):
        LLM(model=str(folder), convert="classify", hf_overrides={"num_labels": 4})


# --- families ------------------------------------------------------------------------------------------------------


FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma2": {"query_pre_attn_scalar": 16, "final_logit_softcapping": 0.9},
    "Cohere2": {"logit_scale": 0.3, "sliding_window": 16},
    "Granite": {"logits_scaling": 3.0},
    "Phi": {},  # its head has a bias
    "GPT2": {},
    "Llama": {},
    "Mistral": {"sliding_window": 16},
    "Mamba": {"state_size": 8},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_families_do_to_logits_is_honoured(tmp_path: Path, family: str) -> None:
    folder = language_model(tmp_path, family, **FAMILIES[family])
    texts = ["a natural pit", "water", "the fox jumps over the lazy dog"]
    tokens = chatml().get_vocab()
    ids = [chatml()(text)["input_ids"] for text in texts]
    rows = torch.stack(last_logits(folder, ids))[:, [tokens["no"], tokens["yes"]]]
    assert float(rows.std(0).min()) > 1e-2, "all texts have nearly the same logits: this proves nothing"
    for method, expected in (("from_2_way_softmax", rows[:, 1:] - rows[:, :1]), ("no_post_processing", rows)):
        override = {"classifier_from_token": ["no", "yes"], "method": method}
        with LLM(model=str(folder), hf_overrides=override) as llm:
            found = [o.outputs.probs for o in llm.classify(texts, use_tqdm=False, pooling_params=LOGITS)]
        close(found, expected, scale=float(rows.abs().max()))


# --- Sentence-Transformers' LogitScore -----------------------------------------------------------------------------

ROLES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def logit_score(
    folder: Path, *, style: str = "flat", two: bool = True, name: str = "model", add: bool = True, **options: Any
) -> Path:
    """A CrossEncoder of a language model and a LogitScore, as the installed release saves it.

    Args:
        folder: where it goes.
        style: of message contents, "flat" or "structured"; "" = there is no chat template.
        two: score by the difference of two logits.
        name: of the checkpoint.
        add: whether the template is told to add a generation prompt.
        options: of the CrossEncoder.
    """
    tokenizer = chatml(model_max_length=LIMIT)
    if style:
        tokenizer.chat_template = ROLES.replace("CONTENT", "m.content" if style == "flat" else "m.content[0].text")
    source = language_model(folder / "source", tokenizer=tokenizer)
    processing = {"chat_template": {"add_generation_prompt": True}} if add and style else None
    module = Transformer(str(source), transformer_task="text-generation", processing_kwargs=processing)
    assert module.modality_config.get("message", {}).get("format", "") == style
    tokens = tokenizer.get_vocab()
    score = LogitScore(tokens["yes"], tokens["no"] if two else None)
    CrossEncoder(modules=[module, score], device="cpu", **options).save_pretrained(str(folder / name))
    return folder / name


def predicted(folder: Path, **options: Any) -> np.ndarray:
    scores: np.ndarray = CrossEncoder(str(folder), device="cpu").predict(PAIRS, batch_size=1, **options)
    assert scores.std() > 1e-2, "all pairs have nearly the same score: this proves nothing"
    return scores


@pytest.mark.parametrize("two", [True, False])
@pytest.mark.parametrize("style", ["flat", "structured", ""])
def test_logit_score(tmp_path: Path, style: str, two: bool) -> None:
    folder = logit_score(tmp_path, style=style, two=two)
    with LLM(model=str(folder)) as llm:
        found, ids = scored(llm)
        close(found, predicted(folder))
        logits = predicted(folder, activation_fn=nn.Identity())
        close(scored(llm, pooling_params=LOGITS)[0], logits, scale=float(np.abs(logits).max()))
        turns = [
            f"<|im_start|>{role}\n{text}<|im_end|>\n"
            for role, text in zip(("query", "document"), PAIRS[2], strict=True)
        ]
        text = "".join([*turns, "<|im_start|>assistant\n"]) if style else "".join(PAIRS[2])
        assert ids[2] == chatml()(text)["input_ids"]
        assert (llm.info.num_labels, llm.info.report.head) == (1, "LogitScore of its Sentence-Transformers files")


def test_logit_score_without_generation_prompt(tmp_path: Path) -> None:
    folder = logit_score(tmp_path, add=False)
    with LLM(model=str(folder)) as llm:
        close(scored(llm)[0], predicted(folder))


def test_the_files_win_over_the_name(tmp_path: Path) -> None:
    """zeroentropy/zerank-2 carries such files: raw logits over its own template."""
    folder = logit_score(tmp_path, two=False, name="zerank-2", activation_fn=nn.Identity())
    expected = predicted(folder)
    with LLM(model=str(folder)) as llm:
        close(scored(llm)[0], expected, scale=float(np.abs(expected).max()))


def test_options_win_over_the_files(tmp_path: Path) -> None:
    folder = logit_score(tmp_path)
    tokens = chatml().get_vocab()
    override = {"classifier_from_token": ["0", "1"], "method": "from_2_way_softmax"}
    with LLM(model=str(folder), hf_overrides=override) as llm:
        (found,), ids = scored(llm, PAIRS[:1])
        close(found, of_two("0", "1")(last_logits(folder, ids)[0], tokens))
    with LLM(model=str(folder), chat_template=OTHER) as llm:
        (found,), ids = scored(llm, [("a", "b")])
        assert ids == [chatml()("b or a")["input_ids"]]
        close(found, of_two("no", "yes")(last_logits(folder, ids)[0], tokens))
    plain(folder, convert="embed")


def test_logit_score_takes_instructions_as_sentence_transformers_takes_prompts(tmp_path: Path) -> None:
    """A message of role `system`: the default prompt, or what the request says."""
    for style in ("flat", "structured"):
        folder = logit_score(tmp_path / style, style=style, prompts={"t": "be brief"}, default_prompt_name="t")
        with LLM(model=str(folder)) as llm:
            close(scored(llm)[0], predicted(folder))
            close(scored(llm, instruction="be strict")[0], predicted(folder, prompt="be strict"))
            (ids,) = scored(llm, [("a", "b")], instruction="be strict")[1]
            assert chatml().decode(ids).startswith("<|im_start|>system\nbe strict<|im_end|>\n<|im_start|>query\na")


def test_logit_score_of_no_vocabulary_entry_is_refused(tmp_path: Path) -> None:
    folder = logit_score(tmp_path)
    size = len(chatml())
    for entry in (size, -1):
        checkpoints.edit_json(folder / "1_LogitScore" / "config.json", true_token_id=entry)
        with pytest.raises(CheckpointError, match=f"classes are logits of token ids below {size}, got .*{entry}"):
            LLM(model=str(folder))


def test_truncated_documents_of_a_saved_template(tmp_path: Path) -> None:
    """Where Sentence-Transformers cuts the end of the prompt and writes its last tokens anew, the document is cut."""
    folder = logit_score(tmp_path)
    cut = {"tokenization_kwargs": {"truncate_prompt_tokens": 60}}
    with LLM(model=str(folder)) as llm:
        _, (ids,) = scored(llm, [("a", "water and stone " * 40)], **cut)
    text = chatml().decode(ids)
    assert 54 <= len(ids) <= 60
    assert text.startswith("<|im_start|>query\na<|im_end|>\n<|im_start|>document\nwater and stone")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
