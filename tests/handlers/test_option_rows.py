"""The contract's options row by row (5.4 to 5.6, 5.8 to 5.10): each works, warns as deprecated, has no effect and says so, or is
refused by name. Keys as in serving.properties; a value that works stands beside what becomes of it.
"""

import logging
from pathlib import Path
from typing import Any

import pytest
from lmi_dist_handler import load_models, settle
from lmi_dist_handler.options import OPTIONS
from lmi_dist_handler.properties import ModelSettings, load

from lmi_dist import ConfigError

# key: a value other than the default, where it arrives, as what
WORKS: dict[str, tuple[str, str, Any]] = {
    "engine": ("Python", "engine", "Python"),
    "job_queue_size": ("7", "worker.job_queue_size", 7),
    "reserved_memory_mb": ("3", "handler.engine.reserved_memory_mb", 3),
    "option.model_id": ("org/name", "handler.engine.model", "org/name"),
    "option.revision": ("v1", "handler.engine.revision", "v1"),
    "option.trust_remote_code": ("True", "handler.engine.trust_remote_code", True),
    "option.tensor_parallel_degree": ("max", "handler.engine.tensor_parallel_degree", 1),
    "option.rolling_batch": ("vllm", "values.rolling_batch", "vllm"),
    "option.max_rolling_batch_size": ("9", "handler.engine.max_batch_size", 9),
    "option.max_rolling_batch_prefill_tokens": ("99", "handler.engine.max_prefill_tokens", 99),
    "option.output_formatter": ("sse", "handler.output_formatter", "sse"),
    "option.tgi_compat": ("true", "handler.tgi_compat", True),
    "option.predict_timeout": ("11", "worker.predict_timeout", 11),
    "option.model_loading_timeout": ("12", "worker.model_loading_timeout", 12),
    "option.env": ("A=1, B = x=y,", "worker.env", {"A": "1", "B": "x=y"}),
    "option.dtype": ("FP16", "handler.engine.dtype", "fp16"),
    "option.device": ("cpu", "handler.engine.device", "cpu"),
    "option.max_model_len": ("77", "handler.engine.max_model_len", 77),
    "option.gpu_memory_utilization": ("0.5", "handler.engine.gpu_memory_utilization", 0.5),
    "option.enable_chunked_prefill": ("false", "handler.engine.enable_chunked_prefill", False),
    "option.enable_prefix_caching": ("false", "handler.engine.enable_prefix_caching", False),
    "option.max_logprobs": ("5", "handler.engine.max_logprobs", 5),
}
# key: a value, the key and value that it becomes
DEPRECATED = {
    "option.s3url": ("s3://bucket/model", "model_id", "s3://bucket/model"),
    "option.data_type": ("bf16", "dtype", "bf16"),
    "option.load_in_8bit": ("false", "quantize", None),
    "option.load_in_4bit": ("false", "quantize", None),
}
REFUSED = {
    "option.quantize": "gptq", "option.pipeline_parallel_degree": "2", "option.cluster_size": "2", "option.load_format": "dummy",
    "option.cpu_offload_gb_per_gpu": "1", "option.disable_sliding_window": "true", "option.task": "fill-mask",
    "option.tokenizer_mode": "slow", "option.bedrock_compat": "true", "option.input_formatter": "mine",
    "option.speculative_draft_model": "org/draft", "option.draft_model_id": "org/draft", "option.speculative_length": "4",
    "option.spec_length": "4", "option.draft_model_tp_size": "2", "option.record_acceptance_rate": "true",
    "option.enable_lora": "true", "option.max_loras": "4", "option.max_lora_rank": "16", "option.max_cpu_loras": "4",
    "option.lora_extra_vocab_size": "256", "option.lora_dtype": "auto", "option.fully_sharded_loras": "true",
    "option.long_lora_scaling_factors": "2.0", "option.limit_mm_per_prompt": "image=4", "option.image_placeholder_token": "<image>",
    "option.lmcache_auto_config": "true", "option.entryPoint": "mine.py", "option.handler": "other",
    "option.pythonExecutable": "/usr/bin/python3", "option.enable_venv": "true", "option.batch_size": "4", "batch_size": "4",
    "max_dynamic_batch_size": "4", "minWorkers": "2", "maxWorkers": "2", "gpu.minWorkers": "2", "gpu.maxWorkers": "2",
    "cpu.minWorkers": "2", "cpu.maxWorkers": "2", "load_on_devices": "1;2", "option.load_on_devices": "0",
}  # fmt: skip
NO_EFFECT = {
    "max_batch_delay": "100", "max_idle_time": "60", "required_memory_mb": "1", "gpu.required_memory_mb": "1",
    "gpu.reserved_memory_mb": "1", "retry_threshold": "3", "log_model_metric": "true", "log_request_metric": "true",
    "metrics_aggregation": "9", "option.mpi_mode": "true", "option.parallel_loading": "true", "option.modelName": "x",
    "option.use_passive_workers": "false", "option.async_mode": "true", "option.enable_streaming": "false",
    "option.waiting_steps": "3", "option.enforce_eager": "true", "option.speculative_telemetry": "true", "option.device_id": "0",
    "option.device_map": "auto", "option.low_cpu_mem_usage": "true", "option.disable_flash_attn": "true",
    "option.stop_sequence": "[a]", "option.decoding_strategy": "greedy", "option.max_sparsity": "0.33", "option.max_splits": "3",
    "option.multi_gpu": "x", "option.paged_attention": "true",
}  # fmt: skip
OURS = {
    "option.tokenizer", "option.kernels", "option.cpu_threads", "option.prefill_chunk_tokens", "option.kv_cache_memory_bytes",
    "option.max_queue_size", "option.allow_model_py",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle, "GPU_FOLDER", tmp_path / "no-gpus")
    monkeypatch.setattr(load_models, "DEFAULT_STORE", tmp_path / "no-store")


def with_line(folder: Path, key: str, value: str) -> ModelSettings:
    """A model whose serving.properties says this and, if it does not, which checkpoint."""
    lines = [f"{key}={value}"] + ["option.model_id=org/other"] * (key not in ("option.model_id", "option.s3url"))
    (folder / "serving.properties").write_text("\n".join(lines))
    (model,) = load(folder, {"SERVING_ALLOW_ENV": "true"}).models
    return model


def test_every_option_has_a_row() -> None:
    assert {*OPTIONS} - {*WORKS, *DEPRECATED, *REFUSED, *NO_EFFECT} == OURS


@pytest.mark.parametrize("key", WORKS)
def test_option_works(tmp_path: Path, key: str) -> None:
    value, place, expected = WORKS[key]

    found: Any = with_line(tmp_path, key, value)
    for name in place.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)

    assert found == expected


@pytest.mark.parametrize("key", DEPRECATED)
def test_deprecated_option_works_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str) -> None:
    value, name, expected = DEPRECATED[key]

    model = with_line(tmp_path, key, value)

    assert model.values.get(name) == expected
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"serving.properties:1: {key} is deprecated; use " in caplog.text


@pytest.mark.parametrize("key", REFUSED)
def test_option_is_refused_by_name(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_line(tmp_path, key, REFUSED[key])

    assert key.removeprefix("option.") in str(caught.value)
    assert "known but not built yet" in str(caught.value) or "did you mean" in str(caught.value)


@pytest.mark.parametrize("key", NO_EFFECT)
def test_option_without_effect_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str) -> None:
    model = with_line(tmp_path, key, NO_EFFECT[key])

    assert caplog.messages == [f"serving.properties:1: {key}={NO_EFFECT[key]!r} has no effect: {OPTIONS[key].about}"]
    assert any(row[0] == key and "no effect" in row[2] for row in model.table())


# the environment forms of 5.4, each with a value and the option of the model that it becomes
VARIABLES = {
    "MODEL_LOADING_TIMEOUT": ("1200", "model_loading_timeout"),
    "PREDICT_TIMEOUT": ("240", "predict_timeout"),
    "HF_TRUST_REMOTE_CODE": ("true", "trust_remote_code"),
    "HF_MODEL_TRUST_REMOTE_CODE": ("true", "trust_remote_code"),
    "TENSOR_PARALLEL_DEGREE": ("1", "tensor_parallel_degree"),
    "SM_NUM_GPUS": ("1", "tensor_parallel_degree"),
    "PIPELINE_PARALLEL_DEGREE": ("1", "pipeline_parallel_degree"),
    "MAX_CONCURRENT_REQUESTS": ("5", "job_queue_size"),
    "MAX_BATCH_PREFILL_TOKENS": ("99", "max_rolling_batch_prefill_tokens"),
    "MAX_BATCH_SIZE": ("9", "max_rolling_batch_size"),
    "ENABLE_CUDA_GRAPHS": ("true", "enforce_eager"),
    "CUDA_MEMORY_FRACTION": ("0.5", "gpu_memory_utilization"),
    "SAGEMAKER_STARTUP_TIMEOUT": ("600", "model_loading_timeout"),
    "SAGEMAKER_MODEL_SERVER_TIMEOUT_SECONDS": ("60", "predict_timeout"),
    "DJL_ENTRY_POINT": ("djl_python.huggingface", "entryPoint"),
}
SILENT = (
    "DJL_CACHE_DIR", "HF_HOME", "HF_HUB_ENABLE_HF_TRANSFER", "USE_AICCL_BACKEND", "SAFETENSORS_FAST_GPU",
    "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN", "SERVING_FEATURES",
)  # fmt: skip
REFUSED_VARIABLES = {
    "HF_MODEL_QUANTIZE": "gptq", "SERVING_MIN_WORKERS": "2", "SERVING_MAX_WORKERS": "2", "SAGEMAKER_NUM_MODEL_WORKERS": "2",
    "PIPELINE_PARALLEL_DEGREE": "2", "DJL_ENTRY_POINT": "mine.py",
}  # fmt: skip


def with_variable(name: str, value: str) -> ModelSettings:
    (model,) = load(None, {"OPTION_MODEL_ID": "org/other", name: value}).models
    return model


@pytest.mark.parametrize("name", VARIABLES)
def test_variable_becomes_its_option(name: str) -> None:
    value, option = VARIABLES[name]

    model = with_variable(name, value)

    assert model.origin[option] == name
    assert model.values[option] == ("false" if name == "ENABLE_CUDA_GRAPHS" else value)


@pytest.mark.parametrize("name", SILENT)
def test_variable_of_the_container_changes_nothing(caplog: pytest.LogCaptureFixture, name: str) -> None:
    assert with_variable(name, "1") == with_variable("UNRELATED", "1")
    assert caplog.messages == []


@pytest.mark.parametrize("name", REFUSED_VARIABLES)
def test_variable_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match="known but not built yet"):
        with_variable(name, REFUSED_VARIABLES[name])
