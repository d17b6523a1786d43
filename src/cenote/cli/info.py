"""`cenote info`: load a model and tell how its files are read, its tasks and how it runs, without serving it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cenote.cli.serve import log_to_stderr, report, share_cores
from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.settings import resolve

if TYPE_CHECKING:
    from cenote.pipeline.pipeline import Service

QUIET = "warning"
"""Least severe log line: the answer alone is on standard output, and standard error is for warnings."""


def run(arguments: dict[str, Any]) -> int:
    """Run the command, with the options that `cenote.cli.flags.parse` understood."""
    as_json = arguments.pop("json", False)
    # Variables and files that are shared with servers may hold their options, too.
    (model, engine, _), notes = resolve(arguments, (ModelConfig, EngineConfig, ServerConfig))
    assert isinstance(model, ModelConfig)
    assert isinstance(engine, EngineConfig)
    log_to_stderr(QUIET, notes)
    share_cores()
    from cenote.pipeline.pipeline import Service

    service = Service.open(model, engine)
    try:
        print(json.dumps(described(service), indent=2) if as_json else "\n".join(lines(service)))
    finally:
        service.engine.close()
    return 0


def lines(service: Service) -> list[str]:
    """Return the report of a start, and all entries of the checkpoint's files."""
    used = [f"  {entries}" for entries in service.info.report.used]
    left = [f"  {entries} ({entries.reason})" for entries in service.info.report.left]
    return [*report(service), "", "entries that are read:", *used, "entries that are left, and why:", *left]


def described(service: Service) -> dict[str, Any]:
    """Return the contract and the report of a model as JSON values, with its prompts."""
    prompts = service.renderer.prompts
    default = prompts.choose()
    description = asdict(service.info)
    description["columns"] = [*description["columns"]]
    return {
        **description,
        "names": [*service.names],
        "prompts": dict(prompts.named),
        "default_prompt": {"text": default.text, "adapter": default.adapter},
    }
