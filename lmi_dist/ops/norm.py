"""RMS norm and layer norm, with the residual addition before them."""

import torch
from torch import Tensor

from lmi_dist.ops import column
from lmi_dist.ops.shapes import FLOATS, Shapes


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    addend: Tensor | None = None,
) -> Tensor:
    """(weight + weight_offset) * s / sqrt(mean(s^2) + eps) + addend, with s = x, or s = residual := x + residual (changed in
    place). x, residual, addend: [T,E], weight: [E] or None (1), one dtype. Returns [T,E] (Zhang, Sennrich 2019). Raises KernelError
    on shapes."""
    library = column.library()
    if library is None:
        return rms_norm_torch(x, weight, eps, residual=residual, weight_offset=weight_offset, addend=addend)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    library.call(
        "rms_norm", out=out, x=x, residual=residual, weight=weight, addend=addend, eps=eps, weight_offset=weight_offset
    )  # fmt: skip
    return out


def rms_norm_torch(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    addend: Tensor | None = None,
) -> Tensor:
    _check("rms_norm", x, weight, None, residual).check("addend", addend, "T E", x.dtype)
    s = _add(x, residual)
    out = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    out = out if weight is None else out * (weight.float() + weight_offset)
    return (out if addend is None else out + addend.float()).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, residual: Tensor | None = None) -> Tensor:
    """weight * (s - mean(s)) / sqrt(var(s) + eps) + bias, with s = x, or s = residual := x + residual (changed in place).
    x, residual: [T,E], weight, bias: [E] or None, one dtype. Returns [T,E] (Ba et al. 2016). Raises KernelError on shapes."""
    library = column.library()
    if library is None:
        return layer_norm_torch(x, weight, bias, eps, residual=residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    library.call("layer_norm", out=out, x=x, residual=residual, weight=weight, bias=bias, eps=eps)
    return out


def layer_norm_torch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, residual: Tensor | None = None
) -> Tensor:
    _check("layer_norm", x, weight, bias, residual)
    s = _add(x, residual)
    centred = s - s.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    out = out if weight is None else out * weight.float()
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _add(x: Tensor, residual: Tensor | None) -> Tensor:
    """What is normed, in float; the sum is rounded to x's dtype as a separate addition would."""
    if residual is None:
        return x.float()
    residual += x
    return residual.float()


def _check(operation: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Shapes:
    shapes = Shapes(operation)
    shapes.check("x", x, "T E", *FLOATS)
    shapes.check("residual", residual, "T E", x.dtype)
    shapes.check("weight", weight, "E", x.dtype)
    shapes.check("bias", bias, "E", x.dtype)
    return shapes
