"""Kernels of the column in use against what the same machine does at its best in the same run, and against torch. Inputs come from
memory, not from a cache."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from gpu_limits import Limits, Row, Sizes, Work, measure_limits, seconds_a_call
from torch import Tensor
from torch.nn import functional

from lmi_dist import ops

BLOCK_SIZE = 16
EPS = 1e-5


@dataclass(frozen=True)
class Stage:
    """work(i) is the i-th call, on inputs of its own if i is below `copies`. amount: the least bytes that it reads and writes, or
    operations that it does, as `limit` counts. goal: least share of the limit; None: for information."""

    name: str
    limit: Literal["copy", "product"]
    amount: float  # bytes or operations
    copies: int
    work: Work
    torch: Work | None = None
    goal: float | None = None
    waits: bool = False  # for its result, so that the host's part counts, too


# ---- stages ----


class Maker:
    """Random inputs on the device, as many copies as it takes to leave the cache."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        self.sizes, self.device = sizes, device

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

    def ints(self, values: list[int] | range | Tensor) -> Tensor:
        return torch.as_tensor(values).to(device=self.device, dtype=torch.int32)

    def copies(self, num_bytes: float) -> int:
        return max(1, -(-self.sizes.cold_bytes // int(num_bytes)))

    def many(self, num_copies: int, *shape: int) -> list[Tensor]:
        return [self.rand(*shape) for _ in range(num_copies)]


def stages(sizes: Sizes, device: str, capability: int) -> Iterator[Callable[[], Stage]]:
    """Each makes its inputs when called, so that they are gone before the next one's."""
    maker = Maker(sizes, device)
    yield lambda: decode(maker, sizes.rows, sizes.context, 0.85)
    yield lambda: decode(maker, 1, sizes.long_context, 0.8)
    yield lambda: prefill(maker, 0.6 if capability == 90 else 0.35)
    for make in (rms_norm, add_rms_norm, layer_norm, rotary, gated_activation, activation, embedding, moe_gather, moe_combine):
        yield lambda make=make: make(maker)  # type: ignore[misc]
    yield lambda: sample(maker)
    yield lambda: logprobs(maker)
    for rows in (1, sizes.rows, sizes.tokens):
        yield lambda rows=rows: linear(maker, rows)  # type: ignore[misc]


def decode(maker: Maker, num_sequences: int, length: int, goal: float) -> Stage:
    """One new token a sequence over its blocks, in a shuffled order; torch's on keys that lie together."""
    s = maker.sizes
    blocks = -(-length // BLOCK_SIZE) * num_sequences
    num_bytes = 4 * num_sequences * length * s.kv_heads * s.head_dim
    copies = maker.copies(num_bytes)
    caches = [maker.many(2, blocks, s.kv_heads, BLOCK_SIZE, s.head_dim) for _ in range(copies)]
    tables = maker.ints(torch.randperm(blocks).view(num_sequences, -1))
    starts, lengths = maker.ints(range(num_sequences + 1)), maker.ints([length] * num_sequences)
    q = maker.rand(num_sequences, s.heads, s.head_dim)

    def work(i: int) -> Tensor:
        k_cache, v_cache = caches[i % copies]
        return ops.attention(q, k_cache, v_cache, starts, lengths, tables, scale=s.head_dim**-0.5)

    def sdpa(i: int) -> Tensor:
        k, v = (cache.view(num_sequences, s.kv_heads, -1, s.head_dim) for cache in caches[i % copies])
        return functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

    return Stage(f"paged decode attention, {num_sequences} x {length}", "copy", num_bytes, copies, work, sdpa, goal)


def prefill(maker: Maker, goal: float) -> Stage:
    s = maker.sizes
    length, blocks = s.prompt, -(-s.prompt // BLOCK_SIZE)
    caches = maker.many(2, blocks, s.kv_heads, BLOCK_SIZE, s.head_dim)
    tables, starts, lengths = maker.ints(torch.randperm(blocks)[None]), maker.ints([0, length]), maker.ints([length])
    q = maker.rand(length, s.heads, s.head_dim)
    k, v = (cache.transpose(0, 1).reshape(1, s.kv_heads, -1, s.head_dim)[:, :, :length] for cache in caches)

    def work(_: int) -> Tensor:
        return ops.attention(q, *caches, starts, lengths, tables, scale=s.head_dim**-0.5)

    def sdpa(_: int) -> Tensor:
        return functional.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, is_causal=True, enable_gqa=True)

    flops = 4 * (length * (length + 1) / 2) * s.heads * s.head_dim
    return Stage(f"prefill attention, {length} causal, D {s.head_dim}", "product", flops, 1, work, sdpa, goal)


GOAL = 0.85  # of element-wise kernels and norms


def rms_norm(maker: Maker) -> Stage:
    s = maker.sizes
    num_bytes = 4 * s.tokens * s.hidden
    copies = maker.copies(num_bytes)
    xs, weight = maker.many(copies, s.tokens, s.hidden), maker.rand(s.hidden)
    return Stage(
        "rms norm", "copy", num_bytes, copies,
        lambda i: ops.rms_norm(xs[i % copies], weight, EPS),
        lambda i: functional.rms_norm(xs[i % copies], (s.hidden,), weight, EPS), GOAL,
    )  # fmt: skip


def add_rms_norm(maker: Maker) -> Stage:
    s = maker.sizes
    num_bytes = 8 * s.tokens * s.hidden
    copies = maker.copies(num_bytes)
    xs, residuals, weight = (*(maker.many(copies, s.tokens, s.hidden) for _ in range(2)), maker.rand(s.hidden))
    return Stage(
        "add + rms norm", "copy", num_bytes, copies,
        lambda i: ops.rms_norm(xs[i % copies], weight, EPS, residual=residuals[i % copies]),
        lambda i: functional.rms_norm(residuals[i % copies].add_(xs[i % copies]), (s.hidden,), weight, EPS), GOAL,
    )  # fmt: skip


def layer_norm(maker: Maker) -> Stage:
    s = maker.sizes
    num_bytes = 4 * s.tokens * s.hidden
    copies = maker.copies(num_bytes)
    xs, weight, bias = maker.many(copies, s.tokens, s.hidden), maker.rand(s.hidden), maker.rand(s.hidden)
    return Stage(
        "layer norm", "copy", num_bytes, copies,
        lambda i: ops.layer_norm(xs[i % copies], weight, bias, EPS),
        lambda i: functional.layer_norm(xs[i % copies], (s.hidden,), weight, bias, EPS), GOAL,
    )  # fmt: skip


def rotary(maker: Maker) -> Stage:
    """q and k turned in place, k and v written to their slots. No peer: torch has no such operation."""
    s = maker.sizes
    num_bytes = 2 * s.tokens * s.head_dim * (2 * s.heads + 5 * s.kv_heads)
    copies, half, heads = maker.copies(num_bytes), s.head_dim // 2, s.heads + 2 * s.kv_heads
    qkvs = maker.many(copies, s.tokens, heads, s.head_dim)
    caches = maker.many(2, -(-s.tokens // BLOCK_SIZE), s.kv_heads, BLOCK_SIZE, s.head_dim)
    angles = torch.rand(s.tokens, half, device=maker.device)
    cos, sin, rows, slots = angles.cos(), angles.sin(), maker.ints(range(s.tokens)), maker.ints(torch.randperm(s.tokens))

    def work(i: int) -> None:
        q, k, v = qkvs[i % copies].split([s.heads, s.kv_heads, s.kv_heads], dim=1)
        ops.rotary(q, k, v, cos, sin, rows, *caches, slots)

    return Stage("rotary + cache write", "copy", num_bytes, copies, work, None, GOAL)


def gated_activation(maker: Maker) -> Stage:
    s = maker.sizes
    num_bytes = 6 * s.tokens * s.inner
    copies = maker.copies(num_bytes)
    xs = maker.many(copies, s.tokens, 2 * s.inner)

    def plain(i: int) -> Tensor:
        gate, up = xs[i % copies].chunk(2, dim=-1)
        return functional.silu(gate) * up

    work = lambda i: ops.activation(xs[i % copies], "silu", gated=True)  # noqa: E731
    return Stage("silu, gated", "copy", num_bytes, copies, work, plain, GOAL)


def activation(maker: Maker) -> Stage:
    s = maker.sizes
    num_bytes = 4 * s.tokens * s.inner
    copies = maker.copies(num_bytes)
    xs = maker.many(copies, s.tokens, s.inner)
    return Stage(
        "gelu", "copy", num_bytes, copies,
        lambda i: ops.activation(xs[i % copies], "gelu", gated=False), lambda i: functional.gelu(xs[i % copies]), GOAL,
    )  # fmt: skip


def embedding(maker: Maker) -> Stage:
    s = maker.sizes
    table = maker.rand(s.vocab, s.hidden)
    ids = [maker.ints(torch.randint(s.vocab, (s.tokens,))) for _ in range(8)]
    return Stage(
        "embedding", "copy", 4 * s.tokens * s.hidden, 8,
        lambda i: ops.embedding(ids[i % 8], table), lambda i: functional.embedding(ids[i % 8], table), GOAL,
    )  # fmt: skip


def routing(maker: Maker) -> ops.Routing:
    return ops.moe_route(maker.rand(maker.sizes.tokens, maker.sizes.experts), 2, renormalize=True)


def moe_gather(maker: Maker) -> Stage:
    s = maker.sizes
    num_bytes = 6 * s.tokens * s.hidden
    copies, order = maker.copies(num_bytes), routing(maker).order
    xs = maker.many(copies, s.tokens, s.hidden)
    return Stage(
        "experts: gather, 2 of 8", "copy", num_bytes, copies,
        lambda i: ops.moe_gather(xs[i % copies], order), lambda i: xs[i % copies][order // 2], GOAL,
    )  # fmt: skip


def moe_combine(maker: Maker) -> Stage:
    s = maker.sizes
    num_bytes = 6 * s.tokens * s.hidden
    copies, routed = maker.copies(num_bytes), routing(maker)
    ys = maker.many(copies, 2 * s.tokens, s.hidden)
    work = lambda i: ops.moe_combine(ys[i % copies], routed.weights, routed.order)  # noqa: E731
    return Stage("experts: combine, 2 of 8", "copy", num_bytes, copies, work, None, GOAL)


def sample(maker: Maker) -> Stage:
    """Top-k, top-p and min-p; torch sorts for the same. Logits are scratch: what the first call leaves out stays out."""
    s = maker.sizes
    logits = [torch.randn(s.rows, s.vocab, device=maker.device) for _ in range(4)]
    full = {name: torch.full((s.rows,), value, device=maker.device)
            for name, value in {"temperature": 0.8, "top_p": 0.9, "typical_p": 1.0, "min_p": 0.01}.items()}  # fmt: skip
    full["top_k"] = maker.ints([50] * s.rows)
    seeds, positions = torch.arange(s.rows, device=maker.device).to(torch.uint64), maker.ints([7] * s.rows)

    def plain(i: int) -> Tensor:
        values, ids = (logits[i % 4] / 0.8).softmax(-1).sort(descending=True)
        kept = values.masked_fill(values.cumsum(-1) - values > 0.9, 0.0)[:, :50]
        return ids.gather(1, (kept / torch.empty_like(kept).exponential_()).argmax(-1, keepdim=True))

    work = lambda i: ops.sample(logits[i % 4], **full, seeds=seeds, positions=positions)  # noqa: E731
    return Stage(f"sample {s.rows} rows of {s.vocab}", "copy", 4 * s.rows * s.vocab, 4, work, plain, waits=True)


def logprobs(maker: Maker) -> Stage:
    s = maker.sizes
    logits, ids = [torch.randn(s.rows, s.vocab, device=maker.device) for _ in range(4)], maker.ints([3] * s.rows)
    return Stage(
        f"logprobs of {s.rows} rows, 5 alternatives", "copy", 4 * s.rows * s.vocab, 4,
        lambda i: ops.logprobs(logits[i % 4], ids, 5), lambda i: logits[i % 4].log_softmax(-1).topk(5),
        waits=True,
    )  # fmt: skip


def linear(maker: Maker, rows: int) -> Stage:
    """Our own dense one, whose bits do not depend on the rows."""
    s = maker.sizes
    num_bytes, flops = 2 * s.hidden * s.hidden, 2 * rows * s.hidden * s.hidden
    is_large = rows == s.tokens
    copies = 1 if is_large else maker.copies(num_bytes)
    plain = maker.many(copies, s.hidden, s.hidden)
    weights = [ops.pack_linear(s.hidden, s.hidden, torch.bfloat16) for _ in plain]
    for weight, values in zip(weights, plain, strict=True):
        weight.put(values)
    x = maker.rand(rows, s.hidden)
    return Stage(
        f"linear [{s.hidden}, {s.hidden}], {rows} rows",
        "product" if is_large else "copy", flops if is_large else num_bytes, copies,
        lambda i: ops.linear(x, weights[i % copies]), lambda i: functional.linear(x, plain[i % copies]),
    )  # fmt: skip


# ---- the table ----


def measure(make: Callable[[], Stage], limits: Limits, sizes: Sizes, device: str) -> Row:
    """The stage's row. What one kernel does wrong is told in its row and costs nobody else's."""
    try:
        stage = make()
    except Exception as error:
        return Row(getattr(make, "__name__", "stage"), note=f"{type(error).__name__}: {error}")
    limit = getattr(limits, stage.limit)
    try:
        seconds = seconds_a_call(stage.work, stage.copies, sizes.repetitions, waits=stage.waits)
    except Exception as error:
        return Row(stage.name, of=stage.limit, goal=stage.goal, note=f"{type(error).__name__}: {error}")
    row = {"share": stage.amount / limit / seconds, "of": stage.limit, "goal": stage.goal}
    if stage.torch is None:
        return Row(stage.name, seconds, **row)
    try:
        return Row(
            stage.name,
            seconds,
            **row,
            peer="torch",
            peer_seconds=seconds_a_call(stage.torch, stage.copies, sizes.repetitions, waits=stage.waits),
        )
    except Exception as error:
        return Row(stage.name, seconds, **row, note=f"torch: {type(error).__name__}: {error}")


def rows(sizes: Sizes, device: str, capability: int) -> Iterator[Row]:
    limits = measure_limits(sizes, device)
    yield limits.row()
    for make in stages(sizes, device, capability):
        yield measure(make, limits, sizes, device)
        if device == "cuda":
            torch.cuda.empty_cache()
