"""The CPU column for callers whose caches are [N,K,P,D] as the header writes them: it keeps the numbers in an order of its own."""

from collections.abc import Callable

import torch
from torch import Tensor

from lmi_dist.ops.abi import Library


def keys_in_order(cache: Tensor) -> Tensor:
    """[N,K,P,D] as [N,K,D/2,P,2]."""
    return cache.unflatten(3, (-1, 2)).transpose(2, 3)


def values_in_order(cache: Tensor) -> Tensor:
    """[N,K,P,D] as [N,K,P/2,D,2]."""
    return cache.unflatten(2, (-1, 2)).transpose(3, 4)


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {"k_cache": keys_in_order, "v_cache": values_in_order}


class InOrder(Library):
    """Gives the library copies of caches in its order, whose blocks lie apart; what it wrote there comes back."""

    def call(self, name: str, **fields: Tensor | float | None) -> None:
        given = {field: each for field, each in fields.items() if field in ORDERS and isinstance(each, Tensor) and is_cache(each)}
        copies = {field: in_order(field, cache) for field, cache in given.items()}
        super().call(name, **fields | copies)
        if name == "rotary":
            for field, cache in given.items():
                ORDERS[field](cache).copy_(copies[field].view(ORDERS[field](cache).shape))


def is_cache(x: Tensor) -> bool:
    """What can be brought into order; the rest is for the library to refuse."""
    return x.dim() == 4 and x.shape[2] % 16 == 0 and x.shape[3] % 2 == 0


def in_order(field: str, cache: Tensor) -> Tensor:
    """[N,K,P,D] again, of which only the strides of N and K tell the truth."""
    num_blocks, heads, block, size = cache.shape
    apart = torch.zeros(num_blocks, heads + 1, block * size + 16, dtype=cache.dtype)[:, :heads, : block * size]
    apart.copy_(ORDERS[field](cache).reshape(num_blocks, heads, block * size))
    return apart.unflatten(2, (block, size))
