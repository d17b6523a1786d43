"""KServe's and Triton's dialect: the open inference protocol, version 2, texts in and numbers out."""

from __future__ import annotations

from itertools import chain
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

import cenote
from cenote.core import PoolingParams
from cenote.errors import BadRequest, TaskNotOffered
from cenote.pipeline.options import TextOptions
from cenote.server.dialects import operations
from cenote.server.errors import text_error
from cenote.server.routes import Dialect, Route
from cenote.server.wire.encoding import json_response
from cenote.server.wire.fields import Many, Queued, Some
from cenote.server.wire.plain import encoded
from cenote.tasks import TASKS

if TYPE_CHECKING:
    from starlette.requests import Request

    from cenote.core import ModelInfo, Output
    from cenote.server.serving import Serving
    from cenote.server.wire.fields import Lengths

MOST_SIDES = 8
"""Dimensions of an input."""
WIDTHS = {"embed": "dimension", "classify": "num_labels"}
"""Field of `ModelInfo` with the length of a row, by the tasks that give one row per text."""


class KserveTensor(BaseModel):
    """An input: texts, of the shape `[N]` or `[N, 1]`, also nested."""

    name: str
    datatype: str
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(max_length=MOST_SIDES, fail_fast=True)]
    data: Many[str] | Many[Some[str]]
    _texts: list[str] = PrivateAttr()

    @model_validator(mode="after")
    def _flat(self) -> KserveTensor:
        rows = [[row] if isinstance(row, str) else row for row in self.data]
        self._texts = list(chain.from_iterable(rows))
        if prod(self.shape) != len(self._texts):
            raise PydanticCustomError(
                "shape", f"got {len(self._texts)} texts in an input of shape {self.shape}", {"param": "inputs"}
            )
        return self

    @property
    def texts(self) -> list[str]:
        """Its elements, one after the other."""
        return self._texts


class KserveOutput(BaseModel):
    """An output that is asked for."""

    name: str


class KserveInferRequest(Queued):
    """Body of `POST /v2/models/NAME/infer`."""

    model: str | None = None
    id: str | None = None
    inputs: Some[KserveTensor]
    outputs: Annotated[Some[KserveOutput], Field(max_length=1)] | None = None

    @classmethod
    def check_lengths(cls, values: Any, lengths: Lengths) -> None:
        """See `Body.check_lengths`."""
        super().check_lengths(values, lengths)
        tensors = values.get("inputs") if isinstance(values, dict) else None
        for tensor in tensors if isinstance(tensors, list) else ():
            if isinstance(tensor, dict):
                super().check_lengths({"inputs": tensor.get("data")}, lengths)

    def texts(self) -> list[str]:
        """Return the texts of the only input.

        Raises:
            BadRequest: there are more inputs, or its elements are no texts.
        """
        tensor = self.inputs[0]
        if len(self.inputs) > 1 or tensor.datatype != "BYTES":
            raise BadRequest(
                f"got {len(self.inputs)} inputs, the first of datatype {tensor.datatype}; "
                "expected one of datatype BYTES, a text per element",
                param="inputs",
            )
        return tensor.texts


async def infer(serving: Serving, request: Request, body: KserveInferRequest) -> Response:
    """The vector, or the values of all classes, of each text, one after the other."""
    service = serving.find(body.model)
    task = _task(service.info)
    name = body.outputs[0].name if body.outputs else _OUTPUT

    def encode(outputs: list[Output]) -> Response:
        rows = np.stack([output.data for output in outputs])
        tensor = {"name": name, "datatype": "FP32", "shape": list(rows.shape), "data": rows.ravel()}
        answer = {"model_name": serving.name(body.model), "model_version": "1", "outputs": [tensor]}
        return json_response(answer if body.id is None else {"id": body.id, **answer})

    return await encoded(serving, request, service, body, body.texts(), task, PoolingParams(), TextOptions(), encode)


_OUTPUT = "output"


def _task(info: ModelInfo) -> str:
    """Return the task that a model runs here.

    Raises:
        TaskNotOffered: it gives no row of a fixed length per text.
    """
    if info.default_task in WIDTHS:
        return info.default_task
    raise TaskNotOffered(
        f"{info.name} gives {TASKS[info.default_task].doc}; the inference protocol is for models with one row of a "
        "fixed length per text. Use /pooling"
    )


async def server(serving: Serving, request: Request, body: None) -> Response:
    """Name and version of the server."""
    return json_response({"name": "cenote", "version": cenote.__version__, "extensions": []})


async def model(serving: Serving, request: Request, body: None) -> Response:
    """The inputs and outputs of a model."""
    info = serving.find(request.state.model).info
    width = getattr(info, WIDTHS[_task(info)])
    return json_response({
        "name": request.state.model,
        "versions": ["1"],
        "platform": "cenote",
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [{"name": _OUTPUT, "datatype": "FP32", "shape": [-1, width]}],
    })  # fmt: skip


async def model_ready(serving: Serving, request: Request, body: None) -> Response:
    """200 if the server is ready, and has the model."""
    serving.find(request.state.model)
    return await operations.ready(serving, request, body)


DIALECT = Dialect(
    "KServe",
    (
        Route("/v2", server, method="GET"),
        Route("/v2/health/live", operations.live, method="GET", is_open=True),
        Route("/v2/health/ready", operations.ready, method="GET", is_open=True),
        Route("/v2/models/{model}", model, method="GET"),
        Route("/v2/models/{model}/ready", model_ready, method="GET"),
        Route("/v2/models/{model}/infer", infer, KserveInferRequest),
    ),
    text_error,
    prefix="kserve",
)
