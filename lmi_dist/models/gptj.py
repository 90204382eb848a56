"""GPT-J (Wang and Komatsuzaki 2021): attention and feed-forward side by side behind one norm; neighbouring numbers of a head's
first part are rotated; biases on the logits."""

import torch

from lmi_dist.batch import ForwardBatch
from lmi_dist.config import ConfigKeys, ModelConfig
from lmi_dist.layers.attention import SelfAttention
from lmi_dist.layers.mlp import ACTIVATIONS, MLP
from lmi_dist.layers.norm import LayerNorm
from lmi_dist.layers.qkv import separate
from lmi_dist.layers.rotary import rotary
from lmi_dist.models.decoder import Decoder, DecoderLayer
from lmi_dist.weights import Weights


def standard_keys(keys: ConfigKeys) -> dict[str, object]:
    head_dim = keys.integer("hidden_size") // keys.integer("num_attention_heads")
    rotary_dim = keys.integer("rotary_dim", default=64)
    if rotary_dim > head_dim or rotary_dim % 2:
        raise keys.refuse("rotary_dim", f"must be even and at most {head_dim}, the size of a head")
    return {"partial_rotary_factor": rotary_dim / head_dim}


class Layer(DecoderLayer):
    """x + attn(norm(x)) + mlp(norm(x))"""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int) -> None:
        keys, prefix, hidden = config.keys, f"transformer.h.{layer}", config.hidden_size
        self.attn_norm = LayerNorm.load(weights, f"{prefix}.ln_1", hidden, keys.number("layer_norm_epsilon", default=1e-5))
        qkv = separate(*(f"{prefix}.attn.{name}_proj" for name in "qkv"))
        self.attn = SelfAttention.load(weights, config, layer, qkv, f"{prefix}.attn.out_proj", interleaved=True)
        self.mlp = MLP.load(
            weights,
            f"{prefix}.mlp.fc_in",
            f"{prefix}.mlp.fc_out",
            hidden=hidden,
            feed_forward=keys.integer("intermediate_size", default=4 * hidden),
            activation=keys.choice("hidden_act", ACTIVATIONS, default="gelu_new"),
        )

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        normed = self.attn_norm(x)
        return self.mlp(normed, batch, residual=self.attn(normed, batch, residual=x))


class GPTJForCausalLM(Decoder):
    """Token ids to logits."""

    ignored = (r"\.attn\.bias", r"\.attn\.masked_bias")  # older checkpoints hold the causal mask

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None:
        self.rotary = rotary(config.rope, config.head_dim, max_model_len, weights.device)
        self.load_ends(config, weights, "transformer.wte", "lm_head", bias=True)
        self.layers = [Layer(config, weights, layer) for layer in range(config.num_layers)]
        eps = config.keys.number("layer_norm_epsilon", default=1e-5)
        self.norm = LayerNorm.load(weights, "transformer.ln_f", config.hidden_size, eps)
