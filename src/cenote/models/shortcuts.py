"""Shortens Python's way through a model whose classes stay as they are: much of a short text's forward.

Neither changes what a model computes:

- `nn.Module` keeps its children in a dictionary of its own, and every `self.layer` calls a function that looks there.
  Here they are attributes as well, which Python finds by itself.
- `apply_chunking_to_forward`, through which the feed-forward layers of the BERT family run, inspects the signature of
  what it calls, each time. Here that carries its signature.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

CHUNK = "feed_forward_chunk"


def shorten(model: nn.Module) -> None:
    """Shorten the way through all modules of `model`, from which no child is taken after that past `setattr`."""
    for module in model.modules():
        own: dict[str, Any] = {name: child for name, child in module._modules.items() if child is not None}
        if inspect.ismethod(chunk := getattr(module, CHUNK, None)):
            own[CHUNK] = partial(chunk)
            own[CHUNK].__signature__ = inspect.signature(chunk)
        vars(module).update({name: x for name, x in own.items() if name == CHUNK or not hasattr(type(module), name)})
