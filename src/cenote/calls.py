"""Calls of `LLM`: operations over prompts, some at a time, for a caller that waits and may see a progress bar."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from cenote.adapters import LoRARequest
from cenote.arguments import lora_per_prompt, per_prompt
from cenote.core import PoolingParams
from cenote.engine.waiting import UnderWay
from cenote.errors import BadRequest
from cenote.pipeline.inputs import has_pictures, listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from collections.abc import Sequence as Seq

    from cenote.adapters import LoraModule
    from cenote.core import Sequence
    from cenote.pipeline.inputs import Pair, Prompt
    from cenote.pipeline.job import Job
    from cenote.pipeline.operations import Params
    from cenote.pipeline.pipeline import Service

    LoraRequests = LoRARequest | Seq[LoRARequest | None] | None
    """An adapter for all prompts, or for each its own or none."""

RENDERED_AT_ONCE = 1024
"""Prompts that are rendered at a time, while those before them run."""
PICTURED_AT_ONCE = 4
"""Prompts with pictures that are: processing one takes as long as tokenising some hundred texts."""
R = TypeVar("R")


class Calls:
    """Jobs of one model, submitted as they are made and finished in order.

    Args:
        service: the model.
        modules: adapters that it has from the start.
    """

    def __init__(self, service: Service, modules: Iterable[LoraModule]) -> None:
        self._service = service
        self._adapters = {module.name: module.path for module in modules}
        self._lock = threading.Lock()

    def run(
        self,
        prompts: Prompt | Pair | Seq[Prompt | Pair],
        pooling_params: PoolingParams | Seq[PoolingParams] | None,
        use_tqdm: bool,
        lora_request: LoraRequests,
        make: Callable[[list[Any], Params], Job[list[R]]],
    ) -> list[tuple[Sequence, R]]:
        """Run an operation over prompts, some at a time, and return the result of each with its sequence."""
        inputs = listed(prompts)
        params = per_prompt(pooling_params, len(inputs))
        names = [self._adapter(choice) for choice in lora_per_prompt(lora_request, len(inputs))]

        def jobs() -> Iterator[Job[list[tuple[Sequence, R]]]]:
            for part in _parts(inputs):
                of_part = params if isinstance(params, PoolingParams) else params[part]
                job = make(inputs[part], of_part).adapted(names[part])
                yield job.then(partial(_paired, job.sequences))

        parts = self._answers(jobs(), len(inputs), use_tqdm)
        return [result for part in parts for result in part]

    def answer(self, job: Job[R], lora_request: LoRARequest | None, use_tqdm: bool) -> R:
        """Return the answer of one job, all of whose sequences run with one adapter."""
        if isinstance(lora_request, (list, tuple)):
            raise BadRequest("one `LoRARequest` is for the whole call here, got a list", param="lora_request")
        adapted = job.adapted([self._adapter(lora_request)] * len(job.sequences))
        (answer,) = self._answers([adapted], len(job.sequences), use_tqdm)
        return answer

    def _adapter(self, choice: LoRARequest | None) -> str | None:
        """Return the name of the adapter that is chosen, which is loaded if it is not yet.

        Raises:
            BadRequest: it has the name of another one, or the model has no room for more.
            CheckpointError: it cannot be honoured.
        """
        if choice is None:
            return None
        if not isinstance(choice, LoRARequest):
            raise BadRequest(f"got {choice!r:.100}, expected a LoRARequest", param="lora_request")
        with self._lock:
            path = self._adapters.get(choice.lora_name, choice.lora_path)
            if path != choice.lora_path:
                raise BadRequest(
                    f"the adapter {choice.lora_name!r} is that of {path}; {choice.lora_path} needs another name",
                    param="lora_request",
                )
            if choice.lora_name not in self._adapters:
                assert self._service.add_adapter is not None
                self._service.add_adapter(choice.lora_name, choice.lora_path)
                self._adapters[choice.lora_name] = choice.lora_path
        return choice.lora_name

    def _answers(self, jobs: Iterable[Job[R]], total: int, use_tqdm: bool) -> list[R]:
        """Submit each job as soon as it is made and there is room for its pictures, and finish them in order.

        An error, or the user who interrupts, cancels the jobs under way.
        """
        from tqdm import tqdm

        bar = tqdm(total=total, desc="Pooling", disable=not use_tqdm, dynamic_ncols=True)
        with bar, UnderWay() as under_way:
            submitted: list[Job[R]] = []
            for job in jobs:
                under_way.submit(self._service.engine, job.sequences)
                submitted.append(job)
                under_way.make_room(bar.update)
                bar.update(under_way.progress())
            results = under_way.results(bar.update)
            return [job.finish(outputs) for job, outputs in zip(submitted, results, strict=True)]


def _parts(inputs: Seq[Any]) -> Iterator[slice]:
    """Yield the parts of a call that are rendered at a time; one if there is no prompt at all, which is refused."""
    start = weight = 0
    of_picture = RENDERED_AT_ONCE // PICTURED_AT_ONCE
    for i, prompt in enumerate(inputs):
        if weight >= RENDERED_AT_ONCE:
            yield slice(start, i)
            start, weight = i, 0
        weight += of_picture if has_pictures(prompt) else 1
    yield slice(start, len(inputs))


def _paired(sequences: list[Sequence], results: list[R]) -> list[tuple[Sequence, R]]:
    return list(zip(sequences, results, strict=True))
