"""Every word that an operator may write in serving.properties, and who reads it. Data only: properties.py acts on it.

Names, meanings and defaults that are not ours are those of DJL Serving (0.26 to 0.36) and of its lmi-dist properties.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Reader = Literal[
    "engine",  # a field of EngineConfig
    "handler",  # a field of HandlerConfig
    "host",  # our host process; nothing to a worker inside DJL
    "replaced",  # deprecated: works, with one warning that names `field`, the option that took its place
    "unbuilt",  # known but not built yet: only values in `neutral` are taken
    "host_unbuilt",  # the same in our own host; inside DJL its host has dealt with it
    "ignored",  # has no effect here, by design; `about` says why
]
Formatter = Literal["json", "jsonlines", "sse", "json_chat", "jsonlines_chat", "sse_chat", "none"]
FORMATTERS: tuple[Formatter, ...] = get_args(Formatter)
UNBUILT_FORMATTERS = ("3p", "3p_stream")


@dataclass(frozen=True, slots=True)
class Option:
    """One word: `key` as it stands in serving.properties, with its `option.` where it has one."""

    key: str
    reader: Reader
    field: str = ""
    about: str = ""
    neutral: tuple[str, ...] = ()
    becomes: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # a replaced option's values in the new one's words; "" drops it

    @property
    def name(self) -> str:
        """As a worker sees it: without `option.`."""
        return self.key.removeprefix("option.")


ENGINE = {
    "model_id": "model", "revision": "revision", "tokenizer": "tokenizer", "trust_remote_code": "trust_remote_code",
    "dtype": "dtype", "kv_cache_dtype": "kv_cache_dtype", "quantize": "quantize",
    "tensor_parallel_degree": "tensor_parallel_degree", "device": "device",
    "kernels": "kernels", "batch_invariant": "batch_invariant",
    "prefill_attention": "prefill_attention", "enforce_eager": "enforce_eager", "cpu_threads": "cpu_threads",
    "max_model_len": "max_model_len",
    "max_rolling_batch_size": "max_batch_size", "max_rolling_batch_prefill_tokens": "max_prefill_tokens",
    "prefill_chunk_tokens": "prefill_chunk_tokens", "max_decode_slowdown": "max_decode_slowdown",
    "enable_chunked_prefill": "enable_chunked_prefill",
    "enable_prefix_caching": "enable_prefix_caching", "kv_cache_memory_bytes": "kv_cache_memory_bytes",
    "gpu_memory_utilization": "gpu_memory_utilization", "max_logprobs": "max_logprobs", "max_queue_size": "max_queue_size",
    "limit_mm_per_prompt": "max_images", "max_image_bytes": "max_image_bytes", "max_image_pixels": "max_image_pixels",
}  # fmt: skip

PLAIN_ENGINE = ("reserved_memory_mb",)  # the same, without `option.`, as DJL calls them

HANDLER = ("rolling_batch", "enable_streaming", "output_formatter", "tgi_compat", "allow_model_py")

HOST = {
    "engine": "engine",
    "job_queue_size": "job_queue_size",
    "option.predict_timeout": "predict_timeout",
    "option.model_loading_timeout": "model_loading_timeout",
    "option.env": "env",
}

REPLACED = (
    Option("option.s3url", "replaced", "option.model_id", "the checkpoint's s3:// url, as 0.26 called it"),
    Option("option.data_type", "replaced", "option.dtype", "older name of dtype"),
    Option("option.load_in_8bit", "replaced", "option.quantize", "int8 at load", becomes={"true": "bitsandbytes8", "false": ""}),
    Option("option.load_in_4bit", "replaced", "option.quantize", "int4 at load", becomes={"true": "bitsandbytes4", "false": ""}),
)

UNBUILT: dict[str, tuple[tuple[str, ...], str]] = {
    "pipeline_parallel_degree": (("1",), "stages that share the model's layers"),
    "cluster_size": (("1",), "machines that share the model"),
    "cpu_offload_gb_per_gpu": (("0",), "weights kept in host memory"),
    "disable_sliding_window": (("false",), "attend to everything in spite of the model's window"),
    "load_format": (("auto", "safetensors"), "how the weights are stored; safetensors and .bin are found out"),
    "task": (("text-generation", "text2text-generation"), "what the model is for"),
    "tokenizer_mode": (("auto",), "slow or fast tokenizer"),
    "bedrock_compat": (("false",), "Bedrock's request and answer"),
    "input_formatter": ((), "own parsing of requests; mark it with @input_formatter in model.py"),
    "speculative_draft_model": ((), "model that drafts tokens"),
    "draft_model_id": ((), "the same, older name"),
    "speculative_length": ((), "tokens drafted a step"),
    "spec_length": (("0",), "the same, older name"),
    "draft_model_tp_size": ((), "ranks of the draft model"),
    "record_acceptance_rate": (("false",), "log how many drafted tokens were taken"),
    "enable_lora": (("false",), "adapters chosen by request"),
    "max_loras": ((), "adapters in one step"),
    "max_lora_rank": ((), "rank of an adapter at most"),
    "max_cpu_loras": ((), "adapters kept in host memory"),
    "lora_extra_vocab_size": ((), "tokens that an adapter may add"),
    "lora_dtype": ((), "of adapters"),
    "fully_sharded_loras": (("false",), "split both halves of an adapter over ranks"),
    "long_lora_scaling_factors": ((), "of adapters for long texts"),
    "image_placeholder_token": ((), "what stands for an image in a prompt"),
    "lmcache_auto_config": (("false",), "KV cache outside the process"),
}

OURS = ("lmi_dist_handler", "djl_python.huggingface", "djl_python.lmi_vllm.vllm_async_service")
ONE = ("1",)
HOST_UNBUILT: dict[str, tuple[tuple[str, ...], str]] = {
    "option.entryPoint": (OURS, "module that answers requests; ours does"),
    "option.handler": (("handle",), "function of it"),
    "option.pythonExecutable": ((), "Python of the workers; ours is that of the server"),
    "option.enable_venv": (("false",), "a virtual environment a model"),
    "option.batch_size": (ONE, "static batches; rolling batch needs none"),
    "batch_size": (ONE, "the same"),
    "max_dynamic_batch_size": (ONE, "the same"),
    "minWorkers": (ONE, "groups of workers"),
    "maxWorkers": (ONE, "the same, at most"),
    "gpu.minWorkers": (ONE, "the same, on GPUs"),
    "gpu.maxWorkers": (ONE, "the same, at most"),
    "cpu.minWorkers": (ONE, "the same, without GPU"),
    "cpu.maxWorkers": (ONE, "the same, at most"),
    "load_on_devices": (("*", "0", "-1", "cpu"), "devices of the groups"),
}

IGNORED = {
    "option.mpi_mode": "mpirun starts all workers but the one of engine=Python",
    "option.async_mode": "requests always go through asynchronously",
    "option.use_passive_workers": "rank 0 always decides",
    "option.parallel_loading": "models load one after the other, so that each plans with the memory that is left",
    "option.modelName": "there is no file name to choose",
    "option.device_id": "tensor_parallel_degree and the visible devices decide",
    "option.device_map": "tensor_parallel_degree decides where weights lie",
    "option.low_cpu_mem_usage": "weights are always memory-mapped",
    "option.disable_flash_attn": "our own kernels are used, unless prefill_attention asks for flash-attn",
    "option.waiting_steps": "new requests never wait for a number of steps",
    "option.stop_sequence": "it never had an effect under rolling batch; use the request's stop_sequences",
    "option.speculative_telemetry": "nothing is sent anywhere",
    "max_batch_delay": "rolling batch waits for nobody",
    "max_idle_time": "workers are never scaled down",
    "option.decoding_strategy": "it is of DJL's scheduler engine; use the request's parameters",
    "option.max_sparsity": "it is of DJL's scheduler engine",
    "option.max_splits": "it is of DJL's scheduler engine",
    "option.multi_gpu": "tensor_parallel_degree decides where weights lie",
    "option.paged_attention": "attention is always paged",
    "required_memory_mb": "memory is planned from the checkpoint",
    "gpu.required_memory_mb": "memory is planned from the checkpoint",
    "gpu.reserved_memory_mb": "memory is planned from the checkpoint",
    "retry_threshold": "/ping tells the state of the workers",
    "log_model_metric": "see /metrics",
    "log_request_metric": "see /metrics",
    "metrics_aggregation": "see /metrics",
}


def _table() -> dict[str, Option]:
    rows = [
        *(Option(f"option.{name}", "engine", target) for name, target in ENGINE.items()),
        *(Option(name, "engine", name) for name in PLAIN_ENGINE),
        *(Option(f"option.{name}", "handler", name) for name in HANDLER),
        *(Option(key, "host", target) for key, target in HOST.items()),
        *REPLACED,
        *(Option(f"option.{name}", "unbuilt", "", about, neutral) for name, (neutral, about) in UNBUILT.items()),
        *(Option(key, "host_unbuilt", "", about, neutral) for key, (neutral, about) in HOST_UNBUILT.items()),
        *(Option(key, "ignored", "", about) for key, about in IGNORED.items()),
    ]
    return {row.key: row for row in rows}


OPTIONS: dict[str, Option] = _table()

# what a DJL worker finds among its properties beside a model's own words (contract 3.5)
WORKER_PROPERTIES = ("handler", "model_dir", "model_name", "device_id", "request_tracking_id", "djl_version")

# read under these names from config.properties, SERVING_* and the command line
SERVER_FIELDS = (
    "host", "port", "max_request_size", "job_queue_size", "chunked_read_timeout", "api_key", "read_timeout", "write_timeout",
    "drain_timeout", "log_format", "model_store", "allow_any_model_url", "install_requirements", "allow_env", "offline",
)  # fmt: skip

SERVER_UNBUILT = {
    "management_address": (), "cors_allowed_origin": (), "cors_allowed_methods": (), "cors_allowed_headers": (),
    "keystore": (), "keystore_pass": (), "keystore_type": (), "private_key_file": (), "certificate_file": (),
    "model_url_pattern": (), "batch_size": ONE, "min_workers": ONE, "max_workers": ONE,
    "load_on_devices": ("*", "0", "-1", "cpu"), "bad_request_http_code": ("400",), "wlm_error_http_code": ("503",),
    "throttle_error_http_code": ("503",), "server_error_http_code": ("500",), "timeout_http_code": ("400",),
    "error_rate_wlm": (), "error_rate_server": (), "error_rate_model": (), "error_rate_any": (),
}  # fmt: skip

SERVER_IGNORED = frozenset((
    "cluster_address", "wait_model_loading", "allow_multi_status", "max_batch_delay", "max_idle_time",
    "number_of_netty_threads", "plugin_folder", "features", "rolling_batch_buffer", "prometheus", "download_dir",
    "retry_threshold", "fail_fast", "health_check_override",
))  # fmt: skip

SECRETS = ("api_key", "keystore_pass", "env")  # never shown, only whether they are set
