"""Outputs of a model other than its last hidden states: an earlier layer's, its own pooler's, and through modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cenote.errors import CheckpointError
from cenote.functions import coalesce
from cenote.models.probe import EQUAL, Draw, distance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

PROBED = (7, 3)
"""Tokens of the sequences by which a pooler is proved."""


def read_layer(model: PreTrainedModel, number: int) -> None:
    """Make the model give the hidden states of a layer in place of the last ones, by hooks around its forward.

    Args:
        model: the backbone.
        number: index of the layer in the model's `hidden_states`, whose first are the embeddings.

    Raises:
        CheckpointError: the model does not have so many layers.
    """

    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "output_hidden_states": True}

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        output.last_hidden_state = output.hidden_states[number]
        return output

    reader = _reader(model)
    reader.register_forward_pre_hook(ask, with_kwargs=True)
    reader.register_forward_hook(take, with_kwargs=True)
    ids_1L = torch.tensor([Draw(model)(PROBED[1])], device=model.device)
    try:
        with torch.inference_mode():
            model(input_ids=ids_1L)
    except (IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"method_output_name asks for hidden_states {number}, which {type(model).__name__} does not give: {error}"
        ) from error


def take_through(model: PreTrainedModel, steps: Sequence[nn.Module]) -> None:
    """Make the model give its hidden states behind `steps`, by a hook after its forward.

    Args:
        model: the backbone.
        steps: modules of Sentence-Transformers over the states of all tokens.
    """
    layers = nn.Sequential(*steps).to(model.device)

    def take(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        states = output.last_hidden_state
        output.last_hidden_state = layers(states.float()).to(states.dtype)
        return output

    _reader(model).register_forward_hook(take)


def _reader(model: PreTrainedModel) -> nn.Module:
    """Return the part that gives hidden states, which is run by itself where pictures are among texts."""
    return getattr(model, "language_model", model)


class OwnPooler(nn.Module):
    """A model's own pooler over the states of first tokens.

    Args:
        model: the backbone.

    Raises:
        CheckpointError: it has no pooler, or one that reads more than the first token.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        pooler = getattr(model, "pooler", None)
        if not isinstance(pooler, nn.Module):
            raise CheckpointError(f"method_output_name is pooler_output, but {type(model).__name__} has no pooler")
        self.pooler = pooler
        # ALBERT's is beside its pooler
        self.activation = coalesce(getattr(model, "pooler_activation", None), nn.Identity())

    def forward(self, x_RD: Tensor) -> Tensor:
        """`[R, D] -> [R, D]`."""
        dtype = next(self.pooler.parameters()).dtype
        if isinstance(self.pooler, nn.Linear):
            y_RD: Tensor = self.activation(self.pooler(x_RD.to(dtype)))
            return y_RD
        pooled_RD: Tensor = self.pooler(x_RD[:, None].to(dtype))
        return pooled_RD


def prove_pooler(model: PreTrainedModel) -> None:
    """Prove that `OwnPooler` gives the model's own `pooler_output`, while the model has its own attention.

    Raises:
        CheckpointError: it has no pooler, or one that reads more than the first token.
    """
    pooler, draw = OwnPooler(model), Draw(model)
    for length in PROBED:
        ids_1L = torch.tensor([draw(length)], device=model.device)
        with torch.inference_mode():
            output = model(input_ids=ids_1L)
            pooled_1D = pooler(output.last_hidden_state[:, 0])
        if distance(pooled_1D, output.pooler_output.float()) > EQUAL.get(model.dtype, 1e-1):
            raise CheckpointError(
                f"method_output_name is pooler_output, and that of {type(model).__name__} does not come from the first "
                "token alone, which Cenote does not honour"
            )
