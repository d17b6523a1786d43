"""What `cenote serve` says at start, and how it ends when a model cannot be loaded."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cenote.cli import main
from cenote.cli.serve import report
from cenote.conventions import PairTemplate
from cenote.engine.fake import FakeEngine
from cenote.errors import CheckpointError
from cenote.pipeline.pipeline import Service
from cenote.pipeline.plugins import Plugin
from cenote.pipeline.prompts import Prompts
from cenote.pipeline.rendering import Renderer
from tests.conftest import CLASSIFIER, CROSS_ENCODER, INFO

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cenote.config import ModelConfig
    from cenote.core import ModelInfo


def lines(tokenizer: PreTrainedTokenizerBase, info: ModelInfo, *, prompt: str = "", **fields: Any) -> list[str]:
    names = fields.pop("names", ("fake",))
    return report(
        Service(
            FakeEngine(info),
            Renderer(tokenizer, info, prompts=Prompts({"p": prompt} if prompt else {}, "p" if prompt else None)),
            names,
            **fields,
        )
    )


def test_an_embedder(tokenizer: PreTrainedTokenizerBase) -> None:
    assert lines(tokenizer, INFO) == [
        "model: fake (FakeModel), served as fake",
        "runs: float32 on cpu, packed; 64 tokens an input",
        "tasks: embed, token_embed; default embed",
        "pooling: mean, normalised, dimension 8",
    ]


EXTRA: dict[str, tuple[ModelInfo, dict[str, Any], str]] = {
    "revision and names": (
        INFO.reported(revision="abc"),
        {"names": ("a", "b")},
        "model: fake at revision abc (FakeModel), served as a, b",
    ),
    "raw vectors": (replace(INFO, use_activation=False), {}, "pooling: mean, not normalised, dimension 8"),
    "any dimension": (replace(INFO, matryoshka=()), {}, "pooling: mean, normalised, dimension 8, Matryoshka any"),
    "dimensions": (replace(INFO, matryoshka=(2, 4)), {}, "pooling: mean, normalised, dimension 8, Matryoshka [2, 4]"),
    "prefixes": (
        INFO.reported(shares_prefixes=True),
        {},
        "runs: float32 on cpu, packed, common prefixes once; 64 tokens an input",
    ),
    "head": (CLASSIFIER.reported(head="OwnHead"), {}, "head: OwnHead; 3 labels, softmax"),
    "one label": (CROSS_ENCODER.reported(head="OwnHead"), {}, "head: OwnHead; 1 label, sigmoid"),
    "reward": (
        replace(CROSS_ENCODER.reported(head="OwnHead"), classifies=False),
        {},
        "head: OwnHead; 1 label, raw (sigmoid on request)",
    ),
    "steps": (
        replace(CLASSIFIER.reported(head="OwnHead"), step=True),
        {},
        "head: OwnHead; 3 labels, softmax, one row per step",
    ),
    "scores": (CROSS_ENCODER, {}, "scores pairs as: cross-encoder, bi-encoder, late-interaction"),
    "template": (CROSS_ENCODER, {"pair_template": PairTemplate("{{ q }}\n")}, r"pairs are rendered by: '{{ q }}\n'"),
    "long template": (
        CROSS_ENCODER,
        {"pair_template": PairTemplate("x" * 300)},
        f"pairs are rendered by: '{'x' * 200}'...",
    ),
    "own template": (
        CROSS_ENCODER,
        {"pair_template": PairTemplate(None)},
        'pairs are rendered by: "the checkpoint\'s chat template"',
    ),
    "plugin": (INFO, {"plugin": Plugin("mine", None)}, "requests with `data` go to the plugin mine"),
    "prompt": (INFO, {"prompt": "query: "}, "prompt before every input: 'query: '"),
    "warning": (INFO.reported(warnings=("slow",)), {}, "warning: slow"),
}


@pytest.mark.parametrize(("info", "fields", "line"), EXTRA.values(), ids=EXTRA)
def test_what_else_is_told(
    tokenizer: PreTrainedTokenizerBase, info: ModelInfo, fields: dict[str, Any], line: str
) -> None:
    assert line in lines(tokenizer, info, **fields)


def test_models_that_were_loaded_are_closed_when_another_cannot_be(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engines: list[FakeEngine] = []

    def load(model: ModelConfig, *_: Any) -> Service:
        if model.model == "c":
            raise CheckpointError("c is broken")
        engines.append(FakeEngine(INFO))
        return Service(engines[-1], Renderer(tokenizer, INFO), model.served_model_name)

    monkeypatch.setattr(Service, "open", load)
    collections = gc.get_threshold()
    assert main(["serve", "a", "b", "c", "--port", "0"]) == 2
    assert gc.get_threshold() == collections
    assert capsys.readouterr().err.splitlines()[-1] == "cenote: c is broken"
    assert [engine.closed for engine in engines] == [True, True]


SET = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS")


@pytest.mark.full
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, {"GOMP_SPINCOUNT": "200000", "OPENBLAS_NUM_THREADS": "1"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active", "OPENBLAS_NUM_THREADS": "1"}),
        ({"GOMP_SPINCOUNT": "500"}, {"GOMP_SPINCOUNT": "500", "OPENBLAS_NUM_THREADS": "1"}),
        ({"OPENBLAS_NUM_THREADS": "2"}, {"GOMP_SPINCOUNT": "200000", "OPENBLAS_NUM_THREADS": "2"}),
    ],
)
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given: dict[str, str], kept: dict[str, str]) -> None:
    """Before torch is there, as its OpenMP reads this once."""
    code = f"""
import os, sys
from cenote.cli import main, serve
from cenote.errors import ConfigError

share = serve.share_cores

def share_and_end():
    share()
    raise ConfigError("ended before anything is loaded")

serve.share_cores = share_and_end
status = main(["serve", "--port", "0"])
print("torch" in sys.modules, status, {{name: os.environ[name] for name in {SET} if name in os.environ}})
"""
    environment = {name: value for name, value in os.environ.items() if name not in SET} | given
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == f"False 2 {kept}", done.stderr
