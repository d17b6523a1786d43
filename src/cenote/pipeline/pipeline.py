"""A served model: its engine, its renderer and its names. `LLM` and the server are both built on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import filterfalse
from typing import TYPE_CHECKING, Any

from cenote import tokenizer
from cenote.conventions import MOST_PICTURES
from cenote.engine.blocks import ChunkedEngine
from cenote.engine.cache import CachedEngine
from cenote.engine.remote import PATIENCE, RemoteEngine
from cenote.errors import ConfigError
from cenote.functions import map_apart
from cenote.pipeline import calibration, plugins
from cenote.pipeline.facts import Facts
from cenote.pipeline.late_chunking import late
from cenote.pipeline.pairs import PairRenderer
from cenote.pipeline.prompts import Prompts

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from cenote.adapters import LoraModule
    from cenote.config import EngineConfig, ModelConfig
    from cenote.conventions import PairTemplate, Pictures
    from cenote.core import Engine, ModelInfo, PoolingParams, Sequence
    from cenote.models.checkpoint import Checkpoint
    from cenote.models.model import PoolingModel
    from cenote.pipeline.inputs import Pair, Prompt
    from cenote.pipeline.options import TextOptions
    from cenote.pipeline.plugins import Plugin
    from cenote.pipeline.rendering import Renderer
    from cenote.tensors.quantize import Ranges


@dataclass(frozen=True)
class Service:
    """One model, ready.

    Attributes:
        names: names in requests; the first is the one in answers.
        pair_template: template that joins query and document; `None` = the tokenizer joins them.
        plugin: the IO processor of requests with `data`.
        ranges: ranges of int8 and uint8 embeddings; `None` = the fixed range of unit vectors.
        facts: the facts that another process needs in order to render for this engine; `None` = not known.
        adapter: name of the adapter that all requests run with.
        root: folder or hub id of that adapter.
        parent: name of the model that it changes.
        add_adapter: adds an adapter, by its name and its folder or hub id; `None` = the model is in another process.
    """

    engine: Engine
    renderer: Renderer
    names: tuple[str, ...]
    pair_template: PairTemplate | None = None
    plugin: Plugin | None = None
    ranges: Ranges | None = None
    facts: Facts | None = None
    adapter: str | None = None
    root: str = ""
    parent: str | None = None
    add_adapter: Callable[[str, str], None] | None = None

    @property
    def views(self) -> tuple[Service, ...]:
        """The model, and the model with each adapter that requests choose by name."""
        if self.facts is None:
            return (self,)
        return (self, *map(self.adapted, self.facts.lora_modules))

    def adapted(self, module: LoraModule) -> Service:
        """Return the model with one of its adapters, under the adapter's name.

        Names of prompts and sides choose prompts alone there.
        """
        renderer = self.renderer.prompting(replace(self.renderer.prompts, adapters=()))
        return replace(
            self,
            renderer=renderer,
            names=(module.name,),
            adapter=module.name,
            root=module.path,
            parent=module.base_model_name or self.names[0],
        )

    @property
    def info(self) -> ModelInfo:
        """The facts of the model that were resolved at load."""
        return self.engine.info

    @cached_property
    def pairs(self) -> PairRenderer:
        """The renderer of pairs of texts."""
        return PairRenderer(self.renderer, self.pair_template)

    def render(
        self, prompts: Seq[Prompt | Pair], task: str, params: PoolingParams, options: TextOptions
    ) -> list[Sequence]:
        """Return sequences for `prompts`, each of a form that `Renderer.render` takes or a pair of texts.

        A pair is `{"text": ..., "text_pair": ...}`, as in Transformers' pipelines, or a tuple of two texts.
        """
        if params.late_chunking_params is not None:
            return late(self.renderer, prompts, task, params, options)
        pairs = [_pair(prompt) for prompt in prompts]
        items: list[Any] = [pair or prompt for pair, prompt in zip(pairs, prompts, strict=True)]
        return map_apart(
            [pair is not None for pair in pairs],
            lambda part: self.pairs.render(part, task, params, options),
            lambda part: self.renderer.render(part, task, params, options),
            items,
        )

    @classmethod
    def open(
        cls, model: ModelConfig, engine: EngineConfig, *, max_queued: int | None = None, adds_adapters: bool = False
    ) -> Service:
        """Load the checkpoint and start its engine, in this process.

        Args:
            model: the checkpoint.
            engine: how its work is batched.
            max_queued: maximum sequences that wait; `None` = the engine's option.
            adds_adapters: the caller calls `add_adapter`. Else `enable_lora` leaves no layer unfused.

        Raises:
            CheckpointError: the checkpoint cannot be honoured.
            ConfigError: an option does not fit it, or names a plugin that is not installed.
        """
        from cenote.models.load import load

        if model.io_processor_plugin:
            plugins.check_installed(model.io_processor_plugin)
        if model.calibration is not None:
            calibration.check_file(model.calibration)
        options = model.model_copy(update={"enable_lora": model.enable_lora and adds_adapters})
        pooling_model, checkpoint = load(options)
        if model.enable_lora and not (adds_adapters or model.lora_modules):
            pooling_model.warn("enable_lora has no effect without lora_modules: no request brings an adapter here")
        return cls.around(pooling_model, checkpoint, options, engine, max_queued=max_queued)

    @classmethod
    def around(
        cls,
        pooling_model: PoolingModel,
        checkpoint: Checkpoint,
        model: ModelConfig,
        engine: EngineConfig,
        *,
        max_queued: int | None = None,
    ) -> Service:
        """Start an engine for a loaded model."""
        from cenote.models.checkpoint import locate_adapter

        facts = _facts(checkpoint, model, pooling_model.info.adapters)
        renderer = facts.renderer(checkpoint.tokenizer, pooling_model.info)
        plugin = plugins.load(model.io_processor_plugin, checkpoint, renderer)
        local = _local_engine(pooling_model, engine, max_queued, model)
        try:
            ranges = _ranges(model, renderer, local)
        except BaseException:  # also if the user interrupts
            local.close()
            raise
        if ranges is not None:
            facts = replace(facts, ranges=(tuple(ranges.low_D.tolist()), tuple(ranges.high_D.tolist())))
        running: Engine = CachedEngine(local, engine.cache_size << 20) if engine.cache_size else local
        if local.info.limit("embed") > local.info.max_model_len:
            running = ChunkedEngine(running)
        return cls(
            running,
            renderer,
            facts.names,
            facts.pair_template,
            plugin,
            ranges,
            facts,
            add_adapter=lambda name, path: pooling_model.add_adapter(name, locate_adapter(path, model)),
        )

    @classmethod
    def connect(
        cls, path: str, *, names: tuple[str, ...] = (), trust_remote_code: bool = False, patience: float = PATIENCE
    ) -> Service:
        """Render in this process for the engine of another one, which listens at `path` (`cenote engine`).

        Both see the same files: the tokenizer is read from the folder that the engine's process names.

        Args:
            path: the engine's socket.
            names: names in requests and answers instead of the engine's.
            trust_remote_code: run Python code of the tokenizer.
            patience: seconds to wait until the engine listens.

        Raises:
            ConfigError: there is no engine, it has another version, or its tokenizer cannot be read here.
        """
        engine = RemoteEngine(path, patience=patience)
        try:
            facts, renderer = _read_here(engine, path, trust_remote_code=trust_remote_code)
        except ConfigError:
            engine.close()
            raise
        return cls(engine, renderer, names or facts.names, facts.pair_template, None, facts.quantisation(), facts)


AS_MANY_AS_THREADS = 1 << 16


def _local_engine(model: PoolingModel, options: EngineConfig, max_queued: int | None, loaded: ModelConfig) -> Engine:
    """Start the engine of a loaded model.

    Rows that are to keep their bits are computed with torch on one thread, so there is a stream for each thread then.
    """
    from cenote.engine.engine import LocalEngine

    streams = options.streams
    if streams is None and loaded.batch_invariant:
        streams = AS_MANY_AS_THREADS
    return LocalEngine(
        model,
        max_batch_tokens=options.max_num_batched_tokens,
        max_batch_sequences=options.max_num_seqs,
        max_queued=max_queued or options.max_queued_seqs,
        threads=options.threads,
        streams=streams,
        by_priority=options.scheduling_policy == "priority",
        forward_timeout=options.forward_timeout,
    )


def _read_here(engine: RemoteEngine, path: str, *, trust_remote_code: bool) -> tuple[Facts, Renderer]:
    """Return the facts of an engine's model, and a renderer by its files."""
    try:
        facts = Facts.of(engine.about)
        if facts.tokenizer.trust_remote_code and not trust_remote_code:
            raise ConfigError(
                f"the engine at {path} was started with --trust-remote-code, and its tokenizer may bring code; "
                "it is read here only with --trust-remote-code"
            )
        return facts, facts.renderer(tokenizer.load(facts.tokenizer), engine.info)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"cannot render for the engine at {path}: {error}") from error


def _ranges(options: ModelConfig, renderer: Renderer, engine: Engine) -> Ranges | None:
    if options.calibration is None:
        return None
    dimension = options.pooler_config.dimensions or engine.info.dimension
    return calibration.load(options.calibration, dimension, renderer, ChunkedEngine(engine))


def _facts(checkpoint: Checkpoint, options: ModelConfig, adapters: tuple[str, ...]) -> Facts:
    """Return the facts of a model with adapters of these names.

    Raises:
        ConfigError: the default prompt is none of the prompts, or an adapter has a name of the model.
    """
    st = checkpoint.st
    names = options.served_model_name or (checkpoint.name,)
    modules = {module.name: module for module in options.lora_modules}
    same = sorted(modules.keys() & set(names))
    if same:
        raise ConfigError(f"lora_modules has the name {same[0]!r}, under which the model itself is served")
    adapters = tuple(filterfalse(modules.__contains__, adapters))
    return Facts(
        names=names,
        tokenizer=checkpoint.tokenizer_source,
        prompts=_prompts(checkpoint, options, adapters),
        sides=checkpoint.sides,
        pair_template=checkpoint.pair_template,
        messages=checkpoint.messages,
        pictures=_pictures(checkpoint, options),
        lowercase=st.transformer.lowercase,
        special_tokens=st.transformer.special_tokens,
        include_prompt=st.include_prompt,
        auto_truncate=options.auto_truncate,
        cuts=st.transformer.cuts,
        lora_modules=options.lora_modules,
        dimensions=options.pooler_config.dimensions,
    )


def _pictures(checkpoint: Checkpoint, options: ModelConfig) -> Pictures | None:
    """Return how a model's inputs hold pictures, with the user's limits; `None` = it has no part for them."""
    if checkpoint.sight is None:
        return None
    limit = options.limit_mm_per_prompt.get("image", MOST_PICTURES)
    return replace(checkpoint.sight.pictures, kwargs=options.mm_processor_kwargs, most=limit)


def _prompts(checkpoint: Checkpoint, options: ModelConfig, adapters: tuple[str, ...]) -> Prompts:
    """Return the checkpoint's prompts with the user's; the markers of a late-interaction model are part of them."""
    st, family = checkpoint.st, checkpoint.family
    named = {**st.prompts, **family.prefixes, **(options.prompts or {})}
    default = options.default_prompt_name or st.default_prompt_name
    names = {*named, *adapters}
    if default is not None and default not in names:
        raise ConfigError(f"default_prompt_name is {default!r}, but the prompts are {sorted(names)}")
    return Prompts(named, default, two_sided=checkpoint.sides is not None, adapters=adapters)


def _pair(prompt: Prompt | Pair) -> Pair | None:
    """Return the two texts of a prompt that is a pair."""
    match prompt:
        case {"text": str(first), "text_pair": str(second), **others} if not others:
            return first, second
        case tuple((str(first), str(second))):
            return first, second
    return None
