"""A checkpoint's tokenizer, made alike where the model runs and where text is only rendered, there without torch."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerBase

QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
"""Environment variable that keeps Transformers from reporting that torch was not found."""


def import_without_torch() -> None:
    """Import Transformers as if torch were not installed; its tokenizers do not need it.

    Transformers looks for torch once. In this process its models do not exist from then on. Torch itself can still be
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


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """The files of a tokenizer, and changes to it.

    Attributes:
        path: folder of its files.
        trust_remote_code: run Python code that the folder brings.
        chat_template: Jinja template instead of its own; `None` = its own.
        whole: texts that it must not take apart, see `keep_whole`.
    """

    path: str
    trust_remote_code: bool = False
    chat_template: str | None = None
    whole: tuple[str, ...] = ()


def load(source: TokenizerSource) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `source`.

    Raises:
        OSError: there are no files.
        ValueError: they are not understood; also `KeyError` and `ImportError`, as Transformers raises them.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        source.path, trust_remote_code=source.trust_remote_code
    )
    if source.chat_template is not None:
        tokenizer.chat_template = source.chat_template
    keep_whole(tokenizer, source.whole)
    return tokenizer


def keep_whole(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
    """Make `texts`, or their first words, special tokens where the vocabulary has them.

    A text that begins with one begins with one token then.
    """
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    split = []
    for text in texts:
        spellings = (text, *text.split(None, 1)[:1])
        token = next((spelling for spelling in spellings if spelling in vocabulary), None)
        if token is not None and tokenizer.tokenize(token) != [token]:
            split.append(AddedToken(token, normalized=False, special=True))
    if split:
        tokenizer.add_special_tokens({"additional_special_tokens": split})
