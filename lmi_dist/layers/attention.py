"""Self-attention over the blocks of the KV pool: rotate, write the new keys, attend."""

import torch

from lmi_dist import ops
from lmi_dist.batch import ForwardBatch
from lmi_dist.parallel import Heads


class PagedAttention:
    """softmax(scale q k^T) v over all keys of each sequence (Vaswani et al. 2017; blocks: Kwon et al. 2023). Query heads share key
    heads in groups of H // K; `heads` are those of this rank. `window`: keys that a token sees, itself included; 0: all."""

    def __init__(self, layer: int, heads: Heads, *, window: int = 0) -> None:
        self.layer, self.head_dim, self.window = layer, heads.size, window
        self.first_key, self.first_value = len(heads.query), len(heads.query) + len(heads.key)
        self.scale = heads.size**-0.5

    def __call__(self, qkv: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """qkv: [T,(H+2K)D], rotated in place; gives [T,HD]."""
        heads = qkv.view(len(qkv), -1, self.head_dim)
        q, k, v = heads[:, : self.first_key], heads[:, self.first_key : self.first_value], heads[:, self.first_value :]
        cache = batch.cache.layers[self.layer]
        cos, sin, rows = batch.rope or (None, None, None)
        ops.rotary(q, k, v, cos, sin, rows, cache.k, cache.v, batch.slots)
        out = ops.attention(
            q, cache.k, cache.v, batch.starts, batch.key_lengths, batch.tables, scale=self.scale, window=self.window
        )
        return out.flatten(1)
