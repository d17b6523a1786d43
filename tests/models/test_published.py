"""Well-known models in the layout of their publishers: each loads as it is, and answers as its reference does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from cenote import LLM, PoolingParams
from tests.checkpoints import SHORT, TEXTS
from tests.models import flag_embedding
from tests.models.published import Published, drawn, write, write_native
from tests.models.published_code import OF_CODE
from tests.models.published_embedders import EMBEDDERS
from tests.models.published_heads import HEADS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MODELS = {**EMBEDDERS, **HEADS, **OF_CODE}
QUERY = "quick brown fox"
DOCUMENTS = [text for text in SHORT if text]
CUT = {"truncate_prompt_tokens": -1}
FLOAT32 = {"dtype": torch.float32}
RAW = PoolingParams(use_activation=False)
LLAMA_3 = (
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
)
"""Before and after a user's message."""


@dataclass(frozen=True)
class Loaded:
    """A repository in Cenote."""

    published: Published
    folder: Path
    llm: LLM

    def reference(self, task: str = "") -> str:
        """Path of the folder that the reference loads, with the adapter of a task."""
        if self.published.native is None:
            return str(self.folder)
        folder = self.folder.with_name(f"native-{task}") / self.folder.name
        return str(folder if folder.exists() else write_native(self.published, folder, task))


@pytest.fixture(scope="module", params=MODELS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    published = MODELS[request.param]
    folder = write(published, tmp_path_factory.mktemp("published") / request.param.rpartition("/")[2])
    with LLM(model=str(folder), dtype="float32") as llm:
        yield Loaded(published, folder, llm)


def sentences(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    """Vectors without a prompt and with each of the model's, by `SentenceTransformer`."""
    prompts = [None, *(loaded.published.settings or {}).get("prompts", {})]
    mine, expected = [], []
    for name in prompts:
        task = name if name in loaded.published.tasks else ""
        model = SentenceTransformer(loaded.reference(task or ""), device="cpu", model_kwargs=FLOAT32)
        outputs = loaded.llm.embed(TEXTS, prompt_name=name, tokenization_kwargs=CUT, use_tqdm=False)
        mine += [output.outputs.embedding for output in outputs]
        expected += list(model.encode(TEXTS, prompt_name=name, show_progress_bar=False))
    return mine, expected


def pairs(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    """Scores of pairs, or their classes, by `CrossEncoder`."""
    model = CrossEncoder(loaded.reference(), device="cpu", model_kwargs=FLOAT32)
    expected = [*model.predict([(QUERY, text) for text in DOCUMENTS], show_progress_bar=False)]
    if loaded.llm.info.num_labels > 1:
        outputs = loaded.llm.classify([(QUERY, text) for text in DOCUMENTS], use_tqdm=False)
        return [output.outputs.probs for output in outputs], expected
    scores = loaded.llm.score(QUERY, DOCUMENTS, use_tqdm=False)
    return [output.outputs.score for output in scores], expected


def sparse(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    """Weights of the vocabulary of each side, by `SparseEncoder`."""
    model = SparseEncoder(loaded.reference(), device="cpu", model_kwargs=FLOAT32)
    mine, expected = [], []
    for side, encode in (("query", model.encode_query), ("document", model.encode_document)):
        outputs = loaded.llm.embed_sparse(DOCUMENTS, input_type=side, use_tqdm=False)
        expected += list(encode(DOCUMENTS, convert_to_sparse_tensor=False, show_progress_bar=False).numpy())
        mine += [_dense(output.outputs.indices, output.outputs.values, expected[0].shape) for output in outputs]
    return mine, expected


def m3(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    """Vectors, weights and token vectors by FlagEmbedding's rules, all filled up to the width of the vocabulary."""
    tasks = ["embed", "sparse", "token_embed"]
    vocabulary = len(loaded.llm.get_tokenizer())
    mine, expected = [], []
    for text in DOCUMENTS:
        (output,) = loaded.llm.encode(text, pooling_task=tasks, use_tqdm=False)
        vector, others, rule = output.outputs, output.outputs.others, flag_embedding.reference(loaded.folder, text)
        mine += [vector.data, *others["token_embed"].data]
        mine.append(_dense(others["sparse"].indices, others["sparse"].data, vocabulary))
        expected += [rule["embed"], *rule["token_embed"]]
        expected.append(_dense([*rule["sparse"]], [*rule["sparse"].values()], vocabulary))
    return [np.resize(row, vocabulary) for row in mine], [np.resize(row, vocabulary) for row in expected]


def _dense(indices: Any, values: Any, shape: Any) -> np.ndarray:
    row = np.zeros(shape, np.float32)
    row[np.asarray(indices)] = values
    return row


def tokens(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    """MaxSim of a query and documents, by `MultiVectorEncoder`."""
    model = MultiVectorEncoder(loaded.reference(), device="cpu", model_kwargs=FLOAT32)
    query, documents = model.encode_query([QUERY]), model.encode_document(DOCUMENTS)
    expected = model.similarity(query, documents)[0]
    scores = loaded.llm.score(QUERY, DOCUMENTS, use_tqdm=False)
    return [output.outputs.score for output in scores], expected.tolist()


def answers(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    """Logits of the answers to a rendered pair, by Transformers."""
    model = AutoModelForCausalLM.from_pretrained(loaded.folder, attn_implementation="eager", **FLOAT32)
    tokenizer = AutoTokenizer.from_pretrained(loaded.folder)
    first, *second = tokenizer.convert_tokens_to_ids([*loaded.published.answers])
    expected = []
    for text in DOCUMENTS:
        parts = [part.format(query=QUERY, document=text) for part in loaded.published.prompt]
        ids = [token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            logits = model.eval()(torch.tensor([ids])).logits[0, -1]
        expected.append(float(logits[first] - sum(logits[token] for token in second)))
    outputs = loaded.llm.score(QUERY, DOCUMENTS, pooling_params=RAW, use_tqdm=False)
    return [output.outputs.score for output in outputs], expected


def rewards(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    """Rewards of every token, by the head's layers with a ReLU between them."""
    return _rewards(loaded, DOCUMENTS), [row for _, x in _states(loaded, DOCUMENTS) for row in _layers(loaded, x)]


def last(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    """Rewards of the last token."""
    return _rewards(loaded, DOCUMENTS), [_layers(loaded, x)[-1, 0] for _, x in _states(loaded, DOCUMENTS)]


def steps(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    """Probabilities of the classes at the end of every step, as Qwen2.5-Math-PRM's card computes them."""
    texts = [f"{text}<extra_0>so it is.<extra_0>" for text in DOCUMENTS]
    tag = loaded.llm.get_tokenizer().convert_tokens_to_ids("<extra_0>")
    expected = [
        row for ids, x in _states(loaded, texts) for row in _layers(loaded, x)[torch.tensor(ids) == tag].softmax(-1)
    ]
    return _rewards(loaded, texts), expected


def gated(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    """Rewards of objectives by a gate at the end of the prompt, as ArmoRM's code computes them."""
    head, (before, after) = _head(loaded), LLAMA_3
    texts = [f"{before}{text}{after}the fox" for text in DOCUMENTS]
    end = loaded.llm.get_tokenizer()(after, add_special_tokens=False)["input_ids"]
    temperature, expected = loaded.published.config["gating_temperature"], []
    for ids, x in _states(loaded, texts):
        gate = x[max(i for i in range(len(ids)) if ids[i : i + len(end)] == end)]
        for number in range(3):
            gate = gate.relu() if number else gate
            gate = gate @ head[f"gating.layers.{number}.weight"].T + head[f"gating.layers.{number}.bias"]
        weights = (gate / temperature).softmax(-1) * head["gating.logit_scale"]
        objectives = x[-1] @ head["regression_layer.weight"].T @ head["reward_transform_matrix"]
        expected.append((weights * objectives).sum())
    return _rewards(loaded, texts), expected


def _rewards(loaded: Loaded, texts: list[str]) -> list[Any]:
    """Return the rows of all texts' rewards, of one class as numbers."""
    outputs = loaded.llm.reward(texts, use_tqdm=False)
    return [row for output in outputs for row in output.outputs.data.numpy()]


def _states(loaded: Loaded, texts: list[str]) -> list[tuple[list[int], Any]]:
    """Return ids and hidden states of texts, by Transformers, one by one."""
    model = AutoModel.from_pretrained(loaded.folder, attn_implementation="eager", **FLOAT32).eval()
    tokenizer = AutoTokenizer.from_pretrained(loaded.folder)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    with torch.no_grad():
        return [(one, model(torch.tensor([one])).last_hidden_state[0]) for one in ids]


def _head(loaded: Loaded) -> dict[str, Any]:
    return drawn(loaded.published.tensors)


def _layers(loaded: Loaded, x: Any) -> Any:
    """Return rows of the head's linear layers, with a ReLU between them."""
    head = _head(loaded)
    for number, name in enumerate(name for name in head if name.endswith("weight")):
        x = x.relu() if number else x
        x = x @ head[name].T + head.get(name.replace("weight", "bias"), 0.0)
    return x


def classes(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    """Logits of texts, by Transformers, one by one."""
    model = AutoModelForSequenceClassification.from_pretrained(loaded.folder, attn_implementation="eager", **FLOAT32)
    tokenizer = AutoTokenizer.from_pretrained(loaded.folder)
    outputs = loaded.llm.classify(DOCUMENTS, pooling_params=RAW, use_tqdm=False)
    return [output.outputs.probs for output in outputs], [_logits(model, tokenizer, text)[0] for text in DOCUMENTS]


def entities(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    """Logits of every token, by Transformers, one by one."""
    model = AutoModelForTokenClassification.from_pretrained(loaded.folder, attn_implementation="eager", **FLOAT32)
    tokenizer = AutoTokenizer.from_pretrained(loaded.folder)
    outputs = loaded.llm.encode(DOCUMENTS, RAW, pooling_task="token_classify", use_tqdm=False)
    mine = [row for output in outputs for row in output.outputs.data.numpy()]
    return mine, [row for text in DOCUMENTS for row in _logits(model, tokenizer, text)[0]]


def _logits(model: Any, tokenizer: Any, text: str) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model.eval()(**tokenizer(text, return_tensors="pt")).logits.numpy()
    return logits


REFERENCES: dict[str, Callable[[Loaded], tuple[list[Any], list[Any]]]] = {
    "sentences": sentences,
    "pairs": pairs,
    "sparse": sparse,
    "m3": m3,
    "tokens": tokens,
    "answers": answers,
    "rewards": rewards,
    "last": last,
    "steps": steps,
    "gated": gated,
    "classes": classes,
    "entities": entities,
}


def test_answers_as_its_reference(loaded: Loaded) -> None:
    """Equal to 1e-5 of the largest value, and not because all inputs have one answer."""
    mine, expected = map(np.asarray, REFERENCES[loaded.published.reference](loaded))
    assert mine.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-5 * scale)
    assert np.ptp(expected, axis=0).max() > 1e-2
