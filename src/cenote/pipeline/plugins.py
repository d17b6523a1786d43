"""IO-processor plugins: code of yours between a request's `data` and the model, and between its outputs and the answer.

A plugin is a class like `IOProcessor`, made known by an installed package in the entry-point group
`cenote.io_processor_plugins` or, as vLLM has it, `vllm.io_processor_plugins`: a class, or a function without arguments
that returns one or its qualified name (or `None` to decline). Classes written for vLLM load too, if they import nothing
of it: methods are looked up by name (`vllm/plugins/io_processors/interface.py`).
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.metadata import entry_points
from numbers import Integral
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import uuid4

from cenote.core import PoolingParams
from cenote.errors import BadRequest, CenoteError, ConfigError, PluginFailed
from cenote.outputs import PoolingOutput, PoolingRequestOutput
from cenote.tasks import PLUGIN, check_task

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from importlib.metadata import EntryPoint

    from cenote.core import ModelInfo, Output
    from cenote.core import Sequence as Rendered
    from cenote.models.checkpoint import Checkpoint
    from cenote.pipeline.rendering import Prompt, Renderer

GROUPS = ("cenote.io_processor_plugins", "vllm.io_processor_plugins")
"""Entry-point groups; of equal names the first group's is taken."""

REFUSALS = (ValueError, TypeError, LookupError, AttributeError)
"""What a plugin raises over data that it does not like; anything else is a failure of the plugin."""

In = TypeVar("In")
Out = TypeVar("Out")
T = TypeVar("T")


@dataclass(frozen=True)
class Tokenizing:
    """What a plugin gets of the model's renderer.

    Attributes:
        tokenizer: a copy of the model's Transformers tokenizer; truncation and padding do not reach other requests.
    """

    tokenizer: Any

    def get_tokenizer(self) -> Any:
        """The tokenizer, as plugins written for vLLM ask for it."""
        return self.tokenizer


class IOProcessor(Generic[In, Out]):
    """Base of a plugin. One instance serves all requests, from several threads at once.

    `pre_process_async` and `post_process_async` are used where the methods without the suffix are not written.

    Args:
        config: `config.model_config` has `model` (name), `hf_config` and `max_model_len`.
        renderer: has the model's `tokenizer`.
    """

    def __init__(self, config: Any, renderer: Tokenizing) -> None:
        self.config = self.vllm_config = config
        self.renderer = renderer

    def parse_data(self, data: Any) -> In:
        """Check a request's `data`; raise `ValueError` if it is not understood."""
        parsed: In = data
        return parsed

    def merge_pooling_params(self, params: PoolingParams | None = None) -> PoolingParams:
        """The task to run and its parameters; task "plugin" is the model's default task.

        Args:
            params: what the caller of `LLM.encode` gave.
        """
        return params or PoolingParams(task=PLUGIN)

    def pre_process(self, prompt: In, request_id: str | None = None, **kwargs: Any) -> Prompt | Sequence[Prompt]:
        """What the model is given for parsed data: one prompt or several.

        Args:
            prompt: what `parse_data` returned.
            request_id: no two requests have the same.
            kwargs: room for what later releases pass.
        """
        raise NotImplementedError

    def post_process(
        self,
        outputs: Sequence[PoolingRequestOutput[PoolingOutput]],
        request_id: str | None = None,
        *,
        data: In,
        **kwargs: Any,
    ) -> Out:
        """The answer made of the model's outputs, one per prompt, in order. Online it must fit into JSON.

        Args:
            outputs: as `LLM.encode` returns them.
            request_id: the one that `pre_process` got.
            data: what `parse_data` returned; methods that name no such parameter do not get it.
            kwargs: room for what later releases pass.
        """
        raise NotImplementedError


class ChangeableParams(PoolingParams):
    """Parameters that `merge_pooling_params` may change in place, as it may vLLM's."""

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Plugin:
    """A loaded plugin."""

    name: str
    processor: Any

    def call(self, data: Any, request_id: str) -> Call:
        """A request's way through the plugin. Clients may repeat a request id, so something is added to it."""
        return Call(self, data, f"{request_id}-{uuid4().hex[:8]}")

    def failed(self, error: BaseException) -> PluginFailed:
        """Return the error of a request over which the plugin raised `error`."""
        return PluginFailed(f"the plugin {self.name!r} failed: {_told(error)}")


@dataclass
class Call:
    """One request's way through a plugin: `prepare`, then the model, then `finish`."""

    plugin: Plugin
    data: Any
    request_id: str

    def prepare(self, info: ModelInfo, given: PoolingParams | None = None) -> tuple[list[Any], str, PoolingParams]:
        """Prompts, task and parameters.

        Raises:
            BadRequest: the plugin refuses the data.
            PluginFailed: it fails.
        """
        if self.data is None:
            raise BadRequest("The 'data' field is what the plugin reads, and it cannot be None.", param="data")
        parse = _written(self.plugin.processor, "parse_data")
        pre = _written(self.plugin.processor, "pre_process", "pre_process_async")
        assert pre is not None
        if parse is not None:
            self.data = self._run(lambda: parse(self.data), may_refuse=True)
        prompts = self._run(lambda: pre(self.data, request_id=self.request_id), may_refuse=True)
        params = self._run(lambda: self._params(info, given))
        return _listed(prompts), params.task, params

    def finish(self, sequences: Sequence[Rendered], outputs: Sequence[Output]) -> Any:
        """The plugin's answer.

        Raises:
            PluginFailed: it fails.
        """
        import torch

        tensors = [PoolingOutput(torch.from_numpy(output.data)) for output in outputs]
        made = [
            PoolingRequestOutput(f"{self.request_id}-{i}", tensor, list(sequence.ids))
            for i, (sequence, tensor) in enumerate(zip(sequences, tensors, strict=True))
        ]
        post = _written(self.plugin.processor, "post_process")
        if post is not None:
            return self._run(lambda: post(made, request_id=self.request_id, **self._wanted(post)))
        late = _written(self.plugin.processor, "post_process_async")
        assert late is not None
        return self._run(lambda: late(_numbered(made), request_id=self.request_id, **self._wanted(late)))

    def _params(self, info: ModelInfo, given: PoolingParams | None) -> PoolingParams:
        """Parameters for a task of the model, whatever class the plugin's are of."""
        merge, params = _written(self.plugin.processor, "merge_pooling_params"), given
        if merge is not None:
            params = merge(given and ChangeableParams(**_known(given)))
        known = _known(params)
        if known["task"] in (None, PLUGIN):
            known["task"] = info.default_task
        check_task(known["task"], info.tasks)
        return PoolingParams(**known)

    def _wanted(self, post: Callable[..., Any]) -> dict[str, Any]:
        """What `post_process` is given beside the outputs."""
        _, *names = inspect.signature(post).parameters
        return {"data": self.data} if "data" in names else {}

    def _run(self, work: Callable[[], Any], *, may_refuse: bool = False) -> Any:
        """What `work` returns. It is code of others: whatever it raises fails this request only."""
        try:
            result = work()
            return _awaited(result) if inspect.isawaitable(result) else result
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if may_refuse and isinstance(error, CenoteError):
                raise
            if may_refuse and isinstance(error, REFUSALS):
                message = f"the plugin {self.plugin.name!r} refuses the data: {_told(error)}"
                raise BadRequest(message, param="data") from error
            raise self.plugin.failed(error) from error


def load(name: str | None, checkpoint: Checkpoint, renderer: Renderer) -> Plugin | None:
    """The plugin called `name`, or the one that the checkpoint's config names; `None` if neither names one.

    Raises:
        ConfigError: it is not installed, or not a plugin.
    """
    name = name or getattr(checkpoint.config, "io_processor_plugin", None)
    if not name:
        return None
    model = SimpleNamespace(
        model=checkpoint.name, hf_config=checkpoint.config, max_model_len=renderer.info.max_model_len
    )
    try:
        found = _find(name)
        processor = found(SimpleNamespace(model_config=model), Tokenizing(copy.deepcopy(renderer.tokenizer)))
    except ConfigError:
        raise
    except Exception as error:  # code of others, once more
        raise ConfigError(f"cannot load the plugin {name!r}: {_told(error)}") from error
    return Plugin(name, processor)


def _find(name: str) -> type:
    """The class of an installed plugin."""
    entries = [entry for group in GROUPS for entry in entry_points(group=group)]
    if not entries:
        raise ConfigError(f"No IOProcessor plugins installed but one is required ({name}).")
    named = [entry for entry in entries if entry.name == name]
    if not named:
        raise ConfigError(
            f"The model requires the {name!r} IO Processor plugin but it is not installed. "
            f"Available plugins: {sorted({entry.name for entry in entries})}"
        )
    found = next((kind for entry in named if (kind := _loaded(entry)) is not None), None)
    if found is None:
        raise ConfigError(f"the plugin {name!r} declines to be loaded")
    if not isinstance(found, type):
        raise ConfigError(f"the plugin {name!r} is no class but {found!r}")
    missing = [part for part in ("pre_process", "post_process") if _written(found, part, f"{part}_async") is None]
    if missing:
        raise ConfigError(f"the plugin {name!r}: {found.__name__} has no {' and no '.join(missing)}")
    return found


def _loaded(entry: EntryPoint) -> Any:
    """What an entry point stands for: a class, or `None`."""
    found = entry.load()
    if not isinstance(found, (type, str)):
        found = found()
    if isinstance(found, str):
        module, _, attribute = found.replace(":", ".").rpartition(".")
        found = getattr(import_module(module), attribute)
    return found


def _written(owner: Any, *names: str) -> Callable[..., Any] | None:
    """The first of the methods called `names` that a plugin has, those of `IOProcessor` left out."""
    for name in names:
        found: Callable[..., Any] | None = getattr(owner, name, None)
        if callable(found) and getattr(found, "__func__", found) is not getattr(IOProcessor, name, None):
            return found
    return None


def _known(params: Any) -> dict[str, Any]:
    """The fields of `PoolingParams` that an object of any class has."""
    return {field.name: getattr(params, field.name, None) for field in fields(PoolingParams)}


def _listed(prompts: Any) -> list[Any]:
    """Prompts as a list; text, a mapping or a list of token ids is a single one."""
    is_list = isinstance(prompts, (list, tuple))
    is_ids = is_list and prompts and all(isinstance(i, Integral) for i in prompts)
    return list(prompts) if is_list and not is_ids else [prompts]


async def _numbered(outputs: Sequence[T]) -> AsyncIterator[tuple[int, T]]:
    """Outputs as `post_process_async` takes them."""
    for numbered in enumerate(outputs):
        yield numbered


def _awaited(result: Awaitable[T]) -> T:
    """What a coroutine returns, run on a thread of its own: in a notebook, this one has an event loop already."""

    async def main() -> T:
        return await result

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, main()).result()


def _told(error: BaseException) -> str:
    """The text of an error; of one that was not written to be read, its kind too."""
    is_sentence = isinstance(error, (ValueError, CenoteError)) and str(error)
    return str(error) if is_sentence else f"{type(error).__name__}: {error}"
