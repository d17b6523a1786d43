"""The documentation is true: its Python runs, its commands answer, its tables and trees match the code."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from cenote.cli import flags
from cenote.cli.options import page
from cenote.cli.serve import engines_of, models_of
from cenote.config import BenchConfig, EngineConfig, HostConfig, ModelConfig, ServerConfig
from cenote.conventions import MOST_PICTURES
from cenote.pipeline.pipeline import Service
from cenote.server.app import build
from cenote.settings import LAYERS, resolve
from tests import pictured
from tests.checkpoints import classifier

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, content) of every fenced block in `language`."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(page.name, block) for page in PAGES for block in pattern.findall(page.read_text())]


NER = ["O", "B-PER", "I-PER", "B-LOC"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models that the pages call `my-...`."""
    root = tmp_path_factory.mktemp("models")
    classifier(root / "my-classifier", num_labels=3)
    classifier(root / "my-reward-model", num_labels=1)
    classifier(root / "my-splade", head="ForMaskedLM")
    pictured.qwen_vl(root / "my-qwen-vl", "qwen3_vl")
    pictured.clip(root / "my-clip")
    classifier(root / "my-ner", head="ForTokenClassification", id2label=dict(enumerate(NER)))
    return root


@pytest.fixture(scope="module")
def client(folders: Path) -> Iterator[TestClient]:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    options = [{"model": str(folder), "served_model_name": folder.name} for folder in sorted(folders.iterdir())]
    own_template = {"my-qwen-vl": {}, "my-clip": {}, "my-splade": {"convert": "sparse"}}
    for own in options:
        own |= own_template.get(own["served_model_name"], {"chat_template": template})
    configs = [ModelConfig(), *(ModelConfig(**own) for own in options)]
    with TestClient(build([Service.open(config, EngineConfig()) for config in configs], ServerConfig())) as client:
        yield client


CODE = [
    pytest.param(where, code, marks=() if where == "README.md" else pytest.mark.full)
    for where, code in blocks("python")
    if "base_url" not in code
]


@pytest.mark.parametrize(("where", "code"), CODE)
def test_python_runs(where: str, code: str, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders)
    exec(compile(code, where, "exec"), {"__name__": where})


def curls() -> list[str]:
    commands = [block.replace("\\\n", " ") for _, block in blocks("bash")]
    return [line for block in commands for line in block.splitlines() if line.startswith("curl ")]


@pytest.mark.parametrize("command", curls())
def test_curl_is_answered(command: str, client: TestClient) -> None:
    words = shlex.split(command)
    url, body = words[1], words[words.index("-d") + 1]
    assert words[words.index("-H") + 1] == "Content-Type: application/json"
    answer = client.post(url.removeprefix("http://127.0.0.1:8000"), json=json.loads(body))
    assert answer.status_code == 200, answer.text


def commands() -> list[str]:
    lines = [line.partition("#")[0].strip() for _, block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("cenote ") and "server.yaml" not in line]


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    found = flags.parse(words[1:])
    assert found.pop("command") == words[1]
    if words[1] == "bench":
        resolve(found, (*LAYERS, BenchConfig))
    elif words[1] == "engine":
        resolve(found, (*LAYERS, HostConfig))
    elif "engine" in found:
        engines_of(found)
    else:
        models_of(found)


def test_options_page_is_current() -> None:
    assert (ROOT / "docs" / "options.md").read_text() == page(), "run: python -m cenote.cli.options > docs/options.md"


UNITS = {"": 1, "s": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
OF_BATCHES = {"max_num_batched_tokens", "max_num_seqs", "max_cudagraph_capture_size"}
"""Sizes of batches, beyond which nothing is refused."""


def test_hardening_has_every_limit_with_its_default() -> None:
    text = (ROOT / "docs" / "hardening.md").read_text()
    rows = re.findall(r"^\| `--([a-z-]+)`.*? \| ([\d,]+|the model's) ?(\w*) \|", text, re.MULTILINE)
    documented = {name.replace("-", "_"): (number, unit) for name, number, unit in rows}
    fields = {name: field.default for layer in LAYERS for name, field in layer.model_fields.items()}
    limits = {name: value for name, value in fields.items() if re.match("max_|limit_|.*_timeout$", name)}
    limits |= {"limit_mm_per_prompt": MOST_PICTURES, "max_model_len": "the model's"}
    assert documented.keys() == limits.keys() - OF_BATCHES
    for name, (number, unit) in documented.items():
        value = number if number == "the model's" else int(number.replace(",", "")) * UNITS[unit]
        assert value == limits[name], name


def test_readme_names_every_file() -> None:
    tree = (ROOT / "README.md").read_text().split("## The files")[1]
    package = ROOT / "src" / "cenote"
    modules = [p for p in package.rglob("*.py") if not p.name.startswith("__")]
    one_line = {package / "server" / "dialects", package / "vllm"}
    missing = [str(p) for p in modules if one_line.isdisjoint(p.parents) and p.name not in tree]
    assert not missing


def test_links_lead_somewhere() -> None:
    for source in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "benchmarks" / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", source.read_text()):
            assert (source.parent / target).exists(), f"{source.name} links to {target}"
