"""GPT-2 (Radford et al. 2019): learned positions, biases everywhere, linears that lie transposed in the file (Conv1D)."""

import torch

from lmi_dist.batch import ForwardBatch
from lmi_dist.config import ConfigKeys, ModelConfig
from lmi_dist.layers.attention import SelfAttention
from lmi_dist.layers.embedding import Positions
from lmi_dist.layers.mlp import ACTIVATIONS, MLP
from lmi_dist.layers.norm import LayerNorm
from lmi_dist.layers.qkv import Layout, joined
from lmi_dist.models.decoder import Decoder, DecoderLayer
from lmi_dist.weights import Weights


class Layer(DecoderLayer):
    """Attention, then feed-forward, each normalised before and added to what came in."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int, qkv: Layout, *, transposed: bool) -> None:
        keys, prefix, hidden = config.keys, f"transformer.h.{layer}", config.hidden_size
        eps = keys.number("layer_norm_epsilon", default=1e-5)
        self.attn_norm = LayerNorm.load(weights, f"{prefix}.ln_1", hidden, eps)
        self.attn = SelfAttention.load(
            weights,
            config,
            layer,
            qkv,
            f"{prefix}.attn.c_proj",
            bias=True,
            transposed=transposed,
            scale=attention_scale(keys, config.head_dim, layer),
        )
        self.mlp_norm = LayerNorm.load(weights, f"{prefix}.ln_2", hidden, eps)
        self.mlp = MLP.load(
            weights,
            f"{prefix}.mlp.c_fc",
            f"{prefix}.mlp.c_proj",
            hidden=hidden,
            feed_forward=keys.integer("intermediate_size", default=4 * hidden),
            activation=keys.choice("hidden_act", ACTIVATIONS, default="gelu_new"),
            transposed=transposed,
        )

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        x = self.attn(self.attn_norm(x), batch, residual=x)
        return self.mlp(self.mlp_norm(x), batch, residual=x)


class GPT2LMHeadModel(Decoder):
    """Token ids to logits."""

    ignored: tuple[str, ...] = (r"\.attn\.bias", r"\.attn\.masked_bias")  # older checkpoints hold the causal mask

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None:
        self.load_ends(config, weights, "transformer.wte", "lm_head")
        self.positions = Positions.load(weights, "transformer.wpe", config.max_position, config.hidden_size)
        self.layers = [self.load_layer(config, weights, layer) for layer in range(config.num_layers)]
        eps = config.keys.number("layer_norm_epsilon", default=1e-5)
        self.norm = LayerNorm.load(weights, "transformer.ln_f", config.hidden_size, eps)

    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        return self.positions(self.tokens(batch), batch)

    def load_layer(self, config: ModelConfig, weights: Weights, layer: int) -> Layer:
        return Layer(config, weights, layer, joined(f"transformer.h.{layer}.attn.c_attn"), transposed=True)


def attention_scale(keys: ConfigKeys, head_dim: int, layer: int) -> float:
    """1 / sqrt(D), or 1, divided by the layer's number if asked for."""
    scale = head_dim**-0.5 if keys.boolean("scale_attn_weights", default=True) else 1.0
    return scale / (layer + 1) if keys.boolean("scale_attn_by_inverse_layer_idx", default=False) else scale
