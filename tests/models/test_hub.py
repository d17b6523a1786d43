"""Hub ids load through `huggingface_hub` itself, against a small hub on the loopback: commits, cache, refusals."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cenote import LLM
from tests import PATIENCE, checkpoints
from tests.checkpoints import HIDDEN, NORMALIZE, dense, pooling

if TYPE_CHECKING:
    from collections.abc import Iterator

TEXT = "Hello, my name is"
pytestmark = pytest.mark.full  # in an interpreter of its own, as the hub's address is read by importing


@dataclass
class Hub:
    """What the hub holds, and what it was asked for.

    Attributes:
        commits: repository and commit to a folder.
        branches: repository and branch to a commit.
        asked: method and path of every request.
        keys: repository and `Authorization` of every request.
    """

    commits: dict[tuple[str, str], Path] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    keys: set[tuple[str, str | None]] = field(default_factory=set)

    def add(self, repository: str, branch: str, folder: Path) -> str:
        """Publish `folder` as the head of a branch; returns its commit."""
        commit = hashlib.sha1(f"{repository}@{branch}".encode()).hexdigest()
        self.commits[repository, commit] = folder
        self.branches[repository, branch] = commit
        return commit

    def fetched(self) -> Counter[str]:
        """Names of the files that were downloaded."""
        return Counter(path.split("/resolve/")[1].partition("/")[2] for how, path in self.asked if _is_get(how, path))


def _is_get(method: str, path: str) -> bool:
    return method == "GET" and "/resolve/" in path


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self.hub.asked.append((self.command, self.path))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repository, rest = "/".join(parts[:2]), parts[2:]
        self.hub.keys.add((repository, self.headers["Authorization"]))
        if not any(repository == name for name, _ in self.hub.commits):
            self._refuse("RepoNotFound", "Repository not found")
            return
        what, revision = rest[0] if rest else "revision", rest[1] if len(rest) > 1 else "main"
        commit = self.hub.branches.get((repository, revision), revision)
        folder = self.hub.commits.get((repository, commit))
        if folder is None:
            self._refuse("RevisionNotFound", f"Invalid rev id: {revision}")
        elif what == "resolve":
            self._file(folder / "/".join(rest[2:]), commit)
        else:
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            names = [path.relative_to(folder).as_posix() for path in files]
            tree = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _oid(path)}
                for name, path in zip(names, files, strict=True)
            ]
            info = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in names], "tags": []}
            self._answer(json.dumps(tree if what == "tree" else info).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_GET

    def _file(self, path: Path, commit: str) -> None:
        if path.is_file():
            self._answer(path.read_bytes(), {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": commit})
        else:
            self._refuse("EntryNotFound", "Entry not found")

    def _refuse(self, code: str, message: str) -> None:
        self._answer(b"", {"X-Error-Code": code, "X-Error-Message": message}, status=404)

    def _answer(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@dataclass
class Answers:
    """Results of one process that loaded a list of checkpoints, and the files it downloaded for each."""

    results: dict[str, dict[str, Any]]
    hub: Hub
    folders: dict[str, Path]
    commits: dict[str, str]
    home: Path
    environment: dict[str, str]


PROGRAM = """
import json, sys
from cenote import LLM
results = {}
for name, options in json.load(sys.stdin).items():
    try:
        with LLM(**options) as llm:
            (output,) = llm.embed("Hello, my name is", use_tqdm=False)
            results[name] = {"row": output.outputs.embedding, "revision": llm.info.report.revision}
    except Exception as error:
        results[name] = {"error": type(error).__name__, "message": str(error)}
json.dump(results, sys.stdout)
"""

LOADS: dict[str, dict[str, Any]] = {
    "plain": {"model": "tiny/bert"},
    "again": {"model": "tiny/bert"},
    "branch": {"model": "tiny/bert", "revision": "v2"},
    "tokenizer of its own": {"model": "tiny/bert", "tokenizer": "tiny/tokenizer"},
    "tokenizer of a branch": {"model": "tiny/bert", "tokenizer_revision": "lower"},
    "tokenizer of its own at a branch": {
        "model": "tiny/bert",
        "revision": "v2",
        "tokenizer": "tiny/words",
        "tokenizer_revision": "old",
    },
    "kept apart": {"model": "tiny/kept", "download_dir": "apart", "hf_token": "hf_secret"},
    "modules": {"model": "tiny/modules"},
    "pickled, refused": {"model": "tiny/pickled", "safetensors_only": True},
    "pickled": {"model": "tiny/pickled"},
    "an unknown head": {"model": "tiny/headed"},
    "code": {"model": "tiny/code"},
    "no such repository": {"model": "tiny/nothing"},
    "no such revision": {"model": "tiny/bert", "revision": "v3"},
    "not an id": {"model": "tiny/bert/v2"},
    "not a folder": {"model": "./tiny"},
    "not a name": {"model": "tiny bert!"},
}


def _run(loads: dict[str, dict[str, Any]], environment: dict[str, str], cwd: Path) -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(loads),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment,
        cwd=cwd,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answers]:
    base = tmp_path_factory.mktemp("hub")
    folders = {
        "v1": checkpoints.bert(base / "v1"),
        "v2": checkpoints.bert(base / "v2", seed=1),
        "pickled": checkpoints.bert(base / "pickled", seed=2),
        "modules": checkpoints.bert(base / "modules"),
        "tokenizer": base / "tokenizer",
        "headed": checkpoints.bert(base / "headed"),
        "code": checkpoints.bert(base / "code"),
    }
    checkpoints.wordpiece(lowercase=True).save_pretrained(folders["tokenizer"])
    (folders["v1"] / "onnx").mkdir()
    for name in ("onnx/model.onnx", "onnx/config.json", "pytorch_model.bin", "modeling.py", "picture.png"):
        (folders["v1"] / name).write_text("never to be downloaded")
    weights = load_file(folders["pickled"] / "model.safetensors")
    torch.save(weights, folders["pickled"] / "pytorch_model.bin")
    (folders["pickled"] / "model.safetensors").unlink()
    checkpoints.write_modules(folders["modules"], pooling("mean"), dense(HIDDEN, 20), NORMALIZE)

    hub = Hub()
    commits = {
        "v1": hub.add("tiny/bert", "main", folders["v1"]),
        "v2": hub.add("tiny/bert", "v2", folders["v2"]),
    }
    hub.add("tiny/bert", "lower", folders["tokenizer"])
    hub.add("tiny/words", "old", folders["tokenizer"])
    hub.add("tiny/kept", "main", folders["v2"])
    (folders["headed"] / "value_head.bin").write_bytes(b"\0")
    checkpoints.edit_json(folders["code"] / "config.json", auto_map={"AutoModel": "own.Own"})
    for name in ("pickled", "modules", "tokenizer", "headed", "code"):
        commits[name] = hub.add(f"tiny/{name}", "main", folders[name])
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    environment = kept | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(base / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    results = _run(LOADS, environment, base)
    yield Answers(results, hub, folders, commits, base / "home", environment)
    server.shutdown()
    server.server_close()


def local(folder: Path, **options: Any) -> np.ndarray:
    """The row of a local folder."""
    return np.array(_local(folder, **options))


@functools.cache
def _local(folder: Path, **options: Any) -> list[float]:
    with LLM(model=str(folder), **options) as llm:
        return llm.embed(TEXT, use_tqdm=False)[0].outputs.embedding


@pytest.mark.parametrize(
    ("load", "folder"),
    [("plain", "v1"), ("again", "v1"), ("branch", "v2"), ("modules", "modules"), ("pickled", "pickled")],
)
def test_a_hub_id_gives_what_its_folder_gives(answers: Answers, load: str, folder: str) -> None:
    result = answers.results[load]
    expected = local(answers.folders[folder])
    np.testing.assert_allclose(result["row"], expected, rtol=0, atol=1e-6)
    assert result["revision"] == answers.commits[folder]


def test_another_revision_gives_another_vector(answers: Answers) -> None:
    plain, branch = (np.array(answers.results[load]["row"]) for load in ("plain", "branch"))
    assert np.abs(plain - branch).max() > 1e-2


def test_a_tokenizer_of_its_own(answers: Answers) -> None:
    result = answers.results["tokenizer of its own"]
    expected = local(answers.folders["v1"], tokenizer=str(answers.folders["tokenizer"]))
    np.testing.assert_allclose(result["row"], expected, rtol=0, atol=1e-6)
    assert np.abs(np.array(result["row"]) - local(answers.folders["v1"])).max() > 1e-2


@pytest.mark.parametrize(
    ("load", "folder"), [("tokenizer of a branch", "v1"), ("tokenizer of its own at a branch", "v2")]
)
def test_a_tokenizer_at_a_revision(answers: Answers, load: str, folder: str) -> None:
    expected = local(answers.folders[folder], tokenizer=str(answers.folders["tokenizer"]))
    np.testing.assert_allclose(answers.results[load]["row"], expected, rtol=0, atol=1e-6)


def test_a_cache_and_a_token_of_its_own(answers: Answers) -> None:
    np.testing.assert_allclose(answers.results["kept apart"]["row"], local(answers.folders["v2"]), rtol=0, atol=1e-6)
    assert (answers.home.parent / "apart" / "models--tiny--kept").is_dir()
    assert (answers.home / "hub" / "models--tiny--bert").is_dir()
    assert not (answers.home / "hub" / "models--tiny--kept").exists()
    assert {key for name, key in answers.hub.keys if name == "tiny/kept"} == {"Bearer hf_secret"}
    assert {key for name, key in answers.hub.keys if name != "tiny/kept"} == {None}


def test_only_wanted_files_are_downloaded_and_each_once(answers: Answers) -> None:
    fetched = answers.hub.fetched()
    assert not [name for name in fetched if name.startswith("onnx/") or name.endswith((".onnx", ".py", ".png"))]
    of_v1 = Counter(
        path.rpartition("/")[2]
        for method, path in answers.hub.asked
        if _is_get(method, path) and answers.commits["v1"] in path
    )
    assert set(of_v1) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(of_v1.values()) == {1}
    assert fetched["pytorch_model.bin"] == 1  # of tiny/pickled, which has no safetensors
    assert fetched["2_Dense/model.safetensors"] == 1


@pytest.mark.parametrize(
    ("load", "sentence"),
    [
        ("pickled, refused", "tiny/pickled has neither model.safetensors nor pytorch_model.bin"),
        ("an unknown head", "the checkpoint has the file value_head.bin, which Cenote does not honour"),
        ("code", "config.json has the key auto_map, which Cenote does not honour"),
        ("no such repository", "'tiny/nothing' is no folder here, and the hub did not give it: "),
        ("no such revision", "revision 'v3' of 'tiny/bert' is no folder here, and the hub did not give it: "),
        ("not an id", "there is no folder 'tiny/bert/v2', and it is not a hub id of the form 'owner/name'"),
        ("not a folder", "there is no folder './tiny', and it is not a hub id"),
        ("not a name", "'tiny bert!' is no folder here, and the hub did not give it: "),
    ],
)
def test_what_cannot_be_had_is_a_sentence(answers: Answers, load: str, sentence: str) -> None:
    assert answers.results[load]["error"] == "CheckpointError"
    message = answers.results[load]["message"]
    assert message.startswith(sentence)
    assert "\n" not in message


def test_offline_loads_what_is_cached_and_asks_nobody(answers: Answers, tmp_path: Path) -> None:
    asked = len(answers.hub.asked)
    loads = {name: LOADS[name] for name in ("plain", "branch", "modules")} | {
        "commit": {"model": "tiny/bert", "revision": answers.commits["v2"]},
        "not cached": {"model": "tiny/nothing"},
        "revision not cached": {"model": "tiny/bert", "revision": "v3"},
    }
    found = _run(loads, answers.environment | {"HF_HUB_OFFLINE": "1"}, tmp_path)
    assert len(answers.hub.asked) == asked
    for name in ("plain", "branch", "modules"):
        assert found[name] == answers.results[name]
    assert found["commit"] == answers.results["branch"]
    for name in ("not cached", "revision not cached"):
        assert found[name]["error"] == "CheckpointError"
        assert "the hub did not give it: Cannot find an appropriate cached snapshot folder" in found[name]["message"]
