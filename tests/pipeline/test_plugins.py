"""IO-processor plugins: entry points, the interface, answers, faults, online and offline; the example and the page."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import runpy
import shlex
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydantic
import pytest
import requests
import torch
from starlette.testclient import TestClient
from transformers import PreTrainedTokenizerBase

from cenote import LLM, IOProcessor, PoolingParams
from cenote.cli import main
from cenote.config import ServerConfig
from cenote.engine.fake import FakeEngine
from cenote.errors import BadRequest, CenoteError, ConfigError, PluginFailed
from cenote.outputs import PoolingRequestOutput
from cenote.pipeline import operations, plugins
from cenote.pipeline.pipeline import Service
from cenote.pipeline.plugins import Plugin, Tokenizing
from cenote.pipeline.rendering import Renderer
from cenote.server.app import build
from tests import checkpoints
from tests.conftest import INFO, expected, floats
from tests.server.test_process import PATIENCE, Process

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "plugin"
CENOTE, VLLM = plugins.GROUPS
CLS, SEP, HELLO, WORLD, A = 101, 102, 7592, 2088, 1037

Install = Callable[..., Path]
Start = Callable[..., TestClient]


class Echo(IOProcessor[Any, Any]):
    """Gives the model `data["prompts"]`, and answers with all that came back."""

    def pre_process(self, prompt: Any, request_id: str | None = None, **kwargs: Any) -> Any:
        return prompt["prompts"]

    def post_process(self, outputs: Any, request_id: str | None = None, **kwargs: Any) -> Any:
        return {
            "ids": [output.prompt_token_ids for output in outputs],
            "values": [output.outputs.data for output in outputs],
            "kwargs": kwargs,
        }


class Counted(pydantic.BaseModel):
    """Input of `Vectors`."""

    texts: list[str]
    factor: float = 1.0


class Answered(pydantic.BaseModel):
    """Output of `Vectors`."""

    vectors: list[list[float]]
    factor: float
    tokens: int


class Vectors:
    """As plugins for vLLM are written: no base, state by request id, parameters changed in place."""

    def __init__(self, vllm_config: Any, renderer: Any) -> None:
        self.requests: dict[str, Counted] = {}
        self.longest = vllm_config.model_config.max_model_len
        self.renderer = renderer

    def parse_data(self, data: object) -> Counted:
        if not isinstance(data, dict):
            raise TypeError("request data should be a dictionary")
        return Counted(**data)

    def merge_pooling_params(self, params: Any = None) -> Any:
        params = params or SimpleNamespace(use_activation=None)
        params.task = "embed"
        params.skip_reading_prefix_cache = True
        return params

    def pre_process(self, prompt: Counted, request_id: str | None = None, **kwargs: Any) -> Any:
        assert request_id is not None
        assert request_id not in self.requests, "request_id duplicated"
        self.requests[request_id] = prompt
        tokenizer = self.renderer.get_tokenizer()
        return [
            {"prompt_token_ids": tokenizer(text, truncation=True, max_length=self.longest)["input_ids"]}
            for text in prompt.texts
        ]

    def post_process(self, model_output: Any, request_id: str | None = None, **kwargs: Any) -> Answered:
        asked = self.requests.pop(request_id or "")
        return Answered(
            vectors=[[x * asked.factor for x in output.outputs.data.tolist()] for output in model_output],
            factor=asked.factor,
            tokens=sum(len(output.prompt_token_ids) for output in model_output),
        )


def vectors() -> str:
    """An entry as vLLM's plugins have it: the qualified name of a class."""
    return "tests.pipeline.test_plugins.Vectors"


class Late:
    """Has coroutines only."""

    def __init__(self, config: Any, renderer: Any) -> None:
        pass

    async def pre_process_async(self, prompt: Any, request_id: str | None = None, **kwargs: Any) -> list[str]:
        await asyncio.sleep(0)
        return [text + " world" for text in prompt]

    async def post_process_async(self, model_output: Any, request_id: str | None = None, **kwargs: Any) -> Any:
        return [(i, output.prompt_token_ids) async for i, output in model_output]


ERRORS: dict[str, BaseException] = {
    "ValueError": ValueError("no"),
    "TypeError": TypeError("no"),
    "KeyError": KeyError("no"),
    "AttributeError": AttributeError("no"),
    "BadRequest": BadRequest("no"),
    "RuntimeError": RuntimeError("no"),
    "AssertionError": AssertionError("no"),
    "SystemExit": SystemExit("no"),
    "empty": ValueError(),
}


class Raising(Echo):
    """Raises what the request says, where it says."""

    def fall(self, where: str, data: Any) -> None:
        if where == data.get("where"):
            raise ERRORS[data["error"]]

    def parse_data(self, data: Any) -> Any:
        self.fall("parse_data", data)
        self.asked = data
        return data

    def merge_pooling_params(self, params: PoolingParams | None = None) -> PoolingParams:
        self.fall("merge_pooling_params", self.asked)
        return PoolingParams()

    def pre_process(self, prompt: Any, request_id: str | None = None, **kwargs: Any) -> Any:
        self.fall("pre_process", prompt)
        return "hello"

    def post_process(
        self, outputs: Any, request_id: str | None = None, *, data: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        self.fall("post_process", data)
        return {"ids": outputs[0].prompt_token_ids}


def package(site: Path, name: str, entries: dict[str, dict[str, str]], source: str | None = None) -> None:
    """Put a distribution into `site`, as an installer would: its metadata and, with `source`, a module."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    sections = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in own.items()) for group, own in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(sections))
    if source is not None:
        (site / f"{name}.py").write_text(source)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, for packages. Modules imported by the test are forgotten after it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    known = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - known:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The plugins of this file and those of the example and the page, installed for this process and its children."""
    site = tmp_path_factory.mktemp("site")
    package(
        site,
        "of-tests",
        {
            VLLM: {"vectors": "tests.pipeline.test_plugins:vectors"},
            CENOTE: {"echo": "tests.pipeline.test_plugins:Echo"},
        },
    )
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    package(site, project["name"], project["entry-points"])
    page = (ROOT / "docs" / "plugins.md").read_text()
    (entries,) = (tomllib.loads(block)["project"]["entry-points"] for block in fenced(page, "toml"))
    package(site, "nearest", entries, fenced(page, "python")[0])
    with pytest.MonkeyPatch.context() as patch:
        for path in (str(EXAMPLE), str(site)):
            patch.syspath_prepend(path)
        patch.setenv("PYTHONPATH", os.pathsep.join([*filter(None, sys.path), str(ROOT)]))
        yield site


def fenced(page: str, language: str) -> list[str]:
    """The blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.fixture
def renderer(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    return Renderer(tokenizer, INFO)


@pytest.fixture
def start(renderer: Renderer) -> Iterator[Start]:
    """Starts applications over a fake engine, with a plugin."""
    with ExitStack() as stack:

        def run(kind: Any, *, engine: FakeEngine | None = None, **options: Any) -> TestClient:
            plugin = kind
            if isinstance(kind, type):
                model = SimpleNamespace(max_model_len=INFO.max_model_len)
                plugin = Plugin("mine", kind(SimpleNamespace(model_config=model), Tokenizing(renderer.tokenizer)))
            service = Service(engine or FakeEngine(INFO), renderer, ("fake",), plugin=plugin)
            client = TestClient(
                build([service], ServerConfig(token_ids="native", **options)), raise_server_exceptions=False
            )
            return stack.enter_context(client)

        yield run


def load(name: str | None, renderer: Renderer, **config: Any) -> Plugin | None:
    """What start-up does, for a checkpoint with this config."""
    checkpoint: Any = SimpleNamespace(name="some/model", config=SimpleNamespace(**config))
    return plugins.load(name, checkpoint, renderer)


def post(client: TestClient, data: Any, **fields: Any) -> Any:
    answer = client.post("/pooling", json={"data": data, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def refused(client: TestClient, body: dict[str, Any], status: int = 400) -> tuple[str, str | None]:
    """Message and parameter of an error."""
    answer = client.post("/pooling", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == status
    return error["message"], error["param"]


# --- installed packages --------------------------------------------------------------------------------------------

MODULE = """
class Mine:
    def __init__(self, config, renderer):
        self.config, self.renderer = config, renderer
    def pre_process(self, prompt, request_id=None, **kwargs):
        return prompt
    def post_process(self, outputs, request_id=None, **kwargs):
        return "{name}"
def kind():
    return Mine
def name():
    return "{name}.Mine"
def colon():
    return "{name}:Mine"
def declines():
    return None
def falls():
    raise RuntimeError("boom")
class Falls(Mine):
    def __init__(self, config, renderer):
        raise OSError("no disk")
class Half:
    def pre_process(self, prompt, request_id=None): ...
class Neither: ...
def number():
    return 5
"""


@pytest.mark.parametrize("group", [CENOTE, VLLM])
@pytest.mark.parametrize("attribute", ["Mine", "kind", "name", "colon"])
def test_entry_points(site: Path, renderer: Renderer, group: str, attribute: str) -> None:
    package(site, "of_one", {group: {"mine": f"of_one:{attribute}"}}, MODULE.format(name="of_one"))
    plugin = load("mine", renderer)
    assert plugin is not None
    assert plugin.name == "mine"
    assert type(plugin.processor).__module__ == "of_one"
    assert plugin.processor.post_process([]) == "of_one"


@pytest.mark.parametrize(("entry", "wins"), [("Mine", "first"), ("declines", "second")])
def test_the_own_group_wins_unless_it_declines(site: Path, renderer: Renderer, entry: str, wins: str) -> None:
    package(site, "second", {VLLM: {"mine": "second:Mine"}}, MODULE.format(name="second"))
    package(site, "first", {CENOTE: {"mine": f"first:{entry}"}}, MODULE.format(name="first"))
    plugin = load("mine", renderer)
    assert plugin is not None
    assert type(plugin.processor).__module__ == wins


def test_what_a_plugin_is_made_with(site: Path, renderer: Renderer) -> None:
    package(site, "of_one", {CENOTE: {"mine": "of_one:Mine"}}, MODULE.format(name="of_one"))
    plugin = load("mine", renderer, hidden_size=7)
    assert plugin is not None
    model = plugin.processor.config.model_config
    assert (model.model, model.hf_config.hidden_size, model.max_model_len) == ("some/model", 7, INFO.max_model_len)
    tokenizer = plugin.processor.renderer.tokenizer
    assert plugin.processor.renderer.get_tokenizer() is tokenizer
    assert tokenizer("hello world", truncation=True, max_length=3)["input_ids"] == [CLS, HELLO, SEP]
    assert renderer.tokenize("hello world hello") == [CLS, HELLO, WORLD, HELLO, SEP], "it is a copy"


def test_none_is_named(renderer: Renderer) -> None:
    assert load(None, renderer) is None
    assert load(None, renderer, io_processor_plugin=None) is None


def test_the_config_names_one_and_the_option_wins(renderer: Renderer) -> None:
    by_config = load(None, renderer, io_processor_plugin="echo")
    by_option = load("vectors", renderer, io_processor_plugin="echo")
    assert by_config is not None
    assert by_option is not None
    assert (type(by_config.processor), type(by_option.processor)) == (Echo, Vectors)


START: dict[str, tuple[str, str]] = {
    "declines": ("declines", "the plugin 'mine' declines to be loaded"),
    "no class": ("number", "the plugin 'mine' must be a class, got 5"),
    "half a class": ("Half", "the plugin 'mine': Half has no post_process"),
    "wrong class": ("Neither", "the plugin 'mine': Neither has no pre_process and no post_process"),
    "entry falls": ("falls", "cannot load the plugin 'mine': RuntimeError: boom"),
    "constructor falls": ("Falls", "cannot load the plugin 'mine': OSError: no disk"),
    "no attribute": ("Nothing", "cannot load the plugin 'mine': AttributeError: module 'of_one' has no attribute 'No"),
}  # fmt: skip


@pytest.mark.parametrize(("attribute", "message"), START.values(), ids=START)
def test_a_plugin_that_does_not_load(site: Path, renderer: Renderer, attribute: str, message: str) -> None:
    package(site, "of_one", {CENOTE: {"mine": f"of_one:{attribute}"}}, MODULE.format(name="of_one"))
    with pytest.raises(ConfigError) as caught:
        load("mine", renderer)
    assert caught.value.message.removesuffix("thing'") == message


def test_a_plugin_whose_module_is_missing(site: Path, renderer: Renderer) -> None:
    package(site, "of_one", {VLLM: {"mine": "vllm_is_not_here:Mine"}})
    with pytest.raises(
        ConfigError, match="cannot load the plugin 'mine': ModuleNotFoundError: No module named 'vllm_is"
    ):
        load("mine", renderer)


def test_a_plugin_that_is_not_installed(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In vLLM's words."""
    with pytest.raises(ConfigError) as caught:
        load(None, renderer, io_processor_plugin="mien")
    message, _, names = caught.value.message.partition(" Available plugins: ")
    assert message == "The model requires the 'mien' IO Processor plugin but it is not installed."
    assert {"echo", "vectors", "nearest", "semantic-chunks"} <= set(json.loads(names.replace("'", '"')))
    monkeypatch.setattr(plugins, "entry_points", lambda group: [])
    with pytest.raises(ConfigError, match=r"^No IOProcessor plugins installed but one is required \(mine\)\.$"):
        load("mine", renderer)


# --- prompts, task, parameters -------------------------------------------------------------------------------------

HELLO_IDS, WORLD_IDS = [CLS, HELLO, SEP], [CLS, WORLD, SEP]
PROMPTS: dict[str, tuple[Any, list[list[int]]]] = {
    "text": ("hello", [HELLO_IDS]),
    "ids": ([5, 6], [[5, 6]]),
    "mapping": ({"prompt": "hello"}, [HELLO_IDS]),
    "ids in a mapping": ({"prompt_token_ids": [5, 6]}, [[5, 6]]),
    "pair": ({"text": "hello", "text_pair": "world"}, [[CLS, HELLO, SEP, WORLD, SEP]]),
    "list": (["hello", "world"], [HELLO_IDS, WORLD_IDS]),
    "tuple": (("hello", "world"), [HELLO_IDS, WORLD_IDS]),
    "mixed": (["hello", [5, 6], {"prompt": "world"}], [HELLO_IDS, [5, 6], WORLD_IDS]),
    "lists of ids": ([[5, 6], [7]], [[5, 6], [7]]),
    "array": (np.array([5, 6]), [[5, 6]]),
    "list of arrays": ([np.array([5, 6])], [[5, 6]]),
}


class Fixed(Echo):
    """Gives the model a prompt that JSON has no form for."""

    prompts: Any = None

    def pre_process(self, prompt: Any, request_id: str | None = None, **kwargs: Any) -> Any:
        return self.prompts


@pytest.mark.parametrize(("prompts", "ids"), PROMPTS.values(), ids=PROMPTS)
def test_prompts(start: Start, prompts: Any, ids: list[list[int]]) -> None:
    answer = post(start(type("Own", (Fixed,), {"prompts": prompts})), {})
    assert answer["ids"] == ids
    assert floats(answer["values"]) == [expected(one) for one in ids]


@pytest.mark.parametrize("prompts", [[], ()])
def test_no_prompts(start: Start, prompts: Any) -> None:
    client = start(type("Own", (Fixed,), {"prompts": prompts}))
    assert refused(client, {"data": {}}) == ("You must pass at least one prompt", "input")


TOKENS = [expected([token]) for token in HELLO_IDS]
PARAMS: dict[str, tuple[Any, Any]] = {
    "none": (None, expected(HELLO_IDS)),
    "empty": (PoolingParams(), expected(HELLO_IDS)),
    "plugin": (PoolingParams(task="plugin"), expected(HELLO_IDS)),
    "task": (PoolingParams(task="token_embed"), TOKENS),
    "parameters": (PoolingParams(task="embed", use_activation=False), expected(HELLO_IDS, use_activation=False)),
    "other class, plugin": (SimpleNamespace(task="plugin"), expected(HELLO_IDS)),
    "other class, no task": (SimpleNamespace(use_activation=False), expected(HELLO_IDS, use_activation=False)),
    "other class, task": (SimpleNamespace(task="token_embed", output_kind=3), TOKENS),
}


@pytest.mark.parametrize(("params", "value"), PARAMS.values(), ids=PARAMS)
def test_parameters(start: Start, params: Any, value: Any) -> None:
    kind = type("Own", (Echo,), {"merge_pooling_params": lambda self, params_=None: params})
    assert floats(post(start(kind), {"prompts": "hello"})["values"]) == [value]


def test_parameters_that_the_model_does_not_take(start: Start) -> None:
    params: dict[str, Any] = {"value": SimpleNamespace(task="classify")}
    client = start(type("Own", (Echo,), {"merge_pooling_params": lambda self, params_=None: params["value"]}))
    message, _ = refused(client, {"data": {"prompts": "hello"}}, 500)
    assert message.startswith("the plugin 'mine' failed: Unsupported task: 'classify' Supported tasks: ('embed', 'tok")
    params["value"] = SimpleNamespace(dimensions="many")
    message, _ = refused(client, {"data": {"prompts": "hello"}}, 500)
    assert message == "the plugin 'mine' failed: dimensions must be an integer, got 'many'"


def test_post_process_gets_the_parsed_data_if_it_wants_it(start: Start) -> None:
    class Wants(Echo):
        def parse_data(self, data: Any) -> Any:
            return {"prompts": data["prompts"], "parsed": True}

        def post_process(self, outputs: Any, request_id: str | None = None, *, data: Any = None, **kwargs: Any) -> Any:
            return [data, kwargs]

    class First(Echo):
        def post_process(self, data: Any, request_id: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
            return [len(data), kwargs]

    assert post(start(Wants), {"prompts": "hello"}) == [{"prompts": "hello", "parsed": True}, {}]
    assert post(start(First), {"prompts": ["hello", "world"]}) == [2, {}]
    assert post(start(Echo), {"prompts": "hello"})["kwargs"] == {}


def test_a_class_as_for_vllm(start: Start) -> None:
    client = start(Vectors)
    answer = post(client, {"texts": ["hello", "world"], "factor": 2}, task="plugin", model="fake")
    assert answer.keys() == {"vectors", "factor", "tokens"}
    assert floats(answer["vectors"]) == (2 * np.array([expected(HELLO_IDS), expected(WORLD_IDS)])).tolist()
    assert (answer["factor"], answer["tokens"]) == (2.0, 6)
    message, param = refused(client, {"data": ["hello"]})
    assert message == "the plugin 'mine' refuses the data: TypeError: request data should be a dictionary"
    assert param == "data"
    message, _ = refused(client, {"data": {"texts": 5}})
    assert message.startswith("the plugin 'mine' refuses the data: 1 validation error for Counted\ntexts\n")


def test_requests_with_one_id_do_not_mix(start: Start) -> None:
    """Clients choose ids; a plugin that keeps state by them must not be misled."""
    engine = FakeEngine(INFO, held=True)
    client = start(Vectors, engine=engine)

    def ask(factor: int) -> Any:
        body = {"data": {"texts": ["hello"], "factor": factor}}
        return client.post("/pooling", json=body, headers={"X-Request-Id": "same"}).json()

    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask, factor) for factor in (2, 3)]
        deadline = time.monotonic() + PATIENCE
        while len(engine.submitted) < 2 and not any(answer.done() for answer in answers):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        engine.held = False
        engine.release()
        found = [answer.result(PATIENCE) for answer in answers]
    assert [answer["data"]["factor"] for answer in found] == [2, 3]
    assert {answer["request_id"] for answer in found} == {"pooling-same"}


@pytest.mark.parametrize("mixed", [False, True])
def test_coroutines(start: Start, mixed: bool) -> None:
    class Mixed(Late):
        async def pre_process(self, prompt: Any, request_id: str | None = None) -> list[str]:
            return ["hello" for _ in prompt]

        def post_process(self, outputs: Any, request_id: str | None = None) -> list[int]:
            return [len(output.prompt_token_ids) for output in outputs]

    answer = post(start(Mixed if mixed else Late), ["hello", "world"])
    whole = [[0, [CLS, HELLO, WORLD, SEP]], [1, [CLS, WORLD, WORLD, SEP]]]
    assert answer == ([3, 3] if mixed else whole)


# --- requests ------------------------------------------------------------------------------------------------------


def test_the_answer_beside_the_data(start: Start) -> None:
    client = start(Echo)
    body = {"data": {"prompts": "hello"}, "request_id": "mine"}
    answer = client.post("/pooling", json=body).json()
    assert answer.keys() == {"request_id", "created_at", "data"}
    assert answer["request_id"] == "pooling-mine"
    assert isinstance(answer["created_at"], int)
    answer = client.post("/pooling", json=body, headers={"X-Request-Id": "theirs"}).json()
    assert answer["request_id"] == "pooling-theirs"


def test_fields_about_tokens_hold(start: Start) -> None:
    client = start(Echo)
    data = {"prompts": "hello world hello"}
    assert post(client, data, truncate_prompt_tokens=3)["ids"] == [HELLO_IDS]
    assert post(client, data, add_special_tokens=False)["ids"] == [[HELLO, WORLD, HELLO]]
    message, param = refused(client, {"data": {"prompts": "hello " * 70}})
    assert message.startswith("This model's maximum context length is 64 tokens.")
    assert param == "input_tokens"


REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "other task": ({"data": 1, "task": "embed"}, "The 'data' field is only supported for the 'plugin' pooling task."),
    "and input": ({"data": 1, "input": "a"}, "a request for a plugin has `data`, and neither `input` nor `messages`"),
    "input alone": (
        {"task": "plugin", "input": "a"},
        "a request for a plugin has `data`, and neither `input` nor `messages`",
    ),
    "no data": ({"task": "plugin"}, "The 'data' field is what the plugin reads, and it cannot be None."),
    "null": ({"task": "plugin", "data": None}, "The 'data' field is what the plugin reads, and it cannot be None."),
}


@pytest.mark.parametrize(("body", "message"), REQUESTS.values(), ids=REQUESTS)
def test_requests_that_are_refused(start: Start, body: dict[str, Any], message: str) -> None:
    assert refused(start(Echo), body) == (message, "data")


def test_other_refusals(start: Start) -> None:
    client = start(Echo, max_client_batch_size=2)
    assert len(post(client, {"prompts": ["a", "a"]})["ids"]) == 2
    message, param = refused(client, {"data": {"prompts": ["a"] * 3}})
    assert (message, param) == ("the request has 3 inputs; at most 2 are allowed", "data")
    message, param = refused(client, {"data": {"prompts": "a"}, "mm_processor_kwargs": {"a": 1}})
    assert param == "mm_processor_kwargs"
    assert refused(client, {"data": {"prompts": "a"}, "model": "other"}, 404)[0] == "The model `other` does not exist."


def test_other_tasks_go_on(start: Start) -> None:
    answer = start(Echo).post("/pooling", json={"input": "hello"}).json()
    assert floats(answer["data"][0]["data"]) == expected(HELLO_IDS)


# --- answers -------------------------------------------------------------------------------------------------------


@dataclass
class Point:
    """An answer."""

    x: float
    vector: Any


class Model(pydantic.BaseModel):
    """An answer."""

    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)

    name: str
    tensor: torch.Tensor


class Colour(Enum):
    """An answer."""

    RED = "red"


class Answers(Echo):
    """Answers what the class says."""

    answer: Any = None

    def post_process(self, outputs: Any, request_id: str | None = None, **kwargs: Any) -> Any:
        return self.answer


GRID = np.arange(6, dtype=np.float32).reshape(2, 3) / 10
ANSWERS: dict[str, tuple[Any, Any]] = {
    "none": (None, None),
    "plain": ({"a": [1, 2.5, "x", True]}, {"a": [1, 2.5, "x", True]}),
    "array": (GRID, [[0.0, 0.1, 0.2], [0.3, 0.4, 0.5]]),
    "array by columns": (GRID.T, [[0.0, 0.3], [0.1, 0.4], [0.2, 0.5]]),
    "array without axes": (np.array(1.5), 1.5),
    "half array": (np.array([0.5, 1], np.float16), [0.5, 1.0]),
    "number": ({"a": np.float32(0.1), "b": np.int64(3), "c": np.bool_(True)}, {"a": 0.1, "b": 3, "c": True}),
    "array of texts": (np.array(["a", "b"]), ["a", "b"]),
    "tensor": (torch.from_numpy(GRID), [[0.0, 0.1, 0.2], [0.3, 0.4, 0.5]]),
    "tensor by columns": (torch.from_numpy(GRID).T, [[0.0, 0.3], [0.1, 0.4], [0.2, 0.5]]),
    "tensor with a gradient": (torch.ones(2, requires_grad=True) / 2, [0.5, 0.5]),
    "tensor without axes": (torch.tensor(3), 3),
    "integers": (torch.tensor([1, 2]), [1, 2]),
    "bfloat16": (torch.tensor([1.5, -2], dtype=torch.bfloat16), [1.5, -2.0]),
    "fp8": (torch.tensor([1.5]).to(torch.float8_e4m3fn), [1.5]),
    "dataclass": (Point(1.0, torch.ones(2)), {"x": 1.0, "vector": [1.0, 1.0]}),
    "list of dataclasses": ([Point(1.0, GRID[0])], [{"x": 1.0, "vector": [0.0, 0.1, 0.2]}]),
    "pydantic": (Model(name="a", tensor=torch.zeros(1)), {"name": "a", "tensor": [0.0]}),
    "tuple, set, enum": ((1, {2}, Colour.RED), [1, [2], "red"]),
    "keys": ({5: 0.5, 6: 0.25}, {"5": 0.5, "6": 0.25}),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "wanted"), ANSWERS.values(), ids=ANSWERS)
def test_answers(start: Start, answer: Any, wanted: Any) -> None:
    client = start(type("Own", (Answers,), {"answer": answer}))
    assert post(client, {"prompts": "hello"}) == wanted


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (object(), "Type is not JSON serializable: object"),
        ({"a": [b"bytes"]}, "Type is not JSON serializable: bytes"),
        (torch.ones(1, dtype=torch.complex64), "Type is not JSON serializable: complex"),
        (2**70, "Integer exceeds 64-bit range"),
    ],
    ids=["object", "bytes", "complex", "large"],
)
def test_answers_without_json(start: Start, answer: Any, message: str) -> None:
    client = start(type("Own", (Answers,), {"answer": answer}))
    told, param = refused(client, {"data": {"prompts": "hello"}}, 500)
    assert told == f"the plugin 'mine' failed: its answer does not fit into JSON: {message}"
    assert param is None
    assert client.post("/pooling", json={"input": "hello"}).status_code == 200


def test_a_lone_surrogate_in_an_answer_is_made_valid(start: Start) -> None:
    client = start(type("Own", (Answers,), {"answer": "a\ud800"}))
    assert client.post("/pooling", json={"data": {"prompts": "hello"}}).json()["data"] == "a?"


# --- faults --------------------------------------------------------------------------------------------------------

REFUSED = {
    "ValueError": "no",
    "TypeError": "TypeError: no",
    "KeyError": "KeyError: 'no'",
    "AttributeError": "AttributeError: no",
    "empty": "ValueError: ",
}
FAILED = {"RuntimeError": "RuntimeError: no", "AssertionError": "AssertionError: no", "SystemExit": "SystemExit: no"}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["parse_data", "merge_pooling_params", "pre_process", "post_process"])
def test_a_plugin_that_raises(start: Start, where: str, error: str, caplog: pytest.LogCaptureFixture) -> None:
    client = start(Raising)
    message, param = refused_or_failed(client, where, error)
    if where in ("parse_data", "pre_process") and error == "BadRequest":
        assert (message, param) == ("no", None)
    elif where in ("parse_data", "pre_process") and error in REFUSED:
        assert (message, param) == (f"the plugin 'mine' refuses the data: {REFUSED[error]}", "data")
    else:
        told = {**REFUSED, **FAILED, "BadRequest": "no"}[error]
        assert (message, param) == (f"the plugin 'mine' failed: {told}", None)
        assert "in fall" in caplog.text, "the log says where in the plugin it was"
    assert post(client, {"where": "nowhere"}) == {"ids": HELLO_IDS}, "the server goes on"


def refused_or_failed(client: TestClient, where: str, error: str) -> tuple[str, str | None]:
    is_refusal = where in ("parse_data", "pre_process") and error not in FAILED
    return refused(client, {"data": {"where": where, "error": error}}, 400 if is_refusal else 500)


def test_a_coroutine_that_raises(start: Start) -> None:
    client = start(Late)
    assert (
        refused(client, {"data": 5})[0] == "the plugin 'mine' refuses the data: TypeError: 'int' object is not iterable"
    )


# --- from Python ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose config names a plugin."""
    made = checkpoints.bert(tmp_path_factory.mktemp("bert"))
    checkpoints.edit_json(made / "config.json", io_processor_plugin="echo")
    return made


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder)) as made:
        yield made


def encode(llm: LLM, data: Any, *rest: Any, **options: Any) -> Any:
    (output,) = llm.encode({"data": data}, *rest, pooling_task="plugin", use_tqdm=False, **options)
    assert type(output) is PoolingRequestOutput
    assert (output.prompt_token_ids, output.finished) == ([], True)
    return output.outputs


def test_encode(llm: LLM) -> None:
    """A plugin gets what `encode` gives, and `encode` gives what the plugin returns."""
    prompts = [*checkpoints.SHORT, [5, 6]]
    answer = encode(llm, {"prompts": prompts})
    wanted = llm.encode(prompts, pooling_task="embed", use_tqdm=False)
    assert answer["ids"] == [output.prompt_token_ids for output in wanted]
    for tensor, output in zip(answer["values"], wanted, strict=True):
        assert type(tensor) is torch.Tensor
        torch.testing.assert_close(tensor, output.outputs.data, rtol=0, atol=1e-5)


def test_encode_without_naming_the_task(llm: LLM) -> None:
    first, second = (llm.encode({"data": {"prompts": "a"}}, use_tqdm=False)[0] for _ in range(2))
    assert int(second.request_id) == int(first.request_id) + 1
    (by_params,) = llm.encode({"data": {"prompts": "a"}}, PoolingParams(task="plugin"), use_tqdm=False)
    assert by_params.outputs["ids"] == first.outputs["ids"]


def test_parameters_from_python(folder: Path, llm: LLM) -> None:
    """The caller's parameters reach the plugin, which may change them in place, and then the model."""
    params = PoolingParams(use_activation=False)
    prompts = {"prompts": "Hello, my name is"}
    (raw,) = llm.encode("Hello, my name is", params, pooling_task="embed", use_tqdm=False)
    torch.testing.assert_close(encode(llm, prompts, params)["values"][0], raw.outputs.data)
    assert raw.outputs.data.norm() > 1.5
    with LLM(str(folder), io_processor_plugin="vectors") as other:
        data = {"texts": ["Hello, my name is"], "factor": 2}
        answer = encode(other, data, params)
        torch.testing.assert_close(torch.tensor(answer.vectors[0]), 2 * raw.outputs.data)
        assert type(answer) is Answered
        unit = torch.tensor(encode(other, data).vectors[0])
        torch.testing.assert_close(unit.norm(), torch.tensor(2.0))
    assert params == PoolingParams(use_activation=False)


def test_tokenization_from_python(llm: LLM) -> None:
    (ids,) = encode(llm, {"prompts": "a b c d"}, tokenization_kwargs={"truncate_prompt_tokens": 4})["ids"]
    assert len(ids) == 4


def test_coroutines_in_a_running_loop(site: Path, folder: Path) -> None:
    """As in a notebook."""
    package(site, "late", {CENOTE: {"late": "tests.pipeline.test_plugins:Late"}})

    async def cell() -> Any:
        with LLM(str(folder), io_processor_plugin="late") as llm:
            return encode(llm, ["hello", "one two"])

    assert [(i, len(ids)) for i, ids in asyncio.run(cell())] == [(0, 8), (1, 9)]


def test_progress(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.encode({"data": {"prompts": ["a", "b", "c"]}}, pooling_task="plugin")
    assert "3/3" in capsys.readouterr().err


FAULTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "other task": ({"data": 1}, {"pooling_task": "embed"}, "^The 'data' field is only supported for the 'plugin'"),
    "text": ("a", {"pooling_task": "plugin"}, r"^the 'plugin' task takes \{'data': ...\} and nothing else, got 'a'$"),
    "more": ({"data": 1, "prompt": "a"}, {}, "^the 'plugin' task takes .* got {'data': 1, 'prompt': 'a'}$"),
    "null": ({"data": None}, {}, "^The 'data' field is what the plugin reads, and it cannot be None.$"),
    "list of parameters": ({"data": 1}, {"pooling_params": [PoolingParams()]}, "takes one `PoolingParams`, not a li"),
    "refused": ({"data": {}}, {}, "^the plugin 'echo' refuses the data: KeyError: 'prompts'$"),
    "tokenization": ({"data": {"prompts": "a"}}, {"tokenization_kwargs": {"pad": 1}}, "unknown tokenization argument"),
}  # fmt: skip


@pytest.mark.parametrize(("prompt", "options", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_from_python(llm: LLM, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        llm.encode(prompt, use_tqdm=False, **options)


def test_failures_from_python(site: Path, folder: Path) -> None:
    package(site, "raising", {CENOTE: {"raising": "tests.pipeline.test_plugins:Raising"}})
    with LLM(str(folder), io_processor_plugin="raising") as llm:
        with pytest.raises(PluginFailed, match="^the plugin 'raising' failed: RuntimeError: no$") as caught:
            encode(llm, {"where": "post_process", "error": "RuntimeError"})
        assert caught.value.__cause__ is ERRORS["RuntimeError"]
        assert encode(llm, {})["ids"]


def test_no_plugin(tmp_path: Path) -> None:
    with LLM(str(checkpoints.bert(tmp_path))) as llm:
        for prompt, task in (({"data": 1}, "plugin"), ({"data": 1}, None), ("a", "plugin")):
            with pytest.raises(BadRequest) as caught:
                llm.encode(prompt, pooling_task=task, use_tqdm=False)
            assert (caught.value.message, caught.value.param) == (operations.NO_PLUGIN, "data")


# --- the example and the page --------------------------------------------------------------------------------------

TEXT = (
    "  Cenotes are pits filled with water. Divers explore the water of the pits! “Is the water cold?” It is cool.\n\n"
    "The bank raised its interest rates… Interest rates have not been higher for years. 水は冷たい。とても冷たい！\n"  # noqa: RUF001
    "My sister bakes bread every Sunday. The bread is warm. "
)
SENTENCES: dict[str, tuple[str, list[str]]] = {
    "one": ("The cenote is deep", ["The cenote is deep"]),
    "several": ("One. Two!  Three?\nFour… Five", ["One. ", "Two!  ", "Three?\n", "Four… ", "Five"]),
    "space around": (" \n\n One. Two. \n", [" \n\n One. ", "Two. \n"]),
    "quoted": ("“Is it?” It is. (Yes.) No.", ["“Is it?” ", "It is. ", "(Yes.) ", "No."]),
    "no space": ("Version 1.5 of a.b is out. Good", ["Version 1.5 of a.b is out. ", "Good"]),
    "paragraphs": ("A title\n \n\nA line\nof text", ["A title\n \n\n", "A line\nof text"]),
    "Chinese": ("水很冷。真的！？好。", ["水很冷。", "真的！？", "好。"]),  # noqa: RUF001
    "marks": ("...", ["..."]),
}


@pytest.mark.parametrize(("text", "wanted"), SENTENCES.values(), ids=SENTENCES)
def test_sentences_of_the_example(text: str, wanted: list[str]) -> None:
    import semantic_chunks

    assert [text[start:end] for start, end in semantic_chunks.sentences(text)] == wanted


@pytest.fixture(scope="module")
def minilm() -> Iterator[LLM]:
    with LLM(io_processor_plugin="semantic-chunks") as made:
        yield made


def directly(llm: LLM, sentences: list[str]) -> tuple[np.ndarray, list[float]]:
    """Unit vectors of sentences, and the cosine of each and the next."""
    outputs = llm.embed([sentence.strip() for sentence in sentences], use_tqdm=False)
    vectors = np.array([output.outputs.embedding for output in outputs])
    return vectors, [float(a @ b) for a, b in itertools.pairwise(vectors)]


def check_chunks(llm: LLM, text: str, chunks: list[dict[str, Any]], keep: Callable[[list[float]], set[int]]) -> None:
    """Compare with a direct computation; `keep` says after which sentences there is a cut."""
    import semantic_chunks

    spans = semantic_chunks.sentences(text)
    vectors, cosines = directly(llm, [text[start:end] for start, end in spans])
    cut = keep(cosines)
    groups: list[list[int]] = [[]]
    for i in range(len(spans)):
        groups[-1].append(i)
        if i in cut and i + 1 < len(spans):
            groups.append([])
    assert "".join(chunk["text"] for chunk in chunks) == text
    assert [chunk["text"] for chunk in chunks] == [text[chunk["start"] : chunk["end"]] for chunk in chunks]
    assert [(c["start"], c["end"]) for c in chunks] == [(spans[g[0]][0], spans[g[-1]][1]) for g in groups]
    assert [chunk["sentences"] for chunk in chunks] == [len(group) for group in groups]
    means = np.stack([vectors[group].mean(0) for group in groups])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose([np.asarray(chunk["vector"]) for chunk in chunks], means, rtol=0, atol=1e-5)


@pytest.mark.parametrize("threshold", [-1, 0.3, 0.5, 1])
def test_the_example_from_python(minilm: LLM, threshold: float) -> None:
    answer = encode(minilm, {"text": TEXT, "threshold": threshold})
    chunks = [vars(chunk) for chunk in answer.chunks]
    check_chunks(minilm, TEXT, chunks, lambda cosines: {i for i, c in enumerate(cosines) if c < threshold})
    assert len(chunks) == {-1: 1, 0.3: 6, 0.5: 7, 1: 10}[threshold]
    import semantic_chunks

    sentences = [TEXT[start:end] for start, end in semantic_chunks.sentences(TEXT)]
    np.testing.assert_allclose(answer.cosines, directly(minilm, sentences)[1], rtol=0, atol=1e-5)
    tokenizer = minilm.get_tokenizer()
    assert answer.tokens == sum(len(tokenizer(sentence)["input_ids"]) for sentence in sentences)


@pytest.mark.parametrize("most", [1, 3, 50])
def test_the_example_cuts_the_weakest_links(minilm: LLM, most: int) -> None:
    answer = encode(minilm, {"text": TEXT, "threshold": 1, "max_chunks": most})
    chunks = [vars(chunk) for chunk in answer.chunks]
    assert len(chunks) == min(most, 10)
    check_chunks(minilm, TEXT, chunks, lambda cosines: {*np.argsort(cosines)[: most - 1].tolist()})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text", "`data` must be an object with a `text` that is not empty"),
        ({"text": " "}, "`data` must be an object with a `text` that is not empty"),
        ({"text": "a", "treshold": 1}, "`data` has unknown fields ['treshold']; known are ['text', 'threshold', 'max_"),
        ({"text": "a", "threshold": 2}, "`threshold` is a cosine, a number from -1 to 1, got 2"),
        ({"text": "a", "max_chunks": 0}, "`max_chunks` must be a positive integer, got 0"),
    ],
    ids=str,
)
def test_the_example_refuses(minilm: LLM, data: Any, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        encode(minilm, data)
    assert caught.value.message.startswith(f"the plugin 'semantic-chunks' refuses the data: {message}")


@pytest.fixture(scope="module")
def server(installed: Path) -> Iterator[Process]:
    process = Process("--io-processor-plugin", "semantic-chunks", "--served-model-name", "minilm")
    yield process
    process.kill()


def test_the_example_served(server: Process, minilm: LLM) -> None:
    assert "INFO cenote: requests with `data` go to the plugin semantic-chunks\n" in server.log
    body = {"model": "minilm", "task": "plugin", "data": {"text": TEXT}}
    answer = requests.post(f"{server.url}/pooling", json=body, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    check_chunks(minilm, TEXT, answer.json()["data"]["chunks"], lambda c: {i for i, x in enumerate(c) if x < 0.3})
    long = {"data": {"text": "water " * 300}}
    assert requests.post(f"{server.url}/pooling", json=long, timeout=PATIENCE).status_code == 400
    cut = requests.post(f"{server.url}/pooling", json={**long, "truncate_prompt_tokens": -1}, timeout=PATIENCE)
    assert cut.json()["data"]["tokens"] == 256
    wrong = requests.post(f"{server.url}/pooling", json={"data": {}}, timeout=PATIENCE)
    assert wrong.status_code == 400
    assert server.embed("a"), "the server goes on"


def commands(page: Path, language: str) -> list[dict[str, Any]]:
    """Bodies that a page sends to `/pooling` with curl."""
    lines = "\n".join(fenced(page.read_text(), language)).replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines if line.startswith("curl ")]
    assert all(line[1] == "http://127.0.0.1:8000/pooling" for line in words)
    return [json.loads(line[line.index("-d") + 1]) for line in words]


def test_commands_of_the_example(server: Process) -> None:
    """What the page shows is what comes."""
    (body,) = commands(EXAMPLE / "README.md", "bash")
    answer = requests.post(f"{server.url}/pooling", json=body, timeout=PATIENCE).json()
    (shown,) = (json.loads(block) for block in fenced((EXAMPLE / "README.md").read_text(), "json"))
    assert answer.keys() == shown.keys()
    data = answer["data"]
    for key in ("start", "end", "sentences"):
        assert [c[key] for c in data["chunks"]] == [c[key] for c in shown["data"]["chunks"]]
    for chunk, other in zip(data["chunks"], shown["data"]["chunks"], strict=True):
        assert chunk["text"].startswith(other["text"].removesuffix("..."))
        assert round(chunk["vector"][0], 3) == other["vector"][0]
    assert [round(c, 2) for c in data["cosines"]] == shown["data"]["cosines"]
    assert data["tokens"] == shown["data"]["tokens"]


@pytest.mark.full
def test_python_of_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = fenced((EXAMPLE / "README.md").read_text(), "python")
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.splitlines() == [
        "0 20 The cenote is deep.  torch.Size([384])",
        "20 39 Banks closed early. torch.Size([384])",
    ]


@pytest.mark.full
def test_the_script_of_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("The cenote is deep. Interest rates rose.")
    for arguments, chunks in (([], 3), ([str(tmp_path / "text.txt")], 2)):
        monkeypatch.setattr(sys, "argv", ["offline.py", *arguments])
        runpy.run_path(str(EXAMPLE / "offline.py"), run_name="__main__")
        shown = capsys.readouterr().out
        assert len(shown.splitlines()) == chunks
    assert shown == "     0    20  The cenote is deep.\n    20    40  Interest rates rose.\n"


@pytest.mark.full
def test_the_page(capsys: pytest.CaptureFixture[str], start: Start) -> None:
    """Its plugin, its request and its script, with the default model."""
    page = ROOT / "docs" / "plugins.md"
    (body,) = commands(page, "sh")
    (shown,) = (json.loads(block) for block in fenced(page.read_text(), "json"))
    (script,) = fenced(page.read_text(), "py")
    space: dict[str, Any] = {"__name__": "page"}
    exec(compile(script, "plugins.md", "exec"), space)
    assert capsys.readouterr().out == shown["data"]["text"] + "\n"
    llm: LLM = space["llm"]
    with TestClient(build([llm._service], ServerConfig())) as client:
        answer = client.post("/pooling", json=body).json()
    assert answer.keys() == shown.keys()
    assert {**answer["data"], "cosine": round(answer["data"]["cosine"], 2)} == shown["data"]


def test_a_server_whose_plugin_is_missing(installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told before anything is loaded: the folder has no checkpoint."""
    assert main(["serve", str(tmp_path), "--port", "0", "--io-processor-plugin", "chunks"]) == 2
    told = capsys.readouterr().err
    assert told.splitlines()[-1].startswith(
        "cenote: The model requires the 'chunks' IO Processor plugin but it is not installed. Available plugins: ["
    )
    assert "Traceback" not in told


def test_the_public_name() -> None:
    import cenote

    assert cenote.IOProcessor is plugins.IOProcessor
    assert "IOProcessor" in cenote.__all__
    assert issubclass(PluginFailed, CenoteError)
