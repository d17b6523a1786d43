"""Late interaction over pictures: ColQwen2, ColQwen2.5, ColPali, and the three published layouts of ColQwen3.

The last hidden states of a vision-language model are projected and normalised, and pages are compared with queries by
MaxSim (ColPali, arXiv:2407.01449). A text is rendered as a query; a page stands in a user's message of its own. The
rules are those of `ColQwen2Processor` and `ColPaliProcessor`, and of the code that the ColQwen3 checkpoints bring.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn

from cenote.core import Media, MessageTemplate, Pictures, coalesce, optional
from cenote.errors import CheckpointError
from cenote.models.classifiers import linear
from cenote.models.families.multi_vector import MultiVector
from cenote.models.families.qwen_vl import MARKUP, QwenVL
from cenote.models.families.sights import Sight
from cenote.models.poolers import Pooler, TokenEmbed
from cenote.models.reading import load
from cenote.models.vision import Vision
from cenote.tensors.packing import Features

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from collections.abc import Sequence as Seq

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cenote.config import ModelConfig
    from cenote.core import Sequence
    from cenote.models.facts import Files
    from cenote.models.families.family import Loaded
    from cenote.models.poolers import TaskOutput

AUGMENTATION = 10
"""Padding tokens behind a query, which attend, are attended to, and count in MaxSim."""

POSITIONS = ("flat", "mrope")
PROJECTION = "embedding_proj_layer.weight"
PROCESSOR = "processor_config.json"
INSTRUCTION = "Describe the image."

TEMPLATE = (
    "{% set seen = namespace(pictures='', texts='') %}"
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{% set seen.pictures = seen.pictures ~ markup %}"
    "{% else %}{% set seen.texts = seen.texts ~ part.text %}{% endif %}"
    "{% endfor %}{% endfor %}"
    "{% if not seen.pictures %}{{ prefix }}{{ seen.texts }}{{ suffix }}"
    "{% elif not seen.texts %}{{ head }}{{ seen.pictures }}{{ instruction }}{{ tail }}"
    "{% else %}{{ head }}{{ seen.pictures }}{{ beside }}{{ seen.texts }}{{ tail }}{% endif %}"
)
"""Renders a text as a query, and pictures as a page; the text of a page stands behind its pictures."""


class Layout(NamedTuple):
    """A published way to write queries and pages.

    Attributes:
        prefix: text before a query.
        suffix: text behind it and its augmentation.
        head: text before the pictures of a page.
        instruction: text behind them, where the page has no text of its own.
        beside: text behind them, before the page's own text.
        tail: text at the end of a page.
        augmentation: padding tokens behind a query.
        positions: one of `POSITIONS`.
        model_class: name of the class of Transformers, if it has one.
        skips_norm: the last norm of the language model is not run.
        projection: name of the weight of the projection; empty = there is none.
        most_pixels: see `Pictures`.
    """

    prefix: str
    suffix: str = ""
    head: str = "<|im_start|>user\n"
    instruction: str = INSTRUCTION
    beside: str = ""
    tail: str = "<|im_end|><|endoftext|>"
    augmentation: int = AUGMENTATION
    positions: str = "mrope"
    model_class: str = ""
    skips_norm: bool = False
    projection: str = PROJECTION
    most_pixels: int = 0


ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
LAYOUTS: Mapping[str, Layout] = {
    "ColQwen2ForRetrieval": Layout("Query: ", "\n", positions="flat", model_class="ColQwen2ForRetrieval"),
    "ColPaliForRetrieval": Layout(
        "<bos>Question: ",
        "\n",
        head="",
        instruction=f"<bos>{INSTRUCTION}",
        beside="<bos>",
        tail="\n",
        positions="flat",
        model_class="ColPaliForRetrieval",
    ),
    "ColQwen3": Layout("", beside=f"{INSTRUCTION} ", most_pixels=1280 * 32**2),
    "OpsColQwen3Model": Layout(
        "Query: ", tail="<|im_end|><|im_start|>assistant\n<|endoftext|>", projection="custom_text_proj.weight"
    ),
    "Qwen3VLNemotronEmbedModel": Layout(
        "<|im_start|>user\nQuery: query: ",
        ASSISTANT,
        instruction="passage: ",
        beside="passage: ",
        tail=ASSISTANT,
        augmentation=0,
        skips_norm=True,
        projection="",
    ),
}
"""By the name of the architecture."""


@dataclass(frozen=True)
class ColVision(MultiVector):
    """A checkpoint that compares pages with queries.

    Attributes:
        layout: how it writes them.
        model_class: see `Family`.
    """

    title: ClassVar[str] = "late interaction over pictures (ColPali)"
    modules = ()
    honours = ""
    hub_files = ()

    layout: Layout = field(default_factory=lambda: Layout(""))
    model_class: str = ""

    @classmethod
    def recognise(cls, files: Files, options: ModelConfig) -> ColVision | None:
        """Recognise the name of the architecture, and its kind of language model.

        Raises:
            CheckpointError: the projection is missing; `image_positions` or `dims` of the config is not understood.
        """
        layout = LAYOUTS.get(files.architecture)
        if layout is None or _kind(files) not in VISIONS or files.st.special:
            return None
        positions = getattr(files.config, "image_positions", layout.positions)
        if positions not in POSITIONS:
            raise CheckpointError(f"image_positions is {positions!r}, expected one of {', '.join(POSITIONS)}")
        if layout.projection and layout.projection not in files.tensors:
            raise CheckpointError(f"{files.architecture} projects its rows by {layout.projection}, which is not there")
        dims = getattr(files.config, "dims", 1)
        if type(dims) is not int or dims < 1:
            raise CheckpointError(f"dims in config.json is {dims!r}, expected a positive integer")
        layout = _as_processed(files, layout)._replace(positions=positions)
        names = {layout.projection, layout.projection.removesuffix("weight") + "bias"}
        return cls(layout=layout, model_class=layout.model_class, tensors=tuple(names.intersection(files.tensors)))

    def prepare(self, full: PreTrainedModel) -> None:
        """Take the last norm away where the published code does not run it; let PaliGemma attend both ways.

        A processor gives PaliGemma token types, by which all of an input is a prefix. The config says the same.
        """
        base: Any = full.base_model
        if self.layout.skips_norm:
            base.language_model.norm = nn.Identity()
        if base.config.model_type != "paligemma":
            return
        base.config.is_causal = base.config.text_config.is_causal = False
        for layer in base.language_model.layers:
            layer.self_attn.is_causal = False

    def sight(self, files: Files) -> Sight:
        """Return how the model takes pictures."""
        kind = VISIONS[_kind(files)]
        pictures = kind.describe(files)
        most = self.layout.most_pixels or pictures.most_pixels
        return Sight(kind, replace(pictures, positions=self.layout.positions, most_pixels=most))

    def messages(self, files: Files, tokenizer: PreTrainedTokenizerBase) -> MessageTemplate:
        """Return how texts and pages are rendered."""
        layout = self.layout
        variables = {name: getattr(layout, name) for name in ("prefix", "head", "instruction", "beside", "tail")}
        augmentation = str(tokenizer.pad_token) * layout.augmentation
        own = {"markup": self.sight(files).pictures.markup, "suffix": augmentation + layout.suffix}
        return MessageTemplate(TEMPLATE, variables | own, structured=True)

    def outputs(self, loaded: Loaded) -> dict[str, TaskOutput]:
        """Return token vectors, projected; `dims` of a config are those that are kept."""
        config = loaded.options.pooler_config
        steps: tuple[nn.Linear, ...] = ()
        if self.layout.projection:
            tensors = loaded.tensors(self.tensors)
            kept = slice(getattr(loaded.files.config, "dims", None))
            bias = tensors.get(self.layout.projection.removesuffix("weight") + "bias")
            steps = (linear(tensors[self.layout.projection][kept], optional(lambda row: row[kept], bias)),)
        loaded.place(steps)
        normalizes = coalesce(config.use_activation, True)
        return {"token_embed": TokenEmbed(Pooler(loaded.pooler.modes, steps, normalizes, config.dimensions))}


def _kind(files: Files) -> str:
    """Return the `model_type` of the vision-language model."""
    return str(getattr(files.config, "vlm_config", files.config).model_type)


def _as_processed(files: Files, layout: Layout) -> Layout:
    """Return a layout with the texts that the processor's files name."""
    written = load(files.folder / PROCESSOR)
    layout = layout._replace(prefix=str(written.get("query_prefix") or layout.prefix))
    head, markup, rest = str(written.get("visual_prompt_prefix") or "").partition(MARKUP)
    if not markup:
        return layout
    before, instruction, tail = rest.partition(INSTRUCTION)
    if not instruction:
        return layout._replace(head=head, instruction="", beside="", tail=rest)
    return layout._replace(head=head, instruction=before + instruction, beside=before, tail=tail)


class PaliVision(Vision):
    """The pictures of PaliGemma: of one size, each patch a token."""

    @classmethod
    def describe(cls, files: Files) -> Pictures:
        """Return how its inputs hold pictures."""
        config = files.config.vlm_config
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        return Pictures(
            folder=str(files.folder.absolute()),
            layout="fixed",
            placeholder=int(config.image_token_id),
            markup="<image>",
            tokens=patches,
            patches=patches,
            first_position=1,
        )

    @property
    def tower(self) -> nn.Module:
        """The part of the model that reads patches."""
        return self._base.vision_tower  # type: ignore[no-any-return]

    @property
    def _base(self) -> Any:
        return self.full.base_model

    def features(self, media: Seq[Media]) -> Features:
        """Return the features of a few pictures, end to end, by one forward of the tower."""
        output = self._base.get_image_features(self.stacked(media, "pixel_values"), return_dict=True)
        return Features(output.pooler_output.flatten(0, 1))

    def alone(self, sequence: Sequence) -> Tensor:
        """Return the last hidden states `[L, D]` of one sequence by the model's own forward, as a reference."""
        ids_1L = torch.tensor([list(sequence.ids)], device=self.full.device)
        pixels = self.stacked(sequence.media, "pixel_values") if sequence.media else None
        types_1L = torch.zeros_like(ids_1L)
        output = self._base(input_ids=ids_1L, pixel_values=pixels, token_type_ids=types_1L, use_cache=False)
        return output[0][0]  # type: ignore[no-any-return]

    def draw(self, generator: torch.Generator) -> Iterator[Media]:
        """Yield pictures of random content, without end."""
        side, tokens = self._base.config.vision_config.image_size, self.pictures.tokens
        for number in count():
            arrays = {"pixel_values": torch.randn(3, side, side, generator=generator).numpy()}
            yield Media(number.to_bytes(8), tokens, tokens, arrays=arrays)


VISIONS: Mapping[str, type[QwenVL | PaliVision]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), QwenVL),
    "paligemma": PaliVision,
}
"""By the `model_type` of the vision-language model."""
