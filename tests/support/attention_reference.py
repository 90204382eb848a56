"""Attention over blocks, one row and one head at a time in float64: slow, obvious, and written apart from ops/attention.py."""

import torch
from transformers.models.t5.modeling_t5 import T5Attention


def read_cache(cache: torch.Tensor, table: torch.Tensor, head: int, first: int, last: int) -> torch.Tensor:
    """Keys (or values) first .. last-1 of one sequence and head as [keys,D] float64; cache: [N,K,P,D], table: [max_blocks]."""
    block_size = cache.shape[2]
    rows = [cache[int(table[j // block_size]), head, j % block_size] for j in range(first, last)]
    return torch.stack(rows).double()


def bucket(distance: torch.Tensor, causal: bool, num_buckets: int, max_distance: int) -> torch.Tensor:
    """T5's bucket of key minus query position, by transformers."""
    return T5Attention._relative_position_bucket(distance, not causal, num_buckets, max_distance)


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    starts: torch.Tensor,
    key_lengths: torch.Tensor,
    tables: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi: torch.Tensor | None = None,
    relative_bias: torch.Tensor | None = None,
    max_distance: int = 128,
) -> torch.Tensor:
    """What lmi_attention promises, [T,H,D] in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // k_cache.shape[1]
    for b in range(len(key_lengths)):
        length = int(key_lengths[b])
        offset = length - int(starts[b + 1])  # row t stands at position offset + t
        for t in range(int(starts[b]), int(starts[b + 1])):
            position = offset + t
            last = min(length, position + 1) if causal else length
            first = max(0, position - window + 1) if window else 0
            if first >= last:
                continue
            distance = torch.arange(first, last) - position
            for h in range(q.shape[1]):
                scores = scale * read_cache(k_cache, tables[b], h // group, first, last) @ q[t, h].double()
                if soft_cap > 0:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                if alibi is not None:
                    scores = scores + alibi[h].double() * distance
                if relative_bias is not None:
                    buckets = bucket(distance, causal, relative_bias.shape[0], max_distance)
                    scores = scores + relative_bias[buckets, h].double()
                out[t, h] = torch.softmax(scores, 0) @ read_cache(v_cache, tables[b], h // group, first, last)
    return out
