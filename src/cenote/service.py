"""A served model: its engine, its renderer and its names. What `LLM` and the server both stand on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cenote.engine.engine import LocalEngine
from cenote.engine.rendering import Renderer

if TYPE_CHECKING:
    from cenote.config import EngineConfig, ModelConfig
    from cenote.types import Engine, ModelInfo


@dataclass(frozen=True)
class Service:
    """One model, ready.

    Attributes:
        names: what requests may call it; the first is what answers say.
    """

    engine: Engine
    renderer: Renderer
    names: tuple[str, ...]

    @property
    def info(self) -> ModelInfo:
        """What was resolved about the model."""
        return self.engine.info

    @classmethod
    def load(cls, model: ModelConfig, engine: EngineConfig, *, max_queued: int | None = None) -> Service:
        """Load the checkpoint and start its engine."""
        from cenote.models import runner

        pooling_model, checkpoint = runner.load(model)
        st = checkpoint.st
        local = LocalEngine(
            pooling_model,
            max_batch_tokens=engine.max_num_batched_tokens,
            max_batch_sequences=engine.max_num_seqs,
            max_queued=max_queued or engine.max_queued_seqs,
        )
        renderer = Renderer(
            checkpoint.tokenizer,
            pooling_model.info,
            lowercase=bool(st and st.do_lower_case),
            default_prompt=st.default_prompt if st else "",
            include_prompt=st.include_prompt if st else True,
            auto_truncate=model.auto_truncate,
        )
        return cls(local, renderer, model.served_model_name or (checkpoint.name,))
