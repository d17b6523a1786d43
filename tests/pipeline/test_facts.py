"""A model that is rendered for elsewhere renders as where it is: whatever a checkpoint says crosses with its facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from transformers import AutoModelForMaskedLM

from cenote.adapters import LoraModule
from cenote.config import EngineConfig, ModelConfig
from cenote.conventions import MessageTemplate, PairTemplate, Pictures, Sides
from cenote.core import LateChunkingParams, PoolingParams, Sequence
from cenote.engine.fake import FakeEngine
from cenote.engine.host import Host
from cenote.errors import CenoteError, ConfigError, EngineGone
from cenote.models.hub import embedded
from cenote.pipeline.facts import Facts
from cenote.pipeline.options import TextOptions
from cenote.pipeline.pairs import PairOptions
from cenote.pipeline.pipeline import Service
from cenote.pipeline.prompts import Prompts
from cenote.tokenizer import TokenizerSource
from tests import PATIENCE, checkpoints
from tests.conftest import INFO
from tests.engine.test_remote import until
from tests.models.families.test_multi_vector import METADATA, colbert
from tests.models.families.test_sparse import routed

TEXTS = ["the quick brown fox, and a dog.", "A", "Hello, MY name is", "fox " * 200, "水 naïve 🦊"]
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ extra }}"


def prompted(folder: Path) -> dict[str, Any]:
    checkpoints.bert(folder)
    checkpoints.write_modules(
        folder,
        checkpoints.pooling("mean", include_prompt=False),
        transformer={"max_seq_length": 24, "do_lower_case": True},
        settings={"prompts": {"query": "hello ", "document": "a dog "}, "default_prompt_name": "document"},
    )
    return {"auto_truncate": True, "prompts": {"mine": "my "}}


def marked(folder: Path) -> dict[str, Any]:
    colbert(folder, METADATA)
    return {}


def tabled(folder: Path) -> dict[str, Any]:
    masked = checkpoints.classifier(folder.parent / "masked", head="ForMaskedLM")
    assert AutoModelForMaskedLM.from_pretrained(masked)
    routed(masked, folder)
    return {}


def templated(folder: Path) -> dict[str, Any]:
    checkpoints.classifier(folder, num_labels=1)
    return {"chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}{{ instruction }}"}


def chatting(folder: Path) -> dict[str, Any]:
    checkpoints.bert(folder, tokenizer=checkpoints.wordpiece(truncation_side="left", chat_template=CHAT))
    return {"served_model_name": ("a", "b"), "max_model_len": 30}


def blocks(folder: Path) -> dict[str, Any]:
    checkpoints.bert(folder)
    (folder.parent / "texts.txt").write_text("hello\nthe lazy dog\nfox")
    return {
        "pooler_config": {"enable_chunked_processing": True, "max_embed_len": 100},
        "calibration": str(folder.parent / "texts.txt"),
    }


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "prompts, lower case": prompted,
    "markers, expansion, skip-list": marked,
    "queries by a table": tabled,
    "pairs by a template": templated,
    "chat template, left truncation": chatting,
    "blocks, calibration": blocks,
}
"""What writes a checkpoint to a folder and returns the options that it is opened with."""


@pytest.fixture(scope="module", params=[*KINDS, "the embedded model"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Service]]:
    """A model that is here, and the same one behind a socket."""
    root = tmp_path_factory.mktemp("facts")
    config = ModelConfig(batch_invariant=True)
    if request.param in KINDS:
        options = KINDS[request.param](root / "model")
        config = ModelConfig(model=str(root / "model"), batch_invariant=True, **options)
    here = Service.open(config, EngineConfig())
    assert here.facts is not None
    host = Host(here.engine, root / "engine.sock", here.facts.plain())
    there = Service.connect(str(root / "engine.sock"), patience=PATIENCE)
    yield here, there
    there.engine.close()
    host.close()


def test_a_front_does_not_go_on_with_an_engine_that_cuts_vectors_otherwise(tmp_path: Path) -> None:
    """Its answers would be shorter from one request to the next."""
    folder, path = checkpoints.bert(tmp_path / "model"), tmp_path / "engine.sock"

    def started(dimensions: int | None) -> Host:
        options = {"pooler_config": {"dimensions": dimensions}, "hf_overrides": {"is_matryoshka": True}}
        service = Service.open(ModelConfig.model_validate({"model": str(folder), **options}), EngineConfig())
        assert service.facts is not None
        return Host(service.engine, path, service.facts.plain())

    host = started(None)
    front = Service.connect(str(path), patience=PATIENCE)
    sequences = front.render(TEXTS[:1], "embed", PoolingParams(), TextOptions())
    assert front.engine.submit(sequences).result(PATIENCE)[0].data.shape == (checkpoints.HIDDEN,)
    host.close()
    with closing(started(8)):
        until(lambda: front.engine.healthy() or "restart this server" in refusal(front, sequences))
        assert "restart this server" in refusal(front, sequences)
    front.engine.close()


def refusal(service: Service, sequences: list[Sequence]) -> str:
    """Why an engine cannot be reached; empty if it answers."""
    try:
        service.engine.submit(sequences).result(PATIENCE)
    except EngineGone as error:
        return error.message
    return ""


def outcome(work: Callable[[], list[Sequence]]) -> Any:
    """The sequences that `work` renders, or its refusal."""
    try:
        sequences = work()
    except CenoteError as error:
        return type(error), vars(error)
    return [{field.name: getattr(sequence, field.name) for field in fields(Sequence)} for sequence in sequences]


def test_texts_are_rendered_alike(both: tuple[Service, Service]) -> None:
    seen = set()
    for task in ("embed", "token_embed", "sparse", "classify"):
        for input_type in (None, "query", "document", "mine"):
            for truncate in (None, -1, 5):
                for text in TEXTS:

                    def rendered(service: Service, arguments: Any = (task, input_type, truncate, text)) -> Any:
                        task, input_type, truncate, text = arguments
                        applied = service.renderer.prompts.choose(input_type=input_type)
                        return service.render([text], task, PoolingParams(), TextOptions(truncate, prompt=applied))

                    found = [outcome(lambda own=own: rendered(own)) for own in both]
                    assert found[0] == found[1]
                    seen.add(str(found[0]))
    assert len(seen) > 10


def test_pairs_messages_and_offsets_are_rendered_alike(both: tuple[Service, Service]) -> None:
    late = PoolingParams(late_chunking_params=LateChunkingParams(4))
    messages = [{"role": "user", "content": "hello"}]
    for work in (
        lambda own: own.pairs.render([("fox", "a dog")], "classify", PoolingParams(), TextOptions()),
        lambda own: own.pairs.render(
            [("fox", "dog " * 100)],
            "classify",
            PoolingParams(),
            TextOptions(-1),
            PairOptions(3, kwargs={"instruction": "now"}),
        ),
        lambda own: own.render(["the quick brown fox"], "token_embed", late, TextOptions()),
        lambda own: own.render([own.renderer.conversations.text(messages)], "embed", PoolingParams(), TextOptions(10)),
    ):
        assert outcome(lambda work=work: work(both[0])) == outcome(lambda work=work: work(both[1]))


def test_outputs_are_the_same(both: tuple[Service, Service]) -> None:
    here, there = both
    assert there.info == replace(here.info, columns=list(here.info.columns))
    sequences = here.render(TEXTS[:3], here.info.default_task, PoolingParams(), TextOptions(-1))
    pairs = zip(*(own.engine.submit(sequences).result(PATIENCE) for own in both), strict=True)
    for mine, theirs in pairs:
        assert np.array_equal(mine.data, theirs.data)
        assert (mine.indices is None) == (theirs.indices is None)


def test_names_and_ranges_are_the_same(both: tuple[Service, Service]) -> None:
    here, there = both
    assert there.names == here.names
    assert there.pair_template == here.pair_template
    assert (there.ranges is None) == (here.ranges is None)
    if here.ranges is not None and there.ranges is not None:
        assert np.array_equal(there.ranges.low_D, here.ranges.low_D)
        assert np.array_equal(there.ranges.high_D, here.ranges.high_D)


FULL = Facts(
    names=("a", "b"),
    tokenizer=TokenizerSource("/models/a", True, "{{ x }}", ("[Q] ", "[D] "), {"model_max_length": 8}, False),
    prompts=Prompts({"query": "q: "}, "query", True, ("retrieval",)),
    sides=Sides(
        {"query": 3},
        8,
        4,
        False,
        True,
        True,
        frozenset({7, 5, 1000}),
        ("query",),
        ("document",),
        True,
        {"query": 5},
        frozenset({8}),
    ),
    pair_template=PairTemplate(
        "{{ x }}", {"a": [1, {"b": None}]}, True, False, "be brief", ("a", "b"), True, "<", ">", True, False, (7,)
    ),
    messages=MessageTemplate("{{ x }}", {"a": [1]}, True, True, False),
    pictures=Pictures(
        "/models/a",
        "grid",
        9,
        "<picture>",
        "<placeholder>",
        4,
        16,
        2,
        "mrope",
        1,
        1024,
        MessageTemplate("{{ x }}"),
        56,
        "<|im_start|>",
        {"max_pixels": 512},
        4,
        True,
        "not today",
    ),
    special_tokens=False,
    lowercase=True,
    include_prompt=False,
    auto_truncate=True,
    cuts="only_first",
    lora_modules=(LoraModule("mine", "/adapters/mine"),),
    dimensions=8,
    ranges=((-0.5, 1e-40), (0.25, 1.0)),
)


def test_every_fact_crosses() -> None:
    bare = Facts(("a",), TokenizerSource("/models/b"))
    for kind, full, other in (
        (Facts, FULL, bare),
        (TokenizerSource, FULL.tokenizer, bare.tokenizer),
        (Prompts, FULL.prompts, bare.prompts),
        (Sides, FULL.sides, Sides()),
        (PairTemplate, FULL.pair_template, PairTemplate(None)),
        (MessageTemplate, FULL.messages, MessageTemplate(None)),
        (Pictures, FULL.pictures, Pictures("", "")),
    ):
        assert all(getattr(full, f.name) != getattr(other, f.name) for f in fields(kind)), f"FULL lacks one of {kind}"
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(FULL.plain()))
    assert Facts.of(plain) == FULL
    with pytest.raises(ValueError, match=r"the facts of a model cannot be read: .*lowercase"):
        Facts.of({**plain, "lowercase": "yes"})


def plain(**changes: Any) -> Any:
    return Facts(("fake",), TokenizerSource(str(embedded()), **changes)).plain()


def test_code_of_a_tokenizer_runs_only_where_it_is_allowed(tmp_path: Path) -> None:
    path = str(tmp_path / "engine.sock")
    host = Host(FakeEngine(INFO), path, plain(trust_remote_code=True))
    with pytest.raises(ConfigError, match="is read here only with --trust-remote-code"):
        Service.connect(path)
    connected = Service.connect(path, names=("mine",), trust_remote_code=True)
    assert connected.names == ("mine",)
    connected.engine.close()
    host.close()


@pytest.mark.parametrize("about", [None, {"names": ["a"]}, {"names": ["a"], "tokenizer": {"path": "/nowhere/at/all"}}])
def test_an_engine_that_cannot_be_rendered_for(tmp_path: Path, about: Any) -> None:
    path = str(tmp_path / "engine.sock")
    host = Host(FakeEngine(INFO), path, about)
    with pytest.raises(ConfigError, match=f"cannot render for the engine at {path}: "):
        Service.connect(path)
    host.close()
