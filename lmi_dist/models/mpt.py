"""MPT (MosaicML 2023, llm-foundry): ALiBi or learned positions, no biases unless asked for, and options of attention: queries and
keys normalised, projections clipped, fewer key heads. The published code rules where transformers' class leaves them out."""

import torch

from lmi_dist.batch import ForwardBatch
from lmi_dist.config import ConfigKeys, ModelConfig
from lmi_dist.layers.attention import SelfAttention, alibi_slopes
from lmi_dist.layers.elementwise import scaled
from lmi_dist.layers.embedding import Positions
from lmi_dist.layers.mlp import MLP
from lmi_dist.layers.norm import AcrossHeads, LayerNorm, RMSNorm
from lmi_dist.layers.qkv import joined
from lmi_dist.models.decoder import Decoder, DecoderLayer
from lmi_dist.parallel import Heads
from lmi_dist.weights import WHOLE, Weights

NORMS = ("layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm")
ATTENTIONS = ("multihead_attention", "multiquery_attention", "grouped_query_attention")


def standard_keys(keys: ConfigKeys) -> dict[str, object]:
    """What attn_config and ffn_config say. Raises ConfigError for what the published code knows and this does not."""
    attention, heads, hidden = keys.section("attn_config"), keys.integer("num_attention_heads"), keys.integer("hidden_size")
    kind = attention.choice("attn_type", ATTENTIONS, default="multihead_attention")
    kv_heads = {"multiquery_attention": 1, "grouped_query_attention": attention.integer("kv_n_heads", default=heads)}.get(
        kind, heads
    )
    for name in ("prefix_lm", "qk_gn", "rope", "attn_uses_sequence_id"):
        if attention.boolean(name, default=False):
            raise attention.refuse(name, "is not supported; supported is false")
    if attention.integer("sliding_window_size", default=-1, minimum=-1) != -1:
        raise attention.refuse("sliding_window_size", "is not supported; supported is -1")
    feed_forward = keys.section("ffn_config")
    feed_forward.choice("ffn_type", ("mptmlp",), default="mptmlp")
    feed_forward.section("ffn_act_fn").choice("name", ("gelu",), default="gelu")
    expanded = int(hidden * keys.number("expansion_ratio", default=4.0))
    return {
        "num_key_value_heads": kv_heads,
        "intermediate_size": feed_forward.integer("ffn_hidden_size", default=expanded),
        "has_bias": not keys.boolean("no_bias", default=False),
        "logit_scale": hidden**-0.5 if keys.values.get("logit_scale") == "inv_sqrt_d_model" else keys.values.get("logit_scale"),
    }


def load_attention(config: ModelConfig, weights: Weights, layer: int) -> SelfAttention:
    """Attention with clipped projections and normalised queries and keys, if asked for."""
    keys, prefix, size = config.keys.section("attn_config"), f"transformer.blocks.{layer}.attn", config.head_dim
    qk_norm, link = None, weights.link
    if keys.boolean("qk_ln", default=False):
        heads = Heads.share(weights.ranks, config.num_heads, config.num_kv_heads, size)
        qk_norm = (
            AcrossHeads(load_norm(config, weights, f"{prefix}.q_ln", config.num_heads * size, heads.query_features), link),
            AcrossHeads(load_norm(config, weights, f"{prefix}.k_ln", config.num_kv_heads * size, heads.key_features), link),
        )
    return SelfAttention.load(
        weights,
        config,
        layer,
        joined(f"{prefix}.Wqkv"),
        f"{prefix}.out_proj",
        bias=config.keys.boolean("has_bias", default=False),
        alibi=alibi_slopes(config.num_heads, keys.number("alibi_bias_max", default=8.0)) if has_alibi(config) else None,
        clip=keys.number("clip_qkv", default=0.0, above=0.0),
        scale=keys.number("softmax_scale", default=None, above=0.0),
        qk_norm=qk_norm,
    )


class Layer(DecoderLayer):
    """Attention, then feed-forward, each normalised before and added to what came in."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int) -> None:
        prefix, hidden = f"transformer.blocks.{layer}", config.hidden_size
        self.attn_norm = load_norm(config, weights, f"{prefix}.norm_1", hidden)
        self.attn = load_attention(config, weights, layer)
        self.mlp_norm = load_norm(config, weights, f"{prefix}.norm_2", hidden)
        self.mlp = MLP.load(
            weights,
            f"{prefix}.ffn.up_proj",
            f"{prefix}.ffn.down_proj",
            hidden=hidden,
            feed_forward=config.keys.integer("intermediate_size"),
            activation="gelu",
            bias=config.keys.boolean("has_bias", default=False),
        )

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        x = self.attn(self.attn_norm(x), batch, residual=x)
        return self.mlp(self.mlp_norm(x), batch, residual=x)


class MptForCausalLM(Decoder):
    """Token ids to scaled logits."""

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None:
        keys = config.keys
        self.load_ends(config, weights, "transformer.wte", "lm_head")
        self.positions: Positions | None = None
        if not has_alibi(config) and keys.boolean("learned_pos_emb", default=True):
            self.positions = Positions.load(weights, "transformer.wpe", config.max_position, config.hidden_size)
        self.layers = [Layer(config, weights, layer) for layer in range(config.num_layers)]
        self.norm = load_norm(config, weights, "transformer.norm_f", config.hidden_size)
        self.logit_scale = keys.number("logit_scale", default=1.0)

    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        x = self.tokens(batch)
        return x if self.positions is None else self.positions(x, batch)

    def score(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        logits = super().score(x, batch)
        return logits if self.logit_scale == 1.0 else scaled(logits, self.logit_scale)


def has_alibi(config: ModelConfig) -> bool:
    return config.keys.section("attn_config").boolean("alibi", default=False)


def load_norm(config: ModelConfig, weights: Weights, prefix: str, size: int, part: slice = WHOLE) -> LayerNorm | RMSNorm:
    """norm_type's norm, or `part` of it."""
    keys = config.keys
    eps = keys.number("layer_norm_epsilon", default=1e-5)  # torch's default, which the published code keeps
    if "rms" in keys.choice("norm_type", NORMS, default="low_precision_layernorm"):
        return RMSNorm.load(weights, prefix, size, eps, part=part)
    return LayerNorm.load(weights, prefix, size, eps, bias=keys.boolean("has_bias", default=False), part=part)
