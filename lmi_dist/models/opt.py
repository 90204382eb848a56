"""OPT (Zhang et al. 2022): learned positions that begin at row 2, ReLU; 350m: norms behind the blocks, and a narrow embedding."""

import torch

from lmi_dist.batch import ForwardBatch
from lmi_dist.config import ModelConfig
from lmi_dist.layers.attention import SelfAttention
from lmi_dist.layers.embedding import Embedding, Head, Positions
from lmi_dist.layers.linear import Linear
from lmi_dist.layers.mlp import ACTIVATIONS, MLP
from lmi_dist.layers.norm import LayerNorm
from lmi_dist.layers.qkv import separate
from lmi_dist.models.decoder import Decoder, DecoderLayer
from lmi_dist.weights import Weights

EPS = 1e-5


class Layer(DecoderLayer):
    """Attention, then feed-forward, each added to what came in, and normalised before or behind."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int) -> None:
        keys, prefix, hidden = config.keys, f"model.decoder.layers.{layer}", config.hidden_size
        bias = keys.boolean("enable_bias", default=True)
        self.norms_first = keys.boolean("do_layer_norm_before", default=True)
        self.attn_norm = LayerNorm.load(weights, f"{prefix}.self_attn_layer_norm", hidden, EPS)
        qkv = separate(*(f"{prefix}.self_attn.{name}_proj" for name in "qkv"))
        self.attn = SelfAttention.load(weights, config, layer, qkv, f"{prefix}.self_attn.out_proj", bias=bias)
        self.mlp_norm = LayerNorm.load(weights, f"{prefix}.final_layer_norm", hidden, EPS)
        self.mlp = MLP.load(
            weights,
            f"{prefix}.fc1",
            f"{prefix}.fc2",
            hidden=hidden,
            feed_forward=keys.integer("intermediate_size", default=4 * hidden),
            activation=keys.choice("hidden_act", ACTIVATIONS, default="relu"),
            bias=bias,
        )

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        if self.norms_first:
            x = self.attn(self.attn_norm(x), batch, residual=x)
            return self.mlp(self.mlp_norm(x), batch, residual=x)
        x = self.attn_norm(self.attn(x, batch, residual=x))
        return self.mlp_norm(self.mlp(x, batch, residual=x))

    def write_keys(self, x: torch.Tensor, batch: ForwardBatch) -> None:
        self.attn.write_keys(self.attn_norm(x) if self.norms_first else x, batch)


class OPTForCausalLM(Decoder):
    """Token ids to logits."""

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None:
        keys, hidden, prefix = config.keys, config.hidden_size, "model.decoder"
        if not keys.boolean("layer_norm_elementwise_affine", default=True):
            raise keys.refuse("layer_norm_elementwise_affine", "is not supported; supported is true")
        width = keys.integer("word_embed_proj_dim", default=hidden)
        self.tokens = Embedding.load(weights, f"{prefix}.embed_tokens", config.vocab_size, width)
        self.positions = Positions.load(weights, f"{prefix}.embed_positions", config.max_position, hidden, offset=2)
        self.widen, self.narrow = None, None
        if width != hidden:
            self.widen = load_whole(weights, f"{prefix}.project_in", width, hidden)
            self.narrow = load_whole(weights, f"{prefix}.project_out", hidden, width)
        self.layers = [Layer(config, weights, layer) for layer in range(config.num_layers)]
        self.final_norm = None
        if keys.boolean("do_layer_norm_before", default=True) and not keys.boolean("_remove_final_layer_norm", default=False):
            self.final_norm = LayerNorm.load(weights, f"{prefix}.final_layer_norm", hidden, EPS)
        tied = self.tokens if config.tied_embeddings else None
        self.head = Head.load(weights, f"{prefix}.embed_tokens" if tied else "lm_head", config.vocab_size, width, tied=tied)
        if tied:
            self.ignored = (r"lm_head\.weight",)

    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        x = self.tokens(batch)
        return self.positions(x if self.widen is None else self.widen(x, batch), batch)

    def score(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        x = x if self.final_norm is None else self.final_norm(x)
        return self.head(x if self.narrow is None else self.narrow(x, batch), batch)


def load_whole(weights: Weights, prefix: str, inputs: int, outputs: int) -> Linear:
    """A linear that every rank has whole."""
    return Linear.load(weights, [prefix], "outputs", inputs=inputs, outputs=[outputs], parts=[slice(0, outputs)])
