"""Token ids in requests: refused where another tokenizer made them, or read as the text that it made them of."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from cenote import cl100k
from cenote.errors import BadRequest, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cenote.config import ServerConfig
    from cenote.pipeline.rendering import Renderer
    from cenote.pipeline.tokenizing import Ids

    Reader = Callable[[Ids], Ids | str]
    """Returns the ids of a request as they are run, or their text."""

log = logging.getLogger(__name__)


def reader(config: ServerConfig) -> Callable[[Renderer], Reader | None]:
    """Return the function that gives each renderer its reader of token ids, as `--token-ids` has it.

    Raises:
        ConfigError: the vocabulary of the ids cannot be read.
    """
    if config.token_ids == "native":
        return lambda renderer: None
    if config.token_ids == "strict":
        return strict
    try:
        vocabulary = cl100k.Vocabulary(cl100k.find(config.token_ids_vocabulary))
    except ValueError as error:
        raise ConfigError(f"--token-ids cl100k: {error}") from error
    return lambda renderer: partial(_text, vocabulary)


def strict(renderer: Renderer) -> Reader:
    """Return a reader that refuses ids without any of the special tokens that the tokenizer always adds.

    The ids of a tokenizer that adds none look like any other's: they are run, and the log tells so once.
    """
    added = frozenset(renderer.tokenize("")).intersection(renderer.tokenizer.all_special_ids)
    return partial(_own, renderer, added) if added else _Unknown(renderer.info.name)


class _Unknown:
    """Returns ids that nothing is known of, and warns of the first ones.

    Args:
        name: of the model.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_warned = False

    def __call__(self, ids: Ids) -> Ids:
        """Return `ids`."""
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "requests send token ids to %s, whose tokenizer adds no special tokens, so that ids of another one are "
                "not noticed; LangChain's OpenAIEmbeddings sends those of OpenAI's unless it is told "
                "check_embedding_ctx_length=False",
                self._name,
            )
        return ids


def _own(renderer: Renderer, added: frozenset[int], ids: Ids) -> Ids:
    if not ids or not added.isdisjoint(ids):
        return ids
    tokens = " or ".join(renderer.token_strings(sorted(added)))
    raise BadRequest(
        f"got {len(ids)} token ids without {tokens}, which the tokenizer of {renderer.info.name} always adds; expected "
        "ids that it made, for those of other tokenizers are other words here. Send text (LangChain's "
        "OpenAIEmbeddings: check_embedding_ctx_length=False), or start the server with --token-ids native, which runs "
        "ids as they are, or cl100k, which reads those of OpenAI's tokenizer as text",
        param="input",
    )


def _text(vocabulary: cl100k.Vocabulary, ids: Ids) -> str:
    try:
        return vocabulary.text(ids)
    except KeyError as error:
        raise BadRequest(
            f"got the token id {error}, which is not in OpenAI's vocabulary cl100k_base; this server reads all token "
            "ids as its (--token-ids cl100k). Send text",
            param="input",
        ) from error
