"""Well-known models in the layout of their publishers: each loads as it is, and answers as its reference does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from cenote import LLM
from tests.checkpoints import SHORT, TEXTS
from tests.models import flag_embedding
from tests.models.published import Published, write, write_native
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


def classes(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    """Logits of texts, by Transformers, one by one."""
    model = AutoModelForSequenceClassification.from_pretrained(loaded.folder, attn_implementation="eager", **FLOAT32)
    tokenizer = AutoTokenizer.from_pretrained(loaded.folder)
    params = {"use_activation": False}
    outputs = loaded.llm.classify(DOCUMENTS, pooling_params=_params(**params), use_tqdm=False)
    return [output.outputs.probs for output in outputs], [_logits(model, tokenizer, text)[0] for text in DOCUMENTS]


def entities(loaded: Loaded) -> tuple[list[Any], list[Any]]:
    """Logits of every token, by Transformers, one by one."""
    model = AutoModelForTokenClassification.from_pretrained(loaded.folder, attn_implementation="eager", **FLOAT32)
    tokenizer = AutoTokenizer.from_pretrained(loaded.folder)
    params = _params(use_activation=False)
    outputs = loaded.llm.encode(DOCUMENTS, params, pooling_task="token_classify", use_tqdm=False)
    mine = [row for output in outputs for row in output.outputs.data.numpy()]
    return mine, [row for text in DOCUMENTS for row in _logits(model, tokenizer, text)[0]]


def _params(**values: Any) -> Any:
    from cenote import PoolingParams

    return PoolingParams(**values)


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
