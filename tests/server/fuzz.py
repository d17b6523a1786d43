"""Generated requests: valid ones by route, hostile ones made of them, and bodies by the API's own description.

What may come back is the server's promise: see `tests.server.test_fuzz`. Drawing is uniform, from a seeded generator:
hypothesis, which shrinks what it finds, tries much fewer different requests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, get_args

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from cenote.server.wire.encoding import EmbedDType, EncodingFormat, Endianness, VectorType

Draw = Callable[[Random], Any]
"""Makes a value."""
Change = Callable[[Any, Random], Any]
"""Makes another value of one."""

JSON_TYPE = {"content-type": "application/json"}
LIMIT = 62
"""Tokens of a text, special tokens aside, that the models read."""
VOCABULARY = range(5, 230)
"""Token ids."""
POISON = "water quick stone"
"""Words that no model survives in this order: the one reason for an answer of 5xx."""
WORDS = ("the", "hello", "water", "lazy", "dog", "for", "retrieval", "seven", "natural", "Zürich", "水", "🐟", "x\0y")
MODELS = {
    "vectors": ("embed", "token_embed"),
    "classes": ("classify", "embed", "token_embed"),
    "pairs": ("classify", "embed", "token_embed"),
    "tokens": ("token_classify", "embed", "token_embed"),
}
"""The models by name, the first being the default, with their tasks."""
NUMBERS = {
    "@more digits than Python reads@": "7" * 5000,
    "@not a number@": "NaN",
    "@infinite@": "-Infinity",
    "@too large@": "1e999",
}
NESTED = {
    "@lists in lists@": "[" * 900 + "]" * 900,
    "@objects in objects@": '{"a":' * 900 + "1" + "}" * 900,
}
"""Strings of a body that are written as these numbers and values."""


@dataclass(frozen=True)
class Request:
    """A request.

    Attributes:
        kind: how it was made.
        is_valid: it must be answered 200.
        leaves: the client is gone once the request is sent.
        is_of_a_vendor: its answer has a form of that vendor's.
    """

    kind: str
    path: str
    content: bytes
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=lambda: JSON_TYPE)
    is_valid: bool = False
    leaves: bool = False
    is_of_a_vendor: bool = False

    def __repr__(self) -> str:
        shown = self.content if len(self.content) < 400 else self.content[:300] + b"..." + self.content[-60:]
        return f"<{self.kind}: {self.method} {self.path} {dict(self.headers)}, {len(self.content)} bytes: {shown!r}>"

    @property
    def may_fail(self) -> bool:
        """Whether a model fails on it."""
        return POISON in self.content.replace(b"\0", b"").decode(errors="replace")


def encoded(body: Any) -> bytes:
    """Return `body` as JSON, and put what stands in it as a string in its place."""
    text = json.dumps(body)
    for name, value in {**NUMBERS, **NESTED}.items():
        text = text.replace(f'"{name}"', value)
    return text.encode()


# How values are drawn


def one_of(*values: Any) -> Draw:
    """Draw one of `values`."""
    return lambda random: random.choice(values)


def either(*draws: Draw) -> Draw:
    """Draw by one of `draws`."""
    return lambda random: random.choice(draws)(random)


def whole(low: int, high: int) -> Draw:
    """Draw an integer."""
    return lambda random: random.randint(low, high)


def some(draw: Draw, low: int = 1, high: int = 6) -> Draw:
    """Draw a list."""
    return lambda random: [draw(random) for _ in range(random.randint(low, high))]


def fields(required: Mapping[str, Any], *optional: Mapping[str, Draw]) -> Draw:
    """Draw an object.

    Args:
        required: fields, each a `Draw` or a value.
        optional: further fields, which every third object has.
    """
    more = {name: draw for fields in optional for name, draw in fields.items()}

    def drawn(random: Random) -> dict[str, Any]:
        body = {name: value(random) if callable(value) else value for name, value in required.items()}
        return body | {name: draw(random) for name, draw in more.items() if not random.randrange(3)}

    return drawn


def joined(*draws: Draw) -> Draw:
    """Draw an object of all fields of several."""

    def drawn(random: Random) -> dict[str, Any]:
        return {name: value for draw in draws for name, value in draw(random).items()}

    return drawn


# Valid bodies


def words(random: Random) -> str:
    """Draw a few words."""
    return " ".join(random.choices(WORDS, k=random.randrange(8)))


def characters(random: Random) -> str:
    """Draw a few characters that UTF-8 has."""
    tops = random.choices((0x80, 0x800, 0xD800, 0x110000), k=random.randrange(LIMIT // 4))
    codes = (random.randrange(top) for top in tops)
    return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def text(random: Random) -> str:
    """Draw a text that fits a model."""
    draws = (words, characters, lambda _: POISON, lambda _: "")
    return str(random.choices(draws, (20, 10, 1, 1))[0](random))


def long_text(random: Random) -> str:
    """Draw a text of any length."""
    return text(random) * random.choice((1, 1, 2, 10, 300))


flag = one_of(True, False)
perhaps = one_of(True, False, None)
name = either(characters, words)
ids = some(one_of(*VOCABULARY), 1, LIMIT)
of_ids = either(ids, some(ids))
of_texts = either(long_text, some(long_text))
part = fields({"type": "text", "text": text})
parts = fields({"content": some(part, 1, 2)})
message = fields({"role": one_of("system", "user", "assistant"), "content": either(text, some(part, 1, 2))})
messages = some(message, 1, 3)
CHAT = {
    "add_generation_prompt": flag,
    "chat_template_kwargs": fields({}, {"tone": text, "thinks": flag, "größe": text}),
}
QUEUED = {
    "priority": whole(-(2**63), 2**63 - 1),
    "cache_salt": one_of("a", "0" * 128, "é"),
    "unknown": one_of(None, "", 5, {"a": []}),
}
NAMED = {**QUEUED, "user": name, "request_id": name, "use_activation": perhaps}
SHARED = {
    **NAMED,
    "truncation_side": one_of("left", "right", None),
    "padding": one_of("max_length", "do_not_pad", None),
}
CUT = {"truncate_prompt_tokens": one_of(-1, 8, LIMIT)}
"""With it, texts of any length are valid."""
BINARY = {
    "encoding_format": one_of(*get_args(EncodingFormat)),
    "embed_dtype": one_of(*get_args(EmbedDType)),
    "endianness": one_of(*get_args(Endianness)),
}
vector_type = one_of(*get_args(VectorType))
FORMS = {"embedding_type": either(vector_type, some(vector_type, 0, 3)), "use_activation": one_of(None)}


def inputs(*others: Draw, **required: Any) -> Draw:
    """Draw a body with `input` or `messages`."""
    return either(
        fields({"input": of_texts, **CUT, **required}, SHARED),
        fields({"input": either(of_ids, *others), **required}, SHARED),
        fields({"messages": messages, **CUT, **required}, SHARED, CHAT),
        fields({"input": some(messages, 1, 2), **CUT, **required}, SHARED, CHAT),
    )


late = fields({"task": "token_embed", "input": one_of("the dog", ["seven", "lazy"])})
chunked = fields({"late_chunking_params": fields({"chunk_size": one_of(1, 2, 63, 2**63 - 1)})})
of_tasks = [joined(inputs(model=model, task=task), fields({}, BINARY)) for model in MODELS for task in MODELS[model]]
pair = fields({"text": words, "text_pair": words})
sides = either(
    fields({"queries": text, "documents": either(text, some(text))}),
    fields({"text_1": text, "text_2": some(either(text, fields({"text": text})))}),
    fields({"data_1": text, "data_2": parts}),
)
of_pairs = fields(
    {"model": "pairs", **CUT},
    {**SHARED, "max_tokens_per_doc": whole(0, 20), "score_type": one_of("cross-encoder", "bi-encoder")},
)
COHERE = {
    **QUEUED,
    "embedding_types": some(vector_type, 1, 3),
    "max_tokens": one_of(2, 8, 2**40),
    "truncate": one_of("START", "END"),
}
REWARD = {**QUEUED, "user": name, "request_id": name, "return_token_ids": flag}
VALID: dict[str, Draw] = {
    "/v1/embeddings": joined(inputs(), either(fields({}, BINARY), fields(FORMS))),
    "/pooling": either(*of_tasks, joined(late, chunked)),
    "/classify": inputs(pair, some(pair), model="classes"),
    "/score": joined(sides, of_pairs),
    "/rerank": joined(fields({"query": text, "documents": some(text)}, {"top_n": one_of(0, 1, 2**40)}), of_pairs),
    "/v1/token_classify": fields(
        {"model": "tokens", "input": of_texts, **CUT},
        NAMED,
        {
            "aggregation_strategy": one_of("none", "simple", "first", "average", "max"),
            "ignore_labels": some(name, 0, 2),
        },
    ),
    "/tokenize": either(
        fields({"prompt": long_text}, {"return_token_strs": flag, "add_special_tokens": flag}),
        fields({"messages": messages}, CHAT, {"return_token_strs": flag}),
    ),
    "/detokenize": fields({"tokens": either(ids, one_of([]))}),
    "/v2/embed": either(fields({"texts": some(long_text)}, COHERE), fields({"inputs": some(parts)}, COHERE)),
    "/v1/embed": fields({"texts": some(long_text)}, COHERE),
    "/v1/reward": either(
        fields({"model": "pairs", "messages": messages, **CUT}, REWARD, CHAT),
        fields({"model": "pairs", "prompt_token_ids": ids}, REWARD),
    ),
}
"""Valid bodies by route."""
ALIASES = {
    "/v1/embeddings": ("/embeddings", "/v1/embeddings/"),
    "/classify": ("/v1/classify",),
    "/score": ("/v1/score",),
    "/rerank": ("/v1/rerank", "/v2/rerank"),
    "/tokenize": ("/v1/tokenize",),
    "/detokenize": ("/v1/detokenize",),
    "/v1/token_classify": ("/token_classify",),
    "/v1/reward": ("/v1/chat/reward",),
}
OPEN = (
    "/health",
    "/ping",
    "/livez",
    "/readyz",
    "/version",
    "/load",
    "/metrics",
    "/v1/models",
    "/openapi.json",
    "/docs",
)
"""Routes without a body."""


def path_of(route: str, random: Random) -> str:
    """Draw a path of a route."""
    return random.choice((route, *ALIASES.get(route, ())))


def valid(random: Random) -> Request:
    """Draw a request that must be answered 200, or whose client leaves before it is."""
    route = random.choice([*VALID])
    leaves = not random.randrange(30)
    content = encoded(VALID[route](random))
    return Request("valid", path_of(route, random), content, is_valid=not leaves, leaves=leaves)


def question(random: Random) -> Request:
    """Draw a request without a body."""
    return Request("without a body", random.choice(OPEN), b"", random.choice(("GET", "HEAD")), {}, is_valid=True)


# Hostile requests

surrogate = one_of("\ud800", "\udfff", "a\udc80", "\ud83d x", "\udc1f\ud83d")
"""Texts that UTF-8 has not: halves of surrogate pairs."""


def nested(random: Random) -> Any:
    """Draw a value in many others, one in the other."""
    value: Any = 1
    is_list = random.random() < 0.5
    for _ in range(random.randint(50, 400)):
        value = [value] if is_list else {"a": value}
    return value


deep = either(nested, one_of(*NESTED))
atom = either(
    text,
    surrogate,
    whole(-3, 70),
    one_of(*NUMBERS),
    one_of(None, True, False, 0.5, -1e300, "", "\0", "Infinity", "5", "embed", "classify", [], {}),
    one_of(2**31, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**30),
)


def anything(random: Random, depth: int = 2) -> Any:
    """Draw any JSON, with lone surrogates and numbers that Python does not read."""
    if depth and not random.randrange(3):
        inner = [anything(random, depth - 1) for _ in range(random.randrange(4))]
        keys = random.choices(("text", "role", "content", "type", "\udabc", "größe"), k=len(inner))
        return inner if random.random() < 0.5 else dict(zip(keys, inner, strict=True))
    return atom(random)


def with_key(value: Any, random: Random) -> Any:
    """Return an object with one more key, of anything else an object with this key alone."""
    more = {surrogate(random): 1}
    return {**value, **more} if isinstance(value, dict) else more


CHANGES: tuple[Change, ...] = (
    lambda value, random: anything(random),
    lambda value, random: atom(random),
    lambda value, random: random.choice([*NUMBERS]),
    lambda value, random: value + surrogate(random) if isinstance(value, str) else surrogate(random),
    with_key,
    lambda value, random: deep(random),
    lambda value, random: [value, value],
    lambda value, random: None,
)


def changed(value: Any, random: Random) -> Any:
    """Return a copy of a JSON value with a change at some place, each level as likely as the next."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = [*value]
    elif isinstance(value, list):
        keys = [*range(len(value))]
    if not keys or not random.randrange(4):
        return random.choice(CHANGES)(value, random)
    copy = value.copy()
    key = random.choice(keys)
    copy[key] = changed(copy[key], random)
    return copy


def mutated(random: Random) -> Request:
    """Draw a valid request, and change it at one to three places."""
    route = random.choice([*VALID])
    value = VALID[route](random)
    for _ in range(random.randint(1, 3)):
        value = changed(value, random)
    return Request("mutated", path_of(route, random), encoded(value))


NAMES = {"minilm": "vectors", "reranker": "pairs", "classifier": "classes"}
"""Models of the documented requests, and those that are served here."""


def _pairs(dialects: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the documented requests of all vendors, each a path and a body."""
    texts = [path.read_text() for path in sorted(dialects.glob("*.json"))]
    pairs = [pair for text in texts for pair in json.loads(text)["pairs"] if isinstance(pair.get("body"), dict)]
    paths = ["/".join(NAMES.get(part, part) for part in pair["path"].partition("?")[0].split("/")) for pair in pairs]
    return [(path.replace("minilm:", "vectors:"), pair["body"]) for path, pair in zip(paths, pairs, strict=True)]


DOCUMENTED = _pairs(Path(__file__).parent.parent / "data" / "dialects")


def documented(random: Random) -> Request:
    """Draw a request as a vendor's documents have it, for a model that is served, and change it at some places."""
    path, body = random.choice(DOCUMENTED)
    value: Any = {**body, "model": NAMES.get(body["model"], "vectors")} if "model" in body else body
    for _ in range(random.randint(0, 3)):
        value = changed(value, random)
    return Request("documented", path, encoded(value), is_of_a_vendor=True)


LEAST: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"messages": messages},
    "/pooling": {"messages": messages},
    "/classify": {"messages": messages},
    "/tokenize": {"messages": messages},
    "/v1/reward": {"model": "pairs", "messages": messages},
    "/rerank": {"model": "pairs", "query": "a", "documents": ["b"]},
    "/score": {"model": "pairs", "queries": "a", "documents": ["b"]},
    "/v1/token_classify": {"model": "tokens", "input": "a"},
    "/v2/embed": {"texts": ["a"]},
}
"""Bodies without further fields by route."""
content = either(
    surrogate,
    fields({"a": some(surrogate)}),
    lambda random: with_key({}, random),
    deep,
    one_of(*NUMBERS),
    lambda random: "x" * random.choice((200, 20_000)),
    anything,
)
"""Contents that are hard to print, to copy or to give back."""
string = either(surrogate, content)
mapping = either(lambda random: with_key({}, random), fields({"a": either(deep, content)}), content)
FREE: dict[str, Draw] = {
    "user": string,
    "request_id": string,
    "model": string,
    "cache_salt": string,
    "chat_template_kwargs": mapping,
    "unknown": content,
}
"""Fields with a client's own content, which often has the type that the field takes."""


def free(random: Random) -> Request:
    """Draw a request that is valid but for the content of a free field."""
    route, field = random.choice([*LEAST]), random.choice([*FREE])
    body = fields({**LEAST[route], field: FREE[field]})
    return Request("free fields", path_of(route, random), encoded(body(random)))


LISTS = {
    "/v1/embeddings": "input", "/pooling": "input", "/classify": "input", "/score": "text_2", "/rerank": "documents",
    "/tokenize": "messages", "/detokenize": "tokens", "/v2/embed": "texts", "/v1/token_classify": "input",
    "/v1/reward": "messages",
}  # fmt: skip
"""A field of each route that takes a list."""
BESIDE = {"/rerank": {"query": "a"}, "/score": {"text_1": "a"}}
"""Other fields that these routes need."""
elements = one_of(None, 1.5, True, {}, [], [1], "", -1, {"a": None}, [None], [[]], "\ud800")
beginnings = one_of([], ["a"], [[5]], [5], [{"role": "user", "content": "a"}])


def lists(random: Random) -> Request:
    """Draw a long list of what does not belong there, or of too much: to be counted before it is looked at."""
    route = random.choice([*LISTS])
    count = random.choice((300, 2047, 2049, 30_000))
    values = [*beginnings(random), *[elements(random)] * count]
    return Request("lists", path_of(route, random), encoded({LISTS[route]: values, **BESIDE.get(route, {})}))


RAW: dict[str, Callable[[bytes, int], bytes]] = {
    "empty": lambda content, at: b"",
    "cut short": lambda content, at: content[: at % len(content)],
    "twice": lambda content, at: content + content,
    "in UTF-16": lambda content, at: content.decode().encode("utf-16"),
    "behind a mark": lambda content, at: b"\xef\xbb\xbf" + content,
    "among spaces": lambda content, at: b" " * 2000 + content + b"\n" * 2000,
    "broken": lambda content, at: content[: at % len(content)] + b"\xff\xfe\x00" + content[at % len(content) :],
    "nested": lambda content, at: b"[" * (100 * at),
    "nested objects": lambda content, at: b'{"input":' * (10 * at) + b"1" + b"}" * (10 * at),
    "a number": lambda content, at: b"9" * (10 * at + 1),
    "two keys": lambda content, at: b'{"input": null, ' + content[1:],
}
"""Changes of the bytes of a body."""


def raw(random: Random) -> Request:
    """Draw a request whose body is no JSON, or another encoding of it."""
    request, kind = valid(random), random.choice([*RAW])
    content = RAW[kind](request.content, random.randrange(3000))
    return replace(request, kind=f"body {kind}", content=content, is_valid=False)


HEADERS = {
    "content-type": one_of("application/json; charset=utf-16", "text/html", "multipart/form-data", "", "é"),
    "x-request-id": one_of("a", "ÿ\xa0", "x" * 5000, "\ttab"),
    "authorization": one_of("Bearer", "Bearer ü", "Basic eDp5", ""),
    "content-length": one_of("-1", "9" * 30, "0", "²"),
    "host": one_of("elsewhere.example", ""),
}


def enveloped(random: Random) -> Request:
    """Draw a valid body under another method, path, or headers."""
    request = valid(random)
    paths = ("//", "/v1", "/v1/../health", "/v1/embeddings\0", "/ä" * 9, request.path + "//", request.path, "/health")
    return replace(
        request,
        kind="another envelope",
        method=random.choice((request.method, "PUT", "DELETE", "OPTIONS", "GET", "HEAD", "PATCH")),
        path=random.choice(paths),
        headers={name: draw(random) for name, draw in HEADERS.items() if not random.randrange(3)},
        is_valid=False,
    )


SHARES = {valid: 9, question: 1, mutated: 4, documented: 2, free: 2, lists: 1, raw: 1, enveloped: 1}
"""How often each kind is drawn."""


def bursts(seed: int, size: int) -> Iterator[list[Request]]:
    """Make requests without end, almost half of them valid, so many at a time.

    Args:
        seed: of all that is drawn.
        size: requests of each list, which are sent at the same time.
    """
    random = Random(seed)
    while True:
        yield [kind(random) for kind in random.choices([*SHARES], [*SHARES.values()], k=size)]


# Bodies by the description of the API


def described(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> SearchStrategy[Any]:
    """Return values that a JSON schema allows, of the keywords that pydantic writes."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return st.deferred(lambda: described(schemas[name], schemas))
    if "anyOf" in schema:
        return st.one_of([described(choice, schemas) for choice in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    return BY_TYPE[schema.get("type", "any")](schema, schemas)


def _array(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> SearchStrategy[Any]:
    return st.lists(described(schema.get("items", {}), schemas), min_size=schema.get("minItems", 0), max_size=4)


def _object(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> SearchStrategy[Any]:
    properties = {name: described(value, schemas) for name, value in schema.get("properties", {}).items()}
    if not properties:
        return st.dictionaries(st.sampled_from(["text", "role", "content", "type"]) | st.text(), _any, max_size=3)
    required = {name: properties.pop(name) for name in schema.get("required", ())}
    chosen = st.lists(st.sampled_from([*properties, "unknown"]), max_size=4, unique=True)
    return chosen.flatmap(
        lambda names: st.fixed_dictionaries({**required, **{name: properties.get(name, _any) for name in names}})
    )


def _integer(schema: Mapping[str, Any], _: Mapping[str, Any]) -> SearchStrategy[Any]:
    high = schema.get("exclusiveMaximum", 2**70) - 1
    return st.integers(schema.get("minimum", -(2**70)), high)


_strings = st.text(st.characters(), max_size=20) | st.sampled_from([*WORDS, *MODELS, "embed", "token_embed", "\ud800"])
_any: SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_strings, inner, max_size=3),
    max_leaves=6,
)
BY_TYPE: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], SearchStrategy[Any]]] = {
    "array": _array,
    "object": _object,
    "integer": _integer,
    "number": lambda *_: st.floats(allow_nan=False, allow_infinity=False),
    "string": lambda *_: _strings,
    "boolean": lambda *_: st.booleans(),
    "null": lambda *_: st.none(),
    "any": lambda *_: _any,
}
"""Values by the `type` of a schema."""


def by_description(api: Mapping[str, Any]) -> SearchStrategy[Request]:
    """Return requests whose bodies an OpenAPI description allows; routes have rules beside it."""
    schemas = api["components"]["schemas"]
    requests = []
    for path, operations in api["paths"].items():
        if "requestBody" in operations.get("post", {}):
            schema = operations["post"]["requestBody"]["content"]["application/json"]["schema"]
            bodies = described(schema, schemas).map(encoded)
            requests.append(st.builds(Request, st.just("by description"), st.just(path), bodies))
    return st.sampled_from(requests).flatmap(lambda request: request)
