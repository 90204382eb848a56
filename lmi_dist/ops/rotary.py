"""Rotary embedding of queries and keys, fused with the write of keys and values into the cache."""

import torch
from torch import Tensor, int32

from lmi_dist.ops import column
from lmi_dist.ops.shapes import FLOATS, Shapes


def rotary(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rows: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    slots: Tensor | None,
    *,
    interleaved: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Rotate the heads of q and k in place by row rows[t] of cos and sin, and write k and v to slots[t] of the caches.

    q: [T,H,D], k, v: [T,K,D], views of a fused qkv or not; cos, sin: fp32 [R,half], which rotate the first 2*half of a head,
    pairs (i, i+half), or (2i, 2i+1) if interleaved; caches [N,K,P,D]; rows, slots: int32 [T], a negative slot writes nothing
    (Su et al. 2021). q None: only the write. k, v None: only q. cos, sin None: no rotation. Caches are of k's dtype or fp8 (E4M3),
    which hold k / k_scale and v / v_scale, the nearest number to it, at most 448.
    Raises KernelError on shapes, on rows and slots out of range, and on a scale that is not above 0."""
    library = column.library()
    if library is None:
        return rotary_torch(
            q, k, v, cos, sin, rows, k_cache, v_cache, slots, interleaved=interleaved, k_scale=k_scale, v_scale=v_scale
        )
    return library.call(
        "rotary", q=q, k=k, v=v, cos=cos, sin=sin, rows=rows, k_cache=k_cache, v_cache=v_cache, slots=slots,
        interleaved=interleaved, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


def rotary_torch(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rows: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    slots: Tensor | None,
    *,
    interleaved: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    _check(q, k, v, cos, sin, rows, k_cache, v_cache, slots, (k_scale, v_scale))
    if cos is not None and sin is not None and rows is not None:
        for x in (q, k):
            if x is not None:
                _rotate(x, cos[rows.long()][:, None], sin[rows.long()][:, None], interleaved)
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if x is not None and cache is not None and slots is not None:
            taken = slots >= 0
            slot = slots[taken].long()
            cache[slot // cache.shape[2], :, slot % cache.shape[2]] = _packed(x[taken], cache.dtype, scale)


def _packed(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """What a cache of dtype holds of x."""
    if dtype == x.dtype:
        return x
    most = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-most, most).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """x: [T,H,D] in place; cos, sin: [T,1,half]."""
    half = cos.shape[-1]
    places = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    a, b = (x[..., place].float() for place in places)  # views of x itself if it is fp32: both results before either is written
    turned = (a * cos - b * sin, b * cos + a * sin)
    for place, part in zip(places, turned, strict=True):
        x[..., place] = part.to(x.dtype)


def _check(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rows: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    slots: Tensor | None,
    scales: tuple[float, float],
) -> None:
    shapes = Shapes("rotary")
    dtype = next((x.dtype for x in (q, k) if x is not None), FLOATS[0])
    shapes.check("q", q, "T H D", *FLOATS)
    shapes.check("k", k, "T K D", dtype)
    shapes.check("v", v, "T K D", dtype)
    shapes.check("cos", cos, "R half", FLOATS[0])
    shapes.check("sin", sin, "R half", FLOATS[0])
    shapes.check("rows", rows, "T", int32)
    shapes.check_caches(k_cache, v_cache, dtype, scales)
    shapes.check("slots", slots, "T", int32)
    given = [x is not None for x in (k, v, k_cache, v_cache, slots)]
    shapes.require(all(given) or not any(given), "k, v, k_cache, v_cache and slots must be given together")
    shapes.require((cos is None) == (sin is None) == (rows is None), "cos, sin and rows must be given together")
    if k_cache is not None and slots is not None:
        num_slots = k_cache.shape[0] * k_cache.shape[2]
        shapes.require(bool((slots < num_slots).all()), f"an entry of slots is beyond the {num_slots} of the cache")
    if cos is not None and rows is not None:
        shapes.require(bool(((rows >= 0) & (rows < len(cos))).all()), f"an entry of rows is beyond the {len(cos)} of cos")
