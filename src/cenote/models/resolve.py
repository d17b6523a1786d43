"""Device, dtype and maximum length of a model: the user's choice, else by the checkpoint and the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cenote.errors import CheckpointError, first_line
from cenote.models import remote_code
from cenote.models.traits import position_rows
from cenote.models.transformer_module import is_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cenote.models.checkpoint import Checkpoint

DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}

LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_length",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "n_ctx",
)
"""Keys under which configs keep the trained length; the smallest counts."""

FALLBACK_LENGTH = 2048

UNSET_LENGTH = 1 << 30
"""Tokenizers whose maximum length is at least this have none."""


def device(option: str | None) -> torch.device:
    """Return the device that the user chose, else CUDA if there is one, else the CPU."""
    if option is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(option)
    except RuntimeError as error:
        raise CheckpointError(f"unknown device {option!r}: {first_line(error)}") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(f"device {option!r} was asked for, but torch sees no CUDA device")
    return chosen


def dtype(option: str, stored: torch.dtype | str | None, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype to run in, and a warning or an empty string.

    On a CPU it is float32: half types are how weights are kept there (`cenote.models.passes.narrow`). On a GPU "auto"
    is the checkpoint's half type; a float32 checkpoint becomes bfloat16 where the GPU has it, else float16.
    """
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    if device.type == "cpu":
        return torch.float32, ""
    if option != "auto":
        return DTYPES[option], ""
    if stored in (torch.float16, torch.bfloat16):
        return stored, ""
    half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return half, f"the checkpoint is float32 and runs in {str(half).removeprefix('torch.')}; --dtype float32 keeps it"


def max_length(checkpoint: Checkpoint, model: PreTrainedModel, limit: int | None) -> tuple[int, str]:
    """Return the maximum tokens per input, and a warning or an empty string.

    Args:
        checkpoint: as it was read.
        model: its backbone.
        limit: the user's; `None` = the checkpoint's.

    Raises:
        CheckpointError: the user's is more than the model has positions.
    """
    positions = position_rows(model)
    trained = _trained_lengths(checkpoint, positions)
    length = _longest_side(checkpoint, min(trained, default=FALLBACK_LENGTH), positions)
    if limit is None:
        _check_room(checkpoint, length)
        _check_filled(checkpoint, length)
        note = f"the checkpoint names no maximum length; {FALLBACK_LENGTH} tokens are allowed"
        return length, "" if trained else note
    if positions is not None and limit > positions:
        raise CheckpointError(f"max_model_len is {limit}, but {checkpoint.name} has only {positions} positions")
    return limit, f"max_model_len {limit} exceeds the {length} of the checkpoint" if limit > length else ""


MOST_FILLED = 1 << 16
"""Maximum length to which queries are filled up; published models fill up to 32."""


def _check_filled(checkpoint: Checkpoint, length: int) -> None:
    """Refuse a length to which queries are filled up that the model cannot read.

    Raises:
        CheckpointError: it is longer than `length`, or than any query.
    """
    filled = 0 if checkpoint.sides is None else checkpoint.sides.fill_to
    most = min(length, MOST_FILLED)
    if filled > most:
        raise CheckpointError(
            f"{checkpoint.name}: queries are filled up to {filled} tokens, expected at most {most}; correct "
            "query_length or query_expansion in config_sentence_transformers.json, or query_maxlen in artifact.metadata"
        )


def _check_room(checkpoint: Checkpoint, length: int) -> None:
    """Refuse a length that leaves no room for a text.

    Raises:
        CheckpointError: special tokens take all of it.
    """
    special = checkpoint.tokenizer.num_special_tokens_to_add()
    if length > special:
        return
    sources = {
        checkpoint.tokenizer.model_max_length: "model_max_length in tokenizer_config.json",
        checkpoint.st.transformer.max_length: "max_seq_length in sentence_bert_config.json",
    }
    source = sources.get(length, "the lengths in config.json")
    raise CheckpointError(
        f"{checkpoint.name} reads {length} tokens by {source}, and the special tokens around a text are {special}; "
        "correct it, or set --max-model-len"
    )


def _longest_side(checkpoint: Checkpoint, length: int, positions: int | None) -> int:
    """Return `length`, or that of a side of a Sentence-Transformers folder which is longer, if positions allow it."""
    sides = checkpoint.sides
    if sides is None or not checkpoint.st.model_type:
        return length
    return max(length, min(positions or UNSET_LENGTH, max(sides.fill_to, *sides.lengths.values(), 0)))


def _trained_lengths(checkpoint: Checkpoint, positions: int | None) -> list[int]:
    """Return the lengths that the files name, the one of Sentence-Transformers in place of all others.

    The tokenizer's counts in folders of Sentence-Transformers, where positions are a table, whose size it follows, and
    where the config names no length.
    """
    module = checkpoint.st.transformer
    if module.max_length is not None and module.is_cut:
        lengths = [module.max_length]
    else:
        lengths = _lengths_of_config(checkpoint, has_positions=positions is not None)
    if positions is not None:
        lengths.append(positions)
    return lengths


def _lengths_of_config(checkpoint: Checkpoint, *, has_positions: bool) -> list[int]:
    """Return the lengths that the config and the tokenizer name."""
    config = checkpoint.config.get_text_config()
    scaled = remote_code.scaled_positions(config)
    values = [getattr(config, key, None) for key in LENGTH_KEYS] if scaled is None else [scaled]
    lengths = list(filter(None, filter(is_length, values)))
    tokenizer_limit = checkpoint.tokenizer.model_max_length
    counts_tokenizer = has_positions or not lengths or bool(checkpoint.st.model_type)
    if counts_tokenizer and tokenizer_limit < UNSET_LENGTH and checkpoint.st.transformer.is_cut:
        lengths.append(int(tokenizer_limit))
    return lengths
