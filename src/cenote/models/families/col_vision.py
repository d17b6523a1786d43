"""Late interaction over pictures: ColQwen2, ColQwen2.5, ColPali, ColQwen3.5, and the published layouts of ColQwen3.

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

from cenote.conventions import MessageTemplate, Pictures
from cenote.core import Media
from cenote.errors import CheckpointError
from cenote.functions import coalesce, optional
from cenote.models.classifiers import linear
from cenote.models.families.multi_vector import MultiVector, is_one, of_modules
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
    from cenote.models.sentence_transformers import SentenceTransformer

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
    "{% elif seen.texts in ('', beside.strip()) %}{{ head }}{{ seen.pictures }}{{ instruction }}{{ tail }}"
    "{% else %}{{ head }}{{ seen.pictures }}{{ beside }}{{ seen.texts }}{{ tail }}{% endif %}"
)
"""Renders a text as a query, and pictures as a page; the text of a page stands behind its pictures.

Clients of vLLM send the instruction as the page's text: it is not said twice.
"""


class Layout(NamedTuple):
    """A published way to write queries and pages.

    Attributes:
        prefix: text before a query.
        begin: text with which a processor begins the texts that its files name.
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
    begin: str = ""


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
        begin="<bos>",
    ),
    "ColQwen3": Layout("", beside=f"{INSTRUCTION} ", most_pixels=1280 * 32**2),
    "ColQwen3_5": Layout("", projection="custom_text_proj.weight"),
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
        attends_both_ways: its language model is not causal, though its class is.
        model_class: see `Family`.
    """

    title: ClassVar[str] = "late interaction over pictures (ColPali)"
    modules = ()
    honours = ""
    hub_files = ()

    layout: Layout = field(default_factory=lambda: Layout(""))
    attends_both_ways: bool = False
    model_class: str = ""

    @classmethod
    def recognise(cls, files: Files, options: ModelConfig) -> ColVision | None:
        """Recognise the name of the architecture, and its kind of language model.

        Raises:
            CheckpointError: the projection is missing; `image_positions`, `dims` or `retrieval_attention_contract` of
                the config is not understood; or Sentence-Transformers files name lengths of sides.
        """
        layout = LAYOUTS.get(files.architecture)
        if layout is None or _kind(files) not in VISIONS or not _reads_all(files.st):
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
        plain = cls(
            layout=layout,
            attends_both_ways=_kind(files) == "paligemma" or _attends_both_ways(files.config),
            model_class=layout.model_class,
            tensors=tuple(names.intersection(files.tensors)),
        )
        return _of_modules(files.st, plain) if is_one(files.st) else plain

    def prepare(self, full: PreTrainedModel) -> None:
        """Take the last norm away where the published code does not run it; let tokens attend both ways.

        A processor gives PaliGemma token types, by which all of an input is a prefix. The config says the same.
        """
        base: Any = full.base_model
        if self.layout.skips_norm:
            base.language_model.norm = nn.Identity()
        if not self.attends_both_ways:
            return
        base.config.is_causal = base.config.text_config.is_causal = False
        for layer in base.language_model.layers:
            if hasattr(layer, "self_attn"):  # Qwen3.5's other layers are recurrences
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
        placed = {"markup": self.sight(files).pictures.markup, "suffix": augmentation + layout.suffix}
        return MessageTemplate(TEMPLATE, variables | placed, structured=True)

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
        pooler = Pooler(loaded.pooler.modes, steps, normalizes, config.dimensions)
        return {"token_embed": TokenEmbed(pooler, clustering=self.clustering)}


def _kind(files: Files) -> str:
    """Return the `model_type` of the vision-language model."""
    return str(getattr(files.config, "vlm_config", files.config).model_type)


READ = {"MultiVectorMask", "HierarchicalTokenPooling"}
"""Modules of sentence-transformers that may stand behind such a model."""


def _reads_all(st: SentenceTransformer) -> bool:
    """Return whether all modules behind the model are among those that are read."""
    kinds = {module.kind for module in st.special}
    return not kinds or (is_one(st) and kinds <= READ)


def _of_modules(st: SentenceTransformer, plain: ColVision) -> ColVision:
    """Return `plain` with the settings of a folder of sentence-transformers' `MultiVectorEncoder`."""
    family = of_modules(st, plain)
    if family.lengths or family.expansion is not None:
        raise CheckpointError(
            "query_length, document_length and query_expansion are not honoured for models that read pages: their "
            "processors add the tokens behind a query; leave them out, or set them to null"
        )
    return family


CONTRACTS = {"causal": False, "bidirectional": True}
"""Values of `retrieval_attention_contract`, and whether tokens attend both ways; without one they do not."""


def _attends_both_ways(config: Any) -> bool:
    """Return whether a config of ColQwen3.5 says that tokens attend both ways.

    Raises:
        CheckpointError: its value is not understood, or its parts differ.
    """
    parts = (config, getattr(config, "text_config", config))
    written: set[Any] = {getattr(part, "retrieval_attention_contract", None) for part in parts} - {None}
    if len(written) > 1 or not written <= CONTRACTS.keys():
        raise CheckpointError(
            f"retrieval_attention_contract is {', '.join(sorted(map(repr, written)))}; expected one of "
            f"{', '.join(CONTRACTS)}, the same in text_config"
        )
    return any(map(CONTRACTS.__getitem__, written))


def _as_processed(files: Files, layout: Layout) -> Layout:
    """Return a layout with the texts that the processor's files name."""
    written = load(files.folder / PROCESSOR)
    prefix, page = (str(written.get(name) or "") for name in ("query_prefix", "visual_prompt_prefix"))
    if prefix:
        layout = layout._replace(prefix=layout.begin + prefix)
    if page and layout.begin:
        return layout._replace(instruction=layout.begin + page)
    head, markup, rest = page.partition(MARKUP)
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
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"), QwenVL),
    "paligemma": PaliVision,
}
"""By the `model_type` of the vision-language model."""
