"""Attention over blocks: the twin against a dense formula in double, torch's own attention and transformers' buckets; kernels
against the twin; and the same bits however a prompt is cut. Cache slots that no key owns
are NaN throughout: nobody may look at them."""

from dataclasses import dataclass, replace
from typing import Any

import attention_reference as reference
import pytest
import torch
from kernel_cases import DTYPES, HALVES, assert_close, on_sm90a, rand, same_bits, strided
from torch import Tensor
from torch.nn import functional

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops.abi import Library
from lmi_dist.ops.attention import attention_torch, bucket

BLOCK_SIZE = 16
BF16_UNIT = 2**-8  # a number rounded to bf16 is off by so much of itself at most
NAN = float("nan")


@dataclass(frozen=True)
class Batch:
    """Arguments of an attention call. queries[b] rows stand at the end of lengths[b] keys."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    tables: Tensor
    queries: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(
        cls,
        lengths: tuple[int, ...],
        queries: tuple[int, ...],
        heads: tuple[int, int] = (4, 1),  # so many queries a key head that AMX takes them by tiles
        size: int = 32,
        dtype: torch.dtype = torch.float32,
        cache: torch.dtype | None = None,
    ) -> "Batch":
        counts = [-(-length // BLOCK_SIZE) for length in lengths]
        blocks = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(1)).int()
        tables = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int32)
        for row, own in zip(tables, blocks.split([*counts, 1]), strict=False):
            row[: len(own)] = own
        caches = [rand(len(blocks), heads[1], BLOCK_SIZE, size, dtype=cache or dtype, seed=seed) for seed in (2, 3)]
        for part in caches:
            part[blocks[-1]] = NAN
            for row, length in zip(tables, lengths, strict=True):
                if length % BLOCK_SIZE:
                    part[row[length // BLOCK_SIZE], :, length % BLOCK_SIZE :] = NAN
        return cls(rand(sum(queries), heads[0], size, dtype=dtype, seed=4), *caches, tables, queries, lengths)

    def arguments(self) -> tuple[Tensor, ...]:
        starts = torch.tensor([0, *self.queries]).cumsum(0).int()
        return self.q, self.k_cache, self.v_cache, starts, torch.tensor(self.lengths, dtype=torch.int32), self.tables

    def run(self, **options: Any) -> Tensor:
        return ops.attention(*self.arguments(), **{"scale": self.scale, **options})

    def twin(self, **options: Any) -> Tensor:
        return attention_torch(*self.arguments(), **{"scale": self.scale, **options})

    def dense(self, **options: Any) -> Tensor:
        return reference.attention(*self.arguments(), **{"scale": self.scale, **options})

    def slack(self, **options: Any) -> Tensor:
        """How far from the twin a bf16 result may be at levels with dot products of bf16, which round the softmax's weights before
        they use and sum them. Weights p_j (1 + d_j) with |d_j| <= u move out by sum_j p_j d_j (v_j - out) / (1 + sum_j p_j d_j), so
        by at most u / (1 - u) sum_j p_j |v_j - out|, which is at most u / (1 - u) times the values' standard deviation."""
        exact = replace(self, q=self.q.float(), k_cache=self.k_cache.float(), v_cache=self.v_cache.float())
        mean, mean_square = exact.twin(**options), replace(exact, v_cache=exact.v_cache**2).twin(**options)
        return BF16_UNIT / (1 - BF16_UNIT) * (mean_square - mean**2).clamp(min=0).sqrt()

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)


HEADS = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "whole": {"causal": False},
    "window": {"window": 19},
    "window of one": {"window": 1},
    "whole window": {"causal": False, "window": 37},
    "soft cap": {"soft_cap": 2.5},
    "alibi": {"alibi": torch.tensor([0.5, 0.25, 0.06, 0.004])},
    "relative": {"relative_bias": rand(32, HEADS, seed=5)},
    "whole relative": {"causal": False, "relative_bias": rand(32, HEADS, seed=6)},
    "all": {
        "window": 70,
        "soft_cap": 3.0,
        "alibi": torch.linspace(0.1, 0.4, HEADS),
        "relative_bias": rand(9, HEADS),
        "max_distance": 21,
    },
}
by_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@by_option
def test_twin_is_the_dense_formula(options: dict[str, Any]) -> None:
    batch = Batch.of((33, 1, 70, 17), (33, 1, 4, 0))

    assert_close(batch.twin(**options), batch.dense(**options).float())


@pytest.mark.parametrize("causal", [True, False])
def test_twin_is_torchs_own_attention(causal: bool) -> None:
    batch = Batch.of((48,), (48,), heads=(4, 2))
    k, v = (cache[batch.tables[0, :3]].transpose(0, 1).reshape(1, 2, 48, 32) for cache in (batch.k_cache, batch.v_cache))
    q = batch.q.transpose(0, 1)[None]

    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    assert_close(batch.twin(causal=causal), expected[0].transpose(0, 1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 20), (8, 1000), (64, 256), (5, 77)])
def test_buckets_are_those_of_transformers(causal: bool, num_buckets: int, max_distance: int) -> None:
    distance = torch.arange(-max_distance - 50, 1 if causal else max_distance + 50)

    assert torch.equal(bucket(distance, num_buckets, max_distance, causal=causal),
                       reference.bucket(distance, causal, num_buckets, max_distance))  # fmt: skip


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 300), (64, 256)])
@pytest.mark.parametrize("causal", [True, False])
def test_kernel_uses_the_same_buckets(library: Library, num_buckets: int, max_distance: int, causal: bool) -> None:
    """All keys are alike but for a bias that grows with the bucket, and value j is 1 at j: each weight tells its bucket."""
    length = 256
    batch = Batch.of((length,), (1 if causal else length,), heads=(1, 1), size=256)
    batch.v_cache[batch.tables[0, :16].long()] = torch.eye(length).view(16, 1, 16, 256)
    bias = torch.arange(num_buckets)[:, None].float() / 4

    weights = batch.run(scale=0.0, causal=causal, relative_bias=bias, max_distance=max_distance)[:, 0]

    queries = torch.arange(length - len(weights), length)
    buckets = reference.bucket(torch.arange(length)[None] - queries[:, None], causal, num_buckets, max_distance)
    assert_close(weights, torch.softmax(buckets / 4, -1))


@by_option
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_matches_twin(library: Library, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Tensor cores take the weights rounded to the dtype: half a unit of each, times values of up to 4."""
    batch = Batch.of((130, 1, 600, 64, 17), (130, 1, 3, 1, 0), dtype=dtype)
    rounds_weights = library.path.name != "liblmi_cpu.so"

    slack = batch.slack(**options) if dtype == torch.bfloat16 else None
    assert_close(batch.run(**options), batch.twin(**options), factor=4 if rounds_weights else 1, slack=slack)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (7, 1), (32, 4)])
@pytest.mark.parametrize("size", [8, 40, 128, 256])
def test_attention_takes_any_heads_and_sizes(library: Library, heads: tuple[int, int], size: int) -> None:
    batch = Batch.of((70, 33, 9), (70, 1, 2), heads=heads, size=size)

    assert_close(batch.run(), batch.twin())


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_takes_strided_tensors(library: Library, dtype: torch.dtype) -> None:
    batch = Batch.of((70, 33), (70, 1), dtype=dtype)
    qkv = torch.cat([batch.q.flatten(1), rand(71, 128, dtype=dtype)], 1)
    q = qkv[:, :128].view(71, 4, 32)
    k_cache, v_cache = (strided(cache.transpose(1, 2)).transpose(1, 2) for cache in (batch.k_cache, batch.v_cache))
    out, tables = strided(torch.zeros_like(batch.q)), torch.cat([batch.tables, batch.tables], 1)[:, : batch.tables.shape[1]]
    _, _, _, starts, key_lengths, _ = batch.arguments()

    library.call(
        "attention", out=out, q=q, k_cache=k_cache, v_cache=v_cache, starts=starts, key_lengths=key_lengths, tables=tables,
        scale=batch.scale, causal=1,
    )  # fmt: skip

    assert same_bits(out, batch.run())


def test_cross_attention_has_its_own_keys(library: Library) -> None:
    """More queries than keys: without a mask, each sees them all."""
    batch = Batch.of((5, 200), (9, 3))

    out = batch.run(causal=False)

    assert_close(out, batch.dense(causal=False).float())


def test_row_without_keys_gives_zero(column: str) -> None:
    """No keys at all; and two of five queries stand before the first of three keys."""
    out = Batch.of((0, 3), (2, 5)).run()

    assert torch.equal(out[:4], torch.zeros(4, 4, 32))
    assert out[4:].isfinite().all()
    assert out[4:].all()


def test_batch_without_rows_is_empty(column: str) -> None:
    assert Batch.of((20,), (0,)).run().shape == (0, 4, 32)


# ---- the same bits ----

LONG = {"cpu": 1300, "cuda": 1300, "sim": 600}  # more than two splits, one on the stand-in, which is slow
# fp32, since rounding to halves would hide most differences, and bf16, which some columns and levels multiply in another way
by_width = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def whole(library: Library, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Batch, Tensor]:
    long = LONG[library.path.stem.removeprefix("liblmi_")]
    batch = Batch.of((long,), (long,), heads=(4, 2), size=16, dtype=dtype)
    return batch, batch.run(**options)


def part(batch: Batch, first: int, last: int) -> Batch:
    """Rows first .. last-1 of a one-sequence batch as a chunk: later keys are not there yet."""
    return replace(batch, q=batch.q[first:last], queries=(last - first,), lengths=(last,))


SAME_BITS = {name: OPTIONS[name] for name in ("causal", "window", "soft cap", "alibi", "relative", "all")}
by_same_bits = pytest.mark.parametrize("options", SAME_BITS.values(), ids=SAME_BITS.keys())


@by_width
@by_same_bits
def test_chunks_of_seven_give_the_same_bits(library: Library, options: dict[str, Any], dtype: torch.dtype) -> None:
    batch, expected = whole(library, dtype, **options)

    long = batch.lengths[0]
    chunks = [part(batch, first, min(first + 7, long)).run(**options) for first in range(0, long, 7)]

    assert same_bits(torch.cat(chunks), expected)


@by_width
@by_same_bits
def test_decoding_gives_the_same_bits(library: Library, options: dict[str, Any], dtype: torch.dtype) -> None:
    batch, expected = whole(library, dtype, **options)
    rows = [row for row in (*range(140), *range(505, 520), *range(1020, 1030), *range(1270, 1300)) if row < batch.lengths[0]]

    alone = [part(batch, row, row + 1).run(**options) for row in rows]

    assert same_bits(torch.cat(alone), expected[rows])


@by_same_bits
def test_batching_gives_the_same_bits(library: Library, options: dict[str, Any]) -> None:
    """The prompt's second half as a chunk, among others, and a decode of the same keys."""
    batch, expected = whole(library, **options)
    long, half = batch.lengths[0], batch.lengths[0] // 2
    others = rand(10, 4, 16, seed=9)
    crowd = replace(
        batch,
        q=torch.cat([others[:3], batch.q[half:], others[3:], batch.q[-1:]]),
        tables=batch.tables.expand(4, -1),
        queries=(3, long - half, 7, 1),
        lengths=(long - 100, long, 7, long),
    )

    out = crowd.run(**options)

    assert same_bits(out[3 : 3 + long - half], expected[half:])
    assert same_bits(out[-1:], expected[-1:])


@by_width
@by_same_bits
@pytest.mark.cpu_column
def test_heads_that_share_a_unit_have_the_same_bits(library: Library, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Where many sequences decode a unit is several heads of one, as many as its length allows; alone each head is one."""
    check_each_alone(
        library, Batch.of((5, 64, 700, 33, 90, 1, 130, 20, 64), (1, 1, 2, 1, 5, 1, 1, 1, 3), (4, 4), 16, dtype), options
    )


@pytest.mark.cpu_column
def test_heads_that_share_a_unit_have_the_same_bits_by_tiles(library: Library) -> None:
    check_each_alone(library, Batch.of((5, 64, 700, 33, 90, 1, 130, 20, 64), (1,) * 9, (16, 4), 32, torch.bfloat16), {})


def check_each_alone(library: Library, batch: Batch, options: dict[str, Any]) -> None:
    expected = batch.run(**options)
    pieces = zip(batch.q.split(batch.queries), batch.tables, batch.queries, batch.lengths, strict=True)

    alone = [replace(batch, q=q, tables=table[None], queries=(num,), lengths=(length,)) for q, table, num, length in pieces]

    assert same_bits(torch.cat([each.run(**options) for each in alone]), expected)


@pytest.mark.cpu_column
def test_threads_do_not_change_bits(library: Library, request: pytest.FixtureRequest) -> None:
    batch, expected = whole(library)
    decode = part(batch, batch.lengths[0] - 1, batch.lengths[0])
    results = []

    for threads in (1, 2, 3, 7):
        library.set_threads(threads)
        results.append((batch.run(), decode.run()))

    assert all(same_bits(prefill, expected) and same_bits(row, expected[-1:]) for prefill, row in results)


def test_unseen_keys_do_not_change_bits(library: Library) -> None:
    """Keys after a row, and before its window, may be anything."""
    check_unseen_keys(library, torch.float32)


@pytest.mark.cpu_column  # tensor cores take what any row of a unit sees times 0, which is no number for a NaN
def test_unseen_keys_do_not_change_bits_of_halves(library: Library) -> None:
    check_unseen_keys(library, torch.bfloat16)


def check_unseen_keys(library: Library, dtype: torch.dtype) -> None:
    batch, expected = whole(library, dtype, window=19)
    num_blocks = -(-batch.lengths[0] // BLOCK_SIZE)
    for cache in (batch.k_cache, batch.v_cache):
        flat = cache[batch.tables[0, :num_blocks].long()].transpose(1, 2).flatten(0, 1)
        flat[:400] = flat[500:] = NAN
        cache[batch.tables[0, :num_blocks].long()] = flat.unflatten(0, (-1, BLOCK_SIZE)).transpose(1, 2)

    assert same_bits(batch.run(window=19)[418:500], expected[418:500])


@by_width
def test_chunks_of_all_sizes_give_the_same_bits(library: Library, dtype: torch.dtype) -> None:
    """Few rows are cut by splits, many by units."""
    batch, expected = whole(library, dtype)
    long = batch.lengths[0]

    large = [part(batch, first, min(first + 90, long)).run() for first in range(0, long, 90)]
    small = part(batch, long - 20, long).run()

    assert same_bits(torch.cat(large), expected)
    assert same_bits(small, expected[-20:])


def test_blocks_before_the_window_may_be_gone(library: Library) -> None:
    batch = Batch.of((600, 100), (3, 1))
    expected = batch.run(window=50)

    batch.tables[0, : (600 - 3 - 49) // BLOCK_SIZE] = -1
    batch.tables[1, : 50 // BLOCK_SIZE] = -7

    assert same_bits(batch.run(window=50), expected)
    assert_close(expected, batch.twin(window=50))


# ---- fp8 caches ----

FP8 = torch.float8_e4m3fn
SCALES = {"k_scale": 0.37, "v_scale": 2.9}


def test_twin_reads_fp8_by_its_scales() -> None:
    batch = Batch.of((33, 1, 70, 17), (33, 1, 4, 0), cache=FP8)
    k, v = batch.k_cache.double() * SCALES["k_scale"], batch.v_cache.double() * SCALES["v_scale"]

    assert_close(batch.twin(**SCALES), replace(batch, k_cache=k, v_cache=v).dense().float())


@pytest.mark.parametrize("size", [40, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_is_read_as_the_numbers_it_stands_for(library: Library, dtype: torch.dtype, size: int) -> None:
    """Each is a number of every dtype, so that a cache which holds them in the dtype itself gives the same bits."""
    batch = Batch.of((130, 1, 600, 17), (30, 1, 3, 0), size=size, dtype=dtype, cache=FP8)
    codes = torch.arange(batch.k_cache.numel(), dtype=torch.int32).view(batch.k_cache.shape) * 37 % 254  # 127 stands for 254
    every = torch.where(codes == 127, 254, codes).to(torch.uint8).view(FP8)
    own = ~batch.k_cache.float().isnan()  # the rest remains NaN
    for cache in (batch.k_cache, batch.v_cache):
        cache[own] = every[own]
    plain = replace(batch, k_cache=batch.k_cache.to(dtype), v_cache=batch.v_cache.to(dtype))

    out = batch.run(scale=1e-3, **OPTIONS["all"])

    assert same_bits(out, plain.run(scale=1e-3, **OPTIONS["all"]))
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_fp8_stays_one(library: Library, dtype: torch.dtype) -> None:
    """Of either sign, in the values of one key and head: its column alone; in a key: the whole row."""
    batch = Batch.of((70,), (1,), heads=(4, 2), dtype=dtype, cache=FP8)
    batch.v_cache[batch.tables[0, 1], 0, 3, 5:7] = torch.tensor([127, 255], dtype=torch.uint8).view(FP8)
    batch.k_cache[batch.tables[0, 1], 1, 3, 5] = NAN

    out = batch.run()[0].isnan()

    assert out[2:].all()
    assert out[:2].sum(1).tolist() == [2, 2]
    assert out[:2, 5:7].all()


@pytest.mark.parametrize("options", [OPTIONS["all"], OPTIONS["whole relative"]], ids=["all", "whole relative"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_to_fp8_matches_twin(library: Library, dtype: torch.dtype, options: dict[str, Any]) -> None:
    batch = Batch.of((130, 1, 600, 64, 17), (130, 1, 3, 1, 0), dtype=dtype, cache=FP8)
    rounds_weights = library.path.name != "liblmi_cpu.so"

    # the values' scale is the error's, too
    factor = SCALES["v_scale"] * (4 if rounds_weights else 1)
    exact = replace(batch, k_cache=batch.k_cache.float() * SCALES["k_scale"], v_cache=batch.v_cache.float() * SCALES["v_scale"])
    slack = exact.slack(**options) if dtype == torch.bfloat16 else None
    assert_close(batch.run(**SCALES, **options), batch.twin(**SCALES, **options), factor=factor, slack=slack)


def test_fp8_bits_do_not_depend_on_the_batch(library: Library) -> None:
    """A prompt whole, in chunks, and as decodes among others."""
    options = {**SCALES, **OPTIONS["all"]}
    batch = Batch.of((600,), (600,), size=16, dtype=torch.bfloat16, cache=FP8)
    rows = (0, 63, 64, 130, 511, 512, 599)
    crowd = replace(
        batch,
        q=batch.q[list(rows)],
        tables=batch.tables.expand(len(rows), -1),
        queries=(1,) * len(rows),
        lengths=tuple(row + 1 for row in rows),
    )

    expected = batch.run(**options)
    chunks = [part(batch, first, first + 100).run(**options) for first in range(0, 600, 100)]

    assert same_bits(torch.cat(chunks), expected)
    assert same_bits(crowd.run(**options), expected[list(rows)])


# ---- what is refused ----


def test_attention_names_the_wrong_shape(column: str) -> None:
    batch = Batch.of((20, 9), (2, 1), heads=(4, 2))

    with pytest.raises(KernelError, match=r"attention: q has shape \[3, 128\]"):
        replace(batch, q=batch.q.flatten(1)).run()
    with pytest.raises(KernelError, match=r"attention: v_cache is .*(F16|float16); it must be .*(F32|float32)"):
        replace(batch, v_cache=batch.v_cache.half()).run()
    with pytest.raises(KernelError, match=r"attention: starts must ascend from 0 to 3"):
        replace(batch, queries=(2, 2)).run()
    with pytest.raises(KernelError, match=r"attention: D must be a multiple of 8 up to 256"):
        Batch.of((20,), (1,), size=36).run()
    with pytest.raises(KernelError, match=r"attention: K must divide H"):
        replace(batch, q=rand(3, 5, 32)).run()
    with pytest.raises(KernelError, match=r"attention: alibi has shape \[3\]; it must be \[H=4\]"):
        batch.run(alibi=torch.ones(3))
    with pytest.raises(KernelError, match=r"attention: window must be at least 0"):
        batch.run(window=-1)
    with pytest.raises(KernelError, match=r"attention: v_cache is .*(F32|float32); it must be .*(F8E4M3|float8_e4m3fn)"):
        replace(batch, k_cache=batch.k_cache.to(FP8)).run()
    with pytest.raises(
        KernelError, match=r"attention: k_scale=0\.0.* must be finite and above 0 where k_cache is .*(F8E4M3|float8)"
    ):
        Batch.of((20,), (1,), cache=FP8).run(k_scale=0.0)


def test_attention_names_the_sequence_with_a_bad_table(column: str) -> None:
    batch = Batch.of((20, 9), (2, 1))

    with pytest.raises(KernelError, match=r"sequence 1 has key_lengths=49; its table has room for 48"):
        replace(batch, lengths=(20, 49)).run()
    batch.tables[0, 1] = len(batch.k_cache)
    with pytest.raises(KernelError, match=r"sequence 0 has block 4 in its table; it must be 0 to N-1"):
        batch.run()


def test_attention_names_bad_buckets(column: str) -> None:
    batch = Batch.of((20,), (1,))

    with pytest.raises(KernelError, match=r"relative_bias must have at least 2 buckets, 4 if not causal"):
        batch.run(causal=False, relative_bias=torch.ones(2, 4))
    with pytest.raises(KernelError, match=r"max_distance=16 must be 17 to 1048576"):
        batch.run(relative_bias=torch.ones(32, 4), max_distance=16)


# ---- on sm_90a: kernels of their own for prompts and for few rows, with the bits of the others ----


def check_sm90a(library: Library, kernel: str, batch: Batch, **options: Any) -> None:
    """Bits of the kernel for sm_80, which other tests compare with the twin."""
    expected = batch.run(**options)

    with on_sm90a(library) as launched:
        out = batch.run(**options)
        kernels = launched()

    assert kernel in kernels
    assert out.isfinite().all()
    assert same_bits(out, expected)


def check_prompts(library: Library, batch: Batch, **options: Any) -> None:
    check_sm90a(library, "attention of prompts", batch, **options)


def check_splits(library: Library, batch: Batch, **options: Any) -> None:
    check_sm90a(library, "attention of splits", batch, **options)


@pytest.mark.sim_column
@by_option
@pytest.mark.parametrize("dtype", HALVES)
def test_prompts_on_sm90a_have_the_same_bits(library: Library, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Prompts of two and three units, one of them behind cached keys; between them a decode, few rows, none."""
    check_prompts(library, Batch.of((130, 1, 600, 64, 17), (130, 1, 70, 3, 0), dtype=dtype), **options)


@pytest.mark.sim_column
@pytest.mark.parametrize(("heads", "size"), [((1, 1), 8), ((3, 3), 40), ((6, 2), 64), ((7, 1), 72), ((16, 1), 128)])
def test_prompts_on_sm90a_take_heads_and_sizes(library: Library, heads: tuple[int, int], size: int) -> None:
    check_prompts(library, Batch.of((97, 150), (97, 5), heads=heads, size=size, dtype=torch.bfloat16))


def in_blocks_of(batch: Batch, block_size: int) -> Batch:
    """A batch of one sequence with the same keys in larger or smaller blocks."""
    caches, num_blocks = [], -(-batch.lengths[0] // block_size)
    for cache in (batch.k_cache, batch.v_cache):
        keys = cache[batch.tables[0, : -(-batch.lengths[0] // BLOCK_SIZE)].long()].transpose(1, 2).flatten(0, 1)  # [keys,K,D]
        padded = torch.full((num_blocks * block_size, *keys.shape[1:]), NAN, dtype=keys.dtype)
        padded[: batch.lengths[0]] = keys[: batch.lengths[0]]
        caches.append(padded.unflatten(0, (num_blocks, block_size)).transpose(1, 2).contiguous().flip(0))
    return replace(
        batch, k_cache=caches[0], v_cache=caches[1], tables=torch.arange(num_blocks - 1, -1, -1, dtype=torch.int32)[None]
    )


@pytest.mark.sim_column
@pytest.mark.parametrize("block_size", [8, 32, 64, 128])
def test_prompts_on_sm90a_take_blocks_that_fit_tiles(library: Library, block_size: int) -> None:
    check_prompts(library, in_blocks_of(Batch.of((200,), (70,), dtype=torch.bfloat16), block_size), window=90)


@pytest.mark.sim_column
def test_prompts_on_sm90a_have_keys_of_their_own(library: Library) -> None:
    """More queries than keys, none at all, and a window before which blocks are gone and the key next to it is no number."""
    check_prompts(library, Batch.of((5, 0, 200), (90, 80, 70), dtype=torch.bfloat16), causal=False)
    check_prompts(library, Batch.of((0, 3), (70, 100), dtype=torch.bfloat16))
    gone = Batch.of((600,), (40,), dtype=torch.bfloat16)
    before = 600 - 40 - 50
    gone.k_cache[gone.tables[0, before // BLOCK_SIZE], :, before % BLOCK_SIZE] = NAN
    gone.v_cache[gone.tables[0, before // BLOCK_SIZE], :, before % BLOCK_SIZE] = NAN
    gone.tables[0, : before // BLOCK_SIZE] = -1
    check_prompts(library, gone, window=50)


@pytest.mark.sim_column
def test_prompts_on_sm90a_of_one_begun_tile_each_and_a_long_one(library: Library) -> None:
    """Of a begun tile one warp loads the values alone; the other must not lose count of the ring's turns meanwhile."""
    check_prompts(library, Batch.of((300, *[40] * 11, 700), (300, *[40] * 11, 200), heads=(2, 1), dtype=torch.bfloat16))


@pytest.mark.sim_column
@by_option
@pytest.mark.parametrize("dtype", HALVES)
def test_splits_on_sm90a_have_the_same_bits(library: Library, options: dict[str, Any], dtype: torch.dtype) -> None:
    """One row and many, of one unit and of three; one split and two, whole and begun; none of a sequence."""
    check_splits(library, Batch.of((130, 1, 600, 512, 17), (20, 1, 3, 1, 0), dtype=dtype), **options)


@pytest.mark.sim_column
@pytest.mark.parametrize(
    ("heads", "size"), [((1, 1), 8), ((3, 3), 40), ((6, 2), 64), ((7, 1), 72), ((16, 1), 128), ((4, 1), 136), ((2, 2), 256)]
)
def test_splits_on_sm90a_take_heads_and_sizes(library: Library, heads: tuple[int, int], size: int) -> None:
    check_splits(library, Batch.of((97, 550), (4, 1), heads=heads, size=size, dtype=torch.bfloat16))


@pytest.mark.sim_column
@pytest.mark.parametrize("block_size", [8, 32, 64, 128])
def test_splits_on_sm90a_take_blocks_that_fit_tiles(library: Library, block_size: int) -> None:
    check_splits(library, in_blocks_of(Batch.of((300,), (5,), dtype=torch.bfloat16), block_size), window=190)


@pytest.mark.sim_column
def test_splits_on_sm90a_have_keys_of_their_own(library: Library) -> None:
    """More queries than keys, none at all, and a window before which blocks are gone and the key next to it is no number."""
    check_splits(library, Batch.of((5, 0, 200), (30, 8, 7), dtype=torch.bfloat16), causal=False)
    gone = Batch.of((600, 1100), (4, 1), dtype=torch.bfloat16)
    for sequence, before in enumerate((600 - 4 - 50, 1100 - 1 - 50)):
        gone.k_cache[gone.tables[sequence, before // BLOCK_SIZE], :, before % BLOCK_SIZE] = NAN
        gone.v_cache[gone.tables[sequence, before // BLOCK_SIZE], :, before % BLOCK_SIZE] = NAN
        gone.tables[sequence, : before // BLOCK_SIZE] = -1
    check_splits(library, gone, window=50)


@pytest.mark.sim_column
def test_more_than_32_splits_merge_as_those_of_a_prompt(library: Library) -> None:
    """A prompt's rows merge one split after the other; those of a decode in a kernel of its own, 32 at a time. Scores grow with the
    keys' numbers, so that no split's weights vanish and the greatest score changes."""
    slope = {"alibi": torch.tensor([1e-3])}
    batch = Batch.of((34 * 512 + 100,), (65,), heads=(1, 1), size=8, dtype=torch.bfloat16)
    decode = replace(batch, q=batch.q[-1:], queries=(1,))
    expected = batch.run(**slope)[-1:]

    assert same_bits(decode.run(**slope), expected)
    check_splits(library, decode, **slope)


OTHERS = {
    "fp32": Batch.of((80, 30), (80, 1)),
    "fp8": Batch.of((80, 30), (80, 1), dtype=torch.bfloat16, cache=FP8),
    "blocks that do not divide a tile": in_blocks_of(Batch.of((80,), (80,), dtype=torch.bfloat16), 24),
    "rows off 16 bytes": replace(
        Batch.of((80, 30), (80, 1), dtype=torch.bfloat16), q=rand(81, 4, 33, dtype=torch.bfloat16)[..., :32]
    ),
}


@pytest.mark.sim_column
@pytest.mark.parametrize("batch", OTHERS.values(), ids=OTHERS.keys())
def test_others_go_the_way_of_sm80(library: Library, batch: Batch) -> None:
    expected = batch.run()

    with on_sm90a(library) as launched:
        out = batch.run()
        kernels = launched()

    assert kernels <= {"attention", "attention merge"}
    assert same_bits(out, expected)


@pytest.mark.sim_column
def test_prompts_of_more_columns_than_two_states_in_registers_go_the_way_of_sm80(library: Library) -> None:
    batch = Batch.of((80,), (80,), size=136, dtype=torch.bfloat16)
    expected = batch.run()

    with on_sm90a(library) as launched:
        out = batch.run()
        kernels = launched()

    assert "attention of prompts" not in kernels
    assert same_bits(out, expected)
