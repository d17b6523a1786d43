"""What the tests of models share: a call's pictures are submitted at once, so that they run in one batch."""

from __future__ import annotations

import pytest

from cenote import calls


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Submit all prompts of a call together; `tests/test_overlap.py` has the parts in which pictures are decoded."""
    monkeypatch.setattr(calls, "PICTURED_AT_ONCE", calls.RENDERED_AT_ONCE)
