"""What parts of the GPU script measure with: sizes, the machine's own limits in the same run (device-to-device copies, a large bf16
product), the time of a call, and the rows that come out."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from lmi_dist import ops

Work = Callable[[int], object]


@dataclass(frozen=True)
class Sizes:
    """Those of Llama-3-8B, or tiny ones that the stand-in runs in seconds."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 4096
    inner: int = 14336
    vocab: int = 128256
    tokens: int = 4096
    rows: int = 64  # of logits, and sequences of the large decode
    context: int = 4096
    long_context: int = 32768
    prompt: int = 8192
    experts: int = 8
    copy_bytes: int = 1 << 30
    product: int = 8192
    cold_bytes: int = 400_000_000  # what the copies of an input take together: several times a GPU's cache
    repetitions: int = 20


TINY = Sizes(
    heads=4, kv_heads=2, head_dim=16, hidden=64, inner=128, vocab=96, tokens=8, rows=3, context=40, long_context=600, prompt=48,
    copy_bytes=1 << 18, product=64, cold_bytes=1, repetitions=2,
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    copies: dict[str, float]  # bytes/s, read and written, by who copies
    product: float  # operations/s in bf16

    @property
    def copy(self) -> float:
        """The most that any of them moves."""
        return max(self.copies.values())

    def row(self) -> "Row":
        copies = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in self.copies.items())
        return Row(f"limits: copy {self.copy / 1e9:.0f} GB/s ({copies}), bf16 product {self.product / 1e12:.3f} TFLOP/s")


@dataclass(frozen=True)
class Row:
    """A line of the table; seconds None: it failed, as `note` says."""

    name: str
    seconds: float | None = None
    share: float | None = None
    of: str = ""
    goal: float | None = None
    peer: str = ""
    peer_seconds: float | None = None
    note: str = ""


# ---- time ----


def seconds_a_call(work: Work, copies: int, repetitions: int, *, waits: bool = False) -> float:
    """Median over repetitions of a run over all copies. On a GPU the run is a CUDA graph, so that the host's part does not count;
    results stay alive within it, so that each call writes memory of its own. waits: for its result, which no graph can."""
    num = max(copies, 4)
    if waits or not torch.cuda.is_available():
        work(0)
        return median(timed(work, num) for _ in range(repetitions))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(copies):
            work(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [work(i % copies) for i in range(num)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for _ in range(3):
        graph.replay()
    for first, last in events:
        first.record()
        graph.replay()
        last.record()
    torch.cuda.synchronize()
    del kept
    return median(first.elapsed_time(last) for first, last in events) / 1e3 / num


def timed(work: Work, num: int) -> float:
    start = time.perf_counter()
    for i in range(num):
        work(i)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / num


def best_seconds(work: Work, repetitions: int) -> float:
    """Of a call so long that its launch does not count: the best of several, each between two events of its own; outside of a
    graph, where the driver may copy in another way."""
    if not torch.cuda.is_available():
        return min(timed(work, 1) for _ in range(repetitions))
    work(0)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for first, last in events:
        first.record()
        work(0)
        last.record()
    torch.cuda.synchronize()
    return min(first.elapsed_time(last) for first, last in events) / 1e3


def measure_copies(sizes: Sizes, device: str) -> dict[str, float]:
    """Bytes/s of all that copies without a change: the driver's copy, a kernel of torch's, and ours that gathers rows in order."""
    rows, width = sizes.copy_bytes // 8192, 4096
    source, target = (torch.randn(rows, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    order = torch.arange(rows, device=device, dtype=torch.int32)
    works: dict[str, Work] = {
        "driver": lambda _: target.copy_(source),
        "torch's kernel": lambda _: torch.neg(source, out=target),
        "our kernel": lambda _: ops.embedding(order, source),
    }
    return {name: 2 * source.nbytes / best_seconds(work, sizes.repetitions) for name, work in works.items()}


def measure_limits(sizes: Sizes, device: str) -> Limits:
    copies = measure_copies(sizes, device)
    a, b = (torch.randn(sizes.product, sizes.product, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = seconds_a_call(lambda i: a @ b, 1, sizes.repetitions)
    return Limits(copies, 2 * sizes.product**3 / product)
