"""`cenote` whose model has trouble with long inputs: `python -m tests.trouble KIND COMMAND FLAGS`.

Kinds: `hangs`, a forward that never comes back; `dies`, a device thread that ends; `raises`, a forward that fails;
`renders`, a text that is never tokenised.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

from cenote.cli import main
from cenote.engine import engine
from cenote.models import load

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from transformers import PreTrainedTokenizerBase

    from cenote.core import Sequence
    from cenote.models.model import PoolingModel

LONG = 200
"""Tokens beyond which an input means trouble."""
STUCK = "stuck"


class Troubled:
    """A model that runs as the one inside, but for long inputs."""

    def __init__(self, inner: PoolingModel, kind: str) -> None:
        self._inner = inner
        self._kind = kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def launch(self, sequences: Seq[Sequence]) -> Any:
        if all(len(sequence) <= LONG for sequence in sequences):
            return self._inner.launch(sequences)
        if self._kind == "hangs":
            threading.Event().wait()
        if self._kind == "raises":
            raise IndexError("a text of a neighbour: /srv/model/embeddings.py")
        return Unasked()


class Stuck:
    """A tokenizer's backend that runs as the one inside, but for text with the word `STUCK`."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        if any(STUCK in text for text in texts):
            threading.Event().wait()
        return self._inner.encode_batch_fast(texts, **options)


def stick(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer have trouble."""
    kind = type(tokenizer)
    backend = Stuck(tokenizer.backend_tokenizer)
    tokenizer.__class__ = type(kind.__name__, (kind,), {"backend_tokenizer": property(lambda _: backend)})


class Unasked:
    """A batch that ends the thread that asks for it."""

    def ready(self) -> bool:
        raise SystemExit


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    original = load.load

    def troubled(*options: Any) -> Any:
        model, checkpoint = original(*options)
        if kind == "renders":
            stick(checkpoint.tokenizer)
            return model, checkpoint
        return Troubled(model, kind), checkpoint

    load.load = troubled
    engine.LAST_FORWARDS = 0.5
    sys.exit(main(arguments))
