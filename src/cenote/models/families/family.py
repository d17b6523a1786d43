"""A family: checkpoints that are more than a backbone and its pooling, and all that Cenote knows of them.

A family is a class in a file of its own and a row of `cenote.models.families.table`. It recognises its checkpoints by
their files, and names their needs: files to download, prompts and markers, how queries and documents differ,
outputs, a head that Transformers has no class for, and ways to score. Whatever it does not say is as in `Family`, which
is also the family of all other checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from torch import nn

from cenote.models import weights
from cenote.models.families.sights import Sight, of_backbone, published_template

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cenote.config import ModelConfig
    from cenote.conventions import MessageTemplate, Sides
    from cenote.models.classifiers import Classifier
    from cenote.models.convert import Head
    from cenote.models.facts import Files
    from cenote.models.modules import Module
    from cenote.models.poolers import Pooler, TaskOutput
    from cenote.models.probe import HeadProbe
    from cenote.models.sentence_transformers import Kind, SentenceTransformer
    from cenote.tensors.heads import Step


@dataclass(frozen=True)
class Loaded:
    """A checkpoint whose model is there and proved, for a family to build outputs on.

    Attributes:
        full: the model, with its head if that is one of Transformers'.
        probe: of `full`, if it has a head.
        pooler: how hidden states become vectors, as the files say.
    """

    files: Files
    tokenizer: PreTrainedTokenizerBase
    options: ModelConfig
    full: PreTrainedModel
    probe: HeadProbe | None
    pooler: Pooler

    def tensors(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return the checkpoint's tensors called `names`."""
        return weights.tensors(self.files.folder, names, pickles=self.options.reads_pickles)

    def placed(self, module: nn.Module) -> nn.Module:
        """Return `module`, frozen, where the model is."""
        return module.to(self.full.device).eval().requires_grad_(False)

    def place(self, steps: Iterable[Step]) -> None:
        """Freeze those of `steps` that are modules, where the model is."""
        for step in steps:
            if isinstance(step, nn.Module):
                self.placed(step)


class Family:
    """A kind of checkpoint; this one has nothing of its own.

    Attributes:
        hub_files: patterns of files to download besides the usual ones.
        modules: class names of the Sentence-Transformers modules that it reads.
        honours: how messages name these modules.
        compares: kind of the embeddings that `similarity_fn_name` is about.
        head: the head that the model is loaded with; `None` = as the architecture's name says.
        prefixes: text before a "query" or "document".
        markers: prefixes that a tokenizer must not take apart.
        title: its name in reports; empty = none but its architecture's.
        embeds_tokens: rows are those of tokens, so that `token_embed` is served.
        keeps_lengths: lengths per side that its Sentence-Transformers files name count.
        tasks: served before all others, the one of requests that name none first.
        tensors: names of the checkpoint's tensors that it reads besides the model's.
        model_class: name of the class of Transformers that it is loaded with; empty = as the head says.
        step_tag: vocabulary entry that closes a step, if the head rates steps.
        rates_tokens: the head is made for tokens rather than for whole inputs.
    """

    hub_files: ClassVar[tuple[str, ...]] = ()
    modules: ClassVar[tuple[str, ...]] = ()
    honours: ClassVar[str] = ""
    compares: ClassVar[Kind] = "vectors"
    title: ClassVar[str] = ""
    embeds_tokens: ClassVar[bool] = True

    head: Head | None = None
    prefixes: Mapping[str, str] = MappingProxyType({})
    markers: tuple[str, ...] = ()
    keeps_lengths: bool = True
    tasks: tuple[str, ...] = ()
    tensors: Collection[str] = ()
    model_class: str = ""
    step_tag: str | None = None
    rates_tokens: bool = False

    @classmethod
    def recognise(cls, files: Files, options: ModelConfig) -> Family | None:
        """Return the family of a checkpoint, with all that its files say of it; `None` if they are not of this one.

        Raises:
            CheckpointError: they are, and something in them cannot be honoured.
        """
        return cls()

    @classmethod
    def reads(cls, module: Module, st: SentenceTransformer) -> bool:
        """Return whether the family reads `module` at its place in `st`."""
        return module.kind in cls.modules and not module.side and not st.modes

    def backbone(self, full: PreTrainedModel) -> PreTrainedModel:
        """Return the part of a loaded model that gives the hidden states of texts."""
        return full.base_model  # type: ignore[return-value]

    def prepare(self, full: PreTrainedModel) -> None:
        """Change a loaded model, before anything is proved of it, so that it can be run in a batch."""

    def finish(self, full: PreTrainedModel) -> Callable[[Tensor], Tensor] | None:
        """Return the step from last hidden states to the rows that are pooled; `None` = they are the same."""
        return None

    def sight(self, files: Files) -> Sight | None:
        """Return how the model takes pictures; `None` = it has no part for them."""
        return of_backbone(files)

    def width(self, files: Files) -> int:
        """Return the length of a row that is pooled."""
        return files.width

    def messages(self, files: Files, tokenizer: PreTrainedTokenizerBase) -> MessageTemplate | None:
        """Return how texts and pictures are rendered, unless Sentence-Transformers files say it; `None` = they stay."""
        return published_template(files)

    @property
    def filled_to(self) -> int:
        """Tokens to which queries are filled up with tokens that none attends to; 0 = they are not."""
        return 0

    def sides(self, tokenizer: PreTrainedTokenizerBase) -> Sides | None:
        """Return how queries and documents are encoded, if the model does so differently."""
        return None

    def projector(self, files: Files, options: ModelConfig) -> nn.Linear | None:
        """Return a layer over every row of hidden states, before the modules of Sentence-Transformers."""
        return None

    def outputs(self, loaded: Loaded) -> dict[str, TaskOutput]:
        """Return outputs by task, those that the checkpoint is made for first; others are added behind them."""
        return {}

    def classifier(self, loaded: Loaded) -> Classifier | None:
        """Return the head, if Transformers has no class for it."""
        return None

    def score_types(self, tasks: Collection[str]) -> tuple[str, ...]:
        """Return names of `cenote.pipeline.ranking.WAYS` to compare two texts, the default one first."""
        return ("bi-encoder", "late-interaction") if "token_embed" in tasks else ("bi-encoder",)


@runtime_checkable
class Vectors(Protocol):
    """An output of `embed`.

    Attributes:
        dimension: length of a vector.
        pooling: name of the way in which tokens become one vector, for the report at start.
        use_activation: whether vectors are normalised unless a request says otherwise.
    """

    dimension: int
    pooling: str
    use_activation: bool
