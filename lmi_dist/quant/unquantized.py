"""Dense weights, packed at load into the tiles that the kernels stream."""

import torch

from lmi_dist import ops
from lmi_dist.quant import ExpertsWeight, LinearWeight, Piece
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


class UnquantizedExperts:
    """Packed [F,E] weights, one behind the other."""

    def __init__(self, packed: list[ops.PackedWeight]) -> None:
        self.packed = packed

    def __call__(self, x: torch.Tensor, starts: torch.Tensor, *, activation: ops.Activation = "identity") -> torch.Tensor:
        return ops.grouped_linear(x, self.packed, starts, activation=activation)


def load(weights: Weights, pieces: list[Piece], columns: slice, *, gated: bool) -> LinearWeight:
    """Pack the pieces straight from the mapped file, some rows at a time."""
    packed = ops.pack_linear(*_sizes(pieces, columns), weights.dtype, gated=gated)
    _fill(packed, weights, pieces, columns)
    return UnquantizedWeight(packed)


def share(table: torch.Tensor) -> LinearWeight | None:
    """A table [F,E] as a weight, which lies where it is; None where weights are packed."""
    weight = ops.row_major(table)
    return None if weight is None else UnquantizedWeight(weight)


def load_experts(weights: Weights, experts: list[list[Piece]], columns: slice, *, gated: bool) -> ExpertsWeight:
    """The same for each expert, all in one place for the grouped linear."""
    packed = ops.pack_experts(len(experts), *_sizes(experts[0], columns), weights.dtype, gated=gated)
    for expert, pieces in zip(packed, experts, strict=True):
        _fill(expert, weights, pieces, columns)
    return UnquantizedExperts(packed)


def _sizes(pieces: list[Piece], columns: slice) -> tuple[int, int]:
    """[F,E] of what the pieces come to."""
    return sum(piece.num_rows for piece in pieces), len(range(pieces[0].in_features)[columns])


def _fill(packed: ops.PackedWeight, weights: Weights, pieces: list[Piece], columns: slice) -> None:
    for piece in pieces:
        shape = (piece.out_features, piece.in_features)
        for row, w in weights.pieces(f"{piece.prefix}.weight", shape, piece.rows, columns, transposed=piece.transposed):
            packed.put(w, piece.offset + row)
