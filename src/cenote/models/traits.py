"""Traits of a Transformers model that its modules show: vocabulary, positions, rotary frequencies, windows."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor, nn

from cenote.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

M = TypeVar("M", bound=nn.Module)

POSITION_TABLES = (".position_embeddings", ".position_embedding", ".embed_positions", ".wpe")


def of_kind(model: nn.Module, kind: type[M]) -> list[M]:
    """Return the modules of `model` of that class, in order."""
    return [module for module in model.modules() if isinstance(module, kind)]


@contextmanager
def noting(
    modules: Iterable[nn.Module], note: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """Call `note(module, args, kwargs)` before each forward of `modules` meanwhile."""
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
        yield


def vocabulary(model: PreTrainedModel) -> int:
    """Rows of the token embedding: every smaller id can be looked up."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index, assignment]
    return rows


def token_types(model: PreTrainedModel) -> int:
    """Rows of the table of token types; 0 = the model has none."""
    table = _embedding(model, (".token_type_embeddings",))
    return 0 if table is None else table.weight.shape[0]


def tokens_beyond(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str]:
    """Return the tokens whose ids are not below `rows`, by id."""
    beyond = {place: token for token, place in tokenizer.get_vocab().items() if place >= rows}
    return [beyond[place] for place in sorted(beyond)]


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output; of a tuple, as a checkpoint's own code may return, the first entry.

    Raises:
        CheckpointError: it has none.
    """
    named = getattr(output, "logits", None)
    first = output[0] if named is None and isinstance(output, tuple) else named
    if not isinstance(first, Tensor):
        raise CheckpointError(f"the head returns {type(output).__name__}, which has no logits; expected its `logits`")
    return first


def position_offset(model: PreTrainedModel) -> int:
    """Return the first position: `padding_idx + 1` of the position table, if that has a padding row, else 0."""
    padding: int | None = getattr(_embedding(model, ("position_embeddings",)), "padding_idx", None)
    return 0 if padding is None else padding + 1


def position_rows(model: PreTrainedModel) -> int | None:
    """Number of usable rows of a learned absolute position table, or `None` if the model has none."""
    table = _embedding(model, POSITION_TABLES)
    if table is None:
        return None
    return table.weight.shape[0] - max(position_offset(model), int(getattr(table, "offset", 0)))


def _embedding(model: PreTrainedModel, endings: tuple[str, ...]) -> nn.Embedding | None:
    """Return the first embedding of `model`, of its part for text if it has others, whose dotted name ends so."""
    part = getattr(model, "language_model", model)
    for name, module in part.named_modules():
        if f".{name}".endswith(endings) and isinstance(module, nn.Embedding):
            return module
    return None


def rope_class(model: PreTrainedModel) -> Callable[[int], int] | None:
    """Return a function from lengths to classes of equal rotary frequencies; `None` if they do not depend on length.

    "longrope" has two sets of frequencies; "dynamic" NTK has one per length beyond the trained one
    (`transformers/modeling_rope_utils.py`).
    """
    for module in model.modules():
        types = str(getattr(module, "rope_type", ""))  # one, or a dict with one for each kind of layer
        if "longrope" in types:
            limit = int(_original_length(module))
            return lambda n: int(n > limit)
        if "dynamic" in types:
            limit = int(module.original_max_seq_len)  # type: ignore[arg-type]
            return lambda n: max(n, limit)
    return None


def _original_length(module: nn.Module) -> int:
    parameters: Any = module.config.rope_parameters  # type: ignore[union-attr]
    if "original_max_position_embeddings" not in parameters:
        parameters = next(p for p in parameters.values() if "original_max_position_embeddings" in p)
    return int(parameters["original_max_position_embeddings"])


def reset_rope(model: PreTrainedModel) -> None:
    """Forget the longest sequence seen: Transformers keeps grown "dynamic" frequencies for later, shorter inputs."""
    for module in model.modules():
        if not hasattr(module, "original_max_seq_len"):
            continue
        for name in {*vars(module), *module._buffers}:
            if name.endswith("original_inv_freq"):
                prefix = name.removesuffix("original_inv_freq")
                frequencies = getattr(module, name).to(model.device).clone()
                module.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def block_sparse_length(model: PreTrainedModel) -> int:
    """Return the tokens up to which a model with block-sparse attention attends to all of them; 0 = it has none.

    Longer inputs get blocks, by their length alone (`transformers/models/big_bird/modeling_big_bird.py`).
    """
    config = model.config
    if getattr(config, "attention_type", None) != "block_sparse" or not hasattr(model, "set_attention_type"):
        return 0
    return int((5 + 2 * config.num_random_blocks) * config.block_size)


def reset_attention(model: PreTrainedModel) -> None:
    """Give a model its block-sparse attention back: Transformers switches it off for good at a short input."""
    if block_sparse_length(model):
        model.set_attention_type("block_sparse")  # type: ignore[operator]


WINDOWS = ("sliding_window", "attention_chunk_size", "floor_scale")
"""Names of lengths in tokens, in configs and modules, beyond which a model attends to less than all, or scales its
queries (`transformers/models/llama4/modeling_llama4.py`)."""


class Window(NamedTuple):
    """A window of a model.

    Attributes:
        holder: the config or module that has it.
        name: of the attribute.
        size: in tokens.
    """

    holder: Any
    name: str
    size: int


def windows(model: PreTrainedModel) -> list[Window]:
    """Return the windows that a model's modules and configs have, and configs within these: each may be read."""
    modules = list(model.modules())
    by_identity = {id(config): config for config in (vars(module).get("config") for module in modules)}
    configs = chain.from_iterable(_nested(config) for config in by_identity.values() if config is not None)
    distinct = {id(config): config for config in configs}
    places = [Window(config, name, getattr(config, name, 0)) for config in distinct.values() for name in WINDOWS]
    for module in modules:
        attributes = vars(module)
        places += [Window(module, name, attributes[name]) for name in WINDOWS if name in attributes]
    return [window for window in places if type(window.size) is int and window.size > 0]


def _nested(config: Any) -> Iterator[Any]:
    """Yield a config and those within it."""
    from transformers import PretrainedConfig

    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _nested(value)
