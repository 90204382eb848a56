"""Mixtral (Jiang et al. 2024): Mistral whose feed-forward is the weighted sum of the best few of several experts."""

from lmi_dist.config import ModelConfig
from lmi_dist.layers.mlp import ACTIVATIONS
from lmi_dist.layers.moe import SparseMoE
from lmi_dist.models.llama import Layer as LlamaLayer
from lmi_dist.models.llama import LlamaForCausalLM, load_attention, load_norm
from lmi_dist.weights import Weights


class Layer(LlamaLayer):
    """As Llama's, with experts."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int) -> None:
        keys, prefix = config.keys, f"model.layers.{layer}"
        num_experts, top_k = keys.integer("num_local_experts", default=8), keys.integer("num_experts_per_tok", default=2)
        if top_k > num_experts:
            raise keys.refuse("num_experts_per_tok", f"must be at most num_local_experts={num_experts}")
        experts = [f"{prefix}.block_sparse_moe.experts.{x}" for x in range(num_experts)]
        self.attn_norm = load_norm(config, weights, f"{prefix}.input_layernorm")
        self.attn = load_attention(config, weights, layer)
        self.mlp_norm = load_norm(config, weights, f"{prefix}.post_attention_layernorm")
        self.mlp = SparseMoE.load(
            weights,
            f"{prefix}.block_sparse_moe.gate",
            [f"{expert}.w1" for expert in experts],
            [f"{expert}.w3" for expert in experts],
            [f"{expert}.w2" for expert in experts],
            hidden=config.hidden_size,
            feed_forward=keys.integer("intermediate_size"),
            activation=keys.choice("hidden_act", ACTIVATIONS, default="silu"),
            top_k=top_k,
        )


class MixtralForCausalLM(LlamaForCausalLM):
    """Token ids to logits."""

    layer = Layer
