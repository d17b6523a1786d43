"""Adapters by their names: as the server's options and as requests of Python name them."""

from __future__ import annotations

from dataclasses import dataclass

from cenote.errors import BadRequest


@dataclass(frozen=True, slots=True)
class LoraModule:
    """An adapter that requests choose by its name, as if it were a model.

    Attributes:
        name: in requests.
        path: folder or hub id.
        base_model_name: name of the model that it changes, in `/v1/models`; `None` = the served one's.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    name: str
    path: str
    base_model_name: str | None = None

    def __post_init__(self) -> None:
        if not self.name or not self.path:
            raise ValueError(
                f"got the name {self.name!r} and the path {self.path!r}, expected name=path or JSON of both"
            )


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """The choice of an adapter for inputs, in vLLM's spelling.

    Attributes:
        lora_name: its name.
        lora_int_id: its number, at least 1; the name is what tells adapters apart here.
        lora_path: folder or hub id.
        base_model_name: without effect.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise BadRequest(f"id must be > 0, got {self.lora_int_id}", param="lora_request")
        if not self.lora_name or not self.lora_path:
            raise BadRequest("a LoRARequest needs a name and a path", param="lora_request")
