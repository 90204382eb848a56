"""Published models build from their config.json, on any rank, out of just the tensors of their checkpoints; nothing is read."""

import json
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from published import PUBLISHED

from lmi_dist.errors import ConfigError
from lmi_dist.link import Link
from lmi_dist.models import model_class, read_config
from lmi_dist.parallel import Ranks
from lmi_dist.weights import Checkpoint, Inventory, TensorInfo

Shapes = dict[str, tuple[int, ...]]
DEGREES = (1, 2, 4, 8)


# ---- what the checkpoints hold ----


@lru_cache
def shapes_of(name: str) -> Shapes:
    """By the published code, where a model came with its own, else by transformers' class of its config."""
    keys = PUBLISHED[name]
    architecture = keys["architectures"][0]
    own = {"RWForCausalLM": refined_web, "GPT2LMHeadCustomModel": santacoder, "MPTForCausalLM": mosaic}
    if architecture in own:
        return own[architecture](keys)
    config = transformers.AutoConfig.for_model(keys["model_type"])
    config = type(config).from_dict({name: value for name, value in keys.items() if name != "torch_dtype"})
    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in getattr(transformers, architecture)(config).state_dict().items()}
    if architecture == "MixtralForCausalLM":
        return experts_apart(shapes)
    # transformers 5 renames GPT-NeoX's head when it reads a file
    return {name.replace("lm_head", "embed_out"): x for name, x in shapes.items()} if keys["model_type"] == "gpt_neox" else shapes


def experts_apart(shapes: Shapes) -> Shapes:
    """transformers 5 holds all experts in one tensor, the files hold each alone."""
    apart: Shapes = {}
    for name, shape in shapes.items():
        layer = name.partition(".mlp.")[0]
        block = f"{layer}.block_sparse_moe"
        if name.endswith("experts.gate_up_proj"):
            apart |= {f"{block}.experts.{x}.{w}.weight": (shape[1] // 2, shape[2]) for x in range(shape[0]) for w in ("w1", "w3")}
        elif name.endswith("experts.down_proj"):
            apart |= {f"{block}.experts.{x}.w2.weight": shape[1:] for x in range(shape[0])}
        else:
            apart[name.replace(".mlp.", ".block_sparse_moe.")] = shape
    return apart


def refined_web(keys: dict[str, Any]) -> Shapes:
    """modelling_RW.py: transformer.h.{i} with self_attention.query_key_value and dense, mlp.dense_h_to_4h and dense_4h_to_h."""
    hidden, heads = keys["hidden_size"], keys["n_head"]
    size, is_new = hidden // heads, "n_head_kv" in keys
    kv_heads = keys["n_head_kv"] if is_new else 1 if keys["multi_query"] else heads
    linears = {
        "self_attention.query_key_value": (hidden + 2 * kv_heads * size, hidden),
        "self_attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (4 * hidden, hidden),
        "mlp.dense_4h_to_h": (hidden, 4 * hidden),
    }
    first = ["ln_attn", "ln_mlp"] if is_new else ["input_layernorm"]
    norms = first if keys["parallel_attn"] else [*first, "post_attention_layernorm"]
    shapes: Shapes = dict.fromkeys(("transformer.word_embeddings.weight", "lm_head.weight"), (keys["vocab_size"], hidden))
    shapes |= with_bias({"transformer.ln_f": (hidden,)}, True)
    for layer in range(keys["n_layer"]):
        prefix = f"transformer.h.{layer}"
        shapes |= with_bias({f"{prefix}.{name}": shape for name, shape in linears.items()}, keys["bias"])
        shapes |= with_bias({f"{prefix}.{name}": (hidden,) for name in norms}, True)
    return shapes


def santacoder(keys: dict[str, Any]) -> Shapes:
    """modeling_gpt2_mq.py: GPT-2 with Conv1D [in,out], q_attn and kv_attn; its causal mask is in the file."""
    hidden, inner, positions = keys["n_embd"], keys["n_inner"], keys["n_positions"]
    linears = {
        "attn.q_attn": (hidden, hidden),
        "attn.kv_attn": (hidden, 2 * hidden // keys["n_head"]),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, inner),
        "mlp.c_proj": (inner, hidden),
    }
    shapes: Shapes = {"transformer.wte.weight": (keys["vocab_size"], hidden), "transformer.wpe.weight": (positions, hidden)}
    shapes |= {"lm_head.weight": (keys["vocab_size"], hidden), **with_bias({"transformer.ln_f": (hidden,)}, True)}
    for layer in range(keys["n_layer"]):
        prefix = f"transformer.h.{layer}"
        for name, shape in linears.items():
            shapes |= {f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": shape[1:]}
        shapes |= with_bias({f"{prefix}.ln_1": (hidden,), f"{prefix}.ln_2": (hidden,)}, True)
        shapes |= {f"{prefix}.attn.bias": (1, 1, positions, positions), f"{prefix}.attn.masked_bias": ()}
    return shapes


def mosaic(keys: dict[str, Any]) -> Shapes:
    """modeling_mpt.py and blocks.py: transformer.blocks.{i} with attn.Wqkv, attn.out_proj, ffn.up_proj, ffn.down_proj, norms."""
    hidden = keys["d_model"]
    inner = keys["expansion_ratio"] * hidden
    parts = {
        "norm_1": (hidden,),
        "attn.Wqkv": (3 * hidden, hidden),
        "attn.out_proj": (hidden, hidden),
        "norm_2": (hidden,),
        "ffn.up_proj": (inner, hidden),
        "ffn.down_proj": (hidden, inner),
    }
    shapes: Shapes = {"transformer.wte.weight": (keys["vocab_size"], hidden), "transformer.norm_f.weight": (hidden,)}
    for layer in range(keys["n_layers"]):
        shapes |= {f"transformer.blocks.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return shapes


def with_bias(shapes: Shapes, bias: bool) -> Shapes:
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    return weights | ({f"{name}.bias": shape[:1] for name, shape in shapes.items()} if bias else {})


# ---- what we ask for ----


def inventory_of(folder: Path, name: str, ranks: Ranks, shapes: Shapes) -> tuple[Inventory, tuple[str, ...]]:
    """The model built on the meta device from a checkpoint with these shapes, and what it ignores."""
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = read_config(folder)
    tensors = {tensor: TensorInfo(folder / "model.safetensors", shape, torch.bfloat16) for tensor, shape in shapes.items()}
    checkpoint = cast(Checkpoint, SimpleNamespace(tensors=tensors))
    inventory = Inventory(checkpoint, torch.bfloat16, Link(ranks), device=torch.device("meta"))
    with torch.device("meta"):
        model = model_class(config.architecture)(config, inventory, min(config.max_position, 4096))
    return inventory, model.ignored


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_model_asks_for_its_checkpoints_tensors(tmp_path: Path, name: str, degree: int) -> None:
    keys, last = PUBLISHED[name], Ranks(degree - 1, degree)
    heads = next((keys[word] for word in ("num_attention_heads", "n_head", "n_heads", "num_heads") if word in keys), 32)  # Llama's

    if heads % degree:
        with pytest.raises(ConfigError, match=f"tensor_parallel_degree={degree} does not divide the attention heads"):
            inventory_of(tmp_path, name, last, shapes_of(name))
        return

    inventory, ignored = inventory_of(tmp_path, name, last, shapes_of(name))

    inventory.verify(ignored)
    assert inventory.num_bytes > 0


def test_sizes_of_published_models_are_right() -> None:
    """Billions of parameters as papers and cards tell them, so that the tables here are not only consistent with themselves."""
    told = {"llama-2-7b": 6.74, "llama-2-70b": 68.98, "llama-3.1-8b": 8.03, "mistral-7b-v0.1": 7.24, "mixtral-8x7b": 46.70,
            "falcon-7b": 6.92, "falcon-40b": 41.3, "gpt-neox-20b": 20.55, "mpt-7b": 6.65, "mpt-30b": 29.96,
            "starcoder": 15.5, "flan-t5-xxl": 11.135, "llava-1.5-7b": 7.06, "llava-v1.6-mistral-7b": 7.57}  # fmt: skip

    for name, billions in told.items():
        config = PUBLISHED[name]
        tied = config.get("tie_word_embeddings", config["architectures"][0] not in ("LlamaForCausalLM", "GPTNeoXForCausalLM"))
        copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *(("lm_head.weight",) if tied else ()))
        shapes = {n: shape for n, shape in shapes_of(name).items() if n not in copies}
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9 == pytest.approx(billions, rel=5e-3), name
