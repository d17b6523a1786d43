"""Qwen2-VL to Qwen3.5: a tower over patches of any grid, whose features stand among a text's embeddings.

Where a picture stands and how an input is rendered follow the published code: `Qwen2VLModel.get_rope_index`, the
scripts of Qwen3-VL-Embedding (arXiv:2601.04720) and of GME (arXiv:2412.16855).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from inspect import signature
from itertools import count, cycle
from typing import TYPE_CHECKING, Any

import torch

from cenote.conventions import MessageTemplate, Pictures
from cenote.core import Media
from cenote.models.vision import Vision
from cenote.tensors.packing import Features

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from collections.abc import Sequence as Seq

    from torch import Tensor, nn

    from cenote.core import Sequence
    from cenote.models.facts import Files

MARKUP = "<|vision_start|><|image_pad|><|vision_end|>"


RENDERED = "<|im_start|>"
"""Beginning of a text that its client has rendered: it stays as it is."""

TEMPLATE = (
    "{%- set seen = namespace(system=system, pictures='', texts='') -%}"
    "{%- for message in messages -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{%- set seen.pictures = seen.pictures ~ markup -%}"
    "{%- elif message.role == 'system' -%}{%- set seen.system = part.text | trim -%}"
    "{%- else -%}{%- set seen.texts = seen.texts ~ part.text -%}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}"
    "{%- if seen.texts.startswith(rendered) -%}{{ seen.texts }}{%- else -%}"
    "{%- if closers and seen.system[-1:] not in closers -%}{%- set seen.system = seen.system ~ '.' -%}{%- endif -%}"
    "{%- set prefix = prefixes.get(task or '', prefixes['']) -%}"
    "{%- if seen.texts.startswith(prefix) -%}{%- set prefix = '' -%}{%- endif -%}"
    "<|im_start|>system\n{{ seen.system }}<|im_end|>\n<|im_start|>user\n{{ seen.pictures }}"
    "{%- if seen.texts -%}{{ prefix }}{{ seen.texts }}{%- else -%}{{ beside if seen.pictures else empty }}{%- endif -%}"
    "<|im_end|>\n<|im_start|>assistant\n{{ end }}{%- endif -%}"
)
"""Renders pictures and then texts in a user's message, as the scripts of these models do, whatever the order sent."""


@dataclass(frozen=True)
class Published:
    """The way in which a published model reads pictures and texts.

    Attributes:
        name: pattern of the names of its checkpoints.
        system: text of the system message unless a prompt replaces it.
        most_pixels: pixels to which its code shrinks pictures; 0 = as the image processor says.
        end: text behind the beginning of an answer.
        prefixes: text before a text, by its side; the one of "" where that is not known.
        beside: text of a page that has none of its own.
        empty: text of an input with neither pictures nor text.
        blank: see `Pictures`.
        closes: a system message ends with a punctuation mark, or gets a full stop.
    """

    name: str
    system: str
    most_pixels: int = 0
    end: str = ""
    prefixes: Mapping[str, str] = field(default_factory=lambda: {"": ""})
    beside: str = ""
    empty: str = ""
    blank: int = 0
    closes: bool = False

    def template(self) -> MessageTemplate:
        """Return the template of texts and pictures."""
        names = ("system", "end", "prefixes", "beside", "empty")
        variables = {name: getattr(self, name) for name in names}
        variables |= {"markup": MARKUP, "rendered": RENDERED, "closers": PUNCTUATION if self.closes else ""}
        return MessageTemplate(TEMPLATE, variables, structured=True, takes_task=True)


PUNCTUATION = "".join(filter(lambda sign: unicodedata.category(sign).startswith("P"), map(chr, range(0x10000))))
ASSISTANT = "You are a helpful assistant."
PUBLISHED = (
    Published(r"gme-?qwen2-?vl", ASSISTANT, 1280 * 28**2, end="<|endoftext|>"),
    Published(r"qwen3-?vl-?embedding", "Represent the user's input.", 1800 * 32**2, empty="NULL", closes=True),
    Published(
        r"dse-?qwen2",
        ASSISTANT,
        2560 * 28**2,
        end="<|endoftext|>",
        prefixes={"": "Query: ", "document": "Document: "},
        beside="What is shown in this image?",
        blank=56,
    ),
)


def published(files: Files) -> Published | None:
    """Return how the model of these files reads inputs, if its name is one of those known."""
    title = files.location.title
    return next((row for row in PUBLISHED if re.search(row.name, title, re.IGNORECASE)), None)


class QwenVL(Vision):
    """The pictures of a Qwen-VL model."""

    @classmethod
    def describe(cls, files: Files) -> Pictures:
        """Return how its inputs hold pictures."""
        row = published(files)
        config = getattr(files.config, "vlm_config", files.config)
        chat = MessageTemplate(None, {"add_generation_prompt": True}, structured=True)
        return Pictures(
            folder=str(files.folder.absolute()),
            layout="grid",
            placeholder=int(config.image_token_id),
            markup=MARKUP,
            merge=int(config.vision_config.spatial_merge_size),
            positions="mrope",
            most_pixels=0 if row is None else row.most_pixels,
            template=chat if row is None else row.template(),
            blank=0 if row is None else row.blank,
            rendered=RENDERED,
        )

    @property
    def base(self) -> Any:
        """The model of tower and language model."""
        return self.full.base_model

    @property
    def tower(self) -> nn.Module:
        """The part of the model that reads patches."""
        return self.base.visual  # type: ignore[no-any-return]

    @property
    def reader(self) -> nn.Module:
        """The part of the model that reads embeddings among which features stand."""
        return self.base.language_model  # type: ignore[no-any-return]

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """Ids before and behind the tokens of a picture in a prompt."""
        return [self.base.config.vision_start_token_id], [self.base.config.vision_end_token_id]

    @property
    def patch_width(self) -> int:
        """Numbers of a patch."""
        config = self.base.config.vision_config
        return int(config.in_channels * config.temporal_patch_size * config.patch_size**2)

    def features(self, media: Seq[Media]) -> Features:
        """Return the features of a few pictures, end to end, by one forward of the tower."""
        output = self.base.get_image_features(*self._patches(media), return_dict=True)
        deep = getattr(output, "deepstack_features", None) or ()
        return Features(_joined(output.pooler_output), tuple(map(_joined, deep)))

    def deep(self, is_media: Tensor, rows: Tensor, features: Features) -> dict[str, Any]:
        """Return the arguments by which the reader adds `Features.deep` (DeepStack, arXiv:2406.04334)."""
        if not features.deep:
            return {}
        return {"visual_pos_masks": is_media, "deepstack_visual_embeds": [layer[rows] for layer in features.deep]}

    def alone(self, sequence: Sequence) -> Tensor:
        """Return the last hidden states `[L, D]` of one sequence by the model's own forward, as a reference."""
        ids_1L = torch.tensor([list(sequence.ids)], device=self.full.device)
        types_1L = torch.zeros_like(ids_1L)
        for start, stop in sequence.spans:
            types_1L[0, start:stop] = 1
        inputs: dict[str, Any] = {"input_ids": ids_1L, "mm_token_type_ids": types_1L, "use_cache": False}
        inputs |= self.by_ids(ids_1L)
        if sequence.media:
            inputs["pixel_values"], inputs["image_grid_thw"] = self._patches(sequence.media)
        if self.pictures.positions == "flat":
            inputs["position_ids"] = torch.arange(len(sequence), device=self.full.device).expand(3, 1, -1)
        taken = signature(self.base.forward).parameters
        output = self.base(**{name: value for name, value in inputs.items() if name in taken})
        self.base.rope_deltas = None  # it is left by a forward that computes positions, for the next one
        return output[0][0]  # type: ignore[no-any-return]

    def draw(self, generator: torch.Generator) -> Iterator[Media]:
        """Yield small pictures of random content, of a few sizes in turn, without end."""
        side = self.pictures.merge
        sizes = cycle(((side, 2 * side), (2 * side, side), (2 * side, 2 * side)))
        for number, (rows, columns) in zip(count(), sizes):
            patches = rows * columns
            arrays = {"pixel_values": torch.randn(patches, self.patch_width, generator=generator).numpy()}
            yield Media(number.to_bytes(8), patches // side**2, patches, (1, rows, columns), arrays)

    def _patches(self, media: Seq[Media]) -> tuple[Tensor, Tensor]:
        """Return the patches of pictures end to end, and their grids."""
        grids = torch.tensor([medium.grid for medium in media], device=self.full.device)
        return self.joined(media, "pixel_values"), grids


def _joined(rows: Tensor | Seq[Tensor]) -> Tensor:
    """Return the rows of several pictures end to end; some releases of Transformers give them one by one."""
    return rows if isinstance(rows, torch.Tensor) else torch.cat(tuple(rows))
