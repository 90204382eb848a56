"""EngineConfig refuses by name; ModelConfig reads config.json in both spellings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmi_dist.config import ConfigKeys, EngineConfig, ModelConfig, RopeConfig
from lmi_dist.errors import CheckpointError, ConfigError

SUPPORTED: dict[str, Callable[[ConfigKeys], ConfigKeys]] = {
    "LlamaForCausalLM": lambda keys: keys,
    "MistralForCausalLM": lambda keys: ConfigKeys({"sliding_window": 4096, **keys.values}, keys.where),
    "GPT2LMHeadModel": lambda keys: ConfigKeys(keys.values, keys.where, {"hidden_size": "n_embd", "num_hidden_layers": "n_layer"}),
}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}


def read(folder: Path, wishes: dict[str, Any] | None = None, **values: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **values}))
    if wishes is not None:
        (folder / "generation_config.json").write_text(json.dumps(wishes))
    return ModelConfig.load(folder, SUPPORTED)


def rope_of(max_position: int = 128, **keys: Any) -> RopeConfig:
    return RopeConfig.read(ConfigKeys(keys, "config.json"), max_position)


# ---- EngineConfig ----


def test_strings_become_typed_settings() -> None:
    config = EngineConfig.of({"model": "m", "max_batch_size": "8", "enable_prefix_caching": "false", "dtype": "Half"})

    assert (config.max_batch_size, config.enable_prefix_caching, config.dtype) == (8, False, "fp16")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", ""),
        ("dtype", "int3"),
        ("dtype", 7),
        ("max_batch_size", 0),
        ("max_batch_size", "many"),
        ("max_model_len", -1),
        ("gpu_memory_utilization", 1.5),
        ("max_decode_slowdown", -2.0),
        ("max_decode_slowdown", 1.0),
        ("max_decode_slowdown", "inf"),
        ("max_decode_slowdown", "nan"),
        ("kernels", "metal"),
        ("cpu_threads", 0),
        ("kv_cache_memory_bytes", 0),
    ],
)
def test_bad_setting_is_named_with_its_value(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.of({"model": "m", name: value})

    assert f"{name}={value!r}" in str(caught.value)


def test_operators_name_stands_in_the_message() -> None:
    with pytest.raises(ConfigError, match=r"option\.max_rolling_batch_size=0 is refused"):
        EngineConfig.of({"model": "m", "max_batch_size": 0}, {"max_batch_size": "option.max_rolling_batch_size"})


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="prefill_chunk_tokens=64 contradicts enable_chunked_prefill=false"):
        EngineConfig.of({"model": "m", "enable_chunked_prefill": False, "prefill_chunk_tokens": 64})


def test_unknown_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_batch_sise"):
        EngineConfig.of({"model": "m", "max_batch_sise": 3})


@pytest.mark.parametrize(("name", "value"), [("quantize", "awq")])
def test_known_but_unbuilt_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value} is known but not built yet"):
        EngineConfig.of({"model": "m", name: value})


# ---- ModelConfig ----


def test_sizes_left_out_follow_from_others(tmp_path: Path) -> None:
    config = read(tmp_path)

    assert (config.head_dim, config.num_kv_heads, config.dtype, config.tied_embeddings) == (16, 4, "fp32", False)


def test_head_dim_may_differ_from_hidden_over_heads(tmp_path: Path) -> None:
    assert read(tmp_path, head_dim=40).head_dim == 40


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_is_read_in_both_spellings(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, **{name: "bfloat16"}).dtype == "bf16"


def test_architectures_default_holds_where_key_is_absent(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}

    assert read(tmp_path, **mistral).windows == (4096, 4096)
    assert read(tmp_path, **mistral, sliding_window=None).windows == (0, 0)
    assert read(tmp_path, **mistral, sliding_window=7).windows == (7, 7)


@pytest.mark.parametrize(
    ("values", "windows", "window"),
    [
        ({}, (0, 0, 0), 0),
        ({"sliding_window": 9}, (9, 9, 9), 9),
        ({"sliding_window": 9, "use_sliding_window": False}, (0, 0, 0), 0),
        ({"sliding_window": 9, "max_window_layers": 1}, (0, 9, 9), 0),
        ({"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, (9, 0, 9), 0),
    ],
)
def test_windows_are_told_for_each_layer(tmp_path: Path, values: dict[str, Any], windows: tuple[int, ...], window: int) -> None:
    config = read(tmp_path, num_hidden_layers=3, **values)

    assert (config.windows, config.window) == (windows, window)


def test_key_is_found_and_told_under_its_own_name(tmp_path: Path) -> None:
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "n_embd": 32}

    assert (read(tmp_path, **gpt2).hidden_size, read(tmp_path, **gpt2).num_layers) == (32, 2)
    with pytest.raises(ConfigError, match="n_embd=0 must be an integer"):
        read(tmp_path, **{**gpt2, "n_embd": 0})
    with pytest.raises(ConfigError, match="n_embd is missing"):
        read(tmp_path, **{**gpt2, "n_embd": None, "hidden_size": None})


def test_generation_config_gives_ends_and_sampling(tmp_path: Path) -> None:
    config = read(tmp_path, {"eos_token_id": [5, 7], "temperature": 0.6, "top_p": 0.9, "do_sample": True}, eos_token_id=2)

    assert config.eos_token_ids == (5, 7)
    assert config.generation == {"temperature": 0.6, "top_p": 0.9}


def test_model_len_is_bounded_by_positions(tmp_path: Path) -> None:
    config = read(tmp_path)

    assert (config.model_len(None), config.model_len(100)) == (128, 100)
    with pytest.raises(ConfigError, match="max_model_len=129 must be at most 128"):
        config.model_len(129)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["BertModel"]}, r"architectures=\['BertModel'\] has none that is supported"),
        ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM' must be a list"),
        ({"architectures": None}, "architectures"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size='64' must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be an integer of at least 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"head_dim": 20}, "head_dim=20 must be a multiple of 8"),
        ({"head_dim": 264}, "head_dim=264 must be a multiple of 8"),
        ({"torch_dtype": "float8"}, "torch_dtype='float8' is not supported"),
        ({"torch_dtype": ["float32"]}, "is not supported"),
        ({"rope_scaling": {"rope_type": "ntk"}}, "rope_type='ntk' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\] must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2' must be a number"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0}}, "factor=0 must be a number above 0"),
        ({"rope_theta": 1}, "rope_theta=1 must be a number above 1"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor=4 must be a number above 4",
        ),
        ({"eos_token_id": "2"}, "eos_token_id='2' must be an integer"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
        ({"layer_types": ["full_attention"]}, r"layer_types=\['full_attention'\] must be a list of 2"),
        ({"layer_types": ["full_attention", "chunked"]}, "each full_attention or sliding_attention"),
    ],
)
def test_bad_key_of_config_json_is_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, **values)

    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "\xff\xfe"])
def test_broken_config_json_is_a_checkpoint_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))

    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.load(tmp_path, SUPPORTED)


def test_missing_config_json_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        ModelConfig.load(tmp_path, SUPPORTED)


# ---- RopeConfig ----


def test_both_spellings_of_rope_agree() -> None:
    new = rope_of(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    old = rope_of(rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=5e5)

    assert new == old


def test_models_own_original_maximum_goes_first() -> None:
    scaling = {"rope_type": "longrope", "short_factor": [1], "long_factor": [2], "original_max_position_embeddings": 64}

    assert rope_of(rope_scaling=scaling).original_max_position == 64
    assert rope_of(rope_scaling=scaling, original_max_position_embeddings=32).original_max_position == 32
    assert rope_of(rope_scaling=scaling, original_max_position_embeddings=32).factor == 4.0


def test_dynamic_ignores_an_original_maximum() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}

    assert rope_of(rope_scaling=scaling).original_max_position == 128


@pytest.mark.parametrize(
    ("scaling", "reach"),
    [
        ({"rope_type": "default"}, 128),
        ({"rope_type": "linear", "factor": 2.5}, 320),
        ({"rope_type": "dynamic", "factor": 2.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}, 128),
    ],
)
def test_scaling_tells_how_far_it_reaches(scaling: dict[str, Any], reach: int) -> None:
    assert rope_of(rope_scaling=scaling).reach(128) == reach
