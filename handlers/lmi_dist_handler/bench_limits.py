"""What this machine can do at most, measured by plain torch, in a process of its own: its memory is not the engine's.

Bandwidth: a sum over 1 GiB of float32, far more than any cache. Arithmetic: the faster of torch's bf16 and fp32 products of square
matrices; a mark rather than a law, since kernels may be better than torch's.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from lmi_dist_handler.bench_work import Limits

NUM_READ = 2**28  # floats
SIDE = 2048
NUM_REPETITIONS = 7


def measure(num_threads: int | None, num_read: int = NUM_READ, side: int = SIDE) -> Limits:
    """The limits with so many threads, by a process of its own. Raises CalledProcessError when that fails."""
    words = [str(num_threads or os.cpu_count()), str(num_read), str(side)]
    done = subprocess.run([sys.executable, "-m", __name__, *words], stdout=subprocess.PIPE, check=True)
    return Limits(**json.loads(done.stdout))


def _measure_here(num_threads: int, num_read: int, side: int) -> Limits:
    torch.set_num_threads(num_threads)
    numbers = torch.ones(num_read)
    matrices = [torch.ones(side, side, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    product_s = min(_best_s(lambda m=matrix: m @ m) for matrix in matrices)  # type: ignore[misc]
    return Limits(bytes_per_s=4 * num_read / _best_s(numbers.sum), flops_per_s=2 * side**3 / product_s)


def _best_s(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some repetitions: noise only ever takes time."""
    times = []
    for _ in range(NUM_REPETITIONS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> int:
    num_threads, num_read, side = map(int, sys.argv[1:])
    limits = _measure_here(num_threads, num_read, side)
    sys.stdout.write(json.dumps({"bytes_per_s": limits.bytes_per_s, "flops_per_s": limits.flops_per_s}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
