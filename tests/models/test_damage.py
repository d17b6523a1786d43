"""Damaged checkpoints: each damage without effect, or a `CheckpointError` that names the file, and nothing else.

Never another exception, never other numbers, never a wait, never memory by a number in a file.
"""

from __future__ import annotations

import json
import shutil
import signal
from itertools import filterfalse, groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cenote import LLM
from cenote.cli import main
from cenote.errors import CheckpointError
from tests import forked
from tests.checkpoints import assert_same
from tests.models.damage import CHECKPOINTS, DAMAGES, HUGE_DAMAGES, Damage, is_repeated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

pytestmark = pytest.mark.full  # files that are no checkpoint, hundreds of them
TEXTS = ["Hello, my name is", "The quick brown fox jumps over the lazy dog.", "one two three"]

Answers = list[np.ndarray]

UNFELT = {
    "modules 1_Pooling/config.json embedding_dimension other": "the size of a Dense behind it counts",
    "modules 1_Pooling/config.json embedding_dimension huge": "likewise; nothing is made of it",
    "modules 1_Pooling/config.json pooling_mode list": "an empty list is the default",
    "bert tokenizer.json no unknown token": "no text needs it",
}
"""Damages that change no answer, each with the reason; a model card changes none either."""

UNNAMED = {
    "bert config.json num_hidden_layers zero": "a model may have no layers; the tensors of those left over are named",
    "decoder config.json num_hidden_layers zero": "likewise",
    "decoder config.json num_key_value_heads null": "null means as many as there are heads, which other tensors show",
}
"""Damages whose error names the file and cannot name the key, each with the reason."""

PATIENCE = 20
"""Seconds of processor time after which a load counts as endless; the slowest here takes a quarter of one."""


class Endless(BaseException):
    """A load that takes longer than any."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Answers]]:
    """Builds a checkpoint of a kind, once, with its answers."""
    root = tmp_path_factory.mktemp("sound")
    built: dict[str, tuple[Path, Answers]] = {}

    def build(kind: str) -> tuple[Path, Answers]:
        if kind not in built:
            folder = CHECKPOINTS[kind](root / kind)
            built[kind] = folder, answers(folder)
        return built[kind]

    return build


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Ends a test that computes without end, or waits for a pipe."""

    def end(*_: object) -> None:
        raise Endless

    before = [signal.signal(number, end) for number in (signal.SIGPROF, signal.SIGALRM)]
    yield
    for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
        signal.signal(number, handler)


def answers(folder: Path) -> Answers:
    with LLM(model=str(folder)) as llm:
        return [np.asarray(output.outputs.data) for output in llm.encode(TEXTS, use_tqdm=False)]


def fault(damage: Damage, folder: Path, expected: Answers) -> str:
    """What is wrong with how a damaged checkpoint ends; empty if nothing is."""
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    signal.setitimer(signal.ITIMER_REAL, 10 * PATIENCE)  # a pipe takes no time of the processor
    try:
        found = answers(folder)
    except CheckpointError as error:
        return unfit(damage, error.message)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    if damage.id not in UNFELT and damage.file != "README.md":
        return "is not noticed"
    for rows, others in zip(found, expected, strict=True):
        assert_same(rows, others)
    return ""


def unfit(damage: Damage, message: str) -> str:
    """What a message lacks: the file, the key, or that it is one line."""
    name = Path(damage.file).name
    if name not in message:
        return f"names no {name}: {message}"
    if damage.key not in message and damage.id not in UNNAMED:
        return f"names no {damage.key}: {message}"
    return "" if len(message.splitlines()) == 1 else f"has several lines: {message}"


def group(damage: Damage) -> tuple[str, str]:
    return damage.checkpoint, damage.file


def grouped(damages: Iterable[Damage]) -> dict[tuple[str, str], list[Damage]]:
    """Damages by checkpoint and file."""
    return {place: list(part) for place, part in groupby(sorted(damages, key=group), key=group)}


GROUPS = grouped(filterfalse(is_repeated, DAMAGES))
REPEATED = grouped(filter(is_repeated, DAMAGES))


def test_there_are_many() -> None:
    assert len({damage.id for damage in DAMAGES}) == len(DAMAGES) >= 600
    assert {*UNFELT, *UNNAMED} <= {damage.id for damage in DAMAGES}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")  # torch's remark on a pickle that is not its own
@pytest.mark.parametrize("place", GROUPS, ids=" ".join)
def test_damage(place: tuple[str, str], sound: Callable[[str], tuple[Path, Answers]], tmp_path: Path) -> None:
    run(GROUPS[place], sound, tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("place", REPEATED, ids=" ".join)
def test_the_same_damage_elsewhere(
    place: tuple[str, str], sound: Callable[[str], tuple[Path, Answers]], tmp_path: Path
) -> None:
    run(REPEATED[place], sound, tmp_path)


def run(damages: list[Damage], sound: Callable[[str], tuple[Path, Answers]], tmp_path: Path) -> None:
    """Assert that damages of one checkpoint end well."""
    source, expected = sound(damages[0].checkpoint)
    faults = {}
    for number, damage in enumerate(damages):
        folder = shutil.copytree(source, tmp_path / str(number))
        damage.change(folder)
        faults[damage.id] = fault(damage, folder, expected)
    assert not {name: text for name, text in faults.items() if text}


BOUNDED = """
import json, resource, sys
from cenote.config import ModelConfig
from cenote.errors import CheckpointError
from cenote.models.load import load

gigabyte = 1 << 30
resource.setrlimit(resource.RLIMIT_AS, (8 * gigabyte, 8 * gigabyte))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for folder in sys.argv[1:]:
    try:
        load(ModelConfig(model=folder))
        print(json.dumps("loads"))
    except CheckpointError as error:
        print(json.dumps(error.message))
"""


def test_huge_sizes_take_neither_memory_nor_time(sound: Callable[[str], tuple[Path, Answers]], tmp_path: Path) -> None:
    """All of them in one process that may have 8 GiB of addresses, most of which libraries take, and a minute."""
    folders = []
    for number, damage in enumerate(HUGE_DAMAGES):
        folder = shutil.copytree(sound(damage.checkpoint)[0], tmp_path / str(number))
        damage.change(folder)
        folders.append(str(folder))
    ended = forked.run(BOUNDED, *folders)
    messages = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0 and len(messages) == len(HUGE_DAMAGES), ended.stderr
    faults = {damage.id: unfit(damage, message) for damage, message in zip(HUGE_DAMAGES, messages, strict=True)}
    assert not {name: text for name, text in faults.items() if text}


BY_THE_COMMAND = (
    "bert config.json hidden_size text",
    "bert tokenizer.json nested",
    "bert tokenizer.json ends without an id",
    "bert model.safetensors cut",
    "pickled pytorch_model.bin code",
)


@pytest.mark.parametrize("name", BY_THE_COMMAND)
def test_the_command_says_it_in_one_line(
    name: str,
    sound: Callable[[str], tuple[Path, Answers]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (damage,) = (damage for damage in DAMAGES if damage.id == name)
    folder = shutil.copytree(sound(damage.checkpoint)[0], tmp_path / "model")
    damage.change(folder)
    assert main(["info", str(folder)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = (line for line in said.err.splitlines() if line.startswith("cenote: "))
    assert Path(damage.file).name in line
    assert "Traceback" not in said.err
