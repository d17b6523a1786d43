"""Options of vLLM and FastDeploy that have no effect here: one row each, with the reason.

They are accepted, so that a command line or a call written for those engines starts, and each is told in a line of the
log. An option whose other values would have an effect names those that have none; the others are refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

ONE_DEVICE = "a model runs on one device"
NO_CACHE = "there is no key-value cache"
NOT_GENERATED = "nothing is generated"
NOT_SPLIT = "sequences are never split"
NOT_COMPILED = "models run as Transformers has them; see cuda_graphs"
FRONT = "one process reads requests; start several in front of one engine with --engine"
IMAGES = "pictures are processed once for a request and not kept"


class Foreign(NamedTuple):
    """An option of another engine.

    Attributes:
        reason: why it has no effect.
        values: those that have none; empty = all.
        is_switch: its flag takes no value, and has a form with `--no-`.
    """

    reason: str
    values: tuple[str, ...] = ()
    is_switch: bool = False

    def takes(self, value: Any) -> bool:
        """Return whether a value has no effect."""
        return not self.values or str(value).lower() in self.values


def _on_one_device(*names: str) -> dict[str, Foreign]:
    return {name: Foreign(ONE_DEVICE, ("1",)) for name in names}


def _idle(reason: str, *names: str) -> dict[str, Foreign]:
    return {name: Foreign(reason) for name in names}


def _switches(reason: str, *names: str) -> dict[str, Foreign]:
    return {name: Foreign(reason, is_switch=True) for name in names}


FOREIGN: dict[str, Foreign] = {
    **_on_one_device(
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "data_parallel_size_local",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
        "nnodes",
    ),
    **_idle(ONE_DEVICE, "distributed_executor_backend", "data_parallel_backend", "max_parallel_loading_workers"),
    **_switches(ONE_DEVICE, "disable_custom_all_reduce", "enable_expert_parallel", "fully_sharded_loras"),
    "gpu_memory_utilization": Foreign("pooling needs no key-value cache, so no memory is reserved"),
    "enable_prefix_caching": Foreign(
        f"{NO_CACHE}; see prefix_sharing for the common beginnings of a batch's sequences", is_switch=True
    ),
    **_idle(
        NO_CACHE,
        "swap_space",
        "block_size",
        "kv_cache_dtype",
        "kv_cache_memory_bytes",
        "kv_cache_ratio",
        "num_gpu_blocks_override",
        "num_lookahead_slots",
        "prefix_caching_hash_algo",
        "cache_queue_port",
    ),
    **_switches(NO_CACHE, "calculate_kv_scales", "disable_hybrid_kv_cache_manager", "disable_cascade_attn"),
    **_switches(NOT_SPLIT, "enable_chunked_prefill", "disable_chunked_mm_input"),
    **_idle(NOT_SPLIT, "max_num_partial_prefills", "max_long_partial_prefills", "long_prefill_token_threshold"),
    "async_scheduling": Foreign("batches are prepared while the last one runs anyway", is_switch=True),
    "cpu_offload_gb": Foreign("weights stay on the device of the model", ("0", "0.0")),
    "seed": Foreign("nothing is sampled"),
    **_idle(
        NOT_GENERATED,
        "generation_config",
        "override_generation_config",
        "max_logprobs",
        "logprobs_mode",
        "reasoning_parser",
        "structured_outputs_config",
        "stream_interval",
    ),
    **_idle(
        NOT_COMPILED,
        "compilation_config",
        "optimization_level",
        "graph_optimization_config",
        "max_seq_len_to_capture",
    ),
    **_idle("the attention function is proved on the model at load", "attention_backend", "attention_config"),
    "model_impl": Foreign("Transformers' own model code runs", ("auto", "transformers", "vllm")),
    "load_format": Foreign("safetensors are read, and pickles where there are none", ("auto", "hf", "safetensors")),
    "config_format": Foreign("config.json is read", ("auto", "hf")),
    "load_choices": Foreign("weights are read in one way"),
    "tokenizer_mode": Foreign("the fast backend is used where there is one", ("auto", "hf", "fast", "slow")),
    "skip_tokenizer_init": Foreign("texts need a tokenizer", ("false",), is_switch=True),
    "renderer_num_workers": Foreign("a pool of threads renders requests"),
    **_idle(FRONT, "api_server_count", "workers"),
    "disable_frontend_multiprocessing": Foreign(FRONT, is_switch=True),
    "engine_worker_queue_port": Foreign(
        "the engine lives in the server's process, or listens on a socket; see --engine"
    ),
    "controller_port": Foreign("the server has no second port but --metrics-port"),
    **_switches(
        "late interaction is computed beside the model, only scores are answered",
        "enable_flash_late_interaction",
        "disable_flash_late_interaction",
    ),
    "chat_template_content_format": Foreign("the format follows from the template", ("auto",)),
    **_idle(
        IMAGES, "mm_processor_cache_gb", "mm_processor_cache_type", "mm_encoder_tp_mode", "mm_encoder_attn_backend"
    ),
    **_switches(IMAGES, "disable_mm_preprocessor_cache", "skip_mm_profiling", "enable_mm"),
    "max_loras": Foreign("a batch runs once per adapter in it, however many there are"),
    "max_cpu_loras": Foreign("all adapters stay loaded"),
    "max_lora_rank": Foreign("adapters may have any rank"),
    "lora_dtype": Foreign("adapters have the dtype of the layers that they change"),
    "lora_extra_vocab_size": Foreign("an adapter adds no tokens"),
    "disable_log_stats": Foreign("statistics are at /metrics", is_switch=True),
    "enable_request_id_headers": Foreign("X-Request-Id comes with every answer", is_switch=True),
    **_switches(
        "--log-level debug logs a line for each request, without its content",
        "enable_log_requests",
        "disable_log_requests",
        "disable_uvicorn_access_log",
    ),
    "max_log_len": Foreign("texts of requests are not logged"),
    "uvicorn_log_level": Foreign("--log-level is for the whole server"),
    "log_error_stack": Foreign("an unexpected error is logged with its stack anyway", is_switch=True),
    "enable_server_load_tracking": Foreign("/load counts requests anyway", is_switch=True),
    "enable_prompt_tokens_details": Foreign("no token of a prompt comes from a cache of the engine", is_switch=True),
}
"""Options without effect by name; a new one is a row here."""
