"""MPT as MosaicML published it (MPTForCausalLM of llm-foundry), one token after the other in float64: the reference for what
transformers' own MptForCausalLM leaves out, written by someone who has not seen lmi_dist/models/mpt.py.

What transformers leaves out: query and key normalisation (qk_ln), fewer key heads (kv_n_heads, multiquery_attention),
learned positions, logit_scale, rmsnorm, biases.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5  # torch.nn.LayerNorm's default, which the published code keeps


def logits(config: Mapping[str, Any], tensors: Mapping[str, Tensor], ids: tuple[int, ...]) -> Tensor:
    """float64 [T,V]: the next token's logits at each position. `config`: config.json; `tensors`: the checkpoint's, by name."""
    weights = {name: x.double() for name, x in tensors.items()}
    wants_alibi = attention_config(config)["alibi"]
    x = weights["transformer.wte.weight"][list(ids)]
    if not wants_alibi and config.get("learned_pos_emb", True):
        x = x + weights["transformer.wpe.weight"][: len(ids)]
    for layer in range(config["n_layers"]):
        x = block(config, weights, f"transformer.blocks.{layer}", x)
    x = norm(config, weights, "transformer.norm_f", x)
    return F.linear(x, weights["transformer.wte.weight"]) * logit_scale(config)


def block(config: Mapping[str, Any], weights: Mapping[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    x = x + attention(config, weights, f"{prefix}.attn", norm(config, weights, f"{prefix}.norm_1", x))
    hidden = F.gelu(linear(weights, f"{prefix}.ffn.up_proj", norm(config, weights, f"{prefix}.norm_2", x)))
    return x + linear(weights, f"{prefix}.ffn.down_proj", hidden)


def attention(config: Mapping[str, Any], weights: Mapping[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    """Clip, then split, then normalise over all heads at once, then attend head by head."""
    own = attention_config(config)
    heads, width = config["n_heads"], config["d_model"]
    size = width // heads
    key_heads = num_key_heads(config)
    qkv = linear(weights, f"{prefix}.Wqkv", x)
    if own["clip_qkv"]:
        qkv = qkv.clamp(-own["clip_qkv"], own["clip_qkv"])
    q, k, v = qkv.split([width, key_heads * size, key_heads * size], dim=1)
    if own["qk_ln"]:
        q, k = norm(config, weights, f"{prefix}.q_ln", q), norm(config, weights, f"{prefix}.k_ln", k)
    scale = own["softmax_scale"] or 1 / math.sqrt(size)
    slopes = alibi_slopes(heads, own["alibi_bias_max"]) if own["alibi"] else [0.0] * heads
    outs = []
    for head in range(heads):
        key_head = head // (heads // key_heads)
        mine, theirs = slice(head * size, (head + 1) * size), slice(key_head * size, (key_head + 1) * size)
        outs.append(attend(q[:, mine], k[:, theirs], v[:, theirs], scale, slopes[head]))
    return linear(weights, f"{prefix}.out_proj", torch.cat(outs, dim=1))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, slope: float) -> Tensor:
    """One head; each token sees itself and those before it, with slope * (key - query) added. q, k, v: [T,D]"""
    rows = []
    for i in range(len(q)):
        distances = torch.arange(-i, 1).double()
        scores = (k[: i + 1] @ q[i]) * scale + slope * distances
        rows.append(scores.softmax(dim=0) @ v[: i + 1])
    return torch.stack(rows)


def norm(config: Mapping[str, Any], weights: Mapping[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    weight, bias = weights[f"{prefix}.weight"], weights.get(f"{prefix}.bias")
    if "rmsnorm" in config.get("norm_type", "low_precision_layernorm"):
        return x / torch.sqrt((x * x).mean(dim=1, keepdim=True) + EPS) * weight
    centred = x - x.mean(dim=1, keepdim=True)
    out = centred / torch.sqrt((centred * centred).mean(dim=1, keepdim=True) + EPS) * weight
    return out if bias is None else out + bias


def linear(weights: Mapping[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{prefix}.weight"], weights.get(f"{prefix}.bias"))


def alibi_slopes(heads: int, bias_max: float) -> list[float]:
    """2^(-bias_max * i / n) for the next power of two n; where that is not the number of heads, every second one comes first."""
    n = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** (-bias_max * (i + 1) / n) for i in range(n)]
    return slopes if n == heads else (slopes[1::2] + slopes[::2])[:heads]


def num_key_heads(config: Mapping[str, Any]) -> int:
    own = attention_config(config)
    if own["attn_type"] == "multiquery_attention":
        return 1
    return own["kv_n_heads"] or config["n_heads"] if own["attn_type"] == "grouped_query_attention" else config["n_heads"]


def attention_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """attn_config with the published defaults."""
    defaults = {
        "attn_type": "multihead_attention",
        "alibi": False,
        "alibi_bias_max": 8,
        "clip_qkv": None,
        "kv_n_heads": None,
        "qk_ln": False,
        "softmax_scale": None,
    }
    return {**defaults, **(config.get("attn_config") or {})}


def logit_scale(config: Mapping[str, Any]) -> float:
    scale = config.get("logit_scale")
    if scale is None:
        return 1.0
    return 1 / math.sqrt(config["d_model"]) if scale == "inv_sqrt_d_model" else float(scale)
