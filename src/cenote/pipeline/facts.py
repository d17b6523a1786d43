"""The facts of a model that rendering needs: plain data, so that text can be rendered in another process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from cenote.core import ModelInfo, PairTemplate, Sides
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
        names: what requests may call it; the first is what answers say.
        tokenizer: where its tokenizer comes from.
        prompts: its prompts.
        sides: how it encodes the two sides of a search, if it does so differently.
        pair_template: how query and document become one text; `None` = the tokenizer joins them.
        lowercase: text is lower-cased before it is tokenised.
        include_prompt: whether pooling looks at the prompt.
        auto_truncate: what is too long is cut unless the request says otherwise.
        ranges: low and high ends of int8 and uint8 embeddings, one of each for a dimension; `None` = those of unit
            vectors.
    """

    names: tuple[str, ...]
    tokenizer: TokenizerSource
    prompts: Prompts = field(default_factory=Prompts)
    sides: Sides | None = None
    pair_template: PairTemplate | None = None
    lowercase: bool = False
    include_prompt: bool = True
    auto_truncate: bool = False
    ranges: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @classmethod
    def of(cls, plain: Any) -> Facts:
        """The facts that `plain` made plain.

        Raises:
            ValueError: they are of another form.
        """
        try:
            return msgspec.convert(plain, cls)
        except msgspec.ValidationError as error:
            raise ValueError(f"the facts of a model cannot be read: {error}") from error

    def plain(self) -> Any:
        """The facts as numbers, texts, lists and mappings."""
        return msgspec.to_builtins(self)

    def renderer(self, tokenizer: PreTrainedTokenizerBase, info: ModelInfo) -> Renderer:
        """The renderer of a model.

        Args:
            tokenizer: made as `self.tokenizer` says.
            info: of the model.
        """
        return Renderer(
            tokenizer,
            info,
            lowercase=self.lowercase,
            prompts=self.prompts,
            include_prompt=self.include_prompt,
            sides=self.sides,
            auto_truncate=self.auto_truncate,
        )

    def quantisation(self) -> Ranges | None:
        """The ranges of int8 and uint8 embeddings."""
        if self.ranges is None:
            return None
        low, high = self.ranges
        return Ranges(np.array(low, np.float32), np.array(high, np.float32))
