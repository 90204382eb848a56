"""Mixture of experts: routing, rows ordered by expert for `grouped_linear`, and the weighted sum of what the experts gave."""

from typing import NamedTuple

import torch
from torch import Tensor

from lmi_dist.ops import column
from lmi_dist.ops.shapes import FLOATS, Shapes


class Routing(NamedTuple):
    """Pair t*top_k + j is token t's j-th expert. order: the pairs by expert; starts[x] .. starts[x+1]-1 of it are expert x's."""

    weights: Tensor  # fp32 [T,top_k]
    experts: Tensor  # int32 [T,top_k]
    order: Tensor  # int32 [T*top_k]
    starts: Tensor  # int32 [X+1]


def moe_route(logits: Tensor, top_k: int, *, renormalize: bool) -> Routing:
    """The top_k experts of each token by softmax(logits), ties to the lowest; weights sum to 1 if renormalize. logits: [T,X].
    Raises KernelError on shapes."""
    library = column.library()
    if library is None:
        return moe_route_torch(logits, top_k, renormalize=renormalize)
    num_tokens = logits.shape[0]
    routing = Routing(
        torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device),
        torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits.device),
        torch.empty(num_tokens * top_k, dtype=torch.int32, device=logits.device),
        torch.empty(logits.shape[-1] + 1, dtype=torch.int32, device=logits.device),
    )
    library.call("moe_route", logits=logits, **routing._asdict(), renormalize=renormalize)
    return routing


def moe_route_torch(logits: Tensor, top_k: int, *, renormalize: bool) -> Routing:
    shapes = Shapes("moe_route")
    shapes.check("logits", logits, "T X", *FLOATS)
    num_experts = logits.shape[1]
    shapes.require(1 <= top_k <= num_experts, f"top_k={top_k} must be 1 to {num_experts}, the number of experts")
    experts = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = logits.float().softmax(dim=-1).gather(1, experts)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    order = experts.flatten().sort(stable=True).indices
    counts = experts.flatten().bincount(minlength=num_experts)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Routing(weights, experts.int(), order.int(), starts.int())


def moe_gather(x: Tensor, order: Tensor) -> Tensor:
    """out[i] = x[order[i] // top_k]. x: [T,E], order: int32 [T*top_k]. Returns [T*top_k,E]. Raises KernelError on shapes."""
    library = column.library()
    if library is None:
        return moe_gather_torch(x, order)
    out = torch.empty((order.shape[0], x.shape[-1]), dtype=x.dtype, device=x.device)
    library.call("moe_gather", out=out, x=x, order=order)
    return out


def moe_gather_torch(x: Tensor, order: Tensor) -> Tensor:
    shapes = Shapes("moe_gather")
    shapes.check("x", x, "T E", *FLOATS)
    top_k = _top_k(shapes, order, len(x))
    return x[order.long() // top_k]


def moe_combine(y: Tensor, weights: Tensor, order: Tensor, *, residual: Tensor | None = None) -> Tensor:
    """out[t] = sum_j weights[t,j] * y[place of pair t*top_k + j in order] + residual[t]. y: [T*top_k,E], weights: fp32 [T,top_k],
    order: int32 [T*top_k], residual: [T,E] in y's dtype. Returns [T,E]. Raises KernelError on shapes."""
    library = column.library()
    if library is None:
        return moe_combine_torch(y, weights, order, residual=residual)
    out = torch.empty((weights.shape[0], y.shape[-1]), dtype=y.dtype, device=y.device)
    library.call("moe_combine", out=out, y=y, weights=weights, order=order, residual=residual)
    return out


def moe_combine_torch(y: Tensor, weights: Tensor, order: Tensor, *, residual: Tensor | None = None) -> Tensor:
    shapes = Shapes("moe_combine")
    shapes.check("weights", weights, "T top_k", torch.float32)
    shapes.sizes["pairs"] = weights.numel()
    shapes.check("y", y, "pairs E", *FLOATS)
    shapes.check("residual", residual, "T E", y.dtype)
    _top_k(shapes, order, len(weights))
    by_pair = torch.empty(y.shape, dtype=torch.float32)
    by_pair[order.long()] = y.float()
    out = torch.zeros((weights.shape[0], y.shape[1]))
    for j, each in enumerate(by_pair.view(*weights.shape, y.shape[1]).unbind(1)):
        out += weights[:, j, None] * each
    return (out if residual is None else out + residual.float()).to(y.dtype)


def _top_k(shapes: Shapes, order: Tensor, num_tokens: int) -> int:
    shapes.check("order", order, "pairs", torch.int32)
    num_pairs = len(order)
    shapes.require(num_pairs % max(num_tokens, 1) == 0, f"order has {num_pairs} entries for {num_tokens} tokens")
    inside = bool(((order >= 0) & (order < num_pairs)).all())
    shapes.require(inside, f"an entry of order is not one of the {num_pairs} pairs")
    return max(num_pairs // max(num_tokens, 1), 1)
