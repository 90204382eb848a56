"""Mixture of experts: twins against a token-by-token loop, kernels against twins."""

import pytest
import torch
from kernel_cases import DTYPES, assert_close, rand, same_bits, strided

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops.abi import Library
from lmi_dist.ops.moe import moe_combine_torch, moe_gather_torch, moe_route_torch

SIZES = [(1, 1, 1), (7, 8, 2), (113, 60, 4)]  # tokens, experts, top_k


@pytest.mark.parametrize("renormalize", [False, True])
def test_routed_experts_are_the_likeliest(renormalize: bool) -> None:
    logits = rand(20, 8)
    p, experts = logits.double().softmax(-1).topk(3)
    expected = p / p.sum(-1, keepdim=True) if renormalize else p

    routing = moe_route_torch(logits, 3, renormalize=renormalize)

    assert_close(routing.weights, expected.float())
    assert routing.experts.tolist() == experts.tolist()


def test_pairs_are_ordered_by_expert() -> None:
    routing = moe_route_torch(rand(20, 8), 3, renormalize=True)

    expected = sorted(range(60), key=lambda pair: (routing.experts.flatten()[pair].item(), pair))

    assert routing.order.tolist() == expected
    for expert in range(8):
        pairs = routing.order[routing.starts[expert] : routing.starts[expert + 1]].long()
        assert (routing.experts.flatten()[pairs] == expert).all()


def test_gather_then_combine_sums_the_weights() -> None:
    x, routing = rand(20, 9), moe_route_torch(rand(20, 8, seed=1), 3, renormalize=False)

    out = moe_combine_torch(moe_gather_torch(x, routing.order), routing.weights, routing.order, residual=x)

    assert_close(out, x + x * routing.weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_route_matches_twin(library: Library, dtype: torch.dtype, size: tuple[int, int, int], renormalize: bool) -> None:
    logits = strided(rand(size[0], size[1], dtype=dtype).mul(4).round().div(4))  # with ties

    routing, twins = (route(logits, size[2], renormalize=renormalize) for route in (ops.moe_route, moe_route_torch))

    assert_close(routing.weights, twins.weights)
    for name in ("experts", "order", "starts"):
        assert same_bits(getattr(routing, name), getattr(twins, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gather_and_combine_match_twins(library: Library, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    num_tokens, num_experts, top_k = size
    x, y = strided(rand(num_tokens, 33, dtype=dtype)), strided(rand(num_tokens * top_k, 33, dtype=dtype, seed=1))
    routing = moe_route_torch(rand(num_tokens, num_experts, seed=2), top_k, renormalize=True)

    assert same_bits(ops.moe_gather(x, routing.order), moe_gather_torch(x, routing.order))
    for residual in (None, x):
        out = ops.moe_combine(y, routing.weights, routing.order, residual=residual)
        assert_close(out, moe_combine_torch(y, routing.weights, routing.order, residual=residual))


def test_moe_names_what_is_wrong(column: str) -> None:
    order = torch.arange(6, dtype=torch.int32)

    with pytest.raises(KernelError, match=r"moe_route: top_k.*=9 must be 1 to 8"):
        ops.moe_route(rand(3, 8), 9, renormalize=False)
    with pytest.raises(KernelError, match=r"moe_gather: an entry of order"):
        ops.moe_gather(rand(3, 8), order + 1)
    with pytest.raises(KernelError, match=r"moe_combine: y has shape \[5, 8\]"):
        ops.moe_combine(rand(5, 8), rand(3, 2), order)
