"""Functions of each number that some models have between their blocks. x: [T,F], changed in place and given back."""

import torch

from lmi_dist import ops


def soft_capped(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap tanh(x / cap) (Bello et al. 2016)."""
    return ops.elementwise(x, "soft_cap", cap)


def clamped(x: torch.Tensor, limit: float) -> torch.Tensor:
    """min(max(x, -limit), limit)"""
    return ops.elementwise(x, "clamp", limit)


def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """factor x"""
    return ops.elementwise(x, "scale", factor)
