"""Sums over ranks by the GPUs themselves (lmi_peer_all_reduce): their bits on real GPUs, plain and in a CUDA graph, then their time
beside NCCL's.

    python tests/benchmarks/gpu_ranks.py [--ranks 2] [--library build/gpu/liblmi_cuda.so]

Needs torch and numpy. A rank is a process with the next GPU of those that are visible. Where several have to share one, it takes
turns with them while they wait for each other: the bits count, the times do not, and NCCL is left out, which refuses that.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.extend(str(Path(__file__).parents[2] / each) for each in (".", "tests/support"))
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from lmi_dist import ops

MAX_BYTES = 1 << 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS = (1, 7, 33, 4096, 8191, 65_536, 150_001)
NUM_CALLS, NUM_REPLAYS, NUM_TIMED = 40, 10, 50
TIMED_BYTES = (8 << 10, 64 << 10, 256 << 10, 1 << 20)


def term(rank: int, number: int, dtype: torch.dtype, call: int = 0) -> Tensor:
    return torch.randn(number, generator=torch.Generator().manual_seed(1000 * call + 97 * number + rank)).to(dtype)


def total(size: int, number: int, dtype: torch.dtype, call: int = 0) -> Tensor:
    """In fp32 in rank order, rounded once."""
    terms = [term(rank, number, dtype, call).float() for rank in range(size)]
    return sum(terms[1:], terms[0]).to(dtype)


def is_right(x: Tensor, *case: object) -> bool:
    return torch.equal(x.cpu(), total(*case))  # type: ignore[arg-type]


def plain_sums(peers: ops.Peers, rank: int, size: int) -> bool:
    cases = [(number, dtype, 0) for dtype in DTYPES for number in NUMBERS]
    cases += [((37, 5000, 9001)[call % 3], torch.bfloat16, call) for call in range(NUM_CALLS)]
    terms = [term(rank, *case).cuda() for case in cases]
    sums = [peers.all_reduce(x) for x in terms]  # one behind the other, without a wait of the host's
    return all(is_right(x, size, *case) for x, case in zip(sums, cases, strict=True))


def graph_sums(peers: ops.Peers, rank: int, size: int) -> bool:
    """Two sums in a graph, whose inputs change from one replay to the next."""
    xs = [term(rank, number, torch.bfloat16).cuda() for number in (5000, 37)]
    inputs = [x.clone() for x in xs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x, given in zip(xs, inputs, strict=True):
            peers.all_reduce(x.copy_(given))
    right = True
    for call in range(NUM_REPLAYS):
        for given in inputs:
            given.copy_(term(rank, len(given), torch.bfloat16, call))
        graph.replay()
        right &= all(is_right(x, size, len(x), torch.bfloat16, call) for x in xs)
    return right


def micros(work: object) -> float:
    """Of one of NUM_TIMED calls in a graph."""
    work()  # type: ignore[operator]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(NUM_TIMED):
            work()  # type: ignore[operator]
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    first.record()
    graph.replay()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) * 1e3 / NUM_TIMED


def run(rank: int, size: int, library: Path, folder: str) -> None:
    shares = torch.cuda.device_count() < size
    torch.cuda.set_device(rank % torch.cuda.device_count())
    ops.select("cuda", path=library)
    store = dist.FileStore(f"{folder}/store", size)
    peers = ops.Peers(rank, size, MAX_BYTES)
    store.set(str(rank), peers.handle)
    peers.map([store.get(str(other)) for other in range(size)])
    for name, sums in (("plain", plain_sums), ("in a CUDA graph", graph_sums)):
        print(f"rank {rank}: sums {name}: {'right' if sums(peers, rank, size) else 'WRONG'}", flush=True)
    if not shares:
        dist.init_process_group("nccl", init_method=f"file://{folder}/nccl", rank=rank, world_size=size)
    for num_bytes in TIMED_BYTES:
        x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device="cuda")
        times = [("ours", micros(lambda x=x: peers.all_reduce(x)))]
        times += [] if shares else [("NCCL's own", micros(lambda x=x: dist.all_reduce(x)))]
        if rank == 0:
            told = ", ".join(f"{name} {time:.1f} us" for name, time in times)
            print(f"{num_bytes >> 10} KiB: {told}{' (GPUs are shared: this says nothing)' if shares else ''}", flush=True)
    torch.cuda.synchronize()
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(size)])  # nobody unmaps what another still reads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--library", type=Path, default=Path("build/gpu/liblmi_cuda.so"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (options.ranks, options.library.resolve(), folder), nprocs=options.ranks)


if __name__ == "__main__":
    main()
