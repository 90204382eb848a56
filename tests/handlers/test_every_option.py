"""Each word of the table of options, one by one: it has its effect, or is refused, replaced or left aside as the table says."""

from pathlib import Path
from typing import Any

import pytest
from lmi_dist_handler import gpus, load_models, properties, words
from lmi_dist_handler.options import HANDLER, HOST, OPTIONS, SERVER_FIELDS, SERVER_IGNORED, SERVER_UNBUILT, Option
from lmi_dist_handler.settings import ModelSettings

from lmi_dist import ConfigError

# Key to what an operator writes and what the setting then is; never the default.
ENGINE_WORDS: dict[str, tuple[str, Any]] = {
    "option.model_id": ("some/model", "some/model"),
    "option.revision": ("v1", "v1"),
    "option.tokenizer": ("some/tokenizer", "some/tokenizer"),
    "option.trust_remote_code": ("TRUE", True),
    "option.dtype": ("FP16", "fp16"),
    "option.kv_cache_dtype": ("FP8_e4m3", "fp8"),
    "option.tensor_parallel_degree": ("max", 1),
    "option.device": ("cpu", "cpu"),
    "option.kernels": ("torch", "torch"),
    "option.batch_invariant": ("true", True),
    "option.prefill_attention": ("flash-attn", "flash-attn"),
    "option.enforce_eager": ("true", True),
    "option.cpu_threads": ("3", 3),
    "option.max_model_len": ("77", 77),
    "option.max_rolling_batch_size": ("32", 32),
    "option.max_rolling_batch_prefill_tokens": ("1088", 1088),
    "option.prefill_chunk_tokens": ("64", 64),
    "option.max_decode_slowdown": ("2.5", 2.5),
    "option.enable_chunked_prefill": ("false", False),
    "option.enable_prefix_caching": ("False", False),
    "option.kv_cache_memory_bytes": ("1048576", 1 << 20),
    "option.gpu_memory_utilization": ("0.8", 0.8),
    "option.max_logprobs": ("5", 5),
    "option.max_queue_size": ("9", 9),
    "option.limit_mm_per_prompt": ("image=4,video=0", 4),
    "option.max_image_bytes": ("1000", 1000),
    "option.max_image_pixels": ("1000", 1000),
    "reserved_memory_mb": ("500", 500),
}
REFUSED = ("option.quantize",)  # has a setting, every value of which is refused until it is built
HANDLER_WORDS = {
    "option.rolling_batch": "auto",
    "option.enable_streaming": "huggingface",
    "option.output_formatter": "sse",
    "option.tgi_compat": "true",
    "option.allow_model_py": "true",
}
HOST_WORDS = {
    "engine": "Python", "job_queue_size": "7", "option.predict_timeout": "5", "option.model_loading_timeout": "6",
    "option.env": "A=b",
}  # fmt: skip
DEPRECATED = {
    "option.s3url": ("s3://bucket/model", "model_id", "s3://bucket/model"), "option.data_type": ("bf16", "dtype", "bf16"),
    "option.load_in_8bit": ("false", "quantize", None), "option.load_in_4bit": ("false", "quantize", None),
}  # fmt: skip


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU and no model where SageMaker puts one."""
    monkeypatch.setattr(gpus, "GPU_FOLDER", tmp_path / "no-gpus")
    monkeypatch.setattr(load_models, "DEFAULT_STORE", tmp_path / "no-store")


def loaded(tmp_path: Path, *lines: str, **environ: str) -> ModelSettings:
    """The model of a file with these lines."""
    needed = [] if any(line.startswith(("option.model_id", "option.s3url")) for line in lines) else ["option.model_id=some/model"]
    (tmp_path / "serving.properties").write_text("\n".join([*needed, *lines]))
    (model,) = properties.load(tmp_path, environ).models
    return model


def of_reader(*readers: str) -> list[Option]:
    return [option for option in OPTIONS.values() if option.reader in readers]


def test_every_word_with_an_effect_has_an_example() -> None:
    told = {*ENGINE_WORDS, *REFUSED, *HANDLER_WORDS, *HOST_WORDS, *DEPRECATED}

    assert told == {option.key for option in of_reader("engine", "handler", "host", "replaced")}
    assert (len(HANDLER_WORDS), set(HOST_WORDS)) == (len(HANDLER), set(HOST))


@pytest.mark.parametrize("key", ENGINE_WORDS)
def test_word_reaches_the_engine(tmp_path: Path, key: str) -> None:
    text, value = ENGINE_WORDS[key]

    model = loaded(tmp_path, f"{key}={text}")

    assert getattr(model.engine_config(), OPTIONS[key].field) == value
    assert model.origin[OPTIONS[key].name].startswith("serving.properties:")


@pytest.mark.parametrize("key", HANDLER_WORDS)
def test_word_reaches_the_handler(tmp_path: Path, key: str) -> None:
    model = loaded(tmp_path, f"{key}={HANDLER_WORDS[key]}")

    assert (key, HANDLER_WORDS[key]) in [(row[0], row[1]) for row in model.table()]


@pytest.mark.parametrize("key", HOST_WORDS)
def test_word_reaches_the_host(tmp_path: Path, key: str) -> None:
    model = loaded(tmp_path, f"{key}={HOST_WORDS[key]}", SERVING_ALLOW_ENV="true")

    told = {name: (value, origin) for name, value, origin in model.table()}
    assert told[key] == ("***" if key == "option.env" else HOST_WORDS[key], "serving.properties:2")


@pytest.mark.parametrize("key", DEPRECATED)
def test_deprecated_word_works_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str) -> None:
    text, name, value = DEPRECATED[key]

    model = loaded(tmp_path, f"{key}={text}")

    assert model.values.get(name) == value
    assert caplog.messages[0].startswith(f"serving.properties:{2 - (key == 'option.s3url')}: {key} is deprecated; use ")


@pytest.mark.parametrize("option", of_reader("ignored"), ids=lambda option: option.key)
def test_ignored_word_changes_nothing_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture, option: Option) -> None:
    plain, given = loaded(tmp_path), loaded(tmp_path, f"{option.key}=1")

    assert given.handler == plain.handler
    assert given.worker == plain.worker
    assert [row[0] for row in given.table() if "no effect: " in row[2]] == [option.key]
    assert caplog.messages == [f"serving.properties:2: {option.key}='1' has no effect: {option.about}"]


@pytest.mark.parametrize("key", ["option.quantize", *(option.key for option in of_reader("unbuilt", "host_unbuilt"))])
def test_unbuilt_word_is_refused_by_name(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="known but not built yet") as caught:
        loaded(tmp_path, f"{key}=gptq")

    assert f"{OPTIONS[key].name}=" in str(caught.value)


@pytest.mark.parametrize("name", SERVER_UNBUILT)
def test_unbuilt_word_of_the_server_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match="known but not built yet"):
        properties.load(None, {"OPTION_MODEL_ID": "some/model", f"SERVING_{name.upper()}": "gptq"})


@pytest.mark.parametrize("name", sorted(SERVER_IGNORED))
def test_ignored_word_of_the_server_is_taken(name: str) -> None:
    settings = properties.load(None, {"OPTION_MODEL_ID": "some/model", f"SERVING_{name.upper()}": "1"})

    assert settings.server == properties.load(None, {"OPTION_MODEL_ID": "some/model"}).server


SERVER_WORDS = {
    "host": "0.0.0.0", "port": "9000", "max_request_size": "1", "job_queue_size": "2", "chunked_read_timeout": "3", "api_key": "s",
    "read_timeout": "4", "write_timeout": "5", "drain_timeout": "6", "log_format": "json", "model_store": None,
    "allow_any_model_url": "true", "install_requirements": "true", "allow_env": "true", "offline": "true",
}  # fmt: skip


@pytest.mark.parametrize("name", SERVER_FIELDS)
def test_word_of_the_server_is_taken(tmp_path: Path, name: str) -> None:
    text = SERVER_WORDS[name] or str(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")

    server = properties.load(None, {"OPTION_MODEL_ID": "some/model", f"SERVING_{name.upper()}": text}).server

    assert str(getattr(server, name)).lower() == text.lower()
    assert server.origin[name] == f"SERVING_{name.upper()}"


def test_table_hides_the_password_of_a_url(tmp_path: Path) -> None:
    model = loaded(tmp_path, "option.model_id=s3://name:password@bucket/model")

    assert ("option.model_id", "s3://***@bucket/model", "serving.properties:1") in model.table()


@pytest.mark.parametrize(("source", "target"), words.TRANSLATIONS, ids=lambda name: name)
def test_variable_means_another(source: str, target: str) -> None:
    found = words.environment_words({source: "7"})

    assert found[target].origin == source
    assert words.environment_words({source: "7", target: "8"})[target].value == "8"


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
    "PIPELINE_PARALLEL_DEGREE": "2", "DJL_ENTRY_POINT": "mine.py", "PYTHON_EXECUTABLE": "/usr/bin/python3",
}  # fmt: skip


def with_variable(name: str, value: str) -> ModelSettings:
    (model,) = properties.load(None, {"OPTION_MODEL_ID": "org/other", name: value}).models
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
