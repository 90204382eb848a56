"""BLOOM (Le Scao et al. 2022): ALiBi, a norm behind the embedding, biases everywhere."""

import torch

from lmi_dist.batch import ForwardBatch
from lmi_dist.config import ModelConfig
from lmi_dist.layers.attention import SelfAttention, alibi_slopes
from lmi_dist.layers.mlp import MLP
from lmi_dist.layers.norm import LayerNorm
from lmi_dist.layers.qkv import grouped
from lmi_dist.models.decoder import Decoder, DecoderLayer
from lmi_dist.weights import Weights


class Layer(DecoderLayer):
    """Attention, then feed-forward, each normalised before and added to what came in, or to that normalised."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int) -> None:
        keys, prefix, hidden = config.keys, f"transformer.h.{layer}", config.hidden_size
        eps = keys.number("layer_norm_epsilon", default=1e-5)
        self.adds_normed = keys.boolean("apply_residual_connection_post_layernorm", default=False)
        self.attn_norm = LayerNorm.load(weights, f"{prefix}.input_layernorm", hidden, eps)
        self.attn = SelfAttention.load(
            weights,
            config,
            layer,
            grouped(f"{prefix}.self_attention.query_key_value"),
            f"{prefix}.self_attention.dense",
            bias=True,
            alibi=alibi_slopes(config.num_heads),
        )
        self.mlp_norm = LayerNorm.load(weights, f"{prefix}.post_attention_layernorm", hidden, eps)
        self.mlp = MLP.load(
            weights,
            f"{prefix}.mlp.dense_h_to_4h",
            f"{prefix}.mlp.dense_4h_to_h",
            hidden=hidden,
            feed_forward=4 * hidden,
            activation="gelu_pytorch_tanh",
        )

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        normed = self.attn_norm(x)
        x = self.attn(normed, batch, residual=normed if self.adds_normed else x)
        normed = self.mlp_norm(x)
        return self.mlp(normed, batch, residual=normed if self.adds_normed else x)


class BloomForCausalLM(Decoder):
    """Token ids to logits."""

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None:
        hidden, eps = config.hidden_size, config.keys.number("layer_norm_epsilon", default=1e-5)
        self.load_ends(config, weights, "transformer.word_embeddings", "lm_head")
        self.tokens_norm = LayerNorm.load(weights, "transformer.word_embeddings_layernorm", hidden, eps)
        self.layers = [Layer(config, weights, layer) for layer in range(config.num_layers)]
        self.norm = LayerNorm.load(weights, "transformer.ln_f", hidden, eps)

    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        return self.tokens_norm(self.tokens(batch))
