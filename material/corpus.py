"""Real English text that every Python has: the docstrings of the standard library, mixed in length."""

from __future__ import annotations

import ast
import functools
import sysconfig
from pathlib import Path

MODULES = (
    "argparse", "ast", "asyncio/events", "base64", "bdb", "calendar", "codecs", "collections/__init__", "configparser",
    "copy", "csv", "datetime", "decimal", "difflib", "doctest", "email/message", "fractions", "ftplib", "functools",
    "gettext", "heapq", "inspect", "ipaddress", "json/__init__", "logging/__init__", "mailbox", "optparse", "pathlib",
    "pickletools", "platform", "poplib", "pprint", "random", "shutil", "smtplib", "statistics", "string", "subprocess",
    "tarfile", "tempfile", "textwrap", "threading", "tkinter/__init__", "turtle", "typing", "unittest/case",
    "urllib/request", "uuid", "weakref", "zipfile",
)  # fmt: skip
"""Modules that are plain Python files in every release; one that is missing is passed over."""


@functools.cache
def library() -> tuple[str, ...]:
    """All different docstrings of `MODULES`, in their order."""
    found: dict[str, None] = {}
    for name in MODULES:
        file = Path(sysconfig.get_path("stdlib")) / f"{name}.py"
        if not file.is_file():
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (
                text := ast.get_docstring(node)
            ):
                found[text] = None
    return tuple(found)


def docstrings(count: int) -> tuple[str, ...]:
    """`count` different docstrings, in an order that spreads the modules and lengths."""
    texts = library()
    if len(texts) < count:
        raise ValueError(f"the standard library here has {len(texts)} docstrings, not {count}")
    step = len(texts) / count
    return tuple(texts[int(i * step)] for i in range(count))
