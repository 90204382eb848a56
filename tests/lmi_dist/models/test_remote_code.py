"""Checkpoints that were published with Python code of their own load without it, and say what transformers' layout of them says."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import driving
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Settled

Tensors = dict[str, torch.Tensor]
Keys = dict[str, Any]


def renamed(keys: Keys, names: Mapping[str, str], *dropped: str) -> Keys:
    return {names.get(name, name): value for name, value in keys.items() if name not in dropped}


def refined_web(keys: Keys, tensors: Tensors) -> tuple[Keys, Tensors]:
    """Falcon's first name: other words, a key head count only where there are groups, nothing of a new decoder."""
    is_new = keys["new_decoder_architecture"]
    own = {"architectures": ["RWForCausalLM"], "model_type": "RefinedWeb" if is_new else "RefinedWebModel"}
    names = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "dtype": "torch_dtype"}
    dropped = ("new_decoder_architecture", "num_kv_heads", "num_ln_in_parallel_attn", "ffn_hidden_size", "rope_parameters",
               "activation", "max_position_embeddings", "tie_word_embeddings")  # fmt: skip
    head = {} if "lm_head.weight" in tensors else {"lm_head.weight": tensors["transformer.word_embeddings.weight"].clone()}
    groups = {"n_head_kv": keys["num_kv_heads"]} if is_new else {}
    return {**renamed(keys, names, *dropped), **own, **groups}, {**tensors, **head}


def santacoder(keys: Keys, tensors: Tensors) -> tuple[Keys, Tensors]:
    """GPT-2's transposed linears, keys and values apart from queries, or the three joined; a causal mask in the file."""
    is_shared = keys["multi_query"]
    own = {"architectures": ["GPT2LMHeadCustomModel"], "model_type": "gpt2"}
    own["attention_head_type"] = "multiquery" if is_shared else "multihead"
    laid: Tensors = {}
    for name, x in tensors.items():
        if ".c_attn." in name:
            laid |= attention(name, x, keys["n_embd"], keys["n_head"], is_shared)
        else:
            laid[name] = transposed(x) if name.endswith(("c_proj.weight", "c_fc.weight")) else x
    laid["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    return {**renamed(keys, {}, "multi_query", "tie_word_embeddings"), **own}, laid


def attention(name: str, x: torch.Tensor, hidden: int, heads: int, is_shared: bool) -> Tensors:
    if is_shared:
        query, key_value = transposed(x[:hidden]), transposed(x[hidden:])
        return {name.replace("c_attn", "q_attn"): query, name.replace("c_attn", "kv_attn"): key_value}
    by_head = x.view(heads, 3, hidden // heads, *x.shape[1:])
    return {name: transposed(by_head.transpose(0, 1).reshape(x.shape))}


def transposed(x: torch.Tensor) -> torch.Tensor:
    return (x.T if x.dim() == 2 else x).contiguous()


def mosaic(keys: Keys, tensors: Tensors) -> tuple[Keys, Tensors]:
    """llm-foundry's words: what transformers' config leaves out, and no default that is transformers' own."""
    own = {"architectures": ["MPTForCausalLM"], "no_bias": True, "expansion_ratio": 4, "init_device": "cpu", "resid_pdrop": 0}
    own["attn_config"] = {**keys["attn_config"], "attn_impl": "torch", "alibi": True}
    return {**keys, **own}, tensors


def neox_of_transformers_4(keys: Keys, tensors: Tensors) -> tuple[Keys, Tensors]:
    """rotary_pct and rotary_emb_base, the masks and frequencies in the file."""
    rope = keys["rope_parameters"]
    own = {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}
    prefix = "gpt_neox.layers.0.attention"
    held = {"bias": torch.ones(1, 1, 8, 8), "masked_bias": torch.tensor(-1e9), "rotary_emb.inv_freq": torch.ones(4)}
    extra = {f"{prefix}.{name}": x for name, x in held.items()}
    return {**renamed(keys, {"dtype": "torch_dtype"}, "rope_parameters"), **own}, {**tensors, **extra}


Layout = Callable[[Keys, Tensors], tuple[Keys, Tensors]]
CASES: list[tuple[str, Layout]] = [
    ("falcon-7b", refined_web),
    ("falcon-40b", refined_web),
    ("falcon-rw", refined_web),
    ("falcon-rw-six-heads", refined_web),
    ("starcoder", santacoder),
    ("starcoder-inner", santacoder),
    ("starcoder-own-keys", santacoder),
    ("starcoder-unscaled", santacoder),
    ("mpt", mosaic),
    ("mpt-clipped", mosaic),
    ("mpt-six-heads", mosaic),
    ("pythia", neox_of_transformers_4),
    ("neox-in-a-row-theta", neox_of_transformers_4),
]


@pytest.mark.parametrize(("variant", "layout"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_layout_of_its_own_code_says_the_same(
    settled: Callable[[str], Settled], tmp_path: Path, variant: str, layout: Layout
) -> None:
    folder, _, references = settled(variant)
    keys, tensors = layout(json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({**keys, "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}))
    save_file(tensors, tmp_path / "model.safetensors")
    ids = (*references[1].prompt, *references[1].ids[:5])

    logits = [driving.logits_at_every_position(driving.make_runner(each), ids) for each in (folder, tmp_path)]

    assert torch.equal(logits[0], logits[1])
    assert tiny_models.relative_error(logits[1][-6:], references[1].logits[:6]) < tiny_models.TOLERANCE
