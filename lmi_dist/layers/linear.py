"""Linear of any weight format: one object from one or several of the checkpoint's linears, split over the ranks."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch

from lmi_dist import ops, quant
from lmi_dist.batch import ForwardBatch
from lmi_dist.link import Link
from lmi_dist.quant import LinearWeight, Piece
from lmi_dist.weights import Weights

# "outputs": each rank has some of the output features. "inputs": each rank has some of the input features, and the ranks' outputs
# are summed.
Split = Literal["outputs", "inputs"]


class Linear:
    """y = W x + b. x: [T,E]; gives [T,F] on this rank."""

    def __init__(self, weight: LinearWeight, bias: torch.Tensor | None, split: Split, link: Link) -> None:
        self.weight, self.bias, self.split, self.link = weight, bias, split, link

    @classmethod
    def load(
        cls,
        weights: Weights,
        prefixes: Sequence[str],
        split: Split,
        *,
        inputs: int,
        outputs: Sequence[int],
        parts: Sequence[slice] | None = None,
        bias: bool = False,
        gated: bool = False,
        transposed: bool = False,
        weight: LinearWeight | None = None,
    ) -> "Linear":
        """Fuse the linears `prefixes`, whose whole sizes are [outputs[i],inputs]. `parts`: what this rank takes of each prefix's
        outputs (one prefix may come several times with different ones), or [slice of the inputs]; unset: an equal share. `gated`:
        gate and up projection, of which the forward gives act(gate) * up. `transposed`: the file holds [inputs,outputs[i]].
        `weight`: there already, not to be read. Raises CheckpointError, and ConfigError if there is not something for each rank."""
        ranks = weights.ranks
        if split == "inputs":
            rows, columns = [slice(0, size) for size in outputs], parts[0] if parts else ranks.slice(inputs, prefixes[0])
        else:
            rows = list(parts or [ranks.slice(size, prefix) for prefix, size in zip(prefixes, outputs, strict=True)])
            columns = slice(0, inputs)
        offsets = [0, *accumulate(part.stop - part.start for part in rows)]
        pieces = [
            Piece(prefix, size, inputs, part, offset, transposed)
            for prefix, size, part, offset in zip(prefixes, outputs, rows, offsets[:-1], strict=True)
        ]
        weight = weight or quant.load(weights, pieces, columns, gated=gated)
        return cls(weight, _load_bias(weights, pieces) if bias else None, split, weights.link)

    def __call__(
        self,
        x: torch.Tensor,
        batch: ForwardBatch | None,
        *,
        residual: torch.Tensor | None = None,
        activation: ops.Activation = "identity",
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """act(y) + residual; residual: [T,F], added before the result is rounded, and in the pass that writes it. The result may
        take its place: what is still to be read of it must be read before."""
        if self.split == "outputs":
            return self.weight(x, bias=self.bias, residual=residual, activation=activation, out_dtype=out_dtype)
        bias, residual = (self.bias, residual) if self.link.ranks.rank == 0 else (None, None)  # the sum over ranks holds them once
        y = self.weight(x, bias=bias, residual=residual, activation=activation, out_dtype=out_dtype)
        return self.link.all_reduce(y)


def _load_bias(weights: Weights, pieces: list[Piece]) -> torch.Tensor:
    return torch.cat([weights.tensor(f"{piece.prefix}.bias", (piece.out_features,), piece.rows) for piece in pieces])
