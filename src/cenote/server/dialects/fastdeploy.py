"""FastDeploy's dialect: `/v1/reward` and `/v1/chat/reward`, and behind its prefix its form of `/v1/embeddings`.

Errors carry honest status codes, not its 200.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from cenote.core import PoolingParams
from cenote.pipeline import operations
from cenote.server.dialects.openai import EmbeddingRequest, embeddings
from cenote.server.routes import Dialect, Route
from cenote.server.serving import request_id
from cenote.server.wire import answers
from cenote.server.wire.encoding import json_response
from cenote.server.wire.fields import Chat, Conversation, Shared, Some
from cenote.server.wire.sizes import echo

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.core import Output
    from cenote.pipeline.job import Job
    from cenote.pipeline.pipeline import Service
    from cenote.server.serving import Serving


class FastDeployEmbeddingRequest(EmbeddingRequest):
    """Body of `POST /v1/embeddings` in FastDeploy's form.

    It has `normalize`, may have token ids as `messages`, and keeps the last tokens of an input that is too long.
    """

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        renamed = {OTHER_NAMES.get(name, name): value for name, value in values.items() if value is not None}
        if "truncate_prompt_tokens" in renamed:
            renamed.setdefault("truncation_side", "left")
        messages = renamed.get("messages")
        if isinstance(messages, list) and messages and all(isinstance(item, int) for item in messages):
            renamed["input"] = renamed.pop("messages")
        return renamed


OTHER_NAMES = {"normalize": "use_activation"}
"""Fields of FastDeploy's, by ours."""


class RewardRequest(Shared, Chat):
    """Body of `POST /v1/chat/reward`: a conversation whose last message is judged, or token ids."""

    removed = ("softmax", "activation")

    messages: Conversation | Some[int] | None = None
    prompt_token_ids: Some[int] | None = None
    return_token_ids: bool | None = None
    dimensions: int | None = Field(None, description="no effect, as in FastDeploy: a reward has no dimensions")
    normalize: bool | None = Field(None, description="no effect, as in FastDeploy: rewards are raw")
    use_activation: bool | None = None

    @model_validator(mode="after")
    def _one_source(self) -> RewardRequest:
        if (self.messages is None) == (self.prompt_token_ids is None):
            raise PydanticCustomError(
                "input", "Exactly one of `messages` and `prompt_token_ids` must be given.", {"param": "messages"}
            )
        return self

    def token_ids(self) -> list[int] | None:
        """Return the ids under `prompt_token_ids` or `messages`; `None` if the request has a conversation."""
        source: Any = self.prompt_token_ids or self.messages
        return source if isinstance(source[0], int) else None


async def reward(serving: Serving, request: Request, body: RewardRequest) -> Response:
    """The reward of a conversation: one number, or one per step from a process reward model."""
    service = serving.find(body.model, any_name=True)
    body.check_media(service)

    def make() -> Job[Response]:
        job = _job(serving, service, body)

        def encode(outputs: list[Output]) -> Response:
            ids = list(job.sequences[0].ids) if body.return_token_ids else None
            entry = {
                "index": 0,
                "object": "reward",
                "score": _scores(service, outputs[0]),
                "prompt_token_ids": ids,
                "prompt_tokens": service.renderer.detokenize(ids) if ids else None,
            }
            user = f"{echo(body.user)}-" if body.user else ""
            return json_response(
                {
                    "id": f"reward-{user}{request_id(request, body.request_id)}",
                    "object": "object",
                    "created": int(time.time()),
                    "model": serving.name(body.model),
                    "data": [entry],
                    "usage": answers.usage(job.sequences),
                }
            )

        return job.then(encode)

    return await serving.answer(request, service, body, make)


def _job(serving: Serving, service: Service, body: RewardRequest) -> Job[list[Output]]:
    # FastDeploy keeps the last tokens of an input that is too long, special tokens or not.
    side = body.truncation_side or ("left" if body.truncate_prompt_tokens is not None else None)
    options = body.text_options(add_special_tokens=bool(body.add_special_tokens))._replace(side=side)
    prompt: Any = body.token_ids()
    if prompt is None:
        body.chat_template = body.chat_template or None
        chat = body.chat_options(trust_template=serving.config.trust_request_chat_template)
        prompt = service.renderer.conversations.prompt(body.messages, chat, body.mm_processor_kwargs)  # type: ignore[arg-type]
        options = options._replace(rendered=True)
    params = PoolingParams(use_activation=body.use_activation)
    return operations.reward(service, [prompt], params, options, of_tokens=False)  # the last token is judged


def _scores(service: Service, output: Output) -> list[float]:
    """Return the reward; of steps, whose classes are bad and good, the value of the last class."""
    rewards = output.data[:, -1] if service.info.step else output.data
    values: list[float] = rewards.ravel().tolist()
    return values


DIALECT = Dialect(
    "FastDeploy",
    (
        Route("/v1/chat/reward", reward, RewardRequest, purpose="reward"),
        Route("/v1/reward", reward, RewardRequest, purpose="reward"),
        Route(
            "/v1/embeddings",
            embeddings,
            FastDeployEmbeddingRequest,
            is_described=False,
            marks=frozenset({"fastdeploy"}),
            purpose="vectors",
        ),
    ),
    prefix="fastdeploy",
)
