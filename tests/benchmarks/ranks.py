"""What ranks cost and give on this machine: python tests/benchmarks/ranks.py [--synthetic llama-1.1b] [--rounds 3]

Two ranks on two CPUs, each in a process of its own. A line gives the median of a round, best and worst round. Decoding compares one
rank of two threads with two ranks of one, in turn, at one and at sixteen sequences.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lmi_dist_handler import synthetic
from lmi_dist_handler.cache import default_cache

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import ranks

from lmi_dist import Engine, EngineConfig, Follower, FollowerLink, Request, SamplingParams
from lmi_dist.plan import Chunk, Plan
from lmi_dist.runner import take_cpus

SUMS = ((16 << 10, torch.float32), (16 << 10, torch.bfloat16), (4 << 20, torch.float32), (4 << 20, torch.bfloat16))
NUM_SEQUENCES = 256
PROMPT_TOKENS, NEW_TOKENS = 128, 64
IDLE_S = 5.0
NOTHING = Plan(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--synthetic", choices=synthetic.PRESETS, default="llama-1.1b", help="the model that decodes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-decode", action="store_true", help="leave the model out")
    arguments = parser.parse_args()
    for num_bytes, dtype in SUMS:
        calls = max(50, (8 << 20) // num_bytes * 4)
        rounds = [ranks.run(2, lambda link: time_sums(link, num_bytes, dtype, calls))[0] for _ in range(arguments.rounds)]  # noqa: B023
        report(f"all-reduce {num_bytes >> 10} KB {str(dtype).removeprefix('torch.')}, 2 ranks", rounds, 1e6, "us")
    rounds = [ranks.run(2, time_publishing)[0] for _ in range(arguments.rounds)]
    report(f"publish a plan of {NUM_SEQUENCES} sequences", rounds, 1e6, "us")
    report("idle, 2 ranks together", [sum(ranks.run(2, idle)) / IDLE_S], 100, "% of a core")
    if not arguments.no_decode:
        compare_decoding(model_folder(arguments.synthetic), arguments.rounds)


def report(what: str, rounds: list[float], scale: float, unit: str) -> None:
    print(f"{what}: {min(rounds) * scale:.2f} {unit} (worst of {len(rounds)} rounds {max(rounds) * scale:.2f})", flush=True)


def time_sums(link: Any, num_bytes: int, dtype: torch.dtype, calls: int) -> float:
    """Seconds of a sum, the median."""
    take_cpus(link.ranks)
    begin(link)
    x = torch.zeros(num_bytes // dtype.itemsize, dtype=dtype)
    return median(timed(lambda: link.all_reduce(x)) for _ in range(calls))


def begin(link: Any, plan: Plan = NOTHING) -> None:
    """A step, on either side."""
    if isinstance(link, FollowerLink):
        link.next_plan()
    else:
        link.publish(plan)


def time_publishing(link: Any) -> float:
    """Seconds that rank 0 needs to publish a plan, the median; the other rank waits for each."""
    take_cpus(link.ranks)
    tables = [tuple(range(40 * i, 40 * i + 38)) for i in range(NUM_SEQUENCES)]
    times = []
    for step in range(200):
        plan = Plan(step, tuple(Chunk(i, (i,), 400 + step, table, 300, 1) for i, table in enumerate(tables)))
        times.append(timed(lambda: begin(link, plan)))  # noqa: B023
        link.all_reduce(torch.zeros(1))
        time.sleep(0.001)
    return median(times)


def idle(link: Any) -> float:
    """CPU seconds of this rank while nothing is to do."""
    begin(link)
    before = cpu_seconds()
    if isinstance(link, FollowerLink):
        link.next_plan()
    else:
        time.sleep(IDLE_S)
        link.close()
    return cpu_seconds() - before


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# ---- decoding ----


def model_folder(name: str) -> Path:
    folder = default_cache() / name
    if not folder.exists():
        synthetic.write(folder, synthetic.PRESETS[name])
    return folder


def compare_decoding(folder: Path, num_rounds: int) -> None:
    for num_sequences in (1, 16):
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(num_rounds):
            for degree, found in rates.items():
                found.append(ranks.run(degree, lambda link: decode(link, folder, num_sequences))[0])  # noqa: B023
        one, two = max(rates[1]), max(rates[2])
        print(
            f"{folder.name}, {num_sequences} sequences: TP 1 with two threads {one:.1f} tok/s, TP 2 {two:.1f} tok/s, "
            f"ratio {two / one:.3f} (best of {num_rounds} rounds)",
            flush=True,
        )


def decode(link: Any, folder: Path, num_sequences: int) -> float:
    """New tokens a second of rank 0, after everybody's first."""
    if isinstance(link, FollowerLink):
        Follower(link).run()
        return 0.0
    values = {"model": str(folder), "tensor_parallel_degree": link.ranks.size, "max_batch_size": 16, "max_model_len": 256}
    engine = Engine(EngineConfig.of({**values, "kv_cache_memory_bytes": 256 << 20}), link)
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    for i in range(num_sequences):
        ids = torch.randint(4, engine.model.vocab_size, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(i)).tolist()
        engine.add(Request(id=str(i), prompt=tuple(ids), params=params))
    begun: set[str] = set()
    while len(begun) < num_sequences:
        begun |= {output.request_id for output in engine.step() if output.tokens}
    num_before, started = engine.stats().num_generated_tokens, time.perf_counter()
    while engine.has_work:
        engine.step()
    rate = (engine.stats().num_generated_tokens - num_before) / (time.perf_counter() - started)
    engine.close()
    return rate


if __name__ == "__main__":
    main()
