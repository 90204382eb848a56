"""Attention over the blocks of the KV pool: project, rotate, write the new keys, attend, project back. Or across, to an encoder."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lmi_dist import ops
from lmi_dist.batch import ForwardBatch
from lmi_dist.config import ModelConfig
from lmi_dist.errors import CheckpointError
from lmi_dist.layers.elementwise import clamped
from lmi_dist.layers.linear import Linear
from lmi_dist.layers.qkv import Layout, load_qkv
from lmi_dist.parallel import Heads
from lmi_dist.weights import Weights

Norm = Callable[[torch.Tensor], torch.Tensor]


class RelativeBias(NamedTuple):
    """What a key's distance adds to its score (Raffel et al. 2020, section 2.1): fp32 [buckets,H] on this rank."""

    table: torch.Tensor | None
    max_distance: int


NO_BIAS = RelativeBias(None, 128)


class CacheScales(NamedTuple):
    """What an fp8 cache's keys and values are to be multiplied by; other caches do without."""

    k: float = 1.0
    v: float = 1.0

    @classmethod
    def load(cls, weights: Weights, prefix: str) -> "CacheScales":
        """Those that a checkpoint was calibrated with, under the names that vLLM, compressed-tensors and ModelOpt give them, or 1.
        Raises CheckpointError on one that is not above 0."""
        return cls(*(_scale(weights, prefix, kind) for kind in "kv"))


NO_SCALES = CacheScales()


def _scale(weights: Weights, prefix: str, kind: str) -> float:
    for name in (f"{prefix}.{kind}_scale", f"{prefix}.attn.{kind}_scale", f"{prefix}.{kind}_proj.{kind}_scale"):
        value = weights.number(name)
        if value is not None and not 0.0 < value < math.inf:
            raise CheckpointError(f"{name}={value} must be finite and above 0")
        if value is not None:
            return value
    return 1.0


class SelfAttention:
    """out(attend(qkv(x))), x: [T,E]. clip: of queries, keys and values (MPT's), 0: none."""

    def __init__(self, qkv: Linear, attend: "PagedAttention", out: Linear, clip: float = 0.0) -> None:
        self.qkv, self.attend, self.out, self.clip = qkv, attend, out, clip

    @classmethod
    def load(
        cls,
        weights: Weights,
        config: ModelConfig,
        layer: int,
        qkv: Layout,
        out: str,
        *,
        bias: bool = False,
        out_bias: bool | None = None,
        transposed: bool = False,
        alibi: torch.Tensor | None = None,
        clip: float = 0.0,
        **options: Any,
    ) -> "SelfAttention":
        """`bias`: of all projections, or of qkv alone if `out_bias` is given; `transposed`: all of them are in the file; `alibi`:
        fp32 slopes of all heads; `options`: PagedAttention's."""
        heads = Heads.share(weights.ranks, config.num_heads, config.num_kv_heads, config.head_dim)
        return cls(
            load_qkv(weights, heads, qkv, hidden=config.hidden_size, bias=bias, transposed=transposed),
            PagedAttention(
                layer,
                heads,
                window=config.windows[layer],
                alibi=None if alibi is None else alibi[heads.query.start : heads.query.stop].to(weights.device),
                scales=CacheScales.load(weights, out.rpartition(".")[0]),
                **options,
            ),
            Linear.load(
                weights,
                [out],
                "inputs",
                inputs=heads.num_query * heads.size,
                outputs=[config.hidden_size],
                parts=[heads.query_features],
                bias=bias if out_bias is None else out_bias,
                transposed=transposed,
            ),
            clip,
        )

    def __call__(self, x: torch.Tensor, batch: ForwardBatch, residual: torch.Tensor | None = None) -> torch.Tensor:
        return self.out(self.attend(self._project(x, batch), batch), batch, residual=residual)

    def write_keys(self, x: torch.Tensor, batch: ForwardBatch) -> None:
        """No more than the keys and values of x."""
        self.attend.write(self._project(x, batch), batch)

    def _project(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """Queries, keys and values: [T,(H+2K)D]"""
        qkv = self.qkv(x, batch)
        return clamped(qkv, self.clip) if self.clip else qkv


class PagedAttention:
    """softmax(scale q k^T) v over all keys of each sequence (Vaswani et al. 2017; blocks: Kwon et al. 2023). Query heads share key
    heads in groups of H // K; `heads` are those of this rank.

    scale: D^-0.5 if not given. window: keys that a token sees, itself included; 0: all. soft_cap: Gemma 2's, 0: none.
    alibi: fp32 [H] slopes. relative_bias: T5's. causal: whether a token sees only those before it. interleaved: rotary turns pairs
    (2i, 2i+1) instead of (i, i+half). qk_norm: what is done to q [T,H,D] and to k [T,K,D] before they are turned. scales: of an fp8
    cache.
    """

    def __init__(
        self,
        layer: int,
        heads: Heads,
        *,
        scale: float | None = None,
        window: int = 0,
        soft_cap: float = 0.0,
        alibi: torch.Tensor | None = None,
        relative_bias: RelativeBias = NO_BIAS,
        causal: bool = True,
        interleaved: bool = False,
        qk_norm: tuple[Norm, Norm] | None = None,
        scales: CacheScales = NO_SCALES,
    ) -> None:
        self.layer, self.head_dim, self.window = layer, heads.size, window
        self.first_key, self.first_value = len(heads.query), len(heads.query) + len(heads.key)
        self.scale = heads.size**-0.5 if scale is None else scale
        self.soft_cap, self.alibi, self.interleaved, self.qk_norm = soft_cap, alibi, interleaved, qk_norm
        self.relative_bias, self.causal = relative_bias, causal
        self.scales = {"k_scale": scales.k, "v_scale": scales.v}

    def __call__(self, qkv: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """qkv: [T,(H+2K)D], rotated in place; gives [T,HD]."""
        q = self.write(qkv, batch)
        cache = batch.cache.layers[self.layer]
        out = ops.attention(
            q, cache.k, cache.v, batch.starts, batch.key_lengths, batch.tables,
            scale=self.scale, window=self.window, soft_cap=self.soft_cap, alibi=self.alibi, causal=self.causal,
            relative_bias=self.relative_bias.table, max_distance=self.relative_bias.max_distance, prompts=batch.prompts,
            **self.scales,
        )  # fmt: skip
        return out.flatten(1)

    def write(self, qkv: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """Rotate in place and put the keys and values into the cache. qkv: [T,(H+2K)D]; gives q, [T,H,D]."""
        heads = qkv.view(len(qkv), -1, self.head_dim)
        q, k, v = heads[:, : self.first_key], heads[:, self.first_key : self.first_value], heads[:, self.first_value :]
        if self.qk_norm is not None:
            q, k = self.qk_norm[0](q), self.qk_norm[1](k)
        cache = batch.cache.layers[self.layer]
        cos, sin, rows = batch.rope or (None, None, None)
        ops.rotary(q, k, v, cos, sin, rows, cache.k, cache.v, batch.slots, interleaved=self.interleaved, **self.scales)
        return q


class CrossAttention:
    """Attention of a decoder's tokens to all keys of their sequence's encoder, which lie in blocks of their own."""

    def __init__(self, layer: int, head_dim: int, *, scale: float) -> None:
        self.layer, self.head_dim, self.scale = layer, head_dim, scale

    def write(self, kv: torch.Tensor, batch: ForwardBatch) -> None:
        """Put the keys and values of an encoder's batch into its blocks. kv: [T,2KD]"""
        k, v = kv.view(len(kv), 2, -1, self.head_dim).unbind(1)
        cache = batch.cache.layers[self.layer]
        ops.rotary(None, k, v, None, None, None, cache.k, cache.v, batch.slots)

    def __call__(self, q: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """q: [T,HD] of a decoder's batch; gives [T,HD]."""
        assert batch.cross_lengths is not None, "every sequence of an encoder-decoder has its encoder's keys"
        assert batch.cross_tables is not None, "lengths and tables come together"
        cache = batch.cache.layers[self.layer]
        heads = q.view(len(q), -1, self.head_dim)
        out = ops.attention(
            heads, cache.k, cache.v, batch.starts, batch.cross_lengths, batch.cross_tables, scale=self.scale, causal=False
        )
        return out.flatten(1)


def alibi_slopes(num_heads: int, max_bias: float = 8.0) -> torch.Tensor:
    """Slopes of attention with linear biases, fp32 [H]: 2^(-max_bias i / n) for n heads; where n is no power of two, every other
    one of the next power's, then what lies between (Press et al. 2022, and their code for the other numbers)."""
    power = 1 << (num_heads - 1).bit_length()
    slopes = 2.0 ** (-max_bias / power * torch.arange(1, power + 1, dtype=torch.float64, device="cpu"))
    ordered = slopes if power == num_heads else torch.cat((slopes[1::2], slopes[::2]))
    return ordered[:num_heads].float()
