"""Linear of any weight format: one object from one or several of the checkpoint's linears, split over the ranks."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch

from lmi_dist import ops, quant
from lmi_dist.batch import ForwardBatch
from lmi_dist.parallel import Ranks
from lmi_dist.quant import LinearWeight, Piece
from lmi_dist.weights import Weights

# "outputs": each rank has some of the output features. "inputs": each rank has some of the input features, and the ranks' outputs
# are summed.
Split = Literal["outputs", "inputs"]


class Linear:
    """y = W x + b. x: [T,E]; gives [T,F] on this rank."""

    def __init__(self, weight: LinearWeight, bias: torch.Tensor | None, split: Split, ranks: Ranks) -> None:
        self.weight, self.bias, self.split, self.ranks = weight, bias, split, ranks

    @classmethod
    def load(
        cls,
        weights: Weights,
        prefixes: Sequence[str],
        split: Split,
        *,
        inputs: int,
        outputs: Sequence[int],
        bias: bool = False,
        gated: bool = False,
    ) -> "Linear":
        """Fuse the linears `prefixes`, whose whole sizes are [outputs[i],inputs]. `gated`: gate and up projection, of which the
        forward gives act(gate) * up. Raises CheckpointError, and ConfigError if the ranks cannot share a size evenly."""
        ranks = weights.ranks
        by_rows = split == "outputs"
        parts = [ranks.slice(size, prefix) if by_rows else slice(0, size) for prefix, size in zip(prefixes, outputs, strict=True)]
        offsets = [0, *accumulate(part.stop - part.start for part in parts)]
        columns = slice(0, inputs) if by_rows else ranks.slice(inputs, prefixes[0])
        pieces = [
            Piece(prefix, size, inputs, part, offset)
            for prefix, size, part, offset in zip(prefixes, outputs, parts, offsets, strict=False)
        ]
        weight = quant.load(weights, pieces, columns, gated=gated)
        return cls(weight, _load_bias(weights, pieces) if bias else None, split, ranks)

    def __call__(
        self,
        x: torch.Tensor,
        batch: ForwardBatch,
        *,
        activation: ops.Activation = "identity",
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        if self.split == "outputs":
            return self.weight(x, bias=self.bias, activation=activation, out_dtype=out_dtype)
        bias = self.bias if self.ranks.rank == 0 else None  # the sum over ranks must hold it once
        return self.ranks.all_reduce(self.weight(x, bias=bias, activation=activation, out_dtype=out_dtype))


def _load_bias(weights: Weights, pieces: list[Piece]) -> torch.Tensor:
    return torch.cat([weights.tensor(f"{piece.prefix}.bias", (piece.out_features,), piece.rows) for piece in pieces])
