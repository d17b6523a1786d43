"""Command lines that were written for vLLM and FastDeploy: each starts, with a line on every option without effect."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from cenote.cli import flags
from cenote.cli.serve import models_of
from cenote.config import EngineConfig, ModelConfig, ServerConfig
from cenote.errors import ConfigError
from cenote.foreign import FOREIGN


def served(line: str) -> tuple[ModelConfig, EngineConfig, ServerConfig, list[str]]:
    """What `cenote serve` would run with, and its notes."""
    arguments = flags.parse(["serve", *shlex.split(line)])
    del arguments["command"]
    (configs,), notes = models_of(arguments)
    return *configs, notes


SEEDS: dict[str, str] = {
    "e5": "intfloat/e5-small",
    "matryoshka": """Snowflake/snowflake-arctic-embed-m-v1.5 --hf-overrides '{"matryoshka_dimensions":[256]}'""",
    "matryoshka, dotted": "Snowflake/snowflake-arctic-embed-m-v1.5 --hf-overrides.matryoshka_dimensions [256]",
    "matryoshka, appended": "Snowflake/snowflake-arctic-embed-m-v1.5 --hf-overrides.matryoshka_dimensions+ 256",
    "jina-v3": "jinaai/jina-embeddings-v3 --trust-remote-code",
    "jina-v3, underscores": "jinaai/jina-embeddings-v3 --trust_remote_code",
    "colbert": "answerdotai/answerai-colbert-small-v1",
    "modernbert": """lightonai/GTE-ModernColBERT-v1 --hf-overrides '{"architectures": ["ColBERTModernBertModel"]}'""",
    "jina-colbert": """jinaai/jina-colbert-v2 --hf_overrides '{"architectures": ["ColBERTJinaRobertaModel"]}'
        --trust_remote_code""",
    "colqwen3": "TomoroAI/tomoro-colqwen3-embed-4b --max-model-len 4096",
    "bge-m3": """BAAI/bge-m3 --hf-overrides '{"architectures": ["BgeM3EmbeddingModel"]}'""",
    "pooler, underscore": """x --pooler_config '{"pooling_type": "MEAN"}'""",
    "fastdeploy, embedder": """--model Qwen/Qwen3-Embedding-0.6B --max-num-seqs 256 --max-model-len 32768 --port 9412
        --engine-worker-queue-port 7142 --metrics-port 7211 --tensor-parallel-size 1 --gpu-memory-utilization 0.9
        --runner pooling""",
    "fastdeploy, reward": """--model RM_v1008 --max-num-seqs 256 --max-model-len 8192 --port 13351
        --engine-worker-queue-port 7562 --metrics-port 7531 --tensor-parallel-size 1 --gpu-memory-utilization 0.9
        --runner pooling --convert embed""",
    "fastdeploy, graphs": """--model x --load-choices default_v1
        --graph-optimization-config '{"use_cudagraph":false}' --no-enable-prefix-caching --override_pooler_config
        '{"pooling_type": "LAST"}' --served-model-name a""",
}
"""Command lines of the documents of vLLM and FastDeploy, by what they show."""


@pytest.mark.parametrize("line", SEEDS.values(), ids=SEEDS)
def test_command_lines_of_documents(line: str) -> None:
    model, *_ = served(line)
    assert model.model == (line.split()[1] if line.startswith("--") else line.split()[0])


EFFECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "runner": ("--runner pooling", {"runner": "pooling"}),
    "convert": ("--convert classify", {"convert": "classify"}),
    "pooler": ("--pooler-config.task token_embed", {"pooler_config": {"task": "token_embed"}}),
    "pooler, nested JSON value": (
        "--pooler-config.returned_token_ids [4,5]",
        {"pooler_config": {"returned_token_ids": [4, 5]}},
    ),
    "overrides": ("--hf_overrides.is_matryoshka=true", {"hf_overrides": {"is_matryoshka": True}}),
    "overrides of overrides": (
        "--hf-overrides.text_config.hidden_act relu --hf-overrides.text_config.x_y 1",
        {"hf_overrides": {"text_config": {"hidden_act": "relu", "x_y": 1}}},
    ),
    "fields over JSON": (
        """--hf-overrides '{"a": {"b": 1, "c": 2}}' --hf-overrides.a.b 3""",
        {"hf_overrides": {"a": {"b": 3, "c": 2}}},
    ),
    "dtype": ("--dtype half", {"dtype": "half"}),
    "short": ("-q int8", {"quantization": "int8"}),
    "length": ("--max-model-len 128", {"max_model_len": 128}),
    "length, thousands": ("--max-model-len 4k", {"max_model_len": 4000}),
    "length, part of thousands": ("--max_model_len=25.6k", {"max_model_len": 25600}),
    "length, 1024": ("--max-model-len 4K", {"max_model_len": 4096}),
    "length, auto": ("--max-model-len auto", {"max_model_len": None}),
    "length, -1": ("--max-model-len -1", {"max_model_len": None}),
    "seqs": ("--max-num-seqs 7", {"max_num_seqs": 7}),
    "tokens": ("--max-num-batched-tokens 2K", {"max_num_batched_tokens": 2048}),
    "policy": ("--scheduling-policy fcfs", {"scheduling_policy": "fcfs"}),
    "remote code": ("--trust-remote-code", {"trust_remote_code": True}),
    "no remote code": ("--no-trust_remote_code", {"trust_remote_code": False}),
    "revision": ("--revision main", {"revision": "main"}),
    "tokenizer": ("--tokenizer a/b", {"tokenizer": "a/b"}),
    "names": ("--served-model-name a b", {"served_model_name": ("a", "b")}),
    "template": ("--chat-template t.jinja", {"chat_template": "t.jinja"}),
    "trusted templates": ("--trust-request-chat-template", {"trust_request_chat_template": True}),
    "plugin": ("--io-processor-plugin p", {"io_processor_plugin": "p"}),
    "pictures": ("""--limit-mm-per-prompt '{"image": 2}'""", {"limit_mm_per_prompt": {"image": 2}}),
    "pictures, dotted": ("--limit-mm-per-prompt.image 2", {"limit_mm_per_prompt": {"image": 2}}),
    "processor": ("--mm_processor_kwargs.max_pixels 64", {"mm_processor_kwargs": {"max_pixels": 64}}),
    "folder": ("--allowed-local-media-path /x", {"allowed_local_media_path": "/x"}),
    "domains": ("--allowed-media-domains a b", {"allowed_media_domains": ("a", "b")}),
    "adapters": ("--enable-lora --lora-modules a=/x", {"enable_lora": True}),
    "keys": ("--api-key a b", {"api_key": ("a", "b")}),
    "prefix": ("--root-path /x", {"root_path": "/x"}),
    "eager": ("--enforce-eager", {"enforce_eager": True}),
    "address": ("--host 0.0.0.0 --port 81", {"host": "0.0.0.0", "port": 81}),
    "tokenizer at a revision": ("--tokenizer-revision v2", {"tokenizer_revision": "v2"}),
    "cache": ("--download-dir /x", {"download_dir": "/x"}),
    "token": ("--hf-token x", {"hf_token": "x"}),
    "socket": ("--uds /x.sock", {"uds": "/x.sock"}),
    "https": ("--ssl-keyfile a --ssl-certfile b --ssl-ca-certs c", {"ssl_ca_certs": "c"}),
    "variables": ("--default-chat-template-kwargs.a 1", {"default_chat_template_kwargs": {"a": 1}}),
    "tokenizer's settings": ("--enable-tokenizer-info-endpoint", {"enable_tokenizer_info_endpoint": True}),
    "documents": ("--disable-fastapi-docs", {"disable_fastapi_docs": True}),
    "metrics": ("--metrics-port 82", {"metrics_port": 82}),
}
"""Flags of vLLM and FastDeploy that have an effect, and the options that they set."""


@pytest.mark.parametrize(("line", "options"), EFFECTS.values(), ids=EFFECTS)
def test_flags_with_an_effect(line: str, options: dict[str, Any]) -> None:
    *configs, notes = served(f"m {line}")
    assert notes == []
    values = {name: value for config in configs for name, value in config.model_dump().items()}
    for name, value in options.items():
        expected = ModelConfig(pooler_config=value).model_dump()[name] if name == "pooler_config" else value
        assert values[name] == expected


def test_fields_of_two_flags_are_of_one_config() -> None:
    model, *_ = served("--pooler_config.pooling-type mean --override-pooler-config '{\"dimensions\": 8}'")
    assert (model.pooler_config.pooling_type, model.pooler_config.dimensions) == ("MEAN", 8)


IDLE: list[str] = [
    "--no-enable-prefix-caching",
    "--enable-prefix-caching",
    "--no-enable-chunked-prefill",
    "--enable_chunked_prefill",
    "-tp 1",
    "-tp=1",
    "--pipeline-parallel-size 1",
    "-pp 1",
    "--data-parallel-size 1",
    "-dp 1",
    "--api-server-count 1",
    "--disable-log-requests",
    "--no-enable-log-requests",
    "--disable-uvicorn-access-log",
    "--uvicorn-log-level warning",
    "--block-size 16",
    "--kv-cache-dtype auto",
    "--load-format auto",
    "--model-impl auto",
    "--model-impl transformers",
    """--compilation-config '{"mode": 3}'""",
    "--compilation-config.mode 3",
    "-O3",
    "-O 3",
    "--generation-config vllm",
    "--enable-flash-late-interaction",
    "--no-enable-flash-late-interaction",
    "--disable-flash-late-interaction",
    "--enable-server-load-tracking",
    "--log-error-stack",
    "--max-log-len 100",
    "--max_log_len -1",
    "--renderer-num-workers 4",
    "--chat-template-content-format auto",
    "--gpu_memory_utilization 0.92",
    "--tokenizer-mode auto",
    "--seed 0",
    "--swap-space 4",
    "--disable-log-stats",
    "--max-lora-rank 8",
    "--engine-worker-queue-port 7142",
    "--load-choices default_v1",
    """--graph-optimization-config '{"use_cudagraph":false}'""",
]
"""Flags of vLLM and FastDeploy without effect."""


@pytest.mark.parametrize("line", IDLE)
def test_flags_without_effect(line: str) -> None:
    model, _, server, notes = served(f"{line} --port 81")
    assert (model.model, server.port) == (None, 81)
    (note,) = notes
    name, words, reason = note.partition(" has no effect: ")
    assert words
    assert reason == FOREIGN[name].reason


@pytest.mark.parametrize("form", ["--{} {}", "--{}={}", "--{}"])
@pytest.mark.parametrize("name", FOREIGN)
def test_options_without_effect_say_why(name: str, form: str) -> None:
    option = FOREIGN[name]
    value = option.values[0] if option.values else "1"
    line = form.format(name.replace("_", "-"), value)
    if not option.takes("" if option.is_switch is False and form == "--{}" else value):
        with pytest.raises(ConfigError, match="must be"):
            served(line)
        return
    if option.values and option.is_switch and form != "--{}={}":
        with pytest.raises(ConfigError, match="must be false, got True"):
            served(line)
        return
    model, _, server, notes = served(f"{line} --port 81")
    # A switch takes no value, so what follows it is the model.
    assert model.model == (value if option.is_switch and form == "--{} {}" else None)
    assert server.port == 81
    assert notes == [f"{name} has no effect: {option.reason}"]


FAULTS: dict[str, tuple[str, str]] = {
    "several devices": ("-tp 8", "tensor_parallel_size must be 1, got '8': a model runs on one device"),
    "another loader": ("--load-format dummy", "load_format must be auto or hf or safetensors, got 'dummy'"),
    "offloading": ("--cpu-offload-gb 4", "cpu_offload_gb must be 0 or 0.0, got '4': weights stay on the device"),
    "near": ("--max_model_length 3", "unknown flag '--max-model-length'; did you mean '--max-model-len'?"),
    "near an idle one": (
        "--kv-cache-type x",
        "unknown flag '--kv-cache-type'; did you mean '--kv-cache-dtype'?",
    ),
    "negated, but no switch": ("--no-block-size", "unknown flag '--no-block-size'"),
    "field of no object": ("--max-model-len.x 3", "unknown flag '--max-model-len.x'"),
    "field without a value": ("--hf-overrides.x", "--hf-overrides.x: expected one argument"),
    "field of a value": ("--hf-overrides.x 1 --hf-overrides.x.y 2", "'x' has a value already, 1, and no fields"),
    "append to a value": ("--hf-overrides.x 1 --hf-overrides.x+ 2", "'x' appends to a list, got 1"),
    "no number": ("--max-model-len 4kk", "max_model_len: Input should be a valid integer"),
    "part of a token": ("--max-model-len 1.0005k", "max_model_len: Input should be a valid integer"),
    "no tokenizer": ("--skip-tokenizer-init", "skip_tokenizer_init must be false, got True: texts need a tokenizer"),
}


@pytest.mark.parametrize(("line", "sentence"), FAULTS.values(), ids=FAULTS)
def test_faults(line: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        served(line)
    assert sentence in str(caught.value)
