"""What the package flash_attn offers of what we call, by the plain definition and with its checks: for machines without a GPU."""

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


class FakeFlashAttn(ModuleType):
    """calls: the arguments of each call that are no tensors, and its numbers of rows and keys."""

    __version__ = "2.8.3"

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.calls: list[dict[str, Any]] = []

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
    ) -> Tensor:
        """q: [rows,H,D], k, v: [keys,K,D]."""
        assert q.dtype in (torch.bfloat16, torch.float16)
        assert q.dtype == k.dtype == v.dtype
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert all(each.stride(-1) == 1 for each in (q, k, v))
        assert alibi_slopes is None or (alibi_slopes.dtype == torch.float32 and alibi_slopes.shape == (q.shape[1],))
        bounds = [list(pairwise(starts.tolist())) for starts in (cu_seqlens_q, cu_seqlens_k)]
        assert [bound[-1][1] for bound in bounds] == [len(q), len(k)]
        assert max_seqlen_q == max(end - begin for begin, end in bounds[0])
        assert max_seqlen_k == max(end - begin for begin, end in bounds[1])
        told = {"rows": len(q), "keys": len(k), "causal": causal, "window": window_size, "softcap": softcap}
        self.calls.append(told | {"alibi": alibi_slopes is not None, "scale": softmax_scale})
        options = (softmax_scale or q.shape[-1] ** -0.5, causal, window_size, softcap, alibi_slopes)
        parts = [_attend(q[slice(*rows)], k[slice(*keys)], v[slice(*keys)], *options) for rows, keys in zip(*bounds, strict=True)]
        return torch.cat(parts)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: tuple[int, int], softcap: float, alibi: Tensor | None
) -> Tensor:
    k, v = (each.float().repeat_interleave(q.shape[1] // each.shape[1], 1).transpose(0, 1) for each in (k, v))  # [H,keys,D]
    scores = scale * q.float().transpose(0, 1) @ k.transpose(1, 2)
    scores = softcap * torch.tanh(scores / softcap) if softcap > 0.0 else scores
    positions = torch.arange(len(q), device="cpu")[:, None] + k.shape[1] - len(q)
    distance = (torch.arange(k.shape[1], device="cpu") - positions).to(q.device)
    scores = scores if alibi is None else scores - alibi[:, None, None] * distance.abs()
    seen = distance <= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    seen = seen if window[0] < 0 else seen & (distance >= -window[0])
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1).to(q.dtype)


def install(patch: pytest.MonkeyPatch) -> FakeFlashAttn:
    fake = FakeFlashAttn()
    patch.setitem(sys.modules, "flash_attn", fake)
    return fake
