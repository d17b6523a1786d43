"""Classifiers from checkpoint to value: equal to `CrossEncoder.predict` on pairs and to Transformers on texts."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from cenote import LLM, PoolingParams
from cenote.errors import BadRequest, CheckpointError, ConfigError, NotScored, TaskNotOffered
from cenote.pipeline.options import TextOptions
from tests import checkpoints
from tests.checkpoints import POSITIONS, TEXTS, byte_level, sentinels, wordpiece

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

CUT = {"truncate_prompt_tokens": -1}
LOGITS = PoolingParams(use_activation=False)
PAIRS = [
    ("hello", "a"),
    ("one two three", "The quick brown fox jumps over the lazy dog."),
    ("Cenotes are natural pits", "water " * 90),
    ("the " * 70, "stone " * 80),
    ("naïve café — 水", "🐟"),
    ("", "stone"),
]
"""Of mixed length; two are longer than the models here take."""


def with_bos() -> PreTrainedTokenizerBase:
    """As Gemma's: every text opens with `<bos>`."""
    return byte_level("<bos> $A", "<bos> $A $B", ("<bos>",), bos_token="<bos>")


RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16, "share_att_key": True}
ROBERTA = {"max_position_embeddings": POSITIONS + 3}  # positions begin behind the padding id, which is 2
FAMILIES: dict[str, tuple[str, Callable[[], PreTrainedTokenizerBase], dict[str, Any]]] = {
    "bert": ("Bert", wordpiece, {}),
    "roberta": ("Roberta", sentinels, ROBERTA),
    "xlm-roberta": ("XLMRoberta", sentinels, {**ROBERTA, "type_vocab_size": 1}),
    "distilbert": ("DistilBert", wordpiece, {"hidden_dim": 48}),
    "electra": ("Electra", wordpiece, {"embedding_size": 16}),
    "deberta-v2": ("DebertaV2", wordpiece, {**RELATIVE, "type_vocab_size": 2, "position_biased_input": False}),
    "modernbert": ("ModernBert", sentinels, {"local_attention": 16}),
    "modernbert, mean": ("ModernBert", sentinels, {"local_attention": 16, "classifier_pooling": "mean"}),
    "gte": ("Gte", wordpiece, {"type_vocab_size": 2}),
    "gte, sentinels": ("Gte", sentinels, {}),
    "gpt2": ("GPT2", byte_level, {}),
    "qwen2": ("Qwen2", byte_level, {}),
    "qwen3": ("Qwen3", byte_level, {}),
    "llama": ("Llama", byte_level, {}),
    "gemma": ("Gemma", with_bos, {}),
    "mistral": ("Mistral", byte_level, {"sliding_window": 16}),
}


def build(folder: Path, name: str, labels: int) -> Path:
    family, tokenizer, options = FAMILIES[name]
    return checkpoints.classifier(folder, family, tokenizer=tokenizer(), num_labels=labels, **options)


def theirs(
    folder: Path, activation: nn.Module | None = None, *, model: CrossEncoder | None = None, **options: Any
) -> np.ndarray:
    """What `CrossEncoder` predicts for `PAIRS`, `[N, C]`; `model`, if it is loaded."""
    model = model or CrossEncoder(str(folder), device="cpu")
    rows: np.ndarray = model.predict(PAIRS, batch_size=1, activation_fn=activation, show_progress_bar=False, **options)
    return rows.reshape(len(PAIRS), -1)


def ours(llm: LLM, params: PoolingParams | None = None, prompts: Any = PAIRS) -> np.ndarray:
    outputs = llm.classify(prompts, pooling_params=params, use_tqdm=False, tokenization_kwargs=CUT)
    return np.array([output.outputs.probs for output in outputs])


def scores(llm: LLM, queries: Any, documents: Any, **options: Any) -> list[float]:
    outputs = llm.score(queries, documents, use_tqdm=False, tokenization_kwargs=CUT, **options)
    return [output.outputs.score for output in outputs]


def close(found: Any, expected: Any, *, scale: float = 1.0) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, scale))


def tell_apart(rows: np.ndarray) -> float:
    """Assert that every pair of rows differs by far more than the tolerance; return the largest value."""
    apart = np.abs(rows[:, None] - rows[None]).max(axis=-1) + np.eye(len(rows))
    assert apart.min() > 3e-4, "these inputs give nearly the same values: this proves nothing"
    return float(np.abs(rows).max())


# --- parity --------------------------------------------------------------------------------------------------------


LABELS = [pytest.param(name, labels, id=f"{name}-{labels}") for name in FAMILIES for labels in (1, 2, 5)]
"""Families and numbers of labels."""


@pytest.mark.parametrize(("name", "labels"), LABELS)
def test_pairs_as_sentence_transformers_predicts(tmp_path: Path, name: str, labels: int) -> None:
    folder = build(tmp_path, name, labels)
    model = CrossEncoder(str(folder), device="cpu")
    logits = theirs(folder, nn.Identity(), model=model)
    scale = tell_apart(logits)
    queries, documents = ([*side] for side in zip(*PAIRS, strict=True))
    with LLM(model=str(folder)) as llm:
        close(ours(llm, LOGITS), logits, scale=scale)
        assert logits.shape == (len(PAIRS), labels)
        assert max(len(o.prompt_token_ids) for o in llm.classify(PAIRS, tokenization_kwargs=CUT)) == POSITIONS
        if labels > 1:  # CrossEncoder's default is no activation here, vLLM's and ours is a distribution
            close(ours(llm), theirs(folder, nn.Identity(), model=model, apply_softmax=True))
            with pytest.raises(NotScored, match=rf"only enabled for num_labels == 1\..* has {labels} labels"):
                llm.score(queries, documents)
            return
        predicted = theirs(folder, model=model)[:, 0]
        close(ours(llm)[:, 0], predicted)
        close(scores(llm, queries, documents), predicted)
        close(scores(llm, queries, documents, pooling_params=LOGITS), logits[:, 0], scale=scale)


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_as_transformers_classifies(tmp_path: Path, name: str) -> None:
    folder = build(tmp_path, name, 3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    texts = [text for text in TEXTS if tokenizer(text)["input_ids"]]
    ids = [tokenizer(text, truncation=True, max_length=POSITIONS)["input_ids"] for text in texts]
    with torch.inference_mode():
        logits = torch.cat([model(input_ids=torch.tensor([own])).logits for own in ids])
    with LLM(model=str(folder)) as llm:
        close(ours(llm, LOGITS, texts), logits, scale=tell_apart(logits.numpy()))
        close(ours(llm, None, texts), logits.softmax(-1))
        close(ours(llm, LOGITS, ids), logits, scale=tell_apart(logits.numpy()))


# --- forms of requests ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with one label."""
    return build(tmp_path_factory.mktemp("reranker"), "bert", 1)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with three labels."""
    return build(tmp_path_factory.mktemp("three"), "bert", 3)


@pytest.fixture(scope="module")
def llm(reranker: Path) -> Iterator[LLM]:
    with LLM(model=str(reranker)) as made:
        yield made


@pytest.fixture(scope="module")
def logits(reranker: Path) -> np.ndarray:
    """Of `PAIRS`, `[N]`."""
    return theirs(reranker, nn.Identity())[:, 0]


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x)))


def test_forms_of_a_pair(llm: LLM, logits: np.ndarray) -> None:
    mappings = [{"text": a, "text_pair": b} for a, b in PAIRS]
    close(ours(llm, LOGITS, mappings)[:, 0], logits)
    close(ours(llm, LOGITS, [*mappings[:2], *PAIRS[2:]])[:, 0], logits)
    close(ours(llm, LOGITS, mappings[1])[:, 0], logits[1:2])
    close(ours(llm, [PoolingParams(use_activation=i == 1) for i in range(6)], PAIRS)[:, 0], [
        sigmoid(x) if i == 1 else x for i, x in enumerate(logits)
    ])  # fmt: skip
    singles = ours(llm, LOGITS, ["hello", "stone"])
    mixed = ours(llm, LOGITS, ["hello", PAIRS[0], "stone", mappings[1]])
    close(mixed[:, 0], [singles[0, 0], logits[0], singles[1, 0], logits[1]])


@pytest.mark.parametrize(
    "prompts",
    [
        [{"text_pair": "a"}],
        [{"text": "a", "text_pair": 7}],
        [("a", "b", "c")],
        [{"text": "a", "text_pair": "b", "x": 1}],
    ],
)
def test_what_is_no_pair_is_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(BadRequest, match="a prompt (has keys that are not supported|is text or a list of token ids)"):
        llm.classify(prompts)


def test_one_query_many_documents(llm: LLM, reranker: Path) -> None:
    query, documents = "one two three", [document for _, document in PAIRS]
    expected = CrossEncoder(str(reranker), device="cpu").predict([(query, document) for document in documents])
    close(scores(llm, query, documents), expected)
    close(scores(llm, [query], documents), expected)
    close(scores(llm, query, documents[0]), expected[:1])
    ranked = llm.rerank(query, documents, use_tqdm=False, tokenization_kwargs=CUT)
    order = np.argsort(-expected)
    assert [found.index for found in ranked] == order.tolist()
    assert [found.document for found in ranked] == [documents[i] for i in order]
    close([found.relevance_score for found in ranked], expected[order])
    best = llm.rerank(query, documents, top_n=2, use_tqdm=False, tokenization_kwargs=CUT)
    assert [found.index for found in best] == order[:2].tolist()


def test_prompt_token_ids_of_a_score(llm: LLM, reranker: Path) -> None:
    (output,) = llm.score("one two", "three", use_tqdm=False)
    assert output.prompt_token_ids == AutoTokenizer.from_pretrained(reranker)("one two", "three")["input_ids"]


@pytest.mark.parametrize(
    ("queries", "documents", "sentence"),
    [
        (["a", "b"], ["c", "d", "e"], "Input lengths must be either 1:1, 1:N or N:N"),
        (["a", "b"], ["c"], "Input lengths must be either 1:1, 1:N or N:N"),
        ([], ["c"], "At least one text element must be given"),
        (["a"], [], "At least one text_pair element must be given"),
    ],
)
def test_lists_that_do_not_pair_up(llm: LLM, queries: Any, documents: Any, sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence):
        llm.score(queries, documents)


def test_other_ways_to_score(llm: LLM) -> None:
    """A cross-encoder's states are vectors too."""
    assert llm.info.score_types == ("cross-encoder", "bi-encoder", "late-interaction")
    query, documents = "one two", ["three four", "the fox", "one two"]
    vectors = [np.array(o.outputs.embedding) for o in llm.embed([query, *documents], use_tqdm=False)]
    close(scores(llm, query, documents, score_type="bi-encoder"), [vectors[0] @ v for v in vectors[1:]])
    close(scores(llm, query, documents, score_type="cross-encoder"), scores(llm, query, documents))


# --- activations ---------------------------------------------------------------------------------------------------


@pytest.fixture
def one(reranker: Path, tmp_path: Path) -> Path:
    """A copy of the reranker, to be changed."""
    return shutil.copytree(reranker, tmp_path / "model")


@pytest.fixture
def several(three: Path, tmp_path: Path) -> Path:
    return shutil.copytree(three, tmp_path / "model")


IDENTITY, SIGMOID = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Sigmoid"
SOFTMAX = "torch.nn.modules.activation.Softmax"


def test_sentence_transformers_activation_in_config(one: Path, logits: np.ndarray) -> None:
    for path, expected in ((IDENTITY, logits), (SIGMOID, sigmoid(logits))):
        for changes in (
            {"sentence_transformers": {"activation_fn": path}, "sbert_ce_default_activation_function": None},
            {"sentence_transformers": None, "sbert_ce_default_activation_function": path},
        ):
            checkpoints.edit_json(one / "config.json", **changes)
            close(theirs(one)[:, 0], expected)
            with LLM(model=str(one)) as llm:
                close(ours(llm)[:, 0], expected)
                close(scores(llm, *map(list, zip(*PAIRS, strict=True))), expected)
                close(ours(llm, LOGITS)[:, 0], logits)
                assert llm.info.activation == ("none" if path == IDENTITY else "sigmoid")


@pytest.mark.parametrize("activation", [nn.Identity(), nn.Sigmoid(), None], ids=["identity", "sigmoid", "default"])
@pytest.mark.parametrize("labels", [1, 3])
def test_folders_saved_by_the_installed_release(
    reranker: Path, three: Path, tmp_path: Path, labels: int, activation: nn.Module | None
) -> None:
    """Its config_sentence_transformers.json names the activation, also the default one."""
    source = reranker if labels == 1 else three
    CrossEncoder(str(source), device="cpu", activation_fn=activation).save_pretrained(str(tmp_path))
    assert checkpoints.read_json(tmp_path / "config_sentence_transformers.json")["activation_fn"]
    with LLM(model=str(tmp_path)) as llm:
        close(ours(llm), theirs(tmp_path))


def test_the_newer_of_two_saved_activations_counts(one: Path, logits: np.ndarray) -> None:
    """Sentence-Transformers reads config_sentence_transformers.json first, and leaves an older entry in config.json."""
    checkpoints.edit_json(one / "config.json", sentence_transformers={"activation_fn": SIGMOID})
    saved = one.with_name("saved")
    CrossEncoder(str(one), device="cpu", activation_fn=nn.Identity()).save_pretrained(str(saved))
    checkpoints.edit_json(saved / "config.json", sentence_transformers={"activation_fn": SIGMOID})
    close(theirs(saved)[:, 0], logits)
    with LLM(model=str(saved)) as llm:
        close(ours(llm)[:, 0], logits)


@pytest.mark.parametrize("path", ["torch.nn.modules.activation.GLU", "my_package.Sigmoid", "torch.sigmoid"])
def test_other_activations_are_refused(one: Path, logits: np.ndarray, path: str) -> None:
    checkpoints.edit_json(one / "config.json", sentence_transformers={"activation_fn": path})
    with pytest.raises(CheckpointError, match=f"was saved with the activation '{path}'"):
        LLM(model=str(one))
    with LLM(model=str(one), hf_overrides={"problem_type": "regression"}) as llm:
        close(ours(llm)[:, 0], logits)


@pytest.mark.parametrize(
    ("problem", "activation"),
    [
        ("regression", lambda x: x),
        ("single_label_classification", lambda x: torch.from_numpy(x).softmax(-1).numpy()),
        ("multi_label_classification", sigmoid),
    ],
)
def test_problem_types(several: Path, problem: str, activation: Callable[[np.ndarray], np.ndarray]) -> None:
    logits = theirs(several, nn.Identity())
    checkpoints.edit_json(
        several / "config.json", problem_type=problem, sentence_transformers={"activation_fn": SOFTMAX}
    )
    with LLM(model=str(several)) as llm:
        close(ours(llm), activation(logits), scale=tell_apart(logits))
        close(ours(llm, LOGITS), logits, scale=tell_apart(logits))
    assert float(np.abs(logits.sum(-1) - 1).min()) > 1e-2


def test_problem_types_of_one_label(one: Path, logits: np.ndarray) -> None:
    for problem, expected in (("regression", logits), ("multi_label_classification", sigmoid(logits))):
        with LLM(model=str(one), hf_overrides={"problem_type": problem}) as llm:
            close(ours(llm)[:, 0], expected)


@pytest.mark.parametrize(
    ("labels", "problem"), [(1, "regression"), (3, "multi_label_classification"), (3, "single_label_classification")]
)
def test_a_cross_encoder_s_folder_does_not_go_by_its_problem_type(tmp_path: Path, labels: int, problem: str) -> None:
    """As in sentence-transformers, unless the user sets it."""
    folder = checkpoints.classifier(tmp_path / "model", num_labels=labels, problem_type=problem)
    checkpoints.write_modules(
        folder,
        transformer={"transformer_task": "sequence-classification"},
        settings={"model_type": "CrossEncoder"},
    )
    expected = theirs(folder)
    with LLM(model=str(folder)) as llm:
        close(ours(llm), expected, scale=1.0)
    logits = theirs(folder, nn.Identity())
    by_problem = {"regression": logits, "multi_label_classification": sigmoid(logits)}.get(problem)
    if by_problem is not None:
        with LLM(model=str(folder), hf_overrides={"problem_type": problem}) as llm:
            close(ours(llm), by_problem, scale=1.0)
        assert np.abs(by_problem - expected).max() > 1e-2


@pytest.mark.parametrize("overridden", [True, False])
def test_unknown_problem_types_are_refused(one: Path, overridden: bool) -> None:
    if not overridden:
        checkpoints.edit_json(one / "config.json", problem_type="guess")
    with pytest.raises(CheckpointError, match="problem_type must be one of regression, single_label_.*, got 'guess'"):
        LLM(model=str(one), hf_overrides={"problem_type": "guess"} if overridden else None)


def test_activation_as_the_servers_default(reranker: Path, logits: np.ndarray) -> None:
    with LLM(model=str(reranker), pooler_config={"use_activation": False}) as llm:
        close(ours(llm)[:, 0], logits)
        close(ours(llm, PoolingParams(use_activation=True))[:, 0], sigmoid(logits))


@pytest.mark.parametrize(("mean", "sigma"), [(0.7, 2.5), (0.7, None), (None, -0.5)])
def test_calibration(reranker: Path, three: Path, logits: np.ndarray, mean: float | None, sigma: float | None) -> None:
    """`activation((logits - mean) / sigma)`, also without the activation."""
    config = {"logit_mean": mean, "logit_sigma": sigma}
    with LLM(model=str(reranker), pooler_config=config) as llm:
        calibrated = (logits - (mean or 0)) / (sigma or 1)
        close(ours(llm)[:, 0], sigmoid(calibrated))
        close(ours(llm, LOGITS)[:, 0], calibrated, scale=float(np.abs(calibrated).max()))
    with LLM(model=str(three), pooler_config=config) as llm:
        calibrated = (theirs(three, nn.Identity()) - (mean or 0)) / (sigma or 1)
        close(ours(llm), torch.from_numpy(calibrated).softmax(-1))


def test_sigma_of_zero_is_refused(reranker: Path) -> None:
    with pytest.raises(ConfigError, match="`logit_sigma` must not be 0, logits are divided by it"):
        LLM(model=str(reranker), pooler_config={"logit_sigma": 0})


# --- labels and pooling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
def test_labels(several: Path, named: bool) -> None:
    names = ["sad", "glad", "mad"]
    if named:
        labels = {str(i): name for i, name in enumerate(names)}
        checkpoints.edit_json(several / "config.json", id2label=labels, label2id={n: i for i, n in enumerate(names)})
    best = theirs(several, nn.Identity()).argmax(-1)
    with LLM(model=str(several)) as llm:
        outputs = llm.classify(PAIRS, use_tqdm=False, tokenization_kwargs=CUT)
        assert llm.info.labels == (tuple(names) if named else ("LABEL_0", "LABEL_1", "LABEL_2"))
        assert [output.outputs.label for output in outputs] == [llm.info.labels[i] for i in best]
        assert {output.outputs.num_classes for output in outputs} == {3}
        assert llm.info.num_labels == 3
    assert len(set(best)) > 1


def test_tasks_of_classifiers(llm: LLM, reranker: Path, tmp_path: Path) -> None:
    assert (llm.info.tasks, llm.info.default_task) == (("classify", "embed", "token_embed"), "classify")
    with pytest.raises(TaskNotOffered, match=r"Unsupported task: 'token_classify' .*ForTokenClassification"):
        llm.encode("a", pooling_task="token_classify")
    with LLM(model=str(reranker), convert="embed") as made:
        assert made.info.tasks == ("embed", "token_embed")
        with pytest.raises(TaskNotOffered, match="Classification API is not supported by this model"):
            made.classify("a")
    with LLM(model=str(build(tmp_path, "llama", 2))) as made:
        assert made.info.tasks == ("classify", "token_classify", "embed", "token_embed")


@pytest.mark.parametrize("pooling", ["MEAN", "CLS", "LAST"])
def test_decoders_classify_by_the_pooling_asked_for(tmp_path: Path, pooling: str) -> None:
    """Their head is a layer over one row, which may be any row."""
    folder = build(tmp_path, "qwen3", 2)
    ids = [[5, 6, 7, 8], [9, 10], [11]]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = []
    with torch.inference_mode():
        for own in ids:
            states = model.model(input_ids=torch.tensor([own])).last_hidden_state[0]
            rows.append({"MEAN": states.mean(0), "CLS": states[0], "LAST": states[-1]}[pooling])
        expected = model.score(torch.stack(rows))
    with LLM(model=str(folder), pooler_config={"pooling_type": pooling}) as llm:
        close(ours(llm, LOGITS, ids), expected, scale=float(expected.abs().max()))


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "modernbert, mean", "llama"])
def test_all_tasks_in_one_batch(tmp_path: Path, name: str) -> None:
    """Embeddings, tokens, classes of texts and of pairs, of one request: each as if it were alone."""
    batch_of_every_task(build(tmp_path, name, 3))


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_entities_and_vectors_in_one_batch(tmp_path: Path, family: str) -> None:
    options = ROBERTA if family == "Roberta" else {}
    tokenizer = sentinels() if family == "Roberta" else wordpiece()
    checkpoints.classifier(tmp_path, family, "ForTokenClassification", tokenizer=tokenizer, num_labels=4, **options)
    tasks = batch_of_every_task(tmp_path)
    assert tasks == ("token_classify", "embed", "token_embed")
    model = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([tokenizer(TEXTS[1])["input_ids"]])).logits[0]
    with LLM(model=str(tmp_path)) as made:
        (output,) = made.encode(TEXTS[1], LOGITS, pooling_task="token_classify", use_tqdm=False)
        close(output.outputs.data, expected, scale=float(expected.abs().max()))
        (output,) = made.encode(TEXTS[1], pooling_task="token_classify", use_tqdm=False)
        close(output.outputs.data, expected.softmax(-1))


def batch_of_every_task(folder: Path) -> Sequence[str]:
    texts = [text for text in TEXTS if text]
    with LLM(model=str(folder)) as made:
        service, options = made._service, TextOptions(truncate=-1)
        together = []
        for task in made.info.tasks:
            for params in (PoolingParams(), LOGITS):
                together += service.render(texts, task, params, options)
                together += service.render(PAIRS, task, params, options) if task == "classify" else []
        order = np.random.default_rng(0).permutation(len(together)).tolist()
        mixed = service.engine.submit([together[i] for i in order]).result()
        alone = [service.engine.submit([together[i]]).result()[0] for i in order]
        for found, expected in zip(mixed, alone, strict=True):
            close(found.data, expected.data, scale=float(np.abs(expected.data).max()))
        assert {output.data.shape[-1] for output in mixed} == {made.info.num_labels, made.info.dimension}
        return made.info.tasks


# --- Sentence-Transformers folders ---------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ CONTENT }}\n{% endfor %}{% if add_generation_prompt %}relevant?{% endif %}"
)
SHORT = [(query[:40], document[:40]) for query, document in PAIRS]


@pytest.mark.parametrize("layout", ["flat", "structured"])
@pytest.mark.parametrize("name", ["bert", "qwen3"])
def test_classifiers_saved_with_a_message_template(tmp_path: Path, name: str, layout: str) -> None:
    """As tomaarsen's converted Qwen3-Reranker: a sequence classifier whose pairs are rendered by its chat template."""
    family, tokenizer, options = FAMILIES[name]
    made = tokenizer()
    made.chat_template = TEMPLATE.replace("CONTENT", "m.content" if layout == "flat" else "m.content[0].text")
    long = {"max_position_embeddings": 256}
    made.model_max_length = 256
    source = checkpoints.classifier(tmp_path / "source", family, tokenizer=made, **{**options, **long}, num_labels=1)
    forward = {"method": "forward", "method_output_name": "logits"}
    module = Transformer(
        str(source),
        transformer_task="sequence-classification",
        modality_config={"text": forward, "message": {**forward, "format": layout}},
        module_output_name="scores",
        processing_kwargs={"chat_template": {"add_generation_prompt": True}},
    )
    folder = tmp_path / "model"
    CrossEncoder(modules=[module], device="cpu").save_pretrained(str(folder))
    expected = CrossEncoder(str(folder), device="cpu").predict(SHORT, batch_size=1)
    with LLM(model=str(folder)) as llm:
        close(scores(llm, *map(list, zip(*SHORT, strict=True))), expected)
        close(ours(llm, None, SHORT)[:, 0], expected)
        (output,) = llm.score("one", "two", use_tqdm=False)
        text = "query: one\ndocument: two\nrelevant?"
        assert output.prompt_token_ids == made(text, add_special_tokens=False)["input_ids"]


def test_a_named_template_of_several(tmp_path: Path) -> None:
    made = wordpiece()
    rate = "{{ messages[1].content }}?{{ ending }}{{ restore_suffix }}"  # the last is for Sentence-Transformers alone
    made.chat_template = {"default": "{{ messages[0].content }}", "rate": rate}
    checkpoints.classifier(tmp_path, tokenizer=made, num_labels=1)
    checkpoints.write_modules(
        tmp_path,
        transformer={
            "transformer_task": "sequence-classification",
            "modality_config": {"message": {"method": "forward", "method_output_name": "logits", "format": "flat"}},
            "module_output_name": "scores",
            "processing_kwargs": {"chat_template": {"chat_template": "rate", "ending": "!", "restore_suffix": False}},
        },
        settings={"model_type": "CrossEncoder"},
    )
    with LLM(model=str(tmp_path)) as llm:
        (output,) = llm.score("one", "two", use_tqdm=False)
        assert output.prompt_token_ids == wordpiece()("two?!", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("default", [None, "task"])
def test_default_prompts_of_joined_pairs(reranker: Path, tmp_path: Path, default: str | None) -> None:
    """Sentence-Transformers puts a prompt before the first text of a pair."""
    CrossEncoder(
        str(reranker), device="cpu", prompts={"task": "the fox is "}, default_prompt_name=default
    ).save_pretrained(str(tmp_path))
    expected = theirs(tmp_path)[:, 0]
    with LLM(model=str(tmp_path)) as made:
        close(ours(made)[:, 0], expected)
    assert (np.abs(expected - theirs(reranker)[:, 0]).max() > 1e-2) == (default is not None)


def test_default_prompts_of_rendered_pairs(tmp_path: Path) -> None:
    """There it is a message of role `system`, which a request's instruction replaces."""
    made = wordpiece(model_max_length=256)
    made.chat_template = TEMPLATE.replace("CONTENT", "m.content")
    source = checkpoints.classifier(tmp_path / "source", tokenizer=made, num_labels=1, max_position_embeddings=256)
    for name, prompts in (("plain", {}), ("prompted", {"task": "the fox is"})):
        default = "task" if prompts else None
        model = CrossEncoder(str(source), device="cpu", prompts=prompts, default_prompt_name=default)
        model.save_pretrained(str(tmp_path / name))
        expected = model.predict(SHORT, batch_size=1)
        queries, documents = ([*side] for side in zip(*SHORT, strict=True))
        with LLM(model=str(tmp_path / name)) as llm:
            close(scores(llm, queries, documents), expected)
            instructed = model.predict(SHORT, prompt="name the stone", batch_size=1)
            close(scores(llm, queries, documents, instruction="name the stone"), instructed)
            assert np.abs(instructed - expected).max() > 1e-3


def test_vectors_of_a_saved_cross_encoder(one: Path) -> None:
    """Its folder has no Pooling module: it embeds as its architecture does."""
    CrossEncoder(str(one), device="cpu").save_pretrained(str(one.with_name("saved")))
    model = AutoModel.from_pretrained(one).eval()
    with torch.inference_mode():
        states = model(**wordpiece()(TEXTS[1], return_tensors="pt")).last_hidden_state[0]
    with LLM(model=str(one.with_name("saved"))) as made:
        (output,) = made.embed(TEXTS[1], use_tqdm=False)
        close(output.outputs.embedding, nn.functional.normalize(states[0], dim=0))
