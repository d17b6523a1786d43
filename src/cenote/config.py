"""Every option, once: its name, type, default and help. Flags, environment variables and docs derive from here.

Frozen models, one for each layer and each command with options of its own. `ModelConfig` and `EngineConfig` are also
the keyword arguments of `LLM`. Names are those that users of vLLM know. `cenote.settings` makes them out of values by
name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cenote import cl100k
from cenote.adapters import LoraModule
from cenote.errors import unknown_name
from cenote.functions import coalesce
from cenote.option_values import (
    Names,
    Overrides,
    Several,
    parse_count,
    parse_counts,
    parse_json,
    parse_lora_modules,
)
from cenote.tasks import REMOVED, TASKS

Isa = Literal["auto", "none", "avx2", "avx512", "amx"]
"""Instructions of the CPU kernels: `auto` = the widest that the processor has, `none` = plain torch."""
Quantization = Literal["none", "int8"]
"""Kinds of `cenote.tensors.linear.FORMS` that Linears may be quantised to."""
MediaKind = Literal["image", "video", "audio"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
SequencePooling = Literal["CLS", "LAST", "MEAN"]
TokenPooling = Literal["ALL", "STEP"]
SEQUENCE_POOLING: tuple[str, ...] = get_args(SequencePooling)
TOKEN_POOLING: tuple[str, ...] = get_args(TokenPooling)
RENAMED_PARAMS = {
    "normalize": "use_activation",
    "softmax": "use_activation",
    "activation": "use_activation",
    "logit_bias": "logit_mean",
}
"""Parameters of older releases of vLLM, and their names today."""


LAST_RESORT = 10.0
"""Seconds after the refusal of the last requests in which a process that ends has to be gone."""


def time_of_requests(shutdown_timeout: float) -> float:
    """Return how many seconds of `shutdown_timeout` requests under way have: all but `LAST_RESORT`, half at least.

    So a supervisor that kills a process after `shutdown_timeout` seconds, such as Kubernetes, finds it gone.
    """
    return max(shutdown_timeout - LAST_RESORT, shutdown_timeout / 2)


WEB = ("http://", "https://")
"""Beginnings of addresses."""
TRACING = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")
"""Packages of the extra that traces need."""


class PoolerConfig(BaseModel):
    """How hidden states become outputs. Unset fields fall to the checkpoint, then to the architecture's default.

    Field names and meanings are those of vLLM's `PoolerConfig`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str | None = None
    """Default task of `LLM.encode` and `/pooling`."""
    pooling_type: Literal["CLS", "LAST", "MEAN", "ALL", "STEP"] | None = None
    """Short for `seq_pooling_type` (CLS, LAST, MEAN) or `tok_pooling_type` (ALL); not to be combined with them."""
    seq_pooling_type: SequencePooling | None = None
    tok_pooling_type: TokenPooling | None = None
    use_activation: bool | None = None
    """Server-wide default of `PoolingParams.use_activation`, also of rewards."""
    dimensions: int | None = Field(default=None, ge=1)
    """Default of `PoolingParams.dimensions`."""
    enable_chunked_processing: bool = False
    """Run inputs of `embed` that are longer than `max_model_len` in blocks, whose vectors are averaged."""
    max_embed_len: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Maximum tokens of an input of `embed`."""
    logit_mean: float | None = None
    """A classifier's logits become `activation((logits - logit_mean) / logit_sigma)`."""
    logit_sigma: float | None = None
    """See `logit_mean`; not 0."""
    step_tag_id: Annotated[int, Field(strict=True, ge=0)] | None = None
    """Default of `PoolingParams.step_tag_id`, for STEP pooling."""
    returned_token_ids: tuple[Annotated[int, Field(strict=True, ge=0)], ...] | None = Field(default=None, min_length=1)
    """Default of `PoolingParams.returned_token_ids`, for STEP pooling."""

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        removed = RENAMED_PARAMS.keys() & values.keys()
        if removed:
            old = min(removed)
            raise ValueError(f"Parameter `{old}` was removed; use `{RENAMED_PARAMS[old]}` instead.")
        unknown = values.keys() - cls.model_fields.keys()
        if unknown:
            raise ValueError(unknown_name("pooler config field", min(unknown), cls.model_fields))
        return values

    @field_validator("pooling_type", "seq_pooling_type", "tok_pooling_type", mode="before")
    @classmethod
    def _upper_case(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> PoolerConfig:
        if self.pooling_type and (self.seq_pooling_type or self.tok_pooling_type):
            raise ValueError("`pooling_type` cannot be combined with `seq_pooling_type` or `tok_pooling_type`")
        if self.logit_sigma == 0:
            raise ValueError("`logit_sigma` must not be 0, logits are divided by it")
        _check_task(self.task, TASKS)
        return self

    @property
    def sequence_pooling(self) -> str | None:
        """CLS, LAST, MEAN, or `None` if unset."""
        return self.seq_pooling_type or _among(SEQUENCE_POOLING, self.pooling_type)

    @property
    def token_pooling(self) -> str | None:
        """ALL, STEP, or `None` if unset."""
        return self.tok_pooling_type or _among(TOKEN_POOLING, self.pooling_type)


def _among(types: tuple[str, ...], pooling_type: str | None) -> str | None:
    return pooling_type if pooling_type in types else None


def _check_task(task: str | None, known: Collection[str]) -> None:
    """Refuse a task that is not among `known`."""
    if task is None or task in known:
        return
    if task in REMOVED:
        raise ValueError(REMOVED[task])
    raise ValueError(unknown_name("task", task, known))


class ModelConfig(BaseModel):
    """The checkpoint, and how it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    model: str | None = Field(None, description="folder or hub id; none = the embedded all-MiniLM-L6-v2")
    served_model_name: Several = Field((), description="names that requests may use (default: the model)")
    tokenizer: str | None = Field(None, description="folder or hub id of the tokenizer, if not the model's")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    tokenizer_revision: str | None = Field(
        None,
        description="the same of the tokenizer (default: the model's, or main if the tokenizer has its own repository)",
    )
    download_dir: str | None = Field(None, description="folder of the hub's cache (default: that of HF_HOME)")
    hf_token: str | None = Field(
        None,
        repr=False,
        description="token of the hub (default: the variable HF_TOKEN, which other users cannot see)",
    )
    runner: Literal["auto", "pooling", "generate"] = Field("auto", description="pooling is the only runner there is")
    convert: Literal["auto", "none", "embed", "classify", "sparse"] = Field(
        "auto", description="conversion of a model that does not pool by itself"
    )
    task: str | None = Field(
        None, description="older spelling (embed, classify, score, reward) of convert and pooler_config.task"
    )
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] = Field(
        "auto",
        description="dtype of weights and activations; on a CPU of weights only, and of products where it has AMX "
        "(auto = float32 there)",
    )
    quantization: Quantization = Field(
        "none", description="int8: products of Linear layers in 8 bits, on a CPU with AVX2, VNNI or AMX"
    )
    device: str | None = Field(None, description="torch device (default: cuda if there is one, else cpu)")
    max_model_len: int | None = Field(None, ge=1, description="maximum tokens of an input (default: the model's limit)")
    hf_overrides: Overrides | Callable[[Any], Any] | None = Field(
        None, description="JSON merged into config.json (from Python also a function config -> config)"
    )
    pooler_config: Annotated[PoolerConfig, BeforeValidator(parse_json)] = Field(
        default_factory=PoolerConfig, description="JSON; or one field: --pooler-config.pooling_type MEAN"
    )
    trust_remote_code: bool = Field(False, description="run Python code that the checkpoint brings")
    safetensors_only: bool = Field(
        False,
        description="refuse pickled weights, which torch's restricted unpickler reads where safetensors are missing",
    )
    allow_pickle: bool = Field(
        False, description="without effect: pickles are read anyway, by an unpickler that runs no code"
    )
    allow_unread: Several = Field(
        (),
        description="key, tensor or file of the checkpoint, or a pattern, that may go unread where Cenote would refuse "
        "it; may be given several times",
    )
    enable_lora: bool = Field(
        False, description="let a LoRARequest of Python bring a LoRA adapter; layers are not fused then"
    )
    lora_modules: Annotated[tuple[LoraModule, ...], BeforeValidator(parse_lora_modules)] = Field(
        (),
        description="LoRA adapters that requests choose by the name of their model: name=folder, name=hub id, or JSON "
        "of name, path and base_model_name; may be given several times",
    )
    chat_template: str | None = Field(None, description="Jinja template, or the path of one, for `messages`")
    reranker_prompts: bool = Field(
        True, description="put the prompt of a known LLM reranker around its pairs; off = pairs are joined as they are"
    )
    prompts: Annotated[dict[str, str], BeforeValidator(parse_json)] | None = Field(
        None, description="JSON of prompts by name, beside the checkpoint's own"
    )
    default_prompt_name: str | None = Field(None, description="prompt of inputs that ask for none")
    plain_late_interaction: bool = Field(
        False, description="encode queries and documents alike: no markers, expansion, lengths or skip-list, as vLLM"
    )
    limit_mm_per_prompt: Annotated[dict[MediaKind, NonNegativeInt], BeforeValidator(parse_counts)] = Field(
        default_factory=dict,
        description='JSON: maximum pictures of a prompt, {"image": 4} or {"image": {"count": 4}} (default: 16)',
    )
    mm_processor_kwargs: Annotated[dict[str, Any], BeforeValidator(parse_json)] = Field(
        default_factory=dict,
        description="JSON of arguments of the image processor: max_pixels, min_pixels, size, image_size; requests may "
        "make pictures smaller than these and the model's own",
    )
    picture_cache_size: int = Field(
        256,
        ge=0,
        description="MiB of features kept, so that a picture that comes again does not go through the vision tower; "
        "0 = off",
    )
    io_processor_plugin: str | None = Field(None, description="installed plugin that takes requests with `data`")
    calibration: str | None = Field(
        None, description="ranges (.json, .npy) of int8 and uint8 embeddings, or texts (.txt, .jsonl) to take them from"
    )
    auto_truncate: bool = Field(False, description="cut inputs that are too long instead of refusing them")
    native_kernels: bool = Field(True, description="compile and use the CPU kernels, where there is a C++ compiler")
    isa: Isa = Field(
        "auto",
        description="widest instructions that the CPU kernels may use: avx2, avx512, amx, or none for plain torch "
        "(auto = the widest that the processor has; the variable holds in Python, too)",
    )
    plain: bool = Field(
        False,
        description="leave out all that only makes a model faster: native kernels, fused layers, shared prefixes, ...",
    )
    cuda_graphs: bool = Field(
        False, description="replay batches on a GPU as CUDA graphs, where the probe proves it exact"
    )
    enforce_eager: bool = Field(False, description="launch every kernel from the host, also with cuda_graphs")
    max_cudagraph_capture_size: int | None = Field(
        None,
        ge=0,
        description="tokens up to which cuda_graphs replays a batch (default: where launching it takes longer)",
    )
    packing: bool = Field(True, description="run packed batches where the probe proves it exact")
    prefix_sharing: bool = Field(
        True, description="run common beginnings of a batch's sequences once, where the probe proves it exact"
    )

    batch_invariant: bool = Field(
        False,
        description="give every input the same bits whatever shares its batch and however many threads there are, at "
        "some cost",
    )

    @field_validator("max_model_len", mode="before")
    @classmethod
    def _by_model(cls, value: Any) -> Any:
        return None if str(value) in ("auto", "-1") else parse_count(value)

    @field_validator("quantization", mode="before")
    @classmethod
    def _none_as_in_vllm(cls, value: Any) -> Any:
        return coalesce(value, "none")

    @field_validator("task")
    @classmethod
    def _older_task(cls, value: str | None) -> str | None:
        _check_task(value, {*OLDER_TASKS, *TASKS})
        return value

    @model_validator(mode="after")
    def _apply_older_task(self) -> ModelConfig:
        if self.task is None:
            return self
        convert, task = OLDER_TASKS.get(self.task, ("auto", self.task))
        if convert == "auto":
            convert = self.convert
        elif self.convert not in ("auto", convert):
            raise ValueError(f"task {self.task!r} means convert {convert!r}, but convert is {self.convert!r}")
        pooler_config = self.pooler_config
        if pooler_config.task is None:
            pooler_config = pooler_config.model_copy(update={"task": task})
        object.__setattr__(self, "convert", convert)
        object.__setattr__(self, "pooler_config", pooler_config)
        return self

    @model_validator(mode="after")
    def _kernels_for_isa(self) -> ModelConfig:
        if not self.native_kernels and self.isa not in ("auto", "none"):
            raise ValueError(
                f"isa {self.isa!r} is for the CPU kernels, and native_kernels switches them off; drop either"
            )
        return self

    @property
    def reads_pickles(self) -> bool:
        """Whether tensors may come out of pickles, where there is no safetensors file."""
        return not self.safetensors_only

    @field_validator("lora_modules")
    @classmethod
    def _one_of_each_name(cls, modules: tuple[LoraModule, ...]) -> tuple[LoraModule, ...]:
        repeated = Counter(module.name for module in modules) - Counter({module.name for module in modules})
        if repeated:
            raise ValueError(f"two adapters have the name {min(repeated)!r}")
        return modules

    @field_validator("runner")
    @classmethod
    def _no_generation(cls, value: str) -> str:
        if value == "generate":
            raise ValueError("Cenote runs pooling models only and does not generate text; use runner 'pooling'")
        return value


class EngineConfig(BaseModel):
    """How work is batched."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_num_batched_tokens: Annotated[int | None, BeforeValidator(parse_count)] = Field(
        None, ge=1, description="tokens of a batch (default: 768 on a CPU, 16384 on a GPU)"
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of all forwards together (default: torch's: OMP_NUM_THREADS, else one a core)",
    )
    streams: int | None = Field(
        None,
        ge=1,
        description="batches that run at a time on a CPU, each on its part of the threads (default: 2; 1 for models "
        "that keep state between calls)",
    )
    max_num_seqs: int = Field(256, ge=1, description="sequences of a batch")
    max_queued_seqs: int = Field(16384, ge=1, description="sequences that may wait; beyond them requests get 429")
    scheduling_policy: Literal["priority", "fcfs"] = Field(
        "priority", description="priority: requests of a lower `priority` run first; fcfs: it has no effect"
    )
    forward_timeout: float = Field(
        600,
        ge=0,
        allow_inf_nan=False,
        description="seconds after which a batch that has not come back means that the device hangs: requests get 503, "
        "and the process ends with an error; 0 = never, the default of LLM",
    )
    cache_size: int = Field(0, ge=0, description="MiB of results kept, keyed by token ids; 0 = off")


class ServerConfig(BaseModel):
    """How it is served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 = any free one")
    api_key: Several = Field((), description="key that requests must bring; may be given several times")
    max_body_bytes: int = Field(64 << 20, ge=1, description="largest request body")
    max_pending_bytes: int = Field(
        256 << 20, ge=1, description="bytes of all bodies that are received and not yet answered; beyond them 429"
    )
    max_waiting_time: float = Field(
        10,
        gt=0,
        description="seconds that a new request may have to wait for its forward, as estimated; beyond them 429",
    )
    max_client_batch_size: int = Field(2048, ge=1, description="maximum inputs of one request")
    max_request_tokens: int = Field(
        1 << 22, ge=1, description="maximum tokens that one request may run, prompts and padding included"
    )
    max_picture_bytes: int = Field(
        1 << 30, ge=1, description="maximum bytes that the pictures of one request have when they are processed"
    )
    max_text_characters: int = Field(
        1 << 22,
        ge=1,
        description="maximum characters of a text that are tokenised at once, where it cannot be cut before",
    )
    max_tokenize_bytes: int = Field(
        1 << 20, ge=1, description="largest text of /tokenize in bytes, and maximum token ids of an input"
    )
    max_template_steps: int = Field(
        1 << 20,
        ge=1,
        description="steps of a chat template: blocks that it runs, and 256 characters each that it makes",
    )
    max_template_seconds: float = Field(
        5, gt=0, allow_inf_nan=False, description="seconds of CPU time of a chat template for one conversation"
    )
    max_response_bytes: int = Field(
        256 << 20, ge=1, description="largest answer of vectors, as estimated before they are computed; beyond it 400"
    )
    max_connections: int = Field(4096, ge=1, description="connections that are served; beyond them 503")
    max_header_bytes: int = Field(
        1 << 16,
        ge=1024,
        description="bytes of a request line and its headers, and of headers behind a body; beyond them 431",
    )
    max_header_count: int = Field(256, ge=16, description="headers of a request; beyond them 431")
    header_timeout: float = Field(
        30,
        gt=0,
        allow_inf_nan=False,
        description="seconds in which a request line and its headers have to arrive; then 408",
    )
    body_timeout: float = Field(
        30,
        gt=0,
        allow_inf_nan=False,
        description="seconds in which a body has to arrive, and one more for each 16 KiB of it; then 408",
    )
    idle_timeout: float = Field(
        75,
        gt=0,
        allow_inf_nan=False,
        description="seconds that a connection may wait for its next request, or for its client to read an answer",
    )
    shutdown_timeout: float = Field(
        30,
        ge=0,
        allow_inf_nan=False,
        description="seconds in which the server ends when it is told to; requests under way have all but the last 10, "
        "and half of them at least",
    )
    allowed_local_media_path: str | None = Field(
        None, description="folder whose files requests may name as pictures, file:///... (default: none may)"
    )
    allowed_media_domains: Several = Field(
        (),
        description="host whose http: and https: URLs requests may name as pictures, with a port if it is not 80 or "
        "443, or * for all; may be given several times (default: none may)",
    )
    allow_private_media: bool = Field(
        False, description="fetch pictures also from hosts at private and loopback addresses"
    )
    token_ids: Literal["strict", "native", "cl100k"] = Field(
        "strict",
        description="token ids in requests: strict refuses those without any special token that the tokenizer always "
        "adds, as another's; native runs them as they are, as vLLM; cl100k reads them as text by OpenAI's vocabulary",
    )
    token_ids_vocabulary: str | None = Field(
        None,
        description="file cl100k_base.tiktoken (default: that of TIKTOKEN_CACHE_DIR, or of an installed litellm or "
        "llama-index-core; it is never fetched)",
    )
    trust_request_chat_template: bool = Field(False, description="let requests bring a chat template")
    allowed_origins: Names = Field(
        (), description="origin whose pages may send requests, or * for all; may be given several times (default: none)"
    )
    allowed_methods: Names = Field(("*",), description="method that such pages may use; may be given several times")
    allowed_headers: Names = Field(("*",), description="header that such pages may send; may be given several times")
    allow_credentials: bool = Field(False, description="let such pages send cookies and keys of the browser's own")
    trust_request_mm_kwargs: bool = Field(
        False, description="let requests make pictures larger than the checkpoint does (mm_processor_kwargs)"
    )
    disable_fastapi_docs: bool = Field(False, description="no /docs, /redoc, /openapi.json")
    any_model_name: bool = Field(
        False, description="the first model answers to names that none has; as `*` among the served names"
    )
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="second port, served by a thread of its own, without a key: /health, /livez, /readyz, /metrics",
    )
    api_key_metrics: bool = Field(False, description="ask for the key also at the metrics port")
    uds: str | None = Field(None, description="path of a Unix socket to listen on instead of host and port")
    ssl_keyfile: str | None = Field(None, description="private key of the certificate, for HTTPS")
    ssl_certfile: str | None = Field(None, description="certificate, for HTTPS")
    ssl_ca_certs: str | None = Field(
        None, description="certificates by which those of clients are checked, which have to bring one then"
    )
    default_chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(parse_json)] = Field(
        default_factory=dict, description="JSON of variables of chat templates, for requests that do not set them"
    )
    enable_tokenizer_info_endpoint: bool = Field(False, description="answer /tokenizer_info, chat template included")
    root_path: str = Field("", description="path prefix that a proxy strips")
    log_level: LogLevel = Field("info", description="least severe log line")
    log_format: LogFormat = Field("text", description="lines of the log; json = an object a line")
    otlp_traces_endpoint: str | None = Field(
        None, description="URL of an OpenTelemetry collector that gets a trace of each request, by OTLP over HTTP"
    )
    engine: Several = Field((), description="sockets of engines in other processes (`cenote engine`), instead of MODEL")

    @field_validator("api_key")
    @classmethod
    def _keys_that_requests_can_bring(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for number, key in enumerate(keys, start=1):
            if fault := _key_fault(key):
                raise ValueError(
                    f"key {number} of {len(keys)} {fault}; give a key of printable ASCII characters, or leave the "
                    "option out to serve without keys"
                )
        return keys

    @model_validator(mode="after")
    def _readable_vocabulary(self) -> ServerConfig:
        if self.token_ids == "cl100k":
            cl100k.find(self.token_ids_vocabulary)
        elif self.token_ids_vocabulary is not None:
            raise ValueError(f"`token_ids_vocabulary` is for token_ids 'cl100k', and it is {self.token_ids!r}")
        return self

    @model_validator(mode="after")
    def _whole_certificate(self) -> ServerConfig:
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("HTTPS needs both ssl_keyfile and ssl_certfile, got one of them")
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            raise ValueError("ssl_ca_certs is for HTTPS, which needs ssl_keyfile and ssl_certfile")
        return self

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _reachable_collector(cls, url: str | None) -> str | None:
        if url is None:
            return None
        if not url.startswith(WEB):
            raise ValueError(f"an address begins with http:// or https://, got {url!r}; traces go by OTLP over HTTP")
        if not all(map(_is_installed, TRACING)):
            raise ValueError("traces need further packages; install them with: pip install 'cenote[otel]'")
        return url


def _is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing more than the packages that it is part of."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _key_fault(key: str) -> str:
    """Return why no request can bring `key` in its `Authorization` header, or an empty string. Never shows the key."""
    if not key:
        return "is empty"
    if key != key.strip():
        return "begins or ends with white space, which HTTP drops"
    if not (key.isascii() and key.isprintable()):
        return "has characters that no HTTP header carries"
    return ""


class HostConfig(BaseModel):
    """How an engine is run for servers in other processes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    listen: str = Field("", description="path of the Unix socket that servers connect to")
    shutdown_timeout: float = Field(
        30,
        ge=0,
        allow_inf_nan=False,
        description="seconds in which the engine ends when it is told to; requests under way have all but the last 10, "
        "and half of them at least",
    )
    log_level: LogLevel = Field("info", description="least severe log line")
    log_format: LogFormat = Field("text", description="lines of the log; json = an object a line")


SUFFIXES = {"save": (".json",), "plot": (".png", ".svg", ".pdf", ".html"), "texts": (".txt", ".jsonl")}
"""Files of `BenchConfig`, by the last part of their name."""


class BenchConfig(BaseModel):
    """The measurements of `cenote bench`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str | None = Field(
        None, description="a task of the model, or score (default: the model's default; with --url embed)"
    )
    url: str | None = Field(None, description="measure the server at this address instead of a model in this process")
    api_key: str = Field("", description="key of the server")
    measure: tuple[Literal["throughput", "latency", "batches", "load"], ...] = Field(
        (),
        description="throughput: all texts as one request; latency: single texts by length; batches: requests of "
        "several; load: many clients (default: all; with --url load)",
    )
    input_len: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="tokens of a text, special tokens included (default: 8 to 256 mixed, latency of 16, 64 and 256)"
    )
    texts: str | None = Field(None, description="file of texts instead: .txt with one a line, or .jsonl")
    requests: int = Field(128, ge=1, description="texts of each measurement in a round")
    rounds: int = Field(3, ge=1, description="times that everything is measured, in turns")
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field((8, 32), description="texts of a request")
    concurrency: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        description="clients, each of which sends a text when the last one is answered (default: 1 4 16); with --rate: "
        "maximum texts under way (default: 256)",
    )
    rate: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(
        (), description="texts that arrive per second, at random, instead of clients that wait"
    )
    save: str | None = Field(None, description="file of the figures (.json)")
    plot: str | None = Field(None, description="file of a picture (.png, .svg, .pdf, .html)")

    @field_validator("api_key", mode="before")
    @classmethod
    def _first(cls, value: Any) -> Any:
        return value[0] if isinstance(value, (list, tuple)) and value else value

    @field_validator("measure", "input_len", "batch_sizes", "concurrency", "rate")
    @classmethod
    def _once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(value))

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str | None) -> str | None:
        if value not in (None, "score", *TASKS):
            raise ValueError(unknown_name("task", str(value), ("score", *TASKS)))
        return value

    @field_validator("url")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(WEB):
            raise ValueError(f"an address begins with http:// or https://, got {value!r}")
        return value

    @field_validator(*SUFFIXES)
    @classmethod
    def _usable_file(cls, value: str | None, option: ValidationInfo) -> str | None:
        if value is not None:
            _check_file(Path(value), SUFFIXES[str(option.field_name)])
        return value

    @model_validator(mode="after")
    def _consistent(self) -> BenchConfig:
        if self.texts is not None and self.input_len:
            raise ValueError("texts have lengths of their own: `texts` cannot be combined with `input_len`")
        if self.rate and len(self.concurrency) > 1:
            raise ValueError("with `rate`, `concurrency` is one number: the maximum of texts under way")
        return self


def _check_file(file: Path, suffixes: tuple[str, ...]) -> None:
    if file.suffix not in suffixes:
        raise ValueError(f"a file ending in {' or '.join(suffixes)}, got {str(file)!r}")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {str(file.parent)!r}")


OLDER_TASKS: dict[str, tuple[str, str | None]] = {
    "embed": ("embed", "embed"),
    "embedding": ("embed", "embed"),
    "classify": ("classify", "classify"),
    "score": ("auto", None),
    "reward": ("auto", None),
}
"""Values of `task` in older releases of vLLM, as (convert, pooler_config.task); `None` = the model's default."""
