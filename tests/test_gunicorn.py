"""A model under gunicorn: one that was loaded before `--preload` forks is refused in its workers, one after it runs."""

from __future__ import annotations

import http.client
import json
import os
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests import PATIENCE, checkpoints
from tests.forked import Forked

APP = """
    import json, os

    from cenote import LLM
    from cenote.errors import EngineFailed

    MADE = os.getpid()
    MODELS = {"/before": LLM(os.environ["FOLDER"])}
    MODELS["/before"].embed(["its threads run"], use_tqdm=False)

    def app(request, start):
        try:
            (output,) = MODELS[request["PATH_INFO"]].embed(["old boat"], use_tqdm=False)
            status, content = "200 OK", output.outputs.embedding[:]
        except EngineFailed as error:
            status, content = "503 Service Unavailable", str(error)
        start(status, [("Content-Type", "application/json")])
        return [json.dumps([MADE, os.getpid(), content]).encode()]
"""
CONFIG = """
    preload_app = True
    workers = 1

    def post_fork(server, worker):
        import os
        import served
        served.MODELS["/after"] = served.LLM(os.environ["FOLDER"])
"""


def ask(port: int, path: str) -> tuple[int, list[Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", path)
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_worker_is_told_what_to_do_and_one_that_does_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints.bert(tmp_path / "model")
    (tmp_path / "served.py").write_text(textwrap.dedent(APP))
    (tmp_path / "config.py").write_text(textwrap.dedent(CONFIG))
    monkeypatch.chdir(tmp_path)
    flags = ("--bind", "127.0.0.1:0", "-c", "config.py", "served:app")
    process = Forked("gunicorn", *flags, environment={**os.environ, "FOLDER": str(folder)})
    log = ""
    try:
        while "Listening at" not in log:
            line = process.stderr.readline()
            assert line, log
            log += line
        port = int(log.rpartition("http://127.0.0.1:")[2].split()[0])
        status, (made, here, message) = ask(port, "/before")
        assert status == 503
        assert made != here
        assert re.search(f"started in process {made}, and this is its forked child {here}.*gunicorn", message)
        status, (_, there, vector) = ask(port, "/after")
        assert (status, there) == (200, here)
        assert len(vector) == 32
        assert any(vector)
    finally:
        process.terminate()
        log += process.stderr.read()
        process.stderr.close()
    assert process.wait(PATIENCE) == 0, log
