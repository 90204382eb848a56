"""Checkpoints of any kind load, and those that are not what they say are refused by name."""

import json
from pathlib import Path
from typing import Any

import driving
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmi_dist.errors import CheckpointError, ConfigError


def test_tied_checkpoint_may_hold_its_head(tmp_path: Path) -> None:
    model = tiny_models.build("tied")
    folder = tiny_models.save(model, tmp_path, safe_serialization=True)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": torch.zeros(512, 64)}, folder / "model.safetensors")
    ids = tiny_models.prompt_of(20)

    logits = driving.logits_at_every_position(driving.make_runner(folder), ids)

    assert tiny_models.relative_error(logits, tiny_models.teacher_forced(model, ids)) < tiny_models.TOLERANCE


def pickled(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """As transformers 4 wrote it: two .bin shards with an index."""
    (folder / "model.safetensors").unlink()
    tensors = {name: x.to(dtype) for name, x in model.state_dict().items()}
    names = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in shards.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    places = {name: file for file, part in shards.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("kind", ["sharded", "bin", "fp16", "old-keys"])
@pytest.mark.parametrize("variant", ["attention-bias", "yarn"])
def test_any_kind_of_checkpoint_gives_its_logits(tmp_path: Path, variant: str, kind: str) -> None:
    model = tiny_models.build(variant)
    model = model.half() if kind == "fp16" else model
    folder = tiny_models.save(model, tmp_path, max_shard_size="50KB" if kind == "sharded" else "5GB")
    if kind == "bin":
        pickled(model, folder, torch.float32)
    if kind == "old-keys":
        config = json.loads((folder / "config.json").read_text())
        tiny_models.rewrite_config(folder, **tiny_models.old_style(config))
    ids = tiny_models.prompt_of(30)

    logits = driving.logits_at_every_position(driving.make_runner(folder), ids)

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert tiny_models.relative_error(logits, tiny_models.teacher_forced(reference, ids)) < tiny_models.TOLERANCE


def test_llama1_frequencies_in_checkpoint_are_ignored(tmp_path: Path) -> None:
    model = tiny_models.build("llama1")
    tiny_models.save(model, tmp_path)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    save_file({**load_file(tmp_path / "model.safetensors"), **extra}, tmp_path / "model.safetensors")

    driving.make_runner(tmp_path)


# ---- refusals ----


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "tanh"}, "hidden_act='tanh' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 must be 1"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a number"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantize=gptq is known but not built yet"),
    ],
)
def test_unsupported_config_is_refused_by_name(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    tiny_models.save(tiny_models.build("llama1"), tmp_path)
    tiny_models.rewrite_config(tmp_path, **values)

    with pytest.raises(ConfigError, match=message):
        driving.make_runner(tmp_path)


@pytest.mark.parametrize(
    ("variant", "values", "message"),
    [
        ("falcon-7b", {"activation": "tanh"}, "activation='tanh' is not supported; supported are gelu"),
        ("falcon-7b", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=True is not"),
        ("falcon-7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2 must be 1, or 2 with new_decoder_architecture"),
        ("falcon-40b", {"num_kv_heads": 3}, "num_key_value_heads=3 must divide"),
        ("pythia", {"hidden_act": "mish"}, "hidden_act='mish' is not supported"),
        ("pythia", {"rope_scaling": {"type": "ntk"}}, "type='ntk' is not supported; supported are default, dynamic"),
        ("mistral-gqa", {"sliding_window": "4096"}, "sliding_window='4096' must be an integer"),
        ("mixtral", {"hidden_act": "tanh"}, "hidden_act='tanh' is not supported"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 must be at most num_local_experts=8"),
        ("starcoder", {"activation_function": "tanh"}, "activation_function='tanh' is not supported"),
        ("starcoder", {"n_embd": 66}, "n_embd=66 must be a multiple of num_attention_heads=4"),
        ("gpt2", {"n_head": None}, "n_head is missing"),
        ("gptj", {"rotary_dim": 7}, "rotary_dim=7 must be even and at most 16"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False is not supported"),
        ("bloom", {"seq_length": 0}, "seq_length=0 must be an integer of at least 1"),
        ("qwen2", {"layer_types": ["chunked_attention", "full_attention"]}, "each full_attention or sliding_attention"),
        ("phi3", {"hidden_act": "tanh"}, "hidden_act='tanh' is not supported"),
        ("gemma", {"hidden_activation": "tanh"}, "hidden_act='tanh' is not supported"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping=-1.0 must be a number above 0"),
    ],
)
def test_each_architecture_refuses_what_it_does_not_build(
    tmp_path: Path, variant: str, values: dict[str, Any], message: str
) -> None:
    tiny_models.save(tiny_models.build(variant), tmp_path)
    tiny_models.rewrite_config(tmp_path, **values)

    with pytest.raises(ConfigError, match=message):
        driving.make_runner(tmp_path)


@pytest.mark.parametrize("variant", ["falcon-7b", "falcon-rw", "pythia", "mixtral", "mpt", "starcoder", "gpt2", "phi3", "opt"])
def test_missing_and_surplus_tensors_of_any_architecture_are_named(tmp_path: Path, variant: str) -> None:
    tiny_models.save(tiny_models.build(variant), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name, x in tensors.items() if x.dim() == 2 and ".0." in name)
    kept = {name: x for name, x in tensors.items() if name != lost}
    save_file({**kept, "transformer.h.0.attn.other.weight": torch.ones(2)}, tmp_path / "model.safetensors")

    with pytest.raises(CheckpointError) as caught:
        driving.make_runner(tmp_path)

    assert f"1 missing ({lost})" in str(caught.value)
    assert "1 not part of this architecture (transformer.h.0.attn.other.weight)" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 3}, r"9 missing \(model\.layers\.2\.input_layernorm\.weight, .*, \.\.\.\)"),
        ({"num_hidden_layers": 1}, r"9 not part of this architecture \(model\.layers\.1\."),
        ({"intermediate_size": 96}, r"mlp\.gate_proj\.weight has shape \[112, 64\], expected \[96, 64\]"),
        ({"attention_bias": True}, r"8 missing \(model\.layers\.0\.self_attn\.q_proj\.bias"),
    ],
)
def test_checkpoint_unlike_its_config_is_told(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    tiny_models.save(tiny_models.build("llama1"), tmp_path)
    tiny_models.rewrite_config(tmp_path, **values)

    with pytest.raises(CheckpointError, match=message):
        driving.make_runner(tmp_path)
