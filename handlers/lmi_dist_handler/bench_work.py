"""What `lmi-dist bench` measures: the workloads, and the least time that a machine needs for them. Plain arithmetic.

    latency     1 request, 128 prompt tokens, 64 new ones: time to first token, decode tok/s
    throughput  32 requests, prompts 16..256, outputs 16..128 (seeded), all there at once, at most 16 running: new tok/s
    prefill1    1 x 1024 prompt tokens, 1 new one: prompt tok/s
    prefill4    4 x 512, likewise

Prompts are random token ids, new ones in every repetition, so that no prefix cache can help; greedy; EOS is ignored.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

WORKLOADS = ("latency", "throughput", "prefill1", "prefill4")
MAX_RUNNING = 16


@dataclass(frozen=True, slots=True)
class Job:
    """One request: its prompt and how many tokens to generate."""

    token_ids: tuple[int, ...]
    num_new: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one repetition: until the last token, and until the first token of all."""

    seconds: float
    first_s: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine can do."""

    bytes_per_s: float
    flops_per_s: float


class ElementBytes(NamedTuple):
    """What a number takes: of the weights, and of a cached key or value."""

    weight: int
    cached: int


def jobs_of(workload: str, repetition: int, seed: int, vocab_size: int) -> list[Job]:
    """The jobs of one repetition; the same arguments give the same ids."""
    chance = random.Random(f"{workload}/{repetition}/{seed}")
    lengths = {"latency": [(128, 64)], "throughput": throughput_lengths(), "prefill1": [(1024, 1)], "prefill4": [(512, 1)] * 4}
    return [Job(tuple(chance.randrange(3, vocab_size) for _ in range(prompt)), new) for prompt, new in lengths[workload]]


def throughput_lengths() -> list[tuple[int, int]]:
    """(prompt, new) tokens of each request, the same in every repetition."""
    chance = random.Random(1234)
    return [(chance.randint(16, 256), chance.randint(16, 128)) for _ in range(32)]


def tokens_per_s(workload: str, jobs: Sequence[Job], timing: Timing) -> float:
    """The workload's own figure: decoded tokens, all new tokens, or prompt tokens a second."""
    num_new = sum(job.num_new for job in jobs)
    if workload == "latency":
        return (num_new - 1) / (timing.seconds - timing.first_s)
    if workload == "throughput":
        return num_new / timing.seconds
    return sum(len(job.token_ids) for job in jobs) / timing.seconds


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama that decide its time."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def read(cls, folder: Path) -> "Shape":
        """From config.json in a checkpoint's folder."""
        keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heads = keys["num_attention_heads"]
        return cls(
            hidden=keys["hidden_size"],
            inner=keys["intermediate_size"],
            layers=keys["num_hidden_layers"],
            heads=heads,
            kv_heads=keys.get("num_key_value_heads") or heads,
            head_dim=keys.get("head_dim") or keys["hidden_size"] // heads,
            vocab=keys["vocab_size"],
        )

    @property
    def body_weights(self) -> int:
        """Weights of all layers' matrices, which every token passes."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocab


@dataclass(slots=True)
class _Sequence:
    num_cached: int
    num_next: int  # tokens of the next step
    num_new: int  # tokens still to make


def floor(shape: Shape, jobs: Sequence[Job], limits: Limits, element_bytes: ElementBytes) -> Timing:
    """The least time the work can take. Every step reads the weights (not the embedding) and the cached keys and values once and
    does its products; whichever takes longer counts. The scheduler is perfect: first come first served, a whole prompt in one step
    together with the running sequences' tokens."""
    waiting = [_Sequence(0, len(job.token_ids), job.num_new) for job in jobs]
    running: list[_Sequence] = []
    times: list[float] = []
    while waiting or running:
        num_free = MAX_RUNNING - len(running)
        running, waiting = running + waiting[:num_free], waiting[num_free:]
        times.append(_step_s(shape, running, limits, element_bytes))
        running = [
            _Sequence(sequence.num_cached + sequence.num_next, 1, sequence.num_new - 1)
            for sequence in running
            if sequence.num_new > 1
        ]
    return Timing(sum(times), times[0])


def _step_s(shape: Shape, running: Sequence[_Sequence], limits: Limits, element_bytes: ElementBytes) -> float:
    num_cached = num_flops = 0
    for sequence in running:
        end = sequence.num_cached + sequence.num_next
        num_keys = sum(range(sequence.num_cached + 1, end + 1))  # each token attends to itself and all before
        num_flops += 2 * (shape.body_weights * sequence.num_next + shape.head_weights)
        num_flops += 4 * shape.layers * shape.heads * shape.head_dim * num_keys
        num_cached += 2 * shape.layers * shape.kv_heads * shape.head_dim * end
    num_bytes = (shape.body_weights + shape.head_weights) * element_bytes.weight + num_cached * element_bytes.cached
    return max(num_bytes / limits.bytes_per_s, num_flops / limits.flops_per_s)
