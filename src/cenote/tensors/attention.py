"""The one attention function: Transformers' signature, over sequences laid end to end.

It is registered with Transformers under `NAME`, and not with its mask interface, so that models build no mask.
The batch's boundaries travel in a ContextVar, because several models drop keywords that they do not know. A keyword
of a model that is not understood here is refused, never ignored.
"""

from __future__ import annotations

import functools
import importlib.util
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from cenote.functions import coalesce
from cenote.tensors.packing import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from cenote.tensors.native import Kernels
    from cenote.tensors.packing import Keys, Place, Run, Static

    Varlen = Callable[[Tensor, Tensor, Tensor, "Spans", "Rule"], Tensor]

NAME = "cenote"
FUSED_ON = frozenset({"cuda"})
"""Devices whose kernels do sequences of many lengths at once."""
QUERY_BLOCK = 256
LARGEST_FLASH_HEAD = 256
UNBOUNDED = -1
"""Flash kernels' number for a reach without limit."""
CAUSAL_FROM_THE_END = 2
"""torch's number of the mask in which the last query sees the last key (`torch.nn.attention.bias.CausalVariant`)."""
HARMLESS = frozenset(
    {
        "dropout",
        "position_ids",
        "use_cache",
        "cache_position",
        "deterministic",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "layer_idx",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
    }
)


@dataclass(slots=True)
class Forward:
    """A packed forward under way.

    Attributes:
        is_called: whether the model has called the attention function in it.
        is_causal: whether every call so far was causal.
        is_fused: whether one kernel did all sequences in every call so far.
        place: the only token of each sequence for which the last layer has to return a row; `None` = all.
        keys: keys and values of all tokens in the last layer, while it runs for single tokens.
        wants_keys: the next call is made for its keys and values, and ends with `KeysFound`.
    """

    batch: Batch | Static
    kernels: Kernels | None = None
    place: Place | None = None
    is_called: bool = False
    is_causal: bool = True
    is_fused: bool = True
    keys: tuple[Tensor, Tensor] | None = None
    wants_keys: bool = False


class KeysFound(Exception):
    """Ends a forward that was made for `Forward.keys`. Not an error."""


_FORWARD: ContextVar[Forward] = ContextVar("cenote_forward")


@contextmanager
def boundaries(batch: Batch | Static, kernels: Kernels | None = None, place: Place | None = None) -> Iterator[Forward]:
    """Tell the attention function, for the forward inside, where each sequence begins and ends.

    Args:
        batch: the batch that the forward runs over.
        kernels: native CPU kernels to use where they can do what the model asks.
        place: see `Forward`.

    Yields:
        The state of the forward.

    Raises:
        RuntimeError: the model did not call it, so something else decided which tokens see which.
    """
    under_way = Forward(batch, kernels, place)
    token = _FORWARD.set(under_way)
    try:
        yield under_way
    finally:
        _FORWARD.reset(token)
    if not under_way.is_called:
        raise RuntimeError("the model does not call the registered attention function")


def current() -> Forward:
    """Return the packed forward under way.

    Raises:
        RuntimeError: there is none.
    """
    under_way = under_way_or_none()
    if under_way is None:
        raise RuntimeError("packed attention was called outside a packed forward")
    return under_way


def under_way_or_none() -> Forward | None:
    """Return the packed forward under way, if there is one."""
    return _FORWARD.get(None)


class Rule(NamedTuple):
    """The keys that a query sees, and the way from dot products to scores.

    Attributes:
        causal: a query sees keys up to its own position only.
        window: a query sees keys nearer than this many positions; `None` = all.
        scaling: factor on the dot products; `None` = 1 / sqrt(head size).
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).
        bias: added to the scores, `[1, N, L, L]` for the longest length L (T5).
        sinks: one extra logit per head that takes weight and gives no value, `[N]` (GPT-OSS).
    """

    causal: bool
    window: int | None = None
    scaling: float | None = None
    softcap: float | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether a fused kernel can do it."""
        return self.softcap is None and self.bias is None and self.sinks is None

    def reach(self, most: int) -> tuple[int, int]:
        """Return the number of positions that a query sees before itself and after; `most` where the rule has none."""
        reach = self.window - 1 if self.window else most
        return (reach, 0) if self.causal else (reach, reach)

    def within(self, max_length: int) -> Rule:
        """Return the same rule for sequences of at most `max_length`: without a window that they do not exceed."""
        is_wide = self.window is not None and max_length <= self.window
        return self._replace(window=None) if is_wide else self


def packed_attention(
    module: torch.nn.Module,
    q_1NTH: Tensor,
    k_1NTH: Tensor,
    v_1NTH: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention within each sequence of the current batch and its prefix; `[1, T, N, H]`, as Transformers expects.

    Raises:
        NotImplementedError: the model passes a mask or a keyword that packing does not honour, or the batch has
            prefixes and the attention is not causal or has a position bias.
        RuntimeError: no batch is set, or the tokens are not the batch's (a vision tower, say).
    """
    if attention_mask is not None and hides(attention_mask):
        raise NotImplementedError(f"{type(module).__name__} passes a mask of its own, which packing does not honour")
    for name in sorted(rest.keys() - HARMLESS):
        if rest[name] is not None:
            raise NotImplementedError(f"{type(module).__name__} passes {name!r}, which packing does not honour")
    under_way = current()
    under_way.is_called = True
    causal = coalesce(is_causal, getattr(module, "is_causal", None))
    if causal is None:
        raise NotImplementedError(f"{type(module).__name__} does not say whether it is causal")
    rule = Rule(bool(causal), sliding_window, scaling, softcap, position_bias, s_aux)
    under_way.is_causal &= rule.causal
    _check_tokens(module, q_1NTH, k_1NTH, under_way, rule)
    if under_way.wants_keys:
        under_way.keys = (k_1NTH, v_1NTH)
        raise KeysFound
    return _of_batch(module, q_1NTH, *(under_way.keys or (k_1NTH, v_1NTH)), under_way, rule), None


def _check_tokens(module: torch.nn.Module, q_1NTH: Tensor, k_1NTH: Tensor, under_way: Forward, rule: Rule) -> None:
    """Refuse tokens that are not the batch's, and a rule that does not go with its prefixes."""
    batch = under_way.batch
    tokens = batch.size if under_way.keys else batch.tokens
    if (q_1NTH.shape[0], q_1NTH.shape[2], k_1NTH.shape[2]) != (1, tokens, tokens):
        raise RuntimeError(f"expected the batch's {tokens} tokens, got queries of shape {tuple(q_1NTH.shape)}")
    if batch.prefixes is None:
        return
    if rule.bias is not None:
        raise NotImplementedError(f"{type(module).__name__} has a position bias, which does not reach past a sequence")
    if not (rule.causal or batch.blind):
        raise NotImplementedError(f"{type(module).__name__} needs causal attention to share a prefix")


def _of_batch(
    module: torch.nn.Module, q_1NTH: Tensor, k_1NTH: Tensor, v_1NTH: Tensor, under_way: Forward, rule: Rule
) -> Tensor:
    """Attend by the fastest way that there is.

    Returns:
        `[1, T, N, H]`, or with `Forward.keys` `[1, B, N, H]`.
    """
    batch, kernels = under_way.batch, under_way.kernels
    place = under_way.place if under_way.keys else None
    if q_1NTH.device.type in FUSED_ON:
        fused = attend_fused(q_1NTH, k_1NTH, v_1NTH, batch, rule, place)
        if fused is not None:
            return fused
    if not isinstance(batch, Batch):
        raise NotImplementedError(f"no fused kernel does the attention of {type(module).__name__} here")
    if kernels is not None and _is_native(q_1NTH, k_1NTH, v_1NTH, batch, rule, kernels):
        spans_B7 = batch.spans_B7 if place is None else batch.spans_at(place)
        scale = _scale(q_1NTH, rule)
        return kernels.attend(q_1NTH, k_1NTH, v_1NTH, spans_B7, scale, causal=rule.causal, window=rule.window)
    under_way.is_fused = False
    if place is not None:
        return attend_at(place, q_1NTH, k_1NTH, v_1NTH, batch, rule)
    return attend_runs(q_1NTH, k_1NTH, v_1NTH, batch, rule)


def _is_native(q_1NTH: Tensor, k_1NTH: Tensor, v_1NTH: Tensor, batch: Batch, rule: Rule, kernels: Kernels) -> bool:
    """Return whether the native kernel does the attention of `batch`. It counts windows from a query's own key."""
    counts_past_keys = batch.blind and rule.window is not None
    return rule.plain and not counts_past_keys and kernels.can_attend(q_1NTH, k_1NTH, v_1NTH, batch.most_keys)


def hides(mask: Tensor) -> bool:
    """Return whether a mask hides anything. LayoutLM makes one of its own that does not."""
    return not bool(mask.all()) if mask.dtype == torch.bool else bool(mask.any())


def attend_runs(q_1NTH: Tensor, k_1NTH: Tensor, v_1NTH: Tensor, batch: Batch, rule: Rule) -> Tensor:
    """Attend run by run: sequences of equal length form a small dense batch. Works on any device."""
    _, heads, tokens, _ = q_1NTH.shape
    out_1TNH = q_1NTH.new_empty(1, tokens, heads, v_1NTH.shape[-1])
    for run in batch.runs:
        rows = slice(run.start, run.start + run.size * run.length)
        q = _of_run(q_1NTH, run)
        k, v = _seen_in(k_1NTH, run, batch.blind), _seen_in(v_1NTH, run, batch.blind)
        out = _attend(q, k, v, rule, len(run.prefix)).transpose(1, 2)
        out_1TNH[0, rows].view(run.size, run.length, heads, -1).copy_(out)
    return out_1TNH


def attend_at(place: Place, q_1NBH: Tensor, k_1NTH: Tensor, v_1NTH: Tensor, batch: Batch, rule: Rule) -> Tensor:
    """Attend from one token of each sequence, its first or last, to all tokens that it sees: `[1, B, N, H]`."""
    out_1BNH = q_1NBH.new_empty(1, batch.size, q_1NBH.shape[1], v_1NTH.shape[-1])
    done = 0
    for run in batch.runs:
        k, v = _seen_in(k_1NTH, run, batch.blind), _seen_in(v_1NTH, run, batch.blind)
        q = q_1NBH[0, :, done : done + run.size].transpose(0, 1)[:, :, None]
        at = len(run.prefix) + (0 if place == "first" else run.length - 1)
        out_1BNH[0, done : done + run.size] = _attend_block(q, k, v, rule, at)[:, :, 0]
        done += run.size
    return out_1BNH


def _of_run(x_1NTH: Tensor, run: Run) -> Tensor:
    """Return the rows of a run, `[count, N, length, H]`."""
    rows = x_1NTH[0, :, run.start : run.start + run.size * run.length]
    return rows.view(rows.shape[0], run.size, run.length, -1).transpose(0, 1)


def _seen_in(x_1NTH: Tensor, run: Run, blind: bool) -> Tensor:
    """Return the rows that the queries of a run see: their prefix's, and unless they are blind their sequence's."""
    rows = _of_run(x_1NTH, run)
    if not run.prefix:
        return rows
    before = x_1NTH[:, :, run.prefix.start : run.prefix.stop].expand(run.size, -1, -1, -1)
    return before if blind else torch.cat([before, rows], dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor, rule: Rule, before: int) -> Tensor:
    """Dense attention over `[count, N, length, H]`, in blocks of queries where a window, bias or prefix asks for it.

    `before` is the number of positions by which the first key lies before the first query.
    """
    length, keys = q.shape[2], k.shape[2]
    grouped = k.shape[1] != q.shape[1]
    is_whole = (before, length) == (0, keys) and rule.within(length).window is None
    if rule.plain and is_whole:
        return F.scaled_dot_product_attention(q, k, v, is_causal=rule.causal, scale=rule.scaling, enable_gqa=grouped)
    starts = range(0, length, QUERY_BLOCK)
    return torch.cat([_attend_block(q[:, :, a : a + QUERY_BLOCK], k, v, rule, a + before) for a in starts], dim=2)


def _attend_block(q: Tensor, k: Tensor, v: Tensor, rule: Rule, start: int) -> Tensor:
    """Neighbouring queries, the first of them where the key number `start` is, against the band that they can see."""
    keys, stop = k.shape[2], start + q.shape[2]
    before, after = rule.reach(max(keys, stop))
    first, last = max(0, start - before), min(keys, stop + after)
    k, v = k[:, :, first:last], v[:, :, first:last]
    place = start - first  # of the first query's own key in the band
    band = torch.ones(stop - start, last - first, dtype=torch.bool, device=q.device)
    seen = band.tril(place + after).triu(place - before)
    grouped = k.shape[1] != q.shape[1]
    if rule.plain:
        mask = None if q.shape[2] == 1 else seen  # a single query sees all of its band
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rule.scaling, enable_gqa=grouped)
    k, v = _ungrouped(k, q.shape[1]), _ungrouped(v, q.shape[1])
    bias = None if rule.bias is None else rule.bias[:, :, start:stop, first:last]
    return _attend_by_steps(q, k, v, rule, bias, seen)


def _ungrouped(x: Tensor, heads: int) -> Tensor:
    """Return keys or values, whose dimension 1 are heads, with a head of their own for each of `heads` of queries."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _attend_by_steps(q: Tensor, k: Tensor, v: Tensor, rule: Rule, bias: Tensor | None, seen: Tensor) -> Tensor:
    """Attention with the parts of a rule that fused kernels lack, softcap, bias and sinks."""
    scores = (q @ k.transpose(-1, -2)) * _scale(q, rule)
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~seen, float("-inf")).float()
    if rule.sinks is None:
        return scores.softmax(-1).to(v.dtype) @ v
    sinks = rule.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1].to(v.dtype) @ v


class Spans(NamedTuple):
    """The rows of each sequence, as fused kernels take them.

    Attributes:
        cu_seqlens: int32 offsets of the queries of each sequence.
        max_length: maximum number of queries of a sequence.
        keys: the rows that they see.
    """

    cu_seqlens: Tensor
    max_length: int
    keys: Keys


def attend_fused(
    q_1NTH: Tensor, k_1NTH: Tensor, v_1NTH: Tensor, batch: Batch | Static, rule: Rule, place: Place | None = None
) -> Tensor | None:
    """Attend in all sequences by one kernel; `None` if there is none for it.

    With a `place` there is one query for each sequence, `[1, N, B, H]`, and the result is `[1, B, N, H]`.
    """
    keys = batch.keys
    rule = rule.within(keys.max_length)
    is_counted = rule.causal or rule.window is not None  # kernels count positions back from the last key
    if is_counted and (batch.blind or place == "first"):
        return None
    kernel = varlen_kernel(q_1NTH, v_1NTH, rule)
    if kernel is None:
        return None
    spans = Spans(batch.cu_seqlens, batch.max_length, keys)
    if place is not None:
        spans = Spans(torch.arange(batch.size + 1, dtype=torch.int32, device=q_1NTH.device), 1, keys)
    return kernel(q_1NTH, k_1NTH, v_1NTH, spans, rule)


def varlen_kernel(q_1NTH: Tensor, v_1NTH: Tensor, rule: Rule) -> Varlen | None:
    """Return the fused kernel that does all sequences at once by `rule`, or `None`.

    Flash attention takes half types and heads of up to 256, on GPUs from Ampere (sm80) on; torch's has no softcap,
    that of the package flash-attn has. Memory-efficient attention takes all types and GPUs, but no window that looks
    ahead.
    """
    if rule.bias is not None:
        return None
    if _fits_flash(q_1NTH, v_1NTH):
        if rule.softcap is None:
            return _flash
        if rule.sinks is None and _has_flash_attn():
            return _flash_attn
    looks_ahead = rule.window is not None and not rule.causal
    return _efficient if rule.plain and not looks_ahead else None


def _fits_flash(q_1NTH: Tensor, v_1NTH: Tensor) -> bool:
    is_half = q_1NTH.dtype in (torch.float16, torch.bfloat16)
    size = max(q_1NTH.shape[-1], v_1NTH.shape[-1])
    return is_half and size <= LARGEST_FLASH_HEAD and _is_ampere(q_1NTH.device)


@functools.cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


@functools.cache
def _is_ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _varlen_states(q_1NTH: Tensor, k_1NTH: Tensor, v_1NTH: Tensor, spans: Spans) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries `[T, N, H]`, and the keys and values `[K, N, H]` of `spans.keys`, with heads of one size.

    Kernels load eight values at once, so heads are filled up with zeros to a multiple of eight.
    """
    size = -(-max(q_1NTH.shape[-1], v_1NTH.shape[-1]) // 8) * 8
    q, k, v = (_filled(x_1NTH[0].transpose(0, 1), size) for x_1NTH in (q_1NTH, k_1NTH, v_1NTH))
    rows_K = spans.keys.rows_K
    if rows_K is not None:
        k, v = k.index_select(0, rows_K), v.index_select(0, rows_K)
    return _with_whole_rows(q), _with_whole_rows(k), _with_whole_rows(v)


def _filled(x_TNH: Tensor, size: int) -> Tensor:
    missing = size - x_TNH.shape[-1]
    return F.pad(x_TNH, (0, missing)) if missing else x_TNH


def _with_whole_rows(x_TNH: Tensor) -> Tensor:
    return x_TNH if x_TNH.stride(-1) == 1 else x_TNH.contiguous()


def _scale(q_1NTH: Tensor, rule: Rule) -> float:
    """Return the scale for heads as the model has them, which may be smaller than those that a kernel gets."""
    scale: float = coalesce(rule.scaling, q_1NTH.shape[-1] ** -0.5)
    return scale


def _flash(q_1NTH: Tensor, k_1NTH: Tensor, v_1NTH: Tensor, spans: Spans, rule: Rule) -> Tensor:
    """torch's flash attention, by the operator behind `torch.nn.attention.varlen`, whose own arguments vary by release.

    A sink takes the share of the weight that its logit has beside the others'.
    """
    left, right = rule.reach(UNBOUNDED)
    out_TNH, lse_NT, *_ = torch.ops.aten._flash_attention_forward(
        *_varlen_states(q_1NTH, k_1NTH, v_1NTH, spans),
        spans.cu_seqlens,
        spans.keys.cu_seqlens,
        spans.max_length,
        spans.keys.max_length,
        0.0,
        (left, right) == (-1, 0),
        False,
        scale=_scale(q_1NTH, rule),
        window_size_left=left,
        window_size_right=right,
    )
    if rule.sinks is not None:
        share_TN1 = torch.sigmoid(lse_NT.t() - rule.sinks.float())[..., None]
        out_TNH = out_TNH * share_TN1.to(out_TNH.dtype)
    out_1TNH: Tensor = out_TNH[None, ..., : v_1NTH.shape[-1]]
    return out_1TNH


def _flash_attn(q_1NTH: Tensor, k_1NTH: Tensor, v_1NTH: Tensor, spans: Spans, rule: Rule) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out_TNH: Tensor = flash_attn_varlen_func(
        *_varlen_states(q_1NTH, k_1NTH, v_1NTH, spans),
        spans.cu_seqlens,
        spans.keys.cu_seqlens,
        spans.max_length,
        spans.keys.max_length,
        softmax_scale=_scale(q_1NTH, rule),
        causal=rule.causal,
        window_size=rule.reach(UNBOUNDED),
        softcap=rule.softcap or 0.0,
    )
    return out_TNH[None, ..., : v_1NTH.shape[-1]]


def _efficient(q_1NTH: Tensor, k_1NTH: Tensor, v_1NTH: Tensor, spans: Spans, rule: Rule) -> Tensor:
    """torch's memory-efficient attention, called as its nested tensors call it; also for float32 and older GPUs."""
    q, k, v = _varlen_states(q_1NTH, k_1NTH, v_1NTH, spans)
    k, v = _ungrouped(k, q.shape[1]), _ungrouped(v, q.shape[1])
    out_1TNH: Tensor = torch.ops.aten._efficient_attention_forward(
        q[None],
        k[None],
        v[None],
        None,
        spans.cu_seqlens,
        spans.keys.cu_seqlens,
        spans.max_length,
        spans.keys.max_length,
        0.0,
        CAUSAL_FROM_THE_END if rule.causal else 0,
        scale=_scale(q_1NTH, rule),
        window_size=rule.window,
    )[0]
    return out_1TNH[..., : v_1NTH.shape[-1]]


def register() -> str:
    """Register the function with Transformers, and return the name to pass as `attn_implementation`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME
