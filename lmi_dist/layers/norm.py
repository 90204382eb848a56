"""Normalisation over the hidden size."""

import torch

from lmi_dist import ops
from lmi_dist.weights import Weights


class RMSNorm:
    """x / rms(x) * w (Zhang and Sennrich 2019). x: [T,E]"""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    @classmethod
    def load(cls, weights: Weights, prefix: str, size: int, eps: float) -> "RMSNorm":
        return cls(weights.tensor(f"{prefix}.weight", (size,)), eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm:
    """(x - mean(x)) / std(x) * w + b (Ba et al. 2016). x: [T,E]"""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps

    @classmethod
    def load(cls, weights: Weights, prefix: str, size: int, eps: float, *, bias: bool = True) -> "LayerNorm":
        shift = weights.tensor(f"{prefix}.bias", (size,)) if bias else None
        return cls(weights.tensor(f"{prefix}.weight", (size,)), shift, eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)
