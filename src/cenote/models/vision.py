"""Pictures in a model: from processed pictures to rows that take the places of token embeddings.

`Vision` is the way of most vision-language models of Transformers: a tower turns patches into features, and the
language model reads them among the embeddings of a text. Other ways are classes in the files of their families.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from cenote.core import Media, Sequence
from cenote.tensors.packing import Features
from cenote.tensors.positions import positions_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from collections.abc import Sequence as Seq

    from torch import Tensor
    from transformers import PreTrainedModel

    from cenote.conventions import Pictures

MOST_PATCHES = 4096
"""Patches of a forward of a vision tower; a larger picture has one of its own."""


class KeptFeatures:
    """Features of pictures by their keys; when they exceed `capacity` bytes, the least recently used are dropped.

    Threads may share it. Equal keys are equal pictures, so whoever stores last changes nothing.

    Attributes:
        capacity: bytes; 0 = nothing is kept.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self._entries: OrderedDict[bytes, Features] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Features | None:
        """Return the features of a picture, if they are kept."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: bytes, features: Features) -> None:
        """Keep a copy of the features of a picture, which are a part of those of a batch."""
        size = features.nbytes
        if size > self.capacity:
            return
        features = Features(features.rows_FD.clone(), tuple(layer_FD.clone() for layer_FD in features.deep))
        with self._lock:
            if key in self._entries:
                return
            self._entries[key] = features
            self._bytes += size
            while self._bytes > self.capacity:
                _, dropped = self._entries.popitem(last=False)
                self._bytes -= dropped.nbytes


@dataclass(eq=False)
class Vision:
    """The pictures of one model.

    Attributes:
        full: the model that was loaded.
        pictures: how its inputs hold them.
        kept: features of pictures of earlier batches; of none while the model is changed and proved.
        is_apart: a picture is an input of its own, and its features are the rows that are pooled (two towers).
    """

    full: PreTrainedModel
    pictures: Pictures
    kept: KeptFeatures = field(default_factory=KeptFeatures)

    is_apart: ClassVar[bool] = False

    @property
    def tower(self) -> nn.Module:
        """The part of the model that reads patches."""
        raise NotImplementedError

    @property
    def reader(self) -> nn.Module:
        """The part of the model that reads embeddings among which features stand."""
        return self.full.base_model.language_model  # type: ignore[return-value]

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """Ids before and behind the tokens of a picture in a prompt."""
        return [], []

    def attention(self, name: str) -> str | dict[str, str]:
        """Return the argument of `set_attn_implementation` that gives the text part the attention called `name`."""
        return {"": "sdpa", "text_config": name, "vision_config": "sdpa"}

    def features(self, media: Seq[Media]) -> Features:
        """Return the features of a few pictures, end to end, by one forward of the tower."""
        raise NotImplementedError

    def arguments(self, inputs: dict[str, Any], sources: Tensor, features: Features) -> dict[str, Any]:
        """Return the arguments of the reader's forward.

        Args:
            inputs: `input_ids` `[B, L]`, and further inputs of the model.
            sources: int64 `[B, L]` rows of the features, -1 where a token keeps its embedding.
            features: of the batch.
        """
        table: Any = self.reader.get_input_embeddings()  # type: ignore[operator]
        is_media = sources >= 0
        rows = sources[is_media]
        embeddings_BLD = table(inputs["input_ids"])
        embeddings_BLD[is_media] = features.rows_FD[rows].to(embeddings_BLD.dtype)
        others = {name: value for name, value in inputs.items() if name != "input_ids"}
        deep = self.deep(is_media, rows, features)
        return {**others, **self.by_ids(inputs["input_ids"]), "inputs_embeds": embeddings_BLD, **deep}

    def by_ids(self, ids: Tensor) -> dict[str, Any]:
        """Return further arguments of every forward, of texts alone as well, that the ids of tokens give."""
        return {}

    def deep(self, is_media: Tensor, rows: Tensor, features: Features) -> dict[str, Any]:
        """Return the arguments by which the reader adds `Features.deep`."""
        return {}

    def alone(self, sequence: Sequence) -> Tensor:
        """Return the last hidden states `[L, D]` of one sequence by the model's own forward, as a reference."""
        raise NotImplementedError

    def draw(self, generator: torch.Generator) -> Iterator[Media]:
        """Yield small pictures of random content, of a few sizes in turn, without end."""
        raise NotImplementedError

    def encode(self, media: Seq[Media], *, apart: bool = False) -> Features:
        """Return the features of pictures, end to end, each content once through the tower.

        Args:
            media: the pictures.
            apart: each has a forward of its own, whose bits do not depend on the others.
        """
        by_key = {medium.key: medium for medium in media}
        kept = {key: self.kept.get(key) for key in by_key}
        features = {key: rows for key, rows in kept.items() if rows is not None}
        missing = [medium for key, medium in by_key.items() if key not in features]
        for group in _groups(missing, 1 if apart else MOST_PATCHES):
            parts = self.features(group).split([medium.tokens for medium in group])
            for medium, part in zip(group, parts, strict=True):
                features[medium.key] = part
                self.kept.put(medium.key, part)
        return Features.joined([features[medium.key] for medium in media])

    def stacked(self, media: Seq[Media], name: str) -> Tensor:
        """Return an array of pictures of one size, stacked, where the tower is."""
        return self.placed(np.stack([medium.arrays[name] for medium in media]))

    def joined(self, media: Seq[Media], name: str) -> Tensor:
        """Return an array of pictures of any size, end to end, where the tower is."""
        return self.placed(np.concatenate([medium.arrays[name] for medium in media]))

    def placed(self, array: np.ndarray) -> Tensor:
        """Return an array where the tower is; floating-point numbers in its dtype."""
        tensor = torch.from_numpy(array).to(self.full.device, non_blocking=True)
        return tensor.to(self.full.dtype) if tensor.is_floating_point() else tensor

    def cost(self) -> float:
        """Return the cost of a patch in tokens: by the weights that each is multiplied with."""
        return _weights(self.tower) / max(1, _weights(self.reader))

    def sequence(self, parts: Iterable[list[int] | Media]) -> Sequence:
        """Return the sequence of ids and pictures in that order, as rendering makes it."""
        ids: list[int] = []
        media: list[Media] = []
        spans: list[tuple[int, int]] = []
        before, behind = self.frame
        for part in parts:
            if isinstance(part, Media):
                media.append(part)
                ids += before
                spans.append((len(ids), len(ids) + part.tokens))
                ids += [self.pictures.placeholder] * part.tokens + behind
            else:
                ids += part
        positions = positions_of(self.pictures, len(ids), media, spans)
        return Sequence(ids, media=tuple(media), spans=tuple(spans), positions=positions)


def _groups(media: Iterable[Media], most: int) -> list[list[Media]]:
    """Cut pictures into groups of at most `most` patches; a larger picture has a group of its own."""
    groups: list[list[Media]] = []
    room = 0
    for medium in media:
        if not groups or medium.patches > room:
            groups.append([])
            room = most
        groups[-1].append(medium)
        room -= medium.patches
    return groups


def _weights(module: nn.Module) -> int:
    """Count the weights of a module that every row of it is multiplied with."""
    tables = {id(table.weight) for table in module.modules() if isinstance(table, nn.Embedding)}
    return sum(weights.numel() for weights in module.parameters() if weights.ndim > 1 and id(weights) not in tables)
