"""Sources and their order, names, refusals; the two configurations that operators start from."""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from lmi_dist_handler import gpus, load_models
from lmi_dist_handler.options import OPTIONS, Option
from lmi_dist_handler.properties import Settings, from_init, load
from lmi_dist_handler.settings import ModelSettings

from lmi_dist import ConfigError

UNBUILT = [row for row in OPTIONS.values() if row.reader in ("unbuilt", "host_unbuilt")]


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU and no model where SageMaker puts one."""
    monkeypatch.setattr(gpus, "GPU_FOLDER", tmp_path / "no-gpus")
    monkeypatch.setattr(load_models, "DEFAULT_STORE", tmp_path / "no-store")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def write(tmp_path: Path, text: str) -> Path:
    """A model folder with this serving.properties."""
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "serving.properties").write_bytes(text.encode("latin-1"))
    return folder


def one(settings: Settings) -> ModelSettings:
    (model,) = settings.models
    return model


def with_env(**environ: str) -> ModelSettings:
    return one(load(None, {"OPTION_MODEL_ID": "some/model", **environ}))


def test_reading_properties_needs_no_torch() -> None:
    code = "import sys, lmi_dist_handler.properties, lmi_dist_handler.requests; sys.exit('torch' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": os.pathsep.join(sys.path)}, check=False)

    assert done.returncode == 0


# the two that must work as they stand


def test_file_of_the_readme_resolves(tmp_path: Path, checkpoint: Path) -> None:
    folder = write(
        tmp_path,
        f"engine=MPI\noption.tensor_parallel_degree=max\noption.rolling_batch=lmi-dist\noption.model_id={checkpoint}\n"
        "option.max_rolling_batch_prefill_tokens=4096\n",
    )

    model = one(load(folder, {}))

    config = model.engine_config()
    assert (config.model, config.tensor_parallel_degree, config.max_prefill_tokens) == (str(checkpoint), 1, 4096)
    assert model.engine == "MPI"
    assert model.origin["max_rolling_batch_prefill_tokens"] == "serving.properties:5"


def test_variables_of_the_readme_resolve(checkpoint: Path) -> None:
    environ = {
        "SERVING_LOAD_MODELS": "test::MPI=/opt/ml/model-that-is-missing",
        "OPTION_TENSOR_PARALLEL_DEGREE": "max",
        "OPTION_ROLLING_BATCH": "lmi-dist",
        "OPTION_MODEL_ID": str(checkpoint),
        "OPTION_MAX_ROLLING_BATCH_PREFILL_TOKENS": "4096",
    }

    model = one(load(None, environ))

    config = model.engine_config()
    assert (model.name, model.engine, model.folder) == ("test", "MPI", None)
    assert (config.model, config.tensor_parallel_degree, config.max_prefill_tokens) == (str(checkpoint), 1, 4096)
    assert model.origin["model_id"] == "OPTION_MODEL_ID"


# where the model is


def test_no_model_at_all_tells_three_ways() -> None:
    with pytest.raises(ConfigError, match=r"no model was given; set OPTION_MODEL_ID .* or MODEL_DIR .* or SERVING_LOAD_MODELS"):
        load(None, {})


def test_folder_with_config_is_the_model(checkpoint: Path) -> None:
    assert one(load(None, {"MODEL_DIR": str(checkpoint)})).engine_config().model == str(checkpoint)


def test_empty_folder_tells_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds neither option\.model_id in a serving\.properties nor a config\.json"):
        load(tmp_path, {})


@pytest.mark.parametrize("environ", [{"MODEL_DIR": "/no/such"}, {"SERVING_LOAD_MODELS": "m=/no/such"}])
def test_missing_folder_is_named(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"/no/such.* is not a folder"):
        load(None, environ)


def test_command_line_folder_beats_model_dir(tmp_path: Path, checkpoint: Path) -> None:
    assert one(load(checkpoint, {"MODEL_DIR": str(tmp_path)})).folder == checkpoint.resolve()


def test_hub_model_keeps_revision_and_task() -> None:
    model = one(load(None, {"HF_MODEL_ID": "org/some-model", "HF_MODEL_REVISION": "v1", "HF_TASK": "text-generation"}))

    assert model.name == "org_some_model"
    assert (model.engine_config().model, model.engine_config().revision) == ("org/some-model", "v1")
    assert model.origin["model_id"] == "HF_MODEL_ID"


def test_relative_model_is_found_beside_its_file(tmp_path: Path) -> None:
    folder = write(tmp_path, "option.model_id=weights\n")
    (folder / "weights").mkdir()

    assert one(load(folder, {})).engine_config().model == str(folder / "weights")


def test_relative_model_of_a_variable_is_found_from_here(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)

    assert with_env(OPTION_MODEL_ID="./checkpoint").engine_config().model == str(checkpoint)


def test_two_models_of_one_name_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="two models have the same name among a, a"):
        load(None, {"SERVING_LOAD_MODELS": f"a={checkpoint},a={checkpoint}"})


def test_sagemaker_folder_is_served(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_models, "DEFAULT_STORE", checkpoint)

    assert one(load(None, {})).name == "checkpoint"


# the file


def test_java_escapes_are_read(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        "# a comment\n! another\noption.model_id : some\\u002f\\\n   model\noption.revision\tn\xe4chste\noption.revision = v\\:2\n",
    )

    model = one(load(folder, {}))

    assert model.values["model_id"] == "some/model"
    assert (model.values["revision"], model.origin["revision"]) == ("v:2", "serving.properties:6")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("option.dtype=\n", r"serving.properties:1: option.dtype has no value; give one or remove the line"),
        ("engine=MPI\noption.revision=\\u00zz\n", r"cannot be read at line 2: .*u00zz"),
        ("engine=TensorRT\n", r"engine='TensorRT' is not one of ours; use MPI or Python"),
        ("\noption.max_modl_len=3\n", r"serving.properties:2: option.max_modl_len is unknown; did you mean option.max_model_len\?"),
        ("max_model_len=3\n", r"max_model_len is unknown; did you mean option.max_model_len\?"),
        ("option.load_on_devices=0\n", r"option.load_on_devices is unknown; did you mean load_on_devices\?"),
        ("option.frobnicate=1\n", r"option.frobnicate is unknown; serving.properties.example lists all there are"),
        ("option.max_model_len=many\n", r"serving.properties:1: option.max_model_len='many' is refused: .*integer"),
        ("option.dtype=int8\n", r"option.dtype='int8' is refused: must be one of fp32"),
        ("option.quantize=gptq\n", r"quantize=gptq is known but not built yet"),
        ("option.enable_lora=true\n", r"option.enable_lora='true' is known but not built yet; leave it out or write false"),
        ("option.output_formatter=3p\n", r"option.output_formatter='3p' is known but not built yet"),
        ("option.output_formatter=yaml\n", r"option.output_formatter='yaml' is refused: .*'json'"),
        ("option.rolling_batch=disable\n", r"option.rolling_batch='disable' is for DJL's own host; leave it out"),
        ("option.rolling_batch=trtllm\n", r"option.rolling_batch='trtllm' is not this engine; use lmi-dist or vllm or auto"),
        ("option.s3url=s3://b/m\noption.model_id=x\n", r"option.s3url and .*option.model_id could not both be set"),
        ("option.load_in_8bit=maybe\n", r"option.load_in_8bit='maybe' must be one of true, false"),
        ("batch_size=8\n", r"batch_size='8' is known but not built yet; leave it out or write 1"),
    ],
)
def test_bad_line_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, text), {"OPTION_MODEL_ID": "some/model"})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("option.dtype=bf16\noption.data_type=fp16\n", r"data_type and .*option.dtype could not both be set; remove the first"),
        ("option.load_in_8bit=true\noption.load_in_4bit=true\n", r"load_in_4bit and .*load_in_8bit could not both be set"),
        ("option.enable_chunked_prefill=false\noption.prefill_chunk_tokens=64\n", "contradicts enable_chunked_prefill=false"),
        ("option.env=A=1\n", r":1: option.env is refused: a model may set variables only with SERVING_ALLOW_ENV=true"),
        ("=x\n", r"serving.properties:1:  is unknown"),
        ("option.model_id=\\\n", "option.model_id has no value"),
    ],
)
def test_words_that_cannot_stand_are_refused(tmp_path: Path, lines: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, lines), {"OPTION_MODEL_ID": "some/model"})


def test_bad_variables_of_a_model_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"option.env=\*\*\* is refused: .*pair 2 of 2 must look like NAME=value"):
        load(write(tmp_path, "option.env=A=1,B\noption.model_id=m\n"), {"SERVING_ALLOW_ENV": "true"})


def test_line_set_again_further_down_counts_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = one(load(write(tmp_path, "option.dtype=bf16\noption.dtype=fp16\noption.model_id=m\n"), {}))

    assert model.engine_config().dtype == "fp16"
    assert caplog.messages == ["serving.properties:1: option.dtype is set again further down, which counts"]


def test_models_variables_do_not_go_to_the_handler(tmp_path: Path) -> None:
    model = one(load(write(tmp_path, "option.env=A=1\noption.model_id=m\n"), {"SERVING_ALLOW_ENV": "true", "HOME": "/h"}))

    assert "env" not in model.init_properties()
    assert model.environment == {"SERVING_ALLOW_ENV": "true", "HOME": "/h", "A": "1"}


# several models


def test_list_may_be_empty_where_models_are_registered_later(tmp_path: Path) -> None:
    assert load(None, {"SERVING_LOAD_MODELS": "NONE"}).models == ()
    assert load(None, {"SERVING_MODEL_STORE": str(tmp_path)}).models == ()


def test_versions_of_one_name_may_stand_side_by_side(checkpoint: Path) -> None:
    models = load(None, {"SERVING_LOAD_MODELS": f"a:1={checkpoint},a:2={checkpoint}"}).models

    assert [(model.name, model.version) for model in models] == [("a", "1"), ("a", "2")]


def test_option_for_all_must_not_replace_a_models_own_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    write(tmp_path, "option.model_id=m\n")
    several = {"SERVING_LOAD_MODELS": f"a={checkpoint},b={tmp_path}/model", "OPTION_MODEL_ID": "org/other"}

    with pytest.raises(ConfigError, match=r"OPTION_MODEL_ID='org/other' would take the place of the checkpoint in .*/checkpoint"):
        load(None, several)

    assert load(None, {**several, "SERVING_LOAD_MODELS": str(checkpoint)}).models[0].engine_config().model == "org/other"


def test_parameters_of_a_registration_go_before_the_file(tmp_path: Path) -> None:
    write(tmp_path, "engine=MPI\njob_queue_size=3\noption.model_id=m\noption.max_model_len=9\n")
    settings = load(None, {"SERVING_MODEL_STORE": str(tmp_path), "SERVING_LOAD_MODELS": "NONE", "OPTION_DTYPE": "bf16"})

    model = settings.register({"url": "model", "engine": "Python", "job_queue_size": "4", "model_name": "x", "model_version": "2"})

    config = model.engine_config()
    assert (model.name, model.version, model.engine, model.worker.job_queue_size) == ("x", "2", "Python", 4)
    assert (config.max_model_len, config.dtype, config.max_queue_size) == (9, "bf16", 4)
    assert model.origin["job_queue_size"] == "POST /models"


def test_registration_needs_a_store_or_leave(tmp_path: Path) -> None:
    folder = write(tmp_path, "option.model_id=m\n")

    with pytest.raises(ConfigError, match=r"lies in no model store; set SERVING_MODEL_STORE, or allow any url with"):
        load(None, {"SERVING_LOAD_MODELS": "NONE"}).register({"url": str(folder)})

    allowed = load(None, {"SERVING_LOAD_MODELS": "NONE", "SERVING_ALLOW_ANY_MODEL_URL": "true"})
    assert allowed.register({"url": str(folder)}).name == "model"
    assert allowed.register({"url": "s3://bucket/llama"}).engine_config().model == "s3://bucket/llama"


@pytest.mark.parametrize("name", ["vllm", "auto", "lmi-dist", "LMI-DIST"])
def test_rolling_batch_names_that_mean_ours(name: str) -> None:
    assert with_env(OPTION_ROLLING_BATCH=name)


def test_async_mode_allows_rolling_batch_off() -> None:
    assert with_env(OPTION_ROLLING_BATCH="disable", OPTION_ASYNC_MODE="true")


def test_deprecated_word_works_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = one(load(write(tmp_path, "option.data_type=bf16\noption.load_in_8bit=false\n"), {"OPTION_MODEL_ID": "some/model"}))

    assert model.engine_config().dtype == "bf16"
    assert model.origin["dtype"] == "serving.properties:1"
    assert [record.getMessage() for record in caplog.records] == [
        "serving.properties:1: option.data_type is deprecated; use option.dtype=bf16",
        "serving.properties:2: option.load_in_8bit is deprecated; use nothing: it is the default",
    ]


# variables


def test_file_beats_variable_and_command_line_beats_both(tmp_path: Path) -> None:
    folder = write(tmp_path, "option.dtype=bf16\noption.max_model_len=64\n")
    environ = {"OPTION_MODEL_ID": "some/model", "OPTION_DTYPE": "fp16", "OPTION_MAX_LOGPROBS": "7"}

    config = one(load(folder, environ, {"option.max_model_len": "32"})).engine_config()

    assert (config.dtype, config.max_logprobs, config.max_model_len) == ("bf16", 7, 32)


def test_empty_variable_is_as_good_as_none() -> None:
    assert with_env(OPTION_DTYPE="", OPTION_FROBNICATE=" ").engine_config().dtype == "auto"


def test_misspelt_variable_is_refused_in_its_spelling() -> None:
    with pytest.raises(ConfigError, match=r"^OPTION_MAX_MODL_LEN is unknown; did you mean OPTION_MAX_MODEL_LEN\?$"):
        with_env(OPTION_MAX_MODL_LEN="3")


def test_variable_finds_names_with_capitals() -> None:
    assert with_env(OPTION_ENTRYPOINT="lmi_dist_handler", OPTION_ENGINE="Python").engine == "Python"


@pytest.mark.parametrize(
    ("environ", "option", "value"),
    [
        ({"HF_MODEL_TRUST_REMOTE_CODE": "true"}, "trust_remote_code", "true"),
        ({"SM_NUM_GPUS": "1"}, "tensor_parallel_degree", "1"),
        ({"TENSOR_PARALLEL_DEGREE": "1", "SM_NUM_GPUS": "4"}, "tensor_parallel_degree", "1"),
        ({"MAX_BATCH_PREFILL_TOKENS": "99"}, "max_rolling_batch_prefill_tokens", "99"),
        ({"MAX_BATCH_SIZE": "9", "OPTION_MAX_ROLLING_BATCH_SIZE": "8"}, "max_rolling_batch_size", "8"),
        ({"ENABLE_CUDA_GRAPHS": "true"}, "enforce_eager", "false"),
        ({"CUDA_MEMORY_FRACTION": "0.5"}, "gpu_memory_utilization", "0.5"),
        ({"MODEL_LOADING_TIMEOUT": "77"}, "model_loading_timeout", "77"),
        ({"SAGEMAKER_MODEL_SERVER_TIMEOUT_SECONDS": "78"}, "predict_timeout", "78"),
    ],
)
def test_other_names_of_options_are_translated(environ: dict[str, str], option: str, value: str) -> None:
    assert with_env(**environ).values[option] == value


def test_quantize_of_tgi_is_told_by_its_name() -> None:
    with pytest.raises(ConfigError, match="quantize=gptq is known but not built yet"):
        with_env(HF_MODEL_QUANTIZE="gptq")


# max, and how many wait


@pytest.mark.parametrize(
    ("device", "can_use", "degree"),
    [("auto", True, 2), ("auto", False, 1), ("cuda", True, 2), ("cuda", False, 2), ("cpu", True, 1)],
)
def test_max_means_all_gpus_that_the_model_would_run_on(
    device: str, can_use: bool, degree: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they cannot be used device=auto runs on the CPU, and device=cuda says why not."""
    monkeypatch.setattr(gpus, "can_use_gpus", lambda: can_use)

    model = with_env(OPTION_TENSOR_PARALLEL_DEGREE="max", OPTION_DEVICE=device, CUDA_VISIBLE_DEVICES="0,1")

    assert model.engine_config().tensor_parallel_degree == degree


def test_engine_lets_as_many_wait_as_the_host() -> None:
    settings = load(None, {"OPTION_MODEL_ID": "some/model", "MAX_CONCURRENT_REQUESTS": "5"})

    assert settings.server.job_queue_size == 5
    assert one(settings).engine_config().max_queue_size == 5
    assert one(settings).origin["max_queue_size"] == "MAX_CONCURRENT_REQUESTS"


# the server's part


def test_server_settings_come_with_origins() -> None:
    environ = {"OPTION_MODEL_ID": "m", "SERVING_PORT": "9000", "OPTION_PREDICT_TIMEOUT": "5", "SERVING_API_KEY": "s"}

    settings = load(None, environ, {"host": "0.0.0.0"})

    server = settings.server
    assert (server.host, server.port, server.api_key) == ("0.0.0.0", 9000, "s")
    assert server.origin == {"host": "command line", "port": "SERVING_PORT", "api_key": "SERVING_API_KEY"}
    assert (one(settings).worker.predict_timeout, one(settings).origin["predict_timeout"]) == (5, "OPTION_PREDICT_TIMEOUT")


@pytest.mark.parametrize("value", ["tcp://10.0.0.1:80", "70000", "-1"])
def test_bad_port_is_refused_by_name(value: str) -> None:
    with pytest.raises(ConfigError, match=f"SERVING_PORT='{value}' is refused: input should be"):
        load(None, {"OPTION_MODEL_ID": "m", "SERVING_PORT": value})


def test_server_says_what_models_leave_free(tmp_path: Path) -> None:
    folder = write(tmp_path, "option.model_id=m\nreserved_memory_mb=7\n")
    environ = {"SERVING_LOAD_MODELS": f"{folder},b=s3://b/m", "SERVING_RESERVED_MEMORY_MB": "500"}

    models = load(None, environ).models

    assert [model.engine_config().reserved_memory_mb for model in models] == [7, 500]
    assert models[1].origin["reserved_memory_mb"] == "SERVING_RESERVED_MEMORY_MB"


def test_each_model_has_its_own_options(tmp_path: Path) -> None:
    for name, seconds in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "serving.properties").write_text(f"option.model_id=m\noption.predict_timeout={seconds}\n")

    models = load(None, {"SERVING_MODEL_STORE": str(tmp_path), "SERVING_JOB_QUEUE_SIZE": "7"}).models

    assert [(model.name, model.worker.predict_timeout, model.worker.job_queue_size) for model in models] == [
        ("a", 1, 7),
        ("b", 2, 7),
    ]


# what the worker sees, and explain


def test_worker_comes_to_the_same_config() -> None:
    model = with_env(OPTION_MAX_MODEL_LEN="64", OPTION_OUTPUT_FORMATTER="sse", OPTION_TGI_COMPAT="True", SERVING_JOB_QUEUE_SIZE="3")

    assert from_init(model.init_properties(), {}) == model.handler


def test_djl_init_request_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    djl = {
        "model_id": "some/model", "model_dir": "/opt/ml/model", "handler": "handle", "device_id": "-1", "mpi_mode": "true",
        "tensor_parallel_degree": 1, "pipeline_parallel_degree": "1", "cluster_size": 1, "max_rolling_batch_size": "256",
        "rolling_batch": "vllm", "engine": "MPI", "minWorkers": "4", "gpu.maxWorkers": "4", "batch_size": "1",
        "entryPoint": "my_handler", "load_on_devices": "0;1", "plugin_setting": "x",
    }  # fmt: skip

    config = from_init(djl, {})

    assert (config.engine.model, config.engine.max_batch_size, config.model_name) == ("some/model", 256, "model")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "plugin_setting is unknown" in caplog.text


def test_model_folder_is_the_model_inside_djl() -> None:
    assert from_init({"model_dir": "/opt/ml/model"}, {}).engine.model == "/opt/ml/model"


@pytest.mark.parametrize(
    ("properties_given", "message"),
    [
        ({}, "option.model_id is missing from the init request"),
        ({"model_id": "m", "dtype": print}, "dtype is a function, but must be text"),
        ({"model_id": "m", "dtype": "int3"}, "option.dtype='int3' is refused"),
    ],
)
def test_worker_refuses_by_name(properties_given: Mapping[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_init(properties_given, {})


def test_table_tells_value_and_origin() -> None:
    rows = {key: rest for key, *rest in with_env(OPTION_MAX_MODEL_LEN="64", OPTION_DISABLE_FLASH_ATTN="true").table()}

    assert rows["option.max_model_len"] == ["64", "OPTION_MAX_MODEL_LEN"]
    assert rows["option.dtype"] == ["auto", "default"]
    assert rows["option.revision"] == ["unset", "default"]
    assert rows["option.disable_flash_attn"] == [
        "true",
        "OPTION_DISABLE_FLASH_ATTN; no effect: our own kernels are used, unless prefill_attention asks for flash-attn",
    ]


@pytest.mark.parametrize("option", UNBUILT, ids=lambda row: row.key)
def test_unbuilt_option_takes_only_what_changes_nothing(tmp_path: Path, option: Option) -> None:
    neutral = "".join(f"{option.key}={value}\n" for value in option.neutral)
    assert load(write(tmp_path, f"{neutral}option.model_id=m\n"), {})

    with pytest.raises(ConfigError, match=f"{option.key}='other' is known but not built yet"):
        load(write(tmp_path, f"{option.key}=other\noption.model_id=m\n"), {})
