"""The facts of a model that rendering needs: plain data, so that text can be rendered in another process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from cenote.adapters import LoraModule
from cenote.conventions import Cuts, MessageTemplate, PairTemplate, Pictures, Sides
from cenote.core import ModelInfo
from cenote.pipeline.prompts import Prompts
from cenote.pipeline.rendering import Renderer
from cenote.tensors.quantize import Ranges
from cenote.tokenizer import TokenizerSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Facts:
    """The facts of a model that rendering needs, besides its `ModelInfo`.

    Attributes:
        names: names in requests; the first is the one in answers.
        tokenizer: source of the tokenizer.
        prompts: the model's prompts.
        sides: the encoding of queries and of documents, in a model that encodes them differently.
        pair_template: template that joins query and document; `None` = the tokenizer joins them.
        messages: template that renders every text; `None` = texts are taken as they are.
        special_tokens: the tokenizer's special tokens belong to the model's inputs.
        lowercase: text is lower-cased before it is tokenised.
        include_prompt: whether pooling includes the tokens of the prompt.
        pictures: how the model's inputs hold pictures; `None` = it has no part for them.
        auto_truncate: inputs that are too long are cut unless the request says otherwise.
        cuts: text of a pair that is cut.
        lora_modules: adapters that requests choose by name.
        dimensions: length to which vectors are cut unless a request says otherwise; `None` = they are not. The engine
            cuts them; a front does not go on with an engine that cuts them otherwise.
        ranges: low and high ends of int8 and uint8 embeddings, one of each per dimension; `None` = those of unit
            vectors.
    """

    names: tuple[str, ...]
    tokenizer: TokenizerSource
    prompts: Prompts = field(default_factory=Prompts)
    sides: Sides | None = None
    pair_template: PairTemplate | None = None
    messages: MessageTemplate | None = None
    pictures: Pictures | None = None
    special_tokens: bool = True
    lowercase: bool = False
    include_prompt: bool = True
    auto_truncate: bool = False
    cuts: Cuts = "longest_first"
    lora_modules: tuple[LoraModule, ...] = ()
    dimensions: int | None = None
    ranges: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @classmethod
    def of(cls, plain: Any) -> Facts:
        """Return the facts that `Facts.plain` made plain.

        Raises:
            ValueError: `plain` has another form.
        """
        try:
            return msgspec.convert(plain, cls)
        except msgspec.ValidationError as error:
            raise ValueError(f"the facts of a model cannot be read: {error}") from error

    def plain(self) -> Any:
        """Return the facts as numbers, texts, lists and mappings."""
        return msgspec.to_builtins(self)

    def renderer(self, tokenizer: PreTrainedTokenizerBase, info: ModelInfo) -> Renderer:
        """Return the renderer of the model.

        Args:
            tokenizer: the tokenizer from the source `self.tokenizer`.
            info: the model's information.
        """
        return Renderer(
            tokenizer,
            info,
            lowercase=self.lowercase,
            messages=self.messages,
            special_tokens=self.special_tokens,
            prompts=self.prompts,
            include_prompt=self.include_prompt,
            sides=self.sides,
            auto_truncate=self.auto_truncate,
            cuts=self.cuts,
            pictures=self.pictures,
        )

    def quantisation(self) -> Ranges | None:
        """Return the ranges of int8 and uint8 embeddings; `None` = those of unit vectors."""
        if self.ranges is None:
            return None
        low, high = self.ranges
        return Ranges(np.array(low, np.float32), np.array(high, np.float32))
