"""IO-processor plugins: code of yours between a request's `data` and the model, and between its outputs and the answer.

A plugin is a class with the methods of `IOProcessor`. An installed package registers it in the entry-point group
`cenote.io_processor_plugins` or, as for vLLM, `vllm.io_processor_plugins`: the class itself, or a function without
arguments that returns the class or its qualified name (or `None` to decline). Classes written for vLLM load too, if
they do not import it: methods are looked up by name (`vllm/plugins/io_processors/interface.py`).
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.metadata import EntryPoints, entry_points
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import uuid4

from cenote.core import PoolingParams
from cenote.errors import BadRequest, CenoteError, ConfigError, PluginFailed
from cenote.outputs import PoolingOutput, PoolingRequestOutput
from cenote.pipeline.inputs import listed
from cenote.tasks import PLUGIN, check_task

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from importlib.metadata import EntryPoint

    from cenote.core import ModelInfo, Output
    from cenote.core import Sequence as Rendered
    from cenote.models.checkpoint import Checkpoint
    from cenote.pipeline.inputs import Prompt
    from cenote.pipeline.rendering import Renderer

GROUPS = ("cenote.io_processor_plugins", "vllm.io_processor_plugins")
"""Entry-point groups; where both have a name, the first one's plugin is taken."""

REFUSALS = (ValueError, TypeError, LookupError, AttributeError)
"""Errors by which a plugin refuses data; any other is a failure of the plugin."""

In = TypeVar("In")
Out = TypeVar("Out")
T = TypeVar("T")


@dataclass(frozen=True)
class Tokenizing:
    """The tokenizer of the model, for plugins.

    Attributes:
        tokenizer: a copy of the model's Transformers tokenizer; truncation and padding set here affect no requests.
    """

    tokenizer: Any

    def get_tokenizer(self) -> Any:
        """Return the tokenizer; plugins written for vLLM call this."""
        return self.tokenizer


class IOProcessor(Generic[In, Out]):
    """Base of a plugin. One instance serves all requests, from several threads at once.

    `pre_process_async` and `post_process_async` are used where a class has no methods without the suffix.

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
        """Return the parameters of the prompts, with the task to run; task "plugin" is the model's default task.

        Args:
            params: the parameters that `LLM.encode` was called with.
        """
        return params or PoolingParams(task=PLUGIN)

    def pre_process(self, prompt: In, request_id: str | None = None, **kwargs: Any) -> Prompt | Sequence[Prompt]:
        """Return the prompts of the model for parsed data, one or several.

        Args:
            prompt: the data that `parse_data` returned.
            request_id: unique among requests.
            kwargs: arguments of later releases.
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
        """Return the answer for the model's outputs, one per prompt, in order. Over HTTP it must fit into JSON.

        Args:
            outputs: as `LLM.encode` returns them.
            request_id: the same as in `pre_process`.
            data: the data that `parse_data` returned; passed only to methods with a parameter of this name.
            kwargs: arguments of later releases.
        """
        raise NotImplementedError


class ChangeableParams(PoolingParams):
    """Parameters that `merge_pooling_params` may change in place, as vLLM's."""

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Plugin:
    """A loaded plugin."""

    name: str
    processor: Any

    def call(self, data: Any, request_id: str) -> Call:
        """Return the call for a request. Clients may repeat a request id, so a random part is added to it."""
        return Call(self, data, f"{request_id}-{uuid4().hex[:8]}")

    def failed(self, error: BaseException) -> PluginFailed:
        """Return the error of a request over which the plugin raised `error`."""
        return PluginFailed(f"the plugin {self.name!r} failed: {_text_of(error)}")

    def refused(self, error: BaseException) -> CenoteError:
        """Return the error of a request over whose data the plugin raised `error`."""
        if not isinstance(error, REFUSALS):
            return self.failed(error)
        return BadRequest(f"the plugin {self.name!r} refuses the data: {_text_of(error)}", param="data")


@dataclass
class Call:
    """One request to a plugin: `prepare`, then the model, then `finish`."""

    plugin: Plugin
    data: Any
    request_id: str

    def prepare(self, info: ModelInfo, params: PoolingParams | None = None) -> tuple[list[Any], str, PoolingParams]:
        """Return prompts, task and parameters.

        Raises:
            BadRequest: the plugin refuses the data.
            PluginFailed: the plugin fails.
        """
        if self.data is None:
            raise BadRequest("The 'data' field is what the plugin reads, and it cannot be None.", param="data")
        parse = getattr(self.plugin.processor, "parse_data", _unchanged)
        pre = _method(self.plugin.processor, "pre_process", "pre_process_async")
        assert pre is not None
        self.data = self._run(lambda: parse(self.data), may_refuse=True)
        prompts = self._run(lambda: pre(self.data, request_id=self.request_id), may_refuse=True)
        merged = self._run(lambda: self._merged(info, params))
        return listed(prompts), merged.task, merged

    def finish(self, sequences: Sequence[Rendered], outputs: Sequence[Output]) -> Any:
        """Return the plugin's answer.

        Raises:
            PluginFailed: the plugin fails.
        """
        import torch

        results = [
            PoolingRequestOutput(
                f"{self.request_id}-{i}", PoolingOutput(torch.from_numpy(output.data)), list(sequence.ids)
            )
            for i, (sequence, output) in enumerate(zip(sequences, outputs, strict=True))
        ]
        post = _method(self.plugin.processor, "post_process")
        if post is not None:
            return self._run(lambda: post(results, request_id=self.request_id, **self._data_for(post)))
        late = _method(self.plugin.processor, "post_process_async")
        assert late is not None
        return self._run(lambda: late(_numbered(results), request_id=self.request_id, **self._data_for(late)))

    def _merged(self, info: ModelInfo, params: PoolingParams | None) -> PoolingParams:
        """Return the plugin's parameters, which may be of any class, for a task of the model."""
        merge = getattr(self.plugin.processor, "merge_pooling_params", _unchanged)
        values = _values(merge(params and ChangeableParams(**_values(params))))
        if values["task"] in (None, PLUGIN):
            values["task"] = info.default_task
        check_task(values["task"], info.tasks)
        return PoolingParams(**values)

    def _data_for(self, post: Callable[..., Any]) -> dict[str, Any]:
        """Return the parsed data as keyword arguments of `post`, if it has a parameter for it."""
        _, *names = inspect.signature(post).parameters
        return {"data": self.data} if "data" in names else {}

    def _run(self, work: Callable[[], Any], *, may_refuse: bool = False) -> Any:
        """Run code of the plugin. Whatever it raises fails this request only."""
        try:
            result = work()
            return _awaited(result) if inspect.isawaitable(result) else result
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if not may_refuse:
                raise self.plugin.failed(error) from error
            if isinstance(error, CenoteError):
                raise
            raise self.plugin.refused(error) from error


def load(name: str | None, checkpoint: Checkpoint, renderer: Renderer) -> Plugin | None:
    """Load the plugin called `name`, by default the one that the checkpoint's config names, if any.

    Raises:
        ConfigError: the plugin is not installed, cannot be made, or lacks a method.
    """
    name = name or getattr(checkpoint.config, "io_processor_plugin", None)
    if not name:
        return None
    model = SimpleNamespace(
        model=checkpoint.name, hf_config=checkpoint.config, max_model_len=renderer.info.max_model_len
    )
    try:
        kind = _find(name)
        processor = kind(SimpleNamespace(model_config=model), Tokenizing(copy.deepcopy(renderer.tokenizer)))
    except ConfigError:
        raise
    except Exception as error:  # of the plugin
        raise ConfigError(f"cannot load the plugin {name!r}: {_text_of(error)}") from error
    return Plugin(name, processor)


def check_installed(name: str) -> None:
    """Refuse a plugin that is not installed: cheap, while `load` needs the model's tokenizer.

    Raises:
        ConfigError: the plugin is not installed.
    """
    _entries(name)


def _find(name: str) -> type:
    """Return the class of an installed plugin."""
    kind = next(filter(None, map(_loaded, _entries(name))), None)
    if kind is None:
        raise ConfigError(f"the plugin {name!r} declines to be loaded")
    if not isinstance(kind, type):
        raise ConfigError(f"the plugin {name!r} must be a class, got {kind!r}")
    missing = [part for part in ("pre_process", "post_process") if _method(kind, part, f"{part}_async") is None]
    if missing:
        raise ConfigError(f"the plugin {name!r}: {kind.__name__} has no {' and no '.join(missing)}")
    return kind


def _entries(name: str) -> EntryPoints:
    """Return the entry points called `name`, at least one."""
    installed = EntryPoints(chain.from_iterable(entry_points(group=group) for group in GROUPS))
    if not installed:
        raise ConfigError(f"No IOProcessor plugins installed but one is required ({name}).")
    entries = installed.select(name=name)
    if not entries:
        raise ConfigError(
            f"The model requires the {name!r} IO Processor plugin but it is not installed. "
            f"Available plugins: {sorted(installed.names)}"
        )
    return entries


def _loaded(entry: EntryPoint) -> Any:
    """Return the class that an entry point stands for, or `None` if it declines."""
    target = entry.load()
    if not isinstance(target, (type, str)):
        target = target()
    if isinstance(target, str):
        module, _, attribute = target.replace(":", ".").rpartition(".")
        target = getattr(import_module(module), attribute)
    return target


def _method(plugin: Any, *names: str) -> Callable[..., Any] | None:
    """Return the first of the methods called `names` that a plugin has, those inherited from `IOProcessor` left out."""
    for name in names:
        method: Callable[..., Any] | None = getattr(plugin, name, None)
        function = getattr(method, "__func__", method)
        if callable(method) and function is not getattr(IOProcessor, name, None):
            return method
    return None


def _unchanged(value: T) -> T:
    return value


def _values(params: Any) -> dict[str, Any]:
    """Return the values of the fields of `PoolingParams` in an object of any class."""
    return {field.name: getattr(params, field.name, None) for field in fields(PoolingParams)}


async def _numbered(outputs: Sequence[T]) -> AsyncIterator[tuple[int, T]]:
    """Yield outputs in the form of `post_process_async`'s argument."""
    for numbered in enumerate(outputs):
        yield numbered


def _awaited(result: Awaitable[T]) -> T:
    """Run a coroutine on another thread: in a notebook, this one has an event loop already."""

    async def main() -> T:
        return await result

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, main()).result()


def _text_of(error: BaseException) -> str:
    """Return the text of an error, after its kind unless it was written for users."""
    is_sentence = isinstance(error, (ValueError, CenoteError)) and str(error)
    return str(error) if is_sentence else f"{type(error).__name__}: {error}"
