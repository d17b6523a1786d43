"""A served model: its engine, its renderer and its names. What `LLM` and the server both stand on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from cenote import plugins
from cenote.engine import calibration
from cenote.engine.cache import CachedEngine
from cenote.engine.chunking import ChunkedEngine, late
from cenote.engine.pairs import PairRenderer
from cenote.engine.prompts import Prompts, Sides
from cenote.engine.rendering import Renderer
from cenote.errors import CenoteError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from transformers import PreTrainedModel

    from cenote.config import EngineConfig, ModelConfig
    from cenote.engine.rendering import Prompt, TextOptions
    from cenote.models.checkpoint import Checkpoint
    from cenote.plugins import Plugin
    from cenote.tensors.quantize import Ranges
    from cenote.types import Engine, ModelInfo, Pair, PairTemplate, PoolingParams, Sequence


@dataclass(frozen=True)
class Service:
    """One model, ready.

    Attributes:
        names: what requests may call it; the first is what answers say.
        pair_template: how query and document become one text; `None` = the tokenizer joins them.
        plugin: the IO processor that takes requests with `data`.
        ranges: of int8 and uint8 embeddings; `None` = the fixed range of unit vectors.
        backbone: the Transformers model that the engine runs, for who looks on.
    """

    engine: Engine
    renderer: Renderer
    names: tuple[str, ...]
    pair_template: PairTemplate | None = None
    plugin: Plugin | None = None
    ranges: Ranges | None = None
    backbone: PreTrainedModel | None = None

    @property
    def info(self) -> ModelInfo:
        """What was resolved about the model."""
        return self.engine.info

    @cached_property
    def pairs(self) -> PairRenderer:
        """Renders pairs of texts."""
        return PairRenderer(self.renderer, self.pair_template)

    def render(
        self, prompts: Seq[Prompt | Pair], task: str, params: PoolingParams, options: TextOptions
    ) -> list[Sequence]:
        """Sequences for `prompts`: whatever `Renderer.render` takes, and pairs of texts.

        A pair is `{"text": ..., "text_pair": ...}`, as in Transformers' pipelines, or a tuple of two texts.
        """
        if params.late_chunking_params is not None:
            return late(self.renderer, prompts, task, params, options)
        pairs = {i: pair for i, prompt in enumerate(prompts) if (pair := _pair(prompt)) is not None}
        if not pairs:
            return self.renderer.render(prompts, task, params, options)
        joined = dict(zip(pairs, self.pairs.render(list(pairs.values()), task, params, options), strict=True))
        others = [i for i in range(len(prompts)) if i not in pairs]
        if others:
            single = self.renderer.render([prompts[i] for i in others], task, params, options)
            joined |= dict(zip(others, single, strict=True))
        return [joined[i] for i in range(len(prompts))]

    @classmethod
    def load(cls, model: ModelConfig, engine: EngineConfig, *, max_queued: int | None = None) -> Service:
        """Load the checkpoint and start its engine."""
        from cenote.engine.engine import LocalEngine
        from cenote.models import assembly

        pooling_model, checkpoint = assembly.load(model)
        st = checkpoint.st
        renderer = Renderer(
            checkpoint.tokenizer,
            pooling_model.info,
            lowercase=bool(st and st.do_lower_case),
            prompts=_prompts(checkpoint, model, pooling_model.info.adapters),
            include_prompt=st.include_prompt if st else True,
            sides=_sides(checkpoint),
            auto_truncate=model.auto_truncate,
        )
        names = model.served_model_name or (checkpoint.name,)
        plugin = plugins.load(model.io_processor_plugin, checkpoint, renderer)
        local = LocalEngine(
            pooling_model,
            max_batch_tokens=engine.max_num_batched_tokens,
            max_batch_sequences=engine.max_num_seqs,
            max_queued=max_queued or engine.max_queued_seqs,
            threads=engine.threads,
            streams=engine.streams,
        )
        ranges = None
        if model.calibration is not None:
            dimension = model.pooler_config.dimensions or local.info.dimension
            try:
                ranges = calibration.load(model.calibration, dimension, renderer, ChunkedEngine(local))
            except CenoteError:
                local.close()
                raise
        running: Engine = CachedEngine(local, engine.cache_size << 20) if engine.cache_size else local
        if local.info.limit("embed") > local.info.max_model_len:
            running = ChunkedEngine(running)
        backbone = pooling_model.layout.backbone.model
        return cls(running, renderer, names, checkpoint.pair_template, plugin, ranges, backbone)


def _prompts(checkpoint: Checkpoint, options: ModelConfig, adapters: tuple[str, ...]) -> Prompts:
    """The checkpoint's prompts with the user's; in a late-interaction model its markers are part of them."""
    st, late = checkpoint.st, checkpoint.multi_vector
    own = st.prompts if st else getattr(checkpoint.config, "task_instructions", None) or {}
    named = {**own, **(late.prefixes if late else {}), **(options.prompts or {})}
    default = options.default_prompt_name or (st.default_prompt_name if st else None)
    if default is not None and default not in {*named, *adapters}:
        raise ConfigError(f"default_prompt_name is {default!r}, but the prompts are {sorted({*named, *adapters})}")
    return Prompts(named, default, two_sided=late is not None or _by_table(checkpoint), adapters=adapters)


def _by_table(checkpoint: Checkpoint) -> bool:
    """Whether queries are encoded by a table of weights."""
    return checkpoint.head.kind == "lexical" and checkpoint.st is not None and checkpoint.st.query_weights is not None


def _sides(checkpoint: Checkpoint) -> Sides | None:
    late, tokenizer = checkpoint.multi_vector, checkpoint.tokenizer
    if late is None:
        return Sides(by_table=True) if _by_table(checkpoint) else None
    fill = late.expansion
    return Sides(
        lengths=late.lengths,
        fill_to=fill.length if fill else 0,
        fill_id=late.expansion_id(tokenizer) or 0,
        fixed=fill.fixed if fill else True,
        attend=fill.attend if fill else False,
        skipped=late.skipped_ids(tokenizer),
        skipped_of=late.skipped_of,
        pooled_of=late.pooled_of,
    )


def _pair(prompt: Prompt | Pair) -> Pair | None:
    """The two texts of a prompt that is a pair."""
    if isinstance(prompt, Mapping) and set(prompt) == {"text", "text_pair"}:
        first, second = prompt["text"], prompt["text_pair"]
    elif isinstance(prompt, tuple) and len(prompt) == 2:
        first, second = prompt
    else:
        return None
    return (first, second) if isinstance(first, str) and isinstance(second, str) else None
