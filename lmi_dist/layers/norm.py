"""Normalisation over the hidden size."""

import torch

from lmi_dist import ops
from lmi_dist.link import Link
from lmi_dist.weights import WHOLE, Weights


class RMSNorm:
    """x / rms(x) * (w + offset) (Zhang and Sennrich 2019; offset 1: Gemma). x: [T,E]"""

    def __init__(self, weight: torch.Tensor, eps: float, offset: float = 0.0) -> None:
        self.weight, self.eps, self.offset = weight, eps, offset

    @classmethod
    def load(cls, weights: Weights, prefix: str, size: int, eps: float, *, offset: float = 0.0, part: slice = WHOLE) -> "RMSNorm":
        """`part`: which of the weights, for AcrossHeads."""
        return cls(weights.tensor(f"{prefix}.weight", (size,), part), eps, offset)

    def __call__(self, x: torch.Tensor, *, addend: torch.Tensor | None = None) -> torch.Tensor:
        """addend: [T,E], added before the result is rounded, and in the pass that writes it."""
        return ops.rms_norm(x, self.weight, self.eps, weight_offset=self.offset, addend=addend)


class LayerNorm:
    """(x - mean(x)) / std(x) * w + b (Ba et al. 2016). x: [T,E]"""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps

    @classmethod
    def load(cls, weights: Weights, prefix: str, size: int, eps: float, *, bias: bool = True, part: slice = WHOLE) -> "LayerNorm":
        """`part`: which of the weights, for AcrossHeads."""
        shift = weights.tensor(f"{prefix}.bias", (size,), part) if bias else None
        return cls(weights.tensor(f"{prefix}.weight", (size,), part), shift, eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class PerHead:
    """A norm of each head alone. x: [T,H,D]"""

    def __init__(self, norm: RMSNorm | LayerNorm) -> None:
        self.norm = norm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        dense = ops.activation(x.flatten(1), "identity", gated=False)  # a head is part of a longer row
        return self.norm(dense.reshape(-1, x.shape[-1])).view(x.shape)


class AcrossHeads:
    """A norm over the heads of all ranks together, of which `norm` holds the weights of this rank's. x: [T,H,D]

    Where several ranks hold the same key head, each head counts equally often, and so the mean over ranks is right."""

    def __init__(self, norm: RMSNorm | LayerNorm, link: Link) -> None:
        self.norm, self.link = norm, link

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.link.ranks.size == 1:
            return self.norm(x.flatten(1)).view(x.shape)
        flat = x.flatten(1).float()
        shift = None
        if isinstance(self.norm, LayerNorm):
            flat, shift = flat - self._mean(flat), self.norm.bias
        normed = flat * torch.rsqrt(self._mean(flat.square()) + self.norm.eps) * self.norm.weight.float()
        return (normed if shift is None else normed + shift.float()).to(x.dtype).view(x.shape)

    def _mean(self, x: torch.Tensor) -> torch.Tensor:
        """[T,1]"""
        return self.link.all_reduce(x.mean(dim=1, keepdim=True)) / self.link.ranks.size
