"""What transformers' MptForCausalLM leaves out, against the published definition (tests/reference/mpt.py)."""

import json
from pathlib import Path
from typing import Any

import driving
import mpt
import pytest
import ranks
import tiny_models
import torch
from safetensors.torch import save_file

from lmi_dist.errors import ConfigError

BASE: dict[str, Any] = {
    "architectures": ["MPTForCausalLM"],
    "model_type": "mpt",
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "vocab_size": 128,
    "max_seq_len": 128,
    "no_bias": True,
}
GROUPED = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
SHARED = {"attn_type": "multiquery_attention"}

CASES: dict[str, dict[str, Any]] = {
    "qk-norm": {"attn_config": {"alibi": True, "qk_ln": True}},
    "qk-norm-grouped-biased": {"attn_config": {**GROUPED, "alibi": True, "qk_ln": True}, "no_bias": False},
    "qk-norm-shared-rms": {"attn_config": {**SHARED, "qk_ln": True, "clip_qkv": 0.7}, "norm_type": "low_precision_rmsnorm"},
    "clipped-learned-positions": {"attn_config": {"clip_qkv": 0.5}, "learned_pos_emb": True},
    "no-positions": {"attn_config": {"alibi": False}, "learned_pos_emb": False, "no_bias": False},
    "grouped-positions-scaled": {"attn_config": {**GROUPED, "softmax_scale": 0.4}, "logit_scale": 0.3},
    "shared-scaled-by-width": {"attn_config": {**SHARED, "alibi": True}, "logit_scale": "inv_sqrt_d_model"},
    "biased-odd-heads": {"attn_config": {"alibi": True}, "d_model": 72, "n_heads": 3, "no_bias": False, "expansion_ratio": 2},
    "alibi-of-another-maximum": {"attn_config": {"alibi": True, "alibi_bias_max": 4}, "n_heads": 8},
}


def write(folder: Path, keys: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A checkpoint with random weights; its config and tensors."""
    config = {**BASE, **keys}
    torch.manual_seed(len(str(keys)))
    tensors = {name: torch.randn(shape) * (0.2 if len(shape) == 1 else 0.15) for name, shape in shapes(config).items()}
    for name in tensors:
        if ("norm" in name or "_ln" in name) and name.endswith("weight"):
            tensors[name] += 1
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return config, tensors


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """As published, biases included where they are wanted."""
    width, attention = config["d_model"], config["attn_config"]
    key_width = mpt.num_key_heads(config) * width // config["n_heads"]
    inner = width * config.get("expansion_ratio", 4)
    parts = {"norm_1": (width,), "norm_2": (width,), "attn.Wqkv": (width + 2 * key_width, width), "attn.out_proj": (width, width)}
    parts |= {"ffn.up_proj": (inner, width), "ffn.down_proj": (width, inner)}
    if attention.get("qk_ln"):
        parts |= {"attn.q_ln": (width,), "attn.k_ln": (key_width,)}
    named = {f"transformer.blocks.{i}.{name}": shape for i in range(config["n_layers"]) for name, shape in parts.items()}
    named["transformer.norm_f"] = (width,)
    has_norm_bias = "rms" not in config.get("norm_type", "")
    found = {f"{name}.weight": shape for name, shape in named.items()} | {"transformer.wte.weight": (config["vocab_size"], width)}
    if not config["no_bias"]:
        found |= {f"{n}.bias": s[:1] for n, s in named.items() if has_norm_bias or len(s) == 2}
    if not attention.get("alibi") and config.get("learned_pos_emb", True):
        found["transformer.wpe.weight"] = (config["max_seq_len"], width)
    return found


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_published_definition(tmp_path: Path, case: str, kernels: str) -> None:
    config, tensors = write(tmp_path, CASES[case])
    ids = tuple(torch.randint(0, 128, (40,), generator=torch.Generator().manual_seed(1)).tolist())

    logits = driving.logits_at_every_position(driving.make_runner(tmp_path, kernels), ids)

    assert tiny_models.relative_error(logits, mpt.logits(config, tensors, ids).float()) < tiny_models.TOLERANCE


@pytest.mark.parametrize("case", ["qk-norm-grouped-biased", "grouped-positions-scaled", "qk-norm-shared-rms"])
def test_cut_prompt_has_equal_bits(tmp_path: Path, case: str) -> None:
    write(tmp_path, CASES[case])
    runner = driving.make_runner(tmp_path)
    prompts = {0: tuple(range(30)), 1: tuple(range(50, 70))}
    whole = [driving.run(runner, driving.make_scheduler(runner), {0: prompt}, 16)[0] for prompt in prompts.values()]

    cut = driving.run(runner, driving.make_scheduler(runner, max_prefill_tokens=7, prefill_chunk_tokens=7), prompts, 16)

    assert all(torch.equal(cut[number].rows, course.rows) for number, course in enumerate(whole))


def test_two_ranks_say_the_same(tmp_path: Path) -> None:
    """Norms are over the heads of both ranks; a key head for all is on both."""
    names = [name for name in CASES if name != "biased-odd-heads"]
    for name in names:
        (tmp_path / name).mkdir()
        write(tmp_path / name, CASES[name])
    prompts = [tuple(range(30)), tuple(range(50, 57))]

    first, second = ranks.run(2, lambda link, number: ranks.continue_prompts(link, tmp_path / names[number], prompts), len(names))

    assert [digest for digest, _ in first] == [digest for digest, _ in second]
    for name, (_, courses) in zip(names, first, strict=True):
        runner = driving.make_runner(tmp_path / name)
        alone = driving.run(runner, driving.make_scheduler(runner), dict(enumerate(prompts)))
        for number, course in enumerate(courses):
            assert tiny_models.relative_error(course.rows[:8], alone[number].rows[:8]) < tiny_models.TOLERANCE


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attn_config": {"prefix_lm": True}}, "prefix_lm=True is not supported"),
        ({"attn_config": {"qk_gn": True}}, "qk_gn=True is not supported"),
        ({"attn_config": {"rope": True}}, "rope=True is not supported"),
        ({"attn_config": {"attn_type": "linear"}}, "attn_type='linear' is not supported; supported are grouped_query_attention"),
        ({"attn_config": {"sliding_window_size": 4}}, "sliding_window_size=4 is not supported"),
        ({"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 3}}, "num_key_value_heads=3 must divide"),
        ({"ffn_config": {"ffn_type": "mptglu"}}, "ffn_type='mptglu' is not supported"),
        ({"norm_type": "groupnorm"}, "norm_type='groupnorm' is not supported"),
        ({"logit_scale": "much"}, "logit_scale='much' must be a number"),
    ],
)
def test_option_that_is_not_built_is_refused_by_name(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    write(tmp_path, {"attn_config": {}})
    tiny_models.rewrite_config(tmp_path, **keys)

    with pytest.raises(ConfigError, match=message):
        driving.make_runner(tmp_path)
