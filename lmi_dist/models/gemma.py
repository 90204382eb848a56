"""Gemma (Mesnard et al. 2024): Llama with norms that scale by 1 + w, a scaled embedding and wide heads; and Gemma 2 (Riviere et al.
2024): every other layer with a window, norms behind each block too, soft caps on scores and logits."""

import torch

from lmi_dist.batch import ForwardBatch
from lmi_dist.config import ConfigKeys, ModelConfig
from lmi_dist.layers.elementwise import soft_capped
from lmi_dist.models.llama import Layer, LlamaForCausalLM, load_attention, load_mlp, load_norm
from lmi_dist.weights import Weights


def gemma_keys(keys: ConfigKeys) -> dict[str, object]:
    """The first checkpoints say gelu where they mean its approximation by tanh. Raises ConfigError."""
    if keys.boolean("use_bidirectional_attention", default=False):
        raise keys.refuse("use_bidirectional_attention", "is not supported; supported is false")
    said = keys.values.get("hidden_activation") or keys.values.get("hidden_act") or "gelu"
    return {"norm_offset": 1.0, "hidden_act": "gelu_pytorch_tanh" if said == "gelu" else said}


def gemma2_keys(keys: ConfigKeys) -> dict[str, object]:
    """Layers 0, 2, 4 and so on have the window, unless layer_types says otherwise."""
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(keys.integer("num_hidden_layers"))]
    return {**gemma_keys(keys), "layer_types": keys.values.get("layer_types") or kinds}


class GemmaForCausalLM(LlamaForCausalLM):
    """As Llama, with a scaled embedding."""

    @staticmethod
    def embedding_scale(config: ModelConfig, weights: Weights) -> float:
        """sqrt(E), rounded to the model's dtype as in training."""
        return float(torch.tensor(config.hidden_size**0.5, dtype=weights.dtype, device="cpu"))


class Gemma2Layer(Layer):
    """As Llama's, with norms on both sides of attention and feed-forward, and capped scores."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int) -> None:
        keys, prefix = config.keys, f"model.layers.{layer}"
        self.attn_norm = load_norm(config, weights, f"{prefix}.input_layernorm")
        self.attn = load_attention(
            config,
            weights,
            layer,
            scale=keys.number("query_pre_attn_scalar", default=256.0, above=0.0) ** -0.5,
            soft_cap=soft_cap(keys, "attn_logit_softcapping"),
        )
        self.attn_post_norm = load_norm(config, weights, f"{prefix}.post_attention_layernorm")
        self.mlp_norm = load_norm(config, weights, f"{prefix}.pre_feedforward_layernorm")
        self.mlp = load_mlp(config, weights, layer)
        self.mlp_post_norm = load_norm(config, weights, f"{prefix}.post_feedforward_layernorm")

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        x = self.attn_post_norm(self.attn(self.attn_norm(x), batch), addend=x)
        return self.mlp_post_norm(self.mlp(self.mlp_norm(x), batch), addend=x)


class Gemma2ForCausalLM(GemmaForCausalLM):
    """Token ids to capped logits."""

    layer = Gemma2Layer

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None:
        super().__init__(config, weights, max_model_len)
        self.soft_cap = soft_cap(config.keys, "final_logit_softcapping")

    def score(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        logits = super().score(x, batch)
        return soft_capped(logits, self.soft_cap) if self.soft_cap else logits


def soft_cap(keys: ConfigKeys, name: str) -> float:
    """0: none."""
    return keys.number(name, default=0.0, above=0.0)
