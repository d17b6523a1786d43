"""Transformers' tokenizers without torch, for processes that render text and run no model."""

from __future__ import annotations

import os
import sys

QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
"""Environment variable that keeps Transformers from telling that torch was not found."""


def import_without_torch() -> None:
    """Import Transformers as where torch is not installed; its tokenizers need none of it.

    Transformers looks for torch once. In this process its models do not exist from here on. Torch itself can still be
    imported.

    Raises:
        RuntimeError: torch or Transformers is imported already.
    """
    imported = [name for name in ("torch", "transformers") if name in sys.modules]
    if imported:
        raise RuntimeError(f"{' and '.join(imported)} is imported already, and torch cannot be left out any more")
    before = os.environ.get(QUIET)
    os.environ[QUIET] = "1"
    sys.modules["torch"] = None  # type: ignore[assignment] # to import it is an ImportError, to look for it finds nothing
    try:
        from transformers.utils.import_utils import is_torch_available

        assert not is_torch_available()
    finally:
        del sys.modules["torch"]
        if before is None:
            del os.environ[QUIET]
        else:
            os.environ[QUIET] = before
