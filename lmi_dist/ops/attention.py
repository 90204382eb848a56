"""Attention over the blocks of a KV cache: prefill, decode and cross attention in one function."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lmi_dist.ops import column, flash
from lmi_dist.ops.shapes import FLOATS, FP8, Shapes

QUERIES_AT_ONCE = 256  # rows of the torch version's score matrix, to bound its memory


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    starts: Tensor,
    key_lengths: Tensor,
    tables: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi: Tensor | None = None,
    relative_bias: Tensor | None = None,
    max_distance: int = 128,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    prompts: flash.Prompts | None = None,
) -> Tensor:
    """softmax(scores) v for query rows starts[b] .. starts[b+1]-1 of each sequence b, the last of its key_lengths[b] positions.

    q: [T,H,D], strided or not; caches [N,K,P,D] of its dtype, or fp8 (E4M3), which stand for k_scale and v_scale times what they
    hold; key j of sequence b in block tables[b, j // P]; H // K heads share keys; starts: int32 [B+1]; key_lengths: int32 [B];
    tables: int32 [B,max_blocks], entries before the window may be negative.
    window: keys that a row sees, its own included (0: all). soft_cap: Gemma 2's, 0: none. alibi: fp32 [H] slopes (Press et al.
    2022). relative_bias: fp32 [buckets,H] with T5's buckets (Raffel et al. 2020), half of them for each direction unless causal.
    prompts: the sequences that flash-attn is to do, without relative bias, in bf16 or fp16.
    Returns [T,H,D]; a row without keys gives 0. A row's bits do not depend on its batch or chunk (CPU library only).
    Raises KernelError on shapes, dtypes, and blocks that are not there."""
    library = column.library()
    if library is None:
        return attention_torch(
            q, k_cache, v_cache, starts, key_lengths, tables, scale=scale, causal=causal, window=window, soft_cap=soft_cap,
            alibi=alibi, relative_bias=relative_bias, max_distance=max_distance, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rest = out
    if prompts is not None:
        flash.attend(out, q, k_cache, v_cache, prompts, scale=scale, causal=causal, window=window, soft_cap=soft_cap, alibi=alibi)
        first = prompts.first
        if first == 0:
            return out
        rest, q, starts, key_lengths, tables = out[:first], q[:first], starts[: first + 1], key_lengths[:first], tables[:first]
    library.call(
        "attention", out=rest, q=q, k_cache=k_cache, v_cache=v_cache, starts=starts, key_lengths=key_lengths, tables=tables,
        alibi=alibi, relative_bias=relative_bias, scale=scale, soft_cap=soft_cap, causal=causal, window=window,
        max_distance=max_distance, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class Scores:
    """How products become scores: the options of `attention`."""

    scale: float
    causal: bool
    window: int
    soft_cap: float
    alibi: Tensor | None
    relative_bias: Tensor | None
    max_distance: int

    def of(self, q: Tensor, k: Tensor, distance: Tensor) -> Tensor:
        """q: [K,G,L,D], k: [K,1,keys,D]; distance: [L,keys], key minus query position. Returns float [K,G,L,keys]; unseen: -inf."""
        scores = self.scale * (q @ k.transpose(-1, -2))
        if self.soft_cap > 0.0:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        if self.alibi is not None:
            scores = scores + self.alibi.view(*q.shape[:2], 1, 1) * distance
        if self.relative_bias is not None:
            buckets = bucket(distance, len(self.relative_bias), self.max_distance, causal=self.causal)
            scores = scores + self.relative_bias[buckets].permute(2, 0, 1).reshape(scores.shape)
        return scores.masked_fill(~self.sees(distance), -math.inf)

    def sees(self, distance: Tensor) -> Tensor:
        """Which keys count."""
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.causal:
            seen &= distance <= 0
        if self.window:
            seen &= distance > -self.window
        return seen


def bucket(distance: Tensor, num_buckets: int, max_distance: int, *, causal: bool) -> Tensor:
    """T5's bucket (Raffel et al. 2020, section 2.1): one a distance when near, logarithmic up to max_distance, the last one beyond.
    distance: integers, key minus query position. Not causal: the upper half of the buckets is for keys after the query."""
    if causal:
        size, base = (-distance).clamp(min=0), torch.zeros_like(distance)
    else:
        num_buckets //= 2
        size, base = distance.abs(), (distance > 0) * num_buckets
    exact = num_buckets // 2
    ratio = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return base + torch.where(size < exact, size, far)


def attention_torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    starts: Tensor,
    key_lengths: Tensor,
    tables: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi: Tensor | None = None,
    relative_bias: Tensor | None = None,
    max_distance: int = 128,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    options = Scores(scale, causal, window, soft_cap, alibi, relative_bias, max_distance)
    _check(q, k_cache, v_cache, starts, key_lengths, tables, options, (k_scale, v_scale))
    out = torch.zeros(q.shape, dtype=q.dtype)
    for sequence, (begin, end) in enumerate(pairwise(starts.tolist())):
        num_keys = int(key_lengths[sequence])
        for first in range(begin, end, QUERIES_AT_ONCE):
            rows = slice(first, min(first + QUERIES_AT_ONCE, end))
            positions = torch.arange(rows.start, rows.stop) + (num_keys - end)
            keys = torch.arange(max(0, int(positions[0]) - window + 1) if window else 0, num_keys)
            if len(keys):
                k = _gather(k_cache, tables[sequence], keys, k_scale)
                v = _gather(v_cache, tables[sequence], keys, v_scale)
                out[rows] = _attend(q[rows], k, v, keys[None, :] - positions[:, None], options)
    return out


def _gather(cache: Tensor, table: Tensor, keys: Tensor, scale: float) -> Tensor:
    """[K,1,keys,D] float, what the cache stands for."""
    block_size = cache.shape[2]
    held = cache[table[keys // block_size].long(), :, keys % block_size].float().transpose(0, 1)[:, None]
    return held * scale if cache.dtype == FP8 else held


def _attend(q: Tensor, k: Tensor, v: Tensor, distance: Tensor, options: Scores) -> Tensor:
    """q: [L,H,D] -> [L,H,D] in its dtype."""
    num_queries, num_heads, size = q.shape
    grouped = q.float().view(num_queries, k.shape[0], -1, size).permute(1, 2, 0, 3)
    weights = torch.softmax(options.of(grouped, k, distance), -1)
    weights = weights.where(options.sees(distance).any(-1, keepdim=True), 0.0)
    return (weights @ v).permute(2, 0, 1, 3).reshape(num_queries, num_heads, size).to(q.dtype)


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    starts: Tensor,
    key_lengths: Tensor,
    tables: Tensor,
    options: Scores,
    scales: tuple[float, float],
) -> None:
    shapes = Shapes("attention")
    shapes.check("q", q, "T H D", *FLOATS)
    shapes.check_caches(k_cache, v_cache, q.dtype, scales)
    shapes.check("key_lengths", key_lengths, "B", torch.int32)
    shapes.check("tables", tables, "B max_blocks", torch.int32)
    shapes.check("starts", starts, "B+1", torch.int32)
    shapes.check("alibi", options.alibi, "H", torch.float32)
    shapes.check("relative_bias", options.relative_bias, "buckets H", torch.float32)
    sizes = shapes.sizes
    pieces = starts.diff(prepend=starts.new_zeros(1), append=starts.new_full((1,), sizes["T"]))
    shapes.require(sizes["B+1"] == sizes["B"] + 1, "starts must have one entry more than key_lengths")
    shapes.require(bool((pieces >= 0).all()) and int(starts[-1]) == sizes["T"], f"starts must ascend from 0 to {sizes['T']}")
    shapes.require(0 < sizes["D"] <= 256 and sizes["D"] % 8 == 0, "D must be a multiple of 8 up to 256")
    shapes.require(sizes["H"] % sizes["K"] == 0, "K must divide H")
    shapes.require(options.window >= 0, "window must be at least 0")
    _check_buckets(shapes, options)
    _check_tables(shapes, starts, key_lengths, tables, options.window)


def _check_buckets(shapes: Shapes, options: Scores) -> None:
    if options.relative_bias is None:
        return
    buckets, ways = shapes.sizes["buckets"], 1 if options.causal else 2
    shapes.require(buckets >= 2 * ways, "relative_bias must have at least 2 buckets, 4 if not causal")
    least, most = buckets // (2 * ways) + 1, 1 << 20
    shapes.require(least <= options.max_distance <= most, f"max_distance={options.max_distance} must be {least} to {most}")


def _check_tables(shapes: Shapes, starts: Tensor, key_lengths: Tensor, tables: Tensor, window: int) -> None:
    """Every block that a row sees must be there."""
    room = tables.shape[1] * shapes.sizes["P"]
    for sequence, num_keys in enumerate(key_lengths.tolist()):
        shapes.require(0 <= num_keys <= room, f"sequence {sequence} has key_lengths={num_keys}; its table has room for {room}")
        num_queries = int(starts[sequence + 1] - starts[sequence])
        first = max(0, num_keys - num_queries - window + 1) if window else 0
        needed = tables[sequence, first // shapes.sizes["P"] : math.ceil(num_keys / shapes.sizes["P"])].tolist()
        for block in needed if num_queries else ():
            where = f"sequence {sequence} has block {block} in its table"
            shapes.require(0 <= block < shapes.sizes["N"], f"{where}; it must be 0 to N-1")
