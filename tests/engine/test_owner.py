"""Processes beside the one that made an engine: a forked child is refused at once, a spawned one has its own."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import textwrap
from pathlib import Path

import pytest

from cenote.engine.cache import CachedEngine
from cenote.engine.engine import LocalEngine
from tests import PATIENCE, checkpoints, forked
from tests.engine.test_engine import Model, check, texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT of 32 dimensions."""
    return checkpoints.bert(tmp_path_factory.mktemp("tiny"))


linux = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

FORKED = """
    import os, sys
    from cenote import LLM
    from cenote.errors import EngineFailed

    llm = LLM(sys.argv[1])
    llm.embed(["before the fork"], use_tqdm=False)
    child = os.fork()
    if child == 0:
        try:
            llm.embed(["in the child"], use_tqdm=False)
        except EngineFailed as error:
            well = "forked child" in str(error) and not llm._service.engine.healthy()
            llm.close()  # returns, and leaves the parent's engine alone
            fresh = LLM(sys.argv[1])
            (output,) = fresh.embed(["in the child"], use_tqdm=False)
            fresh.close()
            os._exit(0 if well and len(output.outputs.embedding) == 32 else 3)
        os._exit(4)
    _, status = os.waitpid(child, 0)
    (output,) = llm.embed(["after the fork"], use_tqdm=False)
    sys.exit(os.waitstatus_to_exitcode(status))
"""


@linux
def test_a_forked_child_is_told_what_to_do_and_can_make_its_own(folder: Path) -> None:
    done = forked.run(textwrap.dedent(FORKED), str(folder))
    assert done.returncode == 0, done.stderr


@linux
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("cached", [False, True])
def test_a_worker_of_a_forking_pool_gets_an_error_and_not_silence(cached: bool) -> None:
    local = LocalEngine(Model())
    engine = CachedEngine(local, 1 << 20) if cached else local
    reader, writer = os.pipe()
    worker = multiprocessing.get_context("fork").Process(target=_submit, args=(engine, writer))
    worker.start()
    os.close(writer)
    with os.fdopen(reader) as answer:
        told = answer.read()
    worker.join(PATIENCE)
    assert worker.exitcode == 0
    assert "forked child" in told
    assert "spawn" in told
    check(engine.submit(texts(3)), texts(3))
    engine.close()


def _submit(engine: LocalEngine | CachedEngine, writer: int) -> None:
    try:
        engine.submit(texts(3))
    except Exception as error:
        os.write(writer, str(error).encode())
    engine.close()


@linux
def test_a_lock_that_was_held_at_the_fork_does_not_hang_the_child() -> None:
    engine = LocalEngine(Model())
    with engine._lock:
        child = os.fork()
        if child == 0:
            engine._lock = None  # type: ignore[assignment] # whoever takes it fails
            try:
                engine.submit(texts(2))
            except Exception as error:
                os._exit(0 if "forked child" in str(error) and not engine.healthy() else 3)
            os._exit(4)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    engine.close()


SPAWNED = """
    from cenote import LLM

    def embed(folder, text):
        with LLM(folder) as llm:
            (output,) = llm.embed([text], use_tqdm=False)
        return len(output.outputs.embedding)
"""
SPAWNS = """
    import multiprocessing, sys
    from cenote import LLM

    folder = sys.argv[1]
    sys.path.insert(0, sys.argv[2])
    from spawned import embed

    llm = LLM(folder)
    llm.embed(["the parent has one, too"], use_tqdm=False)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.starmap(embed, [(folder, "in a spawned child")]) == [32]
"""


@pytest.mark.full
def test_a_spawned_child_has_its_own(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "spawned.py").write_text(textwrap.dedent(SPAWNED))
    done = forked.run(textwrap.dedent(SPAWNS), str(folder), str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_a_model_is_not_sent_to_another_process(folder: Path) -> None:
    from cenote import LLM

    with LLM(str(folder)) as llm, pytest.raises(TypeError, match="make it in the process that uses it"):
        pickle.dumps(llm)
