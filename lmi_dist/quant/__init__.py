"""Weight formats behind one linear: a table from a format's name to the module that reads it, imported when asked for.

A format's module has `load(weights, pieces, columns, gated)`, which gives a LinearWeight, and `load_experts`, the same for several
of one size. A new format: a file here, a row below.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import torch

from lmi_dist import ops
from lmi_dist.config import ModelConfig
from lmi_dist.errors import ConfigError
from lmi_dist.weights import Weights

FORMATS = {"unquantized": "lmi_dist.quant.unquantized"}


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one of the checkpoint's linears that a LinearWeight is fused from: `prefix`.weight is [out_features,in_features], or
    `transposed` in the file; of it this rank takes `rows`, and they come at row `offset` of the fused one. A checkpoint's own
    fused linear is several pieces."""

    prefix: str
    out_features: int
    in_features: int
    rows: slice
    offset: int
    transposed: bool = False

    @property
    def num_rows(self) -> int:
        return len(range(self.out_features)[self.rows])


class LinearWeight(Protocol):
    """A linear's weight in any format. x: [T,E] gives [T,F], or [T,F/2] if loaded as gated (see lmi_linear in the header)."""

    def __call__(
        self,
        x: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        addend: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        activation: ops.Activation = "identity",
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor: ...


class ExpertsWeight(Protocol):
    """One linear's weights of all experts. x: [T*top_k,E], of which rows starts[x] .. starts[x+1]-1 go to expert x; starts: int32
    [X+1]. Gives [T*top_k,F], or F/2 if loaded as gated."""

    def __call__(self, x: torch.Tensor, starts: torch.Tensor, *, activation: ops.Activation = "identity") -> torch.Tensor: ...


class Format(Protocol):
    """What a format's module offers."""

    def load(self, weights: Weights, pieces: list[Piece], columns: slice, *, gated: bool) -> LinearWeight:
        """Read `columns` of the pieces into one weight. Raises CheckpointError."""

    def load_experts(self, weights: Weights, experts: list[list[Piece]], columns: slice, *, gated: bool) -> ExpertsWeight:
        """The same for each expert's pieces. Raises CheckpointError."""


def load(weights: Weights, pieces: list[Piece], columns: slice, *, gated: bool) -> LinearWeight:
    """The pieces as one weight of the checkpoint's format. Raises CheckpointError."""
    return _format(weights).load(weights, pieces, columns, gated=gated)


def load_experts(weights: Weights, experts: list[list[Piece]], columns: slice, *, gated: bool) -> ExpertsWeight:
    """Each expert's pieces as one weight, all experts as one object. Raises CheckpointError."""
    return _format(weights).load_experts(weights, experts, columns, gated=gated)


def _format(weights: Weights) -> Format:
    return cast(Format, import_module(FORMATS[weights.format]))


def format_of(model: ModelConfig, wanted: str | None) -> str:
    """The row of FORMATS that config.json, or else the operator, asks for. Raises ConfigError if there is none."""
    section = model.keys.section("quantization_config")
    name = section.values.get("quant_method") or wanted or "unquantized"
    if name not in FORMATS:
        raise ConfigError(f"{model.keys.where}: quantize={name} is known but not built yet; give an unquantized checkpoint")
    return str(name)
