"""Falcon (Almazrouei et al. 2023). 7b: one key head, attention and feed-forward side by side behind one norm; 40b, 180b and 11b
(the "new decoder"): groups of heads, side by side behind two norms or one; rw-1b: ALiBi, biases, one block after the other."""

import torch

from lmi_dist.batch import ForwardBatch
from lmi_dist.config import ConfigKeys, ModelConfig
from lmi_dist.layers.attention import SelfAttention, alibi_slopes
from lmi_dist.layers.mlp import ACTIVATIONS, MLP
from lmi_dist.layers.norm import LayerNorm
from lmi_dist.layers.qkv import grouped
from lmi_dist.layers.rotary import rotary
from lmi_dist.models.decoder import Decoder, DecoderLayer
from lmi_dist.weights import Weights


def standard_keys(keys: ConfigKeys) -> dict[str, object]:
    """The first 40b says nothing of a new decoder, but is the only one of its time with n_head_kv."""
    heads = keys.integer("num_attention_heads")
    is_new = keys.boolean("new_decoder_architecture", default="n_head_kv" in keys)
    if is_new:
        kv_heads = keys.integer("num_kv_heads", default=keys.integer("n_head_kv", default=heads))
    else:
        kv_heads = 1 if keys.boolean("multi_query", default=True) else heads
    if keys.boolean("apply_residual_connection_post_layernorm", default=False):
        raise keys.refuse("apply_residual_connection_post_layernorm", "is not supported; supported is false")
    num_norms = keys.integer("num_ln_in_parallel_attn", default=2 if is_new else 1)
    if num_norms > (2 if is_new else 1):
        raise keys.refuse("num_ln_in_parallel_attn", "must be 1, or 2 with new_decoder_architecture")
    return {
        "num_key_value_heads": kv_heads,
        "new_decoder_architecture": is_new,
        "parallel_attn": is_new or keys.boolean("parallel_attn", default=True),
        "num_ln_in_parallel_attn": num_norms,
    }


class Layer(DecoderLayer):
    """One block after the other; or side by side, behind a norm each or behind the same one."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int) -> None:
        keys, prefix, hidden = config.keys, f"transformer.h.{layer}", config.hidden_size
        eps, bias = keys.number("layer_norm_epsilon", default=1e-5), keys.boolean("bias", default=False)
        self.is_parallel = keys.boolean("parallel_attn", default=True)
        has_two_norms = keys.integer("num_ln_in_parallel_attn") == 2
        # ALiBi is added to the products before they are scaled. transformers rounds slope * position to bf16, this does not
        alibi = alibi_slopes(config.num_heads) * config.head_dim**-0.5 if keys.boolean("alibi", default=False) else None
        self.attn_norm = LayerNorm.load(weights, f"{prefix}.{'ln_attn' if has_two_norms else 'input_layernorm'}", hidden, eps)
        attention = f"{prefix}.self_attention"
        self.attn = SelfAttention.load(
            weights, config, layer, grouped(f"{attention}.query_key_value"), f"{attention}.dense", bias=bias, alibi=alibi
        )
        if has_two_norms or not self.is_parallel:
            name = "ln_mlp" if has_two_norms else "post_attention_layernorm"
            self.mlp_norm: LayerNorm | None = LayerNorm.load(weights, f"{prefix}.{name}", hidden, eps)
        else:
            self.mlp_norm = None
        self.mlp = MLP.load(
            weights,
            f"{prefix}.mlp.dense_h_to_4h",
            f"{prefix}.mlp.dense_4h_to_h",
            hidden=hidden,
            feed_forward=keys.integer("intermediate_size", default=4 * hidden),
            activation=keys.choice("hidden_act", ACTIVATIONS, default="gelu"),
            bias=bias,
        )

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        normed = self.attn_norm(x)
        if self.is_parallel:
            side = normed if self.mlp_norm is None else self.mlp_norm(x)
            return self.mlp(side, batch, residual=self.attn(normed, batch, residual=x))
        assert self.mlp_norm is not None, "blocks in a row have a norm each"
        attended = self.attn(normed, batch, residual=x)
        return self.mlp(self.mlp_norm(attended), batch, residual=attended)


class FalconForCausalLM(Decoder):
    """Token ids to logits."""

    ignored = (r"rotary\.inv_freq", r"rotary_emb\.inv_freq", r"maybe_rotary\.inv_freq")

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None:
        if not config.keys.boolean("alibi", default=False):
            self.rotary = rotary(config.rope, config.head_dim, max_model_len, weights.device)
        self.load_ends(config, weights, "transformer.word_embeddings", "lm_head")
        self.layers = [Layer(config, weights, layer) for layer in range(config.num_layers)]
        eps = config.keys.number("layer_norm_epsilon", default=1e-5)
        self.norm = LayerNorm.load(weights, "transformer.ln_f", config.hidden_size, eps)
