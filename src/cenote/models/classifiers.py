"""Classification heads: the checkpoint's own head modules, run over packed states.

Transformers' `...For...` classes join a backbone and a head in one forward. Here the backbone's part of that forward
is replaced by a stub that returns states computed before, so that the head's own code runs unmodified over the rows
that it needs. Those rows are not listed per architecture but tried at load against the model's own logits.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from cenote.errors import BadRequest, CheckpointError
from cenote.models.layouts import Backbone, Padded
from cenote.models.probe import fault_of
from cenote.models.traits import logits_of
from cenote.tensors import heads
from cenote.tensors.pooling import place_of, pool

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from torch import Tensor
    from transformers import PreTrainedModel

    from cenote.models.probe import HeadProbe
    from cenote.tensors.heads import Step
    from cenote.tensors.packing import Batch, Place

    Logits = Callable[[Tensor], Tensor]
    """Logits of rows: `[R, D] -> [R, C]`, float32."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classifier:
    """A head over packed states.

    Attributes:
        rows: logits of single rows, `[R, D] -> [R, C]`.
        whole: logits of whole sequences, `([T, D], batch, members) -> [B, C]`; `None` if the head is only for tokens.
        per_token: whether `rows` means something for every token, or only for the one that `whole` picks.
        num_labels: C.
        place: the only token of each sequence that `whole` depends on, `(batch, members) -> place`, if there is one.
    """

    rows: Logits
    whole: Callable[[Tensor, Batch, list[int]], Tensor] | None
    per_token: bool
    num_labels: int
    place: Callable[[Batch, list[int]], Place | None]


class _States(tuple[Any, ...]):
    """Last hidden states and pooled output, by place and by name; whatever else a head passes on is `None`."""

    def __new__(cls, states: Tensor, pooled: Tensor | None) -> _States:
        return super().__new__(cls, (states,) if pooled is None else (states, pooled))

    def __getattr__(self, name: str) -> Tensor | None:
        place = {"last_hidden_state": 0, "pooler_output": 1}.get(name, len(self))
        return self[place] if place < len(self) else None


_STATES: ContextVar[Tensor] = ContextVar("cenote_states")
"""Of the head that is running."""


class _Stub(nn.Module):
    """Stands where the backbone was, and returns the states that it would."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        pooler = getattr(backbone, "pooler", None)
        self.pooler = copy.deepcopy(pooler).float() if isinstance(pooler, nn.Module) else None
        self.pooler_activation = getattr(backbone, "pooler_activation", None)  # ALBERT's is beside its pooler

    def forward(self, *_: Any, **__: Any) -> _States:
        states_BLD, pooled = _STATES.get(), None
        if isinstance(self.pooler, nn.Linear) and self.pooler_activation is not None:
            pooled = self.pooler_activation(self.pooler(states_BLD[:, 0]))
        elif self.pooler is not None:
            pooled = self.pooler(states_BLD)
        return _States(states_BLD, pooled)


class OwnHead:
    """The head of a Transformers `...For...` model, over states computed elsewhere. Weights are shared and float32.

    Attributes:
        config: of the part for text.
        pad: id of the padding token.
        end: id of a token that every input must contain, the same number of times in all that share a call: BART's
            heads are for the state of the last one. `None` = there is no such token.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        backbone = model.base_model
        for child in model.children():
            if child is not backbone:
                child.float()
        self._model = copy.copy(model)
        self._model._modules = {**model._modules, model.base_model_prefix: _Stub(backbone)}
        self._model.config = copy.deepcopy(model.config)
        self.config = text = self._model.config.get_text_config()
        self.pad = text.pad_token_id
        if self.pad is None:  # decoders refuse several sequences without one; states of one token need none
            text.pad_token_id = -1
        self.end: int | None = None

    def __call__(self, states_BLD: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the model's own logits for these last hidden states."""
        token = _STATES.set(states_BLD.float())
        try:
            output = self._model(input_ids=ids_BL, attention_mask=mask_BL, return_dict=True)
        finally:
            _STATES.reset(token)
        return logits_of(output).float()

    def rows(self, x_RD: Tensor) -> Tensor:
        """Logits of every row as a sequence of one token."""
        ones_R1 = torch.ones(x_RD.shape[0], 1, dtype=torch.long, device=x_RD.device)
        return self(x_RD[:, None], ones_R1, ones_R1).flatten(1)

    def first(self, x_TD: Tensor, batch: Batch, members: list[int]) -> Tensor:
        """Logits of each sequence's first token."""
        return self.rows(x_TD[batch.rows_at("first")[batch.index(members)]])

    def last(self, x_TD: Tensor, batch: Batch, members: list[int]) -> Tensor:
        """Logits of each sequence's last token that is no padding token, as Transformers picks it."""
        return self.rows(x_TD[batch.index([last_row(batch, i, self.pad) for i in members])])

    def padded(self, x_TD: Tensor, batch: Batch, members: list[int]) -> Tensor:
        """Logits of states that are padded again, for heads that depend on all of them.

        Raises:
            BadRequest: a sequence has no `end` token.
        """
        logits: dict[int, Tensor] = {}
        for group in by_count(batch, members, self.end):
            logits |= dict(zip(group, self._padded(x_TD, batch, group), strict=True))
        return torch.stack([logits[i] for i in members])

    def _padded(self, x_TD: Tensor, batch: Batch, members: list[int]) -> Tensor:
        part, rows = batch.select(members)
        mask_BL = np.arange(part.max_length) < np.array(part.lengths)[:, None]
        states_BLD = x_TD.new_zeros(*mask_BL.shape, x_TD.shape[-1])
        states_BLD.flatten(0, 1)[batch.index(np.flatnonzero(mask_BL))] = x_TD[rows]
        ids_BL = np.full(mask_BL.shape, self.pad or 0)
        ids_BL[mask_BL] = part.host_ids_T
        return self(states_BLD, batch.index(ids_BL), batch.index(mask_BL))


class Together:
    """The whole model over sequences of one length, for heads that change what the backbone does (Longformer's).

    Slow: it runs beside the forward whose states the other tasks use.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._groups = Padded(Backbone(model), equal=True).groups

    def __call__(self, x_TD: Tensor, batch: Batch, members: list[int]) -> Tensor:
        """Logits `[B, C]`; the states are not read."""
        logits: dict[int, Tensor] = {}
        for group in self._groups(tuple(batch.lengths[i] for i in members)):
            part, _ = batch.select([members[i] for i in group])
            shape = (part.size, part.max_length)
            types = {} if part.type_ids_T is None else {"token_type_ids": part.type_ids_T.view(shape)}
            ids_BL = part.ids_T.view(shape)
            logits_BC = logits_of(self._model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), **types))
            logits |= dict(zip(group, logits_BC, strict=True))
        return torch.stack([logits[i] for i in range(len(members))]).float()


def by_count(batch: Batch, members: list[int], token: int | None) -> list[list[int]]:
    """Group sequences by the number of times that they contain `token`; all are one group if there is none.

    Raises:
        BadRequest: a sequence does not contain it.
    """
    if token is None:
        return [members]
    counts_B = np.add.reduceat(batch.host_ids_T == token, batch.starts[:-1], dtype=np.int64)
    groups: dict[int, list[int]] = defaultdict(list)
    for i in members:
        groups[int(counts_B[i])].append(i)
    if 0 in groups:
        raise BadRequest(
            f"got an input without the end token (id {token}), whose state this model's head rates; let the tokenizer "
            "add its special tokens, or end token ids with it",
            param="input",
        )
    return [*groups.values()]


def last_row(batch: Batch, member: int, pad: int | None) -> int:
    """Return the row of a sequence's last token whose id is not `pad`; its first row if all are."""
    start, stop = batch.starts[member], batch.starts[member + 1]
    kept = np.flatnonzero(batch.host_ids_T[start:stop] != pad)
    return start + (int(kept[-1]) if len(kept) else 0)


def at_none(batch: Batch, members: list[int]) -> Place | None:
    """`Classifier.place` of heads, and of outputs, that depend on more than one token."""
    return None


def at_first(batch: Batch, members: list[int]) -> Place | None:
    """`Classifier.place` of heads that depend on the first token."""
    return "first"


def at_last(pad: int | None, batch: Batch, members: list[int]) -> Place | None:
    """`Classifier.place` of heads that depend on `last_row`."""
    return "last" if all(last_row(batch, i, pad) == batch.starts[i + 1] - 1 for i in members) else None


def of_pooled(modes: tuple[str, ...], steps: Seq[Step], num_labels: int) -> Classifier:
    """Return the head that modules make: pooling by `modes`, then `steps`, whose last gives `num_labels` scores."""

    def rows(x_RD: Tensor) -> Tensor:
        return heads.apply(steps, x_RD, dimensions=None, activate=False)

    def whole(x_TD: Tensor, batch: Batch, members: list[int]) -> Tensor:
        return rows(pool(x_TD, batch, modes)[batch.index(members)])

    def place(batch: Batch, members: list[int]) -> Place | None:
        return place_of(modes, batch)

    return Classifier(rows, whole, False, num_labels, place)


def of_sequences(model: PreTrainedModel, probe: HeadProbe) -> Classifier:
    """Classifier by the head of a `...ForSequenceClassification` model.

    Raises:
        CheckpointError: given the same states, the head does not repeat the model's own logits.
    """
    head = OwnHead(model)
    faults = []
    for name, place in (("first", at_first), ("last", partial(at_last, head.pad)), ("padded", at_none)):
        whole = getattr(head, name)
        fault = fault_of(partial(_head_fault, whole, probe))
        if not fault:
            head.end = _end_token(head, probe) if name == "padded" else None
            return Classifier(head.rows, whole, name == "last", probe.width, place)
        faults.append(f"{name}: {fault}")
    together = Together(model)
    fault = fault_of(partial(_head_fault, together, probe))
    if not fault:
        log.info("%s runs its head together with its backbone: %s", type(model).__name__, "; ".join(faults))
        return Classifier(head.rows, together, False, probe.width, at_none)
    faults.append(f"together: {fault}")
    raise CheckpointError(
        f"the head of {type(model).__name__} cannot be run apart from its backbone: {'; '.join(faults)}"
    )


def _end_token(head: OwnHead, probe: HeadProbe) -> int | None:
    """Return the end token, if `head` needs one: it runs over that token alone, and fails with any other."""
    end = getattr(head.config, "eos_token_id", None)
    other = next(token for token in range(3) if token not in (end, head.pad))
    needs = isinstance(end, int) and not _fails(head, probe, end) and _fails(head, probe, other)
    return end if needs else None


@torch.inference_mode()
def _fails(head: OwnHead, probe: HeadProbe, token: int) -> bool:
    """Return whether the head fails with a sequence of this one token."""
    ids_11 = torch.full((1, 1), token, device=probe.rows_TD.device)
    try:
        head(probe.rows_TD[:1, None], ids_11, torch.ones_like(ids_11))
    except Exception as error:  # whatever the head raises
        log.debug("the head fails with token %d: %s", token, error)
        return True
    return False


@torch.inference_mode()
def _head_fault(whole: Callable[[Tensor, Batch, list[int]], Tensor], probe: HeadProbe) -> str:
    """Return why logits of whole sequences are not the model's own, or an empty string."""
    batch = probe.batch
    logits_BC = whole(probe.rows_TD, batch, list(range(batch.size)))
    return "" if probe.agrees(list(logits_BC)) else "other logits than the model's own"


def of_tokens(model: PreTrainedModel, probe: HeadProbe, columns: tuple[int, ...] = ()) -> Classifier:
    """Classifier by the head of a `...ForTokenClassification` model, or another head over each token alone.

    Args:
        model: the whole.
        probe: made before.
        columns: columns of the probe's logits that the head still has; empty = all.

    Raises:
        CheckpointError: given the same states, the head does not repeat the model's own logits.
    """
    head = OwnHead(model)
    with torch.inference_mode():
        logits_TC = head.rows(probe.rows_TD)
    if not probe.agrees(probe.batch.split(logits_TC), columns):
        raise CheckpointError(f"the head of {type(model).__name__} cannot be run apart from its backbone")
    return Classifier(head.rows, None, True, logits_TC.shape[-1], at_none)


def of_vocabulary(
    model: PreTrainedModel, probe: HeadProbe, columns: tuple[int, ...], *, difference: bool
) -> Classifier:
    """Classifier of the last token by the language-model head of a `...ForCausalLM` model.

    Args:
        model: its head is cut to the rows that are needed.
        probe: made before.
        columns: token ids whose logits are the classes; empty = the whole vocabulary.
        difference: the one class is the second column's logit minus the first's, whose sigmoid is the softmax of both.

    Raises:
        CheckpointError: given the same states, the head does not repeat the model's own logits.
    """
    if columns:
        _cut_vocabulary(model, columns)
    of_each_token = of_tokens(model, probe, columns)

    def rows(x_RD: Tensor) -> Tensor:
        logits_RC = of_each_token.rows(x_RD)
        return logits_RC[:, 1:] - logits_RC[:, :1] if difference else logits_RC

    num_labels = 1 if difference else of_each_token.num_labels
    return Classifier(rows, of_last(rows), True, num_labels, partial(at_last, None))


def _cut_vocabulary(model: PreTrainedModel, columns: tuple[int, ...]) -> None:
    """Leave only these rows of the language-model head, float32."""
    whole: nn.Linear = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not all(0 <= column < whole.out_features for column in columns):
        raise CheckpointError(f"classes are logits of token ids below {whole.out_features}, got {list(columns)}")
    kept = list(columns)
    cut = nn.Linear(
        whole.in_features, len(kept), bias=whole.bias is not None, device=whole.weight.device, dtype=torch.float32
    )
    cut.weight = nn.Parameter(whole.weight[kept].float(), requires_grad=False)
    if whole.bias is not None:
        cut.bias = nn.Parameter(whole.bias[kept].float(), requires_grad=False)
    model.set_output_embeddings(cut)  # type: ignore[no-untyped-call]


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a frozen float32 layer with these weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.float32)
    layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.float(), requires_grad=False)
    return layer


def of_modules(module: nn.Module, num_labels: int) -> Classifier:
    """Classifier by a module over rows, for heads that Transformers has no class for."""

    def rows(x_RD: Tensor) -> Tensor:
        logits_RC: Tensor = module(x_RD.float())
        return logits_RC

    return Classifier(rows, of_last(rows), True, num_labels, partial(at_last, None))


def of_last(rows: Logits) -> Callable[[Tensor, Batch, list[int]], Tensor]:
    """Return `rows` over each sequence's last token."""

    def whole(x_TD: Tensor, batch: Batch, members: list[int]) -> Tensor:
        return rows(x_TD[batch.rows_at("last")[batch.index(members)]])

    return whole
