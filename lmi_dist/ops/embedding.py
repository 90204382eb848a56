"""Rows of an embedding table, or of this rank's part of it."""

import torch
from torch import Tensor

from lmi_dist.ops import column
from lmi_dist.ops.shapes import FLOATS, Shapes


def embedding(ids: Tensor, table: Tensor, *, first_id: int = 0, scale: float = 1.0) -> Tensor:
    """scale * table[ids - first_id], or 0 for an id outside of the table (another rank's). ids: int32 [T], table: [V,E].
    Returns [T,E] in the table's dtype. Raises KernelError on shapes."""
    library = column.library()
    if library is None:
        return embedding_torch(ids, table, first_id=first_id, scale=scale)
    out = torch.empty((ids.shape[0], table.shape[-1]), dtype=table.dtype, device=table.device)
    library.call("embedding", out=out, ids=ids, table=table, first_id=first_id, scale=scale)
    return out


def embedding_torch(ids: Tensor, table: Tensor, *, first_id: int = 0, scale: float = 1.0) -> Tensor:
    shapes = Shapes("embedding")
    shapes.check("ids", ids, "T", torch.int32)
    shapes.check("table", table, "V E", *FLOATS)
    rows = ids.long() - first_id
    is_ours = (rows >= 0) & (rows < len(table))
    found = table[rows.where(is_ours, 0)].float() * scale
    return found.where(is_ours[:, None], 0.0).to(table.dtype)
