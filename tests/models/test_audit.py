"""The audit of a checkpoint: each entry is honoured, left with a reason, or refused by its name."""

from __future__ import annotations

import pytest

from cenote.core import Entries
from cenote.errors import CheckpointError
from cenote.models.audit import Audit, Keys

KEYS = Keys(honoured=frozenset({"pooling_mode"}), idle={"_*": "a comment", "version": "of the writer"})


def test_entries_are_used_or_left() -> None:
    """A key that is honoured is used; one without effect is left with its reason, by name or by pattern."""
    audit = Audit()
    audit.read("1_Pooling/config.json", {"pooling_mode": "cls", "_name": "x", "version": "6"}, KEYS)
    assert audit.used == (Entries("1_Pooling/config.json", ("pooling_mode",)),)
    assert audit.left == (
        Entries("1_Pooling/config.json", ("_name",), "a comment"),
        Entries("1_Pooling/config.json", ("version",), "of the writer"),
    )


def test_unread_entries_are_named() -> None:
    """All unread keys of a file are in one message, with the file, the honoured ones and the way on."""
    with pytest.raises(CheckpointError) as error:
        Audit().read("1_Pooling/config.json", {"weight": 1, "pooling_mode": "cls", "depth": 2}, KEYS)
    for words in ("1_Pooling/config.json", "keys weight, depth", "honoured are pooling_mode", "--allow-unread weight"):
        assert words in error.value.message


@pytest.mark.parametrize("entry", ["depth", "1_Pooling/config.json:depth", "1_Pooling/*:de*"])
def test_entries_allowed_to_go_unread(entry: str) -> None:
    """A user's entry or pattern, bare or with its file, lets a key go unread, and the audit tells."""
    audit = Audit([entry])
    audit.read("1_Pooling/config.json", {"depth": 2}, KEYS)
    assert audit.left == (Entries("1_Pooling/config.json", ("depth",), "allowed to go unread"),)


def test_an_allowance_for_one_entry_is_for_no_other() -> None:
    """A key of another name or another file is still refused."""
    audit = Audit(["1_Pooling/config.json:depth"])
    with pytest.raises(CheckpointError, match="the key weight"):
        audit.read("1_Pooling/config.json", {"depth": 2, "weight": 1}, KEYS)
    with pytest.raises(CheckpointError, match="2_Dense"):
        audit.read("2_Dense/config.json", {"depth": 2}, KEYS)
