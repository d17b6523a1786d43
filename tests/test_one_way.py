"""One way for each thing: options refused in the same words everywhere, additions that touch the places named here."""

from __future__ import annotations

import ast
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from starlette.testclient import TestClient

from cenote import LLM
from cenote.cli import main
from cenote.config import ServerConfig
from cenote.engine.fake import FakeEngine
from cenote.errors import BadRequest, CenoteError, CheckpointError, ConfigError
from cenote.pipeline.pipeline import Service
from cenote.pipeline.rendering import Renderer
from cenote.server.app import DIALECTS, build
from cenote.tasks import TASKS
from tests import checkpoints, pictured
from tests.conftest import INFO
from tests.pictured import bomb, noise, saved, url
from tests.test_layers import MODULES, name, parsed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedTokenizerBase

BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an unknown option": ({"max_model_length": 8}, ["--max-model-length", "8"]),
    "a dtype": ({"dtype": "float8"}, ["--dtype", "float8"]),
    "a runner": ({"runner": "generate"}, ["--runner", "generate"]),
    "a limit": ({"max_model_len": 0}, ["--max-model-len", "0"]),
    "a number": ({"max_num_seqs": "many"}, ["--max-num-seqs", "many"]),
    "an older task": ({"task": "encode"}, ["--task", "encode"]),
    "a conversion against a task": (
        {"task": "embed", "convert": "classify"},
        ["--task", "embed", "--convert", "classify"],
    ),
    "two devices": ({"tensor_parallel_size": "2"}, ["--tensor-parallel-size", "2"]),
    "a pooling type": ({"pooler_config": '{"pooling_type": "MOST"}'}, ["--pooler-config", '{"pooling_type": "MOST"}']),
    "a renamed field": ({"pooler_config": '{"normalize": true}'}, ["--pooler-config", '{"normalize": true}']),
    "no JSON": ({"pooler_config": "{"}, ["--pooler-config", "{"]),
    "a missing folder": ({"model": "/nowhere/at/all"}, ["--model", "/nowhere/at/all"]),
    "a quantisation": ({"quantization": "int3"}, ["--quantization", "int3"]),
    "a template that is no file": ({"chat_template": "/nowhere.jinja"}, ["--chat-template", "/nowhere.jinja"]),
    "a default prompt": ({"default_prompt_name": "nobody"}, ["--default-prompt-name", "nobody"]),
    "ranges": ({"calibration": "/nowhere.json"}, ["--calibration", "/nowhere.json"]),
    "a plugin": ({"io_processor_plugin": "nobody"}, ["--io-processor-plugin", "nobody"]),
    "steps of a model without": (
        {"pooler_config": '{"pooling_type": "STEP"}'},
        ["--pooler-config", '{"pooling_type": "STEP"}'],
    ),
    "blocks of a model without": (
        {"pooler_config": '{"max_embed_len": 4096}'},
        ["--pooler-config", '{"max_embed_len": 4096}'],
    ),
    "an adapter without a path": ({"lora_modules": "law"}, ["--lora-modules", "law"]),
    "a missing adapter": ({"lora_modules": "law=/nowhere/at/all"}, ["--lora-modules", "law=/nowhere/at/all"]),
    "two adapters of one name": (
        {"lora_modules": ["law=/one", "law=/two"]},
        ["--lora-modules", "law=/one", "law=/two"],
    ),
    "a number of pictures": (
        {"limit_mm_per_prompt": {"image": -1}},
        ["--limit-mm-per-prompt", '{"image": -1}'],
    ),
    "a kind of pictures": (
        {"limit_mm_per_prompt": {"images": 1}},
        ["--limit-mm-per-prompt", '{"images": 1}'],
    ),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.bert(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize(("options", "flags"), BAD.values(), ids=BAD)
def test_bad_options_are_refused_in_the_same_words(
    tiny: str, options: dict[str, Any], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError) as refused:
        LLM(**{"model": tiny, **options})
    models = [] if "model" in options else [tiny]
    assert main(["serve", *models, "--port", "0", *flags]) == 2
    told = capsys.readouterr().err.splitlines()[-1].removeprefix("cenote: ")
    if "option" in options or options.keys() == {"max_model_length"}:  # a flag is spelled as a flag
        assert (str(refused.value), told) == (
            "unknown option 'max_model_length'; did you mean 'max_model_len'?",
            "unknown flag '--max-model-length'; did you mean '--max-model-len'?",
        )
    else:
        assert str(refused.value) == told
    assert isinstance(refused.value, (ConfigError, CheckpointError))


PROCESSED = ({"patch_size": 7}, {"max_pixels": -1}, {"size": {"height": 3}})


@pytest.mark.parametrize("kwargs", PROCESSED, ids=str)
def test_bad_options_of_pictures_are_refused_in_the_same_words(
    pages: LLM, kwargs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(pages.info.report.source)
    with pytest.raises(ConfigError) as refused:
        LLM(folder, mm_processor_kwargs=kwargs)
    assert main(["serve", folder, "--port", "0", "--mm-processor-kwargs", json.dumps(kwargs)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"cenote: {refused.value}"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A model that reads pages."""
    with LLM(str(pictured.qwen_vl(tmp_path_factory.mktemp("one way") / "pages", "qwen3_vl"))) as llm:
        yield llm


@pytest.fixture(scope="module")
def client(pages: LLM) -> Iterator[TestClient]:
    """A server of the same folder; a service of its own, as a server allows fewer files and hosts to be read."""
    with LLM(str(pages.info.report.source)) as llm:
        yield TestClient(build([llm._service], ServerConfig()))


def test_a_name_is_a_file_for_a_library_alone(pages: LLM, client: TestClient) -> None:
    with pytest.raises(BadRequest, match="the file of a picture is not there"):
        pages.embed(prompt("page.png"))
    answer = client.post("/v1/embeddings", json=conversation("page.png"))
    assert answer.json()["error"]["message"].startswith("got 'page.png' for a picture; expected a URL: data:image/png")


PAGE = noise(90, 130)
SOURCES = {
    "no picture": url(b"<svg/>"),
    "no base64": "data:image/png;base64,@@@",
    "half a file": url(saved(noise(300, 300))[:5000]),
    "a strip": url(noise(1, 400)),
    "too many pixels": url(bomb(14_000)),
    "another scheme": "ftp://host/page.png",
}
ARGUMENTS: tuple[dict[str, Any], ...] = (*PROCESSED, {"max_pixels": 1 << 40}, {"min_pixels": "many"})
PARTS: dict[str, Any] = {
    "a picture with a name": {"type": "image_url", "image_url": {"url": url(PAGE)}, "uuid": "x"},
    "a video": {"type": "video_url", "video_url": {"url": "x"}},
    "a part without a picture": {"type": "image_url"},
}


def conversation(*sources: str, **others: Any) -> dict[str, Any]:
    """A body of pictures."""
    parts = [{"type": "image_url", "image_url": {"url": source}} for source in sources]
    return {"messages": [{"role": "user", "content": parts}], **others}


def prompt(*sources: Any, **others: Any) -> dict[str, Any]:
    """A prompt of pictures, for `LLM`."""
    return {"prompt": pictured.PICTURE * len(sources), "multi_modal_data": {"image": [*sources]}, **others}


PICTURED: dict[str, tuple[Callable[[LLM], Any], str, dict[str, Any]]] = {
    **{
        name: (lambda m, source=source: m.embed(prompt(source)), "/v1/embeddings", conversation(source))
        for name, source in SOURCES.items()
    },
    **{
        f"the argument {kwargs}": (
            lambda m, kwargs=kwargs: m.embed(prompt(url(PAGE), mm_processor_kwargs=kwargs)),
            "/v1/embeddings",
            conversation(url(PAGE), mm_processor_kwargs=kwargs),
        )
        for kwargs in ARGUMENTS
    },
    **{
        f"{name}, in a query": (
            lambda m, part=part: m.score({"content": [part]}, "b"),
            "/score",
            {"queries": {"content": [part]}, "documents": "b"},
        )
        for name, part in PARTS.items()
    },
    "too many": (lambda m: m.embed(prompt(*[url(PAGE)] * 17)), "/v1/embeddings", conversation(*[url(PAGE)] * 17)),
    "a task that is not offered": (
        lambda m: m.classify(prompt(url(PAGE))),
        "/classify",
        conversation(url(PAGE)),
    ),
}


@pytest.mark.parametrize(("offline", "path", "body"), PICTURED.values(), ids=PICTURED)
def test_bad_pictures_are_refused_in_the_same_words(
    pages: LLM, client: TestClient, offline: Callable[[LLM], Any], path: str, body: dict[str, Any]
) -> None:
    with pytest.raises(CenoteError) as refused:
        offline(pages)
    answer = client.post(path, json=body)
    error = answer.json()["error"]
    assert (error["message"], error["code"]) == (refused.value.message, refused.value.status)
    assert error["param"] == ("queries" if "queries" in body else refused.value.param)


PACKAGE = {
    "tasks.py": """
from cenote.tasks import TASKS, Task

TASKS["length"] = Task("length", "sequence", (), "the number of tokens [1] of each input")
""",
    "operations.py": """
from cenote.core import PoolingParams
from cenote.pipeline import operations


def lengths(service, prompts, options):
    job = operations.encode(service, prompts, "length", PoolingParams(), options)
    return job.then(lambda outputs: [int(output.data[0]) for output in outputs])
""",
    "dialect.py": """
from cenote.server.routes import Dialect, Route
from cenote.server.wire.encoding import json_response
from cenote.server.wire.fields import Many, Shared

from additions.operations import lengths


class LengthRequest(Shared):
    texts: Many[str]


async def length(serving, request, body):
    service = serving.find(body.model)

    def make():
        return lengths(service, body.texts, body.text_options()).then(lambda counts: json_response({"lengths": counts}))

    return await serving.answer(request, service, body, make)


DIALECT = Dialect("Lengths", (Route("/lengths", length, LengthRequest),), lambda fault: {"no": fault.message})
""",
}
"""A task is a row, an operation and a route; a dialect is a file."""


@pytest.fixture
def additions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with a task and a dialect of its own; it is gone after the test."""
    folder = tmp_path / "additions"
    folder.mkdir()
    for file, text in {"__init__.py": "", **PACKAGE}.items():
        (folder / file).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    TASKS.pop("length", None)
    for module in [module for module in sys.modules if module.partition(".")[0] == "additions"]:
        del sys.modules[module]


class Counting(FakeEngine):
    """Answers the task of the package: how many ids a sequence has."""

    def _row(self, sequence: Any) -> Any:
        import numpy as np

        return np.array([len(sequence)], np.float32) if sequence.task == "length" else super()._row(sequence)


@pytest.mark.usefixtures("additions")
def test_a_task_and_a_dialect_are_added_from_outside(tokenizer: PreTrainedTokenizerBase) -> None:
    from dataclasses import replace

    import_module("additions.tasks")
    dialect = import_module("additions.dialect").DIALECT
    info = replace(INFO, tasks=(*INFO.tasks, "length"))
    service = Service(Counting(info), Renderer(tokenizer, info), ("fake",))
    client = TestClient(build([service], ServerConfig(), (*DIALECTS, dialect)))
    assert client.post("/lengths", json={"texts": ["one", "one two"]}).json() == {"lengths": [3, 4]}
    refused = client.post("/lengths", json={"texts": ["one"], "model": "other"})
    assert (refused.status_code, refused.json()) == (404, {"no": "The model `other` does not exist."})
    pooled = client.post("/pooling", json={"input": "one", "task": "length"})
    assert pooled.json()["data"][0]["data"] == [3.0], "and the task is offered by the routes that take any"


def test_random_ids_are_drawn_in_one_module() -> None:
    draws = re.compile(r"\b(?:randint|randperm|default_rng|torch\.Generator|multinomial)\(")
    drawing = {name(path) for path in MODULES if draws.search(path.read_text())}
    assert {module for module in drawing if module.startswith("models.")} == {"models.probe"}


def test_no_list_is_created_empty_and_filled_in_a_closure() -> None:
    """An answer that a closure leaves in a list of its surroundings is what a `Job` is for."""
    faults = []
    for path in MODULES:
        for function in ast.walk(parsed(path)):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                faults += [f"{name(path)}: {function.name} fills {filled}" for filled in _filled_in_closures(function)]
    assert not faults


@pytest.mark.parametrize(
    ("code", "filled"),
    [
        ("def f():\n  kept = []\n  def g():\n    kept.append(1)\n  return g, kept", {"kept"}),
        ("def f():\n  with h:\n    kept = []\n  async def g():\n    kept.append(1)\n  return g, kept", {"kept"}),
        ("def f():\n  def g():\n    kept = []\n    kept.append(1)\n  return g", set()),
    ],
    ids=["a function", "a coroutine", "its own list"],
)
def test_such_a_list_would_be_found(code: str, filled: set[str]) -> None:
    (function,) = ast.parse(code).body
    assert isinstance(function, ast.FunctionDef)
    assert _filled_in_closures(function) == filled


def _filled_in_closures(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Return the names of lists that `function` creates empty and one of its inner functions appends to."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inner = [node for node in ast.walk(function) if isinstance(node, kinds) and node is not function]
    within = {statement for node in inner for statement in ast.walk(node)}
    empty: set[str] = set()
    for statement in {*ast.walk(function)} - within:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        if isinstance(value, ast.List) and not value.elts:
            empty |= {target.id for target in targets if isinstance(target, ast.Name)}
    calls = [call for node in inner for call in ast.walk(node) if isinstance(call, ast.Call)]
    methods = [call.func for call in calls if isinstance(call.func, ast.Attribute)]
    return {
        method.value.id
        for method in methods
        if method.attr in ("append", "extend") and isinstance(method.value, ast.Name) and method.value.id in empty
    }
