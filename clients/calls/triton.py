"""tritonclient: the inference protocol of KServe and Triton over HTTP, with JSON tensors."""

from __future__ import annotations

import numpy as np
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

from clients.call import KEY, VALUES, A, B, Call
from clients.refusals import refusals

V = VALUES


def tensor(values: object, kind: str = "BYTES") -> InferInput:
    """Return an input."""
    data = np.array(values, dtype=np.object_ if kind == "BYTES" else np.float32)
    made = InferInput("text", list(data.shape), kind)
    made.set_data_from_numpy(data, binary_data=False)
    return made


def infer(url: str, key: str = "none", model: str = "minilm", texts: object = V["texts"]) -> object:
    client = InferenceServerClient(url.removeprefix("http://"))
    kind = "BYTES" if all(isinstance(text, str) for text in texts or ()) else "FP32"
    inputs = [] if texts is None else [tensor(texts, kind)]
    outputs = [InferRequestedOutput("output", binary_data=False)]
    return client.infer(model, inputs, outputs=outputs, headers={"Authorization": f"Bearer {key}"})


def rows(answer: object) -> object:
    return answer.as_numpy("output")


a = InferenceServerClient(A.removeprefix("http://"))
CALLS = []
ERRORS = [
    Call("infer", lambda: infer(A), rows, V["vectors"]),
    Call("infer: key", lambda: infer(B, KEY), rows, V["vectors"]),
    Call("is_server_live", a.is_server_live, "", True),
    Call("is_server_ready", a.is_server_ready, "", True),
    Call("is_model_ready", lambda: a.is_model_ready("minilm"), "", True),
    Call("is_model_ready: model", lambda: a.is_model_ready("none"), "", False),
    Call("get_server_metadata", a.get_server_metadata, "name", "cenote"),
    Call("get_model_metadata", lambda: a.get_model_metadata("minilm"), "outputs.0.shape.1", 384),
    *refusals(
        infer,
        "texts",
        "InferenceServerException",
        says={"missing": "at least 1 item", "type": "valid string"},
        long=[V["long"]],
        large=["deep " * 500],
    ),
]
