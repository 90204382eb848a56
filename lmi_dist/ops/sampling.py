"""From logits to a token: penalties, the choice with counter-based random numbers, log probabilities."""

import math

import torch
from torch import Tensor

from lmi_dist.errors import KernelError
from lmi_dist.ops import column
from lmi_dist.ops.shapes import Shapes

MASK = 0xFFFFFFFF


def penalize(
    logits: Tensor,
    history_starts: Tensor | None = None,
    history_ids: Tensor | None = None,
    history_counts: Tensor | None = None,
    repetition: Tensor | None = None,
    presence: Tensor | None = None,
    frequency: Tensor | None = None,
    bias_starts: Tensor | None = None,
    bias_ids: Tensor | None = None,
    bias_values: Tensor | None = None,
) -> None:
    """Repetition (Keskar et al. 2019), then presence and frequency penalty, then bias, in place on logits: fp32 [R,V].

    Row r's history: history_ids (each once) and history_counts (how often generated; 0: only in the prompt) from
    history_starts[r] to history_starts[r+1]; its bias: bias_ids, bias_values from bias_starts[r] to bias_starts[r+1]. repetition,
    presence, frequency: fp32 [R]. Starts, ids and counts: int32. Either group may be None. Raises KernelError on shapes and on
    ids outside of the vocabulary."""
    library = column.library()
    if library is None:
        return penalize_torch(
            logits, history_starts, history_ids, history_counts, repetition, presence, frequency, bias_starts, bias_ids, bias_values
        )
    return library.call(
        "penalize", logits=logits, history_starts=history_starts, history_ids=history_ids, history_counts=history_counts,
        repetition=repetition, presence=presence, frequency=frequency, bias_starts=bias_starts, bias_ids=bias_ids,
        bias_values=bias_values,
    )  # fmt: skip


def penalize_torch(
    logits: Tensor,
    history_starts: Tensor | None = None,
    history_ids: Tensor | None = None,
    history_counts: Tensor | None = None,
    repetition: Tensor | None = None,
    presence: Tensor | None = None,
    frequency: Tensor | None = None,
    bias_starts: Tensor | None = None,
    bias_ids: Tensor | None = None,
    bias_values: Tensor | None = None,
) -> None:
    shapes = _logits_shape("penalize", logits)
    changes: list[tuple[tuple[Tensor, Tensor], Tensor, bool]] = []  # all is checked before anything is changed
    if history_starts is not None:
        rows, ids = _pieces(shapes, "history", history_starts, history_ids)
        counts = _given(shapes, "history_counts", history_counts, "history", torch.int32)
        factor, once, each = (
            _given(shapes, name, values, "R", torch.float32)[rows]
            for name, values in (("repetition", repetition), ("presence", presence), ("frequency", frequency))
        )
        found = logits[rows, ids]
        found = torch.where(found > 0, found / factor, found * factor)
        changes.append(((rows, ids), found - (each * counts + once * (counts > 0)), False))
    if bias_starts is not None:
        place = _pieces(shapes, "bias", bias_starts, bias_ids)
        changes.append((place, _given(shapes, "bias_values", bias_values, "bias", torch.float32), True))
    for place, values, accumulate in changes:
        logits.index_put_(place, values, accumulate=accumulate)


def _given(shapes: Shapes, name: str, values: Tensor | None, letters: str, dtype: torch.dtype) -> Tensor:
    if values is None:
        raise KernelError(f"{shapes.operation}: {name} is absent; it must be given")
    shapes.check(name, values, letters, dtype)
    return values


def _pieces(shapes: Shapes, name: str, starts: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Row and id of each entry."""
    ids = _given(shapes, f"{name}_ids", ids, name, torch.int32)
    shapes.check(f"{name}_starts", starts, "R+1", torch.int32)
    sizes = starts.diff()
    ascends = bool((sizes >= 0).all()) and int(starts[0]) == 0 and int(starts[-1]) == len(ids)
    shapes.require(ascends, f"{name}_starts must ascend from 0 to {len(ids)}")
    shapes.require(bool(((ids >= 0) & (ids < shapes.sizes["V"])).all()), f"{name}_ids must be 0 to V-1")
    return torch.repeat_interleave(torch.arange(shapes.sizes["R"]), sizes.long()), ids.long()


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    typical_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """One id a row: the greatest logit (ties: lowest id) where temperature is 0, else a draw from what top-k, top-p, typical-p and
    min-p leave, in this order, with noise that is a function of (seed, position, id) only.

    logits: fp32 [R,V], overwritten; temperature, top_p, typical_p, min_p: fp32 [R]; top_k (0: off), positions: int32 [R];
    seeds: uint64 [R]. Returns int32 [R], -1 for a row with a NaN or with no logit above -infinity. Raises KernelError on shapes."""
    library = column.library()
    if library is None:
        return sample_torch(logits, temperature, top_k, top_p, typical_p, min_p, seeds, positions)
    ids = torch.empty(logits.shape[:1], dtype=torch.int32, device=logits.device)
    library.call(
        "sample", logits=logits, temperature=temperature, top_k=top_k, top_p=top_p, typical_p=typical_p, min_p=min_p, seeds=seeds,
        positions=positions, ids=ids,
    )  # fmt: skip
    return ids


def sample_torch(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    typical_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    shapes = _logits_shape("sample", logits)
    for name, values in (("temperature", temperature), ("top_p", top_p), ("typical_p", typical_p), ("min_p", min_p)):
        shapes.check(name, values, "R", torch.float32)
    for name, values in (("top_k", top_k), ("positions", positions)):
        shapes.check(name, values, "R", torch.int32)
    shapes.check("seeds", seeds, "R", torch.uint64)
    shapes.require(bool((temperature >= 0).all()), "temperature must be at least 0")
    shapes.require(bool((min_p <= 1).all()), "min_p must be at most 1")
    ids = []
    for row, is_good in enumerate(_can_be_drawn(logits).tolist()):
        if not is_good:
            ids.append(-1)
            continue
        if temperature[row] == 0:
            ids.append(_first_max(logits[row]))
            continue
        scaled = relative(logits[row]) / temperature[row]
        left = remaining(scaled, int(top_k[row]), float(top_p[row]), float(typical_p[row]), float(min_p[row]))
        noise = gumbel(int(seeds[row].item()), int(positions[row]), left)
        ids.append(int(left[_first_max(scaled[left].double() + noise)]))
    return torch.tensor(ids, dtype=torch.int32)


def relative(logits: Tensor) -> Tensor:
    """Logits minus the greatest of their row, which becomes 0 even if it is infinite. logits: [...,V]."""
    greatest = logits.max(-1, keepdim=True).values
    return torch.where(logits == greatest, 0.0, logits - greatest)


def remaining(logits: Tensor, top_k: int, top_p: float, typical_p: float, min_p: float) -> Tensor:
    """Ids that may be drawn, ascending. logits: fp32 [V], relative to their maximum, divided by the temperature."""
    ids = torch.arange(len(logits))
    weights = torch.exp(logits)
    if top_k > 0:
        ids = ids[_smallest(-logits[ids], torch.ones(len(ids)), top_k)]
    if top_p < 1:
        ids = ids[_smallest(-logits[ids], weights[ids], top_p * float(weights[ids].double().sum()))]
    if typical_p < 1:
        total = weights[ids].double().sum()
        information = total.log() - logits[ids].double()  # -log p
        entropy = (weights[ids].double() / total * information).nansum()  # 0 * inf for what has no chance
        ids = ids[_smallest((information - entropy).abs().float(), weights[ids], typical_p * float(total))]
    if min_p > 0:
        ids = ids[weights[ids] >= torch.tensor(min_p) * weights[ids].max()]
    return ids


def _smallest(keys: Tensor, weights: Tensor, wanted: float) -> Tensor:
    """Which of the keys are the smallest ones whose weights first reach `wanted`, or equal to the greatest of these."""
    order = torch.argsort(keys)
    sums = weights[order].double().cumsum(0)
    last = min(int((sums < wanted).sum()), len(keys) - 1)
    return keys <= keys[order[last]]


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 (Salmon et al. 2011): four words of random bits. counter: four int64 tensors of 32-bit words, of one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low0, high0 = _product(c0, 0xD2511F53)
        low1, high1 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Low and high word of the 64-bit product; int64 wraps around, and the shift's copies of the sign are masked off."""
    product = a * b
    return product & MASK, (product >> 32) & MASK


def gumbel(seed: int, position: int, ids: Tensor) -> Tensor:
    """Gumbel noise of the tokens `ids`, float64: -log(-log(u)) with u from word 0 of Philox at counter (id, position, 0, 0)."""
    zero = torch.zeros_like(ids)
    word = philox((ids, zero + (position & MASK), zero, zero), (seed & MASK, seed >> 32))[0]
    return -torch.log(-torch.log((word.double() + 0.5) * 2.0**-32))


def logprobs(logits: Tensor, ids: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log probabilities (values), ranks (how many logits are larger) and the `top` best (values and ids, ties: lowest id) a row.

    logits: fp32 [R,V], unchanged; ids: int32 [R]. Returns fp32 [R], int32 [R], fp32 [R,top], int32 [R,top]; for an id outside of
    the vocabulary, and a row with a NaN or without a logit above -infinity, the value is NaN, the rank -1 and the best are
    undefined. Raises KernelError on shapes and on top > V."""
    library = column.library()
    if library is None:
        return logprobs_torch(logits, ids, top)
    rows = logits.shape[0]
    values, top_values = (torch.empty(shape, dtype=torch.float32, device=logits.device) for shape in ((rows,), (rows, top)))
    ranks, top_ids = (torch.empty(shape, dtype=torch.int32, device=logits.device) for shape in ((rows,), (rows, top)))
    library.call("logprobs", logits=logits, ids=ids, values=values, ranks=ranks, top_values=top_values, top_ids=top_ids)
    return values, ranks, top_values, top_ids


def logprobs_torch(logits: Tensor, ids: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = _logits_shape("logprobs", logits)
    shapes.check("ids", ids, "R", torch.int32)
    shapes.require(0 <= top <= shapes.sizes["V"], f"top={top} must be 0 to V")
    table = torch.log_softmax(relative(logits).double(), -1).float()
    is_good = _can_be_drawn(logits) & (ids >= 0) & (ids < shapes.sizes["V"])
    chosen = torch.where(is_good, ids, 0).long()[:, None]
    values = torch.where(is_good, table.gather(1, chosen)[:, 0], math.nan)
    ranks = torch.where(is_good, (logits > logits.gather(1, chosen)).sum(-1, dtype=torch.int32), -1)
    best = torch.sort(logits, descending=True, stable=True).indices[:, :top]
    return values, ranks, table.gather(1, best), best.int()


def _logits_shape(operation: str, logits: Tensor) -> Shapes:
    shapes = Shapes(operation)
    shapes.check("logits", logits, "R V", torch.float32)
    shapes.require(shapes.sizes["V"] > 0, "V must be at least 1")
    return Shapes(operation, **shapes.sizes, **{"R+1": shapes.sizes["R"] + 1})


def _can_be_drawn(logits: Tensor) -> Tensor:
    """bool [R]"""
    return logits.max(-1).values > -math.inf  # a NaN is the maximum of its row


def _first_max(values: Tensor) -> int:
    return int((values == values.max()).nonzero()[0])
