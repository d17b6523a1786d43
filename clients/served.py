"""The servers that clients talk to, and what `LLM` makes of the texts that they send.

| server | models | flags |
|---|---|---|
| a | `minilm`, `cross` (one label), `classes` (three), `entities`, `splade` | no key |
| b | `minilm`, also under any other name | a key, prompts, Matryoshka sizes, OpenAI's token ids, an origin |
| c | any | none; it refuses all work as overloaded, and bodies of more than 2,000 bytes (`clients.full`) |
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling

from cenote import LLM, PoolingParams
from cenote.models.hub import embedded
from cenote.tensors.quantize import quantize
from tests.checkpoints import bert, classifier

KEY = "secret"
LABELS = ["O", "B-PER", "I-PER", "B-LOC"]
CLASSES = ["no", "maybe", "yes"]
PROMPTS = {"query": "query: ", "document": "document: "}
SIZE = 64
TEXTS = ["The water is deep.", "A cave full of stones", "Fish swim in clear natural pits"]
QUERY = "How deep is the water?"
NAMED = "Anna of Cancun swims in natural pits"
LONG = "one " * 300
"""More tokens than any of the models reads."""
CHUNKS = ["The cenote is deep.", "Its water is clear."]
"""Of one text, for clients that embed each in the light of the other."""
A_NAMES = ("minilm", "cross", "classes", "entities", "splade")
MATRYOSHKA = {"matryoshka_dimensions": [SIZE, 128, 384]}
B_FLAGS = (
    "--served-model-name", "minilm", "*", "--api-key", KEY, "--prompts", json.dumps(PROMPTS),
    "--hf-overrides", json.dumps(MATRYOSHKA), "--token-ids", "cl100k", "--allowed-origins", "http://localhost:3000",
)  # fmt: skip


def models(folder: Path) -> list[str]:
    """Write the models of server a into `folder`, and return where they are."""
    classifier(folder / "cross", num_labels=1)
    classifier(folder / "classes", num_labels=3, seed=1, id2label=dict(enumerate(CLASSES)))
    classifier(folder / "entities", head="ForTokenClassification", id2label=dict(enumerate(LABELS)))
    masked = bert(folder / "masked", masked_lm=True)
    modules = [Transformer(str(masked), transformer_task="fill-mask"), SpladePooling()]
    SparseEncoder(modules=modules, device="cpu").save_pretrained(str(folder / "splade"), create_model_card=False)
    return [str(embedded()), *(str(folder / name) for name in A_NAMES[1:])]


@contextmanager
def servers(*flags: Sequence[str]) -> Iterator[list[str]]:
    """A process of `cenote serve` for each list of flags, and one that is full; their URLs, and their end."""
    serve = [sys.executable, "-m", "cenote", "serve", "--port", "0"]
    commands = [*([*serve, *own] for own in flags), [sys.executable, "-m", "clients.full"]]
    with ExitStack() as stack:
        processes = [stack.enter_context(_Process(command, stderr=subprocess.PIPE, text=True)) for command in commands]
        yield [process.url() for process in processes]


class _Process(subprocess.Popen[str]):
    """A server, which is ended on leaving its context."""

    def url(self) -> str:
        """Return its URL as soon as it listens, and read on what it logs.

        Raises:
            RuntimeError: it ends before.
        """
        assert self.stderr is not None
        log = ""
        for line in self.stderr:
            log += line
            if match := re.search(r"serving (http://127\.0\.0\.1:\d+)", line):
                threading.Thread(target=self.stderr.read, daemon=True).start()
                return match[1]
        raise RuntimeError(f"the server did not start:\n{log}")

    def __exit__(self, *_: object) -> None:
        self.terminate()
        self.wait()


def pairs(values: Any, names: list[str]) -> list[list[Any]]:
    """Return names and values by falling value."""
    return sorted(([name, float(value)] for name, value in zip(names, values, strict=True)), key=lambda p: -p[1])


def of_minilm(options: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the embedder."""
    unit, raw = PoolingParams(), PoolingParams(use_activation=False)
    cut = {"truncate_prompt_tokens": -1}
    with LLM(prompts=PROMPTS, hf_overrides=MATRYOSHKA, **options) as llm:

        def embed(texts: Any, params: PoolingParams = unit, **more: Any) -> Any:
            outputs = llm.embed(texts, pooling_params=params, use_tqdm=False, **more)
            return np.array([output.outputs.array for output in outputs])

        vectors = embed(TEXTS)
        query = embed([QUERY])
        tokenizer = llm.get_tokenizer()
        (tokens,) = llm.encode(TEXTS[:1], raw, pooling_task="token_embed", use_tqdm=False)
        ids = tokenizer(TEXTS[0])["input_ids"]
        return {
            "vectors": vectors.tolist(),
            "query vectors": embed(TEXTS, input_type="query").tolist(),
            "document vectors": embed(TEXTS, input_type="document").tolist(),
            "query vector": embed([QUERY], input_type="query")[0].tolist(),
            "query": query[0].tolist(),
            "small": embed(TEXTS, PoolingParams(dimensions=SIZE)).tolist(),
            "small document": embed(TEXTS, PoolingParams(dimensions=SIZE), input_type="document").tolist(),
            "unnormalised": embed(TEXTS, raw).tolist(),
            "cut": embed([LONG], tokenization_kwargs=cut).tolist(),
            "cut document": embed([LONG], input_type="document", tokenization_kwargs=cut).tolist(),
            "similarities": (vectors @ query[0]).tolist(),
            "tokens": tokens.outputs.data.tolist(),
            "ids": ids,
            "words": tokenizer.convert_ids_to_tokens(ids),
            "chunks": chunks(llm).tolist(),
            **{name: quantize(vectors, name).tolist() for name in ("int8", "uint8", "binary", "ubinary")},
            **{
                f"document {name}": quantize(embed(TEXTS, input_type="document"), name).tolist()
                for name in ("int8", "uint8", "binary", "ubinary")
            },
            "ranked by prompted vectors": ranked(llm),
        }


def chunks(llm: LLM) -> np.ndarray:
    """Return the normalised means of the tokens of each of `CHUNKS`, read as one text."""
    raw = PoolingParams(use_activation=False)
    (output,) = llm.encode([" ".join(CHUNKS)], raw, pooling_task="token_embed", use_tqdm=False)
    first = len(llm.get_tokenizer()(CHUNKS[0], add_special_tokens=False)["input_ids"]) + 1
    means = np.stack([part.mean(0) for part in np.split(output.outputs.data.numpy(), [first])])
    rows: np.ndarray = means / np.linalg.norm(means, axis=1, keepdims=True)
    return rows


def ranked(llm: LLM, documents: list[str] = TEXTS, **options: Any) -> list[list[Any]]:
    """Return the place and the score of each document, by falling score."""
    options["tokenization_kwargs"] = {"truncate_prompt_tokens": -1}
    results = llm.rerank(QUERY, documents, use_tqdm=False, **options)
    return [[result.index, result.relevance_score] for result in results]


def of_others(folders: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the cross-encoder, the classifiers and the sparse model."""
    raw = PoolingParams(use_activation=False)
    values: dict[str, Any] = {}
    with LLM(folders[0], **options) as llm:
        values["ranked by vectors"] = ranked(llm)
    with LLM(folders[1], **options) as llm:
        values["ranked"] = ranked(llm)
        values["scores"] = [score for _, score in sorted(values["ranked"])]
        values["ranked raw"] = ranked(llm, pooling_params=raw)
        values["ranked cut"] = ranked(llm, [TEXTS[0], LONG])
    with LLM(folders[2], **options) as llm:
        outputs = llm.classify(TEXTS, use_tqdm=False)
        values["classes"] = [pairs(output.outputs.probs, CLASSES) for output in outputs]
        outputs = llm.classify(TEXTS, pooling_params=raw, use_tqdm=False)
        values["classes raw"] = [pairs(output.outputs.probs, CLASSES) for output in outputs]
        values["classes in order"] = [output.outputs.probs for output in llm.classify(TEXTS, use_tqdm=False)]
    with LLM(folders[3], **options) as llm:
        (output,) = llm.token_classify([NAMED], aggregation_strategy="simple", use_tqdm=False)
        values["entities"] = [[e.label, e.word, e.start, e.end, float(e.score)] for e in output.outputs]
    with LLM(folders[4], **options) as llm:
        outputs = llm.embed_sparse(TEXTS, use_tqdm=False)
        values["weights"] = [dict(zip(o.outputs.tokens, o.outputs.values, strict=True)) for o in outputs]
        values["sparse"] = [list(map(list, zip(o.outputs.indices, o.outputs.values, strict=True))) for o in outputs]
    return values


def values(folders: list[str]) -> dict[str, Any]:
    """Return the texts that clients send, and their values."""
    options: dict[str, Any] = {"max_num_seqs": 64}
    texts = {
        "key": KEY, "texts": TEXTS, "text": TEXTS[0], "question": QUERY, "named": NAMED, "long": LONG, "parts": CHUNKS,
        "size": SIZE, "names": list(A_NAMES),
    }  # fmt: skip
    return {**texts, **of_minilm(options), **of_others(folders, options)}
