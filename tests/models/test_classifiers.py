"""Classification heads of every architecture equal the whole model's logits: eager, one sequence at a time, fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification

from cenote.core import Sequence
from cenote.errors import CheckpointError
from cenote.models import classifiers
from cenote.models.layouts import forward
from cenote.models.probe import HeadProbe, choose
from cenote.tensors.packing import pack
from material.zoo import FIRST_TOKEN, ZOO, Architecture, build, has_class

SEQUENCE, TOKEN = "ForSequenceClassification", "ForTokenClassification"
# fmt: off
NAMED = (
    "bert", "roberta", "xlm-roberta", "distilbert", "electra", "deberta-v2", "modernbert", "gte", "gpt2", "qwen2",
    "qwen3", "llama", "gemma", "mistral",
)
# fmt: on
"""Architectures that are tried with 1, 2 and 5 labels; the others with 3."""

REFUSED = ("t5", "t5-gated", "mt5", "umt5", "funnel")
"""Sequence heads that are not served: T5's needs its decoder, Funnel's a backbone that shortens its input."""

LENGTHS = (17, 3, 40, 1, 17, 29)


def rows(head: str) -> list[Any]:
    """Rows of the zoo that have `head`, and numbers of labels."""
    known = [a for a in ZOO if has_class(a, head) and not (head == SEQUENCE and a.name in REFUSED)]
    return [(a, labels) for a in known for labels in ((1, 2, 5) if a.name in NAMED else (3,))]


def sequences(vocabulary: int, *, end: int | None) -> list[Sequence]:
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randint(FIRST_TOKEN, vocabulary, (n,), generator=generator).tolist() for n in LENGTHS]
    return [Sequence([*ids[:-1], ids[-1] if end is None else end]) for ids in drawn]


def alone(model: torch.nn.Module, batch: list[Sequence]) -> list[torch.Tensor]:
    """The reference: the whole model's logits."""
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([s.ids])).logits[0] for s in batch]


def name_of(case: tuple[Architecture, int]) -> str:
    return f"{case[0].name}-{case[1]}"


@pytest.mark.parametrize("case", rows(SEQUENCE), ids=name_of)
def test_sequence_heads(case: tuple[Architecture, int]) -> None:
    architecture, labels = case
    model = build(architecture, head=SEQUENCE, num_labels=labels)
    config = model.config
    batch = sequences(config.vocab_size, end=config.eos_token_id if config.is_encoder_decoder else None)
    expected = torch.stack(alone(model, batch))
    probe = HeadProbe(model, max_length=architecture.max_length)
    classifier = classifiers.of_sequences(model, probe)
    layout = choose(model.base_model).layout
    with torch.inference_mode():
        packed = pack(batch)
        got = classifier.whole(forward(layout, packed), packed, [4, 0, 1, 2, 3, 5])
    scale = max(1.0, float(expected.abs().max()))
    assert got.shape == (6, labels)
    assert classifier.num_labels == labels
    assert torch.allclose(got, expected[[4, 0, 1, 2, 3, 5]], rtol=0, atol=1e-5 * scale)
    assert float(expected.std(dim=0).min()) > 1e-3, "all inputs give nearly the same logits: this proves nothing"


class Peeking(BertForSequenceClassification):
    """A model whose head looks into the backbone."""

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        output = super().forward(input_ids, **options)
        output.logits = output.logits + self.bert.embeddings(input_ids).mean()
        return output


def test_faults_of_a_head_are_all_named() -> None:
    """Its backbone is packed already, so that the whole model does not run either."""
    bert = next(architecture for architecture in ZOO if architecture.name == "bert")
    net = Peeking(build(bert, head=SEQUENCE).config).eval()
    probe = HeadProbe(net, max_length=64)
    assert choose(net.base_model).layout.name == "packed"
    fault = "AttributeError: '_Stub' object has no attribute 'embeddings'"
    faults = "; ".join(f"{place}: {fault}" for place in ("first", "last", "padded"))
    packed = "together: RuntimeError: packed attention was called outside a packed forward"
    message = f"the head of Peeking cannot be run apart from its backbone: {faults}; {packed}"
    with pytest.raises(CheckpointError) as caught:
        classifiers.of_sequences(net, probe)
    assert caught.value.message == message


@pytest.mark.parametrize("case", rows(TOKEN), ids=name_of)
def test_token_heads(case: tuple[Architecture, int]) -> None:
    architecture, labels = case
    model = build(architecture, head=TOKEN, num_labels=labels)
    batch = sequences(model.config.vocab_size, end=None)
    expected = torch.cat(alone(model, batch))
    probe = HeadProbe(model, max_length=architecture.max_length)
    classifier = classifiers.of_tokens(model, probe)
    layout = choose(model.base_model).layout
    with torch.inference_mode():
        got = classifier.rows(forward(layout, pack(batch)))
    scale = max(1.0, float(expected.abs().max()))
    assert torch.allclose(got, expected, rtol=0, atol=1e-5 * scale)
    assert float(expected.std(dim=0).min()) > 1e-3, "all tokens get nearly the same logits: this proves nothing"
