"""Attention of prompts by flash-attn, where the operator asks for it (prefill_attention=flash-attn). Everything else stays with our
kernels.

flash-attn 2 reads keys from pages of a multiple of 256 tokens, as [N,P,K,D]; our blocks have 16, as [N,K,P,D]. So the keys and
values of a call's sequences are first gathered into one piece, which costs the reading and writing of them once more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from torch import Tensor

from lmi_dist.errors import KernelError

GATHERED_KEYS = 1 << 15  # of a call, if it has more sequences than one: bounds the memory for them


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCall:
    """Some sequences of a step, for one call. rows: theirs, of q. Key i of the call lies in block blocks[i] at place places[i]."""

    rows: slice
    starts: Tensor  # int32 [B+1], from the call's first row on
    key_starts: Tensor  # int32 [B+1]
    max_rows: int  # of a sequence
    max_keys: int
    blocks: Tensor  # int32 [keys]
    places: Tensor  # int32 [keys]


@dataclass(frozen=True, slots=True)
class Prompts:
    """What flash-attn does of a step: all from sequence `first` on. Those before it have a row each: it is the first row, too."""

    first: int
    calls: Sequence[PromptCall]


def varlen_function() -> Callable[..., Tensor]:
    """flash-attn's. Raises KernelError with the way out if the package cannot be imported."""
    try:
        function: Callable[..., Tensor] = import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, AttributeError) as error:
        raise KernelError(
            f"prefill_attention=flash-attn needs the package flash-attn ({error}): pip install 'lmi-dist[flash-attn]', or leave "
            "the option out"
        ) from error
    return function


def attend(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prompts: Prompts,
    *,
    scale: float,
    causal: bool,
    window: int,
    soft_cap: float,
    alibi: Tensor | None,
) -> None:
    """The rows of `prompts` in out, as `attention` has them. out, q: [T,H,D] and caches [N,K,P,D], all bf16 or all fp16."""
    function = varlen_function()
    options = {"softcap": soft_cap} if soft_cap > 0.0 else {}  # which versions before 2.6 do not know
    for call in prompts.calls:
        k, v = (cache[call.blocks, :, call.places] for cache in (k_cache, v_cache))  # [keys,K,D]
        out[call.rows] = function(
            q[call.rows], k, v, call.starts, call.key_starts, call.max_rows, call.max_keys,
            softmax_scale=scale, causal=causal, window_size=(window - 1, 0) if window else (-1, -1), alibi_slopes=alibi, **options,
        )  # fmt: skip
