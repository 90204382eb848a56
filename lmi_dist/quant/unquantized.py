"""Dense weights, packed at load into the tiles that the kernels stream."""

import torch

from lmi_dist import ops
from lmi_dist.quant import LinearWeight, Piece
from lmi_dist.weights import Weights


class UnquantizedWeight:
    """A packed [F,E] weight in the model's dtype."""

    def __init__(self, packed: ops.PackedWeight) -> None:
        self.packed = packed

    def __call__(
        self,
        x: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        addend: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        activation: ops.Activation = "identity",
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        return ops.linear(x, self.packed, bias=bias, addend=addend, residual=residual, activation=activation, out_dtype=out_dtype)


def load(weights: Weights, pieces: list[Piece], columns: slice, *, gated: bool) -> LinearWeight:
    """Pack the pieces straight from the mapped file, some rows at a time."""
    in_features = len(range(pieces[0].in_features)[columns])
    packed = ops.pack_linear(sum(piece.num_rows for piece in pieces), in_features, weights.dtype, gated=gated)
    for piece in pieces:
        shape = (piece.out_features, piece.in_features)
        for row, w in weights.pieces(f"{piece.prefix}.weight", shape, piece.rows, columns):
            packed.put(w, piece.offset + row)
    return UnquantizedWeight(packed)
