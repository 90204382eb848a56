"""Stages of a step, each alone, next to what this machine can do: python tests/benchmarks/kernels.py --help

The shapes are those of llama-1.1b in bf16. Linears and decode take weights and keys that lie in memory, not in a cache: copies in
turn. A line tells the best and the median time, and the share of the limit (bandwidth or arithmetic, measured in the same run) that
the best one reaches; `--against` gives another library its turns between those of the first.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lmi_dist_handler import bench_limits

from lmi_dist import ops
from lmi_dist.ops import column
from lmi_dist.ops.abi import Library, find_library

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 2048, 5632, 32, 4, 64, 16
ROWS = (1, 4, 16, 64, 512)
# name, outputs, inputs, gated
LINEARS = (
    ("qkv", (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, False),
    ("gate_up", 2 * FEED_FORWARD, HIDDEN, True),
    ("down", HIDDEN, FEED_FORWARD, False),
)
COLD_BYTES = 200e6  # what the copies of a weight take together: several times the last-level cache


@dataclass
class Stage:
    """work(i) is the i-th call; it reads so many bytes and does so many operations."""

    name: str
    num_bytes: float
    num_flops: float
    work: Callable[[int], object]


def linears(rows: list[int]) -> Iterator[Stage]:
    for name, outputs, inputs, gated in LINEARS:
        size = 2 * outputs * inputs
        weights = [ops.pack_linear(outputs, inputs, torch.bfloat16, gated=gated) for _ in range(max(1, int(COLD_BYTES / size)))]
        values = torch.randn(outputs, inputs).bfloat16()
        for weight in weights:
            weight.put(values)
        for num in rows:
            x = torch.randn(num, inputs).bfloat16()

            def work(i: int, x: torch.Tensor = x, weights: list[ops.PackedWeight] = weights, gated: bool = gated) -> object:
                return ops.linear(x, weights[i % len(weights)], activation="silu" if gated else "identity")

            yield Stage(f"linear {name} [{outputs},{inputs}] {num} rows", size, num * size, work)


def attentions() -> Iterator[Stage]:
    """Decode of 1 and 16 sequences with 1000 keys each, a chunk of 512 at the end of 512 and of 2048 keys; each in bf16 and fp8."""
    shapes = (([1], [1000]), ([1] * 16, [1000] * 16), ([512], [512]), ([512], [2048]))
    for (queries, lengths), cached in product(shapes, (torch.bfloat16, torch.float8_e4m3fn)):
        counts = [-(-length // BLOCK_SIZE) for length in lengths]
        key_bytes = 2 * KV_HEADS * HEAD_DIM * cached.itemsize
        copies = max(1, int(COLD_BYTES / (sum(counts) * BLOCK_SIZE * key_bytes))) if queries[0] == 1 else 1
        caches = torch.randn(2, copies * sum(counts), KV_HEADS, BLOCK_SIZE, HEAD_DIM).to(cached)
        tables = torch.randperm(copies * sum(counts)).int().view(copies, len(lengths), -1)
        q = torch.randn(sum(queries), HEADS, HEAD_DIM).bfloat16()
        starts, key_lengths = torch.tensor([0, *queries]).cumsum(0).int(), torch.tensor(lengths).int()

        def work(
            i: int,
            q: torch.Tensor = q,
            caches: torch.Tensor = caches,
            tables: torch.Tensor = tables,
            starts: torch.Tensor = starts,
            key_lengths: torch.Tensor = key_lengths,
        ) -> object:
            return ops.attention(q, caches[0], caches[1], starts, key_lengths, tables[i % len(tables)], scale=HEAD_DIM**-0.5)

        pairs = sum(q * k - q * (q - 1) / 2 for q, k in zip(queries, lengths, strict=True))
        name = f"attention {len(queries)} x {queries[0]} of {lengths[0]} keys" + (" fp8" if cached.itemsize == 1 else "")
        yield Stage(name, key_bytes * sum(lengths), 4 * pairs * HEADS * HEAD_DIM, work)


def norms(rows: list[int]) -> Iterator[Stage]:
    weight = torch.randn(HIDDEN).bfloat16()
    for num in rows:
        x = torch.randn(num, HIDDEN).bfloat16()

        def work(_: int, x: torch.Tensor = x) -> object:
            return ops.rms_norm(x, weight, 1e-5)

        yield Stage(f"norm {num} rows", 4 * num * HIDDEN, 5 * num * HIDDEN, work)


def stages(options: argparse.Namespace) -> list[Stage]:
    every = [*linears(options.rows), *attentions(), *norms(options.rows)]
    return [stage for stage in every if options.only in stage.name]


def seconds(stage: Stage, columns: list[Any], repetitions: int) -> list[list[float]]:
    """Of each column, the time of each call; they take turns."""
    times: list[list[float]] = [[] for _ in columns]
    for i in range(repetitions + 2):
        for own, (chosen, own_stage) in zip(times, columns, strict=True):
            column._chosen = chosen
            start = time.perf_counter()
            own_stage[stage.name].work(i)
            own.append(time.perf_counter() - start)
    return [own[2:] for own in times]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--level", default="best", help="instruction level of the kernels")
    parser.add_argument("--library", type=Path, default=find_library(list(ops.__path__)))
    parser.add_argument("--against", type=Path, help="another build of the library, with its header beside it")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--only", default="", help="stages with this in their name")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--no-limits", action="store_true", help="skip the measuring of the machine's limits")
    options = parser.parse_args()
    limits = None if options.no_limits else bench_limits.measure(options.threads)
    if limits:
        print(f"limits: {limits.bytes_per_s / 1e9:.1f} GB/s, {limits.flops_per_s / 1e9:.0f} GFLOP/s, {options.threads} threads")
    columns = []
    for path in filter(None, (options.library, options.against)):
        opened = Library(path)
        opened.set_threads(options.threads)
        opened.set_level(options.level if path == options.library else "best")
        column._chosen = column.Column("cpu", opened, options.threads, opened.describe())
        print(f"{path}: {opened.describe()}")
        columns.append((column._chosen, {stage.name: stage for stage in stages(options)}))
    for name, stage in columns[0][1].items():
        for own, sign in zip(seconds(stage, columns, options.repetitions), ("", "  against"), strict=False):
            best = min(own)
            line = f"{sign or name:48} {best * 1e3:9.3f} ms (median {median(own) * 1e3:9.3f})"
            line += f" {stage.num_bytes / best / 1e9:7.1f} GB/s {stage.num_flops / best / 1e9:8.1f} GFLOP/s"
            if limits:
                floor = max(stage.num_bytes / limits.bytes_per_s, stage.num_flops / limits.flops_per_s)
                line += f"  {floor / best:5.0%} of the limit"
            print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
