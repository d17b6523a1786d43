"""Fields that no route honours: those without effect, and those that are refused, as ignoring them would be wrong.

`python -m cenote.server.unread` prints the tables of the docs.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from cenote.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


class Unread(NamedTuple):
    """A field that clients send, and that changes nothing.

    Attributes:
        field: its name, behind that of the object that holds it.
        value: as its clients send it.
        clients: the services and programs that have it.
        reason: why nothing comes of it.
    """

    field: str
    value: Any
    clients: str
    reason: str


UNREAD = (
    Unread("user", "someone", "OpenAI, Dify", "users are not told apart"),
    Unread("drop_params", True, "LiteLLM, RAGFlow", "an order to LiteLLM itself"),
    Unread(
        "enable_thinking",
        False,
        "Qwen's templates",
        "nothing is generated; a template reads it in `chat_template_kwargs`",
    ),
    Unread("options", {"wait_for_model": True}, "the hub", "models are loaded when the server starts"),
    Unread("options", {"temperature": 0.5}, "Ollama", "nothing is generated; `num_ctx` among them is honoured"),
    Unread("keep_alive", "5m", "Ollama", "models stay loaded"),
    Unread("max_chunks_per_doc", 10, "Cohere, SiliconFlow", "documents are read in one piece, and cut at its end"),
    Unread("overlap_tokens", 80, "SiliconFlow", "documents are read in one piece, so no two pieces overlap"),
    Unread("normalize", True, "FastDeploy (rewards)", "its head of rewards does not read it, either"),
    Unread("dimensions", 2, "FastDeploy (rewards)", "its head of rewards does not read it, either"),
    Unread("dims", 384, "Weaviate", "a checkpoint says how long vectors are"),
    Unread("vector", [], "Weaviate", "its client sends the form of an answer, unfilled"),
    Unread("error", "", "Weaviate", "its client sends the form of an answer, unfilled"),
    Unread("config.pooling_strategy", "masked_mean", "Weaviate", "a checkpoint says how it is pooled"),
)
"""Fields without effect: for the table of the docs, and for tests that nothing comes of them."""


class Refused(NamedTuple):
    """A field that changes the answer of another server, and is honoured by no route here that lacks it.

    Attributes:
        field: its name.
        harmless: values beside null that ask for what happens anyway.
        clients: the servers that have it.
        advice: what to do instead.
    """

    field: str
    harmless: tuple[Any, ...]
    clients: str
    advice: str


REFUSED = {
    row.field: row
    for row in (
        Refused("lora_path", (), "SGLang", "name the adapter as the `model`"),
        Refused("embed_overrides", (), "SGLang", "vectors cannot take the place of tokens"),
        Refused("embed_override_token_id", (), "SGLang", "vectors cannot take the place of tokens"),
        Refused("embd_normalize", (2,), "llama.cpp", "send `use_activation`"),
        Refused("image_data", ([],), "llama.cpp", "send content parts of the type `image_url`"),
        Refused("examples", (), "Cohere's classification", "a classifier answers with labels of its own"),
        Refused("stride", (), "Transformers' pipelines", "a text is read in one piece; divide long ones"),
        Refused("rewrite_query", (False,), "Mixedbread", "queries are rated as they are"),
        Refused("return_embeddings", (False,), "Jina", "vectors are embeddings: ask for them apart"),
    )
}


def refuse(body: Mapping[str, Any], fields: Collection[str]) -> None:
    """Refuse a field that would change the answer, and that a route does not read.

    Args:
        body: of a request.
        fields: that its route reads.

    Raises:
        BadRequest: it has one.
    """
    for name in sorted(REFUSED.keys() & body.keys()):
        row = REFUSED[name]
        if name not in fields and body[name] not in (None, *row.harmless):
            message = f"got `{name}`, a field of {row.clients} that is not served here; leave it out: {row.advice}"
            raise BadRequest(message, param=name)


BEGIN, END = "<!-- fields without effect -->", "<!-- end of fields -->"
"""Comments around the tables in docs/dialects.md."""


def section() -> str:
    """Return the tables, as Markdown, between their comments."""
    unread = [f"| `{row.field}` | {row.clients} | {row.reason} |" for row in UNREAD]
    refused = [f"| `{row.field}` | {row.clients} | {row.advice} |" for row in REFUSED.values()]
    columns = "|---|---|---|"
    return "\n".join([
        BEGIN, "", "| without effect | sent by | |", columns, *unread,
        "", "| refused | field of | instead |", columns, *refused, "", END,
    ])  # fmt: skip


if __name__ == "__main__":
    sys.stdout.write(f"{section()}\n")
