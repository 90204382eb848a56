"""Llama 1 to 3.x (Touvron et al. 2023; Grattafiori et al. 2024) and Mistral (Jiang et al. 2023): Llama with a sliding window."""

import torch

from lmi_dist.batch import ForwardBatch
from lmi_dist.config import ModelConfig
from lmi_dist.layers.attention import PagedAttention
from lmi_dist.layers.embedding import Embedding, Head
from lmi_dist.layers.linear import Linear
from lmi_dist.layers.mlp import ACTIVATIONS, GatedMLP
from lmi_dist.layers.norm import RMSNorm
from lmi_dist.layers.rotary import rotary
from lmi_dist.parallel import Heads
from lmi_dist.weights import Weights


class Attention:
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int, window: int) -> None:
        prefix = f"model.layers.{layer}.self_attn"
        bias = config.keys.boolean("attention_bias", default=False)
        heads = Heads.share(weights.ranks, config.num_heads, config.num_kv_heads, config.head_dim)
        self.qkv = Linear.load(
            weights,
            [f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj"],
            "outputs",
            inputs=config.hidden_size,
            outputs=[size * config.head_dim for size in (config.num_heads, config.num_kv_heads, config.num_kv_heads)],
            parts=[heads.query_features, heads.key_features, heads.key_features],
            bias=bias,
        )
        self.out = Linear.load(
            weights,
            [f"{prefix}.o_proj"],
            "inputs",
            inputs=config.num_heads * config.head_dim,
            outputs=[config.hidden_size],
            parts=[heads.query_features],
            bias=bias,
        )
        self.attend = PagedAttention(layer, heads, window=window)

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        return self.out(self.attend(self.qkv(x, batch), batch), batch)


class Layer:
    """Attention, then feed-forward, each normalised before and added to what came in."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int, window: int) -> None:
        prefix, keys, hidden = f"model.layers.{layer}", config.keys, config.hidden_size
        eps = keys.number("rms_norm_eps", default=1e-6)
        self.attn_norm = RMSNorm.load(weights, f"{prefix}.input_layernorm", hidden, eps)
        self.attn = Attention(config, weights, layer, window)
        self.mlp_norm = RMSNorm.load(weights, f"{prefix}.post_attention_layernorm", hidden, eps)
        self.mlp = GatedMLP.load(
            weights,
            f"{prefix}.mlp.gate_proj",
            f"{prefix}.mlp.up_proj",
            f"{prefix}.mlp.down_proj",
            hidden=hidden,
            feed_forward=keys.integer("intermediate_size"),
            activation=keys.choice("hidden_act", ACTIVATIONS, default="silu"),
            bias=keys.boolean("mlp_bias", default=False),
        )

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        x = x + self.attn(self.attn_norm(x), batch)
        return x + self.mlp(self.mlp_norm(x), batch)


class LlamaForCausalLM:
    """Token ids to logits."""

    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq",)  # Llama 1 and 2 checkpoints hold what we work out

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None:
        hidden, vocab = config.hidden_size, config.vocab_size
        if config.rope.partial != 1.0:
            raise config.keys.refuse("partial_rotary_factor", f"must be 1 for {config.architecture}")
        self.rotary = rotary(config.rope, config.head_dim, max_model_len)
        self.embed = Embedding.load(weights, "model.embed_tokens", vocab, hidden)
        self.layers = [Layer(config, weights, layer, self.window(config)) for layer in range(config.num_layers)]
        self.norm = RMSNorm.load(weights, "model.norm", hidden, config.keys.number("rms_norm_eps", default=1e-6))
        self.head = Head.load(weights, "model.embed_tokens" if config.tied_embeddings else "lm_head", vocab, hidden)
        if config.tied_embeddings:
            self.ignored = (*self.ignored, r"lm_head\.weight")

    def __call__(self, batch: ForwardBatch) -> torch.Tensor:
        batch = self.rotary(batch)
        x = self.embed(batch)
        for layer in self.layers:
            x = layer(x, batch)
        return self.head(self.norm(x[batch.output_rows]), batch)

    def cache_regime(self, prompt_length: int) -> str:
        return self.rotary.regime(prompt_length)

    @staticmethod
    def window(config: ModelConfig) -> int:
        """Keys that a token sees; 0: all. Llama has no window, whatever its config.json says."""
        return 0


class MistralForCausalLM(LlamaForCausalLM):
    """As Llama, with a window."""

    @staticmethod
    def window(config: ModelConfig) -> int:
        return config.sliding_window or 0
