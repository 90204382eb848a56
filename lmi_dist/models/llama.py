"""Llama 1 to 3.x (Touvron et al. 2023; Grattafiori et al. 2024), and what is Llama but for facts of its row in ARCHITECTURES:
Mistral (a sliding window), Qwen 2 (qkv_bias), Qwen 3 (qk_norm), Phi-3 (fused_projections, partial_rotary)."""

from typing import Any

import torch

from lmi_dist.batch import ForwardBatch
from lmi_dist.config import ModelConfig
from lmi_dist.layers.attention import SelfAttention
from lmi_dist.layers.mlp import ACTIVATIONS, GatedMLP
from lmi_dist.layers.moe import SparseMoE
from lmi_dist.layers.norm import PerHead, RMSNorm
from lmi_dist.layers.qkv import joined, separate
from lmi_dist.layers.rotary import rotary
from lmi_dist.models.decoder import Decoder, DecoderLayer
from lmi_dist.weights import Weights


class Layer(DecoderLayer):
    """Attention, then feed-forward, each normalised before and added to what came in."""

    mlp: GatedMLP | SparseMoE

    def __init__(self, config: ModelConfig, weights: Weights, layer: int) -> None:
        prefix = f"model.layers.{layer}"
        self.attn_norm = load_norm(config, weights, f"{prefix}.input_layernorm")
        self.attn = load_attention(config, weights, layer)
        self.mlp_norm = load_norm(config, weights, f"{prefix}.post_attention_layernorm")
        self.mlp = load_mlp(config, weights, layer)

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        x = self.attn(self.attn_norm(x), batch, residual=x)
        return self.mlp(self.mlp_norm(x), batch, residual=x)


class LlamaForCausalLM(Decoder):
    """Token ids to logits."""

    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq",)  # Llama 1 and 2 checkpoints hold what we work out
    layer: type[Layer] = Layer

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None:
        if config.rope.partial != 1.0 and not config.keys.boolean("partial_rotary", default=False):
            raise config.keys.refuse("partial_rotary_factor", f"must be 1 for {config.architecture}")
        self.rotary = rotary(config.rope, config.head_dim, max_model_len, weights.device)
        self.load_ends(config, weights, "model.embed_tokens", "lm_head", scale=self.embedding_scale(config, weights))
        self.layers = [self.layer(config, weights, layer) for layer in range(config.num_layers)]
        self.norm = load_norm(config, weights, "model.norm")

    @staticmethod
    def embedding_scale(config: ModelConfig, weights: Weights) -> float:
        return 1.0


def load_norm(config: ModelConfig, weights: Weights, prefix: str, size: int | None = None) -> RMSNorm:
    eps, offset = config.keys.number("rms_norm_eps", default=1e-6), config.keys.number("norm_offset", default=0.0)
    return RMSNorm.load(weights, prefix, size or config.hidden_size, eps, offset=offset)


def load_attention(config: ModelConfig, weights: Weights, layer: int, **options: Any) -> SelfAttention:
    """Grouped-query attention with rotary positions. `options`: PagedAttention's."""
    keys, prefix = config.keys, f"model.layers.{layer}.self_attn"
    is_fused = keys.boolean("fused_projections", default=False)
    bias = keys.boolean("attention_bias", default=False)
    norms = [f"{prefix}.q_norm", f"{prefix}.k_norm"] if keys.boolean("qk_norm", default=False) else []
    return SelfAttention.load(
        weights,
        config,
        layer,
        joined(f"{prefix}.qkv_proj") if is_fused else separate(f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj"),
        f"{prefix}.o_proj",
        bias=keys.boolean("qkv_bias", default=bias),
        out_bias=bias,
        qk_norm=tuple(PerHead(load_norm(config, weights, norm, config.head_dim)) for norm in norms) or None,
        **options,
    )


def load_mlp(config: ModelConfig, weights: Weights, layer: int) -> GatedMLP:
    keys, prefix = config.keys, f"model.layers.{layer}.mlp"
    is_fused = keys.boolean("fused_projections", default=False)
    gate, up = ["gate_up_proj", "gate_up_proj"] if is_fused else ["gate_proj", "up_proj"]
    return GatedMLP.load(
        weights,
        f"{prefix}.{gate}",
        f"{prefix}.{up}",
        f"{prefix}.down_proj",
        hidden=config.hidden_size,
        feed_forward=keys.integer("intermediate_size"),
        activation=keys.choice("hidden_act", ACTIVATIONS, default="silu"),
        bias=keys.boolean("mlp_bias", default=False),
    )
