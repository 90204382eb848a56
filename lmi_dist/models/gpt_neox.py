"""GPT-NeoX (Black et al. 2022): part of each head is rotated; attention and feed-forward side by side, behind a norm each, or one
after the other. Pythia, Dolly 2 and StableLM-alpha are such models."""

import torch

from lmi_dist.batch import ForwardBatch
from lmi_dist.config import ModelConfig
from lmi_dist.layers.attention import SelfAttention
from lmi_dist.layers.mlp import ACTIVATIONS, MLP
from lmi_dist.layers.norm import LayerNorm
from lmi_dist.layers.qkv import grouped
from lmi_dist.layers.rotary import rotary
from lmi_dist.models.decoder import Decoder, DecoderLayer
from lmi_dist.weights import Weights


class Layer(DecoderLayer):
    """x + attn(norm(x)) + mlp(norm'(x)), or the two in a row."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int) -> None:
        keys, prefix, hidden = config.keys, f"gpt_neox.layers.{layer}", config.hidden_size
        eps = keys.number("layer_norm_eps", default=1e-5)
        self.is_parallel = keys.boolean("use_parallel_residual", default=True)
        self.attn_norm = LayerNorm.load(weights, f"{prefix}.input_layernorm", hidden, eps)
        self.attn = SelfAttention.load(
            weights,
            config,
            layer,
            grouped(f"{prefix}.attention.query_key_value"),
            f"{prefix}.attention.dense",
            bias=keys.boolean("attention_bias", default=True),
        )
        self.mlp_norm = LayerNorm.load(weights, f"{prefix}.post_attention_layernorm", hidden, eps)
        self.mlp = MLP.load(
            weights,
            f"{prefix}.mlp.dense_h_to_4h",
            f"{prefix}.mlp.dense_4h_to_h",
            hidden=hidden,
            feed_forward=keys.integer("intermediate_size", default=4 * hidden),
            activation=keys.choice("hidden_act", ACTIVATIONS, default="gelu"),
        )

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        normed = self.mlp_norm(x) if self.is_parallel else None
        attended = self.attn(self.attn_norm(x), batch, residual=x)
        return self.mlp(self.mlp_norm(attended) if normed is None else normed, batch, residual=attended)


class GPTNeoXForCausalLM(Decoder):
    """Token ids to logits."""

    ignored = (r"\.attention\.bias", r"\.attention\.masked_bias", r"rotary_emb\.inv_freq")  # older checkpoints: masks, frequencies

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None:
        self.rotary = rotary(config.rope, config.head_dim, max_model_len, weights.device)
        self.load_ends(config, weights, "gpt_neox.embed_in", "embed_out")
        self.layers = [Layer(config, weights, layer) for layer in range(config.num_layers)]
        eps = config.keys.number("layer_norm_eps", default=1e-5)
        self.norm = LayerNorm.load(weights, "gpt_neox.final_layer_norm", config.hidden_size, eps)
