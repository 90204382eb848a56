"""Rows of an embedding table, or of this rank's part of it."""

import torch
from torch import Tensor

from lmi_dist.ops import column
from lmi_dist.ops.shapes import FLOATS, Shapes


def embedding(ids: Tensor, table: Tensor, *, first_id: int = 0, scale: float = 1.0, residual: Tensor | None = None) -> Tensor:
    """scale * table[ids - first_id] + residual, with 0 for an id outside of the table (another rank's). ids: int32 [T], table:
    [V,E], residual: [T,E] in its dtype. Returns [T,E] in the table's dtype. Raises KernelError on shapes."""
    library = column.library()
    if library is None:
        return embedding_torch(ids, table, first_id=first_id, scale=scale, residual=residual)
    out = torch.empty((ids.shape[0], table.shape[-1]), dtype=table.dtype, device=table.device)
    library.call("embedding", out=out, ids=ids, table=table, residual=residual, first_id=first_id, scale=scale)
    return out


def embedding_torch(ids: Tensor, table: Tensor, *, first_id: int = 0, scale: float = 1.0, residual: Tensor | None = None) -> Tensor:
    shapes = Shapes("embedding")
    shapes.check("ids", ids, "T", torch.int32)
    shapes.check("table", table, "V E", *FLOATS)
    shapes.check("residual", residual, "T E", table.dtype)
    rows = ids.long() - first_id
    is_ours = (rows >= 0) & (rows < len(table))
    found = table[rows.where(is_ours, 0)].float() * scale
    found = found.where(is_ours[:, None], 0.0)
    return (found if residual is None else found + residual.float()).to(table.dtype)
