"""A model whose way is shortened gives the same numbers, and can be changed as before."""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cenote.models.shortcuts import CHUNK, shorten
from tests.zoo import FIRST_TOKEN, ZOO, Architecture, build


def bert() -> Any:
    return build(next(row for row in ZOO if row.name == "bert"))


def hidden(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        states: Tensor = model(input_ids=torch.arange(FIRST_TOKEN, FIRST_TOKEN + 9)[None])[0]
    return states


@pytest.mark.parametrize("architecture", ZOO, ids=lambda a: a.name)
def test_numbers_stay(architecture: Architecture) -> None:
    model = build(architecture)
    before = hidden(model)
    shorten(model)
    assert torch.equal(hidden(model), before)


def calls(model: nn.Module) -> list[str]:
    """The functions of Python that a forward calls, and where one looks for a child."""
    found: list[str] = []

    def watch(frame: Any, event: str, _: object) -> None:
        if event == "call":
            own, name = frame.f_locals, frame.f_code.co_name
            is_child = name == "__getattr__" and own["name"] in getattr(own["self"], "_modules", ())
            found.append("a child" if is_child else name)

    hidden(model)
    sys.setprofile(watch)
    try:
        hidden(model)
    finally:
        sys.setprofile(None)
    return found


def test_children_are_found_and_no_signature_is_inspected() -> None:
    model = bert()
    before = calls(model)
    shorten(model)
    after = calls(model)
    assert before.count("a child") > 30
    assert "a child" not in after
    assert "_signature_bound_method" in before
    assert "_signature_bound_method" not in after
    assert len(after) < 0.85 * len(before)


def test_the_signature_is_that_of_the_method() -> None:
    layer = bert().encoder.layer[0]
    expected = inspect.signature(layer.feed_forward_chunk)
    shorten(layer)
    assert CHUNK in vars(layer)
    assert inspect.signature(layer.feed_forward_chunk) == expected


class Parent(nn.Module):
    other: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(3, 3)
        self._modules["other"] = nn.Linear(3, 3)
        self._modules["nobody"] = None


def test_children_can_be_exchanged_and_copied() -> None:
    parent = Parent()
    shorten(parent)
    assert vars(parent)["child"] is parent._modules["child"]
    assert parent.other is None, "the class comes first, as it did"
    assert parent.nobody is None
    twin = copy.deepcopy(parent)
    assert twin.child is twin._modules["child"] is not parent.child
    parent.child = nn.Linear(3, 2)
    assert parent.child.out_features == parent._modules["child"].out_features == 2
    assert [name for name, _ in parent.named_children()] == ["child", "other"]
    del parent.child
    assert not hasattr(parent, "child")
