"""T5 (Raffel et al. 2020), its versions 1.1 (gated, untied), Flan-T5 (Chung et al. 2022) and UL2 (Tay et al. 2023).

Encoder and decoder: the encoder reads its input whole, both ways, and leaves each decoder layer's cross keys in the KV pool.
Scores are not scaled; positions are a bias by distance, which all layers of a stack share.
"""

import torch

from lmi_dist.batch import ForwardBatch
from lmi_dist.config import ConfigKeys, ModelConfig
from lmi_dist.layers.attention import CrossAttention, RelativeBias, SelfAttention
from lmi_dist.layers.embedding import Embedding, Head, output_rows
from lmi_dist.layers.linear import Linear
from lmi_dist.layers.mlp import ACTIVATIONS
from lmi_dist.layers.norm import RMSNorm
from lmi_dist.layers.qkv import separate
from lmi_dist.parallel import Heads
from lmi_dist.weights import Weights

# feed_forward_proj to the kernels' name; the tanh form of gelu is T5's own meaning of that one word
FEED_FORWARDS = {
    **ACTIVATIONS,
    **{f"gated-{name}": act for name, act in ACTIVATIONS.items()},
    "gated-gelu": ACTIVATIONS["gelu_new"],
}


class Norm:
    """RMSNorm from the residual stream's dtype to the model's. x: [T,E]"""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        weight = weights.tensor(f"{prefix}.weight", (config.hidden_size,)).to(stream_dtype(weights))
        self.norm = RMSNorm(weight, config.keys.number("layer_norm_epsilon", default=1e-6))
        self.dtype = weights.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x).to(self.dtype)


class TextAttention:
    """x + attn(norm(x)). In the encoder (causal false) of all tokens to all, in the decoder of each to those before."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, layer: int, bias: RelativeBias, *, causal: bool) -> None:
        parts, out = separate(*(f"{prefix}.SelfAttention.{part}" for part in "qkv")), f"{prefix}.SelfAttention.o"
        self.norm = Norm(config, weights, f"{prefix}.layer_norm")
        self.attn = SelfAttention.load(weights, config, layer, parts, out, scale=1.0, causal=causal, relative_bias=bias)

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        attended = self.attn.attend(self.attn.qkv(self.norm(x), batch), batch)
        return self.attn.out(attended, batch, residual=x, out_dtype=x.dtype)


class EncoderAttention:
    """x + attn(norm(x)), of the decoder's tokens to the encoder's."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, layer: int) -> None:
        hidden, inner = config.hidden_size, config.num_heads * config.head_dim
        self.norm = Norm(config, weights, f"{prefix}.layer_norm")
        self.q = Linear.load(weights, [f"{prefix}.EncDecAttention.q"], "outputs", inputs=hidden, outputs=[inner])
        parts = [f"{prefix}.EncDecAttention.{part}" for part in "kv"]
        self.kv = Linear.load(weights, parts, "outputs", inputs=hidden, outputs=[inner] * 2)
        self.out = Linear.load(weights, [f"{prefix}.EncDecAttention.o"], "inputs", inputs=inner, outputs=[hidden])
        self.attend = CrossAttention(layer, config.head_dim, scale=1.0)

    def remember(self, encoded: torch.Tensor, batch: ForwardBatch) -> None:
        """Write what the encoder made of its batch as this layer's keys. encoded: [T,E]"""
        self.attend.write(self.kv(encoded, batch), batch)

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        attended = self.attend(self.q(self.norm(x), batch), batch)
        return self.out(attended, batch, residual=x, out_dtype=x.dtype)


class FeedForward:
    """x + wo(act(wi norm(x))), or x + wo(act(wi_0 norm(x)) * wi_1 norm(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        kind = config.keys.choice("feed_forward_proj", FEED_FORWARDS, default="relu")
        is_gated = kind.startswith("gated-")
        parts = [f"{prefix}.DenseReluDense.{part}" for part in (("wi_0", "wi_1") if is_gated else ("wi",))]
        hidden, inner = config.hidden_size, config.keys.integer("intermediate_size")
        self.norm = Norm(config, weights, f"{prefix}.layer_norm")
        self.into = Linear.load(weights, parts, "outputs", inputs=hidden, outputs=[inner] * len(parts), gated=is_gated)
        self.out = Linear.load(weights, [f"{prefix}.DenseReluDense.wo"], "inputs", inputs=inner, outputs=[hidden])
        self.activation = FEED_FORWARDS[kind]

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        inner = self.into(self.norm(x), batch, activation=self.activation)
        return self.out(inner, batch, residual=x, out_dtype=x.dtype)


class EncoderLayer:
    """An encoder layer's own keys are needed only while it runs: they lie where the decoder's first cross keys will."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, bias: RelativeBias) -> None:
        self.attn = TextAttention(config, weights, f"{prefix}.layer.0", 0, bias, causal=False)
        self.mlp = FeedForward(config, weights, f"{prefix}.layer.1")

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        return self.mlp(self.attn(x, batch), batch)


class DecoderLayer:
    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, layer: int, bias: RelativeBias) -> None:
        self.attn = TextAttention(config, weights, f"{prefix}.layer.0", layer, bias, causal=True)
        self.cross = EncoderAttention(config, weights, f"{prefix}.layer.1", layer)
        self.mlp = FeedForward(config, weights, f"{prefix}.layer.2")

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        return self.mlp(self.cross(self.attn(x, batch), batch), batch)


def standard_keys(keys: ConfigKeys) -> dict[str, object]:
    """What config.json leaves to be worked out: a decoder as deep as the encoder."""
    return {"num_hidden_layers": keys.integer("num_hidden_layers", default=keys.integer("num_layers"))}


class T5ForConditionalGeneration:
    """Encoder's token ids to cross keys, decoder's to logits."""

    # Copies of the embedding, and a bias that never was: neither has a meaning of its own.
    ignored: tuple[str, ...] = (r"(shared|coder\.embed_tokens)\.weight", r"EncDecAttention\.relative_attention_bias\.weight")
    window = 0

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None:
        keys, hidden, vocab = config.keys, config.hidden_size, config.vocab_size
        embedding = _embedding(weights)
        # A head of its own counts whatever config.json says: it does not always say what the checkpoint holds.
        head = "lm_head" if weights.has("lm_head.weight") or not config.tied_embeddings else embedding
        self.stream = stream_dtype(weights)
        self.embed = Embedding.load(weights, embedding, vocab, hidden)
        bias = _relative_bias(config, weights, "encoder")
        self.encoder = [EncoderLayer(config, weights, f"encoder.block.{i}", bias) for i in range(keys.integer("num_layers"))]
        self.encoder_norm = Norm(config, weights, "encoder.final_layer_norm")
        bias = _relative_bias(config, weights, "decoder")
        self.decoder = [DecoderLayer(config, weights, f"decoder.block.{i}", i, bias) for i in range(config.num_layers)]
        self.norm = Norm(config, weights, "decoder.final_layer_norm")
        self.head = Head.load(weights, head, vocab, hidden, tied=self.embed if head == embedding else None)
        # Whether the head was tied when the model was trained, which is not always how it is stored.
        is_scaled = keys.boolean("scale_decoder_outputs", default=config.tied_embeddings)
        self.head_scale = hidden**-0.5 if is_scaled else 1.0

    def encode(self, batch: ForwardBatch) -> None:
        """Read texts, one sequence of the batch each, and write their cross keys to the batch's slots."""
        x = self.embed(batch).to(self.stream)
        for layer in self.encoder:
            x = layer(x, batch)
        encoded = self.encoder_norm(x)
        for decoder in self.decoder:
            decoder.cross.remember(encoded, batch)

    def __call__(self, batch: ForwardBatch) -> torch.Tensor:
        x = self.embed(batch).to(self.stream)
        for layer in self.decoder:
            x = layer(x, batch)
        return self.head(output_rows(self.norm(x), batch, scale=self.head_scale), batch)

    def cache_regime(self, prompt_length: int) -> str:
        return ""


def stream_dtype(weights: Weights) -> torch.dtype:
    """Of the residual stream. It outgrows fp16 (65504) in T5's checkpoints, which were trained in bf16."""
    return torch.float32 if weights.dtype == torch.float16 else weights.dtype


def _embedding(weights: Weights) -> str:
    """The one embedding's name: a checkpoint that tied its copies together may have kept any of them."""
    names = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    return next((name for name in names if weights.has(f"{name}.weight")), names[0])


def _relative_bias(config: ModelConfig, weights: Weights, stack: str) -> RelativeBias:
    """The stack's bias: its first layer holds it for all. Each rank has that of its heads."""
    keys = config.keys
    num_buckets = keys.integer("relative_attention_num_buckets", default=32)
    name = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    table = weights.tensor(name, (num_buckets, config.num_heads)).float()
    mine = Heads.share(weights.ranks, config.num_heads, config.num_heads, config.head_dim).query
    least = num_buckets // 2 + 1  # beyond the distances that have a bucket each
    return RelativeBias(
        table[:, mine.start : mine.stop].contiguous(), keys.integer("relative_attention_max_distance", default=128, minimum=least)
    )
