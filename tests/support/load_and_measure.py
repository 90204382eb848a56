"""Loads a model in a process of its own and prints, as JSON, what that took: `python load_and_measure.py FOLDER DTYPE`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import driving
import torch

from lmi_dist import ops


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{name}:")))


def packed_bytes(part: Any) -> int:
    """Of all tensors and packed weights below a model's object."""
    if isinstance(part, torch.Tensor):
        return part.nbytes
    if isinstance(part, ops.PackedWeight):
        return part.size_bytes
    children = part if isinstance(part, list) else vars(part).values() if hasattr(part, "__dict__") else ()
    return sum(packed_bytes(child) for child in children)


def main() -> None:
    folder, dtype = sys.argv[1:]
    torch.ones(64, 64) @ torch.ones(64, 64)  # torch's own first-use memory is not the model's
    ops.select("cpu", 2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, started = status("VmRSS"), time.perf_counter()
    runner = driving.make_runner(Path(folder), dtype=dtype, cpu_threads=2, max_model_len=16, kv_cache_memory_bytes=8 << 20)
    seconds, peak = time.perf_counter() - started, status("VmHWM")
    for layer in runner.cache.layers:
        layer.k.zero_(), layer.v.zero_()  # the pool is part of the bargain, so let it be there
    told = {"peak": max(peak, status("VmHWM")) - before, "rest": status("VmRSS") - before}
    sys.stdout.write(
        json.dumps({**told, "seconds": seconds, "packed": packed_bytes(runner.model), "pool": runner.cache.size_bytes})
    )


main()
