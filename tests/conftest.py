"""What the HTTP tests share: the real application over a fake engine, with the embedded model's tokenizer."""

from __future__ import annotations

import gc
import json
import time
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings
from starlette.testclient import TestClient

from cenote.config import ServerConfig
from cenote.conventions import PairTemplate
from cenote.core import Engine, ModelInfo, PoolingParams, Sequence
from cenote.engine.fake import FAKE_INFO, FakeEngine, fake_classes, fake_vector
from cenote.pipeline.pipeline import Service
from cenote.pipeline.rendering import Renderer
from cenote.server.app import build

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from transformers import PreTrainedTokenizerBase

TESTS = Path(__file__).parent

settings.register_profile("counted", deadline=None)
settings.load_profile("counted")

LONGEST = (
    "server/test_process", "models/families/test_multi_vector", "models/passes/test_narrow",
    "server/test_front_process", "models/test_folder_keys", "models/test_parity_zoo",
    "models/test_sentence_transformers", "models/families/test_rerankers", "models/test_cross_encoders",
    "models/test_hub", "models/families/test_sparse", "cli/test_bench", "server/test_lost_engine", "models/test_heads",
    "models/test_published", "models/test_peft", "models/passes/test_graphs", "models/test_damage",
    "models/test_checkpoint", "models/test_classifiers", "server/test_connections", "pipeline/test_plugins",
    "pipeline/test_pairs", "models/test_message_folders", "server/dialects/test_cohere",
    "models/test_embedder_families", "models/families/test_images_qwen_vl", "models/test_batch_invariant",
    "vllm/test_scripts_of_vllm", "test_one_way", "test_docs", "models/test_folder_values", "server/test_bad_requests",
    "server/test_images_complaints", "models/test_adapters", "cli/test_lines", "server/test_torchless",
    "test_retrieval_quality", "models/families/test_rewards", "models/passes/test_passes", "tensors/test_process",
    "server/test_images_bad_input", "models/families/test_images_col", "models/test_probe", "test_peers",
    "engine/test_owner", "pipeline/test_entities", "models/families/test_images_refused", "models/test_layout",
    "test_llm", "pipeline/test_similarity", "engine/test_engine", "server/test_images_in_pairs", "models/test_contents",
    "tensors/test_linear", "test_benchmarks", "server/test_fuzz", "models/test_kept_features", "server/test_documented",
    "pipeline/test_chunking",
)  # fmt: skip
"""Files that take longest. They come first, so that several processes end at about the same time."""
JSON = {"Content-Type": "application/json"}
INFO = replace(FAKE_INFO, vocab_size=30_522)
"""The fake model, with a vocabulary that fits the tokenizer: vectors of 8, at most 64 tokens."""


UNKNOWN_IDS = (
    ". Send text, if another tokenizer made the ids (LangChain's OpenAIEmbeddings: check_embedding_ctx_length=False)"
)
"""End of the message about ids outside the vocabulary."""

CLASSIFIER = replace(
    INFO,
    tasks=("classify", "token_classify", "embed", "token_embed"),
    default_task="classify",
    num_labels=3,
    labels=("no", "maybe", "yes"),
    activation="softmax",
)
"""A fake classifier of three labels."""

CROSS_ENCODER = replace(
    CLASSIFIER,
    num_labels=1,
    labels=("LABEL_0",),
    activation="sigmoid",
    score_types=("cross-encoder", "bi-encoder", "late-interaction"),
    reward="classify",
)
"""A fake classifier of one label, which scores pairs in every way and gives rewards."""

ENCODER = replace(INFO, score_types=("bi-encoder", "late-interaction"))
"""The fake model, which scores pairs by its vectors."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Begin with the same random numbers, whatever ran before: fixtures and tests that draw from the global ones."""
    import torch  # not above, as the process that hands out the tests reads this file and has no use for torch

    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():  # else `torch.manual_seed` would keep a stack for each kind of device, test by test
        torch.cuda.manual_seed_all(0)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector from looking at what is imported and collected, which lives to the end.

    What comes later is looked through a hundredth as often as by default: each time takes a tenth of a second.
    """
    young, middle, full = gc.get_threshold()
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(10 * young, middle, 10 * full)
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files by `LONGEST`."""
    places = {TESTS / f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def expected(ids: list[int], **params: Any) -> list[float]:
    """The fake model's vector for `ids`, as JSON reads it back."""
    vector: list[float] = fake_vector(Sequence(ids, params=PoolingParams(**params)), INFO.dimension).tolist()
    return vector


def classes(ids: list[int], info: ModelInfo = CLASSIFIER, **params: Any) -> list[float]:
    """A fake classifier's values for `ids`, as JSON reads them back."""
    values: list[float] = fake_classes(Sequence(ids, params=PoolingParams(**params)), info).tolist()
    return values


def error(client: TestClient, body: Any, path: str = "/v1/embeddings") -> dict[str, Any]:
    """The error of a refused request, after checking that its body is nothing but an error and repeats the status.

    Its message stands again as `detail` and as `message`.
    """
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(path, content=content, headers=JSON)
    assert list(answer.json()) == ["error", "detail", "message"], answer.text
    found: dict[str, Any] = answer.json()["error"]
    assert answer.json()["detail"] == answer.json()["message"] == found["message"]
    assert list(found) == ["message", "type", "param", "code"]
    assert found["code"] == answer.status_code
    return found


def usage(tokens: int) -> dict[str, Any]:
    """The tokens of a request in OpenAI's five fields, as an answer has them."""
    return {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }


def floats(values: Any) -> Any:
    """JSON numbers as the float32 values that they stand for."""
    return np.asarray(values, np.float32).tolist()


@dataclass
class Serve:
    """Starts applications, which live as long as the fixture. Ids are run as they are, which keeps tests short."""

    tokenizer: PreTrainedTokenizerBase
    stack: ExitStack = field(default_factory=ExitStack)

    def __call__(
        self,
        engine: Engine | None = None,
        *,
        info: ModelInfo = INFO,
        names: tuple[str, ...] = ("fake",),
        chat_template: str | None = None,
        pair_template: PairTemplate | None = None,
        auto_truncate: bool = False,
        clock: Callable[[], float] = time.monotonic,
        **options: Any,
    ) -> TestClient:
        tokenizer = copy(self.tokenizer)
        tokenizer.chat_template = chat_template
        engine = engine or FakeEngine(info)
        renderer = Renderer(tokenizer, engine.info, auto_truncate=auto_truncate)
        return self.of(Service(engine, renderer, names, pair_template), clock=clock, **options)

    def of(self, *services: Service, clock: Callable[[], float] = time.monotonic, **options: Any) -> TestClient:
        config = ServerConfig(**{"token_ids": "native", **options})
        client = TestClient(build([*services], config, clock=clock), raise_server_exceptions=False)
        return self.stack.enter_context(client)

    def several(self, **engines: Engine) -> TestClient:
        """One server of several models, by the names that requests call them."""
        return self.of(*(Service(e, Renderer(self.tokenizer, e.info), (name,)) for name, e in engines.items()))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's tokenizer: BERT, uncased."""
    from transformers import AutoTokenizer

    from cenote.models.hub import embedded

    return AutoTokenizer.from_pretrained(embedded())


@pytest.fixture
def serve(tokenizer: PreTrainedTokenizerBase) -> Iterator[Serve]:
    """Starts an application over a fake engine, or over the one given."""
    factory = Serve(tokenizer)
    with factory.stack:
        yield factory


@pytest.fixture(scope="module")
def serve_all(tokenizer: PreTrainedTokenizerBase) -> Iterator[Serve]:
    """Starts applications that the tests of a file share: they hold nothing once a request is answered."""
    factory = Serve(tokenizer)
    with factory.stack:
        yield factory


@pytest.fixture(scope="module")
def client(serve_all: Serve) -> TestClient:
    """An application with every option at its default."""
    return serve_all()
