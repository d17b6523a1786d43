"""What a process in front of an engine imports: neither torch nor anything that brings it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from cenote.models.hub import embedded

MODULES = (
    "cenote.cli.serve",
    "cenote.server.app",
    "cenote.pipeline.pipeline",
    "cenote.pipeline.plugins",
    "cenote.arguments",
    "cenote.pipeline.job",
    "cenote.pipeline.operations",
    "cenote.pipeline.rendering",
    "cenote.pipeline.pairs",
    "cenote.pipeline.ranking",
    "cenote.pipeline.entities",
    "cenote.pipeline.calibration",
    "cenote.engine.blocks",
    "cenote.engine.cache",
    "cenote.engine.fake",
    "cenote.pipeline.facts",
    "cenote.engine.host",
    "cenote.engine.remote",
    "cenote.tensors.similarity",
    "cenote.tensors.quantize",
    "cenote.tensors.process",
)


def python(program: str) -> str:
    """What `program` prints in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.strip()


def test_the_front_imports_neither_torch_nor_transformers() -> None:
    """Each module is asked for by itself, so that the first offender is named."""
    program = f"""
import sys
from importlib import import_module
for module in {MODULES}:
    import_module(module)
    print(module, [name for name in ("torch", "transformers", "cenote.models") if name in sys.modules])
"""
    assert python(program).splitlines() == [f"{module} []" for module in MODULES]


def test_threads_of_a_process_without_torch_are_left_alone() -> None:
    program = "import sys; from cenote.tensors.process import release_threads as r; print(r(), 'torch' in sys.modules)"
    assert python(program) == "None False"


@pytest.mark.full
def test_transformers_tokenizers_work_without_torch() -> None:
    """Also their chat templates; a later import of torch is not in the way."""
    folder = embedded()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    program = f"""
import os, sys
from cenote.tokenizer import import_without_torch
import_without_torch()
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})
print(tokenizer("naïve cafés", "and more")["input_ids"], tokenizer.decode([7592, 102]))
tokenizer.chat_template = "{{{{ messages[0].content }}}}!"
print(tokenizer.apply_chat_template([{{"role": "user", "content": "a"}}], tokenize=False))
print("torch" in sys.modules, "TRANSFORMERS_NO_ADVISORY_WARNINGS" in os.environ)
import torch
print(torch.ones(1).item())
"""
    ids = tokenizer("naïve cafés", "and more")["input_ids"]
    assert python(program).splitlines() == [f"{ids} {tokenizer.decode([7592, 102])}", "a!", "False False", "1.0"]


@pytest.mark.full
def test_torch_that_is_imported_cannot_be_left_out() -> None:
    program = """
import torch
from cenote.tokenizer import import_without_torch
try:
    import_without_torch()
except RuntimeError as error:
    print(error)
print(torch is __import__("sys").modules["torch"])
"""
    assert python(program).splitlines() == [
        "torch is imported already, and torch cannot be left out any more",
        "True",
    ]
